"""speed.py: how fast are the scripts beside what a registry has? One command, one table.

    pip install -r requirements-test.txt
    python bench/speed.py                                     # all pieces that have no record yet
    python bench/speed.py --only pretrain,sft --size toy --rounds 5     # or --size toy,small
    python bench/speed.py --report                            # the table alone, from the records

Pieces (--only takes beginnings of their names, with commas):
    pretrain    00 in GPT-2's shape       transformers' GPT-2
    default     00 as it comes            00 of commit 26820e8 of this project (or in --old DIR)
    rollouts    generate, 64 prompts      transformers' generate
    grouped     generate, 16 prompts x 8  transformers' generate
    sft dpo grpo   01, 03, 04             TRL's SFTTrainer, DPOTrainer, GRPOTrainer
    ppo         05                        05 of commit 26820e8

Ours is timed as the script runs: the script itself, from one line of its log to the next, with all
that it does between them. Each side runs in a process of its own, in turns, --rounds times: ours,
the peer as it comes, and the peer with our allocator's settings and GELU in one kernel. Its peak
memory is the process's largest resident set. The first step warms up and is not counted, nor is the
last, which evaluates. Every finished piece is a file in --out, written whole or not at all; what is
there is skipped, unless --again. Quiet cores: nothing else may run meanwhile.
"""
import io, json, os, platform, re, statistics, subprocess, sys, tarfile, tempfile, time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
from model import Parser, Progress, believing, cannot_write, check_ranges, fail  # noqa: E402
from model import read_json, say, write_text  # noqa: E402
from pieces import OLD, PIECES, SIZES, call, tuned  # noqa: E402
import torch  # noqa: E402

# ---------------------------------------------------------------------------- one side, once


def run(tree, side, work):
    """-> {"seconds": of each counted step, "peak_mb"}; a process of its own."""
    if "script" in side:
        out = tempfile.mkdtemp(dir=work)
        start = "endless" if "--max_new" in side["flags"] else "start"
        own = [] if side["script"][:2] == "00" else ["--init", f"{work}/{start}.pt"]
        own += ["--reward", f"{work}/reward.pt"] * (side["script"][:2] == "05")
        command = [sys.executable, side["script"], "--data", str(work), "--out", out, *own,
                   *side["flags"]]
    else:
        command = [sys.executable, str(ROOT / "bench/pieces.py"), side["kind"], str(tree),
                   json.dumps({"work": str(work), **side["given"]})]
    env = os.environ | {"GOMP_SPINCOUNT": "3000", "PYTHONUNBUFFERED": "1",
                        "HF_HUB_OFFLINE": "1"} | side.get("env", {})
    stamps, said = [], []
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env,
                              cwd=tree) as process:
            for line in process.stdout:
                said.append(line)
                if re.match(r" *\w+ +\d+/\d+ ", line):                    # a step's
                    stamps.append(time.monotonic())
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        if process.returncode:
            last = (errors.read().strip().splitlines() or ["it said nothing"])[-1]
            fail(f"{' '.join(command[1:])} ended with {process.returncode}: {last}")
    mb = usage.ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)
    if "script" in side:
        if len(stamps) != side["n"] + 2:
            fail(f"{side['script']} wrote {len(stamps)} lines of steps, not {side['n'] + 2}")
        seconds = [b - a for a, b in zip(stamps, stamps[1:])][:-1]
    else:
        seconds = json.loads(said[-1])["seconds"]
    return {"seconds": [round(s, 5) for s in seconds], "peak_mb": round(mb)}


def old_tree(given, folder):
    """The project at commit OLD, out of git, or the folder that --old names."""
    if given:
        if not Path(given, "05_ppo.py").is_file():
            fail(f"--old {given} has no 05_ppo.py: give a folder with commit {OLD} of this project")
        return Path(given).resolve()
    archive = git("archive", OLD)
    if not archive:
        fail(f"git has no commit {OLD} here (a shallow clone?): give a folder with it as --old")
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    return Path(folder)


def git(*words):
    """What git says of this project; nothing where it has no answer, or is not there."""
    try:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True).stdout
    except OSError:
        return b""


# ---------------------------------------------------------------------------- numbers, tables


