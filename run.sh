#!/usr/bin/env bash
# The main job: toy data, every stage, one table. Interrupted? The same command continues.
#   ./run.sh [--seed N]               on two CPU cores; seed 0 lies in out/toy, N in out/toy-seedN
#   ./run.sh 60m [--seed N]           the same chain on real data: one GPU of 16 GB or more, some hours
#   ./run.sh 124m|406m [--seed N]     the same, larger, on all GPUs of this machine
#   ./run.sh 60m --dry_run            its commands, with tokens, memory and time by formula; runs
#       [--gpus N] [--gpu NAME]       nothing; on other GPUs than this machine's: --gpus 8 --gpu h100
#   TORCH_INDEX=https://download.pytorch.org/whl/cu128 ./run.sh      which torch build to install
set -euo pipefail
cd "$(dirname "$0")"

usage() {
  echo "error: $1; usage: ./run.sh [60m|124m|406m] [--seed N] [--dry_run [--gpus N] [--gpu NAME]]" >&2
  exit 2
}
seed=0 recipe=toy dry=0 gpus="" gpu=""
while [ $# -gt 0 ]; do
  case "$1" in
    --seed) [[ "${2:-}" =~ ^(0|[1-9][0-9]{0,8})$ ]] || usage "--seed wants a whole number below 10^9"
      seed=$2; shift 2 ;;
    60m|124m|406m) recipe=$1; shift ;;
    --dry_run) dry=1; shift ;;
    --gpus) [[ "${2:-}" =~ ^(1|2|3|4|6|8|12|24)$ ]] || usage "--gpus wants 1, 2, 3, 4, 6, 8, 12 or 24"
      gpus=$2; shift 2 ;;
    --gpu) [ -n "${2:-}" ] || usage "--gpu wants a name"
      gpu=$2; shift 2 ;;
    -h|--help) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) usage "unknown argument $1" ;;
  esac
done
[ $dry = 0 ] || [ $recipe != toy ] || usage "--dry_run is for 60m, 124m and 406m"
[ $dry = 1 ] || [ -z "$gpus$gpu" ] || usage "--gpus and --gpu are for --dry_run"
out=out/$recipe; [ "$seed" = 0 ] || out=out/$recipe-seed$seed

[ $dry = 1 ] || ./install.sh
py=.venv/bin/python
export SKIP_DONE=$$              # a stage leaves at once if its checkpoint has this very record,
                                 # and saves and leaves when this process is gone

# Children run in the background, so that who ends this script ends them, too: they save and leave.
children=""
run() {
  if [ $dry = 1 ]; then echo "$@"; return; fi
  "$@" & children=$!
  wait $children
}
pair() {                         # two lists of commands side by side; both end before it does
  local failed=0 child
  children=""
  for list in "$@"; do
    (trap 'leave 130' INT; trap 'leave 143' TERM HUP; $list) & children="$children $!"
  done
  for child in $children; do wait $child || failed=$?; done
  return $failed
}
leave() {
  [ -z "$children" ] || { kill -TERM $children 2>/dev/null; wait $children; } || true
  exit $1
}
trap 'leave 130' INT
trap 'leave 143' TERM HUP

# ---------------------------------------------------------------------------- on GPUs
# Rows a step are divided among 1, 2, 3, 4, 6, 8, 12 or 24 GPUs; --micro_batch and --micro_tokens
# bound the memory.
# Decay is for pretraining: the later rates are so small that 0.1 would take 0.3 % off a weight.

