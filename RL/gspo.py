"""gspo.py: the reward is for the whole completion, so its ratio and its clip are, too.

    r_i         = 1 if the verifier accepts completion i, else 0
    advantage_i = (r_i - mean r) / std r         over the group of one prompt; 0 if all r are equal
    ratio_i     = (p(o_i) / p_old(o_i)) ** (1 / |o_i|) = exp mean_t log(p(o_t) / p_old(o_t))
    loss = - mean_i [ min(ratio_i A_i, clip(ratio_i, 1 - eps, 1 + eps) A_i) - beta mean_t kl_t ]
    kl_t        = exp(d) - d - 1,  d = log p_ref(o_t) - log p(o_t)        (k3)

GSPO (Zheng et al. 2025, eq. 5-7; the paper leaves the KL out: --beta 0). Against 04_rlvr.py: one
ratio a completion instead of one a token, kept or clipped whole; the sections that differ: config,
loss, training.
    torchrun --nproc_per_node=4 RL/gspo.py --clip_eps 0.003
"""
import math, os
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass

from model import (all_sum, autocast, by_length, cli, diverged, encode_rows, generate, load,
                   make_optimizers, pad, read_rows, resume, sample_rows, sampler_gap,
                   save_checkpoint, setup, shift, split, verify, wrap)
import torch
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
    batch_size: int = 32        # prompts a step, over all ranks
    group_size: int = 8         # completions of each prompt
    minibatches: int = 4        # optimizer steps a batch of rollouts
    epochs: int = 1             # passes over it
    micro_batch: int = 64       # completions a rank holds at once, at most
    micro_tokens: int = 1536    # tokens it holds at once, padding counted
    max_new: int = 100          # tokens of a completion, at most
    temperature: float = 1.0    # of the samples, and of every log-prob
    clip_eps: float = 0.01      # of a mean, so small; the paper: 3e-4 below 1, 4e-4 above
    beta: float = 0.02          # strength of the KL to the start
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
    """P prompts -> rollouts [(ids, completion_mask, logprobs)], rewards (P, G), metrics."""
    G = cfg.group_size
    numbers = [(i * world + rank) * G + g for i in range(len(prompts)) for g in range(G)]
    asked = [prompt for prompt in prompts for _ in range(G)]
    completions, logprobs = generate(model, [ids for ids, _ in asked], cfg.max_new, tokenizer.end,
                                     cfg.temperature, cfg.seed, step, numbers)
    scores = [verify(tokenizer.decode(c), answer) for c, (_, answer) in zip(completions, asked)]
    rewards = torch.tensor([s or 0.0 for s in scores]).view(-1, G)
    rollouts = [(p + c, [0] * len(p) + [1] * len(c), [0.0] * len(p) + drawn)
                for (p, _), c, drawn in zip(asked, completions, logprobs)]
    cut = sum(c[-1] != tokenizer.end for c in completions)     # truncated: no <|end|>, no reward
    total = all_sum(n=len(scores), reward=rewards.sum(), length=sum(map(len, completions)),
                    entropy=-sum(map(sum, logprobs)),
                    no_signal=G * (rewards == rewards[:, :1]).all(1).sum(),
                    truncated=cut, unparsed=scores.count(None) - cut)
    n, entropy = total.pop("n"), total.pop("entropy") / total["length"]
    return rollouts, rewards, {k: v / n for k, v in total.items()} | {
        "entropy": entropy, "sampled_tokens": total["length"]}


def collate(rows, device):
    """[(ids, completion_mask, logprobs, advantage)] -> (B, T) thrice, (B,)."""
    ids, masks, logprobs, advantages = zip(*rows)
    return (pad(ids, device), pad(masks, device), pad(logprobs, device),
            torch.stack(advantages).to(device))


# ---------------------------------------------------------------------------- loss


def group_advantages(rewards):
    """(P, G) -> (P, G), each group standardised with the unbiased std. A group of equal rewards has
    no signal and gets exactly 0: dividing its rounding noise by a tiny std would make some up."""
    centered = rewards - rewards.mean(1, keepdim=True)
    same = (rewards == rewards[:, :1]).all(1, keepdim=True)
    return torch.where(same, 0.0, centered / rewards.std(1, keepdim=True).where(~same, 1.0))


