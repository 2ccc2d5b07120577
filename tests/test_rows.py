"""What a row means: each field that changes it is used, or the row is dropped and counted, or
refused with its line; the same for turns, answers and questions."""
import json

import pytest
from conftest import DOCUMENTS, ROLLOUTS, kernel, write_rows
from test_data import MADE, put, read

U, A = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}
SYSTEM = {"role": "system", "content": "Be brief."}
PAIR = {"prompt": "Hi", "chosen": "Yes", "rejected": "No"}
TASK = {"instruction": "Add", "output": "5"}


def says(thought):
    return {"messages": [U, dict(A, **thought)]}


def convert(script, name, row):
    """One row through a preparer -> the new row, or why it is dropped."""
    rows, known = script("rows"), {}
    module = script(name)
    rows_prepare = rows.prepare
    try:
        module.prepare = lambda args, maker, kind, convert, fields=(): known.update(
            convert=convert, fields=fields)
        module.main(["--train", "x"])
    finally:
        module.prepare = rows_prepare
    try:
        return rows.converted(row, known["convert"], known["fields"])
    except rows.Drop as why:
        return str(why)


PARTS = [{"type": "text", "text": "Y"}, {"type": "text", "text": "es"}]
USED = [
    ("alpaca", TASK, {"prompt": "Add", "completion": "5"}),
    ("alpaca", dict(TASK, input="2+3"), {"prompt": "Add\n\n2+3", "completion": "5"}),
    ("alpaca", dict(TASK, input=None, system="", history=[]), {"prompt": "Add", "completion": "5"}),
    ("alpaca", dict(TASK, system="Be brief.", history=[["Hi", "Yes"]]),
     {"messages": [SYSTEM, U, A, dict(U, content="Add"), dict(A, content="5")]}),
    ("messages", {"messages": [U, A], "system": "Be brief."}, {"messages": [SYSTEM, U, A]}),
    ("messages", {"messages": [SYSTEM, U, A], "system": "Be brief."}, {"messages": [SYSTEM, U, A]}),
    ("messages", {"messages": [dict(SYSTEM, role="developer"), U, A], "tools": "[]", "id": 3},
     {"messages": [SYSTEM, U, A]}),
    ("messages", {"messages": [U, dict(A, content=PARTS)]}, {"messages": [U, A]}),
    ("messages", says({"reasoning_content": " It asks. "}),
     {"messages": [U, dict(A, content="<think>It asks.</think>Yes")]}),
    ("messages", says({"thinking": "It asks.", "reasoning": "It asks."}),
     {"messages": [U, dict(A, content="<think>It asks.</think>Yes")]}),
    ("messages", says({"content": PARTS, "thinking": "It asks."}),
     {"messages": [U, dict(A, content="<think>It asks.</think>Yes")]}),
    ("messages", {"messages": [dict(U, weight=0), dict(A, weight=1, train=True, name=None)]},
     {"messages": [U, A]}),
    ("messages", {"prompt": "Hi", "completion": " Yes"}, {"messages": [U, A]}),
    ("messages", {"prompt": "Hi", "completion": "Yes", "reasoning": "It asks."},
     {"messages": [U, dict(A, content="<think>It asks.</think>Yes")]}),
    ("messages", {"messages": None, "conversations": [
        {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes", "loss": True}]},
     {"messages": [U, A]}),
    ("messages", {"prompt": [SYSTEM, U], "completion": [A], "label": True},
     {"messages": [SYSTEM, U, A]}),
    ("pairs", {"instruction": "Add", "input": "2+3", "chosen": "5", "rejected": "6"},
     {"prompt": [dict(U, content="Add\n\n2+3")], "chosen": "5", "rejected": "6"}),
    ("pairs", dict(PAIR, system="Be brief.", history=[["Ho", "Hu"]]),
     {"prompt": [SYSTEM, dict(U, content="Ho"), dict(A, content="Hu"), U], "chosen": "Yes",
      "rejected": "No"}),
    ("pairs", {"prompt": "Hi", "chosen": [SYSTEM, U, A], "rejected": [SYSTEM, U,
                                                                     dict(A, content="No")]},
     {"prompt": [SYSTEM, U], "chosen": "Yes", "rejected": "No"}),
    ("pairs", dict(PAIR, score_chosen=2, score_rejected=1, label=1),
     {"prompt": [U], "chosen": "Yes", "rejected": "No"}),
]


@pytest.mark.parametrize("name, row, expected", USED)
def test_used(script, name, row, expected):
    assert convert(script, name, row) == expected


LOST = [
    ("alpaca", dict(TASK, tools=[{"name": "f"}]), "tools"),
    ("alpaca", dict(TASK, label=False), "label is false"),
    ("alpaca", dict(TASK, weight=0.5), "weight"),
    ("dolly", {"instruction": "x", "context": "", "response": "y", "category": "",
               "system": "Be brief."}, "system"),
    ("gsm8k", {"question": "x?", "answer": "y\n#### 5", "history": [["a", "b"]]}, "history"),
    ("svamp", dict(MADE["svamp"][1](1), system="Be brief."), "system"),
    ("hendrycks_math", {"problem": "x", "answer": "5", "image": "x.png"}, "image"),
    ("hh", dict(MADE["hh"][1](1), label=0), "label is false"),
    ("messages", {"messages": [U, A], "label": False}, "label is false"),
    ("messages", {"messages": [U, A], "kto_tag": "false"}, "label is false"),
    ("messages", {"messages": [U, A], "tools": [{"name": "f"}]}, "tools"),
    ("messages", {"messages": [U, A], "functions": "[{}]"}, "functions"),
    ("messages", {"messages": [U, A], "history": [["a", "b"]]}, "history"),
    ("messages", {"messages": [U, A], "chat_template_kwargs": {"enable_thinking": False}},
     "chat_template_kwargs"),
    ("messages", {"messages": [SYSTEM, U, A], "system": "Be long."}, "two system texts"),
    ("messages", says({"tool_calls": [{"id": 1}]}), "tool_calls"),
    ("messages", says({"content": None, "function_call": {"name": "f"}}), "function_call"),
    ("messages", says({"weight": 0}), "weight"),
    ("messages", says({"weight": 0.5}), "weight"),
    ("messages", says({"train": False}), "weight is not what"),
    ("messages", {"messages": [dict(U, train=True), A]}, "weight is not what"),
    ("messages", {"messages": [dict(U, name="Ann"), A]}, "name"),
    ("messages", {"messages": [U, dict(A, role="tool"), A]}, "a role other"),
    ("messages", {"messages": [dict(U, reasoning_content="Hm"), A]}, "two reasonings, or one"),
    ("messages", says({"reasoning": "a", "thinking": "b"}), "two reasonings"),
    ("messages", says({"reasoning": "a", "content": "<think>b</think>c"}), "two reasonings"),
    ("messages", says({"reasoning": "a</think>"}), "a tag"),
    ("messages", says({"content": [{"type": "image_url", "image_url": "x"}]}), "is not text"),
    ("messages", {"prompt": "Hi", "completion": " "}, "empty text"),
    ("messages", {"messages": []}, "not the assistant's"),
    ("messages", {"messages": [U, A], "thinking": "Hm"}, "a reasoning beside"),
    ("messages", says({"loss": False}), "weight is not what"),
    ("messages", says({"refusal": "No."}), "refusal"),
    ("alpaca", dict(TASK, reasoning="Hm"), "reasoning"),
    ("pairs", dict(PAIR, context="Once."), "context"),
    ("pairs", dict(PAIR, input="2+3"), "an input beside the prompt"),
    ("pairs", dict(PAIR, tools=["f"]), "tools"),
    ("pairs", dict(PAIR, label=False), "label is false"),
    ("pairs", dict(PAIR, score_chosen=1, score_rejected=2), "the lower score"),
    ("pairs", dict(PAIR, chosen=[dict(A, reasoning_content="Hm")]), "a tag"),
    ("pairs", {"prompt": "Ho", "chosen": [U, A], "rejected": [U, dict(A, content="No")]},
     "the prompt differs"),
    ("pairs", dict(PAIR, chosen=[U, A, U]), "not the assistant's"),
    ("ultrafeedback", dict(PAIR, system="x", history=None), "system"),
]


@pytest.mark.parametrize("name, row, why", LOST)
def test_dropped(script, tmp_path, capsys, monkeypatch, name, row, why):
    if name == "gsm8k":                                  # it has files of its own to write
        rows = script("rows")
        with pytest.raises(rows.Drop, match=why):
            rows.converted(row, None, ())
        return
    assert why in convert(script, name, row)


@pytest.mark.parametrize("name, row, what", [
    ("pairs", {"prompt": "x", "completion": "y", "label": True}, "is no pair"),
    ("messages", {"messages": {"role": "user"}}, "a dialogue is"),
    ("messages", {"messages": [dict(U, content={"text": "x"}), A]}, "'content' is no text"),
    ("messages", says({"thinking": ["Hm"]}), "'thinking' is no text"),
    ("messages", {"messages": [U, A], "system": ["x"]}, "'system' is no text"),
    ("alpaca", dict(TASK, history=["a", "b"]), "'history'"),
    ("alpaca", dict(TASK, output=5), "'output' is no text")])
def test_refused(script, tmp_path, refuses, name, row, what):
    path = put(tmp_path / "r.jsonl", [row])
    refuses(lambda: script(name).main(["--train", path, "--out", f"{tmp_path}/o"]),
            f"{path}, line 1: ", what)
    assert not (tmp_path / "o").exists()


# ---------------------------------------------------------------------------- rows of the stages

SFT = ("messages|prompt", "messages|completion")
PAIRS, RL = ("prompt", "chosen", "rejected"), ("prompt", "answer")


def as_stage(path, keys):
    """The rows through read_rows, and their turns through the tokenizer, as a stage does it."""
    tok = kernel.Tokenizer({"kind": "chars", "chars": "".join(sorted(set("".join(DOCUMENTS)
                            + "HiYesNoBbrf.0123456789 <think>/?;")))})

    def encode(row):
        if keys == SFT:
            messages = row.get("messages") or kernel.turns(row["prompt"]) + [
                {"role": "assistant", "content": row["completion"]}]
            return [tok.chat(messages)]
        return [(tok.prompt(row["prompt"]), row)]

    rows = kernel.read_rows(str(path), *keys)
    return rows, kernel.encode_rows(rows, str(path), encode, 1000)


@pytest.mark.parametrize("keys, row, what", [
    (SFT, {"messages": [U, dict(A, weight=0)]}, "turn 2: no stage uses its 'weight'"),
    (SFT, {"messages": [U, dict(A, tool_calls=[1])]}, "'tool_calls'"),
    (SFT, {"messages": [U, dict(A, reasoning_content="Hm")]}, "'reasoning_content'"),
    (SFT, {"messages": [dict(U, name="Ann"), A]}, "turn 1: no stage uses its 'name'"),
    (SFT, {"messages": [U, A, dict(U, role="end")]}, "turn 3: its role is 'end'"),
    (SFT, {"messages": [U, dict(A, role=["assistant"])]}, "turn 2: its role is"),
    (SFT, {"messages": [U, A, "x"]}, "turn 3: its role is none"),
    (SFT, {"messages": [U, dict(A, content={"a": 1})]}, "turn 2: a content is a text"),
    (SFT, {"messages": [U, dict(A, content=[{"type": "image"}])]}, "turn 2: a content is a text"),
    (SFT, {"messages": [U, A, U]}, "the last turn is not the assistant's"),
    (SFT, {"messages": [U, A, A]}, "follows another of its turns"),
    (SFT, {"messages": "hello"}, "turns are a text, or a list"),
    (SFT, {"messages": False}, "turns are a text, or a list"),
    (SFT, {"messages": {}, "prompt": "Hi"}, "no 'messages or completion', or empty"),
    (SFT, {"messages": [U, A], "system": "Be brief."}, "no stage uses 'system'"),
    (SFT, {"messages": [U, A], "tools": ["f"]}, "no stage uses 'tools'"),
    (SFT, {"prompt": "Hi", "completion": "Yes", "input": "x"}, "no stage uses 'input'"),
    (SFT, {"prompt": "Hi", "completion": "Yes", "history": [["a", "b"]]}, "'history'"),
    (SFT, {"prompt": "Hi", "completion": "Yes", "thinking": "Hm"}, "'thinking'"),
    (SFT, {"prompt": "Hi", "completion": "Yes", "label": False}, "its label is false"),
    (SFT, {"prompt": "Hi", "completion": 5}, "completion: turns are a text"),
    (SFT, {"prompt": "Hi", "completion": [U]}, "completion: its last turn is not"),
    (SFT, {"prompt": 5, "completion": "x"}, "turns are a text"),
    (SFT, {"prompt": [U, A], "completion": "Yes"}, "follows another of its turns"),
    (PAIRS, dict(PAIR, prompt=[U, A]), "the prompt ends with the assistant's turn"),
    (PAIRS, dict(PAIR, prompt=[]), "no 'prompt'"),
    (PAIRS, dict(PAIR, prompt={"role": "user"}), "turns are a text"),
    (PAIRS, dict(PAIR, chosen=[A, U]), "chosen: its last turn is not the assistant's"),
    (PAIRS, dict(PAIR, rejected=[dict(U, content="Ho"), A]), "rejected: the turns before its last"),
    (PAIRS, dict(PAIR, chosen=[U, A, U, A]), "chosen: the turns before its last"),
    (PAIRS, dict(PAIR, chosen={"content": "x"}), "chosen: turns are a text"),
    (PAIRS, dict(PAIR, system="x"), "no stage uses 'system'"),
    (RL, {"prompt": [U, A], "answer": "5"}, "ends with the assistant's turn"),
    *[(RL, {"prompt": "Hi", "answer": bad}, "the answer is a text, a number or a list")
      for bad in (True, False, {"a": 1}, [""], ["5", None], [["5"]], [True], float("nan"),
                  float("inf"), "  ", ["5", " "])],
    (RL, {"prompt": "Hi", "answer": None}, "no 'answer'"),
    (RL, {"prompt": "Hi", "answer": []}, "no 'answer'"),
    (RL, {"prompt": "Hi", "answer": "5", "system": "x"}, "no stage uses 'system'")])
def test_stages_refuse(tmp_path, refuses, keys, row, what):
    good = {SFT: {"prompt": "Hi", "completion": "Yes"}, PAIRS: PAIR,
            RL: {"prompt": "Hi", "answer": "5"}}[keys]
    write_rows(tmp_path / "r.jsonl", [good, row])
    refuses(lambda: as_stage(tmp_path / "r.jsonl", keys), f"{tmp_path}/r.jsonl, line 2: ", what)


def test_stages_take(tmp_path):
    """Parts are joined, completions as messages are texts, fields that say nothing are none."""
    turn = dict(A, content=PARTS, weight=1, name=None)
    sft = [{"messages": [U, turn], "system": "", "tools": []},
           {"prompt": [SYSTEM, U], "completion": [A], "label": True, "meta": {"label": False}}]
    write_rows(tmp_path / "r.jsonl", sft)
    rows, encoded = as_stage(tmp_path / "r.jsonl", SFT)
    assert rows[1]["completion"] == "Yes"
    for [(ids, mask)] in encoded:
        assert sum(mask) == 4                                     # three characters and the end
    dialogue = [SYSTEM, U, A, U]
    pairs = [{"prompt": dialogue, "chosen": dialogue + [dict(A, content=PARTS)], "rejected": "No"},
             {"prompt": dialogue, "chosen": [A], "rejected": dialogue + [dict(A, content="No")]}]
    write_rows(tmp_path / "r.jsonl", pairs)
    assert [(row["chosen"], row["rejected"]) for row in as_stage(tmp_path / "r.jsonl", PAIRS)[0]] \
        == [("Yes", "No")] * 2


def test_nested_json_is_a_line(tmp_path, refuses):
    (tmp_path / "r.jsonl").write_text('{"prompt": "x", "answer": 5}\n' + "[" * 100_000)
    refuses(lambda: kernel.read_rows(str(tmp_path / "r.jsonl"), *RL), "line 2: ", "too deep")


@pytest.mark.parametrize("answer, expected", [
    ("72", "72"), (72, "72"), (-7, "-7"), (0, "0"), (51.0, "51"), (0.1, "0.1"),
    (1e22, "1" + "0" * 22), (1e-7, "0.0000001"), ([29.0], ["29"]),
    (["a", 5, 0.5], ["a", "5", "0.5"])])
def test_answers(tmp_path, answer, expected):
    write_rows(tmp_path / "r.jsonl", [{"prompt": "x", "answer": answer}])
    assert kernel.read_rows(str(tmp_path / "r.jsonl"), *RL)[0]["answer"] == expected


@pytest.mark.parametrize("name", ROLLOUTS)
def test_alternatives_reach_the_verifier(stages, name):
    """A list stays one: as a text it would be right for nobody."""
    tok = kernel.Tokenizer({"kind": "chars", "chars": "Hi"})
    [(_, answer)] = stages[name].encode(tok, {"prompt": "Hi", "answer": ["5", "6"]})
    assert kernel.verify("<answer>6</answer><|end|>", answer) == 1
    assert kernel.verify("<answer>7</answer><|end|>", answer) == 0


# ---------------------------------------------------------------------------- questions

VERL = {"data_source": "x", "prompt": [U], "reward_model": {"ground_truth": "72"},
        "extra": [{"x": 5}], "a.b": "dots"}


@pytest.mark.parametrize("row, flags, expected", [
    ({"sQuestion": " How many? ", "lSolutions": [29.0]}, ["sQuestion", "lSolutions"],
     ("How many?", "29")),
    ({"body": "Ann has 9.", "question": "How many?", "answer": "9 (apples)"},
     ["body", "question", "answer"], ("Ann has 9. How many?", "9 apples")),
    ({"question": "What?", "options": ["A)1", "B)2"], "correct": "B"},
     ["{question}\\n{options}", "correct"], ("What?\nA)1\nB)2", "B")),
    (VERL, ["prompt", "reward_model.ground_truth"], ([U], "72")),
    (VERL, ["data_source", "extra.0.x"], ("x", "5")),
    (VERL, ["a.b", "extra.0.x"], ("dots", "5")),
    ({"nums": [1, 2], "target": 3, "solution": "1+2"},
     ["Make {target} of {nums}?", "solution"], ("Make 3 of 1\n2?", "1+2")),
    ({"q": "x", "a": "It is so.\n#### 1,500"}, ["q", "a"], ("x", "1500")),
    ({"q": "x", "a": ["5.4 \\text{ cents}", "5.40 cents", 5]}, ["q", "a"],
     ("x", ["5.4 cents", "5"])),
    ({"input": "x", "a": 5}, ["input", "a"], ("x", "5")),
    ({"q": "x", "a": None}, ["q", "a"], "no answer"),
    ({"q": "x", "a": " "}, ["q", "a"], "no answer"),
    ({"q": "x", "a": []}, ["q", "a"], "no answer"), ({"q": " ", "a": 5}, ["q", "a"], "empty text"),
    ({"q": "x", "a": "w " * 60}, ["q", "a"], "longer than 100"),
    ({"q": "x", "a": 5, "system": "Be brief."}, ["q", "a"], "system"),
    ({"q": "x", "a": 5, "context": "Once."}, ["q", "a"], "context"),
    ({"q": "x", "a": 5, "context": "Once.", "reasoning": "Hm"}, ["context", "q", "a"],
     ("Once. x", "5")),
    ({"q": [U, A], "a": 5}, ["q", "a"], "not the user's")])
def test_questions(script, row, flags, expected):
    questions, rows = script("questions"), script("rows")
    *prompt, answer = flags
    seen = []
    questions.prepare = lambda args, maker, kind, convert, known: seen.append((convert, known))
    questions.main(["x.jsonl", "--prompt", *prompt, "--answer", answer])
    if isinstance(expected, str):
        with pytest.raises(rows.Drop, match=expected):
            rows.converted(row, *seen[0])
    else:
        assert rows.converted(row, *seen[0]) == dict(zip(("prompt", "answer"), expected))


@pytest.mark.parametrize("row, what", [
    ({"q": "x", "b": 5}, "no 'a' (there is q, b)"), ({"q": "x", "a": True}, "the answer is"),
    ({"q": "x", "a": {"b": 1}}, "the answer is"), ({"q": None, "a": 5}, "'q' is no text"),
    ({"q": {"x": 1}, "a": 5}, "'q' is no text"), ({"q": "x", "a": float("nan")}, "the answer is")])
def test_questions_refuse(script, tmp_path, refuses, row, what):
    path = put(tmp_path / "r.jsonl", [{"q": "y", "a": 5}, row])
    refuses(lambda: script("questions").main([path, "--prompt", "q", "--answer", "a", "--out",
                                              f"{tmp_path}/o"]), f"{path}, line 2: ", what)


@pytest.mark.parametrize("file", ["r.json", "r.jsonl.gz", "r.csv", "r.parquet"])
def test_questions_of_every_format(script, tmp_path, capsys, file):
    """Split by the prompt, with the report that the others have."""
    rows = [{"q": f"How many is {i}?", "a": str(i)} for i in range(60)]
    script("questions").main([put(tmp_path / file, rows), "--prompt", "q", "--answer", "a",
                              "--val_share", "0.2", "--test_share", "0.2", "--out",
                              f"{tmp_path}/o"])
    parts = [read(tmp_path / f"o/rl_{part}.jsonl") for part in ("train", "val", "test")]
    assert all(parts) and "train: 60 rows read, 60 kept, 0 dropped\n" in capsys.readouterr().out
    assert sorted((r["prompt"], r["answer"]) for rows in parts for r in rows) == sorted(
        (f"How many is {i}?", str(i)) for i in range(60))


def test_questions_say_what_is_wrong(script, refuses):
    main = script("questions").main
    refuses(lambda: main(["x.jsonl", "--prompt", ""]), "--prompt wants keys")
    refuses(lambda: main(["x.jsonl", "--prompt", "a", "{b}"]), "one pattern")
    refuses(lambda: main(["x.jsonl", "--hub", "a/b"]), "--hub", "one or the other")


def test_mixed_with_and_without_steps(script, tmp_path):
    """Questions of GSM8K have steps, those of MATH none: both come through, as they are."""
    for name, rows in (("a", [{"prompt": f"a{i}", "answer": "5", "steps": 2} for i in range(3)]),
                       ("b", [{"prompt": f"b{i}", "answer": ["5", "6"]} for i in range(3)])):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "rl_train.jsonl", rows)
    script("mix").main([f"{tmp_path}/a", f"{tmp_path}/b", "--out", f"{tmp_path}/c"])
    assert [row.get("steps") for row in read(tmp_path / "c/rl_train.jsonl")] == [2] * 3 + [None] * 3
    assert json.loads((tmp_path / "c/prepared.json").read_text()) == {
        "mix": {"files": ["rl_train.jsonl"]}}


def test_mix_names_the_line(script, tmp_path, refuses):
    (tmp_path / "a").mkdir()
    main = lambda: script("mix").main([f"{tmp_path}/a", "--out", f"{tmp_path}/c"])
    for bad, what in (([1], "not a row"), ({"prompt": 5}, "no 'prompt'"),
                      ({"prompt": [SYSTEM]}, "no 'prompt'"), ({"prompt": [5]}, "not a row")):
        write_rows(tmp_path / "a/rl_train.jsonl", [{"prompt": "x"}, bad])
        refuses(main, "rl_train.jsonl, line 2: ", what)
    refuses(lambda: script("mix").main([f"{tmp_path}/a", "--out", f"{tmp_path}/a"]), "of its own")
    refuses(lambda: script("mix").main([f"{tmp_path}/x", "--out", f"{tmp_path}/a"]), "is missing")
    assert not (tmp_path / "c").exists()
