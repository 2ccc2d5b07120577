"""The statistics of eval.py against brute force; eval, report and chat on random models."""
import argparse
import hashlib
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from conftest import load_stage, unlock  # noqa: E402

import chat  # noqa: E402
import eval as evaluation  # noqa: E402
import model as kernel  # noqa: E402
import figures  # noqa: E402
import report  # noqa: E402
from model import GPT, GPTConfig, Tokenizer, save  # noqa: E402

CHARS = "\n !*+,-./0123456789=?abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
FLAGS = dict(device="cpu", raw=False, max_new=4, temperature=0.0, top_p=1.0, seed=0, prompt=None)


def test_share_is_wilson():
    f = figures.share([1] * 8 + [0] * 2)
    assert f["mean"] == 0.8 and f["n"] == 10
    assert [f["low"], f["high"]] == pytest.approx([0.4902, 0.9433], abs=1e-3)
    assert figures.share([1] * 5)["high"] == 1 and figures.share([1] * 5)["low"] < 0.6
    assert figures.share([]) is None


def test_ratio_covers():
    """95 % of the intervals hold the truth, also when units have different sizes."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(400):
        counts = rng.integers(1, 9, 200)
        f = figures.ratio(rng.binomial(counts, 0.3), counts)
        held += f["low"] <= 0.3 <= f["high"]
    assert 0.92 < held / 400 < 0.98
    assert figures.ratio([1, 2, 3])["mean"] == 2 and figures.ratio([0.0], [0]) is None


def test_no_interval_has_no_width():
    """All equal, or one alone, says nothing of what another unit would be."""
    assert figures.ratio([3.0]) == {"mean": 3.0, "n": 1}
    assert figures.ratio([0.1] * 7) == {"mean": pytest.approx(0.1), "n": 7}
    assert figures.ratio([1, 2, 3], [2, 4, 6]) == {"mean": 0.5, "n": 3}
    for sums, counts, n in [([0.25] * 8, 1.0, 8), ([8, 8, 0], [8, 8, 0], 2), ([1.0], 1.0, 1)]:
        mean = sum(sums) / np.broadcast_to(counts, len(sums)).sum()
        f = figures.rate(sums, counts)
        assert f == figures.wilson(mean, n) and 0 <= f["low"] < f["high"] <= 1 and f["n"] == n
    f = figures.rate([1.0] * 30 + [0.5])
    assert f["mean"] == 30.5 / 31 and f["low"] < f["mean"] < f["high"] == 1
    assert figures.ratio([1.0] * 30 + [0.5])["high"] > 1
    assert figures.rate([], 1.0) is None and figures.rate([0.0], [0]) is None


@pytest.mark.parametrize("name, figure, text", [
    ("free", figures.share([0] * 20), "0.0 (0.0..16.1)"),
    ("free", figures.share([1] * 10 + [0] * 10), "50.0 ±20.1"),
    ("beyond, range", figures.share([1] * 10 + [0] * 10), "50.0 ±20.1"),
    ("length", {"mean": 4.0, "n": 1}, "4.0"), ("chat", None, "-"),
    ("length", {"mean": 4.77, "n": 9, "low": 4.74, "high": 4.80}, "4.77 ±0.03"),
    ("margin, all", {"mean": 3.0, "n": 9, "low": 2.0, "high": 4.0}, "3.0 ±1.0"),
    ("KL/token", {"mean": 0.5, "n": 9, "low": 0.25, "high": 0.75}, "0.500 ±0.250"),
    ("perplexity", {"mean": 20.0, "n": 9, "low": 10.0, "high": 40.0}, "20.0 (10.0..40.0)"),
    ("perplexity", {"mean": 2e7, "n": 9, "low": 1e6, "high": 4e8}, "2e+07 (1e+06..4e+08)")])
def test_what_is_printed_of_an_interval(name, figure, text):
    assert report.cell(name, figure) == text


def test_pass_at_k_counts_subsets():
    for n, right, k in [(8, 3, 2), (8, 0, 8), (5, 5, 1), (6, 2, 4), (8, 1, 8)]:
        subsets = list(itertools.combinations([1] * right + [0] * (n - right), k))
        share = np.mean([any(s) for s in subsets])
        assert figures.pass_at_k(n, right, k) == pytest.approx(share)


def test_majority_and_careful():
    say = lambda answer: f"<think>1+1=2</think><answer>{answer}</answer><|end|>"
    assert figures.majority([say("7"), say("7.0"), say("8"), "junk", "junk", "junk"], "7") == 1
    assert figures.majority([say("8"), say("8"), say("7")], "7") == 0
    assert figures.majority(["junk"], "7") == 0
    assert figures.majority([say("7 cents"), say("7 dollars"), say("$7"), say("8")], "$7") == 1
    assert figures.majority([say("7 cents"), say("$7"), say("7 cents")], "$7") == 0
    assert figures.majority([say("b"), say("a"), say("b"), say("a")], "b") == 1    # the first
    assert figures.majority([say("five")], ["6", "five"]) == 1
    assert figures.majority([say("5")], 5) == 1
    trace = "<think>1+5=6\n6*2=12</think><answer>12</answer><|end|>"
    assert figures.careful(trace, 2) and not figures.careful(trace, 3)
    assert not figures.careful("<think>(1+5)*2=12</think><answer>12</answer><|end|>", 1)
    assert not figures.careful(trace.removesuffix("<|end|>"), 2)


def test_gram_bits_is_a_distribution_and_matches_by_hand():
    train, V = np.array([0, 1, 0, 2, 0, 1, 1, 2]), 4
    for head in itertools.product(range(V), repeat=2):
        p = [2 ** -figures.gram_bits(train, np.array([*head, c]), V, 3)[-1] for c in range(V)]
        assert sum(p) == pytest.approx(1) and min(p) > 0
    # p(1 | 0): unigram (3 + 3/4) / (8 + 3), then "0" is followed by 1, 2, 1
    unigram = (3 + 3 / 4) / 11
    assert figures.gram_bits(train, np.array([0, 1]), V, 2)[0] == pytest.approx(
        -math.log2((2 + 2 * unigram) / 5))


def test_bits_count_a_control_token_once(tmp_path):
    """Also where it lies among the other ids, as ChatML's <|im_end|>: 5 + 1 + 2 bytes follow the
    first token here, and each of the predicted tokens costs a bit."""
    import tokenizers
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    bpe.train_from_iterator(["a"], tokenizers.trainers.BpeTrainer(
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<|im_start|>", "<|im_end|>"]))
    tok = Tokenizer({"kind": "json", "json": json.loads(bpe.to_str()), "template": {
        "user": "<|im_start|>user\n", "user assistant": "<|im_end|>\n<|im_start|>assistant\n",
        "assistant user": "<|im_end|>\n<|im_start|>user\n"}})
    assert tok.end < tok.base
    ids = tok.encode("héllo") + [tok.end] + tok.encode("ab")
    np.array(ids, np.uint16).tofile(tmp_path / "val.bin")

    def model(x, y):
        return -math.log(2) * (y >= 0).double()

    model.cfg = argparse.Namespace(block_size=64)
    args = argparse.Namespace(data=tmp_path, window=64, val_tokens=99, rank=0, world=1,
                              device="cpu")
    figure = evaluation.bits(args, argparse.Namespace(model=model, tokenizer=tok, kind="02_cot"))
    assert figure["bits"]["mean"] == (len(ids) - 1) / (5 + 1 + 2)
    np.array(tok.encode("hello ") + [tok.end] + tok.encode("abc"), np.uint16).tofile(
        tmp_path / "train.bin")
    train, val = (np.frombuffer(text.encode(), np.uint8) for text in ("hello \0abc", "héllo\0ab"))
    for args.window in (64, 3):
        stage = argparse.Namespace(model=model, tokenizer=tok, kind="00_pretrain")
        figure = evaluation.bits(args, stage)
        assert figure["bits of 5-grams"]["mean"] == pytest.approx(
            figures.gram_bits(train, val, 256).sum() / 8)


def checkpoint(path, tokenizer, record, seed=0, **parts):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, block_size=128, n_layer=1, n_head=2,
                          n_embd=16, position="rope"))
    save(path, model=model.state_dict(), gpt=asdict(model.cfg), tokenizer=tokenizer.spec,
         record=record, **parts)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Random checkpoints 00, 02, 03 and 06, and a handful of rows of every file."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = Tokenizer({"kind": "chars", "chars": CHARS})
    out, data = folder / "out", folder / "data"
    data.mkdir()
    for name in ("00_pretrain", "02_cot"):
        checkpoint(out / f"{name}.pt", tokenizer, {"stage": name, "config": {}, "inputs": {}})
    start = str(out / "02_cot.pt")
    sha = hashlib.sha256(Path(start).read_bytes()).hexdigest()
    record = {"stage": "03_dpo", "config": {"init": start}, "inputs": {start: sha}}
    checkpoint(out / "03_dpo.pt", tokenizer, record)               # the same weights as its start
    record = record | {"stage": "06_reward"}
    head = torch.nn.Linear(16, 1).state_dict()
    checkpoint(out / "06_reward.pt", tokenizer, record, seed=1, head=head)

    def write(name, rows):
        (data / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("rl_test.jsonl", [{"prompt": f"Tom has {i}?", "answer": str(i), "steps": i % 5 + 1}
                            | ({"seen": True} if i % 5 == 0 else {}) for i in range(25)])
    write("rl_long.jsonl", [{"prompt": f"Tom had {i}?", "answer": str(i), "steps": i % 3 + 6,
                             "beyond": ["steps", "wording"][i % 2]} for i in range(24)])
    write("pairs_test.jsonl", [{"prompt": f"{i}?", "chosen": f"<answer>{i}</answer>",
                                "rejected": "<answer>0</answer>", "kind": "ab"[i % 2]}
                               for i in range(1, 9)])
    write("chat_test.jsonl", [{"prompt": "Spell fox.", "completion": "f-o-x", "kind": "spell"}])
    ids = np.random.default_rng(0).integers(0, 30, 1000).astype(np.uint16)
    for name in ("train.bin", "val.bin"):
        ids.tofile(data / name)
    return out, data


def eval_args(data, **more):
    return argparse.Namespace(**dict(
        data=str(data), out=str(data.parent / "judged"), device="cpu", seed=0, checkpoints=[],
        n_greedy=2, n_primed=1, n_second=4, n_beyond=3, n_pairs=9, n_sampled=5, samples=2,
        max_new=6, window=32, val_tokens=200) | more)


def ask_args(data, **more):
    return eval_args(data, rank=0, world=1, **more)             # as eval.begin leaves them


def test_eval_end_to_end_on_one_rank_and_on_two(world, capsys):
    out, data = world
    flags = dict(out=str(out), n_greedy=5, n_primed=100, n_second=8, n_beyond=4, n_pairs=3,
                 n_sampled=8, samples=4, max_new=12, window=128, val_tokens=10 ** 6)
    evaluation.main(eval_args(data, **flags))
    results = [json.loads((out / "results.json").read_text())["stages"]]
    assert "gain, question by question" in capsys.readouterr().out
    unlock()
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
         f"{ROOT}/eval.py", "--data", str(data), "--device", "cpu",
         *[x for k, v in flags.items() for x in (f"--{k}", str(v))]],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("gain, question by question") == 1
    results.append(json.loads((out / "results.json").read_text())["stages"])
    base, dpo, reward = (results[0][s] for s in ("00_pretrain", "03_dpo", "06_reward"))
    assert base["format"]["n"] == 25 and "pass@1" not in base
    assert base["bits"]["mean"] > 5 > base["bits of 5-grams"]["mean"]  # train.bin is val.bin
    assert dpo["free"]["n"] == 20 and dpo["free, steps 1"]["n"] == 5           # without seen facts
    assert abs(dpo["KL/token"]["mean"]) < 1e-5                     # equal to its start
    assert dpo["margin, all"]["mean"] == 0 and dpo["prefers, all"]["mean"] == 0
    assert reward["prefers, a"]["n"] == 3 and "free" not in reward          # --n_pairs
    assert dpo["second turn"]["n"] == 8 == dpo["second - first"]["n"]
    assert [dpo[f"beyond, {k}"]["n"] for k in ("steps", "wording")] == [6, 6]   # 2 of 6, 7, 8
    for stage, found in results[0].items():                      # sharding changes nothing
        for name, figure in found.items():
            for key in figure or {}:
                assert results[1][stage][name][key] == pytest.approx(figure[key], abs=1e-5)
    assert not list(out.glob("*.new"))
    report.main(argparse.Namespace(folder=str(out)))
    assert "gain, question by question" in capsys.readouterr().out
    assert (out / "accuracy_by_steps.png").stat().st_size > 1000


# What a record says, and in what file it lies.
@pytest.mark.parametrize("name, file", [
    ("ipo", "ipo"), ("kto", "sit"), ("simpo", "06_reward"), ("orpo", "00_pretrain"),
    ("03_dpo", "original"), ("03_dpo", "simpo")])
def test_siblings_of_dpo_are_scored_by_their_own_reward(world, tmp_path, name, file):
    out, data = world
    record = torch.load(out / "03_dpo.pt", weights_only=True)["record"] | {"stage": name}
    tokenizer = Tokenizer({"kind": "chars", "chars": CHARS})
    checkpoint(tmp_path / f"{file}.pt", tokenizer, record, seed=5)
    args = ask_args(data)
    stage = evaluation.open_stage(args, tmp_path / f"{file}.pt")
    assert "pairs" in [what for what, *_ in evaluation.plan(args, stage.kind)]
    margins = []
    for row in map(json.loads, (data / "pairs_test.jsonl").open()):
        rewards = []
        for side in (row["chosen"], row["rejected"]):
            ids, mask = tokenizer.chat([{"role": "user", "content": row["prompt"]},
                                        {"role": "assistant", "content": side}])
            now, start = (model(torch.tensor([ids])).log_softmax(-1)[0, :-1].gather(
                1, torch.tensor(ids[1:])[:, None])[torch.tensor(mask[1:]) == 1].double()
                for model in (stage.model, stage.init))
            p = now.mean().exp()
            rewards.append({"s": now.mean(), "o": (p / (1 - p)).log()}.get(
                name[0], now.sum() - start.sum()).item())
        margins.append(rewards[0] - rewards[1])
    figures = evaluation.preferences(args, stage)
    assert figures["margin, all"]["mean"] == pytest.approx(np.mean(margins), abs=1e-4)
    assert figures["prefers, all"]["mean"] == np.mean([m > 0 for m in margins])
    stage.init = None                      # the reference-free ones do not need it
    assert bool(evaluation.preferences(args, stage)) == (name[0] in "so")


def test_the_record_says_what_is_asked(world, tmp_path, capsys):
    """Under any name; without a stage (converted, or older) everything, and a line says so."""
    out, data = world
    args, asked = ask_args(data), {}
    for stage, file in [("00_pretrain", "dpo"), ("06_reward", "04_rlvr"), ("02_cot", "orpo")]:
        shutil.copy(out / f"{stage}.pt", tmp_path / f"{file}.pt")
        opened = evaluation.open_stage(args, tmp_path / f"{file}.pt")
        asked[stage] = [what for what, *_ in evaluation.plan(args, opened.kind)]
    assert asked == {"00_pretrain": ["bits", "free"], "06_reward": ["pairs"],
                     "02_cot": ["bits", "free", "answer", "think", "second", "sampled", "beyond",
                                "chat"]}
    assert "names no stage" not in capsys.readouterr().out
    whole = torch.load(out / "03_dpo.pt", weights_only=True)
    for record in ({}, {"stage": 7, "config": [], "inputs": 5}, whole["record"] | {"stage": ""}):
        save(tmp_path / "03_dpo.pt", **whole | {"record": record})
        opened = evaluation.open_stage(args, tmp_path / "03_dpo.pt")
        assert "its record names no stage" in capsys.readouterr().out
        assert len(evaluation.plan(args, opened.kind)) == 9
        assert bool(evaluation.preferences(args, opened)) == (record.get("stage") == "")
    whole = torch.load(out / "06_reward.pt", weights_only=True)
    save(tmp_path / "old.pt", **whole | {"record": {}})            # a head says what it is
    assert evaluation.open_stage(args, tmp_path / "old.pt").kind == "06_reward"


def test_a_reward_model_without_its_head(world, tmp_path, refuses):
    whole = torch.load(world[0] / "06_reward.pt", weights_only=True)
    for head in ({}, {"weight": torch.zeros(1, 9), "bias": torch.zeros(1)},
                 {"weight": torch.full((1, 16), math.nan), "bias": torch.zeros(1)}):
        save(tmp_path / "x.pt", **whole | {"head": head})
        refuses(lambda: evaluation.open_stage(ask_args(world[1]), tmp_path / "x.pt"), "x.pt")


def test_rows_with_and_without_steps(world, tmp_path):
    """Careful traces are counted where a row says how many steps there are."""
    rows = [{"prompt": f"{i} and {i}?", "answer": str(i), "steps": 2} for i in range(1, 5)]
    rows += [{"prompt": f"{i} or {i}?", "answer": i} for i in range(1, 4)]
    rows += [{"prompt": "5?", "answer": ["5", "five", 5], "steps": [1]}]    # no number of steps
    (tmp_path / "rl_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ask_args(tmp_path, n_sampled=8)
    stage = evaluation.open_stage(args, world[0] / "02_cot.pt")
    figures = evaluation.sampled(args, stage) | evaluation.greedy(args, stage, "free", 9)
    assert figures["pass@1"]["n"] == 8 == figures["free"]["n"] and figures["careful"]["n"] == 4
    assert [name for name in figures if "steps" in name] == ["free, steps 2"]
    for row in rows:
        row["seen"] = True
    (tmp_path / "rl_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluation.sampled(args, evaluation.open_stage(args, world[0] / "02_cot.pt")) == {}


class Scripted:
    """Stands for `generate`: answers what `say` makes of the whole prompt's text."""

    def __init__(self, tok, say):
        self.tok, self.say, self.prompts = tok, say, []

    def __call__(self, model, prompts, *_, **__):
        texts = list(map(self.tok.decode, prompts))
        self.prompts += texts
        said = [self.tok.encode_completion(self.say(text)) + [self.tok.end] for text in texts]
        return said, [[0.0] * len(s) for s in said]


