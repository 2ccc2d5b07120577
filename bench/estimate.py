"""estimate.py: what the commands of a recipe would take; `./run.sh 406m --dry_run` pipes them in.

By formula, not measured: nothing here has run on a GPU yet. N are the parameters that multiply.

    time     6 N flops a token trained on and 2 N a token only scored, attention's beside them, at
             SHARE of PEAK on every GPU, but no pass through a layer in less than STEP seconds;
             sampling one token after another, SLOTS rows at once on each GPU; CORES cores encode
    memory   of one GPU: weights, gradients, two moments and DDP's buckets, 4 bytes each; frozen
             models; SAVED bytes x width x layers for each token of a micro-batch of rows as long as
             the context (half of it in RL); keys and values of the rows that are sampled
    tokens   of a row: LENGTH
"""
import ast
import math
import shlex
import sys
from pathlib import Path

PEAK, SHARE = 989e12, 0.4        # flops a second: an H100 SXM's in bf16, dense; how much of it
STEP, SLOTS = 0.4e-3, 256        # some 40 kernels a layer, started from Python; generate's slots
SAVED = 50                       # what a block keeps for its backward pass, bf16 and fp32 together
ENCODE, CORES = 0.5e6, 16        # tokens a second and core
ASKED = 3200                     # completions that eval.py asks of a checkpoint, about
# GPT-2's BPE: 78 tokens a row on 2000 rows of Alpaca, 144 of Dolly, 58 + 74 of GSM8K, 156 a side on
# 2299 of HH-RLHF; 400 a side assumed for UltraFeedback. In RL, the prompt alone.
LENGTH = {"01": 90, "02": 137, "03": 230, "06": 230, "04": 58, "05": 58}
ROOT = Path(__file__).resolve().parent.parent


def number(text):
    try:
        return float(text)
    except ValueError:
        return text


def config(command, at):
    """The command's flags over the defaults of its script's Config."""
    values = {}
    for node in ast.walk(ast.parse((ROOT / command[at]).read_text())):
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            values = {field.target.id: ast.literal_eval(field.value) for field in node.body}
    given = zip(command[at + 1::2], command[at + 2::2])
    return values | {flag[2:]: number(value) for flag, value in given}


def sampled(model, gpus, rows, new):
    """Seconds and bytes of `rows` completions of up to `new` tokens."""
    slots, waves = min(SLOTS, rows / gpus), max(1, rows / gpus / SLOTS)
    cache = slots * model["block_size"] / 2 * model["n_layer"] * 4 * model["n_embd"]
    return waves * new * model["n_layer"] * STEP, cache


def estimate(kind, cfg, model, gpus):
    """-> tokens, bytes of a GPU, seconds."""
    L, C, T, whole = (model[k] for k in ("n_layer", "n_embd", "block_size", "parameters"))
    if kind == "ev":
        seconds, cache = sampled(model, gpus, ASKED, cfg["max_new"])
        return 6 * ASKED * cfg["max_new"], 8 * whole + cache + 1e9, 6 * seconds
    sides, rows = 2 if kind in ("03", "06") else 1, cfg["batch_size"] * cfg.get("group_size", 1)
    length, longest, seconds, cache = LENGTH.get(kind, cfg.get("window")), T, 0.0, 0.0
    if "max_new" in cfg:
        length, longest = length + cfg["max_new"] / 2, T / 2
        seconds, cache = sampled(model, gpus, rows, cfg["max_new"])
    tokens = cfg["steps"] * rows * sides * length
    work = 6 + {"03": 2, "04": 4, "05": 6}.get(kind, 0)     # the reference, old log-probs, scores
    flops = tokens * work * (12 * L * C * C + model["vocab"] * C + L * C * length)
    frozen = {"03": 1, "04": 1, "05": 2}.get(kind, 0)
    memory = whole * 4 * (4 + (gpus > 1) + frozen) + cache + 1e9        # 1 GB is CUDA's own
    memory += cfg["micro_batch"] * sides * longest * C * L * SAVED
    passes = cfg["steps"] * max(1, rows / gpus / cfg["micro_batch"]) * work / 2
    train = max(flops / (gpus * PEAK * SHARE), passes * L * STEP)
    return tokens, memory, train + cfg["steps"] * seconds


def main():
    print(f"Estimates by formula (bench/estimate.py), not measured; {SHARE:.0%} of "
          f"{PEAK / 1e12:.0f} TFLOP/s a GPU\n")
    model, total = {}, 0.0
    for line in sys.stdin:
        command = shlex.split(line)
        at = next((i for i, word in enumerate(command) if word.endswith(".py")), None)
        if at is None or not (ROOT / command[at]).is_file():
            print(f"error: {line.strip()!r} runs no script of this project: "
                  "./run.sh 406m --dry_run pipes its commands in", file=sys.stderr)
            sys.exit(2)
        kind, gpus = command[at][:2], number(command[at - 1].partition("nproc_per_node=")[2])
        cfg = config(command, at) if kind != "da" else {}
        if kind == "00":
            L, C, V = cfg["n_layer"], cfg["n_embd"], 50304          # GPT-2's and the tags, padded
            parameters = (L * (12 * C * C + 13 * C + 2 * C / cfg["n_head"]) + 2 * C
                          + V * C * (2 - cfg["tied"]) + cfg["block_size"] * C)
            model = cfg | {"vocab": V, "parameters": parameters}
        said, seconds = "a minute or two on the CPU, downloads aside", 0.0
        if "--tokens" in command:
            tokens = float(command[command.index("--tokens") + 1])
            seconds = tokens / ENCODE / CORES
            said = f"{tokens / 1e6:,.0f} M tokens, {tokens * 2e-9:.1f} GB on disk"
        elif cfg:
            tokens, memory, seconds = estimate(kind, cfg, model, gpus)
            said = f"{tokens / 1e6:,.0f} M tokens, {memory / 1e9:.0f} GB a GPU"
        if kind == "00":
            said = f"{model['parameters'] / 1e6:.1f} M parameters, {said}"
        total += seconds
        print(line + f"    {said}" + f", {math.ceil(seconds / 60)} min" * (seconds > 0) + "\n")
    print(f"in all {total / 3600:.1f} h")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(f"error: it takes no arguments, not {sys.argv[1]}", file=sys.stderr)
        sys.exit(2)
    main()
