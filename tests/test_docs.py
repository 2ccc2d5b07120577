"""The documents agree with the code they speak of."""
import importlib.util

from conftest import ROOT


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_diff_guide_is_fresh():
    diffs = load(ROOT / "docs/diffs.py")
    assert (ROOT / "docs/diffs.md").read_text() == diffs.guide(), "run python docs/diffs.py"
    siblings = {new for _, new, _ in diffs.GUIDE}
    on_disk = {str(p.relative_to(ROOT)) for d in ("RL", "DPO") for p in (ROOT / d).glob("*.py")}
    assert on_disk - {f"{d}/{m}.py" for d in ("RL", "DPO") for m in ("model", "answers")} <= siblings


def test_readme_has_the_recorded_figures():
    summary = load(ROOT / "bench/summary.py")
    assert (ROOT / "README.md").read_text() == summary.readme(), "run python bench/summary.py"
