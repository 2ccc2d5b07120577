#!/usr/bin/env bash
# The main job: toy data, every stage, one table. Interrupted? The same command continues.
#   ./run.sh [--seed N]      seed 0 lies in out/toy, seed N in out/toy-seedN
#   TORCH_INDEX=https://download.pytorch.org/whl/cu128 ./run.sh      which torch build to install
set -euo pipefail
cd "$(dirname "$0")"

usage() { echo "error: $1; usage: ./run.sh [--seed N]" >&2; exit 2; }
seed=0
while [ $# -gt 0 ]; do
  case "$1" in
    --seed) [[ "${2:-}" =~ ^[0-9]+$ ]] || usage "--seed wants a whole number"; seed=$2; shift 2 ;;
    -h|--help) sed -n '2,4s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) usage "unknown argument $1" ;;
  esac
done
out=out/toy; [ "$seed" = 0 ] || out=out/toy-seed$seed

./install.sh
py=.venv/bin/python
export SKIP_DONE=1               # a stage leaves at once if its checkpoint has this very record
export GOMP_SPINCOUNT=3000       # threads that wait give a shared core away sooner: as fast alone,
                                 # 1.6 times as fast beside another program on one of two cores

started=$(date +%s)
$py data/toy.py
at="--out $out --seed $seed"
$py 00_pretrain.py $at
$py 01_sft.py $at --init $out/00_pretrain.pt
$py 02_cot.py $at --init $out/01_sft.pt
$py 06_reward.py $at --init $out/02_cot.pt
$py 03_dpo.py $at --init $out/02_cot.pt
$py 04_rlvr.py $at --init $out/02_cot.pt
$py 05_ppo.py $at --init $out/02_cot.pt --reward $out/06_reward.pt
$py eval.py --out $out --seed $seed
echo "run.sh: $(( $(date +%s) - started )) seconds after install; chat with it: $py chat.py $out/04_rlvr.pt"
