"""ppo.py: where answers can be verified, PPO needs no reward model; its value head is the baseline.

    reward_t = verify(x, y) at y's last token - beta (log p_old(y_t) - log p_ref(y_t)) at each token
    delta_t  = reward_t + gamma V_{t+1} - V_t;  advantage_t = delta_t + gamma lam advantage_{t+1}
    ratio_t  = p(y_t) / p_old(y_t);  return_t = advantage_t + V_t
    loss = mean over tokens of - min(ratio_t A_t, clip(ratio_t, 1 - eps, 1 + eps) A_t)
           + vf_coef / 2 * max((V_t - return_t)^2, (clip(V_t, V_old +- eps) - return_t)^2)

PPO (Schulman et al. 2017, eq. 7; GAE 2015, eq. 16; the KL in the reward: Ziegler et al. 2019; the
clipped value loss and its 1/2 are common practice, in neither paper). Against 05_ppo.py: the
verifier's 1 or 0 is the score, in place of 06's; the sections that differ: config, data, loss,
training.
    torchrun --nproc_per_node=4 RL/ppo.py --beta 0.02
"""
import math, os
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass

from model import (all_sum, at_least_fp32, autocast, by_length, cli, diverged, encode_rows,
                   generate, load, make_optimizers, pad, read_rows, resume, sample_rows,
                   sampler_gap, save_checkpoint, setup, shift, split, verify, wrap)
import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------------------- config


@dataclass
class Config:
    init: str = "out/toy/02_cot.pt"  # the checkpoint to start from
    data: str = "out/data/toy"  # folder of prepared rows
    train: str = "rl_train.jsonl"  # its file to learn from
    val: str = "rl_val.jsonl"   # its file to evaluate on
    out: str = "out/toy"        # folder for the checkpoint and the log
    steps: int = 12             # batches of rollouts
    batch_size: int = 256       # prompts a step, over all ranks, one completion each
    minibatches: int = 4        # optimizer steps a batch of rollouts
    epochs: int = 1             # passes over it
    micro_batch: int = 64       # completions a rank holds at once, at most
    micro_tokens: int = 1536    # tokens it holds at once, padding counted
    max_new: int = 100          # tokens of a completion, at most
    temperature: float = 1.0    # of the samples, and of every log-prob
    clip_eps: float = 0.2       # how far a ratio may move from 1
    beta: float = 0.05          # KL coefficient, in right answers a nat
    gamma: float = 1.0          # discount of later rewards
    lam: float = 0.95           # GAE: 1 trusts rewards, 0 values
    vf_coef: float = 0.1        # weight of the value loss
    lr: float = 1e-4            # AdamW's learning rate
    weight_decay: float = 0.0   # of matrices; vectors never decay
    warmup: int = 0             # steps until the full rate
    grad_clip: float = 1.0      # the gradient's norm, at most; 0: off
    eval_every: int = 6         # steps between evaluations
    eval_rows: int = 200        # questions of an evaluation
    save_every: int = 5         # steps between saves of an unfinished run
    seed: int = 0               # of weights, order and samples
    device: str = "auto"        # auto: cuda, then mps, then cpu


# ---------------------------------------------------------------------------- data


def encode(tokenizer, row):
    """{"prompt", "answer"} -> [(prompt ids, answer)]."""
    return [(tokenizer.prompt(row["prompt"]), row["answer"])]


def read(cfg, name, tokenizer, model):
    path = f"{cfg.data}/{name}"
    rows, room = read_rows(path, "prompt", "answer"), model.cfg.block_size - cfg.max_new
    encoded = encode_rows(rows, path, lambda row: encode(tokenizer, row), room)
    return [pairs[0] for pairs in encoded]


def rollout(cfg, model, tokenizer, prompts, step, rank, world):
    """P prompts -> rollouts [(ids, completion_mask, logprobs)], rewards (P,), metrics."""
    numbers = [i * world + rank for i in range(len(prompts))]
    completions, logprobs = generate(model, [ids for ids, _ in prompts], cfg.max_new,
                                     tokenizer.end, cfg.temperature, cfg.seed, step, numbers)
    rollouts = [(p + c, [0] * len(p) + [1] * len(c), [0.0] * len(p) + drawn)
                for (p, _), c, drawn in zip(prompts, completions, logprobs)]
    scores = [verify(tokenizer.decode(c), answer) for c, (_, answer) in zip(completions, prompts)]
    rewards = torch.tensor([s or 0.0 for s in scores])
    cut = sum(c[-1] != tokenizer.end for c in completions)     # truncated: no <|end|>, no reward
    total = all_sum(n=len(prompts), reward=rewards.sum(), length=sum(map(len, completions)),
                    entropy=-sum(map(sum, logprobs)), truncated=cut,
                    unparsed=scores.count(None) - cut)
    n, entropy = total.pop("n"), total.pop("entropy") / total["length"]
    return rollouts, rewards, {k: v / n for k, v in total.items()} | {
        "entropy": entropy, "sampled_tokens": total["length"]}


