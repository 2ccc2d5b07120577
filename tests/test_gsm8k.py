"""data/gsm8k.py on rows in the source's own format, and the stages on what it writes."""
import json

import pytest
from conftest import CHARS, kernel, run, steps_of, write_rows
from test_data import read

ROWS = [{"question": "Ann has 12 nuts and finds 5. How many?",
         "answer": "She has 12+5 = <<12+5=17>>17 nuts.\n#### 17"},
        {"question": "A coat is $1,000, now half. Price?",
         "answer": "Half of 1000 is <<1000/2=500>>500.\nSo it is $<<500=500>>500.\n#### 1,500"},
        {"question": "No mark here?", "answer": "It is 3."},
        {"question": "A tag?", "answer": "It is <think>3.\n#### 3"},
        {"question": "No number?", "answer": "It is red.\n#### red"}]


@pytest.fixture
def gsm8k(script, tmp_path):
    """gsm8k(train rows, test rows) runs it; characters stand in for gpt2."""
    letters = "".join(sorted(set(CHARS) | set("ABCDEFGHIJKLMNOPQRSTUVWXYZ'")))
    (tmp_path / "tokenizer.json").write_text(json.dumps({"kind": "chars", "chars": letters}))

    def gsm8k(train, test, *more):
        for name, rows in (("train", train), ("test", test)):
            write_rows(tmp_path / f"{name}.jsonl", rows)
        script("gsm8k").main([
            "--train", f"{tmp_path}/train.jsonl", "--test", f"{tmp_path}/test.jsonl",
            "--tokenizer", f"{tmp_path}/tokenizer.json", "--out", f"{tmp_path}/out", *more])
        return tmp_path / "out"
    return gsm8k


def many(n):
    return [dict(ROWS[i % 2], question=f"Question {i} is of val?") for i in range(n)]


def test_rows(gsm8k, capsys):
    """Calculator marks go, the answer is after ####, what has none (or says a tag) is counted."""
    out = gsm8k(ROWS + many(40), [dict(ROWS[0], question="Another?")])
    said = capsys.readouterr().out
    assert "train: 45 rows read, 42 kept, 3 dropped" in said
    assert "1 no answer after '####'" in said and "1 a tag in the completion" in said
    assert "1 the answer is not a number" in said
    made = {kind: [row for part in ("train", "val") for row in read(out / f"{kind}_{part}.jsonl")
                   if row["prompt"] in (ROWS[0]["question"], ROWS[1]["question"])]
            for kind in ("cot", "sft", "rl")}
    traced = "<think>She has 12+5 = 17 nuts.</think><answer>17</answer>"
    assert {"prompt": ROWS[0]["question"], "completion": traced} in made["cot"]
    assert {"prompt": ROWS[0]["question"], "completion": "<answer>17</answer>"} in made["sft"]
    assert {"prompt": ROWS[1]["question"], "answer": "1500", "steps": 2} in made["rl"]
    assert not (out / "cot_test.jsonl").exists()                   # the test file is only asked
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    gsm8k(ROWS + many(40), [dict(ROWS[0], question="Another?")])
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before


def test_equal_questions_never_straddle(gsm8k, capsys):
    rows = many(40)
    shouted = [dict(row, question=row["question"].upper().replace(" ", "  ")) for row in rows]
    out = gsm8k(rows + shouted, rows[:3])
    assert "6 more dropped (their prompts are in test)" in capsys.readouterr().out
    train, val = ({" ".join(row["prompt"].lower().split()) for row in read(out / f"rl_{s}.jsonl")}
                  for s in ("train", "val"))
    assert train and val and not train & val and len(train | val) == 37


@pytest.mark.parametrize("rows, part", [(ROWS[2:3], "####"), ([{"question": "x"}], "'answer'")])
def test_other_rows_are_refused(gsm8k, tmp_path, refuses, rows, part):
    refuses(lambda: gsm8k(rows, rows), part)
    assert not list((tmp_path / "out").glob("*.jsonl"))


def test_the_stages_read_them(gsm8k, tmp_path, stages):
    """00, 01, 02 and 04 for two steps on these files, by their own names and flags."""
    data, out = str(gsm8k(ROWS[:2] + many(40), ROWS[:2])), str(tmp_path / "run")
    small = dict(data=data, out=out, steps=2, batch_size=4, device="cpu")
    pretrain = stages["00_pretrain"]
    run(pretrain, pretrain.Config(**small, n_layer=1, n_head=2, n_embd=16, block_size=200,
                                  window=32))
    for name, init, more in [("01_sft", "00_pretrain", {}), ("02_cot", "01_sft", {}),
                             ("04_rlvr", "02_cot", dict(group_size=2, max_new=16, eval_rows=2))]:
        stage = stages[name]
        run(stage, stage.Config(**small, **more, init=f"{out}/{init}.pt"))
        assert len(steps_of(f"{out}/{name}.jsonl")) == 2
    assert kernel.read_tokens(f"{data}/val.bin", kernel.load_tokenizer(f"{data}/tokenizer.json"))[
        -1] == kernel.load_tokenizer(f"{data}/tokenizer.json").end
