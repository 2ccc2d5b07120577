"""What the tests share: the stages as modules, a tiny world of data, a chain of checkpoints."""
import importlib
import importlib.util
import json
import os
import random
import re
import signal
import sys
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
torch.set_num_threads(1)               # small tensors; and bits that do not depend on the machine

import model as kernel  # noqa: E402

# In the order in which each finds its inputs made; a stage that is not there yet is left out.
STAGES = [name for name in ("00_pretrain", "01_sft", "02_cot", "03_dpo", "04_rlvr", "06_reward",
                            "05_ppo") if (ROOT / f"{name}.py").exists()]
SIBLINGS = sorted(f"{path.parent.name}/{path.stem}" for folder in ("RL", "DPO")
                  for path in (ROOT / folder).glob("*.py") if not path.is_symlink())
SCRIPTS = STAGES + SIBLINGS
TEXT = {name: (ROOT / f"{name}.py").read_text() for name in SCRIPTS}
TRAIN = {name: re.search(r'^    train: str = "([^"]*)"', TEXT[name], re.MULTILINE)[1]
         for name in SCRIPTS}
ROLLOUTS = [name for name in SCRIPTS if TRAIN[name].startswith("rl_")]
PAIRS = [name for name in SCRIPTS if TRAIN[name].startswith("pairs_")]
LOSS = {"00_pretrain": "pretrain_loss", "01_sft": "sft_loss", "02_cot": "sft_loss",
        "03_dpo": "dpo_loss", "04_rlvr": "grpo_loss", "05_ppo": "ppo_loss",
        "06_reward": "reward_loss"} | {name: f"{Path(name).stem}_loss" for name in SIBLINGS}
CHARS = "".join(sorted("abcdefghijklmnopqrstuvwxyz0123456789 \n+-*/=()?.,$<>|"))
TINY = dict(n_layer=2, n_head=2, n_embd=32, block_size=64, window=24, steps=2, batch_size=8,
            micro_batch=4, group_size=4, minibatches=2, epochs=1, max_new=12, overlong=4,
            eval_rows=4, eval_every=1000, save_every=1000, warmup=1, device="cpu")


# Tests that --device cuda runs there, in fp32 and float64; all others are of the host, or of ranks.
ON_DEVICE = "test_kernel.py", "test_losses.py", "test_float32.py", "test_stages.py"
DEVICE = "cpu"


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=["cpu", "cuda"], help=(
        f"where {', '.join(ON_DEVICE)} run; with cuda nothing else does"))


def pytest_configure(config):
    global DEVICE
    DEVICE = TINY["device"] = config.getoption("--device")
    if DEVICE == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no GPU")


def pytest_collection_modifyitems(items):
    for item in items:
        if DEVICE != "cpu" and item.path.name not in ON_DEVICE:
            item.add_marker(pytest.mark.skip(reason=f"not on {DEVICE}"))


def stem(name):
    """What its outputs are called: RL/rloo writes rloo.pt."""
    return Path(name).stem


def outputs(name):
    """The files of a finished run, and nothing else is left over."""
    return [f"{stem(name)}{end}" for end in
            (".jsonl", ".pt", *[".samples.jsonl"] * (name in ROLLOUTS))]


def against(name):
    """From which script the docstring says that this one was made -> its name, what differs."""
    doc = " ".join(TEXT[name].split('"""')[1].split())
    found = re.search(r"Against ([\w/]+)\.py:.*?the sections? that differs?: ([a-z, ]+)\.", doc)
    assert found, doc
    beside = f"{name.rpartition('/')[0]}/{found[1]}"
    return (beside if beside in SCRIPTS else found[1]), found[2].replace(" and ", ", ").split(", ")


