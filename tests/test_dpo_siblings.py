"""The losses of DPO/ in closed form, the signs of their gradients, and KTO's baseline."""
import inspect
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import LOSS, kernel, run, steps_of
from test_losses import ragged

pytestmark = pytest.mark.usefixtures("double")
SIBLINGS = ["DPO/ipo", "DPO/simpo", "DPO/orpo", "DPO/kto"]
CONSTANTS = dict(gamma=0.4, lam=0.7, lam_d=1.3, lam_u=0.8, kl=0.5)


def call(stages, name, logprobs, mask, ref=None, beta=0.3, **constants):
    """The sibling's loss, whichever of these it takes -> loss, count, metrics."""
    loss = getattr(stages[name], LOSS[name])
    given = dict(logprobs=logprobs, ref_logprobs=logprobs.detach() if ref is None else ref,
                 completion_mask=mask, beta=beta, **CONSTANTS | constants)
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
    assert count == 3
    assert (grad[:3][mask[:3] == 1] < 0).all() and (grad[3:][mask[3:] == 1] > 0).all()
    assert grad[mask == 0].abs().max() == 0
    sums = (logprobs * mask).sum(1)
    assert metrics["chosen_logprobs"].item() == pytest.approx(sums[:3].sum().item())
    assert metrics["rejected_logprobs"].item() == pytest.approx(sums[3:].sum().item())


