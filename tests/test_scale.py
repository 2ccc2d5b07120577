"""What changes speed and memory changes no result: compile, checkpointing; FSDP2 is in test_ranks.
bf16 changes it by its rounding.

And the recipes of run.sh: what --dry_run prints has flags that exist, and runs.
"""
import itertools
import random
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROLLOUTS, ROOT, SCRIPTS, STAGES, flags, kernel, run, steps_of, weights


@pytest.fixture
def scale(monkeypatch):
    """scale(compile=1): as by the flag, for this test."""
    def scale(**values):
        for name, value in values.items():
            monkeypatch.setitem(kernel.SWITCHES, name, value)
    return scale


def close(a, b, to=1e-9):
    assert a.norm() > 0 and (a - b).norm() <= to * a.norm(), ((a - b).norm() / a.norm()).item()


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compile(make, stages, chain, scale, gradients, double, tmp_path):
    """Ragged rows through compiled blocks: the loss and the gradient of every step as without; the
    names in the checkpoint too, which the next stage, chat and eval then load without it."""
    torch._dynamo.reset()
    stage, cfg = make("01_sft", steps=3, lr=1e-3, muon_lr=0.0, eval_every=2)
    run(stage, cfg)
    scale(compile=1)
    compiled = make("01_sft", steps=3, lr=1e-3, muon_lr=0.0, eval_every=2, out=tmp_path / "2")[1]
    run(stage, compiled)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] in (2, 3)    # not one a length
    for a, b in zip(gradients[:3], gradients[3:], strict=True):
        close(a, b)
    for a, b in zip(*(steps_of(f"{out}/01_sft.jsonl") for out in (cfg.out, compiled.out))):
        assert a == pytest.approx(b, rel=1e-9)
    ends = [torch.load(f"{out}/01_sft.pt", weights_only=True)["model"]
            for out in (cfg.out, compiled.out)]
    assert list(ends[0]) == list(ends[1])
    close(*(weights(f"{out}/01_sft.pt") for out in (cfg.out, compiled.out)))
    scale(compile=0)
    run(*make("02_cot", steps=1, start=compiled.out, out=tmp_path / "3",
              init=f"{compiled.out}/01_sft.pt"))


def test_bf16(make, scale, tmp_path):
    """Products in bf16, weights and losses in fp32: near the loss without it, and not on it. In RL
    the first ratio is 1 all the same, as old and new log-probs are rounded alike."""
    logs = []
    for on in (0, 1):
        scale(bf16=on)
        stage, cfg = make("01_sft", steps=2, out=tmp_path / f"{on}")
        run(stage, cfg)
        logs.append(steps_of(f"{cfg.out}/01_sft.jsonl")[0]["loss"])
        parts = torch.load(f"{cfg.out}/01_sft.pt", weights_only=True)
        assert {v.dtype for v in parts["model"].values()} == {torch.float32}
    assert logs[0] != logs[1] == pytest.approx(logs[0], rel=0.01)
    stage, cfg = make("04_rlvr", steps=1, minibatches=1)
    run(stage, cfg)
    assert steps_of(f"{cfg.out}/04_rlvr.jsonl")[0]["clip_frac"] == 0


