"""A preparer's files are a set: whole or not there, its own or not touched; and what goes wrong
outside is one line."""
import errno
import functools
import hashlib
import json
import os
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from conftest import DOCUMENTS, ROOT, kernel, write_rows
from test_data import MADE, put, read

SCRIPTS = sorted(path.stem for path in (ROOT / "data").glob("*.py")
                 if not path.is_symlink() and path.stem not in ("common", "rows", "smollm2"))


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.fixture
def common(script):
    return script("common")


@pytest.fixture
def prepare(common, tmp_path):
    """prepare("svamp", {name: rows}) makes a set in tmp_path/out."""
    def prepare(maker, files, of=""):
        with common.NewSet(f"{tmp_path}/out", maker, of) as new:
            for name, rows in files.items():
                new.rows(name, rows)
        return tmp_path / "out"
    return prepare


# ---------------------------------------------------------------------------- the set

def test_old_parts_do_not_stay(script, tmp_path, capsys):
    """With other arguments: no test question of the run before lies beside the new training rows,
    and what no preparer made stays."""
    rows = [MADE["svamp"][1](i) for i in range(60)]
    main = functools.partial(script("svamp").main)
    flags = ["--train", put(tmp_path / "r.jsonl", rows), "--out", f"{tmp_path}/out", "--val_share",
             "0.2"]
    main([*flags, "--test_share", "0.3"])
    (tmp_path / "out/notes.txt").write_text("mine")
    (tmp_path / "out/sft_test.jsonl").write_text("mine as well")
    main(flags)
    assert "out/rl_test.jsonl" in capsys.readouterr().out.splitlines()[-1]
    assert sorted(contents(tmp_path / "out")) == [
        "notes.txt", "prepared.json", "rl_train.jsonl", "rl_val.jsonl", "sft_test.jsonl"]


def test_equal_files_are_left_alone(prepare, tmp_path):
    files = {"a.jsonl": [{"a": "é"}], "b.jsonl": [{"b": 1}]}
    out = prepare("x", files)
    for path in out.iterdir():
        os.utime(path, (1, 1))
    prepare("x", files)
    assert {p.stat().st_mtime for p in out.iterdir()} == {1}
    prepare("x", files | {"b.jsonl": [{"b": 2}]})
    assert [p.name for p in out.iterdir() if p.stat().st_mtime > 1] == ["b.jsonl"]
    assert sorted(contents(out)) == ["a.jsonl", "b.jsonl", "prepared.json"]


def test_files_of_others_are_not_touched(prepare, tmp_path, refuses):
    """Two scripts may share a folder, but no file; nobody's file is replaced by another one."""
    out = prepare("text", {"train.jsonl": [1]})
    prepare("alpaca", {"sft_train.jsonl": [1]})
    prepare("text", {"val.jsonl": [1]})
    assert sorted(contents(out)) == ["prepared.json", "sft_train.jsonl", "val.jsonl"]
    (out / "rl_val.jsonl").write_text("mine")
    before = contents(out)
    refuses(lambda: prepare("text", {"sft_train.jsonl": [2]}), "data/alpaca.py made it")
    refuses(lambda: prepare("text", {"x.jsonl": [2], "rl_val.jsonl": [2]}), "no preparer made it")
    assert contents(out) == before and not (out / ".preparing").exists()
    (out / "rl_val.jsonl").write_text("1\n")
    prepare("text", {"rl_val.jsonl": [1]})                        # equal: then it is its own


def test_what_is_drawn_from_a_file_goes_with_it(prepare, capsys):
    rows = {"rl_train.jsonl": [1, 2, 3], "rl_val.jsonl": [4]}
    out = prepare("svamp", rows)
    prepare("within_reach reach.jsonl", {"reach.jsonl": [1]}, of="rl_train.jsonl")
    prepare("svamp", rows | {"rl_val.jsonl": [5]})
    assert (out / "reach.jsonl").exists()
    prepare("svamp", rows | {"rl_train.jsonl": [1, 2]})
    assert not (out / "reach.jsonl").exists() and "removed" in capsys.readouterr().out


