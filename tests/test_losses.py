"""The losses: their values, their gradients, and that their sums may be split anywhere."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DEVICE, PAIRS, STAGES, kernel

pytestmark = pytest.mark.usefixtures("double", "on_device")
EPS = 0.2


def needs(name):
    return pytest.mark.skipif(name not in STAGES, reason=f"{name}.py is not there yet")


def ragged(B, T, seed=0):
    """A completion mask (B, T): each row has its own prompt and its own length."""
    rng = np.random.default_rng(seed)
    mask = torch.zeros(B, T, dtype=torch.long)
    for row in mask:
        a = rng.integers(0, T // 2)
        row[a : rng.integers(a + 1, T + 1)] = 1
    return mask


# ---------------------------------------------------------------------------- 00, 01, 02

def test_sft_with_a_full_mask_is_pretraining(stages):
    torch.manual_seed(0)
    model = kernel.GPT(kernel.GPTConfig(vocab_size=20, block_size=16, n_layer=1, n_head=2,
                                        n_embd=16))
    rows = torch.randint(20, (3, 12))
    plain = stages["00_pretrain"].pretrain_loss(model(rows[:, :-1], rows[:, 1:]))
    ids, targets, mask = kernel.shift(rows, torch.ones_like(rows))
    masked = stages["01_sft"].sft_loss(model(ids, targets), mask)
    assert torch.allclose(plain[0], masked[0], rtol=1e-12) and plain[1] == masked[1] == 33
    expected = torch.nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1),
                                                 rows[:, 1:].flatten(), reduction="sum")
    assert torch.allclose(plain[0], expected, rtol=1e-12)


def test_sft_counts_completion_tokens_alone(stages):
    loss = stages["01_sft"].sft_loss
    logprobs = -torch.arange(1.0, 9).view(2, 4).requires_grad_()
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 0]])
    total, count, _ = loss(logprobs, mask)
    assert (total, count) == (3 + 4 + 6, 3)
    (grad,) = torch.autograd.grad(total, logprobs)
    assert torch.equal(grad, -mask.double())


# ---------------------------------------------------------------------------- 04

def grpo(stages, logprobs, old, ref, A, mask, beta=0.0):
    return stages["04_rlvr"].grpo_loss(logprobs, old, ref, A, mask, EPS, beta)


def test_grpo_gradient_at_ratio_one(stages):
    """The plain policy gradient: -A / length on completion tokens, 0 elsewhere; the value is the
    sum of -A, and nothing is clipped."""
    mask = ragged(6, 9)
    logprobs = (-torch.rand(6, 9)).requires_grad_()
    A = torch.tensor([1.0, -2, 0.5, 0, 3, -1])
    loss, count, metrics = grpo(stages, logprobs, logprobs.detach(), logprobs.detach(), A, mask)
    (grad,) = torch.autograd.grad(loss, logprobs)
    assert torch.allclose(grad, -A[:, None] * mask / mask.sum(1, keepdim=True), atol=1e-15)
    assert loss.item() == pytest.approx(-A.sum().item()) and count == 6
    assert metrics["clip_frac"] == 0 and metrics["kl"] == 0


@pytest.mark.parametrize("A", [1.0, -1.0])
@pytest.mark.parametrize("ratio", [0.5, 0.9, 1.1, 1.5])
def test_grpo_quadrants(stages, A, ratio):
    """min(ratio A, clip(ratio) A) for both signs: the gradient stops exactly where a further step
    would be rewarded beyond the range, and never where it would lead back."""
    logprobs = torch.full((1, 1), math.log(ratio), requires_grad=True)
    loss, _, metrics = grpo(stages, logprobs, torch.zeros(1, 1), torch.zeros(1, 1),
                            torch.tensor([A]), torch.ones(1, 1))
    (grad,) = torch.autograd.grad(loss, logprobs)
    stopped = (A, ratio) in [(1.0, 1.5), (-1.0, 0.5)]
    held = {(1.0, 1.5): 1 + EPS, (-1.0, 0.5): 1 - EPS}.get((A, ratio), ratio)
    assert loss.item() == pytest.approx(-held * A)
    assert grad.item() == pytest.approx(0.0 if stopped else -ratio * A)
    assert metrics["clip_frac"] == float(stopped)


def test_k3(stages):
    """exp(d) - d - 1 with d = log p_ref - log p, in the loss with +beta, and its gradient; in fp32
    it stays right where exp(d) - 1 - d has lost all its digits."""
    d = torch.tensor([[-2.0, -0.3, 0.0, 1e-4, 0.4, 1.5]])
    logprobs = torch.full_like(d, -1.0, requires_grad=True)
    mask = torch.ones_like(d)
    loss, _, metrics = grpo(stages, logprobs, logprobs.detach(), logprobs.detach() + d,
                            torch.zeros(1), mask, beta=0.5)
    expected = (d.exp() - d - 1).mean()
    assert loss.item() == pytest.approx(0.5 * expected.item(), rel=1e-9)
    assert metrics["kl"].item() == pytest.approx(expected.item(), rel=1e-9)
    (grad,) = torch.autograd.grad(loss, logprobs)
    assert torch.allclose(grad, 0.5 * (1 - d.exp()) / 6, atol=1e-12)
    for small in (1e-3, 1e-4, -1e-4):
        lp = torch.zeros(1, 1, dtype=torch.float32)
        kl = grpo(stages, lp, lp, lp + small, torch.zeros(1), torch.ones(1, 1), 1.0)[2]["kl"]
        assert kl.item() == pytest.approx(small ** 2 / 2, rel=0.02)


def test_k3_estimates_the_kl(stages):
    """Its mean over p's samples is KL(p || ref), computed here by summing over a vocabulary."""
    torch.manual_seed(0)
    p, ref = torch.randn(2, 7).log_softmax(-1)
    lp, lr = p[None], ref[None]                       # each token once, weighted by its probability
    d = lr - lp
    k3 = torch.stack([grpo(stages, lp[:, [i]], lp[:, [i]], lr[:, [i]], torch.zeros(1),
                           torch.ones(1, 1), 1.0)[0] for i in range(7)])
    assert (p.exp() * k3).sum().item() == pytest.approx((p.exp() * -d[0]).sum().item(), rel=1e-9)


