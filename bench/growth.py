"""growth.py: how time and memory grow, beside what the cost model says.

    python bench/growth.py            # every point that has no record yet; table and plot
    python bench/growth.py --report   # table and plot alone, from the records

One model (4 layers, 4 heads, width 256, learned positions, fp32), one thing changed at a time:

    train      a training step against context, batch and vocabulary
    generate   a rollout against the group's size and the number of slots
    ranks      00_pretrain.py under torchrun, the same rows a step on 1 and 2 processes

The cost model (bench/costs.py) counts the operations of the matrix products and the bytes that must
be moved. It knows two numbers of the machine, measured first: the operations a second of a large
product, the bytes a second of a large copy. Its line is operations / the one + bytes / the other.
Each point runs in a process of its own and is one line of --out/growth.jsonl.
"""
import json, os, resource, statistics, subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import costs  # noqa: E402
from model import GPT, GPTConfig, Parser, Progress, append, believing, cannot_write  # noqa: E402
from model import fail, generate, make_optimizers, parse_json, read_rows, say  # noqa: E402
from model import write_text  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

BASE = dict(n_layer=4, n_head=4, n_embd=256)
AXES = {"context": [("train", dict(B=8, T=t)) for t in (64, 128, 256, 512, 1024)],
        "batch": [("train", dict(B=b)) for b in (4, 8, 16, 32, 64)],
        "vocabulary": [("train", dict(V=v)) for v in (128, 1024, 8192, 50304)],
        "group": [("rollout", dict(prompts=8, G=g)) for g in (1, 2, 4, 8, 16)],
        "slots": [("rollout", dict(prompts=128, slots=s)) for s in (8, 16, 32, 64, 128)],
        "ranks": [("ranks", dict(n=n)) for n in (1, 2)]}
VARIES = dict(zip(AXES, ("T", "B", "V", "G", "slots", "n")))


# ---------------------------------------------------------------------------- the cost model
# -> operations, bytes moved, bytes held. Held: 16 bytes a weight (itself, gradient, two moments)
# in training, 4 in sampling; what the blocks keep of each token, and the logits; keys and values.


def shape(V):
    return costs.Shape(BASE["n_layer"], BASE["n_embd"], V)


def train_cost(B=8, T=128, V=1024):
    s = shape(V)
    kept = 4 * B * T * (costs.KEPT * s.L * s.C + V)
    return *costs.train(s, B * T, T), 16 * (costs.blocks(s) + costs.head(s)) + kept


def rollout_cost(prompts, G=1, slots=256, V=1024, length=128, new=32):
    s, places = shape(V), min(prompts * G, slots) * (length + new)
    return (*costs.rollouts(s, prompts, G, length, new, slots),
            4 * (costs.blocks(s) + costs.head(s)) + 8 * s.L * s.C * places)


def ranks_cost(n):
    """Processes that share the machine: each has its own weights and moments, and a part of the
    rows; their gradients are summed through memory."""
    operations, moved, held = train_cost(B=64)
    weights = costs.blocks(shape(1024)) + costs.head(shape(1024))
    return (operations, moved + (n - 1) * (costs.ADAMW + 16) * weights,
            (16 + 4 * (n > 1)) * weights + (held - 16 * weights) / n)


COST = {"train": train_cost, "rollout": rollout_cost, "ranks": ranks_cost}


# ---------------------------------------------------------------------------- one point


def limits(n=2048, copied=512):
    """Operations a second of an n x n product, bytes a second of a copy, read and written; MB of a
    process with torch and nothing else."""
    mb_of_torch = peak_mb()
    a, b = torch.randn(n, n), torch.empty(n, n)
    x, y = torch.ones(copied << 18), torch.empty(copied << 18)
    fastest = lambda do: min(timed(do, 7))
    return {"operations_s": 2 * n ** 3 / fastest(lambda: torch.mm(a, a, out=b)),
            "bytes_s": 2 * (copied << 20) / fastest(lambda: y.copy_(x)), "mb": mb_of_torch}


def timed(do, n):
    do()                                                        # warms up
    seconds = []
    for _ in range(n):
        begun = time.monotonic()
        do()
        seconds.append(time.monotonic() - begun)
    return seconds


def peak_mb():
    """Of this process, so far; what torch loads for its first step is in it from the start."""
    model, ids = GPT(GPTConfig(64, 8, n_layer=1, n_head=1, n_embd=8)), torch.zeros(1, 8).long()
    model(ids, ids).sum().backward()
    make_optimizers([model], 0.0)[0].step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2 ** 20 if sys.platform == "darwin" else 2 ** 10)


def gpt(V, context):
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=V, block_size=context, **BASE))


def train(B=8, T=128, V=1024):
    before = peak_mb()
    model, ids = gpt(V, T), torch.randint(V, (B, T + 1))
    [opt] = make_optimizers([model], 1e-3)

    def step():
        (-model(ids[:, :-1], ids[:, 1:]).mean()).backward()
        opt.step()
        opt.zero_grad(set_to_none=True)
    seconds = statistics.median(timed(step, 5))
    return {"seconds": seconds, "mb": peak_mb() - before}


def rollout(prompts, G=1, slots=256, V=1024, length=128, new=32):
    before = peak_mb()
    model = gpt(V, length + new)
    asked = torch.randint(V, (prompts, length)).tolist()
    asked = [p for p in asked for _ in range(G)]
    seconds = statistics.median(timed(lambda: generate(model, asked, new, -1, slots=slots), 3))
    return {"seconds": seconds, "mb": peak_mb() - before}


