"""data/within_reach.py: the RL prompts that a checkpoint sometimes solves, for 04 and RL/.

    python data/within_reach.py out/gsm8k/02_cot.pt --rows out/data/gsm8k/rl_train.jsonl --want 200
    python 04_rlvr.py --init out/gsm8k/02_cot.pt --data out/data/gsm8k --train rl_reach.jsonl

Samples each prompt 8 times, as 04 would, and keeps those with 1 to 7 right ones: a group of equal
rewards has no advantage, so what is never or always solved costs rollouts and teaches nothing. (A
trace may be wrong and its answer right by luck: few right ones of 8 are often that.) What was tried
is kept beside the result, so an interrupted run continues, and a later one can want more. When the
rows are prepared again and differ, the result is removed.
"""
# These first: they make Ctrl-C a line while the rest is imported.
from common import NewSet, add_flags, reading
from model import (Parser, Progress, check_ranges, encode_rows, fail, generate, init_distributed,
                   interrupted, load, parse_json, read_rows, say, split, verify, write_text)

import hashlib
import json
import os

AT_ONCE = 32      # prompts a batch of rollouts, and between two notes of what was tried


def parse(argv):
    parser = Parser(__doc__)
    parser.add_argument("checkpoint", help="the policy that 04 will start from")
    add_flags(
        parser, ("rows", "out/data/gsm8k/rl_train.jsonl", "questions with answers"),
        ("name", "rl_reach.jsonl", "the file written beside them"),
        ("want", 200, "prompts to find; 0: try all"), ("samples", 8, "of each prompt"),
        ("max_new", 256, "tokens of a completion, at most"), ("temperature", 1.0, "as in 04"),
        ("seed", 0, "of the samples"), ("device", "auto", "cpu, cuda, mps"))
    args = parser.parse_args(argv)
    check_ranges(vars(args), "within_reach")
    if os.path.basename(args.name) != args.name or not args.name.endswith(".jsonl"):
        fail(f"--name {args.name}: the name of a .jsonl file, which will lie beside --rows")
    return args


def main(argv=None):
    args = parse(argv)
    folder, source = os.path.split(args.rows)
    _, _, device = init_distributed(args.device)
    model, tokenizer, _ = load(args.checkpoint, device)
    if args.max_new >= model.cfg.block_size:
        fail(f"--max_new {args.max_new} leaves no room for a prompt in the context of "
             f"{model.cfg.block_size} tokens")
    rows = [dict(row, id=i) for i, row in enumerate(read_rows(args.rows, "prompt", "answer"))]
    rows = [row for [(_, row)] in encode_rows(
        rows, args.rows, lambda row: [(tokenizer.prompt(row["prompt"]), row)],
        model.cfg.block_size - args.max_new)]
    with NewSet(folder or ".", f"within_reach {args.name}", of=source) as new:
        new.claim([args.name])
        kept = try_all(args, model, tokenizer, rows)
        new.rows(args.name, [{k: v for k, v in row.items() if k not in ("id", "line")}
                             for row in kept])


def try_all(args, model, tokenizer, rows):
    """The rows that are sometimes solved, each with how often; no more than --want asks for."""
    path = f"{os.path.dirname(args.rows) or '.'}/{args.name}.tried"
    flags = {k: v for k, v in vars(args).items() if k not in ("want", "device")}
    flags |= {k: sha256(flags[k]) for k in ("checkpoint", "rows")}
    kept, seen, tried = [], [], continued(path, flags)
    progress = Progress("within_reach", 0, len(tried))
    for few in split(rows, AT_ONCE):
        new = [row for row in few if row["id"] not in tried]
        if new:
            rights = times_right(args, model, tokenizer, new)
            tried |= {row["id"]: right for row, right in zip(new, rights)}
            write_text(path, json.dumps({"flags": flags, "right": list(tried.items())}))
        seen += [tried[row["id"]] for row in few]
        kept += [dict(row, right=tried[row["id"]]) for row in few
                 if 0 < tried[row["id"]] < args.samples]
        if new:                              # as many as it takes, at the rate so far
            share = max(len(seen) / len(rows), len(kept) / (args.want or len(rows)))
            progress.total = max(len(tried), round(len(seen) / share))
            progress(len(tried), f"{len(kept):,} kept", always=True)
        if 0 < args.want <= len(kept):
            break
        if interrupted():
            fail("stopped; the same command continues", 130)
    never, always = seen.count(0), seen.count(args.samples)
    say(f"{args.rows}: {len(seen):,} prompts tried, {len(kept):,} kept, {never:,} dropped "
        f"(never right), {always:,} dropped (always right)")
    if not kept:
        fail(f"{args.checkpoint} solves no prompt of {args.rows} sometimes: train it further first")
    return kept


def times_right(args, model, tokenizer, rows):
    """How many of each row's samples the verifier accepts."""
    prompts = [p for row in rows for p in [tokenizer.prompt(row["prompt"])] * args.samples]
    numbers = [row["id"] * args.samples + s for row in rows for s in range(args.samples)]
    completions, _ = generate(model, prompts, args.max_new, tokenizer.end, args.temperature,
                              args.seed, rows=numbers)
    return [sum(verify(tokenizer.decode(c), row["answer"]) == 1 for c in group)
            for row, group in zip(rows, split(completions, args.samples))]


def sha256(path):
    with reading(path, "a file") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def continued(path, flags):
    """{row: how many were right} of an unfinished or smaller run with the same flags, rows and
    checkpoint, else {}."""
    if not os.path.isfile(path):
        return {}
    with reading(path, "JSON") as file:
        found = parse_json(file.read())
    try:
        if found["flags"] != flags:
            return {}
        return {int(row): int(right) for row, right in found["right"]}
    except (LookupError, TypeError, ValueError):
        fail(f"{path} is damaged: delete it to try all prompts again")


if __name__ == "__main__":
    main()