def test_group_advantages(stages):
    f = stages["04_rlvr"].group_advantages
    rewards = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0.1] * 4])
    A = f(rewards)
    assert A.sum(1).abs().max() < 1e-12
    assert torch.equal(A[2:], torch.zeros(3, 4))      # exactly: not noise divided by a tiny std
    assert torch.allclose(A[1], torch.tensor([-0.5, -0.5, -0.5, 1.5]))       # unbiased: std is 1/2
    assert torch.allclose(A[:2].std(1), torch.ones(2))
    assert torch.equal(f(rewards[1:2]), A[1:2])       # a group knows nothing of the others
    noisy = torch.full((1, 8), 0.1, dtype=torch.float32)
    assert torch.equal(f(noisy), torch.zeros(1, 8, dtype=torch.float32))
    assert f(torch.tensor([[0.0, 0.0], [0.0, 1.0]])).isfinite().all()


# ---------------------------------------------------------------------------- 03 and 06

@needs("03_dpo")
def test_dpo_at_the_reference(stages):
    """Step 0: loss ln 2, margin 0, and a gradient that lifts chosen and lowers rejected."""
    mask, beta = ragged(6, 8), 0.3
    logprobs = (-torch.rand(6, 8)).requires_grad_()
    loss, count, metrics = stages["03_dpo"].dpo_loss(logprobs, logprobs.detach(), mask, beta)
    assert loss.item() == pytest.approx(3 * math.log(2)) and count == 3
    assert metrics["margins"] == 0 and metrics["accuracy"] == 0
    (grad,) = torch.autograd.grad(loss, logprobs)
    sign = torch.tensor([-1.0] * 3 + [1.0] * 3)[:, None]
    assert torch.allclose(grad, sign * beta / 2 * mask)          # sums: no division by the length


@needs("03_dpo")
def test_dpo_value(stages):
    mask = ragged(4, 7, 1)
    lp, ref = -torch.rand(2, 4, 7)
    loss, _, metrics = stages["03_dpo"].dpo_loss(lp, ref, mask, 0.3)
    r = 0.3 * ((lp - ref) * mask).sum(1)
    margins = [(r[i] - r[i + 2]).item() for i in (0, 1)]
    assert loss.item() == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins))
    assert metrics["margins"].item() == pytest.approx(sum(margins))
    assert metrics["accuracy"] == sum(m > 0 for m in margins)


@needs("06_reward")
def test_reward_loss(stages):
    f = stages["06_reward"].reward_loss
    scores = torch.full((6,), 1.7, requires_grad=True)
    loss, count, metrics = f(scores)
    assert loss.item() == pytest.approx(3 * math.log(2)) and count == 3
    (grad,) = torch.autograd.grad(loss, scores)
    assert torch.allclose(grad, torch.tensor([-0.5] * 3 + [0.5] * 3))
    assert f(torch.tensor([2.0, 0.0]))[0].item() == pytest.approx(math.log1p(math.exp(-2)))


