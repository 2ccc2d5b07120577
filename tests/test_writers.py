"""Several writers, ends of every kind: one clear line, no mixed log, no orphan, nothing lost."""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import ROOT, steps_of, weights
from harness import Machine, make_world
from test_bad_inputs import REWARD, SFT

LONG = SFT.replace("--steps 2", "--steps 4000") + " --save_every 1000"


@pytest.fixture(scope="module")
def machine():
    machine = Machine()
    yield machine
    machine.close()


@pytest.fixture(scope="module")
def tiny(machine):
    top = Path(tempfile.mkdtemp(prefix="writers-"))
    yield make_world(machine, top / "world")
    shutil.rmtree(top)


@pytest.fixture
def folder(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "here")


def until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def lines(path):
    return path.read_text().count("\n") if path.exists() else 0


def gone(pid):
    """Whether the process has ended (a zombie has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def sound(log):
    """A log that one run has written: the run, then steps 1, 2, 3, ... without a hole."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert "stage" in rows[0] and [r["step"] for r in rows[1:]] == list(range(1, len(rows)))
    return len(rows) - 1


def test_two_at_once(machine, folder):
    """The second says who writes there, and touches nothing; after kill -9 the lock is gone."""
    first = machine.start(LONG, folder)
    log = folder / "out/01_sft.jsonl"
    until(lambda: lines(log) > 3)
    for command in (LONG, LONG + " --lr 1e-3 --overwrite 1", LONG + " --out ./out/"):
        second = machine.run(command, folder)
        assert second.code == 2 and re.fullmatch(
            rf"error: .*out/*/01_sft is being written by another run \(process {first.pid} "
            r"on .*\): wait for it, stop it, or choose another --out\n", second.err), second.err
    other = machine.run(SFT.replace("01_sft", "02_cot"), folder)       # another name may
    assert other.code == 0, other.err
    before = lines(log)
    until(lambda: lines(log) > before)
    os.kill(first.pid, signal.SIGTERM)
    done = machine.wait(first)
    assert done.code == 130 and re.fullmatch(
        r"stopped after step \d+; the same command continues\n", done.err)
    assert sound(log) == int(re.search(r"\d+", done.err)[0])
    assert not (folder / "out/01_sft.lock").exists()
    third = machine.start(LONG, folder)
    until(lambda: lines(log) > before + 20)
    os.kill(third.pid, signal.SIGKILL)
    assert machine.wait(third).code == -9
    fourth = machine.start(LONG, folder)                   # its lock died with it
    lock = folder / "out/01_sft.lock"
    until(lambda: f"process {fourth.pid} " in lock.read_text())
    os.kill(fourth.pid, signal.SIGINT)
    assert machine.wait(fourth).code == 130
    sound(log)


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("at", ["update", "append", "save", "begin"])
def test_stopped_is_saved(sign, at, machine, folder):
    """Wherever the signal falls, the same command goes on to the very same weights and log."""
    command = SFT.replace("--steps 2", "--steps 6") + " --save_every 2"
    name, call = {"update": ("sample_rows", 3), "append": ("append", 3), "save": ("save", 2),
                  "begin": ("begin", 1)}[at]
    stopped = machine.run(command, folder, strike=[int(sign), name, call])
    assert stopped.code == 130 and stopped.err.startswith("stopped after step"), stopped
    assert machine.run(command, folder).code == 0
    assert machine.run(command.replace("--out out", "--out whole"), folder).code == 0
    assert weights(folder / "out/01_sft.pt").equal(weights(folder / "whole/01_sft.pt"))
    assert steps_of(folder / "out/01_sft.jsonl") == steps_of(folder / "whole/01_sft.jsonl")
    assert sorted(p.name for p in (folder / "out").iterdir()) == ["01_sft.jsonl", "01_sft.pt"]


def test_second_ctrl_c_leaves_at_once(machine, folder):
    run = machine.start(LONG.replace("--batch_size 4", "--batch_size 4000"), folder)
    until(lambda: (folder / "out/01_sft.jsonl").exists())
    os.kill(run.pid, signal.SIGINT)
    time.sleep(1.2)
    os.kill(run.pid, signal.SIGINT)
    begun = time.monotonic()
    assert machine.wait(run).code == 130
    assert time.monotonic() - begun < 5