def summary(runs):
    """[{"seconds", "peak_mb"}] of the rounds -> the median over all steps, lowest and highest step,
    the median of each round, the largest peak."""
    each = [s for run in runs for s in run["seconds"]]
    return {"median": statistics.median(each), "low": min(each), "high": max(each),
            "rounds": [statistics.median(run["seconds"]) for run in runs],
            "peak_mb": max(run["peak_mb"] for run in runs)}


def compare(ours, other):
    """How many times as fast ours is: the median, lowest and highest of the rounds. (Two sides of a
    round ran one after the other: what slows the machine for a while slows both.)"""
    a, b = summary(ours), summary(other)
    each = [y / x for x, y in zip(a["rounds"], b["rounds"])]
    return a, b, {"ratio": statistics.median(each), "low": min(each), "high": max(each)}


def seconds(x):
    return f"{x:.3g}" if x < 1 else f"{x:.2f}"


def row(record):
    """A line of the table."""
    def cell(side):
        rate = f", {record['tokens'] / side['median']:,.0f} tok/s" if record["tokens"] else ""
        return (f"{seconds(side['median'])} ({seconds(side['low'])}..{seconds(side['high'])})"
                + rate)
    ours = summary(record["ours"])
    cells, peaks = [cell(ours)], [ours["peak_mb"]]
    for side in ("other", "tuned"):
        if side not in record:
            cells += ["", ""]
            continue
        _, other, ratio = compare(record["ours"], record[side])
        cells += [f"{record['against']}: {cell(other)}" if side == "other" else cell(other),
                  f"**{ratio['ratio']:.2f}** ({ratio['low']:.2f}..{ratio['high']:.2f})"]
        peaks.append(other["peak_mb"])
    return [record["name"], record["what"], *cells, " / ".join(f"{mb:,}" for mb in peaks)]


NOTES = """Seconds a step: median (lowest..highest) over all counted steps of all rounds; the ratio
says how many times as fast ours is: the median (lowest..highest) of the rounds. Peak: the
largest resident set of the whole process, Python and its libraries in it, MB: ours / the other /
the other tuned.

- TOY: 4 layers, 4 heads, width 128, vocabulary 87. SMALL: 6 layers, 6 heads, width 384, vocabulary
  50,304. Context 256. fp32 but where bf16 is said; random weights and rows from fixed seeds.
- Both sides: the same shape, rows and token counts, the same micro-batches, gradients clipped at 1,
  fused AdamW (Muon only in `default`), GOMP_SPINCOUNT=3000, one process with torch's own number of
  threads. Completions never end early, so that both sides draw the same number of tokens.
- Ours: the scripts, from one log line to the next: reading rows, padding, update, log. Rollouts:
  the engine alone, which also returns the log-prob of each token.
- transformers: GPT2LMHeadModel with sdpa attention, no dropout, no KV cache in training, in a loop
  without a trainer. generate: dynamic cache, prompts padded on the left, num_return_sequences for
  groups.
- TRL: its trainers as they come, but fp32, no gradient checkpointing (it saves memory and costs
  time), no saving, one log line a step as ours; GRPO with loss_type grpo, beta 0.02, plain k3; a
  reward function that returns 0 at once (ours parses every completion, and finds no answer).
- tuned: the peer with what ours has: `gelu_pytorch_tanh`, GPT-2's GELU in one kernel, instead of
  `gelu_new`, and the allocator's settings of frame.py, as environment.
- Evaluations and saves are in neither side's steps.
"""


def report(out):
    """results/speed/table.md and speed.json, from the records that are there."""
    found, lines = [], []
    for path in [out / f"{name}.json" for name in PIECES]:
        if path.is_file():
            found.append(read_json(path))
            with believing(f"{path} is no record of a piece: make it with --again"):
                lines.append("| " + " | ".join(row(found[-1])) + " |")
    if not found:
        fail(f"{out} has no records yet: run bench/speed.py without --report")
    machines = {json.dumps(r["machine"]): r["machine"] for r in found}
    head = ["piece", "a step", "ours, s", "the other, s", "ratio", "tuned, s", "ratio", "peak MB"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *lines]
    lines += ["", NOTES] + [", ".join(f"{k} {v}" for k, v in m.items()) for m in machines.values()]
    table = "\n".join(["<!-- bench/speed.py wrote this -->", *lines, ""])
    write_text(out / "table.md", table)
    whole = {}
    for r in found:
        ours, other, ratio = compare(r["ours"], r["other"])
        more = {}
        if "tuned" in r:
            _, more["tuned"], more["ratio_tuned"] = compare(r["ours"], r["tuned"])
        whole[r["name"]] = r | {"ours": ours, "other": other, **ratio, **more}
    write_text(out / "speed.json", json.dumps(whole, indent=1) + "\n")
    say(table)


