"""The toy world holds what data/toy.py says of it. Everything is read back from the files' text."""
import collections
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import kernel

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import toy  # noqa: E402

OP_OF = {word: op for op, words in toy.WORD_FOR.items() for word in words}
TRACE = re.compile(r"<think>([^<]*)</think><answer>(\d+)</answer>")


@pytest.fixture(scope="session")
def twin(tmp_path_factory):
    """A second make in a process of its own, with another hash seed; runs beside the first."""
    out = tmp_path_factory.mktemp("twin")
    return out, subprocess.Popen([sys.executable, str(ROOT / "data" / "toy.py"), "--out", str(out)],
                                 env=os.environ | {"PYTHONHASHSEED": "7"}, stdout=subprocess.PIPE,
                                 stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="session")
def made(twin, tmp_path_factory):
    out = tmp_path_factory.mktemp("toy")
    toy.main(str(out))
    return out


@pytest.fixture(scope="session")
def rows(made):
    return {path.stem: [json.loads(line) for line in path.open()]
            for path in made.glob("*.jsonl")}


@pytest.fixture(scope="session")
def raw(made):
    """{split: documents}, decoded from the ids."""
    chars = json.loads((made / "tokenizer.json").read_text())["chars"]
    decoded = {}
    for split in ("train", "val"):
        ids = np.fromfile(made / f"{split}.bin", np.uint16)
        text = "".join(chars[i] if i < len(chars) else "\0" for i in ids)
        decoded[split] = text.removesuffix("\0").split("\0")
    return decoded


@pytest.mark.parametrize("name", ["01_sft", "02_cot", "03_dpo", "06_reward"])
def test_little_padding(name, stages, made):
    """Of the tokens that a default step computes, at least 93 % are real."""
    stage, real, computed = stages[name], 0, 0
    cfg = stage.Config(data=str(made))
    tokenizer = kernel.load_tokenizer(made / "tokenizer.json")
    model = SimpleNamespace(cfg=SimpleNamespace(block_size=256))
    rows = stage.read(cfg, cfg.val, tokenizer, model)
    for i in range(0, len(rows) - cfg.batch_size + 1, cfg.batch_size):
        for piece in kernel.by_length(rows[i : i + cfg.batch_size], cfg):
            longer = [len(ids) - 1 for row in piece
                      for ids, _ in (row if isinstance(row[0], tuple) else [row])]
            real += sum(longer)
            computed += len(longer) * max(longer)
    assert i and real >= 0.93 * computed, real / computed


# Reading back, without the generator's own functions.

def read_question(prompt):
    start, acts, thing = re.fullmatch(
        r"[A-Z]\w+ has (\d+) (?:\w+)((?:, \w+(?: \d)?)+)\. How many (\w+)\?", prompt).groups()
    ops = []
    for act in acts[2:].split(", "):
        word, _, n = act.partition(" ")
        ops.append(OP_OF[word] + (n or "2"))
    return int(start), tuple(ops)


@functools.cache
def calculate(text):
    value = eval(text)
    assert value == int(value) and 1 <= value <= 80, text
    return int(value)


def evaluate(start, ops):
    for op in ops:
        start = calculate(f"{start}{op}")
    return start


def read_trace(completion):
    """[(value, ops, result)] and the answer; the composite left side must be bracketed."""
    said, answer = TRACE.fullmatch(completion).groups()
    lines = []
    for line in said.split("\n"):
        left, _, result = line.partition("=")
        start, *ops = re.findall(r"^\(*\d+|[-+*/]\d", left)
        start = int(start.strip("("))
        text = f"{start}{ops[0]}"
        for op in ops[1:]:
            text = f"({text}){op}"
        assert text == left, line
        lines.append((start, tuple(ops), int(result)))
    return lines, int(answer)


