"""eval.py: the same held-out questions for every stage, every figure with its n and 95 % interval.

    python eval.py                                          # all of out/toy, on one core or more
    torchrun --nproc_per_node=2 eval.py                     # the same, faster: one thread a rank
    torchrun --nproc_per_node=4 eval.py --out out/gsm8k --data out/data/gsm8k --max_new 400

Writes results.json into --out, anew after every part; report.py draws the plots. A checkpoint's
record says what it is asked: 00 knows no template, 01 no traces, 06 is a reward model, 03 and DPO/
have learned from pairs. Intervals: Wilson's for shares, normal for means, over questions (the
samples of one belong together), windows of text or pairs; none where all values are equal.
"""
import errno, json, math, os, signal, sys, time
from pathlib import Path
from types import SimpleNamespace

from model import (Parser, Progress, at_least_fp32, autocast, check_ranges, claim, cannot_write,
                   encode_rows, fail, file_hashes, generate, in_words, init_distributed, load,
                   load_strict, missing, pad, read_checkpoint, read_rows, read_tokens, say, shift,
                   split, turns, verify, write_text)
import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from chat import content
from figures import careful, gram_bits, grouped, majority, pass_at_k, rate, ratio, share
from report import STAGES, PRIMERS, tables

FILES = {"val.bin": (), "rl_test.jsonl": ("prompt", "answer"),
         "rl_long.jsonl": ("prompt", "answer"),
         "pairs_test.jsonl": ("prompt", "chosen", "rejected"),
         "chat_test.jsonl": ("prompt", "completion")}
# What a stage is asked; all others everything but pairs, and one of no known stage everything. No
# distance to their start is asked of these: it writes in another way.
ASKED = {"00_pretrain": ["bits", "free"], "06_reward": ["pairs"],
         "01_sft": ["bits", "free", "answer", "think", "second", "beyond", "chat"],
         "02_cot": ["bits", "free", "answer", "think", "second", "beyond", "sampled", "chat"]}
# How a stage that has learned from pairs scores a completion: by its head, by log p - log p_start,
# DPO's implicit reward (without its beta), or without a reference by the mean of log p over tokens
# or by that mean's log odds.
SCORES = {"06_reward": "head", "03_dpo": "start", "ipo": "start", "kto": "start", "simpo": "mean",
          "orpo": "odds"}

# ---------------------------------------------------------------------------- asking