def scripted(world, monkeypatch, say, **flags):
    args = ask_args(world[1], **flags)
    stage = evaluation.open_stage(args, world[0] / "02_cot.pt")
    model = Scripted(stage.tokenizer, say)
    monkeypatch.setattr(evaluation, "generate", model)
    return args, stage, model


def test_no_answer_is_computed_twice(world, monkeypatch):
    """What opens with <think> on its own is the answer with that primer; the rest is asked."""
    def say(text):
        n = int(text.split("Tom has ")[1].split("?")[0])
        opened = "" if text.endswith(("<think>", "<answer>")) else "<think>" * (n % 2)
        return f"{opened}1+1=2</think><answer>{n}</answer>"

    args, stage, model = scripted(world, monkeypatch, say)
    free = evaluation.greedy(args, stage, "free", 5)
    assert len(model.prompts) == 25 and free["free"]["mean"] == 0.5
    model.prompts.clear()
    think = evaluation.greedy(args, stage, "think", 5)
    assert len(model.prompts) == 13 and all(text.endswith("<think>") for text in model.prompts)
    assert think["think"]["mean"] == 1 and think["think"]["n"] == 20
    model.prompts.clear()
    assert evaluation.greedy(args, stage, "answer", 5)["answer"]["mean"] == 0
    assert len(model.prompts) == 25
    for i, ids in stage.said.items():      # one that was cut would have had one token more
        stage.said[i] = ids[:-1]
    model.prompts.clear()
    evaluation.greedy(args, stage, "think", 5)
    assert len(model.prompts) == 25


