"""tasks.py: every log-prob against a full softmax in float64, rows in the sources' own formats."""
import argparse
import json
import math
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import CHARS, ROOT, load_stage, write_rows

import tasks
from model import GPT, GPTConfig, Tokenizer, save

TOK = {"kind": "chars", "chars": CHARS + "QABC:"}
FOUNDRY = [{"query": "Question: which is red?", "choices": ["a rose", "coal", "a sea"], "gold": 0},
           {"query": "cows eat", "choices": ["grass", "stones"], "gold": 0}]
HUB = [{"question": "which is red?", "answerKey": "A",
        "choices": {"text": ["a rose", "coal", "a sea"], "label": ["A", "B", "C"]}},
       {"question_stem": "cows eat", "answerKey": "1 ",
        "choices": {"text": ["grass", "stones"], "label": ["1", "2"]}}]
PIQA = [{"goal": "boil an egg", "sol1": "use water", "sol2": "use a hat", "label": 1}]
PIQA_FOUNDRY = [{"query": "Question: boil an egg\n", "choices": ["use water", "use a hat"],
                 "gold": 1}]
LAMBADA = [{"context": "i saw a dog and it was the", "continuation": "dog"},
           {"context": "no", "continuation": "cat"}]


def tiny(block_size=64, seed=0):
    torch.manual_seed(seed)
    tokenizer = Tokenizer(TOK)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, block_size=block_size, n_layer=1,
                          n_head=2, n_embd=16, position="rope"))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)                 # far from uniform: every token matters
    return model.eval(), tokenizer


def flags(**more):
    return argparse.Namespace(**dict(rank=0, world=1, device="cpu", batch_size=3, limit=0) | more)


@torch.no_grad()
def log_p(model, ids, n):
    """By the definition: one row alone, a full softmax, the last n ids."""
    logp = model(torch.tensor([ids[:-1]])).log_softmax(-1)[0]
    picked = logp[range(len(ids) - 1), ids[1:]][-n:]
    return float(picked.sum()), bool((logp.argmax(-1)[-n:] == torch.tensor(ids[-n:])).all())


def test_score_is_the_full_softmax(double):
    """Ragged rows in batches of any size, the greedy flag, and a context cut on the left."""
    model, _ = tiny(block_size=16)
    g = np.random.default_rng(0)
    made = [(g.integers(0, 40, size).tolist(), n)
            for size, n in [(5, 2), (17, 3), (9, 8), (2, 1), (16, 1), (30, 4), (7, 6), (30, 16)]]
    for ids, n in made[:3]:                               # some that greedy decoding does say
        for _ in range(n):
            ids[len(ids) - n + _] = int(model(torch.tensor([ids[: len(ids) - n + _][-16:]])
                                              )[0, -1].argmax())
    expected = [log_p(model, ids[-17:], n) for ids, n in made]
    assert [hit for _, hit in expected][:3] == [True] * 3 and not expected[5][1]
    for size in (1, 3, 100):
        got = tasks.score(flags(batch_size=size), model, made, greedy=True)
        assert [x for x, _ in got] == pytest.approx([x for x, _ in expected], abs=1e-10)
        assert [hit for _, hit in got] == [hit for _, hit in expected]


def test_choices_by_hand(double, tmp_path):
    model, tok = tiny()
    write_rows(tmp_path / "arc.jsonl", FOUNDRY)
    figures, rows = tasks.choices(flags(), model, tok, str(tmp_path / "arc.jsonl"))
    acc = norm = 0
    for row, kept in zip(FOUNDRY, rows):
        start = row["query"] + ("\nAnswer:" if row["query"].startswith("Q") else "")
        by_hand = [log_p(model, tok.encode(f"{start} {c}"), len(c) + 1)[0] for c in row["choices"]]
        assert kept["log_p"] == pytest.approx(by_hand, abs=1e-10) and kept["gold"] == row["gold"]
        acc += np.argmax(by_hand) == row["gold"]
        norm += np.argmax([x / len(c) for x, c in zip(by_hand, row["choices"])]) == row["gold"]
    assert figures["acc"]["mean"] == acc / 2 and figures["acc_norm"]["mean"] == norm / 2
    assert figures["acc"]["n"] == 2 and figures["acc"]["low"] < figures["acc"]["high"]


def test_the_length_decides_acc_norm():
    """Characters without the space in front, as in the harness: -9 / 4 against -4 / 1."""
    model, tok = tiny()
    row = {"query": "cows eat", "choices": ["a", "corn"], "gold": 1}
    fake = lambda args, model, made, *_, **__: [(-4.0, False), (-9.0, False)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "score", fake)
        patch.setattr(tasks, "read_rows", lambda *_: [row | {"line": 1}])
        figures, _ = tasks.choices(flags(), model, tok, "x.jsonl")
    assert figures["acc"]["mean"] == 0 and figures["acc_norm"]["mean"] == 1


