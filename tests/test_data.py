"""The preparers in data/ on rows in each source's own format, and the stages on what they write."""
import csv
import gzip
import importlib
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import DOCUMENTS, ROOT, kernel, run, steps_of, write_rows

def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def put(path, rows):
    """Rows as the file's name says: .json, .jsonl (.gz, .zst), .csv or .parquet."""
    path, lines = Path(path), "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines))
    elif path.suffix == ".zst":
        from backports import zstd
        half = len(lines) // 2                                     # two frames, as pzstd writes
        path.write_bytes(zstd.compress(lines[:half]) + zstd.compress(lines[half:]))
    else:
        path.write_bytes(json.dumps(rows).encode() if path.suffix == ".json" else lines)
    return str(path)


# ---------------------------------------------------------------------------- rows

HH = "\n\nHuman: How do I boil {}?\n\nAssistant: For how long?\n\nHuman: Soft.\n\nAssistant: {}"
PAIR = [{"role": "user", "content": "Name {}."}, {"role": "assistant", "content": "{}"}]


def named(i, said):
    return [dict(PAIR[0], content=f"Name {i}."), dict(PAIR[1], content=said)]


MADE = {
    "alpaca": ("sft", lambda i: {"instruction": f"Add {i}.", "input": "No input.", "output": "Ok"},
               {"prompt": "Add 3.", "completion": "Ok"}),
    "dolly": ("sft", lambda i: {"instruction": f"Who is {i}?", "context": "A king[12] of old.",
                                "response": "A king.", "category": "closed_qa"},
              {"prompt": "Who is 3?\n\nA king of old.", "completion": "A king.",
               "kind": "closed_qa"}),
    "messages": ("sft", lambda i: {"conversations": [
        {"from": "system", "value": "Be brief."}, {"from": "human", "value": f"Hi {i}"},
        {"from": "gpt", "value": "<think>A greeting.</think><answer>Hi</answer>"}]},
        {"messages": [{"role": "system", "content": "Be brief."},
                      {"role": "user", "content": "Hi 3"},
                      {"role": "assistant",
                       "content": "<think>A greeting.</think><answer>Hi</answer>"}]}),
    "hh": ("pairs", lambda i: {"chosen": HH.format(i, "Four minutes."),
                               "rejected": HH.format(i, "Who knows?\n\nNot me.")},
           {"prompt": [{"role": "user", "content": "How do I boil 3?"},
                       {"role": "assistant", "content": "For how long?"},
                       {"role": "user", "content": "Soft."}],
            "chosen": "Four minutes.", "rejected": "Who knows?\n\nNot me."}),
    "ultrafeedback": ("pairs", lambda i: {
        "prompt": f"Name {i}.", "chosen": named(i, "A"), "rejected": named(i, "B"),
        "score_chosen": 8.0, "score_rejected": 7.5},
        {"prompt": [{"role": "user", "content": "Name 3."}], "chosen": "A", "rejected": "B"}),
    "pairs": ("pairs", lambda i: {"prompt": f"Name {i}.", "chosen": "A", "rejected": "B"},
              {"prompt": [{"role": "user", "content": "Name 3."}], "chosen": "A",
               "rejected": "B"}),
    "svamp": ("rl", lambda i: {"Body": f"A pack of {i} costs 76 dollars", "Question": "How much?",
                               "Equation": "( 76.0 - 25.0 )", "Answer": 51.0,
                               "Type": "Subtraction"},
              {"prompt": "A pack of 3 costs 76 dollars. How much?", "answer": "51", "steps": 1,
               "kind": "Subtraction"}),
    "hendrycks_math": ("rl", lambda i: {
        "problem": f"What is $x + {i}$?", "level": "Level 4", "type": "Algebra",
        "solution": "First \\boxed{2}, so $\\boxed{-\\frac{14}{3}}$."},
        {"prompt": "What is $x + 3$?", "answer": "-14/3", "kind": "level 4"}),
}


