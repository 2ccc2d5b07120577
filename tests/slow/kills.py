"""kills.py: kill -9 at random moments, in all stages and siblings; every resume bit-equal?

    python tests/slow/kills.py              # until 100 kills are in results/kills.json
    python tests/slow/kills.py --kills 300 --seed 1

Each turn takes the next script and a random moment: some time after its start, or one of the
kernel's own steps of a save (before, in the middle of, and after each write). The same command is
killed and started again until it ends, at most three kills a turn; then its weights and its log
(without the clock's tok_s) must be those of a run that nobody touched. The record is written after
every turn, so that this script, killed itself, goes on where it was.
"""
import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from conftest import ROOT, SCRIPTS, flags, load_stage, config, stem, steps_of, weights  # noqa: E402
from harness import Machine, make_world  # noqa: E402

RECORD = ROOT / "results/kills.json"
# What is hit: the n-th call of a function of the kernel or of os, or a moment by the clock.
MOMENTS = ["save", "write_text", "append", "release", "claim", "restore", "begin", "all_sum",
           "gather_full", "os.fsync", "os.replace", "os.remove", "time", "time", "time", "time"]


def commands(world):
    """{script: its command}: tiny, six steps, an evaluation at 3, a save every two."""
    made = {}
    for name in SCRIPTS:
        stage = load_stage(name)
        cfg = config(stage, "data", "out", "start", steps=6, save_every=2, eval_every=3,
                     n_layer=1, n_embd=16, block_size=64, window=24, micro_batch=4)
        for key in ("init", "reward"):
            if hasattr(cfg, key):
                start = {"06_reward.pt": "06_reward.pt", "00_pretrain.pt": "00_pretrain.pt"}
                setattr(cfg, key, f"start/{start.get(Path(getattr(cfg, key)).name, '01_sft.pt')}")
        made[name] = [f"{name}.py", *flags(cfg)]
    return made


def strike(machine, command, folder, moment, rng, seconds):
    """Start, kill at the moment if it comes before the end -> (result, whether it was killed)."""
    if moment == "time":
        run = machine.start(command, folder, patch="parity")
        time.sleep(rng.random() * seconds)
        try:
            os.kill(run.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        done = machine.wait(run)
    else:
        done = machine.run(command, folder, patch="parity", strike=[
            int(signal.SIGKILL), moment, rng.randint(1, 8)])
    return done, done.code == -9


def compare(folder, whole, name):
    """What differs between the two folders, in words; "" if nothing does."""
    a, b = folder / "out", whole / "out"
    if not weights(a / f"{name}.pt").equal(weights(b / f"{name}.pt")):
        return "weights"
    if steps_of(a / f"{name}.jsonl") != steps_of(b / f"{name}.jsonl"):
        return "log"
    samples = [(x / f"{name}.samples.jsonl") for x in (a, b)]
    if [p.exists() and p.read_text() for p in samples[:1]] != [
            p.exists() and p.read_text() for p in samples[1:]]:
        return "samples"
    left = {p.name for p in a.iterdir()} - {p.name for p in b.iterdir()}
    return f"left over: {', '.join(sorted(left))}" if left - {f"{name}.state.pt.new"} else ""


def turn(machine, world, command, name, rng, whole, seconds):
    folder = Path(tempfile.mkdtemp(prefix="turn-", dir=world.parent))
    shutil.rmtree(folder)
    shutil.copytree(world, folder)
    kills = []
    try:
        for _ in range(3):
            moment = rng.choice(MOMENTS)
            done, killed = strike(machine, command, folder, moment, rng, seconds)
            if not killed:
                break
            kills.append(moment)
        if kills and done.code != 0:
            done = machine.run(command, folder, patch="parity")
        wrong = compare(folder, whole, name) if done.code == 0 else (done.err or str(done.code))
        return kills, wrong
    finally:
        shutil.rmtree(folder)


def main(args):
    record = {"command": "python tests/slow/kills.py", "kills": 0, "turns": []}
    if RECORD.is_file() and not args.afresh:
        record = json.loads(RECORD.read_text())
    machine, top = Machine(), Path(tempfile.mkdtemp(prefix="kills-"))
    try:
        world = make_world(machine, top / "world")
        made, whole, seconds = commands(world), {}, {}
        while record["kills"] < args.kills:
            n = len(record["turns"])
            name, rng = SCRIPTS[n % len(SCRIPTS)], random.Random(f"{args.seed} {n}")
            if name not in whole:
                whole[name] = shutil.copytree(world, top / stem(name))
                begun = time.monotonic()
                done = machine.run(made[name], whole[name], patch="parity")
                assert done.code == 0, done.err
                seconds[name] = time.monotonic() - begun
            kills, wrong = turn(machine, world, made[name], stem(name), rng, whole[name],
                                seconds[name])
            record["kills"] += len(kills)
            record["turns"].append({"script": name, "kills": kills, "wrong": wrong})
            print(f"{record['kills']:>4} kills  {name:<14} {' '.join(kills) or '-'}"
                  + f"  {wrong or 'bit-equal'}", flush=True)
            new = RECORD.with_suffix(".new")
            new.write_text(json.dumps(record) + "\n")
            new.replace(RECORD)
    finally:
        machine.close()
        shutil.rmtree(top, ignore_errors=True)
    wrong = [t for t in record["turns"] if t["wrong"]]
    print(f"{record['kills']} kills in {len(record['turns'])} runs of {len(SCRIPTS)} scripts: "
          f"{len(wrong)} not bit-equal")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="how many in all (100)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    parser.add_argument("--afresh", action="store_true", help="forget the record")
    main(parser.parse_args())
