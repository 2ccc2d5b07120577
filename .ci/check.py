"""What the main job must show, read from results.json and the logs. Every line can fail.

    python .ci/check.py out/toy
"""
import json, math, sys
from pathlib import Path

out = Path(sys.argv[1])
stages = json.loads((out / "results.json").read_text())["stages"]
paired = json.loads((out / "results.json").read_text())["paired"]
failures = 0


def get(stage, figure):
    return stages[stage][figure]["mean"]


def check(what, value, holds):
    global failures
    failures += not holds
    print(f"{'ok  ' if holds else 'FAIL'}  {what}: {value:.4g}")


def log(stage):
    return [json.loads(line) for line in (out / f"{stage}.jsonl").read_text().splitlines()][1:]


vocab = 79 + 8
first = log("00_pretrain")[0]["loss"]
check(f"00 first loss within 2 % of ln {vocab}", first, abs(first / math.log(vocab) - 1) < 0.02)
bits = get("00_pretrain", "bits")
check("00 bits per character below the 5-gram model's", bits,
      bits < get("00_pretrain", "bits of 5-grams"))
check("00 answers < 5 % in the format", get("00_pretrain", "format"),
      get("00_pretrain", "format") < 0.05)

for figure in ("format", "stops"):
    check(f"01 {figure} >= 99 %", get("01_sft", figure), get("01_sft", figure) >= 0.99)
one, four = get("01_sft", "free, steps 1"), get("01_sft", "free, steps 4")
check("01 direct at one step >= 60 %", one, one >= 0.60)
check("01 direct at four steps <= 40 %", four, four <= 0.40)

gain = get("02_cot", "free") - get("01_sft", "free")
check("02 greedy >= 30 points above 01", gain, gain >= 0.30)
start = get("02_cot", "pass@1")
check("02 sampled pass@1 between 30 and 65 %", start, 0.30 <= start <= 0.65)

for stage in ("01_sft", "02_cot"):
    gain = get(stage, "second - first")
    check(f"{stage} second turn at most 10 points below the first", gain, gain >= -0.10)
for kind in ("steps", "wording"):
    right = get("02_cot", f"beyond, {kind}")
    check(f"02 beyond training, {kind}: less than half of what it can", right,
          right < get("02_cot", "free") / 2)
right = get("02_cot", "beyond, range")         # it has read these sums in raw text, and adds some
check("02 beyond training, range: 20 points below what it can", right,
      right <= get("02_cot", "free") - 0.20)

for stage in ("03_dpo", "06_reward"):
    for kind in ("hasty", "pad", "skip"):
        right = get(stage, f"prefers, {kind}")
        check(f"{stage} prefers, {kind} >= 95 %", right, right >= 0.95)
gain = paired["03_dpo - 02_cot"]
check("03 greedy >= 5 points above 02", gain["free"]["mean"], gain["free"]["mean"] >= 0.05)
check("03 sampled not below 02", gain["pass@1"]["mean"], gain["pass@1"]["high"] >= 0)

for stage, least in (("04_rlvr", 0.15), ("05_ppo", 0.10)):
    gain = paired[f"{stage} - 02_cot"]["pass@1"]["mean"]
    check(f"{stage} sampled pass@1 >= {100 * least:.0f} points above 02", gain, gain >= least)
    kl = get(stage, "KL/token")
    check(f"{stage} KL to the start <= 0.2 nats a token", kl, kl <= 0.2)
greedy = get("04_rlvr", "free")
check("04 greedy >= 90 %", greedy, greedy >= 0.90)
clipped = max(line["clip_frac"] for line in log("04_rlvr"))
check("04 clip fraction > 0", clipped, clipped > 0)
rewards = [line["reward"] for line in log("05_ppo")]
check("05 reward rises", rewards[-1] - rewards[0], rewards[-1] > rewards[0])

print(f"{failures} of the main job's claims fail" if failures else "every claim holds")
sys.exit(bool(failures))