def prepare(script, name, rows, tmp_path, *more, file="rows.jsonl"):
    out = tmp_path / "out"
    script(name).main(["--train", put(tmp_path / file, rows), "--out", str(out),
                       "--val_share", "0.2", *more])
    return {part: read(out / f"{MADE[name][0]}_{part}.jsonl") for part in ("train", "val", "test")
            if (out / f"{MADE[name][0]}_{part}.jsonl").exists()}


@pytest.mark.parametrize("name", MADE)
def test_rows(script, tmp_path, capsys, name):
    _, row, expected = MADE[name]
    parts = prepare(script, name, [row(i) for i in range(60)], tmp_path)
    assert expected in parts["train"] + parts["val"]
    assert parts["val"] and len(parts["train"]) + len(parts["val"]) == 60
    assert "train: 60 rows read, 60 kept, 0 dropped\n" in capsys.readouterr().out


@pytest.mark.parametrize("file", ["r.json", "r.jsonl", "r.jsonl.gz", "r.jsonl.zst", "r.parquet",
                                  "r.csv"])
def test_formats(script, tmp_path, file):
    """The same rows come out of every format; a .json that is one object a line is read too."""
    row = MADE["alpaca"][1]
    parts = prepare(script, "alpaca", [row(i) for i in range(60)], tmp_path, file=file)
    assert sorted(r["prompt"] for r in parts["train"] + parts["val"]) == sorted(
        f"Add {i}." for i in range(60))
    if file == "r.jsonl":
        os.rename(tmp_path / file, tmp_path / "r2.json")
        script("alpaca").main(["--train", f"{tmp_path}/r2.json", "--out", f"{tmp_path}/2",
                               "--val_share", "0.2"])
        assert read(tmp_path / "2/sft_train.jsonl") == parts["train"]


def said(*turns):
    return "".join(f"\n\n{who}: {text}" for who, text in turns)


ONE = ("Human", "Hi"), ("Assistant", "A")
DROPS = {
    "alpaca": [({"instruction": "x", "input": "", "output": " "}, "empty"),
               ({"instruction": "x", "input": None, "output": "a </think>"}, "a tag")],
    "messages": [({"messages": [PAIR[0]]}, "the last turn is not the assistant's"),
                 ({"messages": [PAIR[1]]}, "do not alternate"),
                 ({"messages": [PAIR[0], dict(PAIR[1], content="")]}, "empty text"),
                 ({"messages": [dict(PAIR[0], role="tool"), PAIR[1]]}, "a role other")],
    "hh": [({"chosen": said(*ONE), "rejected": said(("Human", "Ho"), ("Assistant", "B"))},
            "the two prompts differ"),
           ({"chosen": said(*ONE), "rejected": said(*ONE)}, "chosen equals rejected"),
           ({"chosen": said(*ONE), "rejected": said(ONE[0], ("Assistant", ""))},
            "empty completion"),
           ({"chosen": said(*ONE, ("Human", "?")), "rejected": said(*ONE)}, "after the last"),
           ({"chosen": said(ONE[0], *ONE), "rejected": said(ONE[0], ONE[0], ("Assistant", "B"))},
            "do not alternate"),
           ({"chosen": "Hi", "rejected": "Ho"}, "no transcript")],
    "ultrafeedback": [({"prompt": "x", "chosen": named(1, "A"), "rejected": named(1, "B"),
                        "score_chosen": 5.0, "score_rejected": 5.0}, "equal scores"),
                      ({"prompt": "x", "chosen": named(1, "A"), "rejected": named(2, "B")},
                       "the two prompts differ")],
    "svamp": [({"Body": "x", "Question": "y?", "Equation": "", "Answer": "many", "Type": ""},
               "not a number")],
    "hendrycks_math": [({"problem": "x", "solution": f"\\boxed{{{a}}}"}, "not a number")
                       for a in ("\\frac{\\pi}{6}", "3\\sqrt{2}", "x+1", "(1,2)",
                                 "\\text{east}", "52_8")] + [
                      ({"problem": "x", "solution": "none"}, "no answer")],
}


@pytest.mark.parametrize("name, row, why",
                         [(name, *drop) for name, drops in DROPS.items() for drop in drops])
