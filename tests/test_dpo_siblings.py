"""The losses of DPO/ in closed form, the signs of their gradients, and KTO's baseline."""
import inspect
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import LOSS, kernel, run, steps_of, weights, write_rows
from test_losses import ragged

pytestmark = pytest.mark.usefixtures("double")
SIBLINGS = ["DPO/ipo", "DPO/simpo", "DPO/orpo", "DPO/kto"]
CONSTANTS = dict(gamma=0.4, lam=0.7, lam_d=1.3, lam_u=0.8, kl=0.5)


def call(stages, name, logprobs, mask, ref=None, beta=0.3, **constants):
    """The sibling's loss, whichever of these it takes -> loss, count, metrics."""
    loss = getattr(stages[name], LOSS[name])
    given = dict(logprobs=logprobs, ref_logprobs=logprobs.detach() if ref is None else ref,
                 desirable=(torch.arange(len(mask)) < len(mask) // 2).long(),
                 completion_mask=mask, beta=beta)
    given |= CONSTANTS | constants
    return loss(**{k: given[k] for k in inspect.signature(loss).parameters})


def sides(chosen, rejected):
    """Log-probs of one pair, all tokens counted; the shorter side is padded with mask 0."""
    T = max(len(chosen), len(rejected))
    rows = [list(row) + [-9.0] * (T - len(row)) for row in (chosen, rejected)]
    masks = [[1] * len(row) + [0] * (T - len(row)) for row in (chosen, rejected)]
    return torch.tensor(rows, requires_grad=True), torch.tensor(masks)


def gradient(loss, logprobs):
    return torch.autograd.grad(loss, logprobs)[0]


# ---------------------------------------------------------------------------- all four

@pytest.mark.parametrize("name", SIBLINGS)
def test_signs(stages, name):
    """At the start each lifts chosen and lowers rejected, on completion tokens alone."""
    mask = ragged(6, 8)
    logprobs = (-torch.rand(6, 8)).requires_grad_()
    loss, count, metrics = call(stages, name, logprobs, mask)
    grad = gradient(loss, logprobs)
    assert count == (6 if name == "DPO/kto" else 3)                  # rows, or pairs
    assert (grad[:3][mask[:3] == 1] < 0).all() and (grad[3:][mask[3:] == 1] > 0).all()
    assert grad[mask == 0].abs().max() == 0
    if name == "DPO/kto":
        return
    sums = (logprobs * mask).sum(1)
    assert metrics["chosen_logprobs"].item() == pytest.approx(sums[:3].sum().item())
    assert metrics["rejected_logprobs"].item() == pytest.approx(sums[3:].sum().item())


@pytest.mark.parametrize("name", [name for name in SIBLINGS if name != "DPO/kto"])
def test_margins_and_accuracy(stages, name):
    """By the method's own reward, a pair at a time; equal sides are not right."""
    mask, logprobs, ref = ragged(4, 7, 1), -torch.rand(4, 7), -torch.rand(4, 7)
    sums, gaps = (logprobs * mask).sum(1), ((logprobs - ref) * mask).sum(1)
    means = sums / mask.sum(1)
    reward = {"DPO/ipo": gaps, "DPO/simpo": 0.3 * means,
              "DPO/orpo": (means.exp() / (1 - means.exp())).log()}[name]
    margins = [(reward[i] - reward[i + 2]).item() for i in (0, 1)]
    _, _, metrics = call(stages, name, logprobs, mask, ref)
    assert metrics["margins"].item() == pytest.approx(sum(margins))
    assert metrics["accuracy"] == sum(m > 0 for m in margins)
    same = logprobs[[0, 1, 0, 1]]
    assert call(stages, name, same, mask[[0, 1, 0, 1]], same)[2]["accuracy"] == 0


@pytest.mark.parametrize("name", SIBLINGS)
def test_splitting_a_batch(stages, name):
    """Parts of other lengths add up to the whole."""
    mask, logprobs, ref = ragged(8, 9), -torch.rand(8, 9), -torch.rand(8, 9)
    f = lambda i: call(stages, name, logprobs[i], mask[i], ref[i])
    whole, parts = f(list(range(8))), [f([0, 4]), f([1, 2, 3, 5, 6, 7])]
    assert float(whole[0]) == pytest.approx(sum(float(p[0]) for p in parts), rel=1e-12)
    assert int(whole[1]) == sum(p[1] for p in parts) == (8 if name == "DPO/kto" else 4)
    for k, v in whole[2].items():
        assert float(v) == pytest.approx(sum(float(p[2][k]) for p in parts), rel=1e-12), k


@pytest.mark.parametrize("name", SIBLINGS)
def test_reference_free(stages, name, make, monkeypatch):
    """SimPO and ORPO hold one model, not two."""
    loaded, load = [], kernel.load
    monkeypatch.setattr(stages[name], "load", lambda *args: loaded.append(args) or load(*args))
    run(*make(name, steps=1))
    assert len(loaded) == (1 if name in ("DPO/simpo", "DPO/orpo") else 2)


# ---------------------------------------------------------------------------- IPO

@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
def test_ipo(stages, beta):
    """1 / (4 beta^2) at the start, 0 at the target; beyond it the gradient turns round. Sums: the
    gradient of a token does not depend on the length."""
    logprobs, mask = sides([-1.0, -2.0, -0.5], [-1.0])
    loss, _, _ = call(stages, "DPO/ipo", logprobs, mask, beta=beta)
    assert loss.item() == pytest.approx(1 / (4 * beta ** 2))
    assert torch.allclose(gradient(loss, logprobs), torch.tensor([[-1.0] * 3, [1.0, 0, 0]]) / beta)
    target = 1 / (2 * beta)
    for margin, sign in ((target, 0), (target + 1, 1), (target - 1, -1)):
        ref = logprobs.detach().clone()
        ref[0, 1] -= 0.75 * margin
        ref[1, 0] += 0.25 * margin
        loss, _, metrics = call(stages, "DPO/ipo", logprobs, mask, ref, beta=beta)
        assert metrics["margins"].item() == pytest.approx(margin)
        assert loss.item() == pytest.approx((margin - target) ** 2, abs=1e-20)
        assert torch.allclose(gradient(loss, logprobs)[0], torch.full((3,), 2.0 * sign), atol=1e-9)


def test_ipo_needs_a_target(make, refuses):
    stage, cfg = make("DPO/ipo", beta=0.0)
    refuses(lambda: run(stage, cfg), "--beta must lie in (0, 100], not 0.0")


# ---------------------------------------------------------------------------- SimPO

def test_simpo_of_equal_means(stages):
    for gamma in (0.0, 0.4, 2.0):
        logprobs, mask = sides([-1.0, -2.0], [-1.5, -1.5, -1.5])
        loss, _, metrics = call(stages, "DPO/simpo", logprobs, mask, gamma=gamma)
        assert loss.item() == pytest.approx(math.log1p(math.exp(gamma)))    # - log sigmoid(- gamma)
        assert metrics["margins"] == 0


def test_simpo_is_blind_to_length(stages):
    """A completion said twice weighs what it weighed; a token of it half as much."""
    for twice in (0, 1):
        pair = [[-1.0, -2.0, -0.3], [-0.7, -1.9]]
        once, mask = sides(*pair)
        loss, _, _ = call(stages, "DPO/simpo", once, mask)
        pair[twice] = pair[twice] * 2
        more, wide = sides(*pair)
        again, _, _ = call(stages, "DPO/simpo", more, wide)
        assert again.item() == pytest.approx(loss.item())
        assert gradient(again, more)[twice, 0].item() == pytest.approx(
            gradient(loss, once)[twice, 0].item() / 2)


def test_simpo_value(stages):
    """-log sigmoid(beta (mean_w - mean_l) - gamma): gamma is not scaled by beta."""
    logprobs, mask = sides([-0.5, -0.7], [-1.0, -2.0, -3.0])
    loss, _, metrics = call(stages, "DPO/simpo", logprobs, mask, beta=2.5, gamma=1.2)
    assert metrics["margins"].item() == pytest.approx(2.5 * 1.4)            # without gamma
    assert loss.item() == pytest.approx(math.log1p(math.exp(1.2 - 2.5 * 1.4)))


# ---------------------------------------------------------------------------- ORPO

def test_orpo_of_equal_sides(stages):
    logprobs, mask = sides([-1.0, -2.0], [-1.5, -1.5, -1.5])
    loss, _, metrics = call(stages, "DPO/orpo", logprobs, mask, lam=0.7)
    assert loss.item() == pytest.approx(1.5 + 0.7 * math.log(2))
    assert metrics["nll"].item() == pytest.approx(1.5) and metrics["margins"].abs() < 1e-12


def test_orpo_value(stages):
    p, q = 0.6, 0.3
    logprobs, mask = sides([math.log(p)] * 2, [math.log(q)] * 3)
    loss, _, metrics = call(stages, "DPO/orpo", logprobs, mask, lam=0.5)
    ratio = (p / (1 - p)) / (q / (1 - q))
    assert metrics["margins"].item() == pytest.approx(math.log(ratio))
    assert loss.item() == pytest.approx(-math.log(p) - 0.5 * math.log(ratio / (1 + ratio)))


def test_orpo_imitates_chosen_alone(stages):
    """Without the odds ratio nothing pushes rejected; with it, imitation is still there."""
    logprobs, mask = sides([-1.0, -2.0], [-0.2])
    grad = gradient(call(stages, "DPO/orpo", logprobs, mask, lam=0.0)[0], logprobs)
    assert grad.tolist() == [[-0.5, -0.5], [0, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chosen", [0.0, -1e-12, -1e-8, -1e-4, -1.0, -100.0, -1e4])
@pytest.mark.parametrize("rejected", [0.0, -1e-9, -0.5, -1e4])
def test_orpo_is_finite(stages, chosen, rejected, dtype):
    logprobs = torch.tensor([[chosen] * 3, [rejected] * 3], dtype=dtype, requires_grad=True)
    loss, _, metrics = call(stages, "DPO/orpo", logprobs, torch.ones(2, 3))
    assert loss.isfinite() and gradient(loss, logprobs).isfinite().all()
    assert metrics["margins"].isfinite()


def test_orpo_keeps_its_digits(stages):
    """In fp32, 1 - exp(-1e-5) would have lost half of them."""
    logprobs = torch.tensor([[-1e-5], [-math.log(2)]], dtype=torch.float32)
    margin = call(stages, "DPO/orpo", logprobs, torch.ones(2, 1))[2]["margins"].item()
    assert margin == pytest.approx(-1e-5 - math.log(-math.expm1(-1e-5)), rel=1e-6)


# ---------------------------------------------------------------------------- KTO: the loss

def test_kto_at_the_start(stages):
    """Every value is one half of its weight; the gradient beta / 4 of it."""
    logprobs, mask = sides([-1.0, -2.0], [-1.5, -0.5, -1.5])
    loss, count, _ = call(stages, "DPO/kto", logprobs, mask, kl=0.0, beta=0.3)
    assert count == 2 and loss.item() == pytest.approx(1.3 / 2 + 0.8 / 2)
    expected = torch.tensor([[-1.3, -1.3, 0], [0.8] * 3]) * 0.3 / 4
    assert torch.allclose(gradient(loss, logprobs), expected)


@pytest.mark.parametrize("kl", [0.0, 0.5, 3.0])
def test_kto_value(stages, kl):
    """lam - v(x, y), eq. 8: what was gained beyond kl, or lost below it."""
    logprobs, mask = sides([-1.0, -2.0], [-1.5])
    ref = logprobs.detach() + torch.tensor([[-0.8, -0.4], [0.6, 0.0]])       # rewards 1.2 and -0.6
    loss, _, metrics = call(stages, "DPO/kto", logprobs, mask, ref, beta=0.5, kl=kl, lam_d=1.2,
                            lam_u=0.9)
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    desirable = 1.2 - 1.2 * sigmoid(0.5 * (1.2 - kl))
    undesirable = 0.9 - 0.9 * sigmoid(0.5 * (kl + 0.6))
    assert loss.item() == pytest.approx(desirable + undesirable)
    assert metrics["above"].item() == pytest.approx(1.2 - kl + kl + 0.6)
    assert metrics["right"] == (kl < 1.2) + 1


def test_kto_rows_do_not_know_of_each_other(stages):
    """Unpaired: the gradient of one side is the same whatever stands on the other."""
    logprobs, mask = sides([-1.0, -2.0], [-1.5, -0.5])
    ref, grads = logprobs.detach() - 0.3, []
    for other in (0.0, 5.0):
        ref[1, 0] += other
        grads.append(gradient(call(stages, "DPO/kto", logprobs, mask, ref)[0], logprobs))
    assert torch.equal(grads[0][0], grads[1][0]) and not torch.equal(grads[0][1], grads[1][1])


# ---------------------------------------------------------------------------- KTO: the baseline

def world_of(gains):
    """Row i asks (1, i) and answers 10 + i, or 20 + i, and the end: one after the other. -> rows, a
    policy that has gained `gains(question, answer)` nats on the answer, and its reference."""
    rows = [([1, i, side + i, 9], [0, 0, 1, 1], int(side == 10))
            for i in range(6) for side in (10, 20)]

    def policy(ids, targets):
        assert not torch.is_grad_enabled()
        gained = torch.tensor([[gains(int(row[1]), int(t) % 10) if t >= 10 else 0.0 for t in ts]
                               for row, ts in zip(ids, targets)])
        return (gained - 1.0) * (targets >= 0)

    policy.cfg = SimpleNamespace(block_size=64)
    return rows, policy, lambda ids, targets: -1.0 * (targets >= 0)


def baseline(stages, rows, policy, ref, rank=0, world=1, micro_batch=4):
    cfg, stage = SimpleNamespace(micro_batch=micro_batch, micro_tokens=999), stages["DPO/kto"]
    mixed = stage.mismatch(rows, 64, "here")
    return stage.baseline(cfg, policy, ref, mixed, rank, world, "cpu")


def test_mismatch(stages):
    """Every prompt once before the completion of the next row that has another prompt, which alone
    counts: a pair's two rows are neighbours, and may not be each other's; nor may the last row and
    the first. Nothing longer than the context."""
    rows = [([1, 2, 3, 11, 9], [0, 0, 0, 1, 1], 1), ([4, 12, 13, 9], [0, 1, 1, 1], 1),
            ([4, 23, 9], [0, 1, 1], 0), ([5, 6, 15, 9], [0, 0, 1, 1], 0),
            ([1, 2, 3, 21, 22, 9], [0, 0, 0, 1, 1, 1], 0)]
    mixed = stages["DPO/kto"].mismatch(rows, 64, "here")
    assert [list(ids) for ids, *_ in mixed] == [
        [1, 2, 3, 12, 13, 9], [4, 15, 9], [4, 15, 9], [5, 6, 21, 22, 9], [1, 2, 3, 12, 13, 9]]
    assert [list(mask) for _, mask, _ in mixed][:2] == [[0, 0, 0, 1, 1, 1], [0, 1, 1]]
    assert [*map(list, stages["DPO/kto"].mismatch(rows, 5, "here")[0][:2])] == [
        [1, 2, 3, 12, 13], [0, 0, 0, 1, 1]]


def test_one_prompt_has_no_mismatch(stages, make, data, tmp_path, refuses):
    """One row, or one pair, or many rows of one prompt: kl would be that of matched ones."""
    row = ([1, 11, 9], [0, 1, 1], 1)
    for rows in ([row], [row, ([1, 21, 9], [0, 1, 1], 0)] * 3):
        refuses(lambda: stages["DPO/kto"].mismatch(rows, 64, "a.jsonl"),
                "all rows of a.jsonl have one prompt")
    for path in data.iterdir():
        shutil.copy(path, tmp_path)
    for name in ("pairs_train.jsonl", "pairs_val.jsonl"):
        whole = (tmp_path / name).read_text()
        (tmp_path / name).write_text(whole.splitlines()[0])
        refuses(lambda: run(*make("DPO/kto", data=tmp_path)), f"{tmp_path}/{name} have one prompt")
        (tmp_path / name).write_text(whole)


def test_baseline_is_of_mismatched_pairs(stages):
    """A policy that gained on the pairs themselves has drifted nowhere else; one that gained on
    other answers to the same questions has, and by the mean of that."""
    assert baseline(stages, *world_of(lambda q, a: 5.0 * (q == a))) == 0
    assert baseline(stages, *world_of(lambda q, a: 0.25 * (q != a))) == pytest.approx(0.25)
    assert baseline(stages, *world_of(lambda q, a: q * 1.0 * ((q + 1) % 6 == a))) == (
        pytest.approx(2.5))                                    # the mean of 0..5
    assert baseline(stages, *world_of(lambda q, a: -3.0)) == 0               # clamped


def test_baseline_is_one_number_for_all_ranks(stages, monkeypatch):
    """The ranks' parts add up to the whole batch's; the clamp comes after the sum."""
    rows, policy, ref = world_of(lambda q, a: (q - 1.5) * ((q + 1) % 6 == a))
    whole = baseline(stages, rows, policy, ref)
    assert whole == pytest.approx(1.0)
    for world in (2, 3):
        parts = []
        monkeypatch.setattr(stages["DPO/kto"], "all_sum",
                            lambda gap: parts.append(gap) or {"gap": 0})
        for rank in range(world):
            baseline(stages, rows, policy, ref, rank, world, micro_batch=2)
        assert min(parts) < max(parts) and sum(parts) / 12 == pytest.approx(whole)


def test_kto_baseline_in_a_run(stages, make, monkeypatch, tmp_path):
    """One kl for all micro-batches, a plain number; of the whole batch, before its update, and of
    its own rows' prompts. It is logged, and 0 before the first."""
    stage, seen, asked = stages["DPO/kto"], [], []
    loss, made = stage.kto_loss, stage.baseline

    def spy(logprobs, ref_logprobs, mask, desirable, kl, *rest):
        seen.append(kl)
        return loss(logprobs, ref_logprobs, mask, desirable, kl, *rest)

    def drifted(cfg, model, ref, mixed, *rest):
        asked.append(sorted(ids[: mask.index(1)] for ids, mask, _ in mixed))
        return made(cfg, model, ref, mixed, *rest) + len(mixed)

    monkeypatch.setattr(stage, "kto_loss", spy)
    monkeypatch.setattr(stage, "baseline", drifted)
    trained = []
    monkeypatch.setattr(stage, "by_length", lambda rows, *rest: trained.append(sorted(
        ids[: mask.index(1)] for ids, mask, _ in rows)) or kernel.by_length(rows, *rest)
        if isinstance(rows[0], tuple) else kernel.by_length(rows, *rest))
    stage, cfg = make("DPO/kto", steps=3, lr=1e-2, micro_batch=2)
    run(stage, cfg)
    kl = [line["kl"] for line in steps_of(tmp_path / "out/kto.jsonl")]
    assert all(type(k) is float for k in kl) and kl[0] == 8 and min(kl) >= 8
    for step in range(3):
        assert seen[4 * step : 4 * step + 4] == [kl[step]] * 4
        assert asked[step] in (trained[2 * step], trained[2 * step + 1])
        assert trained[2 * step] == trained[2 * step + 1]
    val = seen[12:]
    assert len(val) == 5 and len(set(val)) == 1 and 18 <= val[0]            # 9 pairs, two at a time


# ---------------------------------------------------------------------------- KTO: its rows

def labelled(data, tmp_path, change):
    """The pairs of the tiny world, changed row by row to rows of one completion."""
    for path in data.iterdir():
        shutil.copy(path, tmp_path)
    for name in ("pairs_train.jsonl", "pairs_val.jsonl"):
        pairs = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        write_rows(tmp_path / name, sum((change(i, pair) for i, pair in enumerate(pairs)), []))
    return tmp_path


def thumbs(i, pair):
    """A pair as the two rows that it is read as."""
    return [{"prompt": pair["prompt"], "completion": pair["chosen"], "label": True},
            {"prompt": pair["prompt"], "completion": pair["rejected"], "kto_tag": "false"}]


def test_a_pair_is_two_rows(make, data, tmp_path):
    """The same weights from pairs and from their rows; what a pair alone has is left out."""
    logs = []
    for name, folder in (("a", data), ("b", labelled(data, tmp_path, thumbs))):
        stage, cfg = make("DPO/kto", steps=2, data=folder, out=tmp_path / name)
        run(stage, cfg)
        logs.append(steps_of(tmp_path / name / "kto.jsonl")[-1])
    assert torch.equal(weights(tmp_path / "a/kto.pt"), weights(tmp_path / "b/kto.pt"))
    assert {"val_accuracy", "val_margins"} == set(logs[0]) - set(logs[1])
    assert logs[0]["val_margins"] == pytest.approx(2 * logs[0]["val_above"])  # kl cancels
    for key in ("val_loss", "val_right", "val_above", "kl"):
        assert logs[0][key] == pytest.approx(logs[1][key], rel=1e-12), key


def test_labels_and_pairs_in_one_file(make, data, tmp_path):
    """A file may mix them; each label has its own weight, so that counts may differ."""
    folder = labelled(data, tmp_path, lambda i, pair: [thumbs(i, pair)[0]] if i % 2 else [pair])
    run(*make("DPO/kto", steps=2, data=folder, lam_u=1.5))
    head = json.loads((tmp_path / "out/kto.jsonl").read_text().splitlines()[0])
    assert (head["rows"], head["desirable"]) == (36, 24)
    assert steps_of(tmp_path / "out/kto.jsonl")[-1]["val_accuracy"] >= 0


def test_weights_of_the_labels(stages):
    """Each on its own rows, in whatever order these stand."""
    logprobs, mask = -torch.rand(3, 4), torch.ones(3, 4)
    f = lambda **lam: call(stages, "DPO/kto", logprobs, mask, desirable=torch.tensor([0, 1, 0]),
                           **dict(lam_d=0.0, lam_u=0.0, kl=0.0, beta=0.3) | lam)[0].item()
    assert f(lam_d=3.0) == pytest.approx(1.5) and f(lam_u=3.0) == pytest.approx(3.0)


THUMB = {"prompt": "1+1=?", "completion": "2", "label": True}


@pytest.mark.parametrize("row, said", [
    (THUMB | {"label": "good"}, "true or false, not good"),
    (THUMB | {"label": 0.7}, "true or false, not 0.7"),
    (THUMB | {"kto_tag": False}, "true or false, not false, true"),
    (THUMB | {"label": None}, "no 'rejected or label or kto_tag'"),
    ({"prompt": "1", "completion": "2", "rejected": "3"}, "its label is true or false, not None"),
    (THUMB | {"chosen": "2", "rejected": "3"}, "and not both"),
    ({"prompt": "1", "chosen": "2", "rejected": "3", "label": False}, "and not both"),
    ({"prompt": "1", "chosen": "2", "label": True}, "and not both"),
    ({"prompt": "1", "chosen": "2", "completion": "3"}, "no 'rejected or"),
    (THUMB | {"completion": ""}, "no 'chosen or completion'"),
    (THUMB | {"completion": [{"role": "user", "content": "2"}]}, "completion: its last turn is"),
    (THUMB | {"prompt": []}, "no 'prompt'")])
def test_rows_that_are_refused(row, said, make, data, tmp_path, refuses):
    folder = labelled(data, tmp_path, lambda i, pair: [row] if i == 4 else thumbs(i, pair))
    refuses(lambda: run(*make("DPO/kto", data=folder)), "pairs_train.jsonl, line 9: ", said)


@pytest.mark.parametrize("label, kind", [(True, 1), (1, 1), ("True", 1), (1.0, 1),
                                         (False, 0), (0, 0), (-1, 0), ("false", 0)])
def test_labels(label, kind, stages):
    assert kernel.label_of({"label": label}) == kernel.label_of({"kto_tag": label}) == kind