def test_an_error_leaves_the_old_set(common, prepare, tmp_path, monkeypatch, refuses):
    """A refusal, Ctrl-C, a full disk; and a folder that was not there is not there afterwards."""
    before = contents(prepare("x", {"a.jsonl": [1]}))

    def raises(error):
        with common.NewSet(f"{tmp_path}/out", "x") as new:
            new.rows("a.jsonl", [2])
            raise error

    with pytest.raises(SystemExit):
        raises(SystemExit(2))
    refuses(lambda: raises(KeyboardInterrupt()), "stopped", "is as it was", code=130)
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(common.os, "fsync", lambda _: (_ for _ in ()).throw(full))
    refuses(lambda: prepare("x", {"a.jsonl": [2]}), "out/a.jsonl", "No space left")
    (tmp_path / "out").rename(tmp_path / "was")
    refuses(lambda: prepare("x", {"a.jsonl": [2]}), "No space left")
    assert contents(tmp_path / "was") == before and not (tmp_path / "out").exists()


def killed_at(call, common, make):
    """make() in a child that is gone at its `call`-th change of the disk -> whether it was."""
    child = os.fork()
    if child == 0:
        left = [call]

        def dies(change):
            def changes(*args, **kwargs):
                left[0] -= 1
                if left[0] == 0:
                    os._exit(9)
                return change(*args, **kwargs)
            return changes

        for name in ("replace", "remove", "mkdir", "fsync"):
            setattr(common.os, name, dies(getattr(os, name)))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        make()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_kill_at_any_moment(common, prepare, tmp_path):
    """What can be read is of the old set or of the new one, never of both; and the next start, even
    of a run that fails, finds one of them whole."""
    old = {"a.jsonl": [1], "b.jsonl": [2], "c.jsonl": [3], "e.jsonl": [4]}
    new = {"a.jsonl": [5], "b.jsonl": [2], "d.jsonl": [6], "e.jsonl": [7]}
    text = lambda rows: {name: f"{row}\n".encode() for name, [row] in rows.items()}
    seen, call = set(), 0
    while True:
        call += 1
        out = prepare("x", old)
        assert {k: v for k, v in contents(out).items() if k != "prepared.json"} == text(old)
        dead = killed_at(call, common, lambda: prepare("x", new))
        found = {k: v for k, v in contents(out).items() if k != "prepared.json"}
        assert found.items() <= text(old).items() or found.items() <= text(new).items(), call
        with pytest.raises(SystemExit), common.NewSet(str(out), "x"):
            raise SystemExit(2)
        found = {k: v for k, v in contents(out).items() if k != "prepared.json"}
        assert found in (text(old), text(new)), call
        seen.add(found == text(new))
        files = json.loads((out / "prepared.json").read_text())["x"]["files"]
        assert sorted(files) == sorted(found) and not (out / ".preparing").exists()
        if not dead:
            break
    assert seen == {False, True} and call > 10


def test_two_at_once(common, prepare, tmp_path, monkeypatch, refuses):
    monkeypatch.setattr(common, "lock", functools.partial(common.lock, seconds=0))
    with common.NewSet(f"{tmp_path}/out", "x") as new:
        new.rows("a.jsonl", [1])
        refuses(lambda: prepare("y", {"b.jsonl": [2]}), "another preparer is at work")
    assert sorted(contents(prepare("y", {"b.jsonl": [2]}))) == ["a.jsonl", "b.jsonl",
                                                               "prepared.json"]


@pytest.mark.parametrize("text", ["[]", "5", "{", '{"x": 5}', '{"x": {"files": 5}}', "[" * 100_000,
                                  '{"x": {"files": ["../a.jsonl"]}}', '{"x": {"files": [1]}}'])