def test_second_turns(world, monkeypatch):
    """The prompt is the one that chat.py would have, and the gain is question by question."""
    def say(text):
        n = int(text.rsplit("Tom has ")[-1].split("?")[0])
        later = text.count("<|user|>") == 2
        return f"<answer>{n if n % 5 and (n > 10 or not later) else 99}</answer>"

    args, stage, model = scripted(world, monkeypatch, say, n_second=20)
    evaluation.greedy(args, stage, "free", 5)
    model.prompts.clear()
    figures = evaluation.second(args, stage)
    # of the 20 held-out questions the one in the middle would have followed itself
    assert figures["second turn"]["n"] == 19 and figures["second turn"]["mean"] == 11 / 19
    gain = figures["second - first"]
    assert figures["the same first"]["mean"] == 1 and gain["mean"] == pytest.approx(-8 / 19)
    assert gain["low"] < gain["mean"] < gain["high"] < 0
    talk = chat.Talk(str(world[0] / "02_cot.pt"), argparse.Namespace(**FLAGS | {"max_new": 50}))
    monkeypatch.setattr(chat, "generate", lambda *a, on_token, **k: evaluation.generate(*a, **k))
    for text in model.prompts[:]:
        one, two = (t.split("?")[0] + "?" for t in text.split("<|user|>")[1:])
        talk.forget()
        talk.answer(one)
        assert talk.tokenizer.decode(talk.prompt(two)) == text
        assert one != two
    stage.tokenizer.between = {"user": [0], "user assistant": [1]}    # a chat for one question
    assert evaluation.second(args, stage) == {}


