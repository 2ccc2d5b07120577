"""Every loss and advantage against the papers' formulas in reference.py, in float64: the values to
1e-9, the gradients against central differences of the reference; and what k1, k2 and k3 estimate,
against the KL summed over a whole vocabulary."""
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import reference as R
import torch
from conftest import SCRIPTS, load_stage
from test_losses import ragged

pytestmark = pytest.mark.usefixtures("double")
SEEDS = range(3)
EPS, LOW, HIGH, BETA = 0.2, 0.2, 0.28, 0.1
stage = cache(load_stage)


def batch(seed):
    """Random rows with ragged masks, and rubbish outside them. The old policy is near enough that
    some tokens are clipped and some are not, on both sides."""
    rng, B, T = np.random.default_rng(seed), 8, 9
    normal = lambda *shape: rng.standard_normal(shape)
    logprobs = -rng.exponential(1.0, (B, T)) - 0.01
    values = normal(B, T)
    return SimpleNamespace(
        mask=ragged(B, T, seed).numpy(), logprobs=logprobs, old=logprobs + 0.4 * normal(B, T),
        ref=logprobs + 0.5 * normal(B, T), A=normal(B),
        values=values, old_values=values + 0.3 * normal(B, T), advantages=normal(B, T),
        returns=normal(B, T), scores=normal(B), z0=0.4, longest=T + 3)


def tensors(b):
    return SimpleNamespace(**{k: torch.tensor(v) if isinstance(v, np.ndarray) else v
                              for k, v in vars(b).items()})


# stage -> its loss; the paper's; the inputs that have a gradient. Both are given the batch b, and
# `held`, the inputs before finite differences moved one of them: what the gradient holds constant.
LOSSES = {
    "00_pretrain": (lambda s, b: s.pretrain_loss(b.logprobs),
                    lambda b, held: R.pretrain(b.logprobs)),
    "01_sft": (lambda s, b: s.sft_loss(b.logprobs, b.mask),
               lambda b, held: R.sft(b.logprobs, b.mask)),
    "02_cot": (lambda s, b: s.sft_loss(b.logprobs, b.mask),
               lambda b, held: R.sft(b.logprobs, b.mask)),
    "03_dpo": (lambda s, b: s.dpo_loss(b.logprobs, b.ref, b.mask, 0.3),
               lambda b, held: R.dpo(b.logprobs, b.ref, b.mask, 0.3)),
    "04_rlvr": (lambda s, b: s.grpo_loss(b.logprobs, b.old, b.ref, b.A, b.mask, EPS, BETA),
                lambda b, held: R.grpo(b.logprobs, b.old, b.ref, b.A, b.mask, EPS, BETA)),
    "05_ppo": (lambda s, b: s.ppo_loss(b.logprobs, b.values, b.old, b.old_values, b.advantages,
                                       b.returns, b.mask, EPS, 0.1),
               lambda b, held: R.ppo(b.logprobs, b.values, b.old, b.old_values, b.advantages,
                                     b.returns, b.mask, EPS, 0.1), "logprobs", "values"),
    "06_reward": (lambda s, b: s.reward_loss(b.scores),
                  lambda b, held: R.bradley_terry(b.scores), "scores"),
    "DPO/ipo": (lambda s, b: s.ipo_loss(b.logprobs, b.ref, b.mask, 0.3),
                lambda b, held: R.ipo(b.logprobs, b.ref, b.mask, 0.3)),
    "DPO/simpo": (lambda s, b: s.simpo_loss(b.logprobs, b.mask, 2.0, 0.7),
                  lambda b, held: R.simpo(b.logprobs, b.mask, 2.0, 0.7)),
    "DPO/orpo": (lambda s, b: s.orpo_loss(b.logprobs, b.mask, 0.5),
                 lambda b, held: R.orpo(b.logprobs, b.mask, 0.5)),
    "DPO/kto": (lambda s, b: s.kto_loss(b.logprobs, b.ref, b.mask, (torch.arange(8) < 4).long(),
                                        b.z0, 0.3, 1.0, 1.5),
                lambda b, held: R.kto(b.logprobs, b.ref, b.mask, [1] * 4 + [0] * 4, b.z0, 0.3,
                                      (1.0, 1.5))),
    "RL/reinforce": (lambda s, b: s.reinforce_loss(b.logprobs, b.ref, b.A, b.mask, BETA),
                     lambda b, held: R.reinforce(b.logprobs, b.ref, b.A, b.mask, BETA)),
    "RL/rloo": (lambda s, b: s.rloo_loss(b.logprobs, b.old, b.A, b.mask, EPS),
                lambda b, held: R.rloo(b.logprobs, b.old, b.A, b.mask, EPS)),
    "RL/dr_grpo": (lambda s, b: s.dr_grpo_loss(b.logprobs, b.old, b.ref, b.A, b.mask, EPS, BETA,
                                               b.longest),
                   lambda b, held: R.dr_grpo(b.logprobs, b.old, b.ref, b.A, b.mask, EPS, BETA,
                                             b.longest)),
    "RL/dapo": (lambda s, b: s.dapo_loss(b.logprobs, b.old, b.A, b.mask, LOW, HIGH),
                lambda b, held: R.dapo(b.logprobs, b.old, b.A, b.mask, LOW, HIGH)),
    "RL/gspo": (lambda s, b: s.gspo_loss(b.logprobs, b.old, b.ref, b.A, b.mask, 0.05, BETA),
                lambda b, held: R.gspo(b.logprobs, b.old, b.ref, b.A, b.mask, 0.05, 0.05, BETA)),
    "RL/cispo": (lambda s, b: s.cispo_loss(b.logprobs, b.old, b.A, b.mask, HIGH),
                 lambda b, held: R.cispo(b.logprobs, R.cispo_weights(
                     held.logprobs, b.old, b.mask, np.inf, HIGH), b.A, b.mask)),
}
LOSSES["RL/ppo"] = LOSSES["05_ppo"]


