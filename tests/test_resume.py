"""A run that was killed, or stopped with Ctrl-C, ends where an uninterrupted one does: in bits."""
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import (ROLLOUTS, ROOT, SCRIPTS, STAGES, flags, kernel, outputs, run, stem, steps_of,
                      weights)

HERE = ROOT / "tests"
# Processes cost seconds: of the siblings the two that carry most from row to row are killed.
KILLED = STAGES + [name for name in ("RL/dapo", "DPO/kto") if name in SCRIPTS]
# Rewards of tiny models never vary; see conftest.parity. The rest is the stage as it is.
PROGRAM = ("import sys; sys.path.insert(0, {here!r}); from conftest import *; "
           "s = load_stage({name!r}); s.verify = parity; s.main(s.cli(s.Config))")


def start(name, cfg):
    """The stage as a process of its own."""
    program = [str(ROOT / f"{name}.py")]
    if name in ROLLOUTS:
        program = ["-c", PROGRAM.format(here=str(HERE), name=name)]
    return subprocess.Popen([sys.executable, *program, *flags(cfg)], stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"PYTHONPATH": str(ROOT)})


def wait_for_steps(process, log, n):
    """Until the log has n steps (its first line is the config)."""
    end = time.monotonic() + 60
    while not log.is_file() or log.read_bytes().count(b"\n") <= n:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.002)


def same(folder, name):
    """The run in out/ ended as the one in whole/ did, in bits."""
    ends = [folder / part / stem(name) for part in ("out", "whole")]
    assert torch.equal(*[weights(f"{end}.pt") for end in ends])
    assert steps_of(f"{ends[0]}.jsonl") == steps_of(f"{ends[1]}.jsonl")
    samples = [Path(f"{end}.samples.jsonl") for end in ends if name in ROLLOUTS]
    assert not samples or samples[0].read_text() == samples[1].read_text() != ""


@pytest.mark.parametrize("name", KILLED)
def test_kill(name, make, tmp_path, monkeypatch):
    """kill -9 between two steps; the same command then continues. Weights are equal bit for bit to
    those of an uninterrupted run, and the log has every step once, with equal numbers."""
    changes = dict(steps=16 if name in ROLLOUTS else 40, save_every=1, lr=1e-3, group_size=2,
                   eval_every=7)
    stage, cfg = make(name, **changes)
    process = start(name, cfg)
    wait_for_steps(process, tmp_path / f"out/{stem(name)}.jsonl", 2)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the run was over before it was killed"
    assert not (tmp_path / f"out/{stem(name)}.pt").exists()
    done = torch.load(tmp_path / f"out/{stem(name)}.state.pt", weights_only=True)["step"]
    assert 1 <= done < cfg.steps
    with open(tmp_path / f"out/{stem(name)}.jsonl", "a") as f:
        f.write('{"step": 99, "lo')                        # as a kill in the middle of a line

    seen, update = [], stage.update
    monkeypatch.setattr(stage, "update", lambda cfg, step, *rest: (
        seen.append(step), update(cfg, step, *rest))[1])
    run(stage, cfg)
    assert min(seen) == done                               # it did not begin again
    run(stage, replace(cfg, out=str(tmp_path / "whole")))
    same(tmp_path, name)
    assert sorted(os.listdir(tmp_path / "out")) == outputs(name)


