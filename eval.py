"""eval.py: the same held-out questions for every stage; every figure with its n and 95 % interval.

    python eval.py                                          # all of out/toy, 2-3 minutes on 2 cores
    python eval.py out/mine/04_rlvr.pt --n_sampled 1000
    torchrun --nproc_per_node=4 eval.py --out out/gsm8k --data out/data/gsm8k --max_new 400

Prints three tables; writes results.json and four plots into --out. What a stage gets goes by the
first two characters of its file's name: 00 has no template to follow, 01 no traces to sample,
06 is a reward model. Intervals: Wilson's for shares; normal for means, over questions (not over
samples, which share a question) or over windows of text. A paired difference is over the
questions that both stages were asked.
"""
import argparse, json, math, os, re, time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from model import (autocast, encode_rows, fail, generate, load, number, pad, parse, ranks,
                   read_rows, read_tokens, shift, split, verify, write_text)

STAGES = ["00_pretrain", "01_sft", "02_cot", "03_dpo", "04_rlvr", "05_ppo", "06_reward"]
PRIMERS = {"free": "", "answer": "<answer>", "think": "<think>"}
CAREFUL = re.compile(r"\d+[-+*/]\d+=\d+")

# ---------------------------------------------------------------------------- statistics


def share(hits):
    """0s and 1s -> mean and Wilson's interval, which never leaves [0, 1]."""
    n, p, z2 = len(hits), float(np.mean(hits)) if len(hits) else math.nan, 1.96 ** 2
    if not n:
        return None
    middle = (p + z2 / 2 / n) / (1 + z2 / n)
    half = 1.96 * math.sqrt(p * (1 - p) / n + z2 / 4 / n ** 2) / (1 + z2 / n)
    return {"mean": p, "n": n, "low": max(0.0, middle - half), "high": min(1.0, middle + half)}


def ratio(sums, counts=None):
    """sum(sums) / sum(counts) over independent units; without counts the mean. Normal interval by
    the delta method: a unit with a large count weighs more."""
    sums = np.asarray(sums, float)
    counts = np.ones(len(sums)) if counts is None else np.asarray(counts, float)
    if not len(sums) or not counts.sum():
        return None
    n, mean = len(sums), sums.sum() / counts.sum()
    half = 1.96 * np.std((sums - mean * counts) / counts.mean(), ddof=n > 1) / math.sqrt(n)
    return {"mean": float(mean), "n": n, "low": float(mean - half), "high": float(mean + half)}