def read_any(prompt):
    """The problem of a question in any wording: the first number, then each verb with its own."""
    acts = re.findall(r"\b(\w+)(?: (\d)\b)?", prompt)
    ops = tuple(OP_OF[word] + (n or "2") for word, n in acts if word in OP_OF)
    return int(re.search(r"\d+", prompt)[0]), ops


def read_story(text):
    first, *rest = re.findall(r"has (\d+) \w+\.", text)
    acts = re.findall(r"(?:He|She) (\w+)(?: (\d))?\. Now", text)
    lines = []
    for (word, n), result in zip(acts, rest, strict=True):
        lines.append((int(first), (OP_OF[word] + (n or "2"),), int(result)))
        first = result
    return lines


def runs(lines):
    """Every (value, operations) of two or more that the lines spell out one after the other."""
    chains, said = [], None
    for left, ops, result in lines:
        if left != said:
            chains.append([])
        value = left
        for op in ops:
            chains[-1].append((value, op))
            value = calculate(f"{value}{op}")
        said = result
    return {(chain[i][0], tuple(op for _, op in chain[i:j]))
            for chain in chains for i in range(len(chain)) for j in range(i + 2, len(chain) + 1)}


def spelled(lines):
    return {run for run in runs(lines) if run[0] <= 30}


def turns(row):
    """[(prompt, completion)]: two of a dialogue, one of another demonstration."""
    if "messages" not in row:
        return [(row["prompt"], row["completion"])]
    said = [message["content"] for message in row["messages"]]
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"] * 2
    return list(zip(said[::2], said[1::2]))


def problem_lines(prompt):
    start, ops = read_question(prompt)
    return [(start, ops, evaluate(start, ops))]


# The checks.

def test_two_makes_are_equal(made, twin):
    out, process = twin
    text = process.communicate()[0]
    assert process.returncode == 0, text
    names = sorted(path.name for path in made.iterdir())
    assert names == sorted(path.name for path in out.iterdir()) and len(names) == 18
    for name in names:
        assert (made / name).read_bytes() == (out / name).read_bytes(), name


def test_out_that_is_a_file(tmp_path, capsys):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        toy.main(str(tmp_path / "x"))
    assert stop.value.code == 2 and "--out" in capsys.readouterr().err
    assert (tmp_path / "x").read_text() == "mine"


def test_training_spells_out_no_held_out_problem(rows, raw):
    held = {split: {read_question(row["prompt"])
                    for name in files for row in rows[name] if row.get("steps", 1) > 1}
            for split, files in (("test", ["rl_test", "pairs_test"]),
                                 ("val", ["rl_val", "pairs_val", "sft_val", "cot_val"]))}
    held["test"] |= {read_any(row["prompt"]) for row in rows["rl_long"] if row["beyond"] != "range"}
    held["val"] |= {problem for name in ("sft_val", "cot_val") for row in rows[name]
                    for prompt, text in turns(row) if "<answer>" in text
                    if len((problem := read_question(prompt))[1]) > 1}
    assert not held["test"] & held["val"]
    for steps in (2, 3, 4, 5):
        assert sum(len(ops) == steps for _, ops in held["test"]) >= 1000
    seen = collections.defaultdict(set)
    for name in ("sft_train", "cot_train", "pairs_train", "rl_train"):
        for row in rows[name]:
            texts = [(row["prompt"], row.get(key, "")) for key in ("chosen", "rejected")
                     ] if "prompt" in row and "completion" not in row else turns(row)
            if "messages" in row and all("How many" in prompt for prompt, _ in texts):
                seen[name] |= spelled([line for prompt, _ in texts
                                       for line in problem_lines(prompt)])
            for prompt, text in texts:
                if "How many" in prompt:
                    seen[name] |= spelled(problem_lines(prompt))
                if TRACE.fullmatch(text):
                    seen[name] |= spelled(read_trace(text)[0])
    for text in raw["train"]:
        if "=" in text:
            seen["raw"] |= spelled(read_trace(f"<think>{text}</think><answer>0</answer>")[0])
        elif " has " in text:
            seen["raw"] |= spelled(read_story(text))
    assert len(seen) == 5 and all(len(problems) > 1000 for problems in seen.values())
    for name, problems in seen.items():
        assert not problems & held["test"] and not problems & held["val"], name
        for start, ops in problems:  # nor one that these files happen not to hold
            assert toy.split_of(f"{start}{''.join(ops)}") == "train", name
    for split, problems in held.items():
        assert all(toy.split_of(f"{start}{''.join(ops)}") == split for start, ops in problems)