def collate(rows, device):
    """[(ids, completion_mask, logprobs, reward)] -> (B, T) thrice, (B,)."""
    ids, masks, logprobs, rewards = zip(*rows)
    return (pad(ids, device), pad(masks, device), pad(logprobs, device),
            torch.stack(rewards).to(device))


# ---------------------------------------------------------------------------- loss


class ActorCritic(nn.Module):
    """Policy and value on one trunk: ids, targets (B, T) -> log-probs (B, T), values (B, T)."""

    def __init__(self, model):
        super().__init__()
        self.model, self.value = model, nn.Linear(model.cfg.n_embd, 1)
        nn.init.zeros_(self.value.weight)            # the first values are 0: no noise at the start
        nn.init.zeros_(self.value.bias)

    def forward(self, ids, targets, temperature):
        hidden = self.model.forward_hidden(ids)
        logprobs = self.model.token_logprobs(hidden, targets, temperature)
        return logprobs, (at_least_fp32(hidden) * self.value.weight).sum(-1) + self.value.bias


def gae(rewards, values, completion_mask, gamma, lam):
    """(B, T-1) thrice -> advantages, returns (B, T-1). <|end|> is terminal: nothing follows it, and
    a truncated completion has its fixed reward, so neither is bootstrapped."""
    rewards, values = rewards * completion_mask, values * completion_mask
    advantages, later = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        following = values[:, t + 1] if t + 1 < values.shape[1] else torch.zeros_like(later)
        delta = rewards[:, t] + gamma * following - values[:, t]
        advantages[:, t] = later = (delta + gamma * lam * later) * completion_mask[:, t]
    return advantages, advantages + values


def whiten(batches):
    """Advantages (the last but two of each batch's tensors) to mean 0 and std 1 over all tokens of
    the rollouts and all ranks, once: a minibatch must not be its own yardstick."""
    total = Counter()
    for *_, advantages, returns, mask in batches:
        total.update(n=int(mask.sum()), sum=float((advantages * mask).sum()),
                     square=float((advantages ** 2 * mask).sum()))
    total = all_sum(**total)
    mean = total["sum"] / total["n"]
    std = math.sqrt(max(total["square"] / total["n"] - mean ** 2, 1e-12))
    return [(*b[:-3], (b[-3] - mean) / std, *b[-2:]) for b in batches]


def ppo_loss(logprobs, values, old_logprobs, old_values, advantages, returns, completion_mask,
             clip_eps, vf_coef):
    """(B, T-1) each -> sum over completion tokens, their number, metrics. The min holds for both
    signs of A; the value moves at most clip_eps from its old one, or gains nothing."""
    ratio = (logprobs - old_logprobs).exp()
    surrogate = torch.min(ratio * advantages,
                          ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantages)
    near = old_values + (values - old_values).clamp(-clip_eps, clip_eps)
    value_loss = torch.max((values - returns) ** 2, (near - returns) ** 2) / 2
    clipped = (ratio - 1) * advantages.sign() > clip_eps

    def total(x):
        return (x * completion_mask).sum()

    return total(vf_coef * value_loss - surrogate), completion_mask.sum(), {
        "value_loss": total(value_loss.detach()), "clip_frac": total(clipped.to(values.dtype))}


# ---------------------------------------------------------------------------- training