def test_dropped_and_why(script, tmp_path, capsys, name, row, why):
    good = [MADE[name][1](i) for i in range(60)]
    parts = prepare(script, name, [row, *good, good[0]], tmp_path)
    assert sum(map(len, parts.values())) == 60
    line = next(s for s in capsys.readouterr().out.splitlines() if s.startswith("train:"))
    assert "62 rows read, 60 kept, 2 dropped" in line
    assert why in line and "1 an exact duplicate" in line


@pytest.mark.parametrize("latex, plain", [
    ("42", "42"), ("-\\frac{1}{2}", "-1/2"), ("\\dfrac43", "4/3"), ("90^\\circ", "90 degrees"),
    ("10,\\!000", "10000"), ("\\$18.90", "18.9 dollars"), ("50\\%", "50 percent"),
    ("1,234", "1234"), ("1\\frac{1}{2}", "3/2"), ("18.90", "18.9"), ("51.0", "51"),
    ("5.4 \\text{ cents}", "5.4 cents"), ("1,234 \\text{ miles}", "1234 miles")])
def test_latex(script, tmp_path, latex, plain):
    """MATH-500 has its own "answer"; the verifier finds what is written here right, and its unit
    stays: dollars are no cents, and a bare number is right for either."""
    script("hendrycks_math").main([
        "--test", put(tmp_path / "t.json", [{"problem": "x?", "answer": latex, "level": 1}]),
        "--out", f"{tmp_path}/out"])
    [row] = read(tmp_path / "out/rl_test.jsonl")
    assert row == {"prompt": "x?", "answer": plain, "kind": "level 1"}
    bare = re.sub(r"[^-\d.,/]", "", plain)
    for said, right in ((plain, 1), (bare, 1), (f"{bare} hours", bare == plain)):
        assert kernel.verify(f"<answer>{said}</answer><|end|>", row["answer"]) == right, said


def test_equal_prompts_never_straddle(script, tmp_path, capsys):
    """One opening in two spellings, told to two lengths, and in the source's test rows."""
    rows = [MADE["hh"][1](i) for i in range(80)]
    short = [{"chosen": said(("Human", f"how do I  boil {i}?"), ("Assistant", "Hot.")),
              "rejected": said(("Human", f"how do I  boil {i}?"), ("Assistant", "Cold."))}
             for i in range(80)]
    parts = prepare(script, "hh", rows + short, tmp_path, "--test_share", "0.3")
    first = {part: Counter(" ".join(row["prompt"][0]["content"].lower().split()) for row in rows)
             for part, rows in parts.items()}
    assert set(first) == {"train", "val", "test"} and all(first.values())
    assert all(set(c.values()) == {2} for c in first.values())         # both lengths, one side
    assert sum(map(len, first.values())) == 80
    parts = prepare(script, "hh", rows, tmp_path, "--test",
                    put(tmp_path / "test.jsonl", short[:5]))
    assert "train: 5 more dropped (their prompts are in test)" in capsys.readouterr().out
    assert len(parts["test"]) == 5 and len(parts["train"]) + len(parts["val"]) == 75


def test_a_folder_of_single_problems(script, tmp_path):
    """MATH's own form: one JSON object a file, in folders by subject."""
    for i in range(60):
        path = tmp_path / f"MATH/train/{'ab'[i % 2]}/{i}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(MADE["hendrycks_math"][1](i)))
    script("hendrycks_math").main(["--train", f"{tmp_path}/MATH/train", "--out",
                                   f"{tmp_path}/out", "--val_share", "0.2"])
    assert len(read(tmp_path / "out/rl_train.jsonl")) > 30


def test_mix(script, tmp_path, capsys):
    for name, n in (("a", 0), ("b", 20)):
        rows = [MADE["alpaca"][1](i) for i in range(n, n + 60)]
        script("alpaca").main(["--train", put(tmp_path / f"{name}.jsonl", rows), "--out",
                               f"{tmp_path}/{name}", "--val_share", "0.1" if n else "0.3"])
    script("mix").main([f"{tmp_path}/a", f"{tmp_path}/b", "--out", f"{tmp_path}/mix"])
    train, val = ([r["prompt"] for r in read(tmp_path / f"mix/sft_{p}.jsonl")]
                  for p in ("train", "val"))
    assert not set(train) & set(val) and len(set(train) | set(val)) == 80
    assert "held out elsewhere" in capsys.readouterr().out


