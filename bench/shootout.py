"""shootout.py: which sibling is better here? One task, one start, one budget, several seeds.

    python bench/shootout.py             # everything that is not recorded yet, then table and plot
    python bench/shootout.py --report    # only the tables and the plot, from the records

RL: eight algorithms from out/toy/02_cot.pt, 04's own start, 256 completions a step of the same
prompts. The learning rate of each is the best of three, by accuracy on val questions after half
the budget, with a seed that is not reported. DAPO throws samples away: it gets as many steps as
cost the tokens that GRPO samples. DPO: five losses on the same pairs, the scripts' own defaults.

Every finished run is a file in results/shootout/, written whole or not at all; what is there is
skipped. Runs go two at a time, one thread each, so seconds compare within this table only.
"""
import json, os, re, shutil, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from model import Parser, check_ranges, missing, read_json  # noqa: E402
from model import read_rows, say, write_text  # noqa: E402

RL = {"grpo": "04_rlvr.py"} | {name: f"RL/{name}.py" for name in (
    "reinforce", "rloo", "dr_grpo", "dapo", "gspo", "cispo", "ppo")}
DPO = {"dpo": "03_dpo.py"} | {name: f"DPO/{name}.py" for name in ("ipo", "simpo", "orpo", "kto")}
RATES, TUNING_SEED, SEEDS = (5e-5, 1e-4, 2e-4), 3, (0, 1, 2)
STEPS, EVERY = 20, 4
RECORDS, OUT, START = ROOT / "results/shootout", Path("out/shootout"), "out/toy/02_cot.pt"
KINDS = ("hasty", "pad", "skip", "wrong")


def record(name, make):
    """The record results/shootout/NAME.json; made by make() if it is not there."""
    path = RECORDS / f"{name}.json"
    if not path.is_file():
        made = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(made) + "\n")
    return read_json(path)


def train(name, script, **flags):
    """Run a script to its end -> checkpoint, {"command", "seconds": of each step, "log"}."""
    out = OUT / name
    shutil.rmtree(out, ignore_errors=True)      # a run that goes on would not know its seconds
    command = [sys.executable, script, "--init", START, "--out", str(out)]
    command += [part for k, v in flags.items() for part in (f"--{k}", str(v))]
    begun, stamps = time.monotonic(), {}
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        for line in process.stdout:
            if step := re.match(r" *\S+ +(\d+)/\d+ ", line):
                stamps[step[1]] = round(time.monotonic() - begun, 1)
    if process.returncode:
        raise SystemExit(process.returncode)
    stem = Path(script).stem
    lines = [{k: float(f"{v:.5g}") for k, v in row.items() if k != "line"}
             for row in read_rows(out / f"{stem}.jsonl")[1:]]      # the first is the run
    shown = ["python", *command[1:]]
    say(f"{name}: {stamps[max(stamps, key=int)]:.0f} s")
    return out / f"{stem}.pt", {"command": " ".join(shown), "seconds": stamps, "log": lines}