def test_no_loss_is_missing():
    assert set(LOSSES) == set(SCRIPTS)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", LOSSES)
def test_loss(name, seed):
    """The value, to 1e-9, and the gradient of sum / count in all inputs that have one."""
    ours, paper, *inputs = LOSSES[name]
    b, inputs = batch(seed), inputs or ["logprobs"]
    t = tensors(b)
    for key in inputs:
        getattr(t, key).requires_grad_()
    loss, count, _ = ours(stage(name), t)
    assert (loss / count).item() == pytest.approx(paper(b, b), rel=1e-9)
    grads = torch.autograd.grad(loss / count, [getattr(t, key) for key in inputs])
    for key, grad in zip(inputs, grads):
        moved = lambda x: paper(SimpleNamespace(**vars(b) | {key: x}), b)
        expected = R.gradient(moved, getattr(b, key))
        assert np.allclose(grad, expected, rtol=1e-6, atol=1e-9), key
        assert abs(expected).max() > 1e-3


# ---------------------------------------------------------------------------- metrics


def grpo_metrics(b):
    return {"kl": R.token_means(R.kl_rows(b.logprobs, b.ref, b.mask)),
            "clip_frac": R.token_means(R.surrogates(b.logprobs, b.old, b.A, b.mask, EPS, EPS,
                                                    R.clipped))}


def ppo_metrics(b):
    rows = zip(R.ratios(b.logprobs, b.old, b.mask), R.tokens(b.advantages, b.mask))
    return {"value_loss": R.value_loss(b.values, b.old_values, b.returns, b.mask, EPS),
            "clip_frac": R.token_mean([[R.clipped(r, a, EPS, EPS) for r, a in zip(*row)]
                                       for row in rows])}


def gspo_metrics(b):
    s = R.length_normalised_ratios(b.logprobs, b.old, b.mask)
    return {"kl": R.token_means(R.kl_rows(b.logprobs, b.ref, b.mask)),
            "clip_frac": np.mean([R.clipped(r, a, 0.05, 0.05) for r, a in zip(s, b.A)])}


def reinforce_metrics(b):
    return {"kl": R.token_means(R.kl_rows(b.logprobs, b.ref, b.mask))}


def rloo_metrics(b):
    rows = zip(R.sequence_ratios(b.logprobs, b.old, b.mask), b.A)
    return {"clip_frac": np.mean([R.clipped(r, a, EPS, EPS) for r, a in rows])}


def dapo_metrics(b):
    return {"clip_frac": R.token_mean(R.surrogates(b.logprobs, b.old, b.A, b.mask, LOW, HIGH,
                                                   R.clipped))}


def cispo_metrics(b):
    return {"clip_frac": R.token_mean([[float(r > 1 + HIGH) for r in row]
                                       for row in R.ratios(b.logprobs, b.old, b.mask)])}


def pair_metrics(rewards):
    margins = [w - l for w, l in R.halves(rewards)]
    return {"margins": np.mean(margins), "accuracy": np.mean([m > 0 for m in margins])}


