"""summary.py: writes the README's tables, from what is recorded in results/.

    python bench/summary.py         # a test compares the README with what this would write
"""
import re, sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import costs
import shootout

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "results"
ROWS = {"01_sft": "01 direct answers", "02_cot": "02 traces", "03_dpo": "03 DPO",
        "04_rlvr": "04 GRPO", "05_ppo": "05 PPO"}
COLUMNS = {"greedy": ("free", 100, 1), "sampled pass@1": ("pass@1", 100, 1),
           "pass@8": ("pass@k", 100, 1), "careful traces": ("careful", 100, 1),
           "right if careful": ("right if careful", 100, 1),
           "KL to 02, nats a token": ("KL/token", 1, 3)}
KINDS = shootout.KINDS


def cell(runs, stage, figure, scale=100, digits=1):
    found = [run["stages"][stage].get(figure) for run in runs]
    return shootout.spread([f["mean"] for f in found], scale, digits) if all(found) else ""


def tables():
    runs = [shootout.read_json(path / "results.json")
            for path in sorted(RECORDS.glob("toy-seed*"))]
    lines = ["| stage | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for stage, label in ROWS.items():
        cells = [cell(runs, stage, *column) if (stage, column[0]) != ("02_cot", "KL/token") else ""
                 for column in COLUMNS.values()]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    steps = [f"free, steps {n}" for n in range(1, 6)]
    lines += ["", "| greedy, by steps | 1 (seen facts) | 2 | 3 | 4 | 5 |", "|---" * 6 + "|"]
    lines += [f"| {ROWS[stage]} | " + " | ".join(cell(runs, stage, s) for s in steps) + " |"
              for stage in ROWS]
    beyond = [f"beyond, {kind}" for kind in ("steps", "range", "wording")]
    asked = ["the same first", "second turn", *beyond]
    if all(run["stages"]["02_cot"].get(figure) for run in runs for figure in asked):
        lines += ["", "| greedy | first turn | as a second turn | 6-8 steps | starts of 31-60 | "
                  "new wording |", "|---" * 6 + "|"]
        lines += [f"| {ROWS[stage]} | " + " | ".join(cell(runs, stage, f) for f in asked) + " |"
                  for stage in ROWS]
    lines += ["", "| prefers the chosen | " + " | ".join(KINDS) + " |", "|---" * 5 + "|"]
    for stage, label in (("03_dpo", "03, implicit reward"), ("06_reward", "06, reward model")):
        cells = [cell(runs, stage, f"prefers, {kind}") for kind in KINDS]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    lines += ["", f"`./run.sh` took {seconds()} seconds after install, data to plots."]
    return "\n".join(lines)


def seconds():
    """What run.sh's last line says, over the recorded seeds."""
    said = [re.search(r"run\.sh: (\d+) seconds", (path / "table.txt").read_text())
            for path in RECORDS.glob("toy-seed*")]
    return shootout.spread([int(found[1]) for found in said if found], 1, 0)


def siblings():
    """The shoot-out in short; its whole tables are in results/shootout/table.md."""
    start = shootout.read_json(shootout.RECORDS / "start.json")
    shown = {"sampled, `<think>`": ("sampled think", 100, 1),
             "sampled, free": ("sampled free", 100, 1), "greedy, free": ("greedy free", 100, 1),
             "careful": ("careful", 100, 1), "KL/token": ("KL", 1, 3)}
    lines = ["| from 02, under the verifier | lr | " + " | ".join(shown) +
             " | k tokens | of these to GRPO's end |", "|---" * (len(shown) + 4) + "|",
             "| 02, the start | | " + " | ".join(f"{100 * start[k]['mean']:.1f}" for k, _, _ in
                                                 list(shown.values())[:4]) + " | | | |"]
    runs = shootout.finished("rl", shootout.RL)
    for name, group in runs.items():
        cells = [shootout.spread([r["test"][k]["mean"] for r in group], scale, digits)
                 for k, scale, digits in shown.values()]
        spent = [sum(shootout.tokens(r)) for r in group]
        lines.append(" | ".join([f"| {name}", f"{shootout.best_rate(name):g}", *cells,
                                 shootout.spread(spent, 1e-3, 0),
                                 shootout.when(group, runs["grpo"])[0]]) + " |")
    lines += ["", "| from 02, on the pairs | " + " | ".join(
        f"prefers, {k}" for k in KINDS) + " | greedy, free | sampled, `<think>` | KL/token |",
        "|---" * 8 + "|"]
    for name, group in shootout.finished("dpo", shootout.DPO).items():
        figures = [*((f"prefers, {k}", 100, 1) for k in KINDS), ("greedy free", 100, 1),
                   ("sampled think", 100, 1), ("KL", 1, 3)]
        lines.append(f"| {name} | " + " | ".join(
            shootout.spread([r["test"][k]["mean"] for r in group], scale, digits)
            for k, scale, digits in figures) + " |")
    return "\n".join(lines)


def readme():
    """The README's text with its generated parts renewed."""
    return costs.renewed((ROOT / "README.md").read_text(), "bench/summary.py",
                         {"stages": tables(), "siblings": siblings()})


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(f"error: it takes no arguments, not {sys.argv[1]}", file=sys.stderr)
        sys.exit(2)
    (ROOT / "README.md").write_text(readme())