def test_beyond_training(world, monkeypatch):
    def say(text):
        n = int(text.split("Tom had ")[1].split("?")[0])
        return f"<answer>{n if n % 2 else 99}</answer>"            # odd: wording

    args, stage, model = scripted(world, monkeypatch, say, n_beyond=9)
    figures = evaluation.beyond(args, stage)
    assert {k: (f["mean"], f["n"]) for k, f in figures.items()} == {
        "beyond, steps": (0, 9), "beyond, wording": (1, 9)}


@pytest.fixture
def bf16(monkeypatch):
    monkeypatch.setitem(kernel.SWITCHES, "bf16", 1)


def test_scores_are_not_rounded_to_bf16(world, bf16):
    """As in 06: the trunk is narrow, the head with its one row is not."""
    args = ask_args(world[1])
    stage = evaluation.open_stage(args, world[0] / "06_reward.pt")
    margins = []
    for row in map(json.loads, (world[1] / "pairs_test.jsonl").open()):
        with torch.no_grad(), kernel.autocast("cpu"):
            sides = [stage.tokenizer.answered(row["prompt"], row[k])[0]
                     for k in ("chosen", "rejected")]
            rows = [stage.model.forward_hidden(torch.tensor([ids]))[0, -1].float() for ids in sides]
        margins.append(float((rows[0] - rows[1]) @ stage.head.weight[0]))
    exact, whole = np.mean(margins), evaluation.preferences(args, stage)["margin, all"]["mean"]
    assert whole == pytest.approx(exact, abs=2e-4)
    rounded = np.mean([float(torch.tensor(m).bfloat16()) for m in margins])
    assert exact != 0 and max(map(abs, margins)) > 1e-2 and rounded != exact