def test_raw_text(raw):
    chars = collections.Counter()
    facts = set()
    for text in raw["train"]:
        assert not set("<>|") & set(text) and "How many" not in text
        if "=" in text:
            chars["facts"] += len(text)
            for line in text.split("\n"):
                left, right = line.split("=")
                assert calculate(left) == int(right)
                facts.add(line)
        elif " has " in text:
            chars["stories"] += len(text)
            lines = read_story(text)
            assert 1 <= len(lines) <= 3 and 1 <= lines[0][0] <= 30
            assert all(evaluate(value, ops) == result for value, ops, result in lines)
        else:
            chars["sentences"] += len(text)
    total = sum(chars.values())
    assert 2.1e6 < total < 2.3e6 and 0.37 < chars["facts"] / total < 0.43
    assert facts == {f"{v}{op}={toy.apply(v, [op])}" for v, op, _ in toy.all_facts()}
    assert 0.9e5 < sum(map(len, raw["val"])) < 1.1e5


def test_answers(rows):
    for name in set(rows) - {"rl_long"}:
        for row in rows[name]:
            if "answer" in row:
                start, ops = read_question(row["prompt"])
                assert len(ops) == row["steps"] and 1 <= start <= 30
                assert row["answer"] == str(evaluate(start, ops))
            elif "chosen" in row:
                check_math(name, row["prompt"], row["chosen"], row)
            else:
                for prompt, text in turns(row):
                    if "How many" in prompt:
                        check_math(name, prompt, text, row)
                    else:
                        assert "<" not in text and row["kind"] != "math"


def check_math(name, prompt, text, row):
    start, ops = read_question(prompt)
    assert len(ops) == row.get("steps", len(ops)) and 1 <= start <= 30
    right = evaluate(start, ops)
    if name.startswith("sft"):
        assert text == f"<answer>{right}</answer>"
        return
    lines, answer = read_trace(text)
    assert answer == right == lines[-1][2]
    assert ops == tuple(op for _, group, _ in lines for op in group)
    assert [line[0] for line in lines] == [start] + [line[2] for line in lines[:-1]]
    assert all(evaluate(value, group) == result for value, group, result in lines)
    careful = all(len(group) == 1 for _, group, _ in lines)
    assert max(len(group) for _, group, _ in lines) <= 3
    if "manner" in row and row["steps"] > 1:
        assert careful == (row["manner"] == "careful")


def test_dialogues(rows):
    """An eighth of the demonstrations are two items drawn on their own; each fits the context."""
    from model import Tokenizer
    tok = Tokenizer({"kind": "chars", "chars": "".join(sorted(toy.BASIC))})
    for name in ("sft_train", "sft_val", "cot_train", "cot_val"):
        found = [row for row in rows[name] if "messages" in row]
        n = len(rows[name])                                             # four standard errors
        assert abs(len(found) / n - 0.12) < 4 * (0.12 * 0.88 / n) ** 0.5
        assert all(set(row) == {"messages", "kind"} and row["kind"] == "dialogue" for row in found)
        for row in rows[name]:
            ids, mask = tok.chat(row.get("messages") or [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]}])
            assert len(ids) <= 256 and sum(mask) > 1
    found = [turns(row) for row in rows["cot_train"] if "messages" in row]
    math = np.array([["How many" in prompt for prompt, _ in row] for row in found])
    assert np.all(np.abs(math.mean(0) - 0.9) < 0.03)               # in both turns alike
    assert abs(np.corrcoef(math.T)[0, 1]) < 0.1
    assert np.mean([a == b for a, b in found]) < 0.01