def main(cfg):
    rank, world, device = setup(cfg)
    model, tokenizer, _ = load(cfg.init, device)
    ref = load(cfg.init, device)[0].requires_grad_(False)
    model.fp32_head = ref.fp32_head = True     # in bf16 sampler and trainer differ less
    ref = wrap(ref)
    train, val = (read(cfg, name, tokenizer, model) for name in (cfg.train, cfg.val))
    actor = ActorCritic(model).to(device)
    ddp = wrap(actor)
    optimizers = make_optimizers([actor], cfg.lr, weight_decay=cfg.weight_decay,
                                 betas=(0.9, 0.99), eps=1e-5)
    modules = {"model": model, "value": actor.value}
    first, log = resume(cfg, modules, optimizers, prompts=len(train))

    def prepare(rows):
        """Old log-probs and values in the micro-batches, padding, temperature and precision of the
        update, so that the first ratio is exactly 1."""
        ids, completion_mask, sampled, rewards = collate(rows, device)
        ids, targets, mask = shift(ids, completion_mask)
        with torch.no_grad(), autocast(device):
            old_logprobs, old_values = actor(ids, targets, cfg.temperature)
            kl = old_logprobs - ref(ids, targets, cfg.temperature)       # 0 off the completion
        last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
        rewards = -cfg.beta * kl + F.one_hot(last, mask.shape[1]) * rewards[:, None]
        advantages, returns = gae(rewards, old_values, mask, cfg.gamma, cfg.lam)
        return (ids, targets, sampled[:, 1:], old_logprobs, old_values, advantages, returns, mask,
                kl)

    def objective(ids, targets, _, *rest):
        return ppo_loss(*ddp(ids, targets, cfg.temperature), *rest, cfg.clip_eps, cfg.vf_coef)

    for step in range(first, cfg.steps):
        prompts = [train[i] for i in sample_rows(len(train), cfg.batch_size, cfg.seed, step)]
        rollouts, rewards, metrics = rollout(
            cfg, model, tokenizer, prompts[rank::world], step, rank, world)
        rows = [(*r, reward) for r, reward in zip(rollouts, rewards)]
        minibatches = [[prepare(b) for b in by_length(m, cfg)]
                       for m in split(rows, len(rows) // cfg.minibatches)]
        metrics |= sampler_gap([b for m in minibatches for b in m])
        batches, done = [b for m in minibatches for b in m], Counter()
        kl = all_sum(kl=sum(float(b[-1].sum()) for b in batches))["kl"]
        metrics["kl"] = kl / metrics["sampled_tokens"]
        white = whiten([b[:-1] for b in batches])
        for minibatch in split(white, len(minibatches[0])) * cfg.epochs:
            done.update(update(cfg, step, ddp, optimizers, minibatch, objective))
        metrics |= {k: v / (len(minibatches) * cfg.epochs) for k, v in done.items()}
        if (step + 1) % cfg.eval_every == 0 or step + 1 == cfg.steps:
            metrics |= evaluate(cfg, model, tokenizer, val, rank, world)
        log(step + 1, metrics["sampled_tokens"], **metrics)
        save_checkpoint(cfg, step + 1, modules, optimizers, tokenizer)


# ---------------------------------------------------------------------------- evaluation


def evaluate(cfg, model, tokenizer, val, rank, world):
    """Sampled accuracy on held-out questions with <think> forced, sharded over ranks; and two of
    the samples."""
    primer = tokenizer.encode_completion("<think>")
    part = list(enumerate(val[:cfg.eval_rows]))[rank::world]
    completions, _ = generate(model, [p + primer for _, (p, _) in part], cfg.max_new, tokenizer.end,
                              seed=cfg.seed, step=10 ** 6, rows=[i for i, _ in part])
    said = ["<think>" + tokenizer.decode(c) for c in completions]
    verdicts = [verify(text, answer) for text, (_, (_, answer)) in zip(said, part)]
    total = all_sum(right=verdicts.count(1), n=len(part))
    shown = [dict(prompt=tokenizer.decode(p), answer=answer, completion=text, verdict=verdict)
             for (_, (p, answer)), text, verdict in zip(part, said, verdicts)]
    return {"accuracy": total["right"] / total["n"], "samples": shown[:2]}


# ---------------------------------------------------------------------------- update
# The same bytes in every stage: one exact training step, and its schedule.


def update(cfg, step, ddp, optimizers, batches, objective):
    """One optimizer step. Gradients are summed over micro-batches and ranks and divided once, by
    the count over all of them: exact for ragged completions, however they are split."""
    world, total = int(os.environ.get("WORLD_SIZE", 1)), Counter()
    for i, batch in enumerate(batches):
        last = i + 1 == len(batches)       # DDP decides in forward whether backward reduces
        with nullcontext() if last or world == 1 else ddp.no_sync():
            with autocast(batch[0].device):
                loss, count, metrics = objective(*batch)
            loss.backward()
        total.update(metrics | {"loss": loss.detach(), "count": count})    # no wait for the device
    total = all_sum(**total)
    count = max(total.pop("count"), 1)
    weights = [p for opt in optimizers for g in opt.param_groups for p in g["params"]]
    torch._foreach_mul_([p.grad for p in weights], world / count)    # DDP averaged: a sum again
    norm = float(nn.utils.clip_grad_norm_(weights, cfg.grad_clip or math.inf))
    if not math.isfinite(total["loss"] + norm):
        diverged(cfg, step + 1, f"loss {total['loss'] / count:.4g}, gradient norm {norm:.4g}")
    for opt in optimizers:
        for g in opt.param_groups:
            g["lr"] = g["peak"] * schedule(cfg, step)
        opt.step()
        opt.zero_grad(set_to_none=True)
    return {k: v / count for k, v in total.items()} | {"grad_norm": norm}


def schedule(cfg, step):
    """Linear warm-up, then a cosine down to a tenth."""
    if step < cfg.warmup:
        return (step + 1) / cfg.warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup))


if __name__ == "__main__":
    main(cli(Config))