def test_pairs_are_trimmed_as_the_template_does(world, tmp_path):
    spec = Tokenizer({"kind": "chars", "chars": CHARS}).spec | {"strip": 1}
    record = torch.load(world[0] / "03_dpo.pt", weights_only=True)["record"] | {"stage": "simpo"}
    checkpoint(tmp_path / "x.pt", Tokenizer(spec), record, seed=3)
    rows = [{"prompt": "1?", "chosen": f" {i}\n", "rejected": f"{i}"} for i in range(5)]
    (tmp_path / "pairs_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ask_args(tmp_path)
    figure = evaluation.preferences(args, evaluation.open_stage(args, tmp_path / "x.pt"))
    assert figure["margin, all"]["mean"] == pytest.approx(0, abs=1e-6)


def test_the_shoot_out_asks_the_same(world, tmp_path, monkeypatch):
    """bench/shootout.py judges by eval.py's parts, with the few flags that it has."""
    (tmp_path / "out/data").mkdir(parents=True)
    (tmp_path / "out/data/toy").symlink_to(world[1])
    monkeypatch.chdir(tmp_path)
    found = load_stage("bench/shootout").ask(str(world[0] / "03_dpo.pt"), 2, 8, 2, True)
    assert found["sampled think"]["n"] == 8 == found["sampled free"]["n"]
    assert found["greedy free"]["n"] == 8 and abs(found["KL"]["mean"]) < 1e-5
    assert found["pass@2"] and found["careful"] and found["prefers, all"]["n"] == 8


def test_a_completion_that_is_no_text(world, tmp_path, refuses):
    (tmp_path / "chat_test.jsonl").write_text('{"prompt": "a", "completion": ["b"]}\n')
    stage = evaluation.open_stage(ask_args(tmp_path), world[0] / "02_cot.pt")
    refuses(lambda: evaluation.chat(ask_args(tmp_path), stage),
            "line 1: completion: turn 1: its role is none")


def leaves(f, code):
    with pytest.raises(SystemExit) as e:
        f()
    assert e.value.code == code


def test_a_part_that_fails_costs_no_other(world, tmp_path, capsys, monkeypatch):
    """A row that the tokenizer cannot write, an error of ours, Ctrl-C: the rest is in the file."""
    for path in world[1].iterdir():
        shutil.copy(path, tmp_path)
    (tmp_path / "chat_test.jsonl").write_text('{"prompt": "é", "completion": "e"}\n')
    paths = [str(world[0] / f"{name}.pt") for name in ("02_cot", "03_dpo", "06_reward")]
    args = eval_args(tmp_path, checkpoints=paths, out=str(tmp_path / "out"))
    preferences = evaluation.preferences

    def broken(args, stage, n):
        return preferences(args, stage, n) if stage.kind == "06_reward" else {}["steps"]

    monkeypatch.setattr(evaluation, "preferences", broken)
    leaves(lambda: evaluation.main(args), 2)
    said = capsys.readouterr()
    assert "left out, for what was said above: 02_cot chat, 03_dpo pairs, 03_dpo chat" in said.err
    assert said.err.count("chat_test.jsonl, line 1: the character 'é'") == 2
    assert said.err.count("03_dpo, pairs: KeyError: 'steps'") == 1 and "Traceback" not in said.err
    whole = json.loads((tmp_path / "out/results.json").read_text())
    assert whole["failed"] == ["02_cot chat", "03_dpo pairs", "03_dpo chat"]
    for name, there in [("02_cot", ["bits", "free", "answer", "think", "pass@1"]),
                          ("03_dpo", ["bits", "free", "answer", "think", "KL"]),
                          ("06_reward", ["prefers, all"])]:
        assert all(whole["stages"][name][figure] for figure in there)
    assert whole["paired"]["03_dpo - 02_cot"]["think"]

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "sampled", stop)
    args = eval_args(tmp_path, checkpoints=paths, out=str(tmp_path / "again"))
    with pytest.raises(KeyboardInterrupt):
        evaluation.main(args)
    [stage] = json.loads((tmp_path / "again/results.json").read_text())["stages"].values()
    assert stage["bits"] and stage["think"] and "pass@1" not in stage


def test_figures_that_are_no_numbers_are_refused(world, tmp_path, capsys):
    whole = torch.load(world[0] / "02_cot.pt", weights_only=True)
    for weight in whole["model"].values():
        weight.fill_(1e38)
    save(tmp_path / "x.pt", **whole)
    args = eval_args(world[1], checkpoints=[str(tmp_path / "x.pt")], out=str(tmp_path))
    leaves(lambda: evaluation.main(args), 2)
    assert "bits is not finite: the model's numbers overflow" in capsys.readouterr().err
    assert "NaN" not in (tmp_path / "results.json").read_text()


@pytest.mark.parametrize("flag, values", [
    ("samples", (0, 10 ** 5)), ("n_sampled", (0, -1)), ("n_greedy", (0,)), ("n_second", (0,)),
    ("n_beyond", (0,)), ("n_pairs", (0,)),
    ("n_primed", (0,)), ("max_new", (0, 10 ** 8)), ("window", (0, -3)), ("val_tokens", (1,)),
    ("seed", (-1, 2 ** 32, 10 ** 23))])
def test_eval_refuses_numbers_that_cannot_be(world, tmp_path, refuses, flag, values):
    for value in values:
        args = eval_args(world[1], out=str(tmp_path / "out"), **{flag: value})
        refuses(lambda: evaluation.main(args), f"--{flag} must lie in", value)
    assert not (tmp_path / "out").exists()


def test_a_bad_out_is_found_before_any_work(world, tmp_path, refuses, monkeypatch):
    monkeypatch.setattr(evaluation, "open_stage", lambda *_: pytest.fail("it was too late"))
    (tmp_path / "file").write_text("")
    (tmp_path / "there/results.json").mkdir(parents=True)
    (tmp_path / "half/results.json.new").mkdir(parents=True)
    for out, why in [("", "--out is empty"), ("file", "cannot write"), ("file/x", "cannot write"),
                     ("there", "results.json (it is a folder)"), ("half", "results.json"),
                     ("x" * 300, "too long")]:
        args = eval_args(world[1], out=out and f"{tmp_path}/{out}",
                        checkpoints=[str(world[0] / "02_cot.pt")])
        refuses(lambda: evaluation.main(args), why)
    unlock()
    assert sorted(path.name for path in (tmp_path / "half").iterdir()) == ["results.json.new"]