def test_ctrl_c(make, stages, tmp_path):
    """SIGINT lets the step finish, saves, says so in one line and leaves with 130; the same command
    in a new process continues to the same bits."""
    stage, cfg = make("01_sft", steps=120, save_every=10 ** 6)
    process = start("01_sft", cfg)
    wait_for_steps(process, tmp_path / "out/01_sft.jsonl", 3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 130, err
    done = torch.load(tmp_path / "out/01_sft.state.pt", weights_only=True)["step"]
    assert err == f"stopped after step {done}; the same command continues\n"
    assert [line["step"] for line in steps_of(tmp_path / "out/01_sft.jsonl")] == list(
        range(1, done + 1))
    again = start("01_sft", cfg)
    assert again.wait(timeout=300) == 0, again.stderr.read()
    run(stage, replace(cfg, out=str(tmp_path / "whole")))
    same(tmp_path, "01_sft")


def test_ctrl_c_under_torchrun(make, tmp_path):
    """The terminal's Ctrl-C reaches the launcher and both ranks, and the launcher hands it on: the
    ranks still finish their step together and save what one process can continue."""
    stage, cfg = make("01_sft", steps=400, save_every=10 ** 6)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(ROOT / "01_sft.py"), *flags(cfg)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               text=True, start_new_session=True)
    wait_for_steps(process, tmp_path / "out/01_sft.jsonl", 3)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=200)
    done = torch.load(tmp_path / "out/01_sft.state.pt", weights_only=True)["step"]
    assert err.count(f"stopped after step {done}; the same command continues\n") == 1, err
    assert [line["step"] for line in steps_of(tmp_path / "out/01_sft.jsonl")] == list(
        range(1, done + 1))
    run(stage, cfg)
    assert len(steps_of(tmp_path / "out/01_sft.jsonl")) == 400


def stop_after(stage, cfg, steps, monkeypatch):
    """Run `steps` steps and then behave as if Ctrl-C had been pressed."""
    log, count = kernel.Log.__call__, []

    def count_steps(self, *args, **metrics):
        log(self, *args, **metrics)
        count.append(1)
        kernel.interrupt.seen = len(count) == steps

    with monkeypatch.context() as m:
        m.setattr(kernel.Log, "__call__", count_steps)
        with pytest.raises(SystemExit) as e:
            run(stage, cfg)
    assert e.value.code == 130 and len(count) == steps
    kernel.interrupt.seen = False


@pytest.mark.parametrize("name", SCRIPTS)
def test_stopped_at_any_step(name, make, tmp_path, monkeypatch):
    """Three stops in one run, in process: after the first step, one later, and before the last."""
    stage, cfg = make(name, steps=6)
    for n in (1, 1, 3):
        stop_after(stage, cfg, n, monkeypatch)
    run(stage, cfg)
    run(stage, replace(cfg, out=str(tmp_path / "whole")))
    same(tmp_path, name)


@pytest.mark.parametrize("field, value", [("lr", 5e-4), ("steps", 9), ("seed", 3),
                                          ("batch_size", 4), ("train", "sft_val.jsonl")])
def test_changed_flag(field, value, make, tmp_path, monkeypatch, refuses):
    """An unfinished run is not continued under other flags; it is left as it was."""
    stage, cfg = make("01_sft", steps=6)
    stop_after(stage, cfg, 2, monkeypatch)
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    refuses(lambda: run(stage, replace(cfg, **{field: value})), "unfinished run", field,
            "01_sft.state.pt", "delete it", "--out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    run(stage, replace(cfg, micro_batch=2, save_every=3))      # these leave the result unchanged


def test_changed_data(make, data, tmp_path, monkeypatch, refuses):
    """Nor over other data: the files are known by their content."""
    for path in data.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    stage, cfg = make("01_sft", steps=6, data=tmp_path)
    stop_after(stage, cfg, 2, monkeypatch)
    rows = (tmp_path / "sft_train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "sft_train.jsonl").write_text("".join(rows[1:] + rows[:1]))
    refuses(lambda: run(stage, cfg), "unfinished run", "sft_train.jsonl")


def test_lost_log(make, tmp_path, monkeypatch):
    """The log is for people: a resume without it goes on."""
    stage, cfg = make("01_sft", steps=4)
    stop_after(stage, cfg, 2, monkeypatch)
    (tmp_path / "out/01_sft.jsonl").unlink()
    run(stage, cfg)
    assert json.dumps(steps_of(tmp_path / "out/01_sft.jsonl"))
