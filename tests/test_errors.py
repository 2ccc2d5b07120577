"""What goes wrong is said in one line that names the place and what to do; exit code 2."""
import json
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import frame
from conftest import LOSS, PAIRS, ROLLOUTS, ROOT, SCRIPTS, TRAIN, kernel, run, stem, write_rows

JSONL = [name for name in SCRIPTS if TRAIN[name].endswith(".jsonl")]


@pytest.fixture
def own(make, data, tmp_path):
    """own("01_sft") -> stage, cfg, the path of its training file, in a copy of the data."""
    def own(name, **changes):
        for path in data.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        return *make(name, data=tmp_path, **changes), tmp_path / TRAIN[name]
    return own


def edit(path, line, change):
    """Replace the 1-based `line` by change(its object), text or object."""
    lines = path.read_text().splitlines()
    new = change(json.loads(lines[line - 1]))
    lines[line - 1] = new if isinstance(new, str) else json.dumps(new)
    path.write_text("\n".join(lines) + "\n")


# ---------------------------------------------------------------------------- checkpoints

@pytest.mark.parametrize("name", SCRIPTS[1:])
def test_missing_checkpoint(name, make, tmp_path, refuses):
    """The command that makes it is named."""
    stage, cfg = make(name, start=tmp_path / "nowhere")
    made_by = Path(cfg.init).stem
    refuses(lambda: run(stage, cfg), cfg.init, f"run python {made_by}.py first")


@pytest.mark.parametrize("name, script", [("04_rlvr", "04_rlvr.py"), ("dapo", "RL/dapo.py"),
                                          ("kto", "DPO/kto.py")])
def test_missing_checkpoint_of_a_script(name, script, tmp_path, refuses):
    """A sibling's script is named with its folder; it is the name that counts, wherever it lies."""
    path = tmp_path / f"{name}.pt"
    refuses(lambda: kernel.load(path), f"{path} is missing: run python {script} first")


@pytest.mark.parametrize("name", ["nope", "model", "chat", "00_nope"])
def test_missing_checkpoint_of_no_script(name, chain, tmp_path, refuses):
    """No command is invented; what lies beside it may be what was meant."""
    assert refuses(lambda: kernel.load(tmp_path / f"{name}.pt")).endswith(f"{name}.pt is missing\n")
    refuses(lambda: kernel.load(tmp_path / f"nowhere/{name}.pt"), f"{name}.pt is missing\n")
    for file in ("02_cot.pt", "06_reward.pt", "03_dpo.state.pt", "02_cot.jsonl"):
        (tmp_path / file).write_bytes(b"")
    refuses(lambda: kernel.load(tmp_path / f"{name}.pt"),
            f"{name}.pt is missing; beside it are 02_cot.pt, 06_reward.pt\n")


def test_reward_model(make, tmp_path, chain, refuses):
    """PPO asks for 06's checkpoint by name, and does not take a policy for one."""
    stage, cfg = make("05_ppo")
    cfg.reward = str(tmp_path / "06_reward.pt")
    refuses(lambda: run(stage, cfg), "06_reward.pt is missing: run python 06_reward.py first")
    cfg.reward = str(chain / "01_sft.pt")
    refuses(lambda: run(stage, cfg), "01_sft.pt", "06_reward.py")