def test_rollouts_are_not_compiled(make, scale, monkeypatch):
    """One token a step, caches that grow: each would be compiled anew. The tokens are the same."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, **how: (compiled.append(how), f)[1])
    stage, cfg = make("04_rlvr", steps=1)
    model, tokenizer, _ = kernel.load(cfg.init)
    asked, end = [tokenizer.prompt("3+4=?")], tokenizer.end
    before = kernel.generate(model, asked, 8, end)
    scale(compile=1)
    assert kernel.wrap(model) is model and compiled == [{"dynamic": True}] * model.cfg.n_layer

    def never(*args):
        raise AssertionError("generation went through a compiled block")

    for block in model.blocks:
        block.forward = never
    assert kernel.generate(model, asked, 8, end) == before


@pytest.mark.parametrize("name", ["00_pretrain", "03_dpo", "06_reward", "04_rlvr"])
def test_checkpointing(name, make, scale, gradients, double, tmp_path, monkeypatch):
    """The same bits of the gradient, with blocks that run again in the backward pass."""
    run(*make(name, steps=1))
    calls, block = [], kernel.Block.forward
    monkeypatch.setattr(kernel.Block, "forward",
                        lambda *a: (calls.append(torch.is_grad_enabled()), block(*a))[1])
    run(*make(name, steps=1, out=tmp_path / "2"))
    once = calls.count(True)
    calls.clear()
    scale(checkpointing=1)
    run(*make(name, steps=1, out=tmp_path / "3"))
    assert calls.count(True) == 2 * once
    n = len(gradients) // 3
    for a, b in zip(gradients[:n], gradients[2 * n:], strict=True):
        assert a.norm() > 0 and torch.equal(a, b)


def test_flags(make, tmp_path):
    """In every script beside its own; in no record, so that a run may go on without them."""
    stage, cfg = make("01_sft", steps=2)
    out = subprocess.run([sys.executable, str(ROOT / "01_sft.py"), *flags(cfg), "--checkpointing",
                          "1"], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    config = torch.load(tmp_path / "out/01_sft.pt", weights_only=True)["record"]["config"]
    assert "steps" in config and not set(kernel.SWITCHES) & set(config)


@pytest.mark.parametrize("name", SCRIPTS)
def test_fsdp_in_rl(name, stages, refuses, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, "--fsdp", "1"])
    if name in ROLLOUTS:
        refuses(lambda: stages[name].cli(stages[name].Config), "--fsdp 1 is not for RL")
    else:
        assert stages[name].cli(stages[name].Config) == stages[name].Config()
        assert kernel.SWITCHES["fsdp"] == 1


def test_compile_without_a_compiler(stages, refuses, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "argv", ["01_sft", "--compile", "1"])
    refuses(lambda: stages["01_sft"].cli(stages["01_sft"].Config), "install g++ or clang++")


@pytest.mark.parametrize("size", [1, 2, 3, 50])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_pieces_of_ranks(size, world):
    """Every row once, on each rank equally many pieces, none empty."""
    for n in range(world, 40):
        pieces = [kernel.split(list(range(n)), size, rank, world) for rank in range(world)]
        assert len({len(p) for p in pieces}) == 1
        assert sorted(i for p in pieces for piece in p for i in piece) == list(range(n))
        assert all(1 <= len(piece) <= max(size, 2 if world > 1 else 1)
                   for p in pieces for piece in p)


@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize("size, tokens", [(1, 10 ** 6), (4, 10 ** 6), (64, 90), (5, 120), (64, 1)])
def test_pieces_by_length(sides, size, tokens):
    """Every row once, sorted, within both bounds unless it stands alone; and no other cuts within
    them are cheaper."""
    rng, cfg = random.Random(0), SimpleNamespace(micro_batch=size, micro_tokens=tokens)
    long = lambda row: len(row[0]) if sides == 1 else max(len(ids) for ids, _ in row)
    computed = lambda piece: sides * len(piece) * max(map(long, piece))
    fits = lambda piece: len(piece) <= size and (computed(piece) <= tokens or len(piece) == 1)
    price = lambda pieces: sum(computed(piece) + tokens / 24 for piece in pieces)
    for _ in range(3):
        rows = [tuple((list(range(rng.randint(1, 40))), i) for _ in range(sides)) for i in range(9)]
        rows = sorted(rows if sides == 2 else [row[0] for row in rows], key=long)
        pieces = kernel.by_length(rng.sample(rows, 9), cfg)
        assert [long(row) for piece in pieces for row in piece] == list(map(long, rows))
        assert all(map(fits, pieces))
        for cuts in itertools.product([0, 1], repeat=8):
            edges = [0, *(i + 1 for i in range(8) if cuts[i]), 9]
            other = [rows[a:b] for a, b in zip(edges, edges[1:])]
            assert not all(map(fits, other)) or price(pieces) <= price(other)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_pieces_by_length_of_ranks(world, scale, monkeypatch):
    """The same number on every rank, whether they share one list or hold one each (FSDP2)."""
    rng, cfg = random.Random(world), SimpleNamespace(micro_batch=4, micro_tokens=60)
    for n in range(world, 30):
        rows = [([0] * rng.randint(1, 40), i) for i in range(n)]
        pieces = [kernel.by_length(rows, cfg, rank, world) for rank in range(world)]
        assert len({len(p) for p in pieces}) == 1 and all(map(all, pieces))
        assert sorted(i for p in pieces for piece in p for _, i in piece) == list(range(n))
    assert kernel.by_length([], cfg) == []
    scale(fsdp=1)
    monkeypatch.setattr(kernel, "all_max", lambda n: 9.0)              # another rank has more
    pieces = kernel.by_length(rows, cfg)
    assert len(pieces) == 9 and all(pieces)
    assert sorted(i for piece in pieces for _, i in piece) == list(range(n))


def test_fewer_rows_than_ranks(scale, refuses):
    assert [kernel.split([7, 8], 4, rank, 3) for rank in range(3)] == [[[7]], [[8]], []]
    scale(fsdp=1)
    cfg = SimpleNamespace(micro_batch=4, micro_tokens=99)
    for pieces in (lambda: kernel.split([7, 8], 4, 0, 3),
                   lambda: kernel.by_length([([1], 1), ([2], 1)], cfg, 0, 3)):
        refuses(pieces, "--fsdp 1: 2 rows are fewer than 3 ranks")


# ---------------------------------------------------------------------------- the recipes of run.sh

def dry_run(recipe, *more):
    out = subprocess.run(["bash", "run.sh", recipe, "--dry_run", *more], cwd=ROOT, text=True,
                         capture_output=True)
    assert out.returncode == 0 and not out.stderr, out.stderr
    return out.stdout


def commands(said):
    """-> [(script, its arguments)] of what run.sh would run."""
    lines = [shlex.split(line) for line in said.splitlines() if line.startswith(".venv/bin/")]
    split = [next(i for i, word in enumerate(line) if word.endswith(".py")) for line in lines]
    return [(line[i], line[i + 1:]) for line, i in zip(lines, split)]


@pytest.mark.parametrize("recipe, parameters", [("60m", 57.8), ("124m", 124.5), ("406m", 406.4)])
def test_dry_run(recipe, parameters, stages, monkeypatch):
    """Every command has its estimate, and flags that its script knows; the model has the size that
    the recipe is called by; the rows of a step come out even on 1 to 24 GPUs."""
    said = dry_run(recipe, "--seed", "3")
    made = {Path(script).stem: args for script, args in commands(said)}
    assert list(made) == ["text", "alpaca", "dolly", "gsm8k", "hh", "ultrafeedback", "mix",
                          "00_pretrain", "01_sft", "02_cot", "06_reward", "03_dpo", "04_rlvr",
                          "05_ppo", "eval", "report"]
    assert len(re.findall("M tokens, .* GB a GPU, .* min", said)) == 8
    assert f"{parameters} M parameters" in said
    for name in STAGES:
        monkeypatch.setattr(sys, "argv", [name, *made[name]])
        cfg = stages[name].cli(stages[name].Config)
        assert cfg.seed == 3 and cfg.out == f"out/{recipe}-seed3"
        for gpus in (1, 2, 3, 4, 6, 8, 12, 24):
            assert cfg.batch_size % (gpus * getattr(cfg, "minibatches", 1)) == 0, (name, gpus)
        if name == "00_pretrain":
            shape = {f.name: getattr(cfg, f.name) for f in fields(kernel.GPTConfig)
                     if hasattr(cfg, f.name)}
            with torch.device("meta"):
                model = kernel.GPT(kernel.GPTConfig(vocab_size=50304, **shape))
            counted = sum(p.numel() for p in model.parameters()) / 1e6
            assert counted == pytest.approx(parameters, abs=0.05)


def test_recipe(stages, sources, bpe, tmp_path, monkeypatch, script):
    """The commands of the recipe one after another, on a few rows in the sources' own formats, with
    a tiny model: each finds what the ones before it have written."""
    monkeypatch.chdir(tmp_path)
    small = dict(n_layer=1, n_head=2, n_embd=16, block_size=256, window=32, steps=2, batch_size=8,
                 micro_batch=4, group_size=2, minibatches=2, max_new=8, eval_rows=4, warmup=0,
                 device="cpu", compile=0)
    for name, args in commands(dry_run("406m")):
        stem = Path(name).stem
        if name.startswith("data/"):
            more = {"text": ["--tokens", "0", "--tokenizer", bpe, "--workers", "1"],
                    "gsm8k": ["--test", sources["gsm8k_test"], "--tokenizer", bpe]}.get(stem, [])
            if stem == "text":                              # the Pile's name becomes a file's
                args = [sources["text"], *args[1:], "--out", f"out/data/{args[0]}"]
            elif stem != "mix":
                args = [*args, "--train", sources[stem], "--val_share", "0.2"]
            script(stem).main([*args, *more])
        elif stem in stages:
            known = {f.name for f in fields(stages[stem].Config)} | set(kernel.SWITCHES)
            tiny = [x for k, v in small.items() if k in known for x in (f"--{k}", str(v))]
            monkeypatch.setattr(sys, "argv", [name, *args, *tiny])
            run(stages[stem], stages[stem].cli(stages[stem].Config))
            assert len(steps_of(f"{tmp_path}/out/406m/{stem}.jsonl")) == 2
        else:
            few = "--max_new 4 --n_greedy 2 --n_primed 2 --n_sampled 2".split()
            done = subprocess.run([sys.executable, str(ROOT / name), *args,
                                   *few * (stem == "eval")], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
    assert {"sft_train.jsonl", "cot_train.jsonl", "pairs_train.jsonl", "rl_train.jsonl",
            "rl_test.jsonl"} <= {path.name for path in (tmp_path / "out/data/chat").iterdir()}
    assert {"results.json", "rl.png"} <= {path.name for path in (tmp_path / "out/406m").iterdir()}


def figures(said):
    """GB of the largest command, hours in all."""
    return (max(map(float, re.findall(r"(\d+) GB a GPU", said))),
            float(re.search(r"in all ([\d.]+) h", said)[1]))


def test_dry_run_of_named_cards():
    """The card stands in the first line, and in the figures; 60m fits 16 GB and is a matter of
    hours; what does not fit is said."""
    ours = dry_run("60m", "--gpus", "1", "--gpu", "rtx 4090")
    assert "for RTX 4090 (165.2 TFLOP/s" in ours and "not measured" in ours and "assumed" in ours
    assert figures(ours)[0] < 16 and 1 < figures(ours)[1] < 8
    slower = dry_run("60m", "--gpus", "1", "--gpu", "3090")
    assert figures(slower)[1] > 1.5 * figures(ours)[1]
    two = dry_run("60m", "--gpu", "4090", "--gpus", "2")
    assert "--nproc_per_node=2" in two and figures(two)[1] < 0.7 * figures(ours)[1]
    assert "more than it has" not in ours
    assert "more than it has: lower --micro_tokens" in dry_run("406m", "--gpus", "1", "--gpu", "l4")


def test_run_sh_without_a_gpu(tmp_path):
    """One line, before anything is prepared. (The tests install nothing: .venv is there.)"""
    for args, said in (["406m", "--dry"], "unknown argument --dry"), (["--dry_run"], "124m and"), (
            ["60m", "--gpu", "l4"], "are for --dry_run"), (
            ["60m", "--dry_run", "--gpus", "5"], "wants 1, 2,"), (
            ["60m", "--dry_run", "--gpu"], "--gpu wants a name"), (
            ["60m", "--dry_run", "--gpu", "Radeon"], "known are H200, H100"):
        out = subprocess.run(["bash", "run.sh", *args], cwd=ROOT, text=True, capture_output=True)
        assert out.returncode == 2 and out.stderr.count("\n") == 1 and said in out.stderr