def test_a_foreign_manifest(prepare, tmp_path, refuses, text):
    """It cannot lead out of the folder, and is no reason for a traceback."""
    (tmp_path / "out").mkdir()
    (tmp_path / "a.jsonl").write_text("mine")
    (tmp_path / "out/prepared.json").write_text(text)
    refuses(lambda: prepare("x", {"b.jsonl": [1]}), "prepared.json is not the list")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.jsonl", "out", "prepared.json"]


@pytest.mark.parametrize("plan", [
    "[]", "{", {"remove": ["../a.jsonl"], "move": {}}, {"remove": [], "move": {"x": "../a.jsonl"}},
    {"remove": [], "move": {"../a.jsonl": ".preparing/x"}}, {"remove": 5, "move": {}}])
def test_a_foreign_plan(prepare, tmp_path, refuses, plan):
    (tmp_path / "out/.preparing").mkdir(parents=True)
    (tmp_path / "a.jsonl").write_text("mine")
    (tmp_path / "out/.preparing/x").write_text("x")
    (tmp_path / "out/.preparing/plan.json").write_text(
        plan if isinstance(plan, str) else json.dumps(plan))
    refuses(lambda: prepare("x", {"b.jsonl": [1]}), "plan.json is not what a preparer wrote")
    assert (tmp_path / "a.jsonl").read_text() == "mine"


def test_a_strangers_folder(prepare, tmp_path, refuses):
    """What has the name of our working folder and is not ours stays; what a kill has left goes."""
    work = tmp_path / "out/.preparing"
    work.mkdir(parents=True)
    (work / "thesis.txt").write_text("mine")
    refuses(lambda: prepare("x", {"b.jsonl": [1]}), ".preparing is not a preparer's")
    assert (work / "thesis.txt").read_text() == "mine"
    (work / "by-a-preparer").write_text("")
    prepare("x", {"b.jsonl": [1]})
    assert not work.exists()


