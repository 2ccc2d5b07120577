"""1 x 8 = 2 x 4 = 4 x 2: how many ranks share the rows of a step changes nothing; nor does FSDP2.

Real torchrun on the CPU, one launch a world size, float64, AdamW: the weights at the end agree to
rounding. (Muon orthogonalises in bfloat16, which magnifies rounding: there the gradients must.)
"""
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROLLOUTS, ROOT, SCRIPTS, config, preparers, run, stem, steps_of

WORLDS = (1, 2, 4)


@pytest.fixture(scope="session")
def real(stages, sources, bpe, tmp_path_factory):
    """Ragged rows of the recipes' sources, through their preparers and a BPE, and checkpoints of
    that tokenizer for the stages to start from."""
    out = tmp_path_factory.mktemp("real")
    names = ("alpaca", "dolly", "gsm8k", "hh", "ultrafeedback")
    with preparers() as script:
        for name in names:
            more = ["--tokenizer", bpe, "--test", sources["gsm8k_test"]] * (name == "gsm8k")
            script(name).main(["--train", sources[name], "--out", f"{out}/{name}", "--val_share",
                               "0.2", *more])
        script("mix").main([*(f"{out}/{name}" for name in names), "--out", str(out)])
        script("text").main([sources["text"], "--tokenizer", bpe, "--out", str(out), "--val_share",
                             "0.1", "--workers", "1"])
    for name in ("00_pretrain", "01_sft", "02_cot", "06_reward"):
        run(stages[name], config(stages[name], out, out, out, block_size=256))
    return out


@pytest.fixture(scope="session")
def worlds(data, chain, real, tmp_path_factory, request):
    """What the selected tests look at, and no more: -k 03_dpo launches one script."""
    out = tmp_path_factory.mktemp("ranks")
    asked = [item.callspec.params for item in request.session.items
             if "worlds" in item.fixturenames]
    names = [name for name in SCRIPTS if name in {a["name"] for a in asked}]
    launch = {n: subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}",
         ROOT / "tests/rank_worker.py", data, chain, real, out, *names],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for n in WORLDS if n == 1 or n in {a["world"] for a in asked}}
    try:
        said = {n: process.communicate(timeout=600)[0] for n, process in launch.items()}
    finally:
        for process in launch.values():
            process.kill()
    for n, process in launch.items():
        assert process.returncode == 0, "\n".join(
            line for line in said[n].splitlines() if " left  " not in line)[:8000]
    return {n: torch.load(out / f"{n}.pt", weights_only=True) for n in launch}, out


def close(a, b):
    assert a.dtype == b.dtype == torch.float64 and len(a) == len(b) and a.norm() > 0
    assert (a - b).norm() <= 1e-9 * a.norm(), ((a - b).norm() / a.norm()).item()


@pytest.mark.parametrize("world", WORLDS[1:])
@pytest.mark.parametrize("name", SCRIPTS)
def test_weights(worlds, name, world):
    close(worlds[0][1][name]["weights"], worlds[0][world][name]["weights"])


@pytest.mark.parametrize("world", WORLDS[1:])
@pytest.mark.parametrize("name", SCRIPTS)
def test_first_gradient(worlds, name, world):
    for key in ("gradient", "muon_gradient", "real_gradient"):
        if key in worlds[0][1][name]:
            close(worlds[0][1][name][key], worlds[0][world][name][key])


@pytest.mark.parametrize("world", WORLDS[1:])
@pytest.mark.parametrize("name", ROLLOUTS)
def test_rollouts(worlds, name, world):
    """Row by row the same prompts and the same tokens, to the last step."""
    one, many = (worlds[0][n][name]["rollouts"] for n in (1, world))
    assert len(one) >= 6 * 8 and one == many


@pytest.mark.parametrize("world", WORLDS[1:])
@pytest.mark.parametrize("name", SCRIPTS)
def test_logs(worlds, name, world):
    """One line a step from rank 0 alone, with sums over all ranks; also the evaluations."""
    one, many = (steps_of(worlds[1] / f"{n}/{stem(name)}.jsonl") for n in (1, world))
    assert [line["step"] for line in many] == list(range(1, 1 + len(one)))
    for a, b in zip(one, many):
        assert a == pytest.approx(b, rel=1e-7, abs=1e-9)
    assert json.dumps(one) and len(one[-1]) > len(one[0])


SHARDED = [name for name in SCRIPTS if name not in ROLLOUTS]


@pytest.mark.parametrize("world", [2])
@pytest.mark.parametrize("begins", [1, 0])
@pytest.mark.parametrize("name", SHARDED)
def test_fsdp(worlds, name, begins, world):
    """Half of a run under FSDP2, half under DDP, in either order, over a state file that either
    wrote; nine held-out rows, of which one rank would have three micro-batches and the other two.
    Each rank holds half of the optimizer's state while it is sharded, and all of it else."""
    two, out = worlds[0][world][name], worlds[1]
    close(two["sharded1"], two["sharded0"])
    held = two[f"held{begins}"]
    shards, all_of_it = held if begins else held[::-1]
    assert 0.5 * all_of_it <= shards < 0.6 * all_of_it
    one, other = (steps_of(out / f"sharded{s}/{stem(name)}.jsonl") for s in (1, 0))
    assert [line["step"] for line in one] == [1, 2, 3, 4]
    for a, b in zip(one, other):
        assert a == pytest.approx(b, rel=1e-7, abs=1e-9)