def gspo_loss(logprobs, old_logprobs, ref_logprobs, advantages, completion_mask, clip_eps, beta):
    """(B, T-1) thrice, (B,), (B, T-1) -> sum over completions, their number, metrics. The min holds
    for both signs of A. At ratio 1 the gradient is GRPO's: A / length on each token.

    The value of k3 (Schulman 2020) estimates KL(p || ref); as a loss its gradient on p's own
    samples is, token by token, that of KL(ref || p) (k1 would have none in expectation). It is the
    form that GRPO uses; at beta 0.02 a weak anchor.
    """
    A, length = advantages, completion_mask.sum(1)
    ratio = (((logprobs - old_logprobs) * completion_mask).sum(1) / length).exp()
    surrogate = torch.min(ratio * A, ratio.clamp(1 - clip_eps, 1 + clip_eps) * A)
    d = ref_logprobs - logprobs
    kl = torch.expm1(d) - d                       # exp(d) - 1 - d would cancel near 0 in fp32
    clipped = ((ratio - 1) * A.sign() > clip_eps)

    def mean(x):
        return ((x * completion_mask).sum(1) / length).sum()

    return beta * mean(kl) - surrogate.sum(), len(length), {
        "kl": mean(kl.detach()), "clip_frac": clipped.sum()}


# ---------------------------------------------------------------------------- training


def main(cfg):
    rank, world, device = setup(cfg)
    model, tokenizer, _ = load(cfg.init, device)
    ref = load(cfg.init, device)[0].requires_grad_(False)
    model.fp32_head = ref.fp32_head = True     # in bf16 sampler and trainer differ less
    ref = wrap(ref)
    train, val = (read(cfg, name, tokenizer, model) for name in (cfg.train, cfg.val))
    ddp = wrap(model)
    optimizers = make_optimizers([model], cfg.lr, weight_decay=cfg.weight_decay,
                                 betas=(0.9, 0.99))
    first, log = resume(cfg, {"model": model}, optimizers, prompts=len(train))

    def score(module, ids, targets):
        """Log-probs in the micro-batches, padding, temperature and precision of the update, so
        that the first ratio is exactly 1."""
        with torch.no_grad(), autocast(device):
            return module(ids, targets, cfg.temperature)

    def prepare(rows):
        ids, completion_mask, sampled, advantages = collate(rows, device)
        ids, targets, mask = shift(ids, completion_mask)
        return (ids, targets, sampled[:, 1:], score(model, ids, targets), score(ref, ids, targets),
                advantages, mask)

    def objective(ids, targets, _, *rest):
        return gspo_loss(ddp(ids, targets, cfg.temperature), *rest, cfg.clip_eps, cfg.beta)

    for step in range(first, cfg.steps):
        prompts = [train[i] for i in sample_rows(len(train), cfg.batch_size, cfg.seed, step)]
        rollouts, rewards, metrics = rollout(
            cfg, model, tokenizer, prompts[rank::world], step, rank, world)
        advantages = group_advantages(rewards).flatten()
        rows = [(*r, a) for r, a in zip(rollouts, advantages)]
        minibatches = [[prepare(b) for b in by_length(m, cfg)]
                       for m in split(rows, len(rows) // cfg.minibatches)]
        metrics |= sampler_gap([b for m in minibatches for b in m])
        done = Counter()
        for minibatch in minibatches * cfg.epochs:
            done.update(update(cfg, step, ddp, optimizers, minibatch, objective))
        metrics |= {k: v / (len(minibatches) * cfg.epochs) for k, v in done.items()}
        if (step + 1) % cfg.eval_every == 0 or step + 1 == cfg.steps:
            metrics |= evaluate(cfg, model, tokenizer, val, rank, world)
        log(step + 1, metrics["sampled_tokens"], **metrics)
        save_checkpoint(cfg, step + 1, {"model": model}, optimizers, tokenizer)


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