def sums(b):
    chosen, rejected = zip(*R.halves(R.sequence_logprobs(b.logprobs, b.mask)))
    return {"chosen_logprobs": np.mean(chosen), "rejected_logprobs": np.mean(rejected)}


def kto_metrics(b):
    rewards = R.dpo_rewards(b.logprobs, b.ref, b.mask, 1)
    above = [r - b.z0 if i < 4 else b.z0 - r for i, r in enumerate(rewards)]
    return {"above": np.mean(above), "right": np.mean([a > 0 for a in above])}


METRICS = {
    "03_dpo": lambda b: pair_metrics(R.dpo_rewards(b.logprobs, b.ref, b.mask, 0.3)) | sums(b),
    "04_rlvr": grpo_metrics,
    "05_ppo": ppo_metrics,
    "06_reward": lambda b: pair_metrics(b.scores) | {
        "score": np.mean(b.scores), "score_square": np.mean(b.scores ** 2)},
    "DPO/ipo": lambda b: pair_metrics(R.dpo_rewards(b.logprobs, b.ref, b.mask, 1)) | sums(b),
    "DPO/simpo": lambda b: pair_metrics(R.simpo_rewards(b.logprobs, b.mask, 2.0)) | sums(b),
    "DPO/orpo": lambda b: pair_metrics(R.log_odds(b.logprobs, b.mask)) | sums(b) | {
        "nll": -np.mean([np.mean(w) for w, _ in R.halves(R.tokens(b.logprobs, b.mask))])},
    "DPO/kto": kto_metrics,
    "RL/reinforce": reinforce_metrics,
    "RL/rloo": rloo_metrics,
    "RL/dr_grpo": grpo_metrics,
    "RL/dapo": dapo_metrics,
    "RL/gspo": gspo_metrics,
    "RL/cispo": cispo_metrics,
    "RL/ppo": ppo_metrics,
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", METRICS)
def test_metrics(name, seed):
    """What the log shows: exactly these, and the random rows are clipped here and there."""
    b = batch(seed)
    loss, count, metrics = LOSSES[name][0](stage(name), tensors(b))
    expected = METRICS[name](b)
    assert metrics.keys() == expected.keys()
    for key, value in expected.items():
        assert float(metrics[key]) / float(count) == pytest.approx(value, rel=1e-9), key
    assert 0.05 < expected.get("clip_frac", 0.5) < 0.95


# ---------------------------------------------------------------------------- advantages


def rewards(seed, P=5, G=4):
    """Groups of right and wrong, of real numbers, and of equal ones."""
    rng = np.random.default_rng(seed)
    r = np.where(np.arange(P)[:, None] % 2, rng.standard_normal((P, G)), rng.integers(0, 2, (P, G)))
    r[-1] = 0.3
    return r


ADVANTAGES = {"04_rlvr": R.group_advantages, "RL/dapo": R.group_advantages,
              "RL/gspo": R.group_advantages, "RL/cispo": R.group_advantages,
              "RL/dr_grpo": R.centered_advantages, "RL/reinforce": R.centered_advantages,
              "RL/rloo": R.rloo_advantages}


@pytest.mark.parametrize("G", [2, 3, 8])
@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages(name, G):
    f = "rloo_advantages" if name == "RL/rloo" else "group_advantages"
    for seed in SEEDS:
        r = rewards(seed, G=G)
        ours = getattr(stage(name), f)(torch.tensor(r))
        assert np.allclose(ours, ADVANTAGES[name](r), rtol=1e-9, atol=1e-12)


def test_overlong_penalty():
    lengths = torch.arange(1, 31)
    for longest, near in ((30, 10), (30, 1), (40, 30)):
        ours = stage("RL/dapo").overlong_penalty(lengths, longest, near)
        expected = [R.overlong(int(n), longest, near) for n in lengths]
        assert np.allclose(ours, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (1.0, 0.95), (0.9, 0.5), (0.97, 0.0)])
def test_gae(seed, gamma, lam):
    b = batch(seed)
    t, expected = tensors(b), R.gae(b.returns, b.values, b.mask, gamma, lam)
    for name in ("05_ppo", "RL/ppo"):
        advantages, returns = stage(name).gae(t.returns, t.values, t.mask, gamma, lam)
        assert np.allclose(advantages, expected[0], rtol=1e-9, atol=1e-12)
        assert np.allclose(returns * t.mask, expected[1], rtol=1e-9, atol=1e-12)