@pytest.mark.parametrize("content", ["half", "empty", "text", "list"])
def test_broken_checkpoint(content, make, chain, tmp_path, refuses):
    path, whole = tmp_path / "00_pretrain.pt", (chain / "00_pretrain.pt").read_bytes()
    if content == "list":
        torch.save([1, 2], path)
    else:
        half = whole[: len(whole) // 2]
        path.write_bytes({"half": half, "empty": b"", "text": b"hello\n" * 9}[content])
    stage, cfg = make("01_sft", start=tmp_path)
    said = refuses(lambda: run(stage, cfg), path, {"half": "is truncated: its end is missing"}.get(
        content, "is no checkpoint of this project"))
    assert ("delete it" in said) == ("truncated" in said) == (content == "half")


def test_another_architecture(make, chain, tmp_path, refuses):
    """A key too few, and nothing is trained from half of a model."""
    parts = torch.load(chain / "00_pretrain.pt", weights_only=True)
    del parts["model"]["blocks.1.attention.q.weight"]
    torch.save(parts, tmp_path / "00_pretrain.pt")
    stage, cfg = make("01_sft", start=tmp_path)
    refuses(lambda: run(stage, cfg), "00_pretrain.pt does not fit", "blocks.1.attention.q.weight")
    assert not (tmp_path / "out/01_sft.pt").exists()


def test_broken_state(make, tmp_path, refuses):
    stage, cfg = make("01_sft")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/01_sft.state.pt").write_bytes(b"PK\x03\x04 half of a file")
    refuses(lambda: run(stage, cfg), "01_sft.state.pt", "delete it")


# ---------------------------------------------------------------------------- data

@pytest.mark.parametrize("name", SCRIPTS)
def test_missing_data(name, make, tmp_path, refuses):
    stage, cfg = make(name, data=tmp_path / "toy")
    refuses(lambda: run(stage, cfg), tmp_path / "toy", "is missing: run python data/toy.py first")


@pytest.mark.parametrize("name", JSONL)
def test_malformed_json(name, own, refuses):
    stage, cfg, path = own(name)
    edit(path, 3, lambda row: json.dumps(row)[:-5])
    refuses(lambda: run(stage, cfg), f"{path}, line 3: not JSON")


@pytest.mark.parametrize("name", JSONL)
def test_row_without_a_key(name, own, refuses):
    """Each key in turn, missing or empty."""
    stage, cfg, path = own(name)
    keys = json.loads(path.read_text().splitlines()[0])
    for line, key in enumerate(keys, 2):
        edit(path, line, lambda row: {k: v for k, v in row.items() if k != key})
        refuses(lambda: run(stage, cfg), f"{path}, line {line}: no ", key)
        edit(path, line, lambda row: dict(row, **{key: ""}))
        refuses(lambda: run(stage, cfg), f"{path}, line {line}: no ", key)
        stage, cfg, path = own(name)


@pytest.mark.parametrize("bad", ["[1]", "5", "null", '"text"'])
def test_row_that_is_no_object(bad, own, refuses):
    stage, cfg, path = own("01_sft")
    edit(path, 2, lambda row: bad)
    refuses(lambda: run(stage, cfg), f"{path}, line 2: ")


@pytest.mark.parametrize("bad", [
    {"prompt": 5, "completion": "x"}, {"prompt": "x", "completion": 5}, {"messages": "hello"},
    {"messages": [{"role": "robot", "content": "x"}]}, {"messages": [{"role": "user"}]},
    {"messages": [1]},
    {"messages": [{"role": "user", "content": None}]},
    {"messages": {"role": "user", "content": "x"}},
    {"prompt": "é", "completion": "x"},
    {"messages": [{"role": "user", "content": "only a question"}]},
    {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]}])
def test_row_of_the_wrong_form(bad, own, refuses):
    stage, cfg, path = own("01_sft")
    edit(path, 4, lambda row: bad)
    refuses(lambda: run(stage, cfg), f"{path}, line 4: ")


def test_answers_may_be_numbers(own):
    """{"answer": 0} is an answer."""
    stage, cfg, path = own("04_rlvr")
    edit(path, 1, lambda row: dict(row, answer=0))
    edit(path, 2, lambda row: dict(row, answer=12))
    answers = [a for _, a in stage.read(cfg, path.name, *stage.load(cfg.init)[1::-1])]
    assert answers[:2] == ["0", "12"]


@pytest.mark.parametrize("name", PAIRS)
def test_equal_pair(name, own, refuses):
    stage, cfg, path = own(name)
    edit(path, 5, lambda row: dict(row, rejected=row["chosen"]))
    refuses(lambda: run(stage, cfg), f"{path}, line 5: ", "same")


@pytest.mark.parametrize("name", JSONL)
def test_empty_file(name, own, refuses):
    stage, cfg, path = own(name)
    for content in ("", "\n\n"):
        path.write_text(content)
        refuses(lambda: run(stage, cfg), path, "has no rows")


@pytest.mark.parametrize("name", JSONL)
def test_long_rows(name, own, capsys, refuses):
    """Dropped whole and counted; if none is left, that is an error."""
    stage, cfg, path = own(name, steps=1)
    for line in (2, 7):
        edit(path, line, lambda row: dict(row, prompt="1+" * 40))
    run(stage, cfg)
    assert f"{path}: 2 of 24 rows are longer" in capsys.readouterr().out
    write_rows(path, [json.loads(line) | {"prompt": "1+" * 40} for line in path.open()])
    refuses(lambda: run(stage, cfg), path, "no row fits")