def test_two_evaluations_do_not_share_a_folder(world, tmp_path, refuses):
    paths = [str(world[0] / "06_reward.pt")]
    evaluation.main(eval_args(world[1], out=str(tmp_path), checkpoints=paths))
    refuses(lambda: evaluation.main(eval_args(world[1], out=str(tmp_path), checkpoints=paths)),
            f"{tmp_path}/eval is being written by another run")


def test_bad_files_are_found_before_any_work(world, tmp_path, refuses, monkeypatch):
    monkeypatch.setattr(evaluation, "open_stage", lambda *_: pytest.fail("it was too late"))
    for path in world[1].iterdir():
        shutil.copy(path, tmp_path)
    with (tmp_path / "pairs_test.jsonl").open("a") as f:
        f.write('{"prompt": "1?", "chosen": "1"}\n')
    (tmp_path / "bad.pt").write_bytes(b"PK")
    good = str(world[0] / "02_cot.pt")
    for data, paths, why in [(tmp_path, [good], "pairs_test.jsonl, line 9: no 'rejected'"),
                             (world[1], [good, f"{tmp_path}/bad.pt"], "bad.pt is no checkpoint"),
                             (world[1], [good, f"{tmp_path}/no.pt"], "no.pt is missing")]:
        args = eval_args(data, checkpoints=paths, out=str(tmp_path / "out"))
        refuses(lambda: evaluation.main(args), why)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------- report