def test_finished_checkpoints_are_kept(machine, folder):
    """One of another record: by hand refused, --overwrite 1 replaces it, run.sh keeps it aside."""
    path, old = folder / "out/01_sft.pt", folder / "out/01_sft.pt.old"
    assert machine.run(SFT, folder).code == 0
    first = path.read_bytes()
    refused = machine.run(SFT + " --seed 7", folder)
    assert refused.code == 2 and "finished and was made with other seed" in refused.err
    assert path.read_bytes() == first
    assert machine.run(SFT + " --seed 7 --overwrite 1", folder).code == 0
    second = path.read_bytes()
    assert second != first and not old.exists()
    again = machine.run(SFT + " --seed 7", folder, env={"SKIP_DONE": "1"})
    assert again.code == 0 and "out/01_sft.pt is up to date" in again.out
    assert path.read_bytes() == second
    made = machine.run(SFT + " --seed 8", folder, env={"SKIP_DONE": "1"})
    assert made.code == 0 and re.search(r"out/01_sft.pt will be made again \(changed: seed\); the "
                                        r"old one is kept as out/01_sft.pt.old", made.out)
    assert old.read_bytes() == second and path.read_bytes() != second


def test_interrupted_remake_keeps_the_old(machine, folder):
    """Until the new one is whole the old one stands under its own name."""
    assert machine.run(SFT, folder).code == 0
    first = (folder / "out/01_sft.pt").read_bytes()
    stopped = machine.run(SFT + " --seed 8", folder, env={"SKIP_DONE": "1"},
                          strike=[int(signal.SIGTERM), "append", 1])
    assert stopped.code == 130 and (folder / "out/01_sft.pt").read_bytes() == first


# ---------------------------------------------------------------------------- ranks


def test_few_val_pairs_and_two_ranks(machine, folder):
    """Fewer than 8 give no scale for 05; of 8 in micro-batches of 8 each rank has half, and the
    sums are the same."""
    path, more = folder / "data/pairs_val.jsonl", " --lr 0 --micro_batch 8"
    pairs = path.read_text().splitlines(keepends=True)
    path.write_text("".join(pairs[:7]))
    few = machine.run(REWARD + more, folder)
    assert few.code == 2 and "7 pairs are too few" in few.err
    path.write_text("".join(pairs[:8]))
    alone = machine.run(REWARD.replace("--out out", "--out alone") + more, folder)
    assert alone.code == 0, alone.err
    for done in machine.ranks([REWARD + more] * 2, [folder] * 2):
        assert done.code == 0, done.err
    a, b = (steps_of(folder / f"{out}/06_reward.jsonl")[-1] for out in ("alone", "out"))
    assert a["val_mean"] == pytest.approx(b["val_mean"], rel=1e-5) and set(a) == set(b)


def test_two_machines_with_disks_of_their_own(machine, folder, tmp_path):
    """Rank 0 has the unfinished run, rank 1 does not see it: one line, and nothing is trained."""
    command = SFT.replace("--steps 2", "--steps 6") + " --save_every 1"
    machine.run(command, folder, strike=[int(signal.SIGTERM), "append", 3])
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "out/01_sft.state.pt").unlink()
    before = (folder / "out/01_sft.state.pt").read_bytes()
    done = machine.ranks([command] * 2, [folder, other])
    err = "".join(d.err for d in done)
    assert [d.code for d in done] == [2, 2] and err.count("\n") == 1, err
    assert "--out must be on a disk that all machines see" in err
    assert (folder / "out/01_sft.state.pt").read_bytes() == before