def load_stage(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def config(stage, data, out, start, **changes):
    """The stage's own Config at a tiny size; checkpoints that it starts from lie in `start`."""
    values = {}
    for f in fields(stage.Config):
        if isinstance(f.default, str) and f.default.endswith(".pt"):
            values[f.name] = f"{start}/{Path(f.default).name}"
        elif f.name in TINY:
            values[f.name] = TINY[f.name]
    values |= dict(data=str(data), out=str(out))
    known = {f.name for f in fields(stage.Config)}
    return stage.Config(**values | {k: v for k, v in changes.items() if k in known})


def flags(cfg):
    return [part for f in fields(cfg) for part in (f"--{f.name}", str(getattr(cfg, f.name)))]


def parity(text, answer):
    """Stands in for the verifier where tiny models answer nothing right: rewards that vary."""
    return float(sum(map(ord, text)) % 2)


def run(stage, cfg):
    """main(cfg) as a fresh process would run it, but judged by parity (unless the test has put a
    verifier of its own there)."""
    kernel.file_hashes.clear()
    handler, judge = signal.getsignal(signal.SIGINT), getattr(stage, "verify", None)
    if judge is kernel.verify:
        stage.verify = parity
    try:
        stage.main(cfg)
    finally:
        signal.signal(signal.SIGINT, handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        unlock()
        if judge is kernel.verify:
            stage.verify = judge


def unlock():
    """As the end of a process would."""
    for lock in kernel.claim.held:
        lock.close()
        kernel.release(lock.name)
    kernel.claim.held.clear()


def weights(path, part=None):
    """A checkpoint's modules as one flat vector, in the dtype in which they were saved."""
    parts = torch.load(path, weights_only=True)
    names = [part] if part else sorted(k for k, v in parts.items() if isinstance(v, dict) and v
                                       and all(torch.is_tensor(t) for t in v.values()))
    assert "model" in names
    return torch.cat([t.flatten() for name in names for t in parts[name].values()])


def steps_of(path):
    """The log without its first line, which is the run, and without what a clock says."""
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    assert list(lines[0])[:2] == ["stage", "config"]
    return [{k: v for k, v in line.items() if k not in ("tok_s", "mfu")} for line in lines[1:]]


def write_rows(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(autouse=True)
def clean():
    """Nothing that a stage leaves in the process reaches the next test."""
    handler = signal.getsignal(signal.SIGINT)
    kernel.file_hashes.clear()
    kernel.interrupt.seen = False
    yield
    signal.signal(signal.SIGINT, handler)
    torch.set_default_dtype(torch.float32)
    kernel.SWITCHES.update(dict.fromkeys(kernel.SWITCHES, 0))
    unlock()


@pytest.fixture(autouse=True)
def on_cuda(monkeypatch):
    """Products in fp32, as the tests expect them, and not in bf16."""
    if DEVICE == "cuda":
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)


@pytest.fixture
def on_device():
    """What the test builds without naming a device is on --device."""
    if DEVICE != "cpu":
        torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)


@pytest.fixture
def double():
    """Everything built in the test is float64, where two exact ways agree to 1e-12."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def stages():
    return {name: load_stage(name) for name in SCRIPTS}


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder like out/data/toy, of sums so small that a test runs in a moment; ragged lengths."""
    out, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    tokenizer = kernel.Tokenizer({"kind": "chars", "chars": CHARS})
    (out / "tokenizer.json").write_text(json.dumps(tokenizer.spec))

    def problem():
        a, b, c = (rng.randint(1, 30) for _ in "abc")
        terms = [a, b] + [c] * rng.randint(0, 1)
        return "+".join(map(str, terms)) + "=?", terms

    def trace(terms, off=0):
        said = f"{terms[0]}+{terms[1]}={terms[0] + terms[1]}"
        return f"<think>{said}</think><answer>{sum(terms) + off}</answer>"

    for split, n in (("train", 24), ("val", 9)):
        text = [tokenizer.encode(f"{q[:-1]}{sum(t)}") + [tokenizer.end]
                for q, t in (problem() for _ in range(12 * n))]
        np.asarray(sum(text, []), np.uint16).tofile(out / f"{split}.bin")
        made = [problem() for _ in range(n)]
        write_rows(out / f"sft_{split}.jsonl", [
            {"prompt": q, "completion": f"<answer>{sum(t)}</answer>"} for q, t in made])
        write_rows(out / f"cot_{split}.jsonl", [
            {"prompt": q, "completion": trace(t)} for q, t in made])
        write_rows(out / f"pairs_{split}.jsonl", [
            {"prompt": q, "chosen": trace(t), "rejected": trace(t, 100)} for q, t in made])
        write_rows(out / f"rl_{split}.jsonl", [
            {"prompt": q, "answer": str(sum(t))} for q, t in made])
    return out


DOCUMENTS = [f"Document {i} has a café, {'some more words, ' * (i % 7)}\n\nand an end."
             for i in range(200)]


@pytest.fixture(scope="session")
def bpe(tmp_path_factory):
    """A small tokenizer.json: byte-level BPE, as GPT-2's."""
    import tokenizers
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(DOCUMENTS, tokenizers.trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, show_progress=False))
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    tok.save(str(path))
    return str(path)