def test_questions_beyond_training(rows, raw):
    """Beyond in the one way that the row names, and in no other."""
    from model import Tokenizer
    tok = Tokenizer({"kind": "chars", "chars": "".join(sorted(toy.BASIC))})
    shape = lambda prompt: re.sub("|".join([*toy.HE, *toy.SHE]), "Tom", re.sub(
        "|".join(toy.THINGS), "nuts", re.sub(r"\d+", "1", prompt)))
    trained = [prompt for name in ("sft_train", "cot_train") for row in rows[name]
               for prompt, _ in turns(row)]
    words = {word for text in (*trained, *raw["train"]) for word in re.findall(r"[a-zA-Z]+", text)}
    known, new = {shape(prompt) for prompt in trained}, set()
    assert collections.Counter(row["beyond"] for row in rows["rl_long"]) == {
        "steps": 240, "range": 240, "wording": 240}
    count = collections.Counter((row["beyond"], row["steps"]) for row in rows["rl_long"])
    assert sorted(count.values()) == [60] * 4 + [80] * 3 + [240]
    for row in rows["rl_long"]:
        start, ops = read_any(row["prompt"])
        beyond = row["beyond"]
        assert len(ops) == row["steps"] and row["answer"] == str(evaluate(start, ops))
        assert row["steps"] in {"steps": (6, 7, 8), "range": (5,)}.get(beyond, (2, 3, 4, 5))
        assert 31 <= start <= 60 if beyond == "range" else 1 <= start <= 30
        assert toy.split_of(f"{start}{''.join(ops)}") == "test"
        said = re.findall("[a-zA-Z]+", row["prompt"])
        if beyond == "wording":
            assert shape(row["prompt"]) not in known
            new |= set(said) - words
        else:
            assert read_question(row["prompt"]) == (start, ops)
        lines = toy.completion_of(toy.trace(start, list(ops), [1] * len(ops)))
        ids, mask = tok.answered(row["prompt"], lines)
        assert len(ids) <= 256 and sum(mask) <= 100                # eval.py's --max_new
    assert len(new) <= 3, new
    spelled_out = {run for row in rows["cot_train"] for _, text in turns(row)
                   if TRACE.fullmatch(text) for run in runs(read_trace(text)[0])}
    for beyond in ("steps", "range", "wording"):
        problems = {read_any(row["prompt"]) for row in rows["rl_long"] if row["beyond"] == beyond}
        assert len(problems) == 240
        assert not problems & spelled_out


def test_worse_traces_are_worse_in_their_way(rows):
    for name in ("pairs_train", "pairs_val", "pairs_test"):
        off = []
        for row in rows[name]:
            chosen, right = read_trace(row["chosen"])
            rejected, answer = read_trace(row["rejected"])
            kind = row["kind"]
            careful = all(len(ops) == 1 for _, ops, _ in chosen)
            fewest = all(len(ops) == 1 for _, ops, _ in rejected)
            faults = [i for i, (value, ops, result) in enumerate(rejected)
                      if evaluate(value, ops) != result]
            said = [line[2] for line in rejected]
            assert answer == said[-1]
            if kind != "pad":
                assert [line[0] for line in rejected] == [chosen[0][0]] + said[:-1]
            if kind in ("pad", "skip"):
                assert careful == fewest and not faults
            if kind == "hasty":
                assert careful and not fewest and len(faults) <= 1
                off.append(bool(faults))
                assert off[-1] == (answer != right)
                assert [op for line in rejected for op in line[1]] == [l[1][0] for l in chosen]
            elif kind == "pad":
                again = [i for i in range(1, len(rejected)) if rejected[i] == rejected[i - 1]]
                assert len(again) == 1 and rejected[:again[0]] + rejected[again[0] + 1:] == chosen
            elif kind == "skip":
                assert answer != right
                assert sum(len(line[1]) for line in rejected) == row["steps"] - 1
            elif kind == "wrong":
                assert careful and len(faults) == 1 and answer != right
                assert len(row["rejected"]) == len(row["chosen"])
                assert [line[1] for line in rejected] == [line[1] for line in chosen]
        assert 0.4 < np.mean(off) < 0.6


