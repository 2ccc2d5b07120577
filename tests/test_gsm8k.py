"""data/gsm8k.py on rows in the source's own format, and the stages on what it writes."""
import importlib.util
import json
import sys

import pytest
from conftest import CHARS, ROOT, kernel, run, steps_of, write_rows

ROWS = [{"question": "Ann has 12 nuts and finds 5. How many?",
         "answer": "She has 12+5 = <<12+5=17>>17 nuts.\n#### 17"},
        {"question": "A coat is $1,000, now half. Price?",
         "answer": "Half of 1000 is <<1000/2=500>>500.\nSo it is $<<500=500>>500.\n#### 1,500"},
        {"question": "No mark here?", "answer": "It is 3."},
        {"question": "A tag?", "answer": "It is <think>3.\n#### 3"}]


@pytest.fixture
def gsm8k(monkeypatch):
    """The script as a module; characters stand in for tiktoken's files, which need the network."""
    monkeypatch.syspath_prepend(ROOT / "data")
    spec = importlib.util.spec_from_file_location("gsm8k", ROOT / "data/gsm8k.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    letters = "".join(sorted(set(CHARS) | set("ABCDEFGHIJKLMNOPQRSTUVWXYZ'")))
    monkeypatch.setattr(module, "Tokenizer",
                        lambda _: kernel.Tokenizer({"kind": "chars", "chars": letters}))
    yield module
    sys.modules.pop("common", None)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows(gsm8k, tmp_path, capsys):
    """Calculator marks go, the answer is after ####, what has none (or says a tag) is counted."""
    write_rows(tmp_path / "train.jsonl", ROWS[1:2] + ROWS)
    write_rows(tmp_path / "test.jsonl", ROWS[:1])
    gsm8k.main(str(tmp_path / "train.jsonl"), str(tmp_path / "test.jsonl"), out=tmp_path / "out")
    assert "train: 5 rows read, 3 kept, 2 dropped" in capsys.readouterr().out
    cot = read(tmp_path / "out/cot_train.jsonl")
    assert cot[0] == {"prompt": ROWS[0]["question"], "completion":
                      "<think>She has 12+5 = 17 nuts.</think><answer>17</answer>"}
    assert read(tmp_path / "out/sft_train.jsonl")[0]["completion"] == "<answer>17</answer>"
    rl = read(tmp_path / "out/rl_train.jsonl")
    assert rl[1] == {"prompt": ROWS[1]["question"], "answer": "1500", "steps": 2}
    assert len(read(tmp_path / "out/rl_val.jsonl")) == 1           # one row in twenty, the first
    assert not (tmp_path / "out/cot_test.jsonl").exists()          # the test file is only asked
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    gsm8k.main(str(tmp_path / "train.jsonl"), str(tmp_path / "test.jsonl"), out=tmp_path / "out")
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("rows, part", [(ROWS[2:3], "####"), ([{"question": "x"}], "'answer'")])
def test_other_rows_are_refused(gsm8k, tmp_path, refuses, rows, part):
    write_rows(tmp_path / "train.jsonl", rows)
    refuses(lambda: gsm8k.main(str(tmp_path / "train.jsonl"), str(tmp_path / "train.jsonl"),
                               out=tmp_path / "out"), part)
    assert not list((tmp_path / "out").glob("*.jsonl"))


def test_no_network(gsm8k, tmp_path, refuses, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)             # as an import that fails
    refuses(lambda: gsm8k.main(out=tmp_path / "out"), "--train FILE", "openai/gsm8k")


def test_the_stages_read_them(gsm8k, tmp_path, stages):
    """00, 01, 02 and 04 for two steps on these files, by their own names and flags."""
    write_rows(tmp_path / "train.jsonl", ROWS[:2] * 20)
    write_rows(tmp_path / "test.jsonl", ROWS[:2])
    data, out = tmp_path / "data", str(tmp_path / "out")
    gsm8k.main(str(tmp_path / "train.jsonl"), str(tmp_path / "test.jsonl"), out=data)
    small = dict(data=str(data), out=out, steps=2, batch_size=4, device="cpu")
    pretrain = stages["00_pretrain"]
    run(pretrain, pretrain.Config(**small, n_layer=1, n_head=2, n_embd=16, block_size=200,
                                  window=32))
    for name, init, more in [("01_sft", "00_pretrain", {}), ("02_cot", "01_sft", {}),
                             ("04_rlvr", "02_cot", dict(group_size=2, max_new=16, eval_rows=2))]:
        stage = stages[name]
        run(stage, stage.Config(**small, **more, init=f"{out}/{init}.pt"))
        assert len(steps_of(f"{out}/{name}.jsonl")) == 2