@needs("06_reward")
def test_score_is_of_the_last_real_token(stages):
    """Whatever the padding is, and as if the row were alone; the last token's id matters."""
    torch.manual_seed(0)
    model = kernel.GPT(kernel.GPTConfig(vocab_size=20, block_size=16, n_layer=1, n_head=2,
                                        n_embd=16))
    torch.nn.init.normal_(model.embed.weight)
    scorer = stages["06_reward"].RewardModel(model)
    rows = [([1, 2, 3, 4, 5, 9], [0, 0, 1, 1, 1, 1]), ([1, 7, 9], [0, 1, 1]), ([4, 9], [0, 1])]
    ids, mask = (kernel.pad([row[i] for row in rows], DEVICE) for i in (0, 1))
    scores = scorer(ids, mask)
    for (row, m), score in zip(rows, scores):
        alone = scorer(torch.tensor([row]), torch.tensor([m]))
        by_hand = scorer.head(model.forward_hidden(torch.tensor([row]))[0, -1])
        assert torch.allclose(alone, score) and torch.allclose(by_hand, score)
    full = kernel.pad([r for r, _ in rows], DEVICE, fill=9)
    assert torch.allclose(scorer(full, mask), scores, rtol=1e-12)
    ids[1, 2] = 5
    assert abs(scorer(ids, mask)[1] - scores[1]) > 1e-6


