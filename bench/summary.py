"""summary.py: writes the README's tables, from what is recorded in results/.

    python bench/summary.py         # a test compares the README with what this would write
"""
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "results"
ROWS = {"01_sft": "01 direct answers", "02_cot": "02 traces", "03_dpo": "03 DPO",
        "04_rlvr": "04 GRPO", "05_ppo": "05 PPO"}
COLUMNS = {"greedy": ("free", 100, 1), "sampled pass@1": ("pass@1", 100, 1),
           "pass@8": ("pass@k", 100, 1), "careful traces": ("careful", 100, 1),
           "right if careful": ("right if careful", 100, 1),
           "KL to 02, nats a token": ("KL/token", 1, 3)}
KINDS = ("hasty", "pad", "skip", "wrong")


def cell(runs, stage, figure, scale=100, digits=1):
    """mean (lowest..highest) over the seeds."""
    found = [run["stages"][stage].get(figure) for run in runs]
    if not all(found):
        return ""
    values = [f["mean"] * scale for f in found]
    mean = sum(values) / len(values)
    return f"{mean:.{digits}f} ({min(values):.{digits}f}..{max(values):.{digits}f})"


def tables():
    runs = [json.loads((path / "results.json").read_text())
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
    lines += ["", "| prefers the chosen | " + " | ".join(KINDS) + " |", "|---" * 5 + "|"]
    for stage, label in (("03_dpo", "03, implicit reward"), ("06_reward", "06, reward model")):
        cells = [cell(runs, stage, f"prefers, {kind}") for kind in KINDS]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def readme():
    """The README's text with its generated part renewed."""
    text = (ROOT / "README.md").read_text()
    head, _, rest = text.partition("<!-- bench/summary.py -->\n")
    tail = rest.split("<!-- end -->", 1)[1]
    return f"{head}<!-- bench/summary.py -->\n{tables()}\n<!-- end -->{tail}"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme())
