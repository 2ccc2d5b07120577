"""estimate.py: what the commands of a GPU recipe would take. ./run.sh 406m --dry_run pipes them in.

By formula, not measured: nothing here has run on a GPU yet. N are the parameters that multiply.

    time     6 N flops a token trained on (2 forward, 4 backward), 2 N a token only scored, and
             attention's 6 (or 2) x layers x width x length, at SHARE of PEAK on every GPU;
             sampling: one token after another, STEP seconds a layer, `slots` rows at once
    memory   a GPU's: weights, gradients, two moments, DDP's buckets, 4 bytes each; frozen models;
             SAVED bytes x width x layers for each token of a micro-batch as long as the context
    tokens   LENGTH tokens a row, the mean of the sources' rows in GPT-2's BPE
"""
import ast
import shlex
import sys
from pathlib import Path

PEAK, SHARE = 989e12, 0.4        # flops a second: H100 SXM, bf16, dense; and how much of it
STEP, SLOTS = 0.4e-3, 256        # Python starts some 40 kernels a layer and token; generate's slots
SAVED = 50                       # what a block keeps for its backward pass, bf16 and fp32 together
LENGTH = {"01": 130, "02": 170, "03": 400, "06": 400, "04": 70, "05": 70}    # 04, 05: the prompt
ROOT = Path(__file__).resolve().parent.parent


def config(command):
    """A stage's command -> its Config's defaults and flags, by name, as numbers where they are."""
    at = next(i for i, word in enumerate(command) if word.endswith(".py"))
    values = {w.split("=")[0][2:]: w.split("=")[1] for w in command[:at] if "=" in w}
    tree = ast.parse((ROOT / command[at]).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            values |= {f.target.id: ast.literal_eval(f.value) for f in node.body}
    values |= {flag[2:]: value for flag, value in zip(command[at + 1::2], command[at + 2::2])}
    return {k: float(v) if str(v).replace(".", "").replace("e-", "").isdigit() else v
            for k, v in values.items()}


def estimate(name, cfg, shape):
    """-> tokens, GB a GPU, seconds."""
    L, C, T, gpus = shape["n_layer"], shape["n_embd"], shape["block_size"], cfg["nproc_per_node"]
    N = L * 12 * C * C + shape["vocab"] * C
    whole = N + L * (13 * C + 2 * C / shape["n_head"]) + C * (T + 2)      # biases, norms, tables
    whole += (1 - shape["tied"]) * shape["vocab"] * C
    steps, rows, kind = cfg["steps"], cfg["batch_size"] * cfg.get("group_size", 1), name[:2]
    length, sampling = LENGTH.get(kind, cfg.get("window")), 0.0
    longest, trained, scored = T, 6, {"03": 2, "04": 4, "05": 6}.get(kind, 0)
    if "max_new" in cfg:
        length, longest = length + cfg["max_new"] / 2, T / 2
        sampling = steps * cfg["max_new"] * L * STEP * -(-rows // (gpus * SLOTS))
    tokens = steps * rows * length * (2 if kind in ("03", "06") else 1)
    flops = tokens * (trained + scored) * (N + L * C * length)
    sides = 2 if kind in ("03", "06") else 1
    frozen = {"03": 1, "04": 1, "05": 2}.get(kind, 0)
    memory = whole * (20 if gpus > 1 else 16) + 4 * whole * frozen + 1e9
    memory += cfg["micro_batch"] * sides * longest * C * L * SAVED
    return tokens, memory / 1e9, flops / (gpus * PEAK * SHARE) + sampling, whole


def main():
    shape, total = {}, 0.0
    print(f"Estimates by formula, not measured ({SHARE:.0%} of {PEAK / 1e12:.0f} TFLOP/s a GPU; "
          "see bench/estimate.py):\n")
    for line in sys.stdin:
        command = shlex.split(line)
        name = next(word for word in command if word.endswith(".py"))
        print(line.strip())
        if name.startswith("data/") or name == "eval.py":
            tokens = [f"{float(command[i + 1]) / 1e9:.1f} G tokens, 2 bytes each" for i, word
                      in enumerate(command) if word == "--tokens"]
            print("   ", *(tokens or ["minutes"]), "\n")
            continue
        cfg = config(command)
        shape = shape or cfg | {"vocab": 50304}
        tokens, memory, seconds, whole = estimate(name, cfg, shape)
        total += seconds
        print(f"    {whole / 1e6:.1f} M parameters, {tokens / 1e6:,.0f} M tokens, {memory:.0f} GB "
              f"a GPU, {seconds / 3600:.1f} h\n")
    print(f"all stages: {total / 3600:.1f} h")


if __name__ == "__main__":
    main()
