"""bench/speed.py, growth.py and costs.py: their arithmetic, and one small piece of each."""
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(ROOT / "bench"))
import costs  # noqa: E402
import growth  # noqa: E402
import pieces  # noqa: E402
import speed  # noqa: E402

OURS = [{"seconds": [2.0, 1.0, 9.0], "peak_mb": 300}, {"seconds": [4.0, 3.0, 5.0], "peak_mb": 310}]
OTHER = [{"seconds": [6.0, 5.0, 7.0], "peak_mb": 500}, {"seconds": [2.0, 2.0, 3.0], "peak_mb": 90}]


# ---------------------------------------------------------------------------- speed


def test_medians_over_all_steps_and_ratios_by_round():
    ours, other, ratio = speed.compare(OURS, OTHER)
    assert ours == {"median": 3.5, "low": 1.0, "high": 9.0, "rounds": [2.0, 4.0], "peak_mb": 310}
    assert (other["median"], other["rounds"], other["peak_mb"]) == (4.0, [6.0, 2.0], 500)
    # round by round 6 / 2 and 2 / 4: above 1 is faster than the other
    assert ratio == {"ratio": 1.75, "low": 0.5, "high": 3.0}


def test_line_of_the_table():
    record = dict(name="x", what="a step", tokens=700, against="TRL", ours=OURS, other=OTHER)
    assert speed.row(record) == [
        "x", "a step", "3.50 (1.00..9.00), 200 tok/s", "TRL: 4.00 (2.00..7.00), 175 tok/s",
        "**1.75** (0.50..3.00)", "", "", "310 / 500"]
    tuned = [{"seconds": [1.0], "peak_mb": 70}, {"seconds": [2.0], "peak_mb": 80}]
    assert speed.row(record | {"tuned": tuned})[4:] == [
        "**1.75** (0.50..3.00)", "1.50 (1.00..2.00), 467 tok/s", "**0.50** (0.50..0.50)",
        "310 / 500 / 80"]
    assert "tok/s" not in speed.row(record | {"tokens": 0})[2]


def test_sides_have_the_same_shapes():
    """What one side is told in flags, the other in arguments."""
    for name, piece in pieces.PIECES.items():
        flags = piece.ours.get("flags", [])
        flags = dict(zip(flags[::2], flags[1::2]))
        given = piece.other.get("given", {})
        if piece.against == pieces.OLD:
            flags.pop("--micro_tokens", 0)                      # the older commit has no such flag
            other = piece.other["flags"]
            assert flags == dict(zip(other[::2], other[1::2]))
            assert piece.ours | {"flags": other} == piece.other
        elif name.startswith("pretrain"):
            assert int(flags["--batch_size"]) == int(flags["--micro_batch"]) == given["batch"]
            assert int(flags["--window"]) == given["window"]
            assert piece.tokens == given["batch"] * given["window"]
            assert flags.get("--bf16", "0") == str(given.get("bf16", 0))
        elif name.startswith(("rollouts", "grouped")):
            assert piece.ours["given"] == given
            assert piece.tokens == given["prompts"] * given["group"] * given["max_new"]
        else:
            assert int(flags["--micro_batch"]) == given["batch"]
        if name.startswith("grpo"):
            assert int(flags["--max_new"]) == given["max_completion_length"]
            assert int(flags["--minibatches"]) == given["pieces"] == given["steps_per_generation"]
            rows = int(flags["--batch_size"]) * int(flags["--group_size"])
            assert rows == given["batch"] * given["pieces"]


def test_every_peer_is_measured_tuned_too(monkeypatch, tmp_path):
    """With GELU in one kernel and our allocator's settings; ours of an older commit once."""
    seen = []
    monkeypatch.setattr(speed, "run", lambda tree, side, work: seen.append(side) or OURS[0])
    monkeypatch.setattr(speed, "machine", dict)
    for name, piece in pieces.PIECES.items():
        seen.clear()
        record = speed.measure(name, piece, {"new": 1, "old": 2}, tmp_path, 2, lambda *_: None)
        sides = [side for side in seen if side.get("kind") != "make"]
        if piece.against == pieces.OLD:
            assert len(sides) == 4 and "tuned" not in record
            continue
        assert len(sides) == 6 and len(record["tuned"]) == 2
        _, plain, tuned = sides[:3]
        assert "env" not in plain and "activation" not in plain["given"]
        assert int(tuned["env"]["MALLOC_MMAP_THRESHOLD_"]) >= 2 ** 30
        assert tuned["given"] == plain["given"] | {"activation": "gelu_pytorch_tanh"}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The folder that both sides of a piece read, of a tiny shape."""
    folder = tmp_path_factory.mktemp("work")
    pieces.make(str(folder), {"n_layer": 1, "n_head": 2, "n_embd": 16}, 87)
    return folder


def test_a_piece_of_ours_is_timed_from_line_to_line(work):
    """Steps: the first warms up, the last evaluates; neither is counted. The seconds are those of
    the script's own log."""
    flags = ("--n_layer 1 --n_embd 16 --n_head 2 --window 64 --batch_size 32 --micro_batch 32 "
             + pieces.GPT2)
    found = speed.run(ROOT, pieces.stage("00_pretrain.py", flags, 4), work)
    [log] = work.glob("*/00_pretrain.jsonl")
    said = [32 * 64 / json.loads(line)["tok_s"] for line in log.read_text().splitlines()[2:-1]]
    assert len(found["seconds"]) == len(said) == 4
    assert 1 / 3 < sum(found["seconds"]) / sum(said) < 3       # steps of 6 ms: lines may be late
    assert found["peak_mb"] > 100