@pytest.mark.parametrize("name", SIBLINGS)
def test_margins_and_accuracy(stages, name):
    """By the method's own reward, a pair at a time; equal sides are not right."""
    mask, logprobs, ref = ragged(4, 7, 1), -torch.rand(4, 7), -torch.rand(4, 7)
    sums, gaps = (logprobs * mask).sum(1), ((logprobs - ref) * mask).sum(1)
    means = sums / mask.sum(1)
    reward = {"DPO/ipo": gaps, "DPO/kto": gaps, "DPO/simpo": 0.3 * means,
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
    assert int(whole[1]) == sum(p[1] for p in parts) == 4
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
    assert count == 1 and loss.item() == pytest.approx((1.3 / 2 + 0.8 / 2) / 2)
    expected = torch.tensor([[-1.3, -1.3, 0], [0.8] * 3]) * 0.3 / 4 / 2
    assert torch.allclose(gradient(loss, logprobs), expected)


@pytest.mark.parametrize("kl", [0.0, 0.5, 3.0])
def test_kto_value(stages, kl):
    """lam - v(x, y), eq. 8: what was gained beyond kl, or lost below it."""
    logprobs, mask = sides([-1.0, -2.0], [-1.5])
    ref = logprobs.detach() + torch.tensor([[-0.8, -0.4], [0.6, 0.0]])       # rewards 1.2 and -0.6
    loss, _, _ = call(stages, "DPO/kto", logprobs, mask, ref, beta=0.5, kl=kl, lam_d=1.2, lam_u=0.9)
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    desirable = 1.2 - 1.2 * sigmoid(0.5 * (1.2 - kl))
    undesirable = 0.9 - 0.9 * sigmoid(0.5 * (kl + 0.6))
    assert loss.item() == pytest.approx((desirable + undesirable) / 2)


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
    """Row i asks (1, i) and answers 10 + i or 20 + i, and the end. -> rows, a policy that has
    gained `gains(question, answer)` nats on the answer, and its reference."""
    rows = [[([1, i, side + i, 9], [0, 0, 1, 1]) for side in (10, 20)] for i in range(6)]

    def policy(ids, targets):
        assert not torch.is_grad_enabled()
        gained = torch.tensor([[gains(int(row[1]), int(t) % 10) if t >= 10 else 0.0 for t in ts]
                               for row, ts in zip(ids, targets)])
        return (gained - 1.0) * (targets >= 0)

    policy.cfg = SimpleNamespace(block_size=64)
    return rows, policy, lambda ids, targets: -1.0 * (targets >= 0)


def baseline(stages, rows, policy, ref, rank=0, world=1, micro_batch=4):
    cfg = SimpleNamespace(micro_batch=micro_batch)
    return stages["DPO/kto"].baseline(cfg, policy, ref, rows, rank, world, "cpu")


def test_mismatch(stages):
    """Every prompt once before the next row's two completions, whose tokens alone count; desirable
    with desirable; nothing longer than the context."""
    rows = [[([1, 2, 3, 11, 9], [0, 0, 0, 1, 1]), ([1, 2, 3, 21, 22, 9], [0, 0, 0, 1, 1, 1])],
            [([4, 12, 13, 14, 9], [0, 1, 1, 1, 1]), ([4, 23, 9], [0, 1, 1])],
            [([5, 6, 15, 9], [0, 0, 1, 1]), ([5, 6, 24, 9], [0, 0, 1, 1])]]
    mixed = stages["DPO/kto"].mismatch(rows, 64)
    assert [[ids for ids, _ in pair] for pair in mixed] == [
        [[1, 2, 3, 12, 13, 14, 9], [1, 2, 3, 23, 9]], [[4, 15, 9], [4, 24, 9]],
        [[5, 6, 11, 9], [5, 6, 21, 22, 9]]]
    assert [mask for _, mask in mixed[0]] == [[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1]]
    cut = stages["DPO/kto"].mismatch(rows, 5)
    assert cut[0][0] == ([1, 2, 3, 12, 13], [0, 0, 0, 1, 1])


def test_baseline_is_of_mismatched_pairs(stages):
    """A policy that gained on the pairs themselves has drifted nowhere else; one that gained on
    other answers to the same questions has, and by the mean of that."""
    assert baseline(stages, *world_of(lambda q, a: 5.0 * (q == a))) == 0
    assert baseline(stages, *world_of(lambda q, a: 0.25 * (q != a))) == pytest.approx(0.25)
    assert baseline(stages, *world_of(lambda q, a: q * 1.0 * ((q + 1) % 6 == a))) == (
        pytest.approx(2.5))                                    # the mean of 0..5
    assert baseline(stages, *world_of(lambda q, a: -3.0)) == 0               # clamped


def test_baseline_is_one_number_for_all_ranks(stages, monkeypatch):
    """The ranks' parts add up to the whole batch's; the clamp comes after the sum, and the
    neighbour of a rank's row is the batch's, not the rank's."""
    rows, policy, ref = world_of(lambda q, a: (q - 1.5) * ((q + 1) % 6 == a))
    whole = baseline(stages, rows, policy, ref)
    assert whole == pytest.approx(1.0)
    for world in (2, 3):
        parts = []
        monkeypatch.setattr(stages["DPO/kto"], "all_sum",
                            lambda gap: parts.append(gap) or {"gap": 0})
        for rank in range(world):
            baseline(stages, rows, policy, ref, rank, world, micro_batch=1)
        assert min(parts) < max(parts) and sum(parts) / 12 == pytest.approx(whole)


def test_kto_baseline_in_a_run(stages, make, monkeypatch, tmp_path):
    """One kl for all micro-batches, a plain number; of the whole batch, before its update. It is
    logged, and 0 before the first."""
    stage, seen = stages["DPO/kto"], []
    loss, made = stage.kto_loss, stage.baseline

    def spy(logprobs, ref_logprobs, mask, kl, *rest):
        seen.append(kl)
        return loss(logprobs, ref_logprobs, mask, kl, *rest)

    def drifted(cfg, model, ref, rows, *rest):
        return made(cfg, model, ref, rows, *rest) + len(rows)

    monkeypatch.setattr(stage, "kto_loss", spy)
    monkeypatch.setattr(stage, "baseline", drifted)
    stage, cfg = make("DPO/kto", steps=3, lr=1e-2, micro_batch=2)
    run(stage, cfg)
    kl = [line["kl"] for line in steps_of(tmp_path / "out/kto.jsonl")]
    assert all(type(k) is float for k in kl) and kl[0] == 8 and min(kl) >= 8
    for step in range(3):
        assert seen[4 * step : 4 * step + 4] == [kl[step]] * 4
    val = seen[12:]
    assert len(val) == 5 and len(set(val)) == 1 and 9 <= val[0]              # 9 rows, by 2


def test_kto_needs_two_pairs(make, refuses):
    stage, cfg = make("DPO/kto", batch_size=1)
    refuses(lambda: run(stage, cfg), "--batch_size must lie in [2, 1e6], not 1")
