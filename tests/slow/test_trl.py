"""Our losses and advantages against TRL's own code: the same log-probs, masks and advantages, in
float64; values and gradients to 1e-9, or 1e-5 where TRL narrows to fp32.

TRL's losses are methods of its trainers. They are called unbound, with a stand-in for the trainer
that has only what they read (hence the exact pins of requirements-test.txt), and a stand-in for the
model that returns given log-probs. TRL has no PPO, no GAE and no REINFORCE. Where conventions
differ, the test says how, and converts.
"""
import inspect
import textwrap
from collections import defaultdict
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import load_stage
from test_losses import ragged
from transformers.loss.loss_utils import ForCausalLMLoss
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RewardTrainer, RLOOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.rewards import get_soft_overlong_punishment

pytestmark = pytest.mark.usefixtures("double")
SEEDS = range(3)
EPS, LOW, HIGH, BETA = 0.2, 0.2, 0.28, 0.1
B, T, V = 8, 9, 13
stage = cache(load_stage)


# ---------------------------------------------------------------------------- stand-ins


class Accelerator:
    """One process: what is gathered from all is one's own."""
    device, num_processes, process_index, sync_gradients = torch.device("cpu"), 1, 0, True

    def gather(self, x):
        return x

    def reduce(self, x, reduction):
        return x

    gather_for_metrics = gather


def trainer(**fields):
    return SimpleNamespace(**dict(
        accelerator=Accelerator(), model=SimpleNamespace(training=True), aux_loss_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0,
        _tp_size=1) | fields)


def scored(logprobs):
    """A model that returns these log-probs (B, T), 0 where the label does not count."""
    def model(labels, **_):
        zeros = torch.zeros_like(logprobs)
        return SimpleNamespace(log_probs=logprobs.where(labels[:, 1:] != -100, zeros),
                               entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    return model


def whole(mask):
    """The mask of the targets (B, T) -> of the ids (B, T + 1)."""
    return torch.cat([torch.zeros_like(mask[:, :1]), mask], 1)


def batch(seed):
    """Random rows with ragged masks, and rubbish outside them; `logprobs` has a gradient."""
    torch.manual_seed(seed)
    mask = ragged(B, T, seed)
    logprobs = torch.log(0.99 * torch.rand(B, T))
    old, ref = logprobs + 0.4 * torch.randn(B, T), logprobs + 0.5 * torch.randn(B, T)
    return SimpleNamespace(mask=mask, logprobs=logprobs.requires_grad_(), old=old, ref=ref,
                           A=torch.randn(B))


def rows_of_logits(seed, mask=None):
    """Logits (B, T + 1, V) with a gradient, ids, labels, -100 where they do not count; and what
    ours take, log-probs and mask of the targets."""
    torch.manual_seed(seed)
    mask = ragged(B, T, seed) if mask is None else mask
    ids = torch.randint(V, (B, T + 1))
    logits = torch.randn(B, T + 1, V, requires_grad=True)
    logprobs = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return logits, ids, ids.masked_fill(whole(mask) == 0, -100), logprobs, mask


def agree(ours, trl, x, tol=1e-9):
    """Ours, (sum, count, metrics), divided, is TRL's mean; and so are the gradients in x."""
    ours = ours[0] / ours[1]
    grads = [torch.autograd.grad(y, x)[0] for y in (ours, trl)]
    assert ours.item() == pytest.approx(trl.item(), rel=tol)
    assert grads[1].abs().max() > 1e-4
    assert torch.allclose(*grads, rtol=tol, atol=tol * grads[1].abs().max().item())


def inline(method, first, last, **names):
    """Run, of TRL's method, the lines from the one that begins with `first` to the one that begins
    with `last`, each found once; -> their names and values."""
    lines = inspect.getsource(method).splitlines()
    at = [[i for i, line in enumerate(lines) if line.strip().startswith(mark)]
          for mark in (first, last)]
    assert [len(found) for found in at] == [1, 1]
    block = textwrap.dedent("\n".join(lines[at[0][0] : at[1][0] + 1]))
    exec(block, dict(method.__globals__), names)
    return names


# ---------------------------------------------------------------------------- 00, 01, 02


@pytest.mark.parametrize("seed", SEEDS)
def test_sft(seed):
    """TRL's SFTTrainer leaves the loss to transformers, in fp32."""
    for name in ("01_sft", "02_cot"):
        logits, _, labels, logprobs, mask = rows_of_logits(seed)
        theirs = ForCausalLMLoss(logits, labels, V)
        agree(stage(name).sft_loss(logprobs, mask), theirs, logits, 1e-5)
    logits, ids, _, logprobs, _ = rows_of_logits(seed)
    theirs = ForCausalLMLoss(logits, ids, V)
    agree(stage("00_pretrain").pretrain_loss(logprobs), theirs, logits, 1e-5)


# ---------------------------------------------------------------------------- pairs


def dpo(b, loss_type, beta):
    self = trainer(
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False), beta=beta,
        ref_model=scored(b.ref), args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        loss_types=[loss_type], loss_weights=[1.0], label_smoothing=0.0, use_weighting=False,
        f_divergence_type="reverse_kl", ld_alpha=None, precompute_ref_logps=False)
    mask = whole(b.mask)
    inputs = {"input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask),
              "completion_mask": mask}
    return DPOTrainer._compute_loss(self, scored(b.logprobs), inputs, False)