def machine():
    """What the figures depend on."""
    def of(package):
        try:
            return version(package)
        except PackageNotFoundError:
            fail(f"{package} is not installed: pip install -r requirements-test.txt")
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo")
                 if line.startswith("model name")]
        cpu = names[0] if names else cpu
    commit = git("describe", "--always", "--dirty").decode().strip()
    return {"commit": commit, "cpu": cpu, "cores": os.cpu_count(),
            "threads": torch.get_num_threads(), "python": platform.python_version(),
            **{p: of(p) for p in ("torch", "transformers", "trl")}}


def measure(name, piece, trees, work, rounds, after):
    """One piece, in turns -> its record."""
    shape = dict(zip(("shape", "vocab"), SIZES[piece.size]))
    old = piece.against == OLD
    sides = {"ours": (piece.ours, "new"), "other": (piece.other, "old" if old else "new")}
    if not old:
        sides["tuned"] = tuned(piece.other), "new"
    for which, (side, tree) in sides.items():
        if "given" in side:
            side = side | {"given": side["given"] | shape}
        folder = work / f"{piece.size}-{tree}"
        if not folder.is_dir():
            folder.mkdir()
            run(trees[tree], call("make", **shape), folder)
        sides[which] = trees[tree], side, folder
    loads, runs = [os.getloadavg()[0]], {which: [] for which in sides}
    for _ in range(rounds):
        for which, side in sides.items():
            runs[which].append(run(*side))
            after(piece.cost, name)
        loads.append(os.getloadavg()[0])
    return {"name": name, "what": piece.what, "tokens": piece.tokens, "against": piece.against,
            **runs, "commands": [piece.ours, piece.other],
            "load": [round(x, 2) for x in loads], "machine": machine()}


def chosen(only, size):
    """The pieces that --only and --size name. Every word must name one."""
    sizes = size.split(",") if size else list(SIZES)
    for word in sizes:
        if word not in SIZES:
            fail(f"--size {word}: there are {', '.join(SIZES)}")
    pieces = {name: p for name, p in PIECES.items() if p.size in sizes}
    words = only.split(",") if only else [""]
    for word in words:
        if not any(name.startswith(word) for name in pieces) or only and not word:
            fail(f"--only {word or repr(word)}: no piece begins so among {', '.join(pieces)}")
    return {name: p for name, p in pieces.items() if name.startswith(tuple(words))}


def main(args):
    check_ranges({"rounds": args.rounds}, "speed")
    out, pieces = Path(args.out), chosen(args.only, args.size)
    if not args.report:
        now = machine()                                 # refuses before anything has run
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            cannot_write(out, e)
        left = {n: p for n, p in pieces.items() if args.again or not (out / f"{n}.json").is_file()}
        for name in pieces.keys() - left.keys():
            with believing(f"{out}/{name}.json is no record of a piece: make it with --again"):
                at = read_json(out / f"{name}.json")["machine"].get("commit")
            if at != now.get("commit"):
                say(f"{name} is kept, of commit {at}: --again makes it anew")
        costs = {name: p.cost * (2 + (p.against != OLD)) for name, p in left.items()}
        progress = Progress("speed", args.rounds * sum(costs.values()))

        def after(cost, name):
            progress(progress.shown + cost, name, always=True)

        with tempfile.TemporaryDirectory() as work:
            trees = {"new": ROOT}
            if any(p.against == OLD for p in left.values()):
                trees["old"] = old_tree(args.old, f"{work}/tree")
            for name, piece in left.items():
                record = measure(name, piece, trees, Path(work), args.rounds, after)
                write_text(out / f"{name}.json", json.dumps(record) + "\n")
    report(out)


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("--only", default="", help="pieces, by the beginning of their names")
    parser.add_argument("--size", default="", help=f"of {', '.join(SIZES)}, with commas; else all")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side of a piece")
    parser.add_argument("--out", default=str(ROOT / "results/speed"), help="folder of the records")
    parser.add_argument("--old", default="", help=f"a folder with commit {OLD}; else from git")
    parser.add_argument("--again", action="store_true", help="make records that are there again")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    main(parser.parse_args())