# ---------------------------------------------------------------------------- text


@pytest.fixture
def text(script, tmp_path, bpe, monkeypatch):
    """text(sources, flags) runs data/text.py on pieces of some documents -> its folder."""
    module = script("text")
    monkeypatch.setattr(module, "PIECE", 500)
    monkeypatch.setattr(module, "SECONDS", 0)

    def text(*args, out="text", workers=1):
        module.main([*map(str, args), "--tokenizer", bpe, "--val_share", "0.1", "--workers",
                     str(workers), "--out", f"{tmp_path}/{out}"])
        return tmp_path / out
    text.module = module
    return text


def documents_of(folder):
    tokenizer = kernel.load_tokenizer(folder / "tokenizer.json")
    found = {}
    for part in ("train", "val"):
        ids = kernel.read_tokens(str(folder / f"{part}.bin"), tokenizer).tolist()
        assert ids[-1] == tokenizer.end
        ends = [i for i, t in enumerate(ids) if t == tokenizer.end]
        found[part] = [tokenizer.decode(ids[a + 1 : b]) for a, b in zip([-1, *ends], ends)]
    return found


@pytest.mark.parametrize("file", ["d.jsonl", "d.jsonl.gz", "d.jsonl.zst", "d.json", "d.parquet",
                                  "d.txt", "d.txt.gz"])
def test_text(text, tmp_path, file, capsys):
    """Every document comes back whole, in order, on the side that its own hash says."""
    documents = DOCUMENTS + ["", " \n", "Not a tag: <|end|><think>"]
    if ".txt" in file:
        whole = "<|endoftext|>".join(f"{d}\n" for d in documents).encode()
        (tmp_path / file).write_bytes(gzip.compress(whole) if file.endswith("gz") else whole)
    else:
        put(tmp_path / file, [{"text": d, "meta": {"n": 1}} for d in documents])
    found = documents_of(text(tmp_path / file, workers=2))
    draw = text.module.draw
    for part, side in found.items():
        assert side == [d for d in documents if d.strip() and (draw(d) < 0.1) == (part == "val")]
    assert f"203 documents read, 201 kept ({len(found['train'])} train, {len(found['val'])} val)" \
        ", 2 dropped (empty)" in capsys.readouterr().out


def test_text_folder_and_tokens(text, tmp_path, capsys):
    """Folders are read in order and say what they leave out; --tokens stops; other keys."""
    (tmp_path / "c/deep").mkdir(parents=True)
    put(tmp_path / "c/a.jsonl", [{"body": d} for d in DOCUMENTS[:90]])
    put(tmp_path / "c/deep/b.parquet", [{"body": d} for d in DOCUMENTS[90:]])
    (tmp_path / "c/readme.rst").write_text("not this")
    all_of_it = documents_of(text(tmp_path / "c", "--key", "body"))
    assert all_of_it["train"] == [d for d in DOCUMENTS if text.module.draw(d) >= 0.1]
    assert "1 of 3 files are not" in capsys.readouterr().out
    some = documents_of(text(tmp_path / "c", "--key", "body", "--tokens", 2000, out="some"))
    n = np.fromfile(tmp_path / "some/train.bin", np.uint16).size
    assert some["train"] == all_of_it["train"][: len(some["train"])] and 2000 <= n < 3000