@pytest.mark.parametrize("one, other", [(FOUNDRY, HUB), (PIQA_FOUNDRY, PIQA)])
def test_the_hub_and_llm_foundry_ask_the_same(one, other):
    assert [tasks.question(row) for row in one] == [tasks.question(row) for row in other]


@pytest.mark.parametrize("row, context, options", [
    ({"query": "Question: why?\nAnswer:", "choices": [" a", "b"], "gold": 0},
     "Question: why?\nAnswer:", ["a", "b"]),
    ({"query": "Question: why? \nAnswer: ", "choices": ["  a"], "gold": 0},
     "Question: why?\nAnswer:", ["a"]),
    ({"question": "why? Answer:", "answerKey": "A", "choices": {"text": [" a"], "label": ["A"]}},
     "Question: why?\nAnswer:", ["a"]),
    ({"goal": "fly\nAnswer:", "sol1": " a", "sol2": "b", "label": 1}, "Question: fly\nAnswer:",
     ["a", "b"]),
    ({"query": "cows eat ", "choices": [" grass"], "gold": 0}, "cows eat", ["grass"]),
    ({"query": "Name it. Answer: ", "choices": [" a"], "gold": 0}, "Name it. Answer:", ["a"])])
def test_nothing_is_written_twice(row, context, options):
    """The cue and the space that stand between question and choice, where the row has them."""
    assert tasks.question(row)[:2] == (context, options)


def test_the_last_word_has_one_space():
    for row in ({"context": "it was the ", "continuation": " dog"}, {"text": "it was the dog\n"},
                {"context": "it was the", "continuation": "dog"}):
        assert tasks.last_word(row) == ("it was the", " dog")


def test_lambada(double, tmp_path):
    model, tok = tiny()
    hub = [{"text": f"{row['context']} {row['continuation']}"} for row in LAMBADA]
    assert list(map(tasks.last_word, hub)) == list(map(tasks.last_word, LAMBADA))
    write_rows(tmp_path / "lambada.jsonl", LAMBADA)
    figures, rows = tasks.lambada(flags(), model, tok, str(tmp_path / "lambada.jsonl"))
    by_hand = [log_p(model, tok.encode(row["text"]), 4)[0] for row in hub]
    assert [row["log_p"] for row in rows] == pytest.approx(by_hand, abs=1e-10)
    assert figures["perplexity"]["mean"] == pytest.approx(math.exp(-np.mean(by_hand)))
    low, mean, high = (math.log(figures["perplexity"][k]) for k in ("low", "mean", "high"))
    assert low < mean < high and mean - low == pytest.approx(high - mean)    # on the log's scale
    write_rows(tmp_path / "one.jsonl", LAMBADA[:1])
    figures, _ = tasks.lambada(flags(), model, tok, str(tmp_path / "one.jsonl"))
    assert set(figures["perplexity"]) == {"mean", "n"}             # one word says nothing of others


class Pairs:
    """A tokenizer whose tokens are two characters where it can: merges cross the seam."""
    end = 99

    def encode(self, text):
        return [text[i : i + 2] for i in range(0, len(text), 2)]


def test_the_seam_is_the_harness_s():
    """Encoded together, divided where the context alone ends; its own spaces go to the right."""
    ask = lambda *pair: tasks.request(Pairs(), *pair, 8)
    assert ask("abcd", " e") == (["ab", "cd", " e"], 1)
    assert ask("abcd ", "ef") == (["ab", "cd", " e", "f"], 2)
    assert ask("abc", " ef") == (["ab", "c ", "ef"], 1)              # as it is there
    assert ask("", "ab") == ([99, "ab"], 1)
    with pytest.raises(ValueError):
        ask("abcd", " " + "e" * 40)


@pytest.mark.parametrize("size", [3, 17, 18, 40, 400])
def test_text_predicts_every_token_once(double, tmp_path, size):
    model, tok = tiny(block_size=17)
    text = "".join(np.random.default_rng(0).choice(list("abc de"), size))
    (tmp_path / "a.txt").write_text(text)
    figures, rows = tasks.text(flags(), model, tok, str(tmp_path / "a.txt"))
    ids, total = [tok.end] + tok.encode(text), 0.0
    for start in range(0, size, 17):
        end = min(start + 17, size)
        total -= log_p(model, ids[max(0, end - 17) : end + 1], end - start)[0]
    assert figures["bits/byte"]["mean"] == pytest.approx(total / math.log(2) / size)
    assert sum(row["bytes"] for row in rows) == pytest.approx(size)