@pytest.mark.parametrize("strip", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_sides_are_what_the_chat_says(stages, bpe, name, strip):
    """Where a template takes the blanks off a content's ends, so do both sides of a preference, as
    demonstrations do; elsewhere each blank is there. The last turn alone counts."""
    between = {"user": "<u>", "user assistant": "<a>", "assistant user": "<|end|><u>"}
    spec = {"kind": "json", "json": json.loads(Path(bpe).read_text()), "template": between,
            "strip": strip}
    spec["json"]["added_tokens"].append(dict(
        id=320, content="<|end|>", special=True, single_word=False, lstrip=False, rstrip=False,
        normalized=False))
    tok = kernel.Tokenizer(spec)
    prompt = [{"role": "user", "content": " How many\n"}, {"role": "assistant", "content": " 2 "},
              {"role": "user", "content": "nuts "}]
    sides = stages[name].encode(tok, {"prompt": prompt, "chosen": "\n an end. ", "rejected": "x "})
    for (ids, mask, *_), said in zip(sides, ("\n an end. ", "x ")):
        full, _ = tok.chat([*prompt, {"role": "assistant", "content": said}])
        n = len(tok.prompt(prompt))
        assert ids == full and mask == [0] * n + [1] * (len(ids) - n) and ids[-1] == tok.end
        assert tok.decode(ids[n:-1]) == (said.strip() if strip else said)
    if strip:
        with pytest.raises(ValueError, match="same"):
            stages[name].encode(tok, {"prompt": "x", "chosen": "a ", "rejected": " a"})


# ---------------------------------------------------------------------------- 05

@needs("05_ppo")
def test_gae_is_reward_to_go(stages):
    """gamma = lam = 1: what is still to come, minus the value; nothing beyond the completion."""
    mask = ragged(6, 9)
    rewards, values = torch.randn(2, 6, 9)
    advantages, returns = stages["05_ppo"].gae(rewards, values, mask, 1.0, 1.0)
    to_go = (rewards * mask).flip(1).cumsum(1).flip(1)
    assert torch.allclose(advantages, (to_go - values) * mask)
    assert torch.allclose(returns * mask, to_go * mask)


@needs("05_ppo")
@pytest.mark.parametrize("gamma, lam", [(0.9, 0.95), (1.0, 0.5), (0.97, 0.0)])
def test_gae_against_a_loop(stages, gamma, lam):
    """The defining sum, eq. 16, one row and one token at a time; no bootstrap past the end, and
    what stands in the padding (here: 1e9) is never seen."""
    mask = ragged(6, 9, 2)
    rewards, values = torch.randn(2, 6, 9)
    advantages, returns = stages["05_ppo"].gae(rewards.masked_fill(mask == 0, 1e9),
                                               values.masked_fill(mask == 0, 1e9), mask, gamma, lam)
    for i in range(6):
        at = np.flatnonzero(mask[i].tolist())
        r, v = rewards[i, at].tolist(), values[i, at].tolist() + [0.0]
        for t in range(len(at)):
            expected = sum((gamma * lam) ** k * (r[t + k] + gamma * v[t + k + 1] - v[t + k])
                           for k in range(len(at) - t))
            assert advantages[i, at[t]].item() == pytest.approx(expected, abs=1e-12)
            assert returns[i, at[t]].item() == pytest.approx(expected + v[t], abs=1e-12)
        assert advantages[i][mask[i] == 0].abs().max() == 0


def ppo(stages, logprob, value=0.0, old_value=0.0, A=0.0, ret=0.0, vf_coef=1.0):
    """A batch of one token, its old log-prob 0 -> loss, its gradients, metrics."""
    lp, v = (torch.full((1, 1), x, requires_grad=True) for x in (logprob, value))
    old, old_v, A, ret = (torch.full((1, 1), x) for x in (0.0, old_value, A, ret))
    loss, count, metrics = stages["05_ppo"].ppo_loss(lp, v, old, old_v, A, ret,
                                                     torch.ones(1, 1), EPS, vf_coef)
    grads = torch.autograd.grad(loss, [lp, v])
    return loss.item(), grads[0].item(), grads[1].item(), metrics


@needs("05_ppo")
@pytest.mark.parametrize("A", [1.0, -1.0])
@pytest.mark.parametrize("ratio", [0.5, 0.9, 1.0, 1.1, 1.5])
def test_ppo_quadrants(stages, A, ratio):
    loss, grad, _, metrics = ppo(stages, math.log(ratio), A=A, vf_coef=0.0)
    stopped = (A, ratio) in [(1.0, 1.5), (-1.0, 0.5)]
    held = {(1.0, 1.5): 1 + EPS, (-1.0, 0.5): 1 - EPS}.get((A, ratio), ratio)
    assert loss == pytest.approx(-held * A)
    assert grad == pytest.approx(0.0 if stopped else -ratio * A)
    assert metrics["clip_frac"] == float(stopped)


@needs("05_ppo")
def test_ppo_value_loss(stages):
    """Half the squared error; once past old +- eps towards the return there is nothing to gain, and
    away from it nothing is forgiven (the max, not the min)."""
    loss, _, grad, _ = ppo(stages, 0.0, value=0.1, ret=1.0)
    assert loss == pytest.approx(0.81 / 2) and grad == pytest.approx(-0.9)
    loss, _, grad, _ = ppo(stages, 0.0, value=0.5, ret=1.0)
    assert loss == pytest.approx(0.64 / 2) and grad == 0
    loss, _, grad, _ = ppo(stages, 0.0, value=-0.5, ret=1.0)
    assert loss == pytest.approx(2.25 / 2) and grad == pytest.approx(-1.5)
    assert ppo(stages, 0.0, value=0.1, ret=1.0, vf_coef=0.1)[0] == pytest.approx(0.0405)


@needs("05_ppo")
def test_whiten(stages):
    """Mean 0 and std 1 over all completion tokens of all batches together."""
    mask = [ragged(3, 7), ragged(5, 9, 1)]
    given = [(m, 5 + 3 * torch.randn(m.shape), m * 2, m) for m in mask]
    white = stages["05_ppo"].whiten(given)
    A = torch.cat([a[m == 1] for (_, a, _, m) in white])
    raw = torch.cat([a[m == 1] for (_, a, _, m) in given])
    assert torch.allclose(A, (raw - raw.mean()) / raw.std(unbiased=False))
    assert all(torch.equal(w[i], g[i]) for w, g in zip(white, given) for i in (0, 2, 3))


# ---------------------------------------------------------------------------- sums and counts

@pytest.mark.parametrize("name", STAGES)
def test_splitting_a_batch(stages, name):
    """The loss returns a sum and a count, so that parts add up to the whole: with different lengths
    a mean of means would not."""
    torch.manual_seed(0)
    stage, mask = stages[name], ragged(8, 9)
    lp, old, ref = -torch.rand(3, 8, 9)
    A = torch.randn(8)
    if name == "00_pretrain":
        f = lambda i: stage.pretrain_loss(lp[i])
    elif name in ("01_sft", "02_cot"):
        f = lambda i: stage.sft_loss(lp[i], mask[i])
    elif name == "03_dpo":
        f = lambda i: stage.dpo_loss(lp[i], ref[i], mask[i], 0.3)
    elif name == "06_reward":
        f = lambda i: stage.reward_loss(lp[i, 0])
    elif name == "04_rlvr":
        f = lambda i: stage.grpo_loss(lp[i], old[i], ref[i], A[i], mask[i], EPS, 0.1)
    else:
        f = lambda i: stage.ppo_loss(lp[i], old[i], old[i] + lp[i] / 9, ref[i], lp[i],
                                     A[i, None] * lp[i], mask[i], EPS, 0.1)
    pairs = name in ("03_dpo", "06_reward")
    parts = [[0, 4], [1, 2, 3, 5, 6, 7]] if pairs else [[0], [1, 2], [3, 4, 5, 6, 7]]
    whole, cut = f(list(range(8))), [f(i) for i in parts]
    assert float(whole[0]) == pytest.approx(sum(float(c[0]) for c in cut), rel=1e-12)
    assert int(whole[1]) == sum(int(c[1]) for c in cut)
    for k, v in whole[2].items():
        assert float(v) == pytest.approx(sum(float(c[2][k]) for c in cut), rel=1e-12, abs=1e-15), k