stage() {
  run .venv/bin/torchrun --standalone --nproc_per_node=$gpus $1.py --out $out --seed $seed "${@:2}"
}
chain() {                        # text and its tokens, steps, rate and rows of 00; its shape
  local text=${text:-out/data/$1}
  run $py data/text.py $1 --tokens $2 --out $text
  for source in alpaca dolly gsm8k hh ultrafeedback; do run $py data/$source.py; done
  run $py data/mix.py out/data/{alpaca,dolly,gsm8k,hh,ultrafeedback} --out out/data/chat
  chat="--data out/data/chat"
  stage 00_pretrain --data $text ${*:6} --position learned --block_size 1024 --window 1024 \
    --steps $3 --batch_size 480 --micro_batch $5 --lr $4 --muon_lr 0 --weight_decay 0.1 \
    --warmup 300 --eval_every 250 --save_every 250 --compile 1
  stage 01_sft $chat --init $out/00_pretrain.pt --steps 1100 --batch_size 192 --micro_tokens 6144 \
    --lr 5e-5 --muon_lr 0 --warmup 50
  stage 02_cot $chat --init $out/01_sft.pt --steps 220 --batch_size 96 --micro_tokens 6144 \
    --lr 5e-5 --muon_lr 0 --warmup 20
  stage 06_reward $chat --init $out/02_cot.pt --steps 1100 --batch_size 192 --micro_tokens 6144 \
    --lr 1e-5 --warmup 100 --eval_every 200
  stage 03_dpo $chat --init $out/02_cot.pt --steps 1100 --batch_size 192 --micro_tokens 6144 \
    --beta 0.1 --lr 1e-6 --warmup 100 --eval_every 200
  stage 04_rlvr $chat --init $out/02_cot.pt --steps 140 --batch_size 96 --micro_tokens 6144 \
    --max_new 256 --lr 1e-6
  stage 05_ppo $chat --init $out/02_cot.pt --reward $out/06_reward.pt --steps 40 \
    --batch_size 384 --micro_tokens 6144 --max_new 256 --lr 1e-6
  stage eval $chat --max_new 256
  run $py report.py $out
}
recipe() {
  case $recipe in
    60m) text=out/data/fineweb-edu-60m      # 124m has twice as many tokens
         chain fineweb-edu 1200000000 2400 6e-4 20 --n_layer 10 --n_head 8 --n_embd 512 ;;
    124m) chain fineweb-edu 2500000000 5000 6e-4 20 --n_layer 12 --n_head 12 --n_embd 768 ;;
    406m) chain pile 8100000000 16500 3e-4 6 --n_layer 24 --n_head 16 --n_embd 1024 --tied 0 ;;
  esac
}
if [ $recipe != toy ]; then
  read -r here card < <($py -c 'import torch, flops
n = torch.cuda.device_count()
name = torch.cuda.get_device_name() if n else ""
print(n, name if flops.card(name) else "")' 2>/dev/null || echo 0) || true
  if [ $dry = 1 ]; then
    [ -x $py ] && see=$py || see=python3
    as=8 like=h100; [ $recipe != 60m ] || as=1 like="rtx 4090"
    [ "$here" != 0 ] || [ -n "$gpus$gpu" ] || echo "no GPU here: as for $as x $like"
    [ "$here" != 0 ] || here=$as
    gpus=${gpus:-$here} gpu=${gpu:-${card:-$like}}
    recipe | $see bench/estimate.py --gpu "$gpu"
    exit
  fi
  gpus=$here
  [ "$gpus" != 0 ] || { echo "error: torch finds no GPU, and ./run.sh $recipe would take years" \
    "without: --dry_run shows its commands, ./run.sh is the job for a CPU" >&2; exit 2; }
  recipe
  exit
fi

# ---------------------------------------------------------------------------- on a CPU

# Two cores do more as two processes of one thread each than as one of two: so a stage runs on two
# ranks, or beside one that does not need it.

started=$(date +%s)
cores=$(getconf _NPROCESSORS_ONLN) ranks=2
[ "$cores" -gt 1 ] || ranks=1
half() { OMP_NUM_THREADS=$(( cores / ranks )) run $py "$@" --out $out --seed $seed; }
rank() { RANK=$1 LOCAL_RANK=$1 half "${@:2}"; }
whole() {                        # as torchrun would, but no traceback of its own at Ctrl-C
  [ $ranks = 2 ] || { half "$@"; return; }
  export WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT
  MASTER_PORT=$($py -c 'import socket; print(socket.create_server(("", 0)).getsockname()[1])')
  pair "rank 0 $*" "rank 1 $*"
  unset WORLD_SIZE
}
judged() { half 06_reward.py --init $out/02_cot.pt
           half 05_ppo.py --init $out/02_cot.pt --reward $out/06_reward.pt; }
others() { half 03_dpo.py --init $out/02_cot.pt
           half 04_rlvr.py --init $out/02_cot.pt; }

run $py data/toy.py
whole 00_pretrain.py
whole 01_sft.py --init $out/00_pretrain.pt
whole 02_cot.py --init $out/01_sft.pt
if [ $ranks = 2 ]; then pair judged others; else judged; others; fi
whole eval.py
run $py report.py $out
echo "run.sh: $(( $(date +%s) - started )) seconds after install; chat with it: $py chat.py $out/04_rlvr.pt"