def test_out(common, tmp_path, refuses):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    for out in ("", "file", "file/x", "loop", "loop/x", "x" * 300, "a\0b"):
        path = out and f"{tmp_path}/{out}"
        refuses(lambda: common.NewSet(path, "x").__enter__(), "--out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "loop"]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("vocab_size, dtype", [(65536, "uint16"), (65537, "uint32")])
def test_what_a_bin_says(common, tmp_path, vocab_size, dtype):
    """dtype, count, largest id, and the hashes of its tokenizer and of its edges, as in the
    checkpoint's record. Longer than an edge."""
    ids = np.random.default_rng(0).integers(0, 1000, 2**20 + 5)
    chars = "".join(map(chr, range(0x10000, 0x10000 + vocab_size - 8)))
    tokenizer = kernel.Tokenizer({"kind": "chars", "chars": chars})
    assert tokenizer.vocab_size == vocab_size
    with common.NewSet(f"{tmp_path}/out", "x") as new:
        new.ids("train.bin", ids, tokenizer)
    raw = (tmp_path / "out/train.bin").read_bytes()
    assert raw == ids.astype(dtype).tobytes()
    width, said = ids.astype(dtype).itemsize, read(tmp_path / "out/train.bin.json")[0]
    edges = raw[: width * 2**20] + raw[-width * 2**20:] + str(len(ids)).encode()
    spec = json.dumps(tokenizer.spec, sort_keys=True).encode()
    assert said == {"dtype": dtype, "count": 2**20 + 5, "max_id": 999,
                    "tokenizer": hashlib.sha256(spec).hexdigest(),
                    "edges": hashlib.sha256(edges).hexdigest()}
    path = f"{tmp_path}/out/train.bin"
    assert len(kernel.read_tokens(path, tokenizer)) == len(ids)
    assert said["edges"] in vars(kernel).get("file_hashes", vars(kernel).get("inputs")).values()


# ---------------------------------------------------------------------------- text

@pytest.fixture
def text(script, tmp_path, bpe):
    def text(source, *more, tokenizer=bpe):
        script("text").main([str(source), "--tokenizer", str(tokenizer), "--val_share", "0.1",
                             "--workers", "1", "--out", f"{tmp_path}/out", *more])
        return tmp_path / "out"
    return text


def test_text_stays_while_other_text_is_made(text, script, tmp_path, monkeypatch, refuses):
    """Interrupted: the old files are whole. Finished: nothing of the old run is left."""
    source = put(tmp_path / "d.jsonl", [{"text": d, "body": d[::-1]} for d in DOCUMENTS])
    out = text(source)
    before, module = contents(out), script("text")
    for part in ("train", "val"):
        said = json.loads(before[f"{part}.bin.json"])
        assert said["count"] * 2 == len(before[f"{part}.bin"]) and said["max_id"] < 328
    read_file = module.read_file

    def dies(*args):
        for n, row, at in read_file(*args):
            if n == 100:
                raise KeyboardInterrupt
            yield n, row, at
    monkeypatch.setattr(module, "read_file", dies)
    monkeypatch.setattr(module, "PIECE", 500)
    refuses(lambda: text(source, "--key", "body"), "the same command continues", code=130)
    assert before.items() <= contents(out).items()
    refuses(lambda: text(source), "unfinished run with other key")
    monkeypatch.setattr(module, "read_file", read_file)
    after = contents(text(source, "--key", "body"))
    assert sorted(after) == sorted(before) and after["train.bin"] != before["train.bin"]


def test_a_character_that_the_tokenizer_lacks(script, text, tmp_path, refuses):
    """The row, or the document, is named; nothing is written."""
    letters = "".join(sorted(set("abcdefghijklmnopqrstuvwxyzDN0123456789 \n+-=?,.'")))
    (tmp_path / "t.json").write_text(json.dumps({"kind": "chars", "chars": letters}))
    rows = [{"question": q, "answer": "so\n#### 5"} for q in ("how?", "a café?")]
    path = put(tmp_path / "r.jsonl", rows)
    refuses(lambda: script("gsm8k").main(["--train", path, "--tokenizer", f"{tmp_path}/t.json",
                                          "--out", f"{tmp_path}/out"]),
            f"{path}, line 2: the character 'é'")
    put(tmp_path / "d.jsonl", [{"text": "no"}, {"text": "Not a café"}])
    refuses(lambda: text(tmp_path / "d.jsonl", tokenizer=tmp_path / "t.json"),
            "the character 'é'", "begins 'Not a café'")
    assert not (tmp_path / "out").exists()


def test_only_tokenizers_that_return_their_text(script, bpe, tmp_path, refuses):
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers
    find, words = script("common").find_tokenizer, {"[UNK]": 0, "a": 1, "b": 2}
    made = {}
    lower = made["lower"] = tokenizers.Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    lower.normalizer, lower.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    lower.decoder = decoders.WordPiece()
    made["words"] = tokenizers.Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    for name, normalizer in (("strip", normalizers.Strip()), ("nfkc", normalizers.NFKC()),
                             ("accents", normalizers.Sequence([normalizers.NFD(),
                                                               normalizers.StripAccents()])),
                             ("nfc", normalizers.NFC())):
        made[name] = tokenizers.Tokenizer.from_file(bpe)
        made[name].normalizer = normalizer
    made["prefix"] = tokenizers.Tokenizer.from_file(bpe)
    made["prefix"].pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    for name, tokenizer in made.items():
        tokenizer.save(f"{tmp_path}/{name}.json")
        if name == "nfc":                           # Qwen's: composed text is what most text is
            assert find(f"{tmp_path}/nfc.json").decode(find(bpe).encode("é")) == "é"
        else:
            refuses(lambda: find(f"{tmp_path}/{name}.json"), "does not give back its text")
    for text in script("common").VARIED:
        assert unicodedata.normalize("NFC", text) == text


# ---------------------------------------------------------------------------- the outside

@pytest.mark.parametrize("name", SCRIPTS)
def test_flags(script, name, capsys, refuses):
    """--help teaches by commands; a wrong flag, or the beginning of one, is one line."""
    if name == "toy":                                   # its flags are read by the script alone
        run = subprocess.run([sys.executable, f"{ROOT}/data/toy.py", "--nope", "1"],
                             capture_output=True, text=True)
        assert (run.returncode, run.stderr.count("\n")) == (2, 1), run.stderr
        return
    main = script(name).main
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0 and f"python data/{name}.py" in capsys.readouterr().out
    refuses(lambda: main(["x", "--nope", "1"]), "--nope", "--help")
    refuses(lambda: main(["x", "--ou", "1"]), "--ou", "--help")


@pytest.mark.parametrize("name, flags, what", [
    *[(name, [f"--{flag}", value], f"--{flag}") for name in ("alpaca", "gsm8k", "questions")
      for flag in ("val_share", "test_share")
      for value in ("nan", "-0.1", "1", "inf", "x", "1e39")],
    *[("text", [f"--{flag}", value], f"--{flag}") for flag in ("val_share", "tokens", "workers")
      for value in ("-1", "nan", "inf", "1e39", "1" + "0" * 30)],
    *[("within_reach", [f"--{flag}", value], f"--{flag}")
      for flag in ("want", "samples", "max_new", "temperature", "seed")
      for value in ("-1", "nan", "inf", "1e39")],
    ("within_reach", ["--samples", "1"], "--samples"),
    ("within_reach", ["--temperature", "0"], "--temperature"),
    ("within_reach", ["--name", "../x.jsonl"], "--name"),
    ("text", ["--separator", "("], "no regular expression"),
    ("alpaca", ["--test_share", "0.96"], "together lie below 1")])
def test_ranges(script, tmp_path, refuses, name, flags, what):
    path = put(tmp_path / "r.jsonl", [{"x": 1}])
    first = [path] if name in ("text", "questions", "within_reach") else ["--train", path]
    refuses(lambda: script(name).main([*first, *flags]), what)


def test_files_that_are_none(script, common, tmp_path, refuses, monkeypatch):
    find, read_file = common.find_files, lambda path: list(common.read_file(str(path)))
    os.mkfifo(tmp_path / "pipe.jsonl")
    refuses(lambda: find([tmp_path / "pipe.jsonl"]), "neither a file nor a folder")
    (tmp_path / "folder.jsonl").mkdir()
    refuses(lambda: find([tmp_path / "folder.jsonl"]), "has no file of the kinds")
    for name, text, what in [
            ("deep.json", "[" * 100_000, "nested too deep"),
            ("deep.jsonl", '{"a": 1}\n' + '{"a":' * 100_000, "deep.jsonl, line 2: "),
            ("half.json", '[{"a": 1}, {"a"', "is not JSON"),
            ("half.jsonl", '{"a": 1}\n{"a"', "half.jsonl, line 2: not JSON"),
            ("huge.jsonl", '{"a": ' + "1" * 5000 + "}", "huge.jsonl, line 1: not JSON"),
            ("not.jsonl.gz", "{}", "no gzip file"), ("not.jsonl.zst", "{}", "no zstd file"),
            ("not.parquet", "PAR1", "cannot be read as parquet"),
            ("wide.csv", "a,b\n1,2,3\n", "wide.csv, row 1: 3 values"),
            ("twice.csv", "a,a\n1,2\n", "two fields have the same name"),
            ("open.csv", 'a,b\n"1,2\n', "is not CSV")]:
        (tmp_path / name).write_text(text)
        refuses(lambda: read_file(tmp_path / name), name, what)
    (tmp_path / "latin.csv").write_bytes("é\n1\n".encode("latin-1"))
    refuses(lambda: read_file(tmp_path / "latin.csv"), "is not CSV in UTF-8")
    denied = lambda *args, **kwargs: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    monkeypatch.setattr("builtins.open", denied)
    refuses(lambda: read_file(tmp_path / "half.jsonl"), "cannot be read: Permission denied")


def test_libraries_are_optional(script, common, tmp_path, refuses, monkeypatch):
    """Each is named with the command that brings it, where it is needed and nowhere else."""
    for name in ("pyarrow", "pyarrow.parquet", "datasets", "backports", "compression"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "r.parquet").write_bytes(b"PAR1")
    (tmp_path / "r.jsonl.zst").write_bytes(b"x")
    for name, command in (("r.parquet", "pip install pyarrow"),
                          ("r.jsonl.zst", "pip install backports.zstd")):
        refuses(lambda: list(common.read_file(f"{tmp_path}/{name}")), name, command)
    refuses(lambda: common.load_hub("a/b", "", "train", "--train FILE"), "pip install datasets",
            "--train FILE")
    rows = [MADE["alpaca"][1](i) for i in range(60)]
    script("alpaca").main(["--train", put(tmp_path / "r.jsonl", rows), "--out", f"{tmp_path}/o"])
    assert (tmp_path / "o/sft_train.jsonl").exists()


def test_ctrl_c_while_importing(tmp_path):
    """The libraries take seconds to load: 130 and a line, in every script."""
    (tmp_path / "numpy.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n")
    runs = [subprocess.Popen([sys.executable, f"{ROOT}/data/{name}.py", "--help"], text=True,
                             env=os.environ | {"PYTHONPATH": str(tmp_path)},
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE) for name in SCRIPTS]
    for name, run in zip(SCRIPTS, runs):
        assert (run.communicate(), run.returncode) == (("", "stopped\n"), 130), name


def test_nobody_reads_the_screen(tmp_path):
    """python data/alpaca.py ... | head -1: the files are made all the same."""
    rows = [MADE["alpaca"][1](i) for i in range(60)]
    run = subprocess.Popen([sys.executable, f"{ROOT}/data/alpaca.py", "--train",
                            put(tmp_path / "r.jsonl", rows), "--out", f"{tmp_path}/o"],
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run.stdout.close()
    assert (run.stderr.read(), run.wait()) == (b"", 0)
    assert len(read(tmp_path / "o/sft_train.jsonl")) > 50


def test_within_reach_is_of_its_rows(script, chain, data, tmp_path, refuses, monkeypatch, capsys):
    """What was tried counts for these rows and this checkpoint alone; lists of answers; one line
    for each batch that is new."""
    reach = script("within_reach")
    monkeypatch.setattr(reach, "AT_ONCE", 2)
    monkeypatch.setattr(reach, "verify", lambda text, answer: float(len(text) % 2 == 0))
    questions = [row["prompt"] for row in read(f"{data}/rl_train.jsonl")][:6]
    rows = [{"prompt": q, "answer": [str(i), "x"]} for i, q in enumerate(questions)]
    write_rows(tmp_path / "rl_train.jsonl", rows)
    flags = [f"{chain}/02_cot.pt", "--rows", f"{tmp_path}/rl_train.jsonl", "--max_new", "4",
             "--want", "0"]
    reach.main(flags)
    assert capsys.readouterr().out.count(" kept\n") == 3
    reach.main(flags)
    assert " left " not in capsys.readouterr().out
    assert all(isinstance(row["answer"], list) for row in read(tmp_path / "rl_reach.jsonl"))
    write_rows(tmp_path / "rl_train.jsonl", rows[::-1])
    reach.main(flags)
    assert capsys.readouterr().out.count(" kept\n") == 3
    (tmp_path / "rl_reach.jsonl.tried").write_text('{"flags": 1')
    refuses(lambda: reach.main(flags), "rl_reach.jsonl.tried is not JSON")
    refuses(lambda: reach.main([*flags, "--max_new", "64"]), "--max_new 64 leaves no room")
    (tmp_path / "mine.jsonl").write_text("mine")
    refuses(lambda: reach.main([*flags, "--name", "mine.jsonl"]), "no preparer made it")
    assert (tmp_path / "mine.jsonl").read_text() == "mine"