def test_nothing_simple_gives_the_chosen_away(rows):
    for name in ("pairs_train", "pairs_test"):
        def rule(score):
            """Share of pairs in which the higher score is chosen; a tie is a coin."""
            return np.mean([(np.sign(score(r["chosen"]) - score(r["rejected"])) + 1) / 2
                            for r in rows[name]])
        rules = {"length": len, "bracket": lambda text: text.startswith("<think>("),
                 "brackets first": lambda text: len(text) - len(text[7:].lstrip("(")),
                 "lines": lambda text: text.count("\n"),
                 "answer": lambda text: int(TRACE.fullmatch(text)[2])}
        found = {key: rule(lambda t: float(score(t))) for key, score in rules.items()}
        assert all(0.4 < share < 0.6 for share in found.values()), (name, found)


def test_shares(rows):
    assert {name: len(rows[name]) for name in rows if name != "chat_test"} == {
        "sft_train": 16000, "sft_val": 500, "cot_train": 16000, "cot_val": 500,
        "pairs_train": 8000, "pairs_val": 200, "pairs_test": 2500,
        "rl_train": 6000, "rl_val": 400, "rl_test": 4400, "rl_long": 720}
    for name, other in (("sft_train", 0.15), ("cot_train", 0.10)):
        alone = [row for row in rows[name] if row["kind"] != "dialogue"]
        math = [row for row in alone if row["kind"] == "math"]
        assert abs(1 - len(math) / len(alone) - other) < 0.02
        ones = {"sft_train": 5 / 9, "cot_train": 1 / 5}[name]        # the rest evenly on 2-5
        for steps, n in collections.Counter(row["steps"] for row in math).items():
            assert abs(n / len(math) - (ones if steps == 1 else (1 - ones) / 4)) < 0.02
        ops = [op for row in math for op in read_question(row["prompt"])[1]]
        assert 0.25 < np.mean([op[0] in "*/" for op in ops]) < 0.45
        assert {row["kind"] for row in rows[name]} == {row["kind"] for row in rows["chat_test"]} | {
            "math", "dialogue"}
    math = [row for row in rows["cot_train"] if row["kind"] == "math"]
    assert abs(np.mean([row["manner"] == "hasty" for row in math]) - 0.6) < 0.02
    for name in ("pairs_train", "pairs_val", "pairs_test"):
        count = collections.Counter(row["kind"] for row in rows[name])
        assert [count[kind] * 5 for kind in ("hasty", "skip", "wrong")] == [len(rows[name])] * 3
    assert collections.Counter(row["steps"] for row in rows["rl_test"]) == {
        1: 400, 2: 1000, 3: 1000, 4: 1000, 5: 1000}
    assert all(row.get("seen", False) == (row["steps"] == 1) for row in rows["rl_test"])
    for name in ("rl_train", "rl_val", "rl_test"):
        assert len({read_question(row["prompt"]) for row in rows[name]}) == len(rows[name])


def test_prompts(rows):
    asked = {prompt for name in ("sft_train", "cot_train") for row in rows[name]
             for prompt, _ in turns(row)}
    for name in set(rows) - {"rl_long"}:
        for row in rows[name]:
            pairs = turns(row) if "messages" in row or "completion" in row else [
                (row["prompt"], row.get(key, "")) for key in ("chosen", "rejected")]
            for prompt, text in pairs:
                assert not set("<>|") & set(prompt) and len(prompt) <= 90
                assert len(prompt) + len(text) <= 170
    assert 180 <= len(rows["chat_test"]) <= 240
    assert not any(row["prompt"] in asked for row in rows["chat_test"])