def test_one_rank_is_stopped(machine, folder):
    """Any rank's signal: all leave together after the same step, and go on to the same weights."""
    command = SFT.replace("--steps 2", "--steps 300") + " --save_every 1000"
    for out, stop in (("out", True), ("out", False), ("whole", False)):
        runs = []
        start = machine.start
        machine.start = lambda *a, **k: runs.append(start(*a, **k)) or runs[-1]
        wait = machine.wait

        def stopping(run, timeout, stop=stop, runs=runs):
            if stop and run is runs[0]:
                until(lambda: lines(folder / "out/01_sft.jsonl") > 5)
                os.kill(runs[1].pid, signal.SIGTERM)
            return wait(run, timeout)
        machine.wait = stopping
        try:
            done = machine.ranks([command.replace("--out out", f"--out {out}")] * 2, [folder] * 2)
        finally:
            del machine.start, machine.wait
        assert [d.code for d in done] == [130 if stop else 0] * 2, done
        err = "".join(d.err for d in done)
        assert err.count("\n") == stop and ("stopped after step" in err) == stop, err
    sound(folder / "out/01_sft.jsonl")
    assert weights(folder / "out/01_sft.pt").equal(weights(folder / "whole/01_sft.pt"))


def start_python(command, cwd, **env):
    env = {k: v for k, v in os.environ.items() if k != "SKIP_DONE"} | env
    return subprocess.Popen(command, cwd=cwd, text=True, start_new_session=True,
                            env=env | {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "3000"},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


COUNTED = """
import atexit, gc, os, runpy, sys

gc.disable()            # else it is chance whether the model in DDP is gone

@atexit.register
def count():
    names = [open(f"/proc/self/task/{t}/comm").read() for t in os.listdir("/proc/self/task")]
    print("threads of gloo:", sum("gloo" in name for name in names))

sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_threads_end_before_python(folder):
    """One that still held a tensor of the last sum aborted one process in twenty at its end."""
    command = [sys.executable, "-c", COUNTED, *f"{ROOT}/{SFT}".split()]
    with socket.create_server(("", 0)) as free:
        port = str(free.getsockname()[1])
    ranks = [start_python(command, folder, RANK=str(rank), WORLD_SIZE="2", MASTER_PORT=port,
                          MASTER_ADDR="127.0.0.1", PYTHONPATH=str(ROOT)) for rank in range(2)]
    for rank in ranks:
        out, err = rank.communicate(timeout=100)
        assert rank.returncode == 0 and "threads of gloo: 0" in out, err + out


def in_session(sid):
    """The processes of a session that still run."""
    pids = [int(p) for p in os.listdir("/proc") if p.isdigit()]
    return [p for p in pids if not gone(p) and session(p) == sid]


def session(pid):
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return -1


def test_kill_of_torchrun(folder):
    """kill -9 of the launcher: its ranks see that it is gone, save after their step and leave."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
              str(ROOT / "01_sft.py"), *LONG.split()[1:]]
    run, log = start_python(launch, folder), folder / "out/01_sft.jsonl"
    try:
        until(lambda: lines(log) > 3)
        ranks = [p for p in in_session(run.pid) if p != run.pid]
        ranks += [p for p in children(run.pid) if p not in ranks]
        assert len(ranks) >= 2
        run.kill()
        until(lambda: all(map(gone, ranks)), 20)
    finally:
        for pid in [*in_session(run.pid), *children(run.pid)]:
            os.kill(pid, signal.SIGKILL)
    out, err = run.communicate()
    assert err.count("stopped after step") == 1 and "Traceback" not in err, err
    assert sound(log) == int(re.search(r"stopped after step (\d+)", err)[1])
    assert (folder / "out/01_sft.state.pt").exists() and not (folder / "out/01_sft.lock").exists()