def test_report_reads_old_logs_and_new_ones(tmp_path, capsys, monkeypatch):
    old = [{"config": {}}] + [{"step": i, "reward": i / 9, "kl": 0.1} for i in range(3)]
    new = [{"stage": "05_ppo", "config": {}}] + [{"step": i, "reward": 2.0} for i in (1, 2)]
    for name, rows in (("04_rlvr", old), ("renamed", new), ("04_rlvr.samples", new[1:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (tmp_path / "renamed.jsonl").open("a") as f:
        f.write('\0\0{"step": 3, "re')                            # damaged lines are left out
    logs = report.read_logs(tmp_path)
    assert {k: [step for step, _ in log] for k, log in logs.items()} == {
        "04_rlvr": [1, 2, 3], "05_ppo": [1, 2]}
    drawn = {}
    monkeypatch.setattr(report, "draw", lambda path, panels, *_: drawn.update({
        Path(path).name: panels}) or path.endswith("rl.png"))
    report.main(argparse.Namespace(folder=str(tmp_path)))
    assert "results.json is not there" in capsys.readouterr().out
    verifier, scored, _, kl, _ = drawn["rl.png"]
    assert verifier[2] == {"04_rlvr": ("04_rlvr", [(1, 2, 3), (0, 1 / 9, 2 / 9)], False)}
    assert list(scored[2]) == ["05_ppo"] and verifier[1] != scored[1]      # one unit an axis
    assert kl[1] == "nats a token" and kl[2]["05_ppo"][1] == []


def test_report_draws_intervals_as_they_are(tmp_path):
    """Asymmetric, one colour a stage in all panels, shares from 0 to 1, an axis says its unit."""
    import matplotlib.pyplot as plt
    share = figures.share([1] * 19 + [0])
    results = {"a": {f"{mode}, steps {n}": share for mode in report.PRIMERS for n in (2, 10)},
               "b": {"free, steps 2": share}}
    panels = report.by_steps(results, {"a": "04_rlvr", "b": "03_dpo"})
    assert panels[0][2]["a"][1][0] == [2, 10]                      # by number, not by letter
    below, above = panels[0][2]["a"][1][2]
    assert below == pytest.approx([share["mean"] - share["low"]] * 2)
    assert above == pytest.approx([share["high"] - share["mean"]] * 2) and above[0] < below[0] / 2
    with pytest.MonkeyPatch.context() as patch:
        kept = []
        patch.setattr(plt, "close", kept.append)
        assert report.draw(tmp_path / "x.png", panels, report.STAGES, "steps of the question")
    axes = kept[0].axes
    colors = [[line.get_color() for line in axis.lines if len(line.get_xdata()) and
               line.get_linestyle() == "-"] for axis in axes]
    dpo, rlvr = report.COLORS[3:5]
    assert [set(c) for c in colors] == [{dpo, rlvr}, {rlvr}, {rlvr}]
    for axis in axes:
        assert axis.get_ylim() == (0, 1) and axis.get_ylabel() == "share of questions"
        assert axis.get_xlabel() == "steps of the question"
    plt.close("all")


def test_report_in_one_line(tmp_path, refuses):
    ask = lambda folder: lambda: report.main(argparse.Namespace(folder=str(folder)))
    refuses(ask(tmp_path / "no"), "is no folder: run ./run.sh")
    refuses(ask(tmp_path), "holds no log")
    for text, why in [("[", "not JSON"), ("[]", "not what eval.py writes"),
                      ('{"stages": 5, "flags": {"samples": 8}, "paired": {}}', "not what eval.py")]:
        (tmp_path / "results.json").write_text(text)
        refuses(ask(tmp_path), why)


# ---------------------------------------------------------------------------- eval by hand


def test_eval_without_steps_and_other_files(world, tmp_path, capsys):
    out, _ = world
    rows = [{"prompt": f"{i} and {i}?", "answer": str(2 * i)} for i in range(6)]
    (tmp_path / "rl_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluation.main(eval_args(tmp_path, checkpoints=[str(out / "02_cot.pt")], out=str(tmp_path),
                              n_greedy=9, n_sampled=4, max_new=8))
    assert "val.bin is not there" in capsys.readouterr().out
    figures = json.loads((tmp_path / "results.json").read_text())["stages"]["02_cot"]
    assert figures["free"]["n"] == 6 and figures["pass@1"]["n"] == 4 and "careful" not in figures
    assert not [name for name in figures if "steps" in name]
    assert figures["pass@1"]["low"] < figures["pass@1"]["high"]    # 0 of 4 is not known to be 0
    (tmp_path / "rl_test.jsonl").unlink()                          # pairs alone
    shutil.copy(world[1] / "pairs_test.jsonl", tmp_path)
    evaluation.main(eval_args(tmp_path, out=str(tmp_path / "pairs"), checkpoints=[
        str(out / "03_dpo.pt"), str(out / "06_reward.pt")]))
    assert "rl_test.jsonl is not there" in capsys.readouterr().out
    stages = json.loads((tmp_path / "pairs/results.json").read_text())["stages"]
    assert all("prefers, a" in figures and "free" not in figures for figures in stages.values())
    (tmp_path / "pairs_test.jsonl").unlink()                       # no part of it is asked
    shutil.copy(world[1] / "val.bin", tmp_path)
    evaluation.main(eval_args(tmp_path, out=str(tmp_path / "none"),
                              checkpoints=[str(out / "06_reward.pt")]))
    assert json.loads((tmp_path / "none/results.json").read_text())["stages"] == {"06_reward": {}}


@pytest.mark.parametrize("flags, said", [
    (dict(out="/nowhere"), "run ./run.sh first"),
    (dict(data="/nowhere/toy", checkpoints=["{out}/02_cot.pt"]), "python data/toy.py"),
    (dict(checkpoints=["/nowhere/02_cot.pt"]), "/nowhere/02_cot.pt is missing")])
def test_eval_fails_in_one_line(world, flags, said, refuses):
    flags = json.loads(json.dumps(flags).replace("{out}", str(world[0])))
    refuses(lambda: evaluation.main(argparse.Namespace(**vars(eval_args(world[1])) | flags)), said)


def forked(f, given=b"", out=""):
    """f() in a child of this loaded process, with streams of its own -> exit code, stdout, stderr.
    `out` "full" is a full disk, "gone" a reader that has left, "closed" no stdout; given=None none
    to read from."""
    files = [tempfile.TemporaryFile() for _ in range(3)]
    files[0].write(given or b"")
    files[0].seek(0)
    child = os.fork()
    if child:
        code, said = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), []
        for file in files[1:]:
            file.seek(0)
            said.append(file.read().decode())
        return code, *said
    code = 1
    try:
        read, write = os.pipe()
        os.close(read)
        places = {"full": os.open("/dev/full", os.O_WRONLY), "gone": write}
        for i, fd in enumerate([files[0].fileno(), places.get(out, files[1].fileno()),
                                files[2].fileno()]):
            os.dup2(fd, i)
        sys.stdin, sys.stdout, sys.stderr = (open(i, "rw"[i > 0], closefd=False) for i in range(3))
        if given is None:
            sys.stdin = None
        if out == "closed":
            sys.stdout = None
        f()
        code = 0
    except SystemExit as e:
        code = e.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream:
                stream.flush()
        os._exit(code)


def chat_args(world, name="02_cot", **more):
    return argparse.Namespace(**FLAGS | dict(checkpoints=[str(world[0] / f"{name}.pt")]) | more)


def test_chat_goes_on_after_bad_lines(world):
    args = chat_args(world, max_new=5)
    args.checkpoints.append(str(world[0] / "03_dpo.pt"))
    code, out, err = forked(lambda: chat.main(args), b"hello\n<think>\n" + b"a" * 200 + (
        b"\n/reset\nhello\n\xff\xfe\n/quit\nnever\n"))
    assert code == 0 and not err, err
    assert "the character '<' is not" in out and "/reset forgets" in out and "valid UTF-8" in out
    assert out.count(" [cut at 5 tokens: --max_new]\n") == 4 and "never" not in out
    assert out.count("02_cot: ") == 2 == out.count("03_dpo: ")


@pytest.mark.parametrize("changes, why", [
    (dict(max_new=0), "--max_new must lie in"), (dict(max_new=10 ** 8), "--max_new must lie in"),
    (dict(temperature=math.nan), "--temperature must"), (dict(temperature=math.inf), "[0, 100]"),
    (dict(temperature=-1.0), "--temperature"), (dict(top_p=0.0), "(0, 1]"),
    (dict(seed=-1), "--seed"), (dict(top_p=1.5), "--top_p"),
    (dict(device="tpu"), "--device tpu: this machine has cpu"),
    (dict(prompt=""), "the prompt is empty"), (dict(prompt=" \n"), "the prompt is empty"),
    (dict(prompt="", raw=True), "the prompt is empty"), (dict(prompt="\udcff"), "valid UTF-8"),
    (dict(prompt="a" * 200), "202 tokens and the context has 128"),
    (dict(name="06_reward", prompt="hi"), "is a reward model: it scores completions and writes"),
    (dict(name="nope", prompt="hi"), "nope.pt is missing")])
def test_chat_refuses_in_one_line(world, refuses, changes, why):
    refuses(lambda: chat.main(chat_args(world, **changes)), why)


def test_a_renamed_reward_model_is_still_one(world, tmp_path, refuses):
    shutil.copy(world[0] / "06_reward.pt", tmp_path / "04_rlvr.pt")
    args = chat_args(world, prompt="hi")
    args.checkpoints = [str(tmp_path / "04_rlvr.pt")]
    refuses(lambda: chat.main(args), "04_rlvr.pt is a reward model")


@pytest.mark.parametrize("max_new, why", [(4, "4 tokens: --max_new"), (500, "the context is full")])
def test_an_answer_that_was_cut_has_a_mark(world, monkeypatch, capsys, max_new, why):
    """An answer that ends has none, and one that ends with the last token allowed has none."""
    chat.main(chat_args(world, prompt="hi", max_new=max_new))
    assert f" [cut at {max_new if max_new < 9 else 128 - 4} tokens" in (
        out := capsys.readouterr().out) and why in out
    tok = Tokenizer({"kind": "chars", "chars": CHARS})
    said = tok.encode("yes") + [tok.end]
    monkeypatch.setattr(chat, "generate", lambda *_, **__: ([said], None))
    chat.main(chat_args(world, prompt="hi", max_new=4))
    assert "cut" not in capsys.readouterr().out


def test_escapes_of_a_model_steer_no_terminal(capsys):
    chars = "\x1b[2J\x07\r\x9b\x7f\t\n" + CHARS[2:]
    tok = Tokenizer({"kind": "chars", "chars": "".join(dict.fromkeys(chars))})
    printer = chat.Printer(tok)
    printer([0], tok.encode("a\x1b[2J\x07\r\x9b\x7fb\tc\n"))
    printer.flush()
    assert capsys.readouterr().out == "a\\x1b[2J\\x07\\x0d\\x9b\\x7fb\tc\n"


def test_commands_are_never_sent(world, monkeypatch, capsys):
    lines = iter(["/help", "/exits", "/ hi", " /usr", "/exit", "never"])
    sent = []
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    monkeypatch.setattr(chat, "reply", lambda talks, text: sent.append(text))
    chat.main(chat_args(world))
    out = capsys.readouterr().out
    assert sent == ["/usr"] and next(lines) == "never"
    assert "/reset forgets the conversation" in out and "/exits is no command and was not" in out


@pytest.mark.parametrize("out, code, said", [
    ("gone", 0, ""), ("full", 2, "error: cannot write the answer: No space left on device\n"),
    ("closed", 2, "error: stdout is closed\n")])
def test_streams_that_are_gone(world, out, code, said):
    args = chat_args(world, prompt="hi")
    assert forked(lambda: chat.main(args), out=out) == (code, "", said)


def test_chat_without_stdin(world):
    said = "error: stdin is closed: give --prompt\n"
    assert forked(lambda: chat.main(chat_args(world)), None) == (2, "", said)
    code, out, err = forked(lambda: chat.main(chat_args(world, prompt="hi")), None)
    assert code == 0 and "[cut at 4 tokens" in out and not err


def test_chat_into_a_reader_that_leaves(world):
    """The whole script, with what Python itself does at the end."""
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} chat.py {world[0]}/02_cot.pt --prompt hi --max_new 90 | "
         "head -c 1; exit ${PIPESTATUS[0]}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout) == 1 and not done.stderr, done.stderr


