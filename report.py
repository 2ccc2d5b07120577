"""report.py: the plots of a run, and its tables once more, from its logs and results.json.

    python report.py out/toy         # learning_curves, margins, rl, accuracy_by_steps .png in there

A log is read by its first line, which names its stage; damaged lines are left out. One colour and
one marker are one stage in all panels; bars are 95 % intervals.
"""
import os, re
from pathlib import Path

from model import Parser, cannot_read, cannot_write, fail, parse_json, read_json, say

STAGES = ["00_pretrain", "01_sft", "02_cot", "03_dpo", "04_rlvr", "05_ppo", "06_reward"]
PRIMERS = {"free": "", "answer": "<answer>", "think": "<think>"}
# Okabe and Ito's, which the colour-blind tell apart; without yellow, too light for a line.
COLORS = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"]
MARKERS = "osD^vXP*"

# ---------------------------------------------------------------------------- tables


def cell(name, figure):
    """mean ± half the interval, or (low..high) where the mean is not its middle; shares in %."""
    if not figure:
        return "-"
    scale = 1 if re.match("length|KL|bits|margin|perplexity", name) else 100
    digits = 3 if re.match("KL|bits", name) else 1
    text = lambda x: f"{x:.{digits}f}" if abs(x) < 1e6 else f"{x:.3g}"
    if "low" not in figure:
        return text(figure["mean"] * scale)
    mean, low, high = (figure[k] * scale for k in ("mean", "low", "high"))
    if abs(high + low - 2 * mean) > 1e-6 * (high - low):
        return f"{text(mean)} ({text(low)}..{text(high)})"
    half = (high - low) / 2
    while digits < 6 and round(half, digits) == 0:      # ±0.0 would be no interval
        digits += 1
    return f"{text(mean)} ±{text(half)}"


def table(title, names, rows):
    """rows: [(label, figures)]; n where it changes."""
    kept = [n for n in names if any(figures.get(n) for _, figures in rows)]
    lines, ns = [[title, *kept]], None
    for label, figures in rows:
        found = [figures.get(name) for name in kept]
        last, ns = ns, [f"n {f['n']}" if f else "" for f in found]
        if any(found):
            lines += [[label, *map(cell, kept, found)]] + [["", *ns]] * (ns != last)
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines if kept else []:
        cells = "".join("  " + c.rjust(w) for c, w in zip(line[1:], widths[1:]))
        say("\n" * (line is lines[0]) + line[0].ljust(widths[0]) + cells)


def tables(samples, results, gains):
    """The figures of every stage, {stage: {name: figure}}, and {pair of stages: gains}."""
    rows = list(results.items())
    named = lambda what: sorted({n for f in results.values() for n in f if n.startswith(what)})
    table("greedy", ["format", "stops", *PRIMERS, "length", "chat", "bits", "bits of 5-grams"],
          rows)
    table(f"k = {samples} samples", ["pass@1", "pass@k", "maj@k", "careful",
          "right if careful", "right if not", "length sampled", "KL/token", "KL"], rows)
    split_rows = [(f"{stage}, {mode}", {n[len(mode) + 2:]: f for n, f in figures.items()
                                        if n.startswith(f"{mode}, steps")})
                  for mode in PRIMERS for stage, figures in rows]
    table("steps 1: seen facts", sorted({n for _, f in split_rows for n in f}), split_rows)
    table("a second turn", ["second turn", "the same first", "second - first"], rows)
    table("beyond training", named("beyond"), rows)
    table("chosen or rejected", named("prefers"), rows)
    table("and by how much", named("margin"), rows)
    table("gain, question by question", ["free", "think", "pass@1"], list(gains.items()))


# ---------------------------------------------------------------------------- plots


def read_logs(folder):
    """{stage: [(step, metrics)]} of every log there; steps count from 1, in old logs from 0."""
    logs = {}
    for path in sorted(Path(folder).glob("*.jsonl")):
        rows = []
        try:
            lines = path.read_text(errors="replace").split("\n")
        except OSError as e:
            cannot_read(path, e)
        for line in lines:
            try:
                rows.append(parse_json(line))
            except ValueError:
                continue
        rows = [row for row in rows if isinstance(row, dict)]
        head = next((row for row in rows if "config" in row), None)
        if head:
            name, old = str(head.get("stage", path.stem)), "stage" not in head
            logs[name] = [(row["step"] + old, row) for row in rows if type(row.get("step")) is int]
    return logs


def curve(log, key):
    """A log's ([steps], [values]) of one metric."""
    points = [(step, row[key]) for step, row in log if isinstance(row.get(key), (int, float))]
    return list(zip(*points))