def test_whiten():
    """Over all completion tokens of all batches: (A - mean) / std, the population's."""
    bs = [batch(seed) for seed in SEEDS]
    all_tokens = np.concatenate([row for b in bs for row in R.tokens(b.advantages, b.mask)])
    given = [(t.advantages, t.returns, t.mask) for t in map(tensors, bs)]
    for name in ("05_ppo", "RL/ppo"):
        for b, (A, _, _) in zip(bs, stage(name).whiten(given)):
            expected = (b.advantages - all_tokens.mean()) / all_tokens.std()
            assert np.allclose(A[b.mask == 1], expected[b.mask == 1], rtol=1e-9, atol=1e-12)


def test_kto_baseline():
    """Each prompt with the completion of the next row of another prompt, in the file's order,
    whatever the micro-batch; the mean over all rows, not below 0. Two made-up policies whose
    log-probs depend on everything that a row holds stand in for the models."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(5):
        prompt = list(rng.integers(1, 30, rng.integers(2, 6)))
        sides = [list(rng.integers(1, 30, rng.integers(2, 7))) for _ in range(2)]
        rows += [(prompt + c, [0] * len(prompt) + [1] * len(c), 1) for c in sides]

    def policy(scale):
        def logprobs(ids, targets):
            past = ids.double().cumsum(1)
            return -(1 + torch.sin(past * 0.7 + targets * 0.3)) * scale
        logprobs.cfg = SimpleNamespace(block_size=32)
        return logprobs

    def by_hand(scale, prompt, completion):
        row = prompt + completion
        return [-(1 + np.sin(sum(row[:t]) * 0.7 + row[t] * 0.3)) * scale
                for t in range(len(prompt), len(row))]

    # Both rows of a prompt get the first completion of the next prompt.
    s, pairs = stage("DPO/kto"), [(i, 2 * (i // 2 + 1) % 10) for i in range(10)]
    for scales in ((0.5, 0.9), (0.9, 0.5)):
        logprobs, ref = ([by_hand(scale, [x for x, m in zip(*rows[i][:2]) if not m],
                                  [x for x, m in zip(*rows[j][:2]) if m])
                          for i, j in pairs] for scale in scales)
        expected = R.kto_baseline(logprobs, ref, [[1] * len(row) for row in ref])
        assert (expected > 0) == (scales == (0.5, 0.9))
        for micro_batch in (1, 2, 5):
            cfg = SimpleNamespace(micro_batch=micro_batch, micro_tokens=999)
            ours = s.baseline(cfg, *map(policy, scales),
                              s.mismatch(rows, 32, "here"), 0, 1, "cpu")
            assert ours == pytest.approx(expected, rel=1e-9)


# ---------------------------------------------------------------------------- k1, k2, k3

V = 6


def policies(seed, step=1.0):
    """Logits (V,) of the policy, and the reference's probabilities, `step` away."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal(V)
    return logits, R.softmax(logits + step * rng.standard_normal(V))


def k3_of_04(p, ref):
    """04's KL term at each token of the vocabulary: A = 0, beta = 1, completions of one token."""
    return torch.stack([stage("04_rlvr").grpo_loss(
        p[i].view(1, 1), p[i].detach().view(1, 1), ref[i].view(1, 1), torch.zeros(1),
        torch.ones(1, 1), EPS, 1.0)[0] for i in range(V)])


def on_policy_gradient(k, logits, ref):
    """The gradient in the logits that k has as a loss, averaged over all samples of the policy: the
    sampling itself is not differentiated, as in training."""
    logits = torch.tensor(logits, requires_grad=True)
    p, ref = logits.log_softmax(0), torch.tensor(ref).log()
    return torch.autograd.grad((p.detach().exp() * k(p, ref)).sum(), logits)[0].numpy()


def kl_gradients(logits, ref):
    """Of KL(p || ref) and of KL(ref || p): finite differences of the sums over the vocabulary."""
    return (R.gradient(lambda x: R.kl(R.softmax(x), ref), logits),
            R.gradient(lambda x: R.kl(ref, R.softmax(x)), logits))


