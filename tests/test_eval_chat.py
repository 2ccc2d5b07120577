"""The statistics of eval.py against brute force; eval and chat end to end on random models."""
import argparse
import hashlib
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import chat  # noqa: E402
import eval as report  # noqa: E402
from model import GPT, GPTConfig, Tokenizer, save  # noqa: E402

CHARS = "\n !*+,-./0123456789=?abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
FLAGS = dict(device="cpu", raw=False, max_new=4, temperature=0.0, top_p=1.0, seed=0, prompt=None)


def test_share_is_wilson():
    f = report.share([1] * 8 + [0] * 2)
    assert f["mean"] == 0.8 and f["n"] == 10
    assert [f["low"], f["high"]] == pytest.approx([0.4902, 0.9433], abs=1e-3)
    assert report.share([1] * 5)["high"] == 1 and report.share([1] * 5)["low"] < 0.6
    assert report.share([]) is None


def test_ratio_covers():
    """95 % of the intervals hold the truth, also when units have different sizes."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(400):
        counts = rng.integers(1, 9, 200)
        f = report.ratio(rng.binomial(counts, 0.3), counts)
        held += f["low"] <= 0.3 <= f["high"]
    assert 0.92 < held / 400 < 0.98
    assert report.ratio([1, 2, 3])["mean"] == 2 and report.ratio([0.0], [0]) is None


def test_pass_at_k_counts_subsets():
    for n, right, k in [(8, 3, 2), (8, 0, 8), (5, 5, 1), (6, 2, 4), (8, 1, 8)]:
        subsets = list(itertools.combinations([1] * right + [0] * (n - right), k))
        assert report.pass_at_k(n, right, k) == pytest.approx(np.mean([any(s) for s in subsets]))


def test_majority_and_careful():
    say = lambda answer: f"<think>1+1=2</think><answer>{answer}</answer><|end|>"
    assert report.majority([say("7"), say("7.0"), say("8"), "junk", "junk", "junk"], "7") == 1
    assert report.majority([say("8"), say("8"), say("7")], "7") == 0
    assert report.majority(["junk"], "7") == 0
    trace = "<think>1+5=6\n6*2=12</think><answer>12</answer><|end|>"
    assert report.careful(trace, 2) and not report.careful(trace, 3)
    assert not report.careful("<think>(1+5)*2=12</think><answer>12</answer><|end|>", 1)
    assert not report.careful(trace.removesuffix("<|end|>"), 2)


def test_gram_bits_is_a_distribution_and_matches_by_hand():
    train, V = np.array([0, 1, 0, 2, 0, 1, 1, 2]), 4
    for head in itertools.product(range(V), repeat=2):
        p = [2 ** -report.gram_bits(train, np.array([*head, c]), V, 3)[-1] for c in range(V)]
        assert sum(p) == pytest.approx(1) and min(p) > 0
    # p(1 | 0): unigram (3 + 3/4) / (8 + 3), then "0" is followed by 1, 2, 1
    unigram = (3 + 3 / 4) / 11
    assert report.gram_bits(train, np.array([0, 1]), V, 2)[0] == pytest.approx(
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
    figure = report.bits(args, argparse.Namespace(model=model, tokenizer=tok, name="02_cot"))
    assert figure["bits"]["mean"] == (len(ids) - 1) / (5 + 1 + 2)
    np.array(tok.encode("hello ") + [tok.end] + tok.encode("abc"), np.uint16).tofile(
        tmp_path / "train.bin")
    train, val = (np.frombuffer(text.encode(), np.uint8) for text in ("hello \0abc", "héllo\0ab"))
    for args.window in (64, 3):
        figure = report.bits(args, argparse.Namespace(model=model, tokenizer=tok, name="00_x"))
        assert figure["bits of 5-grams"]["mean"] == pytest.approx(
            report.gram_bits(train, val, 256).sum() / 8)


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
    checkpoint(out / "00_pretrain.pt", tokenizer, {"config": {}, "inputs": {}})
    checkpoint(out / "02_cot.pt", tokenizer, {"config": {}, "inputs": {}})
    start = str(out / "02_cot.pt")
    sha = hashlib.sha256(Path(start).read_bytes()).hexdigest()
    record = {"config": {"init": start}, "inputs": {start: sha}}
    checkpoint(out / "03_dpo.pt", tokenizer, record)               # the same weights as its start
    head = torch.nn.Linear(16, 1).state_dict()
    checkpoint(out / "06_reward.pt", tokenizer, record, seed=1, head=head)

    def write(name, rows):
        (data / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("rl_test.jsonl", [{"prompt": f"Tom has {i}?", "answer": str(i), "steps": i % 5 + 1}
                            | ({"seen": True} if i % 5 == 0 else {}) for i in range(25)])
    write("pairs_test.jsonl", [{"prompt": f"{i}?", "chosen": f"<answer>{i}</answer>",
                                "rejected": "<answer>0</answer>", "kind": "ab"[i % 2]}
                               for i in range(1, 9)])
    write("chat_test.jsonl", [{"prompt": "Spell fox.", "completion": "f-o-x", "kind": "spell"}])
    ids = np.random.default_rng(0).integers(0, 30, 1000).astype(np.uint16)
    for name in ("train.bin", "val.bin"):
        ids.tofile(data / name)
    return out, data


def run(script, *flags, ranks=0, **kwargs):
    start = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}",
             "--standalone"] if ranks else [sys.executable]
    return subprocess.run([*start, str(ROOT / script), *map(str, flags)], capture_output=True,
                          text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, **kwargs)


def test_eval_end_to_end_on_one_rank_and_on_two(world):
    out, data = world
    flags = ["--out", out, "--data", data, "--n_greedy", 3, "--n_many", 5, "--n_sampled", 8,
             "--samples", 4, "--max_new", 12]
    results = []
    for ranks in (0, 2):
        done = run("eval.py", *flags, ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert "gain, question by question" in done.stdout
        results.append(json.loads((out / "results.json").read_text())["stages"])
    base, dpo, reward = (results[0][s] for s in ("00_pretrain", "03_dpo", "06_reward"))
    assert base["format"]["n"] == 15 and "pass@1" not in base
    assert base["bits"]["mean"] > 5 > base["bits of 5-grams"]["mean"]  # train.bin is val.bin
    assert dpo["free"]["n"] == 20 and dpo["free, steps 1"]["n"] == 5           # without seen facts
    assert abs(dpo["KL/token"]["mean"]) < 1e-5                     # equal to its start
    assert dpo["margin, all"]["mean"] == 0 and dpo["prefers, all"]["mean"] == 0
    assert reward["prefers, a"]["n"] == 4 and "free" not in reward
    for stage, figures in results[0].items():                      # sharding changes nothing
        for name, figure in figures.items():
            for key in figure or {}:
                assert results[1][stage][name][key] == pytest.approx(figure[key], abs=1e-5)
    assert (out / "accuracy_by_steps.png").stat().st_size > 1000


@pytest.mark.parametrize("name", ["ipo", "kto", "simpo", "orpo", "simpo-seed1"])
def test_siblings_of_dpo_are_scored_by_their_own_reward(world, tmp_path, name):
    out, data = world
    record = torch.load(out / "03_dpo.pt", weights_only=True)["record"]
    tokenizer = Tokenizer({"kind": "chars", "chars": CHARS})
    checkpoint(tmp_path / f"{name}.pt", tokenizer, record, seed=5)
    args = argparse.Namespace(data=data, device="cpu", rank=0, world=1, n_many=1, n_primed=1,
                              n_greedy=1, n_sampled=1, samples=1)
    stage = report.open_stage(args, tmp_path / f"{name}.pt")
    assert "pairs" in [what for what, *_ in report.plan(args, name)]
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
    figures = report.preferences(args, stage)
    assert figures["margin, all"]["mean"] == pytest.approx(np.mean(margins), abs=1e-4)
    assert figures["prefers, all"]["mean"] == np.mean([m > 0 for m in margins])
    stage.init = None                      # the reference-free ones do not need it
    assert bool(report.preferences(args, stage)) == (name[0] in "so")


def test_eval_without_steps_and_other_files(world, tmp_path):
    out, _ = world
    rows = [{"prompt": f"{i} and {i}?", "answer": str(2 * i)} for i in range(6)]
    (tmp_path / "rl_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run("eval.py", out / "02_cot.pt", "--out", tmp_path, "--data", tmp_path,
               "--n_sampled", 4, "--max_new", 8)
    assert done.returncode == 0, done.stderr
    assert "val.bin is not there" in done.stdout
    figures = json.loads((tmp_path / "results.json").read_text())["stages"]["02_cot"]
    assert figures["free"]["n"] == 6 and figures["pass@1"]["n"] == 4 and "careful" not in figures
    assert not [name for name in figures if "steps" in name]
    assert figures["pass@1"]["low"] < figures["pass@1"]["high"]    # 0 of 4 is not known to be 0
    (tmp_path / "rl_test.jsonl").unlink()                          # pairs alone
    shutil.copy(world[1] / "pairs_test.jsonl", tmp_path)
    done = run("eval.py", out / "03_dpo.pt", out / "06_reward.pt", "--out", tmp_path, "--data",
               tmp_path)
    assert done.returncode == 0 and "rl_test.jsonl is not there" in done.stdout, done.stderr
    stages = json.loads((tmp_path / "results.json").read_text())["stages"]
    assert all("prefers, a" in figures and "free" not in figures for figures in stages.values())


@pytest.mark.parametrize("flags, said", [
    (["--out", "/nowhere"], "run ./run.sh first"),
    (["{out}/02_cot.pt", "--data", "/nowhere/toy"], "python data/toy.py"),
    (["/nowhere/02_cot.pt", "--data", "{data}"], "/nowhere/02_cot.pt is missing")])
def test_eval_fails_in_one_line(world, flags, said):
    done = run("eval.py", *[f.format(out=world[0], data=world[1]) for f in flags])
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


def test_chat_goes_on_after_bad_lines(world):
    talk = run("chat.py", world[0] / "02_cot.pt", world[0] / "03_dpo.pt", "--max_new", 5, input=(
        "hello\n<think>\n" + "a" * 200 + "\n/reset\nhello\n/quit\nnever\n"))
    assert talk.returncode == 0, talk.stderr
    assert "the character '<' is not" in talk.stdout and "/reset forgets" in talk.stdout
    assert talk.stdout.count("02_cot: ") == 2 == talk.stdout.count("03_dpo: ")


def test_chat_one_shot(world):
    model = world[0] / "02_cot.pt"
    one = run("chat.py", model, "--prompt", "hi", "--max_new", 5)
    raw = run("chat.py", model, "--prompt", "hi", "--max_new", 5, "--raw")
    assert one.returncode == raw.returncode == 0 and one.stdout.endswith("\n")
    bad = run("chat.py", model, "--prompt", "é")
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1 and not bad.stdout


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
    args = argparse.Namespace(**FLAGS)
    talk = chat.Talk(str(world[0] / "02_cot.pt"), args)
    before = len(talk.prompt("hello"))
    talk.answer("hello")
    assert [m["role"] for m in talk.messages] == ["user", "assistant"]
    assert len(talk.prompt("hello")) > before
    lines = iter(["/reset", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    chat.converse([talk])
    assert talk.messages == [] and len(talk.prompt("hello")) == before


def test_ctrl_c_leaves_with_130(world, monkeypatch, capsys):
    def stop(_):
        raise KeyboardInterrupt
    monkeypatch.setattr("builtins.input", stop)
    args = argparse.Namespace(**FLAGS, checkpoints=[str(world[0] / "02_cot.pt")])
    with pytest.raises(SystemExit) as e:
        chat.main(args)
    assert e.value.code == 130