def test_tokens(own, refuses, tmp_path):
    """A .bin that is empty, too short, of another tokenizer; a broken tokenizer.json."""
    stage, cfg, _ = own("00_pretrain")
    for ids, part in (([], "train.bin has 0 bytes"), ([1], "train.bin has 2 bytes"),
                      ([1] * cfg.window, "--window"),
                      ([1] * 98 + [9999], "train.bin: id 9999, and the tokenizer")):
        np.asarray(ids, np.uint16).tofile(tmp_path / "train.bin")
        refuses(lambda: run(stage, cfg), part)
    for content, part in (("{", "not JSON"), ('{"kind": "words"}', "words")):
        (tmp_path / "tokenizer.json").write_text(content)
        refuses(lambda: run(stage, cfg), part)


# ---------------------------------------------------------------------------- flags

def test_unknown_flag():
    out = subprocess.run([sys.executable, str(ROOT / "01_sft.py"), "--learning_rate", "1"],
                         capture_output=True, text=True)
    assert out.returncode == 2 and "unrecognized arguments: --learning_rate" in out.stderr
    assert "Traceback" not in out.stderr


@pytest.mark.parametrize("changes, part", [
    (dict(n_head=3), "n_head=3 does not divide n_embd=32"),
    (dict(n_layer=0), "--n_layer must lie in [1, 1000], not 0"),
    (dict(position="absolute"), "absolute"), (dict(window=65), "--window 65"),
    (dict(n_embd=6, n_head=2), "even")])
def test_impossible_model(changes, part, make, refuses):
    stage, cfg = make("00_pretrain", **dict(position="rope") | changes)
    refuses(lambda: run(stage, cfg), part)


@pytest.mark.parametrize("field, value", [
    ("steps", 0), ("batch_size", 0), ("micro_batch", 0), ("lr", -1.0), ("save_every", 0),
    ("eval_every", 0), ("seed", -1)])
def test_out_of_range(field, value, make, refuses):
    stage, cfg = make("01_sft", **{field: value})
    refuses(lambda: run(stage, cfg), f"--{field} must lie in [", f"not {value}")


@pytest.mark.parametrize("name", ROLLOUTS)
def test_out_of_range_in_rollouts(name, make, refuses):
    for field, value in (("group_size", 1), ("minibatches", 0), ("temperature", 0.0),
                         ("eval_rows", 0), ("epochs", 0), ("max_new", 0)):
        stage, cfg = make(name, **{field: value})
        if hasattr(cfg, field):
            refuses(lambda: run(stage, cfg), f"--{field} must lie in [", f"not {value}")


@pytest.mark.parametrize("name", SCRIPTS)
def test_batch_among_ranks(name, make, refuses, monkeypatch):
    """Ranks of unequal batches would wait for each other for ever."""
    stage, cfg = make(name, batch_size=8)
    monkeypatch.setattr(frame, "init_distributed", lambda device: (0, 3, "cpu"))
    refuses(lambda: run(stage, cfg), "--batch_size 8 is not divisible")


@pytest.mark.parametrize("name", ROLLOUTS)
def test_no_room_for_a_completion(name, make, refuses):
    stage, cfg = make(name, max_new=64)
    refuses(lambda: run(stage, cfg), "rl_train.jsonl", "no row fits")


# ---------------------------------------------------------------------------- while it runs

@pytest.mark.parametrize("name", SCRIPTS)
def test_nan(name, make, tmp_path, refuses, monkeypatch, overwrite):
    """A loss that is not a number stops the run; what was finished before is left as it is."""
    run(*make(name, steps=1))
    before = (tmp_path / f"out/{stem(name)}.pt").read_bytes()
    stage, cfg = make(name, steps=3, save_every=1)
    loss = getattr(stage, LOSS[name])

    def poisoned(*args):
        total, *rest = loss(*args)
        return total * float("nan"), *rest

    monkeypatch.setattr(stage, LOSS[name], poisoned)
    refuses(lambda: run(stage, cfg), "step 1: loss nan", "nothing was saved", "Lower --lr")
    assert (tmp_path / f"out/{stem(name)}.pt").read_bytes() == before
    assert not (tmp_path / f"out/{stem(name)}.state.pt").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", SCRIPTS[1:])
