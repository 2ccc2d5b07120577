"""eval.py: the same held-out questions for every stage, every figure with its n and 95 % interval.

    python eval.py                                          # all of out/toy, 2-3 minutes on 2 cores
    torchrun --nproc_per_node=4 eval.py --out out/gsm8k --data out/data/gsm8k --max_new 400

Writes results.json and four plots into --out. A file's first two characters say what it gets: 00
knows no template, 01 no traces, 06 is a reward model; ip, si, or, kt are 03's siblings. Intervals:
Wilson's for shares, normal for means, over questions (the samples of one belong together), windows
of text or pairs.
"""
import argparse, json, math, os, re, signal, time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from answers import number
from model import (autocast, encode_rows, fail, generate, file_hashes, load, pad, parse,
                   init_distributed, read_rows, read_tokens, shift, split, verify, write_text)

STAGES = ["00_pretrain", "01_sft", "02_cot", "03_dpo", "04_rlvr", "05_ppo", "06_reward"]
PRIMERS = {"free": "", "answer": "<answer>", "think": "<think>"}
PAIRED = ("03", "ip", "si", "or", "kt")    # how the names of 03 and of its siblings in DPO/ begin
CAREFUL = re.compile(r"\d+[-+*/]\d+=\d+")

# ---------------------------------------------------------------------------- statistics


def share(hits):
    """0s and 1s -> mean and Wilson's interval, which never leaves [0, 1]."""
    if not len(hits):
        return None
    n, p, z2 = len(hits), float(np.mean(hits)), 1.96 ** 2
    middle = (p + z2 / 2 / n) / (1 + z2 / n)
    half = 1.96 * math.sqrt(p * (1 - p) / n + z2 / 4 / n ** 2) / (1 + z2 / n)
    return {"mean": p, "n": n, "low": max(0.0, middle - half), "high": min(1.0, middle + half)}


def ratio(sums, counts=1.0):
    """sum(sums) / sum(counts) over independent units; the interval by the delta method."""
    sums, counts = np.asarray(sums, float), np.broadcast_to(counts, len(sums)).astype(float)
    if not counts.sum():
        return None
    n, mean = len(sums), float(sums.sum() / counts.sum())
    half = 1.96 * float(np.std((sums - mean * counts) / counts.mean())) / math.sqrt(n)
    return {"mean": mean, "n": n, "low": mean - half, "high": mean + half}