def test_completions_never_end_early(work):
    """Both sides then draw the same number of tokens (`generate` asserts it), from ragged
    prompts."""
    seconds = pieces.generate(str(work), prompts=4, group=2, max_new=60, steps=2)
    assert len(seconds) == 2
    lengths = {len(p) for p in pieces.prompts_of(str(work), 64)}
    assert 16 <= min(lengths) < max(lengths) <= 44


def test_records_are_kept_and_not_made_again(tmp_path, monkeypatch, capsys):
    made = []

    def measure(name, piece, *_):
        made.append(name)
        return dict(name=name, what=piece.what, tokens=piece.tokens, against=piece.against,
                    ours=OURS, other=OTHER, commands=[], machine={"cpu": "x", "commit": "then"})
    monkeypatch.setattr(speed, "measure", measure)
    monkeypatch.setattr(speed, "machine", dict)
    flags = dict(only="sft,dpo", size="toy", rounds=1, out=str(tmp_path), old="", again=False,
                 report=False)
    speed.main(SimpleNamespace(**flags))
    capsys.readouterr()
    monkeypatch.setattr(speed, "machine", lambda: {"commit": "now"})
    speed.main(SimpleNamespace(**flags))
    assert made == ["sft-toy", "dpo-toy"]
    said = capsys.readouterr().out
    assert "sft-toy is kept, of commit then: --again" in said and "dpo-toy is kept" in said
    speed.main(SimpleNamespace(**flags | {"again": True, "only": "sft"}))
    assert made[2:] == ["sft-toy"]
    assert json.loads((tmp_path / "speed.json").read_text())["sft-toy"]["ratio"] == 1.75
    assert "| dpo-toy |" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize("flags, why", [
    (dict(only="nope"), "--only nope: no piece"), (dict(only="ppo,"), "--only '': no piece"),
    (dict(only="ppo,sft-big"), "--only sft-big"), (dict(only="ppo", size="small"), "--only ppo"),
    (dict(size="toy,huge"), "--size huge: there are toy, small"),
    (dict(rounds=0), "--rounds must lie in"),
    (dict(old="nowhere"), "nowhere has no 05_ppo.py"), (dict(report=True), "no records yet"),
    (dict(out="a file"), "cannot write a file"),
    (dict(out="records", report=True), "ppo-toy.json is no record")])
def test_speed_in_one_line(refuses, tmp_path, monkeypatch, flags, why):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(speed, "machine", dict)
    (tmp_path / "a file").touch()
    (tmp_path / "records").mkdir()
    (tmp_path / "records/ppo-toy.json").write_text("{}")
    values = dict(only="ppo", size="", rounds=1, out="out", old="", again=False, report=False)
    refuses(lambda: speed.main(SimpleNamespace(**values | flags)), why)


def test_speed_without_trl_or_the_old_commit(refuses, tmp_path, monkeypatch):
    def absent(name):
        raise speed.PackageNotFoundError(name)
    monkeypatch.setattr(speed, "version", absent)
    refuses(speed.machine, "torch is not installed: pip install -r requirements-test.txt")
    monkeypatch.setattr(speed, "git", lambda *_: b"")
    refuses(lambda: speed.old_tree("", tmp_path / "old"), "26820e8", "--old")


def test_a_side_that_fails_says_why(refuses, work):
    bad = pieces.stage("00_pretrain.py", "--window 999", 1)
    refuses(lambda: speed.run(ROOT, bad, work), "00_pretrain.py", "ended with 2", "--window 999")