def test_bytes_of_divided_characters():
    class Bytes:
        end = 256
        encode = staticmethod(lambda text: list(text.encode()))
        decode = staticmethod(lambda ids: bytes(ids).decode("utf-8", "replace"))
    _, sizes = tasks.windows(Bytes(), "né€" * 9, 5)
    assert sum(sizes) == pytest.approx(54) and len(sizes) == 11


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for seed, name in enumerate("ab"):
        model, tok = tiny(seed=seed)
        save(folder / f"{name}.pt", model=model.state_dict(), gpt=asdict(model.cfg),
             tokenizer=tok.spec)
    write_rows(folder / "arc.jsonl", FOUNDRY * 3)
    write_rows(folder / "piqa.jsonl", PIQA * 4)
    write_rows(folder / "lambada.jsonl", LAMBADA * 3)
    (folder / "book.txt").write_text("a dog and a cat. " * 30)
    return folder


def run(*args, ranks=0):
    start = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}",
             "--standalone"] if ranks else [sys.executable]
    return subprocess.run([*start, str(ROOT / "tasks.py"), *map(str, args)], text=True,
                          capture_output=True, cwd=ROOT)


def test_end_to_end_on_one_rank_and_on_two(files):
    found = []
    for ranks in (0, 2):
        done = run(files / "a.pt", files / "b.pt", "--choices", files / "arc.jsonl",
                   files / "piqa.jsonl", "--lambada", files / "lambada.jsonl", "--text",
                   files / "book.txt", "--batch_size", 2, "--device", "cpu",
                   "--out", files / f"{ranks}.json", ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert "perplexity" in done.stdout and "n 8" in done.stdout
        found.append(json.loads((files / f"{ranks}.json").read_text()))
    one, two = found
    assert {name: set(f) for name, f in one["results"].items()} == {
        name: {"arc", "piqa", "lambada", "book"} for name in "ab"}
    for name in "ab":
        for file, figures in one["results"][name].items():
            for metric, figure in figures.items():
                assert figure == pytest.approx(two["results"][name][file][metric], rel=1e-4)
    assert len(one["rows"]["a"]["arc"]) == 6 and len(one["inputs"]) == 6
    assert not list(files.glob("*.new"))


@pytest.mark.parametrize("kind, content, parts", [
    ("choices", None, ["x.jsonl is missing", "local file"]),
    ("choices", '{"query": "a", "choices": ["b", "c"]}\n', ["x.jsonl, line 1", "question"]),
    ("choices", '{"query": "a", "choices": ["b", "c"], "gold": 2}\n', ["line 1", "at 2"]),
    ("choices", '{"query": "a", "choices": [1, 2], "gold": 0}\n', ["line 1", "choices"]),
    ("choices", '{"question": "a", "choices": {"text": ["b"], "label": ["A"]}, "answerKey": "B"}\n',
     ["line 1", "at None"]),
    ("choices", '{"query": "a", "choices": ["\u20ac", "c"], "gold": 0}\n', ["line 1", "character"]),
    ("choices", '{"query": "a", "choices": ["%s", "c"], "gold": 0}\n' % ("b" * 90),
     ["line 1", "91 tokens", "64"]),
    ("lambada", '{"context": "a"}\n', ["line 1", "continuation"]),
    ("lambada", '{"text": 5}\n', ["line 1", "last word"]),
    ("lambada", '{"text": " "}\n', ["line 1", "last word"]),
    ("choices", '{"query": 5, "choices": ["b", "c"], "gold": 0}\n', ["line 1", "5 is no question"]),
    ("choices", '{"query": "a", "choices": "bc", "gold": 0}\n', ["line 1", "'bc' is no list"]),
    ("choices", '{"query": "a", "choices": ["b"], "gold": true}\n', ["line 1", "at True"]),
    ("lambada", "no json\n", ["line 1", "not JSON"]), ("lambada", "", ["no rows"]),
    ("text", "", ["x.jsonl is empty"]), ("text", "\u20ac", ["x.jsonl", "character"]),
    ("nothing", "", ["--choices, --lambada or --text"])])
def test_errors_in_one_line(files, tmp_path, refuses, kind, content, parts):
    path = tmp_path / "x.jsonl"
    if content is not None:
        path.write_text(content)
    asked = {"choices": [], "lambada": [], "text": []}
    asked |= {kind: [str(path)]} if kind in asked else {}
    args = argparse.Namespace(**asked, checkpoints=[str(files / "a.pt")], device="cpu", limit=0,
                              batch_size=4, out=str(tmp_path / "out.json"))
    refuses(lambda: tasks.main(args), *parts)
    assert not (tmp_path / "out.json").exists()


def test_cut_contexts_are_counted(tmp_path, capsys):
    model, tok = tiny(block_size=16)
    write_rows(tmp_path / "x.jsonl", FOUNDRY)
    tasks.choices(flags(), model, tok, str(tmp_path / "x.jsonl"))
    assert "3 of 5 requests are longer than the context of 16" in capsys.readouterr().out


def main_args(files, **more):
    return argparse.Namespace(**dict(
        choices=[str(files / "arc.jsonl")], lambada=[], text=[], checkpoints=[str(files / "a.pt")],
        device="cpu", limit=0, batch_size=4) | more)


def test_a_bad_out_or_number_is_found_before_any_work(files, tmp_path, refuses, monkeypatch):
    monkeypatch.setattr(tasks, "load", lambda *_: pytest.fail("it was too late"))
    (tmp_path / "file").write_text("")
    (tmp_path / "there").mkdir()
    for out, why in [("", "--out must name a file"), ("file/x.json", "cannot write"),
                     ("there", "there (it is a folder)"), ("x" * 300, "too long")]:
        args = main_args(files, out=out and f"{tmp_path}/{out}")
        refuses(lambda: tasks.main(args), why)
    for changes in (dict(limit=-1), dict(batch_size=0), dict(batch_size=10 ** 9)):
        args = main_args(files, out=str(tmp_path / "o.json"), **changes)
        refuses(lambda: tasks.main(args), f"--{[*changes][0]} must lie in")
    args = main_args(files, out=str(tmp_path / "o.json"), checkpoints=[str(tmp_path / "no.pt")])
    refuses(lambda: tasks.main(args), "no.pt is missing")
    assert not (tmp_path / "o.json").exists()


def test_what_is_known_is_written_after_every_file(files, tmp_path, refuses):
    (tmp_path / "bad.jsonl").write_text("no json\n")
    args = main_args(files, out=str(tmp_path / "new/o.json"), lambada=[str(tmp_path / "bad.jsonl")])
    refuses(lambda: tasks.main(args), "bad.jsonl, line 1: not JSON")
    assert json.loads((tmp_path / "new/o.json").read_text())["results"]["a"]["arc"]["acc"]["n"] == 6


def test_a_reward_model_is_asked_nothing(files, tmp_path, refuses):
    whole = torch.load(files / "a.pt", weights_only=True)
    save(tmp_path / "r.pt", **whole, head={"weight": torch.zeros(1, 16), "bias": torch.zeros(1)})
    args = main_args(files, out=str(tmp_path / "o.json"), checkpoints=[str(tmp_path / "r.pt")])
    refuses(lambda: tasks.main(args), "r.pt is a reward model")


# ---------------------------------------------------------------------------- bench


@pytest.mark.parametrize("name, flags, why", [
    ("shootout", dict(jobs=0, report=False, only=""), "--jobs must lie in [1, 1000], not 0"),
    ("exploits", dict(questions=0, show=3, seed=0), "--questions must lie in"),
    ("exploits", dict(questions=9, show=-1, seed=0), "--show must lie in"),
    ("exploits", dict(questions=9, show=3, seed=-1), "--seed must lie in"),
    ("exploits", dict(questions=9, show=3, seed=0, policy="no.pt"), "no.pt is missing"),
    ("exploits", dict(questions=9, show=3, seed=0, policy="{a}", reward="{a}"), "no reward model"),
    ("beside_transformers", dict(chars=0, max_new=4), "--chars must lie in"),
    ("beside_transformers", dict(chars=9, max_new=0), "--max_new must lie in"),
    ("beside_transformers", dict(chars=9, max_new=4, folder="no"), "no is no folder")])
def test_bench_in_one_line(files, refuses, name, flags, why):
    script = load_stage(f"bench/{name}")
    flags = {k: v.format(a=files / "a.pt") if isinstance(v, str) else v for k, v in flags.items()}
    refuses(lambda: script.main(argparse.Namespace(**flags)), why)


def test_seconds_of_a_step_in_old_records_and_new_ones():
    """Logs counted steps from 0 once; the screen, whose clock a record has, always from 1."""
    shootout = load_stage("bench/shootout")
    for begin in (0, 1):
        log = [{"step": begin + i, "sampled_tokens": 10, "accuracy": i / 4} for i in range(4)]
        run = {"log": log, "seconds": {"1": 1.5, "2": 2.5, "3": 3.5, "4": 4.5}}
        assert shootout.reached(run, 0.5) == (30, 3.5)
        assert shootout.reached(run, 0.9) is None


def test_estimate_of_no_command():
    done = subprocess.run([sys.executable, str(ROOT / "bench/estimate.py"), "--gpu", "l4"],
                          input="ls -l\n", capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "'ls -l'" in done.stderr