def ranks(n, steps=8):
    """00_pretrain.py on n processes, the cores shared; the peak is one process's, whole."""
    with tempfile.TemporaryDirectory() as work:
        spec = {"kind": "chars", "chars": "".join(chr(256 + i) for i in range(1016))}
        Path(work, "tokenizer.json").write_text(json.dumps(spec))
        for name, count in (("train", 2 ** 18), ("val", 256)):
            ids = np.random.default_rng(0).integers(0, 1016, count)
            ids.astype(np.uint16).tofile(f"{work}/{name}.bin")
        shape = [part for k, v in BASE.items() for part in (f"--{k}", str(v))]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   f"--nproc_per_node={n}", "00_pretrain.py", "--data", work, "--out", work, *shape,
                   *"--position learned --qk_norm 0 --muon_lr 0 --window 128 --batch_size 64"
                   " --micro_batch 64 --eval_every 1000 --save_every 1000 --device cpu".split(),
                   "--steps", str(steps)]
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        env = os.environ | {"OMP_NUM_THREADS": str(max(1, cores // n))}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        if done.returncode:
            fail(f"00_pretrain.py on {n} processes: {(done.stderr.splitlines() or ['?'])[-1]}")
        rows = read_rows(f"{work}/00_pretrain.jsonl")[2:-1]       # the run, a first, a last step
    kib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {"seconds": statistics.median(64 * 128 / r["tok_s"] for r in rows),
            "mb": kib / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)}


POINTS = {"train": train, "rollout": rollout, "ranks": ranks, "limits": limits}


def apart(kind, given):
    """One point in a process of its own."""
    program = ("import sys, json; sys.path.insert(0, sys.argv[1]); import growth; "
               "print(json.dumps(growth.POINTS[sys.argv[2]](**json.loads(sys.argv[3]))))")
    command = [sys.executable, "-c", program, str(ROOT / "bench"), kind, json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True,
                          env=os.environ | {"GOMP_SPINCOUNT": "3000"})
    if done.returncode:
        fail(f"{kind} {given}: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------------------- report


def lines_of(records):
    """Table rows: axis, value, seconds measured and of the line, MB measured and of the line."""
    machine, rows = records["limits {}"], []
    for axis, points in AXES.items():
        for kind, given in points:
            found = records.get(f"{kind} {json.dumps(given)}")
            if found:
                operations, moved, held = COST[kind](**given)
                line = operations / machine["operations_s"] + moved / machine["bytes_s"]
                mb = found["mb"] - machine["mb"] * (kind == "ranks")      # whole processes
                rows.append(dict(axis=axis, value=given[VARIES[axis]], seconds=found["seconds"],
                                 line=line, mb=mb, held=held / 2 ** 20, operations=operations,
                                 moved=moved))
    return rows


def table(records):
    machine = records["limits {}"]
    out = [f"This machine ({torch.get_num_threads()} threads, torch {torch.__version__}): "
           f"{machine['operations_s'] / 1e9:.0f} G operations/s, "
           f"{machine['bytes_s'] / 1e9:.1f} GB/s.", "",
           "| axis | value | G operations | GB moved | s, line | s, measured | share of the line | "
           "MB, line | MB, measured |", "|---" * 9 + "|"]
    for r in lines_of(records):
        out.append(f"| {r['axis']} | {r['value']} | {r['operations'] / 1e9:.2f} | "
                   f"{r['moved'] / 1e9:.3f} | {r['line']:.4f} | {r['seconds']:.4f} | "
                   f"{r['line'] / r['seconds']:.0%} | {r['held']:.0f} | {r['mb']:.0f} |")
    out += ["", "MB: the most that one process took on top of Python and torch.", ""]
    return "\n".join(out)


def plot(records, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = lines_of(records)
    names = [axis for axis in AXES if any(r["axis"] == axis for r in rows)]
    figure, axes = plt.subplots(2, max(1, len(names)), figsize=(3 * len(names) + 1, 6),
                                squeeze=False)
    for column, axis in enumerate(names):
        mine = [r for r in rows if r["axis"] == axis]
        for at, (line, dots, unit) in enumerate((("line", "seconds", "s"), ("held", "mb", "MB"))):
            plane, x = axes[at][column], [r["value"] for r in mine]
            plane.plot(x, [r[line] for r in mine], "k--", label="cost model")
            plane.plot(x, [r[dots] for r in mine], "o-", label="measured")
            plane.set(xscale="log", yscale="log", title=axis if at == 0 else None, xlabel=axis,
                      ylabel=unit if column == 0 else None, xticks=x, xticklabels=x)
            plane.minorticks_off()
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(args):
    out = Path(args.out)
    path, wanted = out / "growth.jsonl", [("limits", {}), *(p for a in AXES.values() for p in a)]
    lines = path.read_text().splitlines() if path.is_file() and not args.again else []
    with believing(f"{path} has a line that is no record: --again makes all of them anew"):
        records = {r["point"]: r for r in map(parse_json, lines)}
    if not args.report:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            cannot_write(out, e)
        write_text(path, "".join(json.dumps(r) + "\n" for r in records.values()))
        progress = Progress("growth", len(wanted))
        for n, (kind, given) in enumerate(wanted, 1):
            point = f"{kind} {json.dumps(given)}"
            if point not in records:
                records[point] = {"point": point} | apart(kind, given)
                append(path, [records[point]])
            progress(n, point, always=True)
    if "limits {}" not in records:
        fail(f"{path} has no records yet: run bench/growth.py without --report")
    with believing(f"{path} has a line that is no record: --again makes all of them anew"):
        said = table(records)
    write_text(out / "growth.md", f"<!-- bench/growth.py wrote this -->\n\n{said}")
    plot(records, out / "growth.png")
    say(said)


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("--out", default=str(ROOT / "results/growth"), help="folder of the records")
    parser.add_argument("--again", action="store_true", help="make records that are there again")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    main(parser.parse_args())