@pytest.mark.parametrize("seed", SEEDS)
def test_dpo(seed):
    b = batch(seed)
    agree(stage("03_dpo").dpo_loss(b.logprobs, b.ref, b.mask, 0.3), dpo(b, "sigmoid", 0.3),
          b.logprobs)


@pytest.mark.parametrize("seed", SEEDS)
def test_ipo(seed):
    """Ours sums the log-ratio over a completion's tokens, as eq. 17; TRL takes their mean, for
    which ours is given log-probs that are divided by the length. As they are, the two agree where
    every completion is one token long, and not on the ragged ones."""
    b = batch(seed)
    length = b.mask.sum(1, keepdim=True)
    f = stage("DPO/ipo").ipo_loss
    theirs = dpo(b, "ipo", 0.3)
    agree(f(b.logprobs / length, b.ref / length, b.mask, 0.3), theirs, b.logprobs)
    ours = f(b.logprobs, b.ref, b.mask, 0.3)
    assert (ours[0] / ours[1]).item() != pytest.approx(theirs.item(), rel=0.01)
    b.mask = torch.eye(T, dtype=torch.long)[:B]
    agree(f(b.logprobs, b.ref, b.mask, 0.3), dpo(b, "ipo", 0.3), b.logprobs)


@pytest.mark.parametrize("seed", SEEDS)
def test_simpo(seed):
    """TRL has SimPO in CPOTrainer; the NLL that it adds is nothing at cpo_alpha 0, which is what
    the paper has. Its gamma / beta inside the bracket is our gamma outside it."""
    logits, _, labels, logprobs, mask = rows_of_logits(seed)
    sides = CPOTrainer.get_batch_logps(logits, labels, average_log_prob=True).chunk(2)
    self = trainer(alpha=0.0, loss_type="simpo", simpo_gamma=0.7, beta=2.0, label_smoothing=0.0)
    losses, *_ = CPOTrainer.cpo_loss(self, *sides)
    agree(stage("DPO/simpo").simpo_loss(logprobs, mask, 2.0, 0.7), losses.mean(), logits)


