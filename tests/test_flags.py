"""Every number of every script: below, at and above its range, NaN and infinity; and its help."""
import ast
import math
import re
from dataclasses import asdict, fields, replace

import pytest
from conftest import ROOT, SCRIPTS, kernel, stem
from harness import Machine

NEVER = (math.nan, math.inf, -math.inf, 1e39, -1e39)
NUMBERS = [(name, field) for name in SCRIPTS for field in re.findall(
    r"(?m)^    (\w+): (?:int|float) = ", (ROOT / f"{name}.py").read_text())]


def span(name, field, more=()):
    """-> text, low, high of the field's range in this script; a field without one has none."""
    ranges = {**kernel.RANGES, **dict(more)}
    text = ranges.get(f"{stem(name)}.{field}") or ranges[field]
    found = re.fullmatch(r"([\[(])(\S+), (\S+)([\])])", text)
    assert found, f"{field}: {text} is no range"
    return text, float(found[2]), float(found[3])


def just_outside(text, low, high, kind):
    """The nearest numbers of this kind that the range does not hold."""
    step = 1 if kind is int else 1e-9
    return (low if text[0] == "(" else low - step * max(1, abs(low)),
            high if text[-1] == ")" else high + step * max(1, abs(high)))


@pytest.fixture(scope="module")
def machine():
    machine = Machine()
    yield machine
    machine.close()


@pytest.mark.parametrize("name, field", NUMBERS)
def test_range(name, field, stages, refuses):
    """Outside one line with the flag and its range; at a closed end and just inside all is well."""
    text, low, high = span(name, field)
    default = stages[name].Config()
    kind = type(getattr(default, field))
    for value in (*just_outside(text, low, high, kind), *NEVER):
        value = kind(value) if math.isfinite(value) and kind is int else value
        refuses(lambda: kernel.check_ranges(asdict(replace(default, **{field: value})), stem(name)),
                f"--{field} must lie in {text}, not {value}")
    inside = [low if text[0] == "[" else low + 1e-9, high if text[-1] == "]" else high - 1e-9]
    for value in [kind(x) for x in inside]:
        kernel.check_ranges(asdict(replace(default, **{field: value})), stem(name))


@pytest.mark.parametrize("name", SCRIPTS)
def test_defaults_lie_inside(name, stages):
    kernel.check_ranges(asdict(stages[name].Config()), stem(name))


def test_every_range_is_used():
    """A range of a field that is nowhere would be a typing mistake in RANGES."""
    used = {f for _, f in NUMBERS} | {f"{stem(n)}.{f}" for n, f in NUMBERS}
    used |= {f.name for f in fields(kernel.GPTConfig)}
    text = "".join(path.read_text() for folder in (".", "data", "bench")
                   for path in (ROOT / folder).glob("*.py") if path.name != "model.py")
    assert [k for k in kernel.RANGES if k not in used
            and not re.search(rf'"(--)?{k.rpartition(".")[2]}"', text)] == []


@pytest.mark.parametrize("field", [f.name for f in fields(kernel.GPTConfig)
                                   if type(f.default) is not str])
def test_architecture(field, refuses):
    """The same of what a checkpoint says of its model; "where" begins the line."""
    text, low, high = span("", field)
    kind = type(getattr(kernel.GPTConfig, field))
    for value in (*just_outside(text, low, high, kind), *NEVER):
        refuses(lambda: kernel.GPTConfig(**{field: value}, where="a.pt: "),
                f"error: a.pt: {field} must lie in {text}, not {value}")


# The wrong side of each of these trains another thing than the script says, or nothing.
@pytest.mark.parametrize("name, field, bad, good", [
    ("01_sft", "grad_clip", -1, 0), ("03_dpo", "beta", 0, 0.1), ("DPO/ipo", "beta", 0, 0.1),
    ("DPO/simpo", "beta", 0, 2.0), ("DPO/kto", "beta", 0, 0.1), ("DPO/orpo", "lam", 0, 0.1),
    ("DPO/kto", "lam_d", 0, 1.0), ("DPO/kto", "lam_u", 0, 1.0),
    ("DPO/simpo", "gamma", -0.1, 0.0), ("04_rlvr", "beta", -0.1, 0.0),
    ("05_ppo", "gamma", 1.5, 1.0),
    ("05_ppo", "lam", 2, 0.0), ("05_ppo", "vf_coef", -1, 0.0), ("RL/ppo", "gamma", -1e-9, 1.0),
    ("04_rlvr", "clip_eps", 0, 1.0), ("04_rlvr", "clip_eps", 1.1, 0.2),
    ("04_rlvr", "temperature", 0, 0.001), ("04_rlvr", "group_size", 1, 2),
    ("RL/dapo", "clip_eps_high", 0, 5.0), ("RL/dapo", "overlong", -1, 0),
    ("01_sft", "seed", 2 ** 32, 2 ** 32 - 1), ("01_sft", "seed", -1, 0),
    ("01_sft", "lr", -1e-9, 0.0),
    ("00_pretrain", "window", 0, 1), ("00_pretrain", "block_size", 1, 131_072)])