def test_text_continues(text, tmp_path, monkeypatch, refuses, capsys):
    """Interrupted anywhere, the same command ends in the same bytes; another one is refused; a
    third run has nothing to do."""
    source = tmp_path / "d.jsonl.gz"
    put(source, [{"text": d} for d in DOCUMENTS])
    whole = text(source, out="whole", workers=2)
    read_file = text.module.read_file
    for stop in (40, 41, 130, 199):
        def dies(path, columns):
            for n, row, at in read_file(path, columns):
                if n == stop:
                    raise KeyboardInterrupt
                yield n, row, at
        monkeypatch.setattr(text.module, "read_file", dies)
        refuses(lambda: text(source), "the same command continues", code=130)
        assert not (tmp_path / "text/train.bin").exists()
        state = json.loads((tmp_path / "text/text.part.json").read_text())
        assert 0 < state["position"]["row"] < stop
        with open(tmp_path / "text/train.bin.part", "ab") as f:
            f.write(b"what a kill had not recorded")
    monkeypatch.setattr(text.module, "read_file", read_file)
    refuses(lambda: text(source, "--tokens", 5), "an unfinished run with other tokens",
            "text.part.json", "--out")
    for part in ("train", "val"):
        assert (text(source) / f"{part}.bin").read_bytes() == (whole / f"{part}.bin").read_bytes()
    text(source)
    assert capsys.readouterr().out.endswith("text is up to date\n")
    assert not list((tmp_path / "text").glob("*.part*"))
    (tmp_path / "text/text.json").write_text("{")
    refuses(lambda: text(source), "text.json is damaged: delete it")


DIES = """
import os, text
text.SECONDS, text.PIECE, save, saved = 0, 500, text.record_state, []
def record_state(*args):
    save(*args)
    saved.append(1)
    if len(saved) == 3:
        os.kill(os.getpid(), 9)
text.record_state = record_state
text.main()
"""


def test_text_survives_a_kill(text, tmp_path, bpe):
    """kill -9 of the command while it works: its workers leave, and it ends in the same bytes."""
    put(tmp_path / "d.jsonl", [{"text": d} for d in DOCUMENTS])
    args = [str(tmp_path / "d.jsonl"), "--tokenizer", bpe, "--workers", "2", "--val_share", "0.1",
            "--out", f"{tmp_path}/killed"]
    run = subprocess.run([sys.executable, "-c", DIES, *args], stdout=subprocess.DEVNULL,
                         env=os.environ | {"PYTHONPATH": str(ROOT / "data")})
    assert run.returncode == -9
    assert json.loads((tmp_path / "killed/text.part.json").read_text())["position"]
    assert not (tmp_path / "killed/train.bin").exists()
    text.module.main(args)
    text.module.main([*args[:-1], f"{tmp_path}/whole"])
    for part in ("train", "val"):
        assert (tmp_path / f"killed/{part}.bin").read_bytes() == (
            tmp_path / f"whole/{part}.bin").read_bytes()
    end = time.monotonic() + 90
    alive = lambda: [p for p in Path("/proc").glob("[0-9]*/cmdline") if said_by(p, tmp_path)]
    while alive() and time.monotonic() < end:
        time.sleep(0.1)
    assert not alive()