@pytest.mark.parametrize("seed", SEEDS)
def test_orpo_odds_ratio(seed):
    """TRL's beta is the paper's lambda, ours lam. TRL narrows to fp32. Its NLL is over prompt and
    completion, ours over the completion: here the odds ratio alone, without any NLL."""
    logits, _, labels, logprobs, mask = rows_of_logits(seed)
    sides = ORPOTrainer.get_batch_logps(logits, labels, average_log_prob=True).chunk(2)
    losses, *_ = ORPOTrainer.odds_ratio_loss(trainer(beta=0.5), *sides)
    total, count, _ = stage("DPO/orpo").orpo_loss(logprobs, mask, 0.5)
    nll, _, _ = stage("DPO/orpo").orpo_loss(logprobs, mask, 0.0)
    agree((total - nll, count), -losses.mean(), logits, 1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_orpo(seed):
    """The whole loss, where the two NLLs are the same: one token of prompt, which nothing predicts,
    and completions of one length, so that the mean over tokens is the mean of the rows' means."""
    mask = torch.ones(B, T, dtype=torch.long)
    logits, ids, labels, logprobs, mask = rows_of_logits(seed, mask)
    self = trainer(beta=0.5, is_encoder_decoder=False, padding_value=0)
    both = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    self.concatenated_inputs = lambda *_, **__: {f"concatenated_{k}": v for k, v in both.items()}
    for name in ("concatenated_forward", "odds_ratio_loss"):
        setattr(self, name, getattr(ORPOTrainer, name).__get__(self))
    self.get_batch_logps = ORPOTrainer.get_batch_logps
    theirs, _ = ORPOTrainer.get_batch_loss_metrics(
        self, lambda *_, **__: SimpleNamespace(logits=logits), {"chosen_labels": labels[: B // 2]})
    agree(stage("DPO/orpo").orpo_loss(logprobs, mask, 0.5), theirs, logits, 1e-5)


def made_up(scale):
    """A policy whose log-probs depend on everything that a row holds."""
    def logprobs(ids, targets):
        return -(1 + torch.sin(ids.double().cumsum(1) * 0.7 + targets * 0.3)) * scale
    logprobs.cfg = SimpleNamespace(block_size=32)
    return logprobs


@pytest.mark.parametrize("kl", ["positive", "negative"])
@pytest.mark.parametrize("seed", SEEDS)
def test_kto(seed, kl):
    """The loss and its KL baseline, given the same mismatched rows. Which rows are mismatched is a
    convention of the data: TRL gives a prompt the completion of the row before, in batches of a
    device; ours gives it the one of the next row of another prompt, in the file. Both clamp the
    mean at 0 and hold it constant."""
    b, rng, s = batch(seed), np.random.default_rng(seed), stage("DPO/kto")
    policy, ref = map(made_up, (0.5, 0.9) if kl == "positive" else (0.9, 0.5))
    rows = []
    for _ in range(B // 2):
        prompt = list(rng.integers(1, V, rng.integers(2, 6)))
        sides = [list(rng.integers(1, V, rng.integers(2, 7))) for _ in range(2)]
        rows += [(prompt + c, [0] * len(prompt) + [1] * len(c), i) for i, c in enumerate(sides)]
    mixed = s.mismatch(rows, 32, "here")
    cfg = SimpleNamespace(micro_batch=3, micro_tokens=999)
    baseline = s.baseline(cfg, policy, ref, mixed, 0, 1, "cpu")
    assert (baseline > 0) == (kl == "positive")

    KL_ids, KL_mask, _ = s.collate(mixed, "cpu")
    mask = whole(b.mask)
    inputs = {"input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask),
              "completion_mask": mask, "label": torch.arange(B) < B // 2,
              "KL_input_ids": KL_ids, "KL_attention_mask": torch.ones_like(KL_ids),
              "KL_completion_mask": KL_mask}

    def model(f, logprobs):
        def call(input_ids, labels, **_):
            mismatched = input_ids.shape == KL_ids.shape and torch.equal(input_ids, KL_ids)
            given = f(input_ids[:, :-1], input_ids[:, 1:]) if mismatched else logprobs
            return scored(given)(labels)
        return call

    self = trainer(
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False), calculate_KL=True,
        ref_model=model(ref, b.ref), args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        precompute_ref_logps=False, beta=0.3, loss_type="kto", desirable_weight=1.0,
        undesirable_weight=1.5)
    self._compute_kl_logps = KTOTrainer._compute_kl_logps.__get__(self)
    theirs = KTOTrainer._compute_loss(self, model(policy, b.logprobs), inputs, False)
    assert self._metrics["train"]["kl"] == [pytest.approx(baseline, rel=1e-9)]
    agree(s.kto_loss(b.logprobs, b.ref, b.mask, inputs["label"].long(), baseline, 0.3, 1.0, 1.5),
          theirs, b.logprobs)


@pytest.mark.parametrize("seed", SEEDS)
def test_reward(seed):
    torch.manual_seed(seed)
    scores = torch.randn(B, 1, requires_grad=True)
    self = trainer(args=SimpleNamespace(center_rewards_coefficient=None))
    inputs = {"input_ids": torch.zeros(B, T), "attention_mask": torch.ones(B, T)}
    theirs = RewardTrainer.compute_loss(self, lambda **_: SimpleNamespace(logits=scores), inputs)
    agree(stage("06_reward").reward_loss(scores[:, 0]), theirs, scores)


# ---------------------------------------------------------------------------- policy losses


def grpo(b, loss_type, **fields):
    """One process, one micro-batch, one step a batch of rollouts."""
    bias_correction = fields.pop("use_bias_correction_kl", False)
    self = trainer(**dict(
        loss_type=loss_type, beta=0.0, epsilon_low=EPS, epsilon_high=EPS, use_vllm=False,
        importance_sampling_level="token", top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1, args=SimpleNamespace(
            use_bias_correction_kl=bias_correction, delta=None, steps_per_generation=1)) | fields)
    self._get_per_token_logps_and_entropies = lambda *_, **__: (
        b.logprobs, torch.zeros_like(b.logprobs), None)
    none = torch.zeros(B, 0, dtype=torch.long)
    inputs = {"prompt_ids": none, "prompt_mask": none, "completion_ids": torch.zeros_like(b.mask),
              "completion_mask": b.mask, "advantages": b.A, "old_per_token_logps": b.old,
              "ref_per_token_logps": b.ref, "num_items_in_batch": b.mask.sum()}
    return GRPOTrainer._compute_loss(self, None, inputs)


@pytest.mark.parametrize("seed", SEEDS)
def test_grpo(seed):
    b = batch(seed)
    for beta in (0.0, BETA):
        agree(stage("04_rlvr").grpo_loss(b.logprobs, b.old, b.ref, b.A, b.mask, EPS, beta),
              grpo(b, "grpo", beta=beta), b.logprobs)


@pytest.mark.parametrize("seed", SEEDS)
def test_grpo_bias_correction(seed):
    """TRL multiplies k3 by the ratio unless use_bias_correction_kl is off; ours, and the paper, do
    not. At ratio 1 the values are the same and the gradients differ by k3's score-function term,
    k3 grad log p, without which k3's gradient is not that of KL(p || ref)."""
    b = batch(seed)
    b.old = b.logprobs.detach()
    total, count, _ = stage("04_rlvr").grpo_loss(b.logprobs, b.old, b.ref, b.A, b.mask, EPS, BETA)
    d = (b.ref - b.logprobs).detach()
    k3 = d.exp() - d - 1
    zero = k3 * (b.logprobs - b.old)                 # its value is 0, its gradient k3 grad log p
    term = BETA * ((zero * b.mask).sum(1) / b.mask.sum(1)).sum()
    agree((total + term, count), grpo(b, "grpo", beta=BETA, use_bias_correction_kl=True),
          b.logprobs)
    plain = grpo(b, "grpo", beta=BETA)
    assert plain.item() == pytest.approx((total / count).item(), rel=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_gspo(seed):
    """TRL's GSPO is its GRPO with importance_sampling_level "sequence"."""
    b = batch(seed)
    for beta in (0.0, BETA):
        theirs = grpo(b, "grpo", beta=beta, importance_sampling_level="sequence",
                      epsilon_low=0.05, epsilon_high=0.05)
        agree(stage("RL/gspo").gspo_loss(b.logprobs, b.old, b.ref, b.A, b.mask, 0.05, beta), theirs,
              b.logprobs)


@pytest.mark.parametrize("seed", SEEDS)
def test_dr_grpo(seed):
    b = batch(seed)
    for beta in (0.0, BETA):
        f = stage("RL/dr_grpo").dr_grpo_loss
        agree(f(b.logprobs, b.old, b.ref, b.A, b.mask, EPS, beta, 20),
              grpo(b, "dr_grpo", beta=beta, max_completion_length=20), b.logprobs)


@pytest.mark.parametrize("seed", SEEDS)
def test_dapo(seed):
    b = batch(seed)
    agree(stage("RL/dapo").dapo_loss(b.logprobs, b.old, b.A, b.mask, LOW, HIGH),
          grpo(b, "dapo", epsilon_low=LOW, epsilon_high=HIGH), b.logprobs)


@pytest.mark.parametrize("seed", SEEDS)
def test_cispo(seed):
    """TRL's epsilon_high is the cap of the ratio itself: 1 + ours. Neither has a lower bound."""
    b = batch(seed)
    agree(stage("RL/cispo").cispo_loss(b.logprobs, b.old, b.A, b.mask, HIGH),
          grpo(b, "cispo", epsilon_high=1 + HIGH), b.logprobs)


def rloo(b):
    self = trainer(epsilon_low=EPS, epsilon_high=EPS)
    self._get_per_token_logps_and_entropies = lambda *_, **__: (
        b.logprobs, torch.zeros_like(b.logprobs), None)
    none = torch.zeros(B, 0, dtype=torch.long)
    inputs = {"prompt_ids": none, "prompt_mask": none, "completion_ids": torch.zeros_like(b.mask),
              "completion_mask": b.mask, "advantages": b.A, "old_logps": (b.old * b.mask).sum(1)}
    return RLOOTrainer._compute_loss(self, None, inputs)


@pytest.mark.parametrize("seed", SEEDS)
def test_rloo(seed):
    """Both have the sequence's ratio and PPO's clip on it; the paper takes one step a batch, and
    needs neither."""
    b = batch(seed)
    agree(stage("RL/rloo").rloo_loss(b.logprobs, b.old, b.A, b.mask, EPS), rloo(b), b.logprobs)


@pytest.mark.parametrize("seed", SEEDS)
def test_reinforce(seed):
    """TRL has none; at ratio 1 its RLOO has the same gradient, but the value - mean A."""
    b = batch(seed)
    b.old = b.logprobs.detach()
    total, count, _ = stage("RL/reinforce").reinforce_loss(b.logprobs, b.ref, b.A, b.mask, 0.0)
    constant = (b.A * (b.old * b.mask).sum(1)).mean() - b.A.mean()
    agree((total + count * constant, count), rloo(b), b.logprobs)


# ---------------------------------------------------------------------------- advantages


def rewards(seed, G=4):
    torch.manual_seed(seed)
    r = torch.where(torch.rand(6, 1) < 0.5, torch.randn(6, G), torch.randint(2, (6, G)).double())
    r[-1] = 1.0
    return r


def trl_advantages(r, scale):
    """GRPO's advantages are lines of a long method; these."""
    self = trainer(multi_objective_aggregation="sum_then_normalize", scale_rewards=scale,
                   reward_weights=torch.ones(1), reward_funcs=[None])
    return inline(
        GRPOTrainer._generate_and_score_completions, "if self.multi_objective_aggregation ==",
        "advantages = torch.nan_to_num(advantages", self=self, num_generations=r.shape[1],
        rewards_per_func=r.view(-1, 1), device="cpu",
        unscorable_mask=torch.zeros(r.numel(), dtype=torch.bool))["advantages"].view(r.shape)


@pytest.mark.parametrize("seed", SEEDS)
def test_group_advantages(seed):
    """Both have the unbiased std. TRL adds 1e-4 to it; ours adds nothing and gives 0 to a group of
    equal rewards."""
    r = rewards(seed)
    std = r.std(1, keepdim=True)
    ours = stage("04_rlvr").group_advantages(r)
    assert torch.allclose(ours * std / (std + 1e-4), trl_advantages(r, "group"), atol=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_centered_advantages(seed):
    """TRL's scale_rewards "none" is Dr. GRPO's, and the mean baseline of REINFORCE."""
    r = rewards(seed)
    for name in ("RL/dr_grpo", "RL/reinforce"):
        ours = stage(name).group_advantages(r)
        assert torch.allclose(ours, trl_advantages(r, "none"), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_rloo_advantages(seed):
    """With k1, summed over a completion, in the reward: TRL's lines include it, ours is done before
    the call."""
    r, b = rewards(seed, G=2)[:4], batch(seed)
    old, ref = b.logprobs.detach(), b.ref
    theirs = inline(
        RLOOTrainer._generate_and_score_completions,
        "rewards = (rewards_per_func * self.reward_weights.to(device)",
        "advantages = torch.nan_to_num(advantages", num_generations=2, device="cpu",
        self=trainer(reward_weights=torch.ones(1), reward_clip_range=None, beta=BETA,
                     normalize_advantages=False), gather=lambda x: x,
        rewards_per_func=r.view(-1, 1), unscorable_mask=torch.zeros(B, dtype=torch.bool),
        old_per_token_logps=old, ref_per_token_logps=ref, completion_mask=b.mask)["advantages"]
    kl = ((old - ref) * b.mask).sum(1).view(r.shape)
    ours = stage("RL/rloo").rloo_advantages(r - BETA * kl).flatten()
    assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)


def test_overlong_penalty():
    lengths = torch.arange(1, 31)
    for longest, near in ((30, 10), (30, 1), (40, 30)):
        theirs = get_soft_overlong_punishment(longest, near)([[0] * int(n) for n in lengths])
        ours = stage("RL/dapo").overlong_penalty(lengths, longest, near)
        assert torch.allclose(ours, torch.tensor(theirs), rtol=1e-9, atol=1e-12)