@pytest.mark.parametrize("flags, why", [
    (dict(report=True), "no records yet"), (dict(out="records", report=True), "no record"),
    (dict(out="older", report=True), "no record"), (dict(out="a file"), "cannot write a file")])
def test_growth_in_one_line(refuses, tmp_path, monkeypatch, flags, why):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file").touch()
    (tmp_path / "records").mkdir()
    (tmp_path / "records/growth.jsonl").write_text("5\n")
    (tmp_path / "older").mkdir()
    (tmp_path / "older/growth.jsonl").write_text('{"point": "limits {}"}\n')
    values = dict(out="out", again=False, report=False)
    refuses(lambda: growth.main(SimpleNamespace(**values | flags)), why)


# ---------------------------------------------------------------------------- costs, growth


def test_operations_are_those_of_torch():
    """Against torch's own count: of a forward pass with its head, and of the blocks' forward and
    backward pass. (Attention aside, of which the causal mask leaves half out.)"""
    kernel = sys.modules["model"]
    s, B, T = costs.Shape(2, 32, 50), 3, 16
    model = kernel.GPT(kernel.GPTConfig(vocab_size=s.V, block_size=T, n_layer=s.L, n_embd=s.C,
                                        n_head=2))
    ids, attention = torch.randint(s.V, (B, T)), B * T * 2 * s.L * s.C * T

    def products(do):
        with FlopCounterMode(display=False) as counter:
            do()
        return sum(n for op, n in counter.get_flop_counts()["Global"].items()
                   if "attention" not in str(op))
    with torch.no_grad():
        assert products(lambda: model(ids)) == costs.forward(s, B * T, T, B * T) - attention
    both = products(lambda: model.forward_hidden(ids).sum().backward())
    assert both == costs.train(s, B * T, T, scored=0)[0] - 3 * attention
    assert costs.train(s, 7, T)[0] - costs.train(s, 7, T, scored=0)[0] == costs.logprobs(s, 7)[0]


def test_costs_by_hand():
    s = costs.Shape(2, 4, 10)                       # N = 12 * 2 * 16 = 384, H = 40
    assert costs.decode(s, 3, 5) == (3 * (768 + 80 + 4 * 2 * 4 * 5),
                                     4 * 424 + 8 * 3 * 2 * 4 * 5 + 16 * 3 * 10)
    assert costs.forward(s, 6, 3, 2) == 6 * (768 + 2 * 2 * 4 * 3) + 2 * 2 * 40
    # a group shares its prefill; one more wave of slots reads the weights once more a step
    one, two = (costs.rollouts(s, 4, g, 8, 5) for g in (1, 2))
    assert two[0] - one[0] == 5 * costs.decode(s, 4, 8 + 2.5)[0]
    waves = [costs.rollouts(s, 4, 1, 8, 5, slots=n)[1] for n in (4, 2)]
    assert waves[1] - waves[0] == 5 * 4 * 424


def test_what_the_backward_pass_keeps():
    """The storages that autograd saves of the blocks, weights aside, each once."""
    kernel = sys.modules["model"]
    L, C, B, T = 4, 128, 4, 64
    model = kernel.GPT(kernel.GPTConfig(vocab_size=87, block_size=T, n_layer=L, n_embd=C, n_head=4))
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor         # alive: no address twice
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.forward_hidden(torch.randint(87, (B, T)))
    numbers = sum(t.untyped_storage().nbytes() for t in kept.values()) / 4
    assert numbers / (B * T * L * C) == pytest.approx(costs.KEPT, abs=1.5)


def test_growth_measures_and_compares(tmp_path):
    found = growth.train(B=2, T=16, V=64)
    assert found["seconds"] > 0 and found["mb"] >= 0
    records = {"limits {}": {"operations_s": 1e9, "bytes_s": 1e9, "mb": 300.0},
               'train {"B": 4}': {"seconds": 2.0, "mb": 30.0}}
    [line] = growth.lines_of(records)
    operations, moved, held = growth.train_cost(B=4)
    assert line["line"] == pytest.approx((operations + moved) / 1e9)
    assert (line["axis"], line["value"], line["seconds"]) == ("batch", 4, 2.0)
    assert line["held"] == held / 2 ** 20 and line["mb"] == 30
    # ranks are whole processes: what Python and torch take of one is subtracted
    records['ranks {"n": 2}'] = {"seconds": 1.0, "mb": 900.0}
    assert growth.lines_of(records)[1]["mb"] == 600
    assert f"{line['line'] / 2:.0%}" in growth.table(records)
    growth.plot(records, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 1000


def test_performance_has_the_records():
    assert (ROOT / "docs/performance.md").read_text() == costs.document(), (
        "run python bench/costs.py")
