"""estimate.py: what the commands of a recipe would take; `./run.sh 406m --dry_run --gpu NAME` pipes
them in.

By formula, not measured: nothing here has run on a GPU yet.

    time     3 forward passes of flops.py for a token trained on and 1 for a token only scored, at
             SHARE of the card's peak, but no pass through a layer in less than STEP seconds;
             sampling one token after another, SLOTS rows at once on each GPU; CORES cores encode
    memory   of one GPU: weights, gradients, two moments and DDP's buckets, 4 bytes each; frozen
             models; SAVED bytes x width x layers for each token of a micro-batch of rows as long as
             the context (half of it in RL); the logits that wait for their gradient, or one chunk
             of them; keys and values of the rows that are sampled
    tokens   of a row: LENGTH
    not      downloads, evaluation within the stages, saving, what ranks wait for each other
"""
import ast
import math
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from flops import CARDS, card, cards_like, flops, matrices  # noqa: E402

SHARE = 0.4                      # of the peak, as well-fed matrix products get it: an assumption
STEP, SLOTS = 0.4e-3, 256        # some 40 kernels a layer, started from Python; generate's slots
SAVED = 50                       # what a block keeps for its backward pass, bf16 and fp32 together
KEEP, CHUNK = 2 ** 29, 2 ** 27   # logits that token_logprobs keeps on CUDA, or handles at a time
ENCODE, CORES = 0.5e6, 16        # tokens a second and core
ASKED = 3200                     # completions that eval.py asks of a checkpoint, about
# GPT-2's BPE: 78 tokens a row on 2000 rows of Alpaca, 144 of Dolly, 58 + 74 of GSM8K, 156 a side on
# 2299 of HH-RLHF; 400 a side assumed for UltraFeedback. In RL, the prompt alone.
LENGTH = {"01": 90, "02": 137, "03": 230, "06": 230, "04": 58, "05": 58}


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


def waiting(logits):
    """Bytes of the logits, fp32: those that are kept, and of a chunk what its softmax makes."""
    return 4 * (logits if logits <= KEEP else 0) + 3 * 4 * min(logits, CHUNK)


def estimate(kind, cfg, model, gpus, peak):
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
    operations = tokens * work / 2 * flops(model, length)
    frozen = {"03": 1, "04": 1, "05": 2}.get(kind, 0)
    memory = whole * 4 * (4 + (gpus > 1) + frozen) + cache + 1e9        # 1 GB is CUDA's own
    at_once = min(cfg["micro_batch"] * sides * longest, cfg.get("micro_tokens", math.inf))
    memory += at_once * C * L * SAVED
    if kind != "06":                                        # which has a head of one row
        memory += waiting(at_once * model["vocab_size"])
    pieces = max(rows / cfg["micro_batch"], rows * sides * length / at_once)
    passes = cfg["steps"] * max(1, pieces / gpus) * work / 2
    train = max(operations / (gpus * peak * SHARE), passes * L * STEP)
    return tokens, memory, train + cfg["steps"] * seconds


def chosen(args):
    """The command line -> a card's name, and what it can do."""
    if args[:1] != ["--gpu"] or len(args) != 2:
        stop(f"it takes --gpu NAME, not {' '.join(args) or 'nothing'}")
    names = cards_like(args[1])
    if not names:
        stop(f"no card {args[1]!r} is known; known are {', '.join(CARDS)}")
    return names[0], card(names[0])


def stop(why):
    print(f"error: {why}", file=sys.stderr)
    sys.exit(2)


def shape_of(cfg):
    """00's model: GPT-2's vocabulary and the tags, padded."""
    model = cfg | {"vocab_size": 50304}
    L, C, (blocks, table) = cfg["n_layer"], cfg["n_embd"], matrices(model)
    small = L * (13 * C + 2 * C / cfg["n_head"]) + 2 * C          # biases and norms, q's and k's
    return model | {"parameters": blocks + small + table * (2 - cfg["tied"])
                    + cfg["block_size"] * C}


def main(args):
    name, (peak, room, _) = chosen(args)
    print(f"Estimates by formula, not measured, for {name} ({peak / 1e12:g} TFLOP/s in bf16 and "
          f"{room / 1e9:g} GB, by its data sheet): {SHARE:.0%} of that peak is assumed.\n"
          "Counted are the model's operations and each layer's start; not downloads, evaluation "
          "within\nthe stages, saving, or waiting for other GPUs.\n")
    model, total = {}, 0.0
    for line in sys.stdin:
        command = shlex.split(line)
        at = next((i for i, word in enumerate(command) if word.endswith(".py")), None)
        if at is None or not (ROOT / command[at]).is_file():
            stop(f"{line.strip()!r} runs no script of this project: ./run.sh 406m --dry_run pipes "
                 "its commands in")
        kind, gpus = command[at][:2], number(command[at - 1].partition("nproc_per_node=")[2])
        cfg = config(command, at) if kind != "da" else {}
        if kind == "00":
            model = shape_of(cfg)
        said, seconds = "a minute or two on the CPU, downloads aside", 0.0
        if "--tokens" in command:
            tokens = float(command[command.index("--tokens") + 1])
            seconds = tokens / ENCODE / CORES
            said = f"{tokens / 1e6:,.0f} M tokens, {tokens * 2e-9:.1f} GB on disk"
        elif cfg:
            tokens, memory, seconds = estimate(kind, cfg, model, gpus, peak)
            said = f"{tokens / 1e6:,.0f} M tokens, {memory / 1e9:.0f} GB a GPU"
            flag = "micro_tokens" if "micro_tokens" in cfg else "micro_batch"
            said += f" (more than it has: lower --{flag})" * (memory > room)
        if kind == "00":
            said = f"{model['parameters'] / 1e6:.1f} M parameters, {said}"
        total += seconds
        print(line + f"    {said}" + f", {math.ceil(seconds / 60)} min" * (seconds > 0) + "\n")
    print(f"in all {total / 3600:.1f} h")


if __name__ == "__main__":
    main(sys.argv[1:])