def children(pid):
    try:
        return [int(p) for task in Path(f"/proc/{pid}/task").iterdir()
                for p in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def test_error_under_torchrun(folder):
    """The line stands once, before the launcher's own report."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
              str(ROOT / "01_sft.py"), *SFT.split()[1:], "--data", "nowhere"]
    out, err = start_python(launch, folder).communicate(timeout=100)
    said = "error: nowhere/sft_train.jsonl is missing: run its script in data/ first\n"
    assert err.count("error: ") == 1 and said in err, err
    assert said in err[: err.index("ChildFailedError")]


# ---------------------------------------------------------------------------- run.sh


@pytest.fixture
def job(folder):
    """run.sh as it is up to its recipes, and then one stage."""
    shell = (ROOT / "run.sh").read_text()
    head = shell[: shell.index("# ------")]
    assert "run()" in head and "trap" in head
    (folder / "run.sh").write_text(head + f"run $py {ROOT}/{LONG}\n")
    (folder / "install.sh").write_text("#!/bin/sh\n")
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    for name in ("run.sh", "install.sh", ".venv/bin/python"):
        (folder / name).chmod(0o755)
    return folder


def end_of_run(job, sign, code, started):
    """Start run.sh, wait until it has `started`, end it by this signal -> what it said; nothing of
    it is left."""
    run = start_python(["./run.sh"], job)
    try:
        until(started)
        os.kill(run.pid, sign)
        assert run.wait(20) == code
        until(lambda: not in_session(run.pid), 20)
    finally:
        for pid in in_session(run.pid):
            os.kill(pid, signal.SIGKILL)
    return run.communicate()[1]


def test_end_of_run_sh(job):
    """TERM: it ends its stage, which saves. kill -9: the stage sees it, saves and leaves; the same
    command goes on from there."""
    log, done = job / "out/01_sft.jsonl", 0
    for sign, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 143)):
        err = end_of_run(job, sign, code, lambda done=done: lines(log) > done + 5 and (
            not done or f'"resumed_from": {done}' in log.read_text()))
        assert re.fullmatch(r"stopped after step \d+; the same command continues\n", err), err
        assert sound(log) == int(re.search(r"\d+", err)[0]) > done
        assert (job / "out/01_sft.state.pt").exists() and not (job / "out/01_sft.lock").exists()
        done = sound(log)


def test_side_by_side(job):
    """Two lists of stages at once: TERM or kill -9 of run.sh ends both, and both save; where one
    fails the other still ends, and then run.sh fails as it did."""
    head = (job / "run.sh").read_text().split("run $py")[0]
    two = "".join(f"{x}() {{ run $py {ROOT}/{LONG.replace('--out out', f'--out out{x}')}; }}\n"
                  for x in "ab")
    (job / "run.sh").write_text(head + two + "pair a b\n")
    logs, done = [job / f"out{x}/01_sft.jsonl" for x in "ab"], [0, 0]
    for sign, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 143)):
        err = end_of_run(job, sign, code, lambda done=done: all(lines(log) > n + 3 and (
            not n or f'"resumed_from": {n}' in log.read_text()) for log, n in zip(logs, done)))
        assert err.count("the same command continues") == 2
        done = [sound(log) for log in logs]
        assert all((job / f"out{x}/01_sft.state.pt").exists() for x in "ab")
    (job / "run.sh").write_text(head + "a() { run sh -c 'sleep 1; echo ok > a'; echo on > a2; }\n"
                                "b() { run sh -c 'exit 7'; echo on > b; }\npair a b\necho on > c\n")
    run = start_python(["./run.sh"], job)
    assert run.wait(20) == 7 and (job / "a").exists() and (job / "a2").exists()
    assert not (job / "b").exists() and not (job / "c").exists()


def test_two_ranks_of_run_sh(job):
    """A stage on two ranks: TERM or kill -9 of run.sh ends both, one line says so, and the state is
    one; the same command goes on from it. One core: one process."""
    text = (ROOT / "run.sh").read_text()
    whole = text[text.index("cores=$(getconf") : text.index("judged() {")]
    head = (job / "run.sh").read_text().split("run $py")[0]
    whole = whole.replace("$(getconf _NPROCESSORS_ONLN)", "2") + f"whole {ROOT}/{LONG}\n"
    (job / "run.sh").write_text(head + "out=out\n" + whole.replace(" --out out ", " "))
    log, done = job / "out/01_sft.jsonl", 0
    for sign, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 143)):
        err = end_of_run(job, sign, code, lambda done=done: lines(log) > done + 5 and (
            not done or f'"resumed_from": {done}' in log.read_text()))
        assert re.fullmatch(r"stopped after step \d+; the same command continues\n", err), err
        done = sound(log)
    assert json.loads(log.read_text().splitlines()[0])["device"].startswith("2 x cpu")


@pytest.mark.skipif(not (ROOT / ".venv/installed-requirements.txt").exists(), reason="no .venv")
def test_install_is_done_once():
    """Where the pins are installed, install.sh has nothing to do or say."""
    done = subprocess.run(["./install.sh"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
