"""The documents agree with the code they speak of."""
from conftest import ROOT, load_stage


def test_diff_guide_is_fresh():
    diffs = load_stage("docs/diffs")
    assert (ROOT / "docs/diffs.md").read_text() == diffs.guide(), "run python docs/diffs.py"
    siblings = {new for _, new, _ in diffs.GUIDE}
    on_disk = {str(p.relative_to(ROOT)) for d in ("RL", "DPO") for p in (ROOT / d).glob("*.py")}
    linked = {f"{d}/{m}.py" for d in ("RL", "DPO") for m in ("model", "answers", "frame", "flops")}
    assert on_disk - linked <= siblings


def test_readme_has_the_recorded_figures():
    summary = load_stage("bench/summary")
    assert (ROOT / "README.md").read_text() == summary.readme(), "run python bench/summary.py"