def panels_of(logs):
    """{file: [(title, unit of y, {label: (stage, [xs, ys], dashed)})]} from the logs."""
    def both(stage, key):
        return {label: (stage, curve(logs[stage], f"{v}{key}"), label == "val")
                for label, v in (("train", ""), ("val", "val_"))}

    pairs = [s for s, log in logs.items() if curve(log, "val_margins")]
    rollouts = [s for s, log in logs.items() if curve(log, "reward")]
    made = {"learning_curves.png": [
        (s, "loss, nats a pair" if s in pairs else "loss, nats a token", both(s, "loss"))
        for s, log in logs.items() if curve(log, "val_loss")]}
    made["margins.png"] = [panel for s in pairs for panel in (     # of kto's, only those on val
        (f"{s}: margin", "score of chosen - rejected", both(s, "margins")),
        (f"{s}: accuracy", "share of pairs", both(s, "accuracy")))]
    scored = [s for s in rollouts if s == "05_ppo"]
    judged = [s for s in rollouts if s != "05_ppo"]
    made["rl.png"] = [(title, unit, {s: (s, curve(logs[s], key), False) for s in stages})
                      for title, unit, key, stages in (
        ("reward: the verifier's", "mean of 0 and 1", "reward", judged),
        ("reward: the reward model's", "std of its scores on val pairs", "reward", scored),
        ("length", "tokens a completion", "length", rollouts),
        ("KL to the start", "nats a token", "kl", rollouts),
        ("accuracy on val", "share of questions", "accuracy", rollouts))]
    return made


def by_steps(results, kinds):
    """Panels of what each stage gets right, over the number of steps of the question."""
    made = []
    for mode in PRIMERS:
        lines = {}
        for name, figures in results.items():
            found = sorted((int(n.split()[-1]), f) for n, f in figures.items()
                           if f and re.fullmatch(f"{mode}, steps -?\\d+", n))
            ends = [[max(0, f["mean"] - f["low"]), max(0, f["high"] - f["mean"])]
                    for _, f in found]
            lines[name] = (kinds.get(name) or name, [
                [n for n, _ in found], [f["mean"] for _, f in found], list(zip(*ends))], False)
        made.append((f"accuracy, {mode}", "share of questions", lines))
    return made


def draw(path, panels, order, x="optimizer step"):
    """One row of panels; those without a curve are left out -> whether there was any."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    panels = [(title, unit, kept) for title, unit, lines in panels
              if (kept := {k: line for k, line in lines.items() if line[1] and line[1][0]})]
    if not panels:
        return False
    figure, axes = plt.subplots(1, len(panels), squeeze=False, figsize=(4 * len(panels), 3.2))
    for axis, (title, unit, lines) in zip(axes[0], panels):
        for label, (stage, points, dashed) in lines.items():
            i = order.index(stage)
            axis.errorbar(*points[:2], *points[2:], label=label, color=COLORS[i % len(COLORS)],
                          marker=MARKERS[i % len(MARKERS)] if len(points[0]) < 12 else None,
                          linestyle="--" if dashed else "-", capsize=2, clip_on=False)
        axis.set(title=title, xlabel=x, ylabel=unit)
        if unit.startswith("share"):
            axis.set_ylim(0, 1)
        axis.legend(fontsize=8)
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=100)
    except OSError as e:
        cannot_write(path, e)
    plt.close(figure)
    return True


def main(args):
    if not os.path.isdir(args.folder):
        fail(f"{args.folder} is no folder: run ./run.sh first, or name one with logs")
    logs, results, kinds = read_logs(args.folder), {}, {}
    path = f"{args.folder}/results.json"
    if os.path.isfile(path):
        whole = read_json(path)
        try:
            results, kinds = whole["stages"], whole.get("stage_of", {})
            tables(whole["flags"]["samples"], results, whole["paired"])
            panels = by_steps(results, kinds)
        except (KeyError, TypeError, AttributeError, ValueError):
            fail(f"{path} is not what eval.py writes: run python eval.py --out {args.folder} again")
    else:
        say(f"{path} is not there: python eval.py --out {args.folder} writes it")
        panels = []
    known = [*logs, *(kinds.get(name) or name for name in results)]
    order = STAGES + sorted(set(known) - set(STAGES))
    made = [file for file, of in panels_of(logs).items()
            if draw(f"{args.folder}/{file}", of, order)]
    if draw(f"{args.folder}/accuracy_by_steps.png", panels, order, "steps of the question"):
        made.append("accuracy_by_steps.png")
    if not made:
        fail(f"{args.folder} holds no log and no results.json: nothing to draw")
    say(f"{args.folder}: {', '.join(made)}")


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("folder", nargs="?", default="out/toy", help="of a run (%(default)s)")
    main(parser.parse_args())