def test_ends_that_matter(name, field, bad, good, stages, refuses):
    default = stages[name].Config()
    kernel.check_ranges(asdict(replace(default, **{field: good})), stem(name))
    refuses(lambda: kernel.check_ranges(asdict(replace(default, **{field: bad})), stem(name)),
            f"--{field} must lie in", f"not {bad}")


def test_seeds_are_seeds():
    """The ends of --seed serve torch's and numpy's generators."""
    import numpy as np
    import torch
    for seed in (0, 2 ** 32 - 1):
        torch.manual_seed(seed)
        np.random.default_rng([seed, 0])
        kernel.uniforms(seed, 0, 0, 1)


# The numbers of the scripts that have no Config: (script, its arguments, flag).
OTHER = {"chat.py": "a.pt", "eval.py": "", "tasks.py": "a.pt", "data/within_reach.py": "a.pt",
         "data/text.py": "a.txt"}
OTHER_NUMBERS = [(name, flag, number) for name in OTHER for flag, number in re.findall(
    r'\("(\w+)", (-?\d[\d.]*(?: \*\* \d+)?), "', (ROOT / name).read_text())]


@pytest.mark.parametrize("name, flag, number", OTHER_NUMBERS)
def test_other_ranges(name, flag, number, machine, tmp_path):
    """The same from the command line; it is the first thing that is looked at."""
    more = dict(re.findall(r'\b(\w+)="([\[(][^"]*[\])])"', (ROOT / "data/common.py").read_text()))
    text, low, high = span(name.removesuffix(".py"), flag, more if "/" in name else ())
    kind = float if "." in number else int
    for value in (*just_outside(text, low, high, kind), *(NEVER if kind is float else ())):
        value = kind(value) if math.isfinite(value) and kind is int else value
        done = machine.run(f"{name} {OTHER[name]} --{flag}={value}", tmp_path)
        assert done.code == 2 and done.err.count("\n") == 1, done.err
        assert re.match(rf"error: --{flag} must lie in {re.escape(text)}, not ", done.err), done.err


# ---------------------------------------------------------------------------- help

OTHERS = ["eval.py", "chat.py", "tasks.py", "report.py", "convert.py", "data/within_reach.py",
          *(f"data/{x}.py" for x in ("alpaca", "dolly", "gsm8k", "hendrycks_math", "hh", "messages",
                                     "mix", "pairs", "questions", "smollm2", "svamp", "text", "toy",
                                     "ultrafeedback"))]


def entries(text):
    """{flag: help} of a --help page."""
    body = text[text.index("options:"):]
    found = re.findall(r"(?m)^  (?:-\w(?: \w+)?, )?--(\w+)((?:.|\n(?!  -|\n|\S))*)", body)
    return {flag: re.sub(r"^\s*(?:\{\S+\}|'[^']*'|[\w.+-]+(?: \[\w+ \.\.\.\])?)?\s+", "",
        rest).strip()
            for flag, rest in found}


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_of_a_stage(name, machine, stages, tmp_path):
    """The comment of each Config field is the help of its flag."""
    done = machine.run([f"{name}.py", "--help"], tmp_path, env={"COLUMNS": "500"})
    assert done.code == 0 and done.err == ""
    shown = entries(done.out)
    source = (ROOT / f"{name}.py").read_text()
    for f in fields(stages[name].Config):
        comment = re.search(rf"(?m)^    {f.name}: [^#\n]*# *(.+)$", source)
        assert comment and shown[f.name].endswith(comment[1]), (f.name, shown.get(f.name))
    assert {"compile", "checkpointing", "fsdp", "bf16", "overwrite"} <= set(shown)
    assert done.out.index(ast.get_docstring(ast.parse(source)).splitlines()[0])


@pytest.mark.parametrize("name", [x for x in OTHERS if (ROOT / x).exists()])
def test_help_of_the_others(name, machine, tmp_path):
    """Every flag has words of its own."""
    done = machine.run([name, "--help"], tmp_path, env={"COLUMNS": "500"})
    assert done.code == 0 and done.err == "", done
    for flag, text in entries(done.out).items():
        assert re.search(r"[a-z]{2}", re.sub(r"\(.*?\)", "", text)), f"{name} --{flag}: {text!r}"