def pass_at_k(n, right, k):
    """The chance that k of n samples hold a right one, unbiased (Chen et al. 2021, eq. 1)."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority(texts, answer):
    """1 if the most frequent answer is right; a tie goes to the one said first."""
    said = [parse(t)[1] for t in texts if parse(t)]
    votes = Counter(s if number(s) is None else number(s) for s in said).most_common(1)
    return float(bool(votes) and verify(f"<answer>{votes[0][0]}</answer><|end|>", answer) == 1)


def careful(text, steps):
    """One operation a line and a line for each step of the question."""
    lines = parse(text)[0].split("\n") if parse(text) else []
    return len(lines) == steps and all(CAREFUL.fullmatch(line) for line in lines)


def grouped(keys, values):
    groups = {key: [] for key in sorted(set(keys), key=str)}
    for key, value in zip(keys, values):
        groups[key].append(value)
    return groups


def gram_bits(train, ids, V, order=5):
    """Bits of each id but the first, interpolated from runs of 1..order ids (Witten & Bell 1991):
    p(c | h) = (count(hc) + kinds(h) p(c | h shortened)) / (count(h) + kinds(h))"""
    p = np.full(len(ids), 1 / V)
    for k in range(1, order + 1):          # k ids in a row are one integer
        code = lambda x: sum(x[j : len(x) - k + 1 + j].astype(np.int64) * V ** (k - 1 - j)
                             for j in range(k))
        seen, count = np.unique(code(train), return_counts=True)
        heads, begin, kinds = np.unique(seen // V, return_index=True, return_counts=True)
        asked, total = code(ids), np.add.reduceat(count, begin)
        i, h = (np.searchsorted(table, x).clip(max=len(table) - 1)
                for table, x in ((seen, asked), (heads, asked // V)))
        known = heads[h] == asked // V     # else this order adds nothing: (0 + 1 p) / (0 + 1)
        kind = np.where(known, kinds[h], 1)
        p[k - 1:] = np.where(seen[i] == asked, count[i], 0) + kind * p[k - 1:]
        p[k - 1:] /= np.where(known, total[h], 0) + kind
    return -np.log2(p[1:])


# ---------------------------------------------------------------------------- asking


def gather(args, part):
    """This rank's items rank::world -> all items, in order, on every rank."""
    parts = [part] * args.world
    if args.world > 1:
        dist.all_gather_object(parts, part)
    return [parts[i % args.world][i // args.world] for i in range(sum(map(len, parts)))]


def questions(args, model, tokenizer, name, key):
    path = f"{args.data}/{name}"
    rows = [dict(row, id=i) for i, row in enumerate(read_rows(path, "prompt", key))]
    kept = encode_rows(rows, path, lambda row: [(tokenizer.prompt(row["prompt"], "<think>"), row)],
                       model.cfg.block_size - 1)
    return [row for [(_, row)] in kept]


def first(rows, n):
    """The first n rows of each number of steps; rows without `steps` are one group."""
    groups = grouped([row.get("steps") for row in rows], rows)
    return [row for group in groups.values() for row in group[:n]]


def ask(args, stage, rows, primer="", temperature=0.0, samples=1):
    """-> [[(primer + text, ids, log p - log p_start)] * samples] of each row."""
    part = rows[args.rank::args.world]
    prompts = [stage.tokenizer.prompt(row["prompt"], primer) for row in part]
    prompts = [p for p in prompts for _ in range(samples)]
    numbers = [row["id"] * samples + s for row in part for s in range(samples)]
    completions, logprobs = generate(
        stage.model, prompts, args.max_new, stage.tokenizer.end, temperature, args.seed,
        rows=numbers, slots=256) if part else ([], [])
    gaps = [0.0] * len(prompts)
    if temperature and stage.init:
        pairs = split(list(zip(prompts, completions)), 64)
        start = [total for few in pairs for total in log_prob(stage.init, few)]
        gaps = [sum(x) - y for x, y in zip(logprobs, start)]
    texts = [primer + stage.tokenizer.decode(c) for c in completions]
    return gather(args, split(list(zip(texts, completions, gaps)), samples))


@torch.no_grad()
def log_prob(model, pairs):
    """[(prompt, completion)] -> log p(completion | prompt)."""
    device = model.embed.weight.device
    mask = pad([[0] * len(p) + [1] * len(c) for p, c in pairs], device)
    ids, targets, mask = shift(pad([p + c for p, c in pairs], device), mask)
    with autocast(device):
        return (model(ids, targets) * mask).sum(1).tolist()


# ---------------------------------------------------------------------------- parts of the report
# Each returns {name: figure}; stage.right keeps the values of single questions, for pairing.


def greedy(args, stage, mode, n):
    rows = first(stage.rows, n)
    said = [s for s, in ask(args, stage, rows, PRIMERS[mode])]
    right = [verify(text, row["answer"]) for (text, _, _), row in zip(said, rows)]
    held = [i for i, row in enumerate(rows) if not row.get("seen")]
    stage.right[mode] = {rows[i]["id"]: right[i] or 0.0 for i in held}
    out = {mode: share(list(stage.right[mode].values()))}
    for steps, hits in grouped([row.get("steps") for row in rows], right).items():
        if steps is not None:
            out[f"{mode}, steps {steps}"] = share([h or 0.0 for h in hits])
    if mode == "free":
        out |= {"format": share([r is not None for r in right]),
                "stops": share([ids[-1] == stage.tokenizer.end for _, ids, _ in said]),
                "length": ratio([len(said[i][1]) for i in held])}
    return out


def sampled(args, stage):
    """pass@k, maj@k, careful traces and the KL to the start: all from the same samples."""
    k, rows = args.samples, [row for row in stage.rows if not row.get("seen")]
    rows = first(rows, -(-args.n_sampled // len({row.get("steps") for row in rows})))
    said = ask(args, stage, rows, "<think>", 1.0, k)
    right = np.array([[verify(t, row["answer"]) == 1 for t, _, _ in g]
                      for row, g in zip(rows, said)])
    lengths, gaps = (np.array([[f(s) for s in g] for g in said])
                     for f in (lambda s: len(s[1]), lambda s: s[2]))
    votes = [majority([t for t, _, _ in g], row["answer"]) for row, g in zip(rows, said)]
    stage.right["pass@1"] = {row["id"]: hits.mean() for row, hits in zip(rows, right)}
    interval = ratio if right.mean(1).std() else share      # the normal one would have no width
    out = {"pass@1": interval(right.mean(1)), "maj@k": share(votes),
           "pass@k": share([pass_at_k(k, int(hits.sum()), k) for hits in right]),
           "length sampled": ratio(lengths.mean(1))}
    if stage.init:
        out |= {"KL/token": ratio(gaps.sum(1), lengths.sum(1)), "KL": ratio(gaps.mean(1))}
    if "steps" in rows[0]:
        care = np.array([[careful(t, row["steps"]) for t, _, _ in g] for row, g in zip(rows, said)])
        out |= {"careful": ratio(care.mean(1)),
                "right if careful": ratio((right & care).sum(1), care.sum(1)),
                "right if not": ratio((right & ~care).sum(1), (~care).sum(1))}
    return out


def preferences(args, stage):
    """How often, and by how much, the chosen completion scores above the rejected one. The score:
    a reward model's; for SimPO and ORPO, which have no reference, the mean of log p over tokens and
    its log odds; else log p - log p_start, DPO's implicit reward (without its beta)."""
    path, tok, kind = f"{args.data}/pairs_test.jsonl", stage.tokenizer, stage.name[:2]
    if not stage.init and kind not in ("06", "si", "or"):
        return {}

    def encode(row):
        p, sides = tok.prompt(row["prompt"]), [row["chosen"], row["rejected"]]
        texts = [s if isinstance(s, str) else s[-1]["content"] for s in sides]
        return [(p + tok.encode_completion(text) + [tok.end], (len(p), row.get("kind", "other")))
                for text in texts]

    def score(pairs):
        if kind != "06":
            now = log_prob(stage.model, pairs)
            if kind not in ("si", "or"):
                return [a - b for a, b in zip(now, log_prob(stage.init, pairs))]
            means = [min(total / len(c), -1e-7) for total, (_, c) in zip(now, pairs)]
            return means if kind == "si" else [m - math.log(-math.expm1(m)) for m in means]
        with torch.no_grad():
            hidden = stage.model.forward_hidden(pad([p + c for p, c in pairs], args.device))
        last, head = [len(p) + len(c) - 1 for p, c in pairs], stage.parts["head"]
        return (hidden[range(len(pairs)), last] @ head["weight"][0] + head["bias"]).tolist()

    pairs = encode_rows(read_rows(path, "prompt", "chosen", "rejected"), path, encode,
                        stage.model.cfg.block_size)
    pairs.sort(key=lambda pair: len(pair[0][0]))               # less padding
    margins = []
    for few in split(pairs[args.rank::args.world], 32):
        scores = score([(ids[:n], ids[n:]) for pair in few for ids, (n, _) in pair])
        margins += [a - b for a, b in split(scores, 2)]
    margins = gather(args, margins)
    kinds = {"all": margins} | grouped([kind for (_, (_, kind)), _ in pairs], margins)
    return ({f"prefers, {k}": share([x > 0 for x in kinds[k]]) for k in kinds}
            | {f"margin, {k}": ratio(kinds[k]) for k in kinds})


def units(tok, ids):
    """ids -> what bits are counted by: characters, or UTF-8 bytes if tokens are longer. A control
    token such as <|end|> is one of them."""
    if tok.kind == "chars":
        return np.asarray(ids)
    pieces = [[]]
    for i in ids:
        pieces.append([]) if i in tok.control else pieces[-1].append(i)
    return np.frombuffer(b"\0".join(tok.decode(p).encode() for p in pieces), np.uint8)


@torch.no_grad()
def bits(args, stage):
    """Bits a character or byte on val.bin, window after window; for 00 also those of a model that
    only counts runs of five in (the first ten million ids of) its training text."""
    tok, T = stage.tokenizer, min(args.window, stage.model.cfg.block_size)
    ids = np.array(read_tokens(f"{args.data}/val.bin", tok)[: args.val_tokens]).tolist()
    windows = [ids[i : i + T + 1] for i in range(0, len(ids) - 1, T)]
    sums = []
    for few in split(windows[args.rank::args.world], 32):
        x, y = pad([w[:-1] for w in few], args.device), pad([w[1:] for w in few], args.device, -1)
        with autocast(args.device):
            sums += (-stage.model(x, y).sum(1) / math.log(2)).tolist()
    spans = [units(tok, w[1:]) for w in windows]
    sizes = [len(span) for span in spans]
    out = {"bits": ratio(gather(args, sums), sizes)}
    if stage.name[:2] == "00":
        train = np.array(read_tokens(f"{args.data}/train.bin", tok)[: 10 ** 7]).tolist()
        before = units(tok, ids[:1])
        counted = gram_bits(units(tok, train), np.concatenate([before, *spans]),
                            tok.vocab_size if tok.kind == "chars" else 256)[len(before) - 1:]
        parts = np.split(counted, np.cumsum(sizes)[:-1])
        out["bits of 5-grams"] = ratio([part.sum() for part in parts], sizes)
    return out


def chat(args, stage):
    """Instructions of other kinds: the greedy answer must be the reference, to the letter."""
    rows = questions(args, stage.model, stage.tokenizer, "chat_test.jsonl", "completion")
    said = ask(args, stage, rows)
    hits = [g[0][0] == row["completion"] + "<|end|>" for row, g in zip(rows, said)]
    kinds = grouped([row.get("kind", "other") for row in rows], hits)
    return {"chat": share(hits)} | {f"chat, {k}": share(kinds[k]) for k in kinds}


# ---------------------------------------------------------------------------- the report


def plan(args, name):
    """[(what, rough seconds on the toy, part)] for the stage `name`."""
    has = lambda file: os.path.isfile(f"{args.data}/{file}")
    kind, few = name[:2], args.n_primed
    n = args.n_many if kind in ("02", "03") else min(args.n_greedy, 40 if kind == "00" else 10 ** 9)
    jobs = [("bits", 4, bits, has("val.bin")), ("pairs", 14, preferences, has("pairs_test.jsonl"))]
    asked = has("rl_test.jsonl")
    for mode, count in (("free", n), ("answer", few), ("think", few)):
        jobs.append((mode, 1 + count / 40, lambda a, s, m=mode, c=count: greedy(a, s, m, c),
                     asked))
    jobs += [("sampled", args.n_sampled * args.samples / 120, sampled, asked),
             ("chat", 1, chat, has("chat_test.jsonl"))]
    wanted = {"00": ["bits", "free"], "01": ["bits", "free", "answer", "think", "chat"],
              "06": ["pairs"]} | {p: [job[0] for job in jobs] for p in PAIRED}
    wanted = wanted.get(kind, [job[0] for job in jobs if job[0] != "pairs"])
    return [job[:3] for job in jobs if job[0] in wanted and job[3]]


def open_stage(args, path):
    model, tokenizer, parts = load(path, args.device, "any")
    record = parts.get("record", {"config": {}})
    init, name = record["config"].get("init", ""), Path(path).stem
    stage = SimpleNamespace(name=name, model=model.eval(), tokenizer=tokenizer, parts=parts,
                            right={}, init=None)
    if os.path.isfile(init):
        stage.init = load(init, args.device)[0].eval()
        if file_hashes[init] != record["inputs"].get(init):
            stage.init = None              # no distance to a start that is no longer there
            print(f"{name}: {init} has changed since, so there is no KL to it", flush=True)
    if name[:2] != "06" and os.path.isfile(f"{args.data}/rl_test.jsonl"):
        stage.rows = questions(args, model, tokenizer, "rl_test.jsonl", "answer")
    return stage


def table(title, names, rows):
    """rows: [(label, figures)] -> mean ± half the interval, shares in %; n where it changes."""
    kept = [n for n in names if any(figures.get(n) for _, figures in rows)]
    lines, ns = [[title, *kept]], None
    for label, figures in rows:
        found, cells = [figures.get(name) for name in kept], []
        for name, f in zip(kept, found):
            plain = re.match("length|KL|bits|margin|perplexity", name)
            scale, digits = 1 if plain else 100, 3 if plain and name[0] in "Kb" else 1
            half = f and (f["high"] - f["low"]) / 2 * scale
            cells.append(f"{f['mean'] * scale:.{digits}f} ±{half:.{digits}f}" if f else "-")
        last, ns = ns, [f"n {f['n']}" if f else "" for f in found]
        if any(found):
            lines += [[label, *cells]] + [["", *ns]] * (ns != last)
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines if kept else []:
        cells = "".join("  " + c.rjust(w) for c, w in zip(line[1:], widths[1:]))
        print("\n" * (line is lines[0]) + line[0].ljust(widths[0]) + cells)


def report(args, results, right):
    """Print the tables -> the paired gains over 02."""
    rows = list(results.items())
    named = lambda what: sorted({n for f in results.values() for n in f if n.startswith(what)})
    table("greedy", ["format", "stops", *PRIMERS, "length", "chat", "bits", "bits of 5-grams"],
          rows)
    table(f"k = {args.samples} samples", ["pass@1", "pass@k", "maj@k", "careful",
          "right if careful", "right if not", "length sampled", "KL/token", "KL"], rows)
    split_rows = [(f"{stage}, {mode}", {n[len(mode) + 2:]: f for n, f in figures.items()
                                        if n.startswith(f"{mode}, steps")})
                  for mode in PRIMERS for stage, figures in rows]
    table("steps 1: seen facts", sorted({n for _, f in split_rows for n in f}), split_rows)
    table("chosen or rejected", named("prefers"), rows)
    table("and by how much", named("margin"), rows)
    gains, base = {}, next((s for s in results if Path(s).stem[:2] == "02"), None)
    for stage in results if base else []:
        if Path(stage).stem[:2] in ("03", "04", "05"):
            pairs = {k: [float(v - right[base][k][i]) for i, v in right[stage][k].items()
                         if i in right[base][k]] for k in ("free", "think", "pass@1")}
            gains[f"{stage} - {base}"] = {k: ratio(v) for k, v in pairs.items()}
    table("gain, question by question", ["free", "think", "pass@1"], list(gains.items()))
    return gains


def plots(args, results):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    logs = {}
    for name in STAGES:
        if os.path.isfile(f"{args.out}/{name}.jsonl"):
            lines = Path(f"{args.out}/{name}.jsonl").read_text().splitlines()[1:]
            logs[name] = [json.loads(line) for line in lines if line.endswith("}")]

    def curve(name, key):
        points = [(row["step"], row[key]) for row in logs.get(name, []) if key in row]
        return list(zip(*points)) if points else None

    def draw(file, panels):
        """panels: {title: {label: (xs, ys) or (xs, ys, half intervals) or None}}"""
        panels = {title: curves for title, curves in panels.items() if any(curves.values())}
        if not panels:
            return
        figure, axes = plt.subplots(1, len(panels), squeeze=False, figsize=(4 * len(panels), 3))
        for axis, (title, curves) in zip(axes[0], panels.items()):
            for label, points in curves.items():
                if points:
                    axis.errorbar(*points, label=label, marker="o" if len(points[0]) < 12 else None)
            axis.set_title(title)
            axis.set_xlabel("steps of the question" if title.startswith("accuracy,") else "step")
            axis.legend(fontsize=8)
        figure.tight_layout()
        figure.savefig(f"{args.out}/{file}", dpi=100)
        plt.close(figure)

    draw("learning_curves.png", {s: {k: curve(s, k) for k in ("loss", "val_loss")}
                                  for s in logs if curve(s, "val_loss")})
    draw("margins.png", {f"{s}: {k}": {v + k: curve(s, v + k) for v in ("", "val_")}
                         for s in ("03_dpo", "06_reward") for k in ("margins", "accuracy")})
    draw("rl.png", {k: {s: curve(s, k) for s in ("04_rlvr", "05_ppo")}
                    for k in ("reward", "length", "kl", "accuracy")})
    panels = {f"accuracy, {mode}": {} for mode in PRIMERS}
    for stage, figures in results.items():
        for mode in PRIMERS:
            found = {n.split()[-1]: f for n, f in figures.items() if n.startswith(f"{mode}, steps")}
            panels[f"accuracy, {mode}"][stage] = found and (
                list(found), [f["mean"] for f in found.values()],
                [(f["high"] - f["low"]) / 2 for f in found.values()])
    draw("accuracy_by_steps.png", panels)


def main(args):
    args.rank, args.world, args.device = init_distributed(args.device)
    signal.signal(signal.SIGINT, signal.SIG_DFL)       # nothing here to resume
    paths = args.checkpoints or [p for s in STAGES if os.path.isfile(p := f"{args.out}/{s}.pt")]
    if not paths:
        fail(f"{args.out} has no checkpoint: run ./run.sh first")
    names = [Path(p).stem if len({Path(q).stem for q in paths}) == len(paths) else p for p in paths]
    say = print if args.rank == 0 else lambda *a, **k: None
    files = ("val.bin", "rl_test.jsonl", "pairs_test.jsonl", "chat_test.jsonl")
    absent = [file for file in files if not os.path.isfile(f"{args.data}/{file}")]
    for file in absent:
        say(f"{args.data}/{file} is not there: its columns are left out")
    if len(absent) == len(files):
        fail(f"{args.data} holds no test file: run python data/toy.py first, or another in data/")
    ahead = sum(cost for p in paths for _, cost, _ in plan(args, Path(p).stem))
    results, right, begun, behind = {}, {}, time.monotonic(), 0.0
    for name, path in zip(names, paths):
        stage = open_stage(args, path)
        results[name], right[name] = {}, stage.right
        for what, cost, part in plan(args, stage.name):
            start = time.monotonic()
            results[name] |= part(args, stage)
            behind, now = behind + cost, time.monotonic()
            left = int((now - begun) / behind * (ahead - behind))
            say(f"{name:>12}  {what:<8} {now - start:5.1f} s   {left // 60}:{left % 60:02} left",
                flush=True)
    if args.rank == 0:
        pairs = report(args, results, right)
        os.makedirs(args.out, exist_ok=True)
        whole = {"flags": {k: v for k, v in vars(args).items() if k not in ("rank", "device")},
                 "stages": results, "paired": pairs}
        write_text(f"{args.out}/results.json", json.dumps(whole, indent=1) + "\n")
        plots(args, results)
        print(f"\n{args.out}/results.json and the plots beside it are written", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", help="default: all stages in --out")
    for flag, default, text in [
            ("out", "out/toy", "where results go"), ("data", "out/data/toy", "test files"),
            ("n_greedy", 250, "questions a step count"), ("n_many", 1000, "the same for 02 and 03"),
            ("n_primed", 100, "the same with a primer"), ("n_sampled", 250, "questions sampled"),
            ("samples", 8, "of each"), ("max_new", 100, "tokens of a completion, at most"),
            ("window", 128, "tokens"), ("val_tokens", 10 ** 6, "of val.bin, at most"),
            ("seed", 0, "of the samples"), ("device", "auto", "cpu, cuda, mps")]:
        parser.add_argument(f"--{flag}", type=type(default), default=default,
                            help=f"{text} (%(default)s)")
    main(parser.parse_args())