@pytest.mark.parametrize("seed", SEEDS)
def test_what_the_estimators_estimate(seed):
    """k1 and k3 have the mean KL(p || ref), wherever p is; k2 has it only near the reference: half
    of the way there, its relative error is half as large."""
    logits, ref = policies(seed)
    p = R.softmax(logits)
    exact = R.kl(p, ref)
    ours = k3_of_04(*(torch.tensor(x).log() for x in (p, ref))).numpy()
    assert (p * ours).sum() == pytest.approx(exact, rel=1e-9)
    assert (p * R.k3(np.log(p), np.log(ref))).sum() == pytest.approx(exact, rel=1e-9)
    assert (p * R.k1(np.log(p), np.log(ref))).sum() == pytest.approx(exact, rel=1e-9)
    errors = []
    for step in (1.0, 1e-2, 5e-3):
        logits, ref = policies(seed, step)
        p = R.softmax(logits)
        errors.append((p * R.k2(np.log(p), np.log(ref))).sum() / R.kl(p, ref) - 1)
    assert abs(errors[0]) > 0.02 and abs(errors[1]) < 0.02
    assert errors[2] == pytest.approx(errors[1] / 2, rel=0.1)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_the_estimators_push_to(seed):
    """As losses on the policy's own samples: k3, which is 04's, has the gradient of KL(ref || p);
    k2 that of KL(p || ref); k1 none at all. The two gradients are different ones."""
    logits, ref = policies(seed)
    forward, backward = kl_gradients(logits, ref)
    assert np.allclose(on_policy_gradient(k3_of_04, logits, ref), backward, atol=1e-9)
    assert np.allclose(on_policy_gradient(R.k2, logits, ref), forward, atol=1e-9)
    assert np.allclose(on_policy_gradient(R.k1, logits, ref), 0, atol=1e-12)
    assert abs(forward - backward).max() > 0.02


# Sequences of two tokens over three: logits (1 + 3, 3), of the first token and of the second after
# each first one. All nine are enumerated.


def sequences(seed):
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((4, 3))
    return logits, np.array([R.softmax(row) for row in logits + rng.standard_normal((4, 3))])


def probabilities(tables):
    """(4, 3) -> of each sequence, its two tokens' probabilities (9, 2)."""
    return np.array([[tables[0, a], tables[1 + a, b]] for a in range(3) for b in range(3)])


def sequence_gradient(loss, logits, ref):
    """As on_policy_gradient: `loss` of a row of log-probs (1, 2) and one of the reference's, over
    all sequences, each as often as the policy samples it."""
    x = torch.tensor(logits, requires_grad=True)
    p, ref = x.log_softmax(1), torch.tensor(probabilities(ref)).log()
    rows = torch.stack([torch.stack([p[0, a], p[1 + a, b]]) for a in range(3) for b in range(3)])
    total = sum(row.detach().sum().exp() * loss(row[None], r[None]) for row, r in zip(rows, ref))
    return torch.autograd.grad(total, x)[0].numpy()


def softmaxes(x):
    return np.array([R.softmax(row) for row in x])


@pytest.mark.parametrize("seed", SEEDS)
def test_k1_in_the_reward(seed):
    """As a reward for each token, as 05 and RL/ppo.py have it, k1 has the gradient of the whole
    sequences' KL(p || ref): gae hands a token what follows from it."""
    logits, ref = sequences(seed)

    def loss(p, ref):
        s, k1, zero, one = stage("05_ppo"), (p - ref).detach(), torch.zeros(1, 2), torch.ones(1, 2)
        advantages, returns = s.gae(-k1, zero, one, 1.0, 1.0)
        return s.ppo_loss(p, zero, p.detach(), zero, advantages, returns, one, EPS, 0.0)[0]

    expected = R.gradient(lambda x: R.kl(probabilities(softmaxes(x)).prod(1),
                                         probabilities(ref).prod(1)), logits)
    assert np.allclose(sequence_gradient(loss, logits, ref), expected, atol=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_k3_over_two_tokens(seed):
    """As a loss, k3 pulls each token's distribution towards the reference's, where the policy now
    goes; that an early token decides where it goes has no part in the gradient. (The mean over two
    tokens is half their sum.)"""
    logits, ref = sequences(seed)

    def loss(p, ref):
        return 2 * stage("04_rlvr").grpo_loss(p, p.detach(), ref, torch.zeros(1),
                                              torch.ones(1, 2), EPS, 1.0)[0]

    def per_token(x):
        first, now = R.softmax(logits[0]), softmaxes(x)          # the prefixes are held constant
        return R.kl(ref[0], now[0]) + sum(first[a] * R.kl(ref[1 + a], now[1 + a])
                                          for a in range(3))

    assert np.allclose(sequence_gradient(loss, logits, ref), R.gradient(per_token, logits),
                       atol=1e-9)