def gather(args, part):
    """This rank's items rank::world -> all items, in order, on every rank."""
    parts = [part] * args.world
    if args.world > 1:
        dist.all_gather_object(parts, part)
    return [parts[i % args.world][i // args.world] for i in range(sum(map(len, parts)))]


def questions(args, model, tokenizer, name):
    path = f"{args.data}/{name}"
    steps = lambda row: row["steps"] if type(row.get("steps")) is int else None
    rows = read_rows(path, *FILES[name])
    rows = [dict(row, id=i, steps=steps(row)) for i, row in enumerate(rows)]

    encode = lambda row: [(tokenizer.prompt(row["prompt"], "<think>"), row)]
    return [row for [(_, row)] in encode_rows(rows, path, encode, model.cfg.block_size - 1)]


def first(rows, n):
    """The first n rows of each number of steps; rows without one are one group."""
    groups = grouped([row["steps"] for row in rows], rows)
    return [row for group in groups.values() for row in group[:n]]


def each(n, rows):
    """How many rows of each number of steps make n of them, or a few more."""
    return -(-n // max(1, len({row["steps"] for row in rows})))


def kind_of_row(row, key="kind"):
    return str(row.get(key, "other"))


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
# Each returns {name: figure}; stage.right keeps the values of single questions, for pairing, and
# stage.said the greedy answers, for who asks again.


def greedy(args, stage, mode, n):
    """A completion that opens with the primer of its own accord is what it would be with it."""
    rows, primer, end = first(stage.rows, n), PRIMERS[mode], stage.tokenizer.end
    opener = stage.tokenizer.encode_completion(primer)
    said = {i: ids[len(opener):] for i, ids in stage.said.items()
            if ids[: len(opener)] == opener and ids[-1] == end}
    new = [row for row in rows if row["id"] not in said]
    said |= {row["id"]: ids for row, [(_, ids, _)] in zip(new, ask(args, stage, new, primer))}
    stage.said = stage.said if primer else said
    right = [verify(primer + stage.tokenizer.decode(said[row["id"]]), row["answer"])
             for row in rows]
    held = [i for i, row in enumerate(rows) if not row.get("seen")]
    stage.right[mode] = {rows[i]["id"]: right[i] or 0.0 for i in held}
    out = {mode: share(list(stage.right[mode].values()))}
    for steps, hits in grouped([row["steps"] for row in rows], right).items():
        if steps is not None:
            out[f"{mode}, steps {steps}"] = share([h or 0.0 for h in hits])
    if mode == "free":
        out |= {"format": share([r is not None for r in right]),
                "stops": share([said[row["id"]][-1] == end for row in rows]),
                "length": ratio([len(said[rows[i]["id"]]) for i in held])}
    return out


def second(args, stage):
    """Do questions that `greedy` has asked fare as well as second turns? The first turn is one with
    few steps where this one has many, and what the checkpoint itself has answered to it."""
    tok, held = stage.tokenizer, [row for row in stage.rows if not row.get("seen")]
    asked = [row for row in first(stage.rows, each(args.n_second, held)) if row["id"] in stage.said]
    try:
        tok.header("assistant", "user")
    except ValueError:                     # this model's own chat is for one question alone
        return {}
    rows = [row | {"prompt": [*turns(other["prompt"]), {
        "role": "assistant", "content": tok.decode(content(tok, stage.said[other["id"]]))},
        *turns(row["prompt"])]} for row, other in zip(asked, asked[::-1])
        if row is not other and not row.get("seen")]
    rows = [r for r in rows if len(tok.prompt(r["prompt"])) < stage.model.cfg.block_size]
    right = [verify(text, row["answer"]) or 0.0
             for row, [(text, _, _)] in zip(rows, ask(args, stage, rows))]
    before = [stage.right["free"][row["id"]] for row in rows]
    return {"second turn": share(right), "the same first": share(before),
            "second - first": ratio(np.subtract(right, before))}


def beyond(args, stage):
    """Questions unlike those of training, in one way each."""
    rows = questions(args, stage.model, stage.tokenizer, "rl_long.jsonl")
    kinds = grouped([kind_of_row(row, "beyond") for row in rows], rows)
    rows = [row for of in kinds.values() for row in first(of, each(args.n_beyond, of))]
    right = [verify(text, row["answer"]) or 0.0
             for row, [(text, _, _)] in zip(rows, ask(args, stage, rows))]
    hits = grouped([kind_of_row(row, "beyond") for row in rows], right)
    return {f"beyond, {kind}": share(hits[kind]) for kind in hits}


def sampled(args, stage):
    """pass@k, maj@k, careful traces and the KL to the start: all from the same samples."""
    k, rows = args.samples, [row for row in stage.rows if not row.get("seen")]
    if not rows:
        return {}
    rows = first(rows, each(args.n_sampled, rows))
    said = ask(args, stage, rows, "<think>", 1.0, k)
    right = np.array([[verify(t, row["answer"]) == 1 for t, _, _ in g]
                      for row, g in zip(rows, said)])
    lengths, gaps = (np.array([[f(s) for s in g] for g in said])
                     for f in (lambda s: len(s[1]), lambda s: s[2]))
    votes = [majority([t for t, _, _ in g], row["answer"]) for row, g in zip(rows, said)]
    stage.right["pass@1"] = {row["id"]: hits.mean() for row, hits in zip(rows, right)}
    out = {"pass@1": rate(right.mean(1)), "maj@k": share(votes),
           "pass@k": share([pass_at_k(k, int(hits.sum()), k) for hits in right]),
           "length sampled": ratio(lengths.mean(1))}
    if stage.init:
        out |= {"KL/token": ratio(gaps.sum(1), lengths.sum(1)), "KL": ratio(gaps.mean(1))}
    known = [i for i, row in enumerate(rows) if row["steps"] is not None]
    if known:
        care = np.array([[careful(t, rows[i]["steps"]) for t, _, _ in said[i]] for i in known])
        right = right[known]
        out |= {"careful": rate(care.mean(1)),
                "right if careful": rate((right & care).sum(1), care.sum(1)),
                "right if not": rate((right & ~care).sum(1), (~care).sum(1))}
    return out


def preferences(args, stage, n=None):
    """How often, and by how much, the chosen completion scores above the rejected one; of the first
    n pairs of each kind."""
    path, tok, how = f"{args.data}/pairs_test.jsonl", stage.tokenizer, SCORES.get(stage.kind)
    if not stage.init and how in (None, "start"):
        return {}

    def encode(row):
        sides = [tok.answered(row["prompt"], row[key]) for key in ("chosen", "rejected")]
        return [(ids, (len(ids) - sum(mask), kind_of_row(row))) for ids, mask in sides]

    def score(pairs):
        if how != "head":
            now = log_prob(stage.model, pairs)
            if how in (None, "start"):
                return [a - b for a, b in zip(now, log_prob(stage.init, pairs))]
            means = [min(total / len(c), -1e-7) for total, (_, c) in zip(now, pairs)]
            return means if how == "mean" else [m - math.log(-math.expm1(m)) for m in means]
        last = [len(p) + len(c) - 1 for p, c in pairs]
        with torch.no_grad(), autocast(args.device):
            hidden = stage.model.forward_hidden(pad([p + c for p, c in pairs], args.device))
            hidden = at_least_fp32(hidden[range(len(pairs)), last])      # as 06's RewardModel
            return ((hidden * stage.head.weight).sum(-1) + stage.head.bias).tolist()

    rows = read_rows(path, *FILES["pairs_test.jsonl"])
    kinds = grouped(map(kind_of_row, rows), rows)
    pairs = encode_rows([row for of in kinds.values() for row in of[:n]], path, encode,
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
    """ids -> what bits are counted by: characters, or UTF-8 bytes if tokens are longer (or so many
    that five of them are no 64-bit integer). A control token such as <|end|> is one of them."""
    if tok.kind == "chars" and tok.vocab_size ** 5 < 2 ** 63:
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
    if stage.kind == "00_pretrain":
        train = np.array(read_tokens(f"{args.data}/train.bin", tok)[: 10 ** 7]).tolist()
        before = units(tok, ids[:1])
        V = 256 if before.dtype == np.uint8 else tok.vocab_size
        counted = gram_bits(units(tok, train), np.concatenate([before, *spans]),
                            V)[len(before) - 1:]
        parts = np.split(counted, np.cumsum(sizes)[:-1])
        out["bits of 5-grams"] = ratio([part.sum() for part in parts], sizes)
    return out


def chat(args, stage):
    """Instructions of other kinds: the greedy answer must be the reference, to the letter."""
    rows = questions(args, stage.model, stage.tokenizer, "chat_test.jsonl")
    said = ask(args, stage, rows)
    hits = [g[0][0] == f"{row['completion']}<|end|>" for row, g in zip(rows, said)]
    kinds = grouped(map(kind_of_row, rows), hits)
    return {"chat": share(hits)} | {f"chat, {k}": share(kinds[k]) for k in kinds}


# ---------------------------------------------------------------------------- the report


def kind_of(parts):
    """The stage that a checkpoint's record names; "" if it names none."""
    kind = parts.get("record", {}).get("stage")
    return kind if isinstance(kind, str) else "06_reward" if "head" in parts else ""


def plan(args, kind):
    """[(what, rough cost, part)] for a checkpoint of this kind."""
    n = args.n_greedy if kind != "00_pretrain" else min(args.n_greedy, 40)
    mode = lambda name, n: (name, 2 + n // 12, lambda args, stage: greedy(args, stage, name, n))
    jobs = {"val.bin": [("bits", 6, bits)],
            "pairs_test.jsonl": [("pairs", 80, lambda a, s: preferences(a, s, a.n_pairs))],
            "rl_test.jsonl": [mode("free", n), mode("answer", args.n_primed),
                              mode("think", args.n_primed),
                              ("second", args.n_second // 15, second),
                              ("sampled", 1 + args.n_sampled * args.samples // 20, sampled)],
            "rl_long.jsonl": [("beyond", 3 * args.n_beyond // 10, beyond)],
            "chat_test.jsonl": [("chat", 5, chat)]}
    jobs = [job for file, of in jobs.items() if os.path.isfile(f"{args.data}/{file}") for job in of]
    wanted = ASKED.get(kind, [job[0] for job in jobs if job[0] != "pairs" or not kind
                              or kind in SCORES])
    return [job for job in jobs if job[0] in wanted]


def open_stage(args, path):
    model, tokenizer, parts = load(path, args.device, "any")
    name, kind = Path(path).stem, kind_of(parts)
    stage = SimpleNamespace(name=name, kind=kind, model=model.eval(), tokenizer=tokenizer,
                            said={}, right={}, init=None)
    if kind == "06_reward":
        stage.head = nn.Linear(model.cfg.n_embd, 1).to(args.device).requires_grad_(False)
        load_strict(stage.head, parts.get("head", {}), path)
        return stage
    if not kind:
        say(f"{name}: its record names no stage, so it is asked everything that there is")
    if os.path.isfile(f"{args.data}/rl_test.jsonl"):
        stage.rows = questions(args, model, tokenizer, "rl_test.jsonl")
    if kind not in ASKED:
        stage.init = start_of(args, name, parts.get("record", {}))
    return stage


def start_of(args, name, record):
    """The model that a stage began from, or None: to what is no longer there is no distance."""
    config, inputs = (record.get(k) for k in ("config", "inputs"))
    path, why = config.get("init") if isinstance(config, dict) else None, "is not there"
    if not isinstance(path, str):
        return None
    if os.path.isfile(path):
        model = load(path, args.device)[0].eval()
        if isinstance(inputs, dict) and file_hashes[path] == inputs.get(path):
            return model
        why = "has changed since"
    say(f"{name}: its start {path} {why}, so there is no KL to it")


def paired(kinds, right):
    """The gains over 02, question by question, of every stage that comes after it."""
    base = next((name for name in right if kinds[name] == "02_cot"), None)
    gains = {}
    for name in right if base else []:
        if kinds[name] not in ("", *ASKED):
            pairs = {k: [float(v - right[base][k][i]) for i, v in right[name].get(k, {}).items()
                         if i in right[base].get(k, {})] for k in ("free", "think", "pass@1")}
            gains[f"{name} - {base}"] = {k: ratio(v) for k, v in pairs.items()}
    return gains


def begin(args, script):
    """Refuse what cannot be; ranks and device. Here nothing is resumed: Ctrl-C leaves at once."""
    check_ranges(vars(args), script)
    args.rank, args.world, args.device = init_distributed(args.device)
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, signal.default_int_handler)


def claim_file(folder, file, lock):
    """Find out before any work whether a file can be written; no second run writes there."""
    if not file:
        fail(f"--out must name a file, not the folder {folder}")
    claim(folder, lock)
    path = f"{folder}/{file}"
    try:
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        open(f"{path}.new", "w").close()
        os.remove(f"{path}.new")
    except OSError as e:
        cannot_write(path, e)


def attempt(args, what, do, *given):
    """do(...), or None after a line that says why not: the other parts go on. (Not with several
    ranks, which would wait for each other: what is written stays.)"""
    try:
        return do(*given)
    except (Exception, SystemExit) as e:
        if args.world > 1 or getattr(e, "code", 2) != 2:
            raise
        if not isinstance(e, SystemExit):
            print(f"error: {what}: {in_words(e)}", file=sys.stderr, flush=True)


def judged(args, stage, part):
    return finite(stage.name, part(args, stage))


def finite(name, figures):
    bad = [k for k, f in figures.items() if f and not math.isfinite(f["mean"])]
    if bad:
        fail(f"{name}: {bad[0]} is not finite: the model's numbers overflow")
    return figures


def what_there_is(args):
    """What to judge and to ask, read once before any work -> {name: path}, {name: kind}."""
    paths = args.checkpoints or [p for s in STAGES if os.path.isfile(p := f"{args.out}/{s}.pt")]
    if not paths:
        fail(f"--out {args.out!r} has no checkpoint: run ./run.sh first")
    stems = {Path(path).stem for path in paths}
    named = {Path(p).stem if len(stems) == len(paths) else str(p): p for p in paths}
    for path in paths:
        if not os.path.isfile(path):
            missing(path)
    absent = [file for file in FILES if not os.path.isfile(f"{args.data}/{file}")]
    if len(absent) == len(FILES):
        fail(f"{args.data} holds no test file: run python data/toy.py first, or another in data/")
    for file, keys in FILES.items():
        if file in absent:
            say(f"{args.data}/{file} is not there: its columns are left out")
        elif keys:
            read_rows(f"{args.data}/{file}", *keys)
    return named, {name: kind_of(read_checkpoint(path)) for name, path in named.items()}


def write(args, results, kinds, right, failed):
    """results.json, as far as it is known -> the gains over 02."""
    gains = paired(kinds, right)
    flags = {k: v for k, v in vars(args).items() if k not in ("rank", "device")}
    whole = {"flags": flags, "stages": results, "stage_of": kinds, "paired": gains,
             "failed": failed}
    if args.rank == 0:
        write_text(f"{args.out}/results.json", json.dumps(whole, indent=1) + "\n")
    return gains


def main(args):
    begin(args, "eval")
    paths, kinds = what_there_is(args)
    if args.rank == 0:
        claim_file(args.out, "results.json", "eval")
    plans = {name: plan(args, kind) for name, kind in kinds.items()}
    progress = Progress("eval", sum(cost for jobs in plans.values() for _, cost, _ in jobs))
    results, right, failed, done = {}, {}, [], 0
    for name, path in paths.items():
        results[name], stage = {}, attempt(args, name, open_stage, args, path)
        for what, cost, part in plans[name]:
            begun = time.monotonic()
            found = stage and attempt(args, f"{name}, {what}", judged, args, stage, part)
            failed += [f"{name} {what}"] * (found is None)
            results[name] |= found or {}
            right[name] = stage.right if stage else {}
            write(args, results, kinds, right, failed)
            done += cost
            progress(done, f"{name}  {what}  {time.monotonic() - begun:.1f} s", always=True)
    tables(args.samples, results, write(args, results, kinds, right, failed))
    say(f"\n{args.out}/results.json is written; python report.py {args.out} draws its plots")
    if failed:
        fail(f"left out, for what was said above: {', '.join(failed)}")


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("checkpoints", nargs="*", help="default: all stages in --out")
    for flag, default, text in [
            ("out", "out/toy", "where results go"), ("data", "out/data/toy", "test files"),
            ("n_greedy", 160, "questions a step count"), ("n_primed", 50, "the same with a primer"),
            ("n_second", 200, "of these asked again, as second turns"),
            ("n_beyond", 80, "of each kind in rl_long.jsonl"),
            ("n_sampled", 128, "questions sampled"), ("samples", 8, "of each"),
            ("n_pairs", 160, "pairs of a kind"), ("max_new", 100, "tokens of an answer, at most"),
            ("window", 128, "tokens"), ("val_tokens", 2 ** 15, "of val.bin, at most"),
            ("seed", 0, "of the samples"), ("device", "auto", "cpu, cuda, mps")]:
        parser.add_argument(f"--{flag}", type=type(default), default=default,
                            help=f"{text} (%(default)s)")
    main(parser.parse_args())