@contextmanager
def preparers():
    """with preparers() as script: script("alpaca") is data/alpaca.py as a module."""
    sys.path.insert(0, str(ROOT / "data"))
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(ROOT / "data"))
        for path in (ROOT / "data").glob("*.py"):
            if not path.is_symlink():
                sys.modules.pop(path.stem, None)


@pytest.fixture
def script():
    with preparers() as script:
        yield script


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """{name: file} of what the sources of the recipes publish, in their own formats: 60 rows each,
    whose texts are 1 to 30 words long."""
    out, rng = tmp_path_factory.mktemp("sources"), random.Random(1)
    words = " ".join(DOCUMENTS[:7]).split()
    say = lambda n=30: " ".join(rng.choices(words, k=rng.randint(1, n)))
    user = lambda text: {"role": "user", "content": text}
    reply = lambda text: {"role": "assistant", "content": text}

    def talk(i, turns):
        before = "".join(f"\n\nHuman: {say(8)}\n\nAssistant: {say(8)}" for _ in range(turns))
        return f"\n\nHuman: {i} {say()}{before}\n\nAssistant: "

    def gsm8k(i):
        lines = [f"{say(6)} {i}+{k} = <<{i}+{k}={i + k}>>{i + k}" for k in range(1 + i % 4)]
        return {"question": f"{i} {say()}?", "answer": "\n".join(lines) + f"\n#### {i + i % 4}"}

    def feedback(i):
        ask = f"{i} {say()}"
        return {"prompt": ask, "chosen": [user(ask), reply("A " + say())], "score_chosen": 8.0,
                "rejected": [user(ask), reply("B " + say())], "score_rejected": 7.0}

    hh = [(talk(i, i % 3), say(), say()) for i in range(60)]
    made = {
        "text": [{"text": f"{i} {say()}"} for i in range(600)],
        "alpaca": [{"instruction": f"{i} {say()}", "input": say(9) * (i % 2), "output": say()}
                   for i in range(60)],
        "dolly": [{"instruction": f"{i}: {say()}", "context": say(9) * (i % 2), "response": say(),
                   "category": "qa"} for i in range(60)],
        "gsm8k": [gsm8k(i) for i in range(60)], "gsm8k_test": [gsm8k(i) for i in range(90, 99)],
        "hh": [{"chosen": p + f"A {a}", "rejected": p + f"B {b}"} for p, a, b in hh],
        "ultrafeedback": [feedback(i) for i in range(100, 160)]}
    for name, rows in made.items():
        write_rows(out / f"{name}.jsonl", rows)
    return {name: str(out / f"{name}.jsonl") for name in made}


@pytest.fixture(scope="session")
def chain(stages, data, tmp_path_factory):
    """A folder with the finished checkpoint of every script, two tiny steps each."""
    out = tmp_path_factory.mktemp("chain")
    for stage in stages.values():
        run(stage, config(stage, data, out, out))
    return out


@pytest.fixture
def make(stages, data, chain, tmp_path):
    """make("01_sft", steps=3) -> the stage and its Config, from the chain, into a new folder."""
    def make(name, **changes):
        stage = stages[name]
        return stage, config(stage, changes.pop("data", data), changes.pop("out", tmp_path / "out"),
                             changes.pop("start", chain), **changes)
    return make


@pytest.fixture
def gradients(monkeypatch):
    """A list that gets the flat gradient of every optimizer step, before clipping."""
    seen, clip = [], torch.nn.utils.clip_grad_norm_

    def record(params, *args, **kwargs):
        params = list(params)
        seen.append(torch.cat([p.grad.flatten() for p in params]))
        return clip(params, *args, **kwargs)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", record)
    return seen


@pytest.fixture
def overwrite(monkeypatch):
    """As by --overwrite 1, for this test."""
    monkeypatch.setitem(kernel.SWITCHES, "overwrite", 1)


@pytest.fixture
def refuses(capsys):
    """refuses(f, "part", ...): f leaves with exit code 2 and one line that has all the parts."""
    def refuses(f, *parts, code=2):
        capsys.readouterr()
        with pytest.raises(SystemExit) as e:
            f()
        err = capsys.readouterr().err
        assert e.value.code == code, err
        assert err.count("\n") == 1 and err.endswith("\n"), err
        assert code == 130 or err.startswith("error: "), err
        for part in parts:
            assert str(part) in err, (part, err)
        return err
    return refuses