def judge(path, n_greedy=100, n_sampled=200, samples=4, pairs=False):
    """Held-out questions of 2-5 steps: greedy and sampled, <think> forced and free; KL; pairs."""
    program = ("import sys, json; sys.path.insert(0, '.'); sys.path.insert(0, 'bench'); "
               "import shootout; print(json.dumps(shootout.ask(*json.loads(sys.argv[1]))))")
    flags = json.dumps([str(path), n_greedy, n_sampled, samples, pairs])
    done = subprocess.run(
        [sys.executable, "-c", program, flags],
        stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


def ask(path, n_greedy, n_sampled, samples, pairs):
    import eval as evaluation
    args = SimpleNamespace(out="", data="out/data/toy", n_greedy=n_greedy, n_sampled=n_sampled,
                           samples=samples, max_new=100, seed=0, device="cpu", rank=0, world=1)
    stage = evaluation.open_stage(args, path)
    found = {}
    for mode in ("free", "think"):
        found[f"greedy {mode}"] = evaluation.greedy(args, stage, mode, n_greedy)[mode]
    said = evaluation.sampled(args, stage)
    found |= {"sampled think": said["pass@1"], "careful": said["careful"],
              "KL": said.get("KL/token"), "length": said["length sampled"],
              f"pass@{samples}": said["pass@k"]}
    rows = evaluation.first([r for r in stage.rows if not r.get("seen")], n_sampled // 4)
    right = [[evaluation.verify(text, row["answer"]) == 1 for text, _, _ in group]
             for row, group in zip(rows, evaluation.ask(args, stage, rows, "", 1.0, samples))]
    found["sampled free"] = evaluation.ratio([sum(r) / samples for r in right])
    return found | (evaluation.preferences(args, stage) if pairs else {})


def tokens(run):
    return [line["sampled_tokens"] for line in run["log"]]


def tune(name, rate):
    return record(f"rl/tune-{name}-{rate:g}", lambda: train(
        f"tune-{name}-{rate:g}", RL[name], lr=rate, seed=TUNING_SEED, steps=STEPS // 2,
        eval_every=STEPS // 2, eval_rows=400)[1])


def best_rate(name):
    return max(RATES, key=lambda rate: tune(name, rate)["log"][-1]["accuracy"])


def steps(name):
    """STEPS, or for DAPO as many as cost the tokens that GRPO samples in STEPS."""
    if name != "dapo":
        return STEPS
    spent = {k: sum(tokens(tune(k, best_rate(k)))) for k in ("dapo", "grpo")}
    return max(1, round(STEPS * spent["grpo"] / spent["dapo"]))


def rl(name, seed):
    def make():
        path, run = train(f"{name}-{seed}", RL[name], lr=best_rate(name), seed=seed,
                          steps=steps(name), eval_every=EVERY, eval_rows=400)
        return run | {"test": judge(path)}
    return record(f"rl/{name}-{seed}", make)


def dpo(name, seed):
    def make():
        path, run = train(f"{name}-{seed}", DPO[name], seed=seed)
        return run | {"test": judge(path, pairs=True)}
    return record(f"dpo/{name}-{seed}", make)


# ---------------------------------------------------------------------------- report


def spread(values, scale=100, digits=1):
    """mean (lowest..highest) over seeds."""
    values = [v * scale for v in values]
    mean = sum(values) / len(values)
    return f"{mean:.{digits}f} ({min(values):.{digits}f}..{max(values):.{digits}f})"


def show(title, head, rows):
    lines = [f"### {title}", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows] + [""]


def reached(run, level):
    """(sampled tokens, seconds) at the first evaluation at or above `level`; None if never. (The
    log's steps count from 1; in records made before they did, from 0.)"""
    spent, first = 0, run["log"][0]["step"]
    for line in run["log"]:
        spent += line["sampled_tokens"]
        if line.get("accuracy", -1) >= level:
            return spent, run["seconds"][str(int(line["step"] - first) + 1)]
    return None


def when(group, grpo):
    """[k tokens, seconds] to the first evaluation where GRPO's run of the same seed ends, or above;
    seeds differ in their val questions and random numbers by more than algorithms do."""
    at = [reached(run, other["log"][-1]["accuracy"]) for run, other in zip(group, grpo)]
    if not any(at):
        return ["never"] * 2
    return [spread([a[i] for a in at if a], scale, 0)
            + f", {at.count(None)} never" * (None in at) for i, scale in ((0, 1e-3), (1, 1))]


def rl_table(runs, start):
    head = ["algorithm", "lr", "steps", "greedy, free", "greedy, `<think>`", "sampled, free",
            "sampled, `<think>`", "careful", "length", "KL/token", "clipped, most", "tokens, k",
            "k tokens to GRPO's end", "seconds to it"]
    keys = ["greedy free", "greedy think", "sampled free", "sampled think", "careful"]
    rows = [["02_cot, the start", "", "", *(f"{100 * start[k]['mean']:.1f}" for k in keys),
             f"{start['length']['mean']:.1f}", "", "", "", "", ""]]
    for name, group in runs.items():
        test = lambda k, group=group: [r["test"][k]["mean"] for r in group]
        clipped = [max(line["clip_frac"] for line in r["log"]) for r in group
                   if "clip_frac" in r["log"][0]]
        rows.append([name, f"{best_rate(name):g}", str(len(group[0]["log"])),
                     *(spread(test(k)) for k in keys), spread(test("length"), 1),
                     spread(test("KL"), 1, 3), spread(clipped, 1, 3) if clipped else "no clip",
                     spread([sum(tokens(r)) for r in group], 1e-3, 0),
                     *when(group, runs["grpo"])])
    title = f"Under the verifier, {len(runs['grpo'])} seeds: mean (lowest..highest)"
    return show(title, head, rows)


def dpo_table(runs, start):
    keys = ["greedy free", "sampled think"]
    head = ["loss", *(f"prefers, {k}" for k in KINDS), "greedy, free", "sampled, `<think>`",
            "careful", "length", "KL/token"]
    rows = [["02_cot, the start", *[""] * 4, *(f"{100 * start[k]['mean']:.1f}" for k in
             (*keys, "careful")), f"{start['length']['mean']:.1f}", ""]]
    for name, group in runs.items():
        test = lambda k, group=group: [r["test"][k]["mean"] for r in group]
        rows.append([name, *(spread(test(f"prefers, {k}")) for k in KINDS),
                     *(spread(test(k)) for k in (*keys, "careful")), spread(test("length"), 1),
                     spread(test("KL"), 1, 3)])
    return show(f"On the pairs, {len(runs['dpo'])} seeds: mean (lowest..highest)", head, rows)


def plot(runs, path):
    """Val accuracy (sampled, <think> forced) over sampled tokens; bands from lowest to highest."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(8, 5))
    for i, (name, group) in enumerate(runs.items()):
        curves = [[(sum(tokens(r)[: j + 1]) / 1e3, line["accuracy"]) for j, line in
                   enumerate(r["log"]) if "accuracy" in line] for r in group]
        x = [sum(p[0] for p in points) / len(points) for points in zip(*curves)]
        ys = [[p[1] for p in points] for points in zip(*curves)]
        axis.plot(x, [sum(y) / len(y) for y in ys], label=name, color=f"C{i}")
        axis.fill_between(x, [min(y) for y in ys], [max(y) for y in ys], alpha=0.12, color=f"C{i}")
    axis.set_xlabel("sampled tokens, thousands")
    axis.set_ylabel("accuracy on 400 val questions, sampled, <think> forced")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def finished(kind, names):
    """{name: its finished runs, by seed}."""
    found = {n: [read_json(p) for s in SEEDS
                 if (p := RECORDS / f"{kind}/{n}-{s}.json").is_file()] for n in names}
    return {n: runs for n, runs in found.items() if runs}


def report():
    """Tables and plot from the finished records alone."""
    start = read_json(RECORDS / "start.json")
    lines, runs, pairs = [], finished("rl", RL), finished("dpo", DPO)
    if "grpo" in runs:
        lines += rl_table(runs, start)
        chosen = [[n, *(f"{100 * tune(n, r)['log'][-1]['accuracy']:.1f}" for r in RATES)]
                  for n in runs]
        lines += show(f"The three rates of each, seed {TUNING_SEED}, half the budget: accuracy on "
                      "400 val questions", ["algorithm", *(f"{r:g}" for r in RATES)], chosen)
        plot(runs, RECORDS / "shootout.png")
    if "dpo" in pairs:
        lines += dpo_table(pairs, start)
    write_text(RECORDS / "table.md", "\n".join(lines))
    say("\n".join(lines))


def main(args):
    check_ranges(vars(args), "shootout")
    os.chdir(ROOT)
    if not args.report:
        if not Path(START).is_file():
            missing(START)
        record("start", lambda: judge(START))
        pool = ThreadPoolExecutor(args.jobs)
        try:
            if args.only in ("", "dpo"):
                wait = [pool.submit(dpo, n, s) for s in SEEDS for n in DPO]
                [w.result() for w in wait]
            if args.only in ("", "rl"):
                [w.result() for w in [pool.submit(tune, n, r) for n in RL for r in RATES]]
                [w.result() for w in [pool.submit(rl, n, s) for s in SEEDS for n in RL]]
        finally:
            pool.shutdown(cancel_futures=True)         # Ctrl-C, or a run that failed: begin no more
    report()


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("--report", action="store_true", help="no runs")
    parser.add_argument("--only", default="", choices=["", "rl", "dpo"])
    parser.add_argument("--jobs", type=int, default=2)
    main(parser.parse_args())