def said_by(cmdline, tmp_path):
    try:
        return f"{tmp_path}/killed" in cmdline.read_text()
    except OSError:
        return False


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_hub_stream(text, tmp_path, monkeypatch, refuses, kind):
    """A streamed Hub data set (here a local one behind the same call) continues as files do."""
    import datasets
    path = put(tmp_path / f"d.{kind}", [{"text": d} for d in DOCUMENTS])
    load, asked = datasets.load_dataset, []

    def from_here(hub, config, split, streaming):
        asked.append((hub, config, split))
        return load("json" if kind == "jsonl" else kind, data_files=path, split=split,
                    streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", from_here)
    monkeypatch.setattr(importlib.import_module("common"), "reachable", lambda: True)
    whole, text_of = text(path, out="whole"), text.module.text_of

    def dies(row, key, where):
        if where.endswith("row 77"):
            raise KeyboardInterrupt
        return text_of(row, key, where)

    monkeypatch.setattr(text.module, "text_of", dies)
    refuses(lambda: text("fineweb-edu"), "stopped after", code=130)
    state = json.loads((tmp_path / "text/text.part.json").read_text())
    assert 0 < state["position"]["read"] < 77
    monkeypatch.setattr(text.module, "text_of", text_of)
    assert documents_of(text("fineweb-edu")) == documents_of(whole)
    assert asked == 2 * [("HuggingFaceFW/fineweb-edu", "sample-10BT", "train")]


def test_tokenizers(script, tmp_path, bpe, refuses):
    """--tokenizer: a checkpoint's, a tokenizer.json, and gpt2 where its files can be had."""
    find = script("common").find_tokenizer
    spec = {"kind": "chars", "chars": "ab"}
    kernel.save(f"{tmp_path}/some.pt", model={}, gpt={}, tokenizer=spec)
    assert find(f"{tmp_path}/some.pt").encode("ba") == [1, 0]
    assert find(bpe).decode(find(bpe).encode("café")) == "café"
    (tmp_path / "bad.json").write_text('{"model": 1}')
    refuses(lambda: find(str(tmp_path / "bad.json")), "bad.json holds no tokenizer that works")
    refuses(lambda: find(str(tmp_path / "none.json")), "is missing")
    refuses(lambda: find("gpt5"), "expected gpt2")
    if "TIKTOKEN_CACHE_DIR" not in os.environ:
        pytest.skip("gpt2: tiktoken's files are looked for only where TIKTOKEN_CACHE_DIR is set")
    gpt2 = find("gpt2")
    assert gpt2.encode("Hello world") == [15496, 995] and gpt2.end == 50257


# ---------------------------------------------------------------------------- errors


@pytest.mark.parametrize("name, rows, parts", [
    ("alpaca", [{"text": "x"}], ["line 1", "'instruction'"]),
    ("alpaca", [{"instruction": "x", "input": "", "output": 7}], ["'output' is no text"]),
    ("alpaca", [["x"]], ["line 1", "not an object"]),
    ("alpaca", [], ["no rows"]),
    ("messages", [{"prompt": "x"}], ["'messages'"]),
    ("messages", [{"messages": "x"}], ["the last turn is not the assistant's"]),
    ("pairs", [{"chosen": "a", "rejected": "b"}], ["no 'prompt'"]),
    ("pairs", [{"prompt": "a", "chosen": "b"}], ["no 'rejected'"]),
    ("svamp", [{"Body": "x", "Question": "y"}], ["'Answer'"])])
def test_wrong_rows(script, tmp_path, refuses, name, rows, parts):
    refuses(lambda: prepare(script, name, rows, tmp_path), *parts)
    assert not (tmp_path / "out").exists()


def test_wrong_files(script, text, tmp_path, refuses):
    alpaca = lambda *args: (lambda: script("alpaca").main([*map(str, args)]))
    rows = [MADE["alpaca"][1](i) for i in range(60)]
    good = put(tmp_path / "r.jsonl", rows)
    refuses(alpaca("--train", tmp_path / "none.json"), "none.json is missing")
    refuses(alpaca("--train", put(tmp_path / "r.xml", rows)), "unknown format", ".parquet")
    (tmp_path / "bad.jsonl").write_text('{"instruction": "x"\n')
    refuses(alpaca("--train", tmp_path / "bad.jsonl"), "bad.jsonl, line 1: not JSON")
    for name in ("r.jsonl.gz", "r.jsonl.zst", "r.parquet"):
        cut = Path(put(tmp_path / name, rows))
        cut.write_bytes(cut.read_bytes()[:-20])
        what = "cannot be read as parquet" if "parquet" in name else "is truncated or damaged"
        refuses(alpaca("--train", cut, "--out", tmp_path / "o"), name, what)
    refuses(alpaca("--train", good, "--out", good), "is a file")
    refuses(alpaca("--train", good, "--val_share", 1), "--val_share")
    refuses(alpaca("--train", put(tmp_path / "1.jsonl", rows[:1]), "--out", tmp_path / "o"),
            "leave nothing for train or val")
    assert not (tmp_path / "o").exists()
    refuses(lambda: text("pille"), "unknown source 'pille'", "fineweb-edu", "Hub id")
    refuses(lambda: text("corpus/none.jsonl"), "is missing")
    refuses(lambda: text(good), "line 1: no text under 'text'", "it has instruction", "--key")
    (tmp_path / "one.txt").write_text("one document")
    refuses(lambda: text(tmp_path / "one.txt"), "--val_share", "--separator")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    refuses(lambda: text(tmp_path / "latin.txt", out="latin"), "not UTF-8")
    refuses(lambda: text(good, "--separator", "("), "no regular expression")


def test_no_hub(script, text, monkeypatch, refuses, tmp_path):
    """It says so, and how to do without."""
    import datasets

    def cannot(hub, *args, **kwargs):
        raise ConnectionError(f"Couldn't reach '{hub}' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", cannot)
    monkeypatch.setattr(script("common"), "reachable", lambda: False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = ["--out", str(tmp_path / "hub")]
    for name in ("alpaca", "dolly", "hh", "ultrafeedback", "svamp", "hendrycks_math"):
        refuses(lambda: script(name).main(out), "cannot be reached", "--train FILE")
    refuses(lambda: text("pile"), "monology/pile-uncopyrighted", "cannot be reached",
            "data/text.py FILE")
    refuses(lambda: script("messages").main(out), "--train FILE", "--hub owner/name")
    monkeypatch.setitem(sys.modules, "datasets", None)             # as where it is not installed
    refuses(lambda: script("alpaca").main(out), "tatsu-lab/alpaca", "--train FILE")
    assert not (tmp_path / "hub").exists()


# ---------------------------------------------------------------------------- the stages


def test_the_stages_read_them(script, text, tmp_path, stages):
    """00 on the text, 01 on Alpaca, 03 on HH-RLHF, by their own flags, with BPE."""
    put(tmp_path / "d.jsonl", [{"text": d} for d in DOCUMENTS])
    data = {"00_pretrain": text(tmp_path / "d.jsonl")}
    for stage, name in (("01_sft", "alpaca"), ("03_dpo", "hh")):
        rows = [MADE[name][1](i) for i in range(60)]
        data[stage] = tmp_path / name
        script(name).main(["--train", put(tmp_path / f"{name}.jsonl", rows), "--out",
                           str(data[stage]), "--val_share", "0.2"])
    small = dict(out=str(tmp_path / "run"), steps=2, batch_size=4, device="cpu")
    shape = dict(n_layer=1, n_head=2, n_embd=16, block_size=128, window=32)
    for name, folder in data.items():
        more = shape if name == "00_pretrain" else {"init": f"{tmp_path}/run/00_pretrain.pt"}
        run(stages[name], stages[name].Config(data=str(folder), **small, **more))
        assert len(steps_of(tmp_path / f"run/{name}.jsonl")) == 2


def test_within_reach(script, chain, data, tmp_path, capsys, monkeypatch, refuses):
    """1 to 7 right of 8 samples stay; what was tried is not tried again, also after a stop."""
    reach, asked = script("within_reach"), Counter()
    monkeypatch.setattr(reach, "AT_ONCE", 2)
    questions = [row["prompt"] for row in read(f"{data}/rl_train.jsonl")][:6]
    rows = [{"prompt": q, "answer": str(n)} for q, n in zip(questions, (0, 1, 8, 7, 5, 4))]
    write_rows(tmp_path / "rl_train.jsonl", rows)

    def verdict(text, answer):                    # its answer says how often a prompt is solved
        asked[answer] += 1
        return float(asked[answer] <= int(answer))

    monkeypatch.setattr(reach, "verify", verdict)
    flags = [f"{chain}/02_cot.pt", "--rows", f"{tmp_path}/rl_train.jsonl", "--max_new", "4"]
    monkeypatch.setattr(reach, "interrupted", lambda: sum(asked.values()) == 16)
    with pytest.raises(SystemExit) as stop:
        reach.main([*flags, "--want", "0"])
    assert stop.value.code == 130 and not (tmp_path / "rl_reach.jsonl").exists()
    monkeypatch.setattr(reach, "interrupted", lambda: False)
    reach.main([*flags, "--want", "2"])
    assert [row["right"] for row in read(tmp_path / "rl_reach.jsonl")] == [1, 7]
    reach.main([*flags, "--want", "0"])
    wanted = [row for row in rows if row["answer"] not in "08"]
    assert read(tmp_path / "rl_reach.jsonl") == [dict(r, right=int(r["answer"])) for r in wanted]
    assert set(asked.values()) == {8}
    assert "6 prompts tried, 4 kept, 1 dropped (never right), 1 dropped (always right)" in (
        capsys.readouterr().out)
    write_rows(tmp_path / "rl_train.jsonl", rows[:1])
    refuses(lambda: reach.main([*flags, "--seed", "1"]), "solves no prompt")
