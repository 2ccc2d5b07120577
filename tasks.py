"""tasks.py: the field's questions to a language model, by log-likelihood: no template, no sampling.

    choices   acc: the right choice has the largest log p(choice | question); acc_norm: the largest
              log p divided by its length in characters. ARC, OpenBookQA, PIQA
    lambada   acc: greedy decoding says the last word; perplexity: exp(- mean log p(word | text))
    text      bits/byte: - log2 p(the whole file) / its bytes, window after window

    python tasks.py out/base.pt --choices arc_easy.jsonl piqa.jsonl --text book.txt
    torchrun --nproc_per_node=4 tasks.py out/base.pt out/sft.pt --lambada lambada.jsonl

Prompts, the seam between tokens, cuts and figures are those of lm-evaluation-harness 0.4.13
(docs/tasks.md compares question by question). Rows are the sources' own: the Hub's columns, or
llm-foundry's {"query", "choices", "gold"} and {"context", "continuation"}. Intervals are eval.py's.
"""
import json, math, os, re
from pathlib import Path

from model import (Parser, Progress, autocast, encode_rows, fail, file_hashes, load, missing, pad,
                   read_bytes, read_rows, say, split, write_text)
import numpy as np
import torch

from eval import begin, claim_file, finite, gather
from figures import ratio, share
from report import table

# ---------------------------------------------------------------------------- rows -> requests
# A request is (ids, n): the log-prob of the last n ids, given those before them.


def request(tokenizer, context, continuation, block_size):
    """Encoded together and divided where the context alone would end; spaces at the seam belong to
    the continuation. An empty context is the end of a document. Too long: cut on the left."""
    head = context.rstrip()
    ids = tokenizer.encode(context + continuation)
    n = len(ids) - len(tokenizer.encode(head)) if head else len(ids)
    if not 0 < n <= block_size:
        raise ValueError(f"{continuation[:40]!r} has {n} tokens, the context {block_size}")
    return ([] if head else [tokenizer.end]) + ids, n


def question(row):
    """A row of ARC, OpenBookQA or PIQA -> context, choices, the place of the right one. What is
    written between them, "Answer:" and a space, is not written twice where the row has it."""
    if "goal" in row:
        context, options = f"Question: {row['goal']}", [row["sol1"], row["sol2"]]
        gold = row["label"]
    elif "gold" in row:
        context, options, gold = row["query"], row["choices"], row["gold"]
    else:
        context = row.get("question_stem") or f"Question: {row['question']}"
        options = row["choices"]["text"]
        gold = dict(zip(row["choices"]["label"], range(99))).get(str(row["answerKey"]).strip())
    if not isinstance(context, str):
        raise ValueError(f"{context!r:.60} is no question")
    if not isinstance(options, list) or not all(isinstance(c, str) and c.strip() for c in options) \
            or type(gold) is not int or not 0 <= gold < len(options):
        raise ValueError(f"{options!r:.60} is no list of choices with a right one at {gold!r}")
    context = context.removesuffix("\n").rstrip(" ")
    if context.startswith("Question: "):
        context = re.sub(r"\s*\bAnswer:$", "", context) + "\nAnswer:"
    return context, [option.lstrip(" ") for option in options], gold


def last_word(row):
    """A row of LAMBADA -> context, the last word with the space before it."""
    context, word = row.get("context"), row.get("continuation")
    if "text" in row and isinstance(row["text"], str):
        context, _, word = row["text"].rstrip().rpartition(" ")
    if not isinstance(context, str) or not isinstance(word, str) or not word.strip():
        raise ValueError("no text, or context and continuation, with a last word")
    return context.rstrip(" "), " " + word.lstrip(" ")


def windows(tokenizer, text, block_size):
    """A text -> requests that predict every token once, and the bytes of each. The last window
    looks back as far as it can."""
    ids, found, sizes = [tokenizer.end] + tokenizer.encode(text), [], []
    for i in range(1, len(ids), block_size):
        new = ids[i : i + block_size]
        end = i + len(new)
        found.append((ids[max(0, end - block_size - 1) : end], len(new)))
        sizes.append(len(tokenizer.decode(new).encode()))
    exact = len(text.encode()) / max(1, sum(sizes))     # a seam may divide a character's bytes
    return found, [size * exact for size in sizes]


# ---------------------------------------------------------------------------- scores


@torch.no_grad()
def score(args, model, requests, title="", greedy=False):
    """-> [(log p of the last n ids, whether greedy decoding says them)], in order, on all ranks."""
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i][0]))   # little padding
    found, T = [], model.cfg.block_size
    batches = split(order[args.rank::args.world], args.batch_size)
    progress = Progress(title, len(batches))
    for done, few in enumerate(batches, 1):
        rows = [(requests[i][0][-T - 1:], requests[i][1]) for i in few]
        ids = pad([ids[:-1] for ids, _ in rows], args.device)
        targets = pad([[-1] * (len(ids) - 1 - n) + ids[-n:] for ids, n in rows], args.device, -1)
        keep = targets >= 0
        with autocast(args.device):
            hidden = model.forward_hidden(ids)
            sums = model.token_logprobs(hidden, targets).sum(1)
            hits = ~keep
            if greedy:
                hits[keep] = model.logits(hidden[keep]).argmax(-1) == targets[keep]
        found += zip(sums.tolist(), hits.all(1).tolist())
        progress(done)
    return [pair for _, pair in sorted(zip(order, gather(args, found)))]