def pass_at_k(n, right, k):
    """The chance that k of n samples hold a right one (Chen et al. 2021, eq. 1), unbiased."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority(texts, answer):
    """1 if the most frequent answer is right; ties go to the one said first."""
    said = [parse(t)[1] for t in texts if parse(t)]
    votes = Counter(number(s) if number(s) is not None else s for s in said)
    best = votes.most_common(1)[0][0] if votes else ""
    return verify(f"<answer>{best}</answer><|end|>", answer) or 0.0


def grams(train, ids, V, order):
    """Bits of each id but the first under an interpolated model of order-grams, fitted on `train`:
    p(c | h) = (count(hc) + kinds(h) p(c | h')) / (count(h) + kinds(h))        Witten & Bell 1991
    """
    def codes(x, k):                       # k successive ids as one integer
        return sum(x[j : len(x) - k + 1 + j].astype(np.int64) * V ** (k - 1 - j) for j in range(k))

    p = np.full(len(ids), 1 / V)
    for k in range(1, order + 1):
        seen, count = np.unique(codes(train, k), return_counts=True)
        heads, first, kinds = np.unique(seen // V, return_index=True, return_counts=True)
        total = np.add.reduceat(count, first)
        asked = codes(ids, k)
        at = np.searchsorted(seen, asked).clip(max=len(seen) - 1)
        hit = np.where(seen[at] == asked, count[at], 0)
        at = np.searchsorted(heads, asked // V).clip(max=len(heads) - 1)
        known = heads[at] == asked // V    # else nothing is learnt from this order
        kind, whole = np.where(known, kinds[at], 1), np.where(known, total[at], 0)
        p[k - 1:] = (hit + kind * p[k - 1:]) / (whole + kind)
    return -np.log2(p[1:])


# ---------------------------------------------------------------------------- questions


def gather(args, part):
    """This rank's list, rows rank::world -> the list of all rows, on every rank."""
    if args.world == 1:
        return part
    parts = [None] * args.world
    dist.all_gather_object(parts, part)
    return [parts[i % args.world][i // args.world] for i in range(sum(map(len, parts)))]


def questions(args, tokenizer, model, name):
    path = f"{args.data}/{name}"
    rows = [dict(row, id=i) for i, row in enumerate(read_rows(path, "prompt", "answer|completion"))]
    kept = encode_rows(rows, path, lambda row: [(tokenizer.prompt(row["prompt"], "<answer>"), row)],
                       model.cfg.block_size - 1)
    return [row for [(_, row)] in kept]


def first(rows, n, least=0):
    """The first n rows of each number of steps; without `steps` all rows are one group."""
    count, picked = Counter(), []
    for row in rows:
        count[row.get("steps")] += 1
        if count[row.get("steps")] <= n and row.get("steps", least) >= least:
            picked.append(row)
    return picked


def ask(args, model, tokenizer, rows, primer="", temperature=0.0, samples=1):
    """-> for each row its samples [(text with primer, ids, logprobs)]. A group shares a prefill."""
    part = rows[args.rank::args.world]
    prompts = [tokenizer.prompt(row["prompt"], primer) for row in part for _ in range(samples)]
    numbers = [row["id"] * samples + s for row in part for s in range(samples)]
    done = generate(model, prompts, args.max_new, tokenizer.end, temperature, args.seed,
                    rows=numbers, slots=256) if part else ([], [])
    said = [(primer + tokenizer.decode(ids), ids, logprobs) for ids, logprobs in zip(*done)]
    return gather(args, split(said, samples))


# ---------------------------------------------------------------------------- parts of a report
# Each takes (args, stage) and returns figures; stage.right keeps per-question values for pairing.


def greedy(args, stage, mode, n):
    rows = first(stage.rows, n)
    said = [s for s, in ask(args, stage.model, stage.tokenizer, rows, PRIMERS[mode])]
    scores = [verify(text, row["answer"]) for (text, _, _), row in zip(said, rows)]
    groups = defaultdict(list)
    for row, score in zip(rows, scores):
        groups[row.get("steps", "all")].append(score or 0.0)
    held = [i for i, row in enumerate(rows) if not row.get("seen")]
    stage.right[f"greedy {mode}"] = {rows[i]["id"]: scores[i] or 0.0 for i in held}
    figures = {"accuracy": share([scores[i] or 0.0 for i in held]),
               "by_steps": {str(k): share(groups[k]) for k in sorted(groups)}}
    if mode == "free":
        figures |= {"format": share([score is not None for score in scores]),
                    "stops": share([ids[-1] == stage.tokenizer.end for _, ids, _ in said]),
                    "length": ratio([len(said[i][1]) for i in held])}
    return {mode: figures}


def sampled(args, stage):
    """pass@1, pass@k, maj@k, careful traces and the KL to the start, all from the same samples."""
    rows = first(stage.rows, -(-args.n_sampled // len({r.get("steps") for r in stage.held})), 2)
    said = ask(args, stage.model, stage.tokenizer, rows, "<think>", 1.0, args.samples)
    scores = [[verify(t, row["answer"]) or 0.0 for t, _, _ in group] for group, row in zip(said, rows)]
    k, means = args.samples, [float(np.mean(s)) for s in scores]
    stage.right["pass@1"] = {row["id"]: m for row, m in zip(rows, means)}
    figures = {"pass@1": ratio(means), "samples": k,
               f"pass@{k}": ratio([pass_at_k(k, int(sum(s)), k) for s in scores]),
               f"maj@{k}": share([majority([t for t, _, _ in g], r["answer"])
                                  for g, r in zip(said, rows)]),
               "length": ratio([np.mean([len(ids) for _, ids, _ in g]) for g in said])}
    if "steps" in rows[0]:
        care = [[careful(t, row["steps"]) for t, _, _ in g] for g, row in zip(said, rows)]
        right = [[a * b for a, b in zip(*pair)] for pair in zip(care, scores)]
        other = [[(1 - a) * b for a, b in zip(*pair)] for pair in zip(care, scores)]
        n = np.array([sum(c) for c in care])
        figures |= {"careful": ratio(n / k), "right_careful": ratio([sum(r) for r in right], n),
                    "right_other": ratio([sum(o) for o in other], k - n)}
    if stage.start is not None:
        figures |= drift(args, stage, rows, said)
    return {"sampled": figures}


def careful(text, steps):
    """One operation a line and a line for each step of the question."""
    lines = parse(text)[0].split("\n") if parse(text) else []
    return len(lines) == steps and all(CAREFUL.fullmatch(line) for line in lines)


def drift(args, stage, rows, said):
    """KL(stage || its start), from the stage's own samples: the mean of log p - log p_start."""
    part = list(zip(rows, said))[args.rank::args.world]
    gaps = []
    for few in split(part, 16):
        given = [stage.tokenizer.prompt(row["prompt"], "<think>") for row, _ in few]
        pairs = [(p, ids) for p, (_, group) in zip(given, few) for _, ids, _ in group]
        logprobs = [sum(x) for _, group in few for _, _, x in group]
        sums = logprob_sums(stage.start, pairs)
        gaps += [sum(g) for g in split([a - b for a, b in zip(logprobs, sums)], args.samples)]
    gaps, lengths = gather(args, gaps), [sum(len(ids) for _, ids, _ in g) for g in said]
    return {"kl_token": ratio(gaps, lengths),
            "kl_completion": ratio([g / args.samples for g in gaps])}


@torch.no_grad()
def logprob_sums(model, pairs):
    """[(prompt, completion)] -> log p(completion | prompt) of each."""
    device = model.embed.weight.device
    mask = pad([[0] * len(p) + [1] * len(c) for p, c in pairs], device)
    ids, targets, mask = shift(pad([p + c for p, c in pairs], device), mask)
    with autocast(device):
        return (model(ids, targets) * mask).sum(1).tolist()


@torch.no_grad()
def scores_of(stage, pairs):
    """What the stage thinks of completions: a reward model's score, or log p - log p_start."""
    if stage.name[:2] != "06":
        now, start = logprob_sums(stage.model, pairs), logprob_sums(stage.start, pairs)
        return [a - b for a, b in zip(now, start)]
    ids = pad([p + c for p, c in pairs], stage.model.embed.weight.device)
    last = [len(p) + len(c) - 1 for p, c in pairs]
    hidden = stage.model.forward_hidden(ids)[torch.arange(len(pairs)), last]
    head = stage.parts["head"]
    return (hidden @ head["weight"].T + head["bias"])[:, 0].tolist()


def preferences(args, stage):
    """How often, and by how much, the chosen completion is scored above the rejected one."""
    path, tokenizer = f"{args.data}/pairs_test.jsonl", stage.tokenizer

    def encode(row):
        prompt = tokenizer.prompt(row["prompt"])
        text = lambda v: v if isinstance(v, str) else v[-1]["content"]
        whole = [prompt + tokenizer.encode_completion(text(row[k])) + [tokenizer.end]
                 for k in ("chosen", "rejected")]
        return [(ids, (len(prompt), row.get("kind", "all"))) for ids in whole]

    pairs = encode_rows(read_rows(path, "prompt", "chosen", "rejected"), path, encode,
                        stage.model.cfg.block_size)
    pairs.sort(key=lambda pair: max(len(ids) for ids, _ in pair))      # less padding
    margins = []
    for few in split(pairs[args.rank::args.world], 32):
        scores = scores_of(stage, [(ids[:n], ids[n:]) for pair in few for ids, (n, _) in pair])
        margins += [a - b for a, b in split(scores, 2)]
    kinds = defaultdict(list)
    for margin, ((_, (_, kind)), _) in zip(gather(args, margins), pairs):
        kinds[kind].append(margin)
        kinds["all kinds"].append(margin)
    return {"preferences": {kind: {"accuracy": share([m > 0 for m in kinds[kind]]),
                                   "margin": ratio(kinds[kind])} for kind in sorted(kinds)}}


@torch.no_grad()
def bits(args, stage):
    """Bits a character on val.bin (a UTF-8 byte, if tokens are longer), in windows from the start;
    for 00 beside a model that only counts."""
    tokenizer, T = stage.tokenizer, min(args.window, stage.model.cfg.block_size)
    ids = np.array(read_tokens(f"{args.data}/val.bin", tokenizer)[: args.val_tokens + 1])
    starts, device = list(range(0, len(ids) - 1, T)), stage.model.embed.weight.device
    sums, sizes = [], []
    for few in split(starts[args.rank::args.world], 32):
        rows = [ids[i : i + T + 1].tolist() for i in few]
        with autocast(device):
            x = pad([r[:-1] for r in rows], device)
            losses = -stage.model(x, pad([r[1:] for r in rows], device, -1)) / math.log(2)
        sums += losses.sum(1).tolist()
        for row in rows:                   # a tag, such as <|end|>, counts as one character
            text = tokenizer.decode([i for i in row[1:] if i < tokenizer.base])
            size = text if tokenizer.kind == "chars" else text.encode()
            sizes.append(len(size) + sum(i >= tokenizer.base for i in row[1:]))
    sums, sizes = gather(args, sums), gather(args, sizes)
    figures = {"bits": ratio(sums, sizes)}
    if stage.name[:2] == "00" and tokenizer.kind == "chars":
        train = np.array(read_tokens(f"{args.data}/train.bin", tokenizer))
        counted = grams(train, ids, tokenizer.vocab_size, 5)
        figures["bits_5gram"] = ratio([counted[i : i + T].sum() for i in starts], sizes)
    return figures


def chat(args, stage):
    """Instructions of other kinds: the greedy answer must be the reference, to the letter."""
    rows = questions(args, stage.tokenizer, stage.model, "chat_test.jsonl")
    said = [s for s, in ask(args, stage.model, stage.tokenizer, rows)]
    hits = [text == row["completion"] + "<|end|>" for (text, _, _), row in zip(said, rows)]
    kinds = defaultdict(list)
    for row, hit in zip(rows, hits):
        kinds[row.get("kind", "all")].append(hit)
    return {"chat": share(hits), "chat_by_kind": {k: share(kinds[k]) for k in sorted(kinds)}}