def test_weights_that_are_no_numbers(name, value, make, chain, tmp_path, refuses):
    """What a run starts from is looked at before anything is trained from it."""
    for path in chain.glob("0*.pt"):
        parts = torch.load(path, weights_only=True)
        if path.stem != "06_reward":
            parts["model"]["blocks.0.mlp.proj.weight"][3, 5] = value
        torch.save(parts, tmp_path / path.name)
    stage, cfg = make(name, start=tmp_path)
    refuses(lambda: run(stage, cfg), f"{cfg.init}: blocks.0.mlp.proj.weight holds NaN or infinity")


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("name", SCRIPTS)
def test_weights_that_became_no_numbers(name, steps, make, tmp_path, refuses, monkeypatch,
                                        overwrite):
    """A finite loss, and an update that overflows: neither the checkpoint nor the state is kept."""
    run(*make(name, steps=1))
    before = (tmp_path / f"out/{stem(name)}.pt").read_bytes()
    stage, cfg = make(name, steps=steps, save_every=1, lr=1e-5)
    update = stage.update

    def overflows(cfg, step, ddp, optimizers, *rest):
        metrics = update(cfg, step, ddp, optimizers, *rest)
        with torch.no_grad():
            optimizers[0].param_groups[1]["params"][0][0] = float("inf")
        return metrics

    monkeypatch.setattr(stage, "update", overflows)
    if getattr(cfg, "minibatches", 1) > 1:             # of which the next would have the NaN
        cfg = replace(cfg, minibatches=1)
    cfg = replace(cfg, eval_every=10 ** 6)
    monkeypatch.setattr(stage, "evaluate", lambda *args: {})
    refuses(lambda: run(stage, cfg), "step 1: ", "is not finite", "nothing was saved")
    assert (tmp_path / f"out/{stem(name)}.pt").read_bytes() == before
    assert not (tmp_path / f"out/{stem(name)}.state.pt").exists()


def test_nan_later(make, tmp_path, refuses, monkeypatch):
    """In the middle of a run the state of the last save stays, and no weight has moved since."""
    stage, cfg = make("01_sft", steps=6, save_every=1)
    loss, calls = stage.sft_loss, []

    def poisoned(*args):
        calls.append(1)
        total, count, metrics = loss(*args)
        return total * (float("inf") if len(calls) == 5 else 1), count, metrics     # step 3

    monkeypatch.setattr(stage, "sft_loss", poisoned)
    refuses(lambda: run(stage, cfg), "step 3: loss inf")
    assert torch.load(tmp_path / "out/01_sft.state.pt", weights_only=True)["step"] == 2


def test_disk_full(make, tmp_path, refuses, overwrite):
    """A real limit of the system, at a save in the middle: one line, and the old file is whole."""
    run(*make("01_sft", steps=1))
    before = (tmp_path / "out/01_sft.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    stage, cfg = make("01_sft", steps=4, save_every=1)

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        try:
            run(stage, cfg)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    refuses(full, "cannot write", "01_sft.state.pt", "intact")
    assert (tmp_path / "out/01_sft.pt").read_bytes() == before
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["01_sft.jsonl", "01_sft.pt"]


def test_second_ctrl_c():
    """The first is a wish, the second is not, unless it comes at once: torchrun passes one on."""
    kernel.interrupt()
    kernel.interrupt()
    assert kernel.interrupted()
    kernel.interrupt.seen -= 2                       # two seconds later
    with pytest.raises(SystemExit) as e:
        kernel.interrupt()
    assert e.value.code == 130


def test_full_disk_while_logging(make, tmp_path, refuses, overwrite):
    """The log is the first that a full disk hits: one line, no traceback, the checkpoint whole."""
    run(*make("01_sft", steps=1))
    before = (tmp_path / "out/01_sft.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    stage, cfg = make("01_sft", steps=100, save_every=100)

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (700, hard))
        try:
            run(stage, cfg)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    refuses(full, "cannot write", "01_sft.jsonl", "intact")
    assert (tmp_path / "out/01_sft.pt").read_bytes() == before


@pytest.mark.parametrize("env, said", [
    (dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1"), ""),
    (dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="0"), "error: x\n"),        # the second machine
    (dict(RANK="1"), "error: x\n")])                                 # one process, by accident 1
def test_one_line_a_machine(env, said, monkeypatch, capsys):
    """One line on the screen of each machine, not one a rank; but every rank leaves."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as e:
        kernel.fail("x")
    assert e.value.code == 2 and capsys.readouterr() == ("", said)