def requests_of(args, path, encode, tokenizer, block_size, *keys):
    rows = read_rows(path, *keys)[: args.limit or None]
    made = encode_rows(rows, path, encode, math.inf)
    lengths = [len(ids) for ids, _ in flatten(made)]
    cut = sum(n > block_size + 1 for n in lengths)
    if cut:
        say(f"{path}: {cut} of {len(lengths)} requests are longer than the context of "
            f"{block_size} tokens and were cut on the left")
    return rows, made


def flatten(lists):
    return [item for items in lists for item in items]


def choices(args, model, tokenizer, path):
    T = model.cfg.block_size

    def encode(row):
        context, options, _ = question(row)
        return [request(tokenizer, context, f" {option}", T) for option in options]

    rows, made = requests_of(args, path, encode, tokenizer, T, "choices|goal")
    flat = [log_p for log_p, _ in score(args, model, flatten(made), Path(path).stem)]
    acc, norm, kept = [], [], []
    for row, items in zip(rows, made):
        _, options, gold = question(row)
        log_p, flat = flat[: len(items)], flat[len(items):]
        acc.append(np.argmax(log_p) == gold)
        norm.append(np.argmax(np.array(log_p) / list(map(len, options))) == gold)
        kept.append({"line": row["line"], "gold": gold, "log_p": log_p})
    return {"acc": share(acc), "acc_norm": share(norm)}, kept


def lambada(args, model, tokenizer, path):
    T = model.cfg.block_size
    rows, made = requests_of(args, path, lambda row: [request(tokenizer, *last_word(row), T)],
                             tokenizer, T, "context|text")
    found = score(args, model, flatten(made), Path(path).stem, greedy=True)
    log_p, hits = zip(*found)
    loss = ratio([-x for x in log_p])
    kept = [{"line": row["line"], "log_p": x, "right": hit} for row, (x, hit) in zip(rows, found)]
    return {"acc": share(hits), "perplexity": {     # its interval is the mean loss's, on its scale
        k: v if k == "n" else math.exp(min(v, 700)) for k, v in loss.items()}}, kept


def text(args, model, tokenizer, path):
    try:
        whole = read_bytes(path).decode()
        made, sizes = windows(tokenizer, whole, model.cfg.block_size)
    except ValueError as e:
        fail(f"{path}: {e}")
    if not made:
        fail(f"{path} is empty")
    made, sizes = made[: args.limit or None], sizes[: args.limit or None]
    found = score(args, model, made, Path(path).stem)
    bits = [-log_p / math.log(2) for log_p, _ in found]
    return {"bits/byte": ratio(bits, sizes)}, [{"bits": b, "bytes": s} for b, s in zip(bits, sizes)]


# ---------------------------------------------------------------------------- the report

TASKS = {"choices": choices, "lambada": lambada, "text": text}


def labels(paths):
    stems = [Path(p).stem for p in paths]
    return stems if len(set(stems)) == len(stems) else paths


def main(args):
    begin(args, "tasks")
    files = [(kind, path) for kind in TASKS for path in getattr(args, kind)]
    if not files:
        fail("nothing to ask: give files to --choices, --lambada or --text")
    for _, path in files:
        if not os.path.isfile(path):
            fail(f"{path} is missing: give a local file with the source's own rows")
    for path in args.checkpoints:
        if not os.path.isfile(path):
            missing(path)
    if args.rank == 0:
        folder, file = os.path.split(args.out)
        claim_file(folder or ".", file, Path(file).stem)
    flags = {k: v for k, v in vars(args).items() if k not in ("rank", "world", "device")}
    names, results, rows = labels([path for _, path in files]), {}, {}
    for name, checkpoint in zip(labels(args.checkpoints), args.checkpoints):
        model, tokenizer, _ = load(checkpoint, args.device)
        results[name], rows[name] = {}, {}
        for file, (kind, path) in zip(names, files):
            figures, rows[name][file] = TASKS[kind](args, model.eval(), tokenizer, path)
            results[name][file] = finite(f"{name}, {file}", figures)
            if args.rank == 0:             # what is known so far
                write_text(args.out, json.dumps({"flags": flags, "inputs": file_hashes,
                                                 "results": results, "rows": rows}) + "\n")
    for file in names:
        table(file, ["acc", "acc_norm", "perplexity", "bits/byte"],
              [(name, results[name][file]) for name in results])
    say(f"\n{args.out} is written, with every question's log-probs")


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("checkpoints", nargs="+")
    for kind in TASKS:
        parser.add_argument(f"--{kind}", nargs="+", default=[], metavar="FILE",
                            help=f"files for {kind}: see above")
    for flag, default, what in [
            ("out", "out/tasks.json", "results"), ("limit", 0, "rows or windows a file; 0: all"),
            ("batch_size", 16, "requests at once"), ("device", "auto", "cpu, cuda, mps")]:
        parser.add_argument(f"--{flag}", type=type(default), default=default,
                            help=f"{what} (%(default)s)")
    main(parser.parse_args())