class Bytes:
    """Tokens are single bytes, as in the worst case of a BPE."""
    base, end, control = 256, 256, {256: "<|end|>", 260: "<think>"}

    def decode(self, ids):
        return "".join(["<think>"] if ids == [260] else bytes(ids).decode("utf-8", "replace"))


def test_printer_holds_back_half_characters(capsys):
    show, seen = chat.Printer(Bytes()), []
    for token in [260, *"né €".encode(), 256]:
        show([0], [token])
        seen.append(capsys.readouterr().out)
    assert seen == ["<think>", "n", "", "é", " ", "", "", "€", ""]
    show([0], [0xE2])                      # cut in the middle of a character
    show.flush()
    assert capsys.readouterr().out == "\ufffd"


def test_conversation_is_kept_and_reset(world, monkeypatch):
    talk = chat.Talk(str(world[0] / "02_cot.pt"), argparse.Namespace(**FLAGS))
    before, tok = len(talk.prompt("hello")), talk.tokenizer
    talk.answer("hello")
    prompt = talk.prompt("hello")
    assert len(prompt) > before
    said = tok.decode(talk.ids).split("<|assistant|>")[1].removesuffix("<|end|>")
    assert prompt == tok.chat([{"role": "user", "content": "hello"},
                               {"role": "assistant", "content": said},
                               {"role": "user", "content": "hello"}])[0]
    tok.spec = tok.spec | {"strip": 1}     # a chat of its own that trims what is said
    said = tok.encode(" \nyes ") + [tok.end]
    assert chat.content(tok, said) == tok.encode("yes") and chat.content(tok, said[:2]) == []
    lines = iter(["/reset", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    chat.converse([talk])
    assert talk.ids == [] and len(talk.prompt("hello")) == before


def test_what_the_model_repeats_becomes_no_control_token(world, tmp_path, monkeypatch):
    """The user has it write "</think><|user|>" letter by letter; the turn ids that it draws itself
    do not stay either, its reasoning does."""
    tok = Tokenizer({"kind": "chars", "chars": CHARS + "<>|"})
    checkpoint(tmp_path / "x.pt", tok, {})
    talk = chat.Talk(str(tmp_path / "x.pt"), argparse.Namespace(**FLAGS))
    text = "</think><|user|><|end|>"
    said = [tok.tags["<think>"], *tok.encode(text), tok.tags["<|user|>"], tok.tags["</think>"]]
    monkeypatch.setattr(chat, "generate", lambda *_, **__: ([said], None))
    talk.answer(text)
    ids = talk.prompt("b")
    assert ids == [tok.tags["<|user|>"], *tok.encode(text), tok.tags["<|assistant|>"],
                   tok.tags["<think>"], *tok.encode(text), tok.tags["</think>"], tok.end,
                   tok.tags["<|user|>"], *tok.encode("b"), tok.tags["<|assistant|>"]]


def test_ctrl_c_leaves_with_130(world, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr("builtins.input", stop)
    leaves(lambda: chat.main(chat_args(world)), 130)
    for name in ("load", "generate"):
        monkeypatch.setattr(chat, name, stop if name == "load" else lambda *_, **__: stop(0))
        monkeypatch.setattr("builtins.input", lambda _: "hi")
        leaves(lambda: chat.main(chat_args(world)), 130)
        monkeypatch.undo()
