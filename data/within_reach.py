"""data/within_reach.py: the RL prompts that a checkpoint sometimes solves, for 04 and RL/.

    python data/within_reach.py out/gsm8k/02_cot.pt --rows out/data/gsm8k/rl_train.jsonl --want 200
    python 04_rlvr.py --init out/gsm8k/02_cot.pt --data out/data/gsm8k --train rl_reach.jsonl

Samples each prompt 8 times, as 04 would, and keeps those with 1 to 7 right ones: a group of equal
rewards has no advantage, so what is never or always solved costs rollouts and teaches nothing. (A
trace may be wrong and its answer right by luck: few right ones of 8 are often that.) What was tried
is kept beside the result, so an interrupted run continues, and a later one can want more.
"""
import argparse
import json
import os
import time

from common import write_rows
from model import (encode_rows, fail, generate, init_distributed, interrupted, load, read_rows,
                   split, verify, write_text)

AT_ONCE = 32      # prompts a batch of rollouts, and between two notes of what was tried


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--rows", default="out/data/gsm8k/rl_train.jsonl", help="(%(default)s)")
    parser.add_argument("--name", default="rl_reach.jsonl",
                        help="the file written beside them (%(default)s)")
    for flag, default, text in [
            ("want", 200, "prompts to find; 0: try all"), ("samples", 8, "of each prompt"),
            ("max_new", 256, "tokens of a completion, at most"),
            ("temperature", 1.0, "as in 04"), ("seed", 0, "of the samples"),
            ("device", "auto", "cpu, cuda, mps")]:
        parser.add_argument(f"--{flag}", type=type(default), default=default,
                            help=f"{text} (%(default)s)")
    args = parser.parse_args(argv)
    if args.samples < 2:
        fail("--samples must be at least 2: of one sample none is sometimes right")
    _, _, device = init_distributed(args.device)
    model, tokenizer, _ = load(args.checkpoint, device)
    rows = [dict(row, id=i) for i, row in enumerate(read_rows(args.rows, "prompt", "answer"))]
    rows = [row for [(_, row)] in encode_rows(
        rows, args.rows, lambda row: [(tokenizer.prompt(row["prompt"]), row)],
        model.cfg.block_size - args.max_new)]
    path = f"{os.path.dirname(args.rows) or '.'}/{args.name}"
    flags = {k: v for k, v in vars(args).items() if k not in ("want", "device")}
    kept, tried, begun = [], continued(f"{path}.tried", flags), time.monotonic()
    first = len(tried)
    for few in split(rows, AT_ONCE):
        new = [row for row in few if row["id"] not in tried]
        if new:
            rights = times_right(args, model, tokenizer, new)
            tried |= {row["id"]: right for row, right in zip(new, rights)}
            write_text(f"{path}.tried", json.dumps({"flags": flags, "right": list(tried.items())}))
        kept += [dict(row, right=tried[row["id"]]) for row in few
                 if 0 < tried[row["id"]] < args.samples]
        share = min(1, max(len(tried) / len(rows), len(kept) / (args.want or len(rows))))
        spent = (time.monotonic() - begun) * len(tried) / max(1, len(tried) - first)
        print(f"{len(tried):,} of {len(rows):,} tried, {len(kept):,} kept, "
              f"{int(spent * (1 / share - 1)) // 60} min left", flush=True)
        if 0 < args.want <= len(kept):
            break
        if interrupted():
            fail("stopped; the same command continues", 130)
    never = sum(right == 0 for right in tried.values())
    print(f"{args.rows}: {len(tried):,} prompts tried, {len(kept):,} kept, {never:,} dropped "
          f"(never right), {len(tried) - never - len(kept):,} dropped (always right)", flush=True)
    if not kept:
        fail(f"{args.checkpoint} solves no prompt of {args.rows} sometimes: train it further first")
    write_rows(path, [{k: v for k, v in row.items() if k not in ("id", "line")} for row in kept])


def times_right(args, model, tokenizer, rows):
    """How many of each row's samples the verifier accepts."""
    prompts = [p for row in rows for p in [tokenizer.prompt(row["prompt"])] * args.samples]
    numbers = [row["id"] * args.samples + s for row in rows for s in range(args.samples)]
    completions, _ = generate(model, prompts, args.max_new, tokenizer.end, args.temperature,
                              args.seed, rows=numbers)
    return [sum(verify(tokenizer.decode(c), row["answer"]) == 1 for c in group)
            for row, group in zip(rows, split(completions, args.samples))]


def continued(path, flags):
    """{row: how many were right} of an unfinished or smaller run with the same flags, else {}."""
    if os.path.isfile(path):
        with open(path) as f:
            found = json.load(f)
        if found["flags"] == flags:
            return dict(found["right"])
    return {}


if __name__ == "__main__":
    main()
