"""dr_grpo.py: dividing by std and by length tilts the gradient; this is GRPO done right.

    r_i         = 1 if the verifier accepts completion i, else 0
    advantage_i = r_i - mean r         over the group of one prompt
    ratio_t     = p(o_t) / p_old(o_t)
    loss = - mean_i sum_t [ min(ratio_t A_i, clip(ratio_t, 1 +- eps) A_i) - beta kl_t ] / max_new
    kl_t        = exp(d) - d - 1,  d = log p_ref(o_t) - log p(o_t)        (k3)

Dr. GRPO (Liu et al. 2025, section 3.2; there beta is 0). Against 04_rlvr.py: no std, and a constant
in place of each completion's length; the bars that differ: loss, training.
    torchrun --nproc_per_node=4 RL/dr_grpo.py --group_size 16
"""
import argparse, math, os
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from model import (LEAST, Log, all_sum, autocast, by_length, encode_rows, fail, generate, inputs,
                   interrupted, load, make_optimizers, pad, parse_flags, ranks, read_rows, restore,
                   sample_rows, save, shift, skip_if_done, split, verify, wrap)

# ---------------------------------------------------------------------------- config


@dataclass
class Config:
    init: str = "out/toy/02_cot.pt"
    data: str = "out/data/toy"
    train: str = "rl_train.jsonl"
    val: str = "rl_val.jsonl"
    out: str = "out/toy"
    steps: int = 20             # batches of rollouts
    batch_size: int = 32        # prompts a step, over all ranks
    group_size: int = 8         # completions of each prompt
    minibatches: int = 4        # optimizer steps a batch of rollouts
    epochs: int = 1             # passes over it
    micro_batch: int = 16       # completions a rank holds at once
    max_new: int = 100
    temperature: float = 1.0
    clip_eps: float = 0.2
    beta: float = 0.02          # strength of the KL to the start
    lr: float = 1e-4
    warmup: int = 0
    grad_clip: float = 1.0
    eval_every: int = 10
    eval_rows: int = 200
    save_every: int = 5
    seed: int = 0
    device: str = "auto"


# ---------------------------------------------------------------------------- data


def encode(tokenizer, row):
    """{"prompt", "answer"} -> [(prompt ids, answer)]."""
    return [(tokenizer.prompt(row["prompt"]), str(row["answer"]))]


def read(cfg, name, tokenizer, model):
    path = f"{cfg.data}/{name}"
    rows, room = read_rows(path, "prompt", "answer"), model.cfg.block_size - cfg.max_new
    encoded = encode_rows(rows, path, lambda row: encode(tokenizer, row), room)
    return [pairs[0] for pairs in encoded]


def rollout(cfg, model, tokenizer, prompts, step, rank, world):
    """This rank's P prompts -> rollouts [(ids, completion_mask)], rewards (P, G), metrics."""
    G = cfg.group_size
    numbers = [(i * world + rank) * G + g for i in range(len(prompts)) for g in range(G)]
    asked = [prompt for prompt in prompts for _ in range(G)]
    completions, logprobs = generate(model, [ids for ids, _ in asked], cfg.max_new, tokenizer.end,
                                     cfg.temperature, cfg.seed, step, numbers)
    scores = [verify(tokenizer.decode(c), answer) for c, (_, answer) in zip(completions, asked)]
    rewards = torch.tensor([s or 0.0 for s in scores]).view(-1, G)
    rollouts = [(p + c, [0] * len(p) + [1] * len(c)) for (p, _), c in zip(asked, completions)]
    cut = sum(c[-1] != tokenizer.end for c in completions)     # truncated: no <|end|>, no reward
    total = all_sum(n=len(scores), reward=rewards.sum(), length=sum(map(len, completions)),
                    entropy=-sum(map(sum, logprobs)),
                    no_signal=G * (rewards == rewards[:, :1]).all(1).sum(),
                    truncated=cut, unparsed=scores.count(None) - cut)
    n, entropy = total.pop("n"), total.pop("entropy") / total["length"]
    return rollouts, rewards, {k: v / n for k, v in total.items()} | {
        "entropy": entropy, "sampled_tokens": total["length"]}


def collate(rows, device):
    """[(ids, completion_mask, advantage)] -> (B, T), (B, T), (B,)."""
    ids, masks, advantages = zip(*rows)
    return pad(ids, device), pad(masks, device), torch.stack(advantages).to(device)


# ---------------------------------------------------------------------------- loss


def group_advantages(rewards):
    """(P, G) -> (P, G). To divide by the std would favour prompts that are too easy or too hard."""
    return rewards - rewards.mean(1, keepdim=True)


def dr_grpo_loss(logprobs, old_logprobs, ref_logprobs, advantages, completion_mask, clip_eps,
                 beta, max_new):
    """(B, T-1) thrice, (B,), (B, T-1) -> sum over completions of sum_t / max_new, their number,
    metrics. The min holds for both signs of A: it never rewards leaving the clip range.

    The value of k3 estimates KL(p || ref); as a loss its gradient on p's own samples is, token by
    token, that of KL(ref || p) (k1 would have none in expectation). GRPO's form; a small anchor.
    """
    A, length = advantages[:, None], completion_mask.sum(1)
    ratio = (logprobs - old_logprobs).exp()
    surrogate = torch.min(ratio * A, ratio.clamp(1 - clip_eps, 1 + clip_eps) * A)
    d = ref_logprobs - logprobs
    kl = torch.expm1(d) - d                       # exp(d) - 1 - d would cancel near 0 in fp32
    clipped = ((ratio - 1) * A.sign() > clip_eps)

    def mean(x):
        return ((x * completion_mask).sum(1) / length).sum()

    return ((beta * kl - surrogate) * completion_mask).sum() / max_new, len(length), {
        "kl": mean(kl.detach()), "clip_frac": mean(clipped.to(kl.dtype))}


# ---------------------------------------------------------------------------- training


def main(cfg):
    rank, world, device = start(cfg)
    model, tokenizer, _ = load(cfg.init, device)
    ref = wrap(load(cfg.init, device)[0].requires_grad_(False))
    train, val = (read(cfg, name, tokenizer, model) for name in (cfg.train, cfg.val))
    ddp = wrap(model)
    optimizers = make_optimizers([model], cfg.lr, betas=(0.9, 0.99))
    first, log = resume(cfg, {"model": model}, optimizers)

    def score(module, ids, targets):
        """Log-probs in the micro-batches, padding, temperature and precision of the update, so
        that the first ratio is exactly 1."""
        with torch.no_grad(), autocast(device):
            return module(ids, targets, cfg.temperature)

    def prepare(rows):
        ids, completion_mask, advantages = collate(rows, device)
        ids, targets, mask = shift(ids, completion_mask)
        return ids, targets, score(model, ids, targets), score(ref, ids, targets), advantages, mask

    def objective(ids, targets, *rest):
        return dr_grpo_loss(ddp(ids, targets, cfg.temperature), *rest, cfg.clip_eps, cfg.beta,
                            cfg.max_new)

    for step in range(first, cfg.steps):
        prompts = [train[i] for i in sample_rows(len(train), cfg.batch_size, cfg.seed, step)]
        rollouts, rewards, metrics = rollout(
            cfg, model, tokenizer, prompts[rank::world], step, rank, world)
        advantages = group_advantages(rewards).flatten()
        rows = [(*r, a) for r, a in zip(rollouts, advantages)]
        minibatches = [[prepare(b) for b in by_length(m, cfg.micro_batch)]
                       for m in split(rows, len(rows) // cfg.minibatches)]
        done = Counter()
        for minibatch in minibatches * cfg.epochs:
            done.update(update(cfg, step, ddp, optimizers, minibatch, objective))
        metrics |= {k: v / (len(minibatches) * cfg.epochs) for k, v in done.items()}
        if (step + 1) % cfg.eval_every == 0 or step + 1 == cfg.steps:
            metrics |= evaluate(cfg, model, tokenizer, val, rank, world)
        log(step, **metrics)
        keep(cfg, step + 1, {"model": model}, optimizers, tokenizer)


# ---------------------------------------------------------------------------- evaluation


def evaluate(cfg, model, tokenizer, val, rank, world):
    """Sampled accuracy on held-out questions with <think> forced, sharded over ranks."""
    primer = tokenizer.encode_completion("<think>")
    part = list(enumerate(val[:cfg.eval_rows]))[rank::world]
    completions, _ = generate(model, [p + primer for _, (p, _) in part], cfg.max_new, tokenizer.end,
                              seed=cfg.seed, step=10 ** 6, rows=[i for i, _ in part])
    right = sum(verify("<think>" + tokenizer.decode(c), answer) == 1
                for c, (_, (_, answer)) in zip(completions, part))
    total = all_sum(right=right, n=len(part))
    return {"accuracy": total["right"] / total["n"]}


# ---------------------------------------------------------------------------- frame
# The same bytes in every stage: flags, ranks, one exact update, schedule, log, resume.

NAME = Path(__file__).stem


def cli(Config):
    """Every field of Config is a --flag; --help prints the docstring above and the defaults."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(Config):
        parser.add_argument(f"--{f.name}", type=type(f.default), default=f.default,
                            metavar=repr(f.default))
    return Config(**parse_flags(parser))


def start(cfg):
    """Refuse what cannot be, then set up ranks, device and seed -> rank, world, device."""
    rank, world, device = ranks(cfg.device)
    for f in fields(cfg):
        least = LEAST.get(f.name)
        if least is not None and getattr(cfg, f.name) < least:
            fail(f"--{f.name} must be at least {least}, not {getattr(cfg, f.name)}")
    parts = world * getattr(cfg, "minibatches", 1)
    if cfg.batch_size % parts:
        fail(f"--batch_size {cfg.batch_size} is not divisible among {parts} ranks x minibatches")
    torch.manual_seed(cfg.seed)            # the same on every rank: replicas and heads start equal
    return rank, world, device


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
        metrics |= {"loss": loss.detach(), "count": count}
        total.update({k: float(v) for k, v in metrics.items()})
    total = all_sum(**total)
    count = max(total.pop("count"), 1)
    weights = [p for opt in optimizers for g in opt.param_groups for p in g["params"]]
    for p in weights:
        p.grad.mul_(world / count)         # DDP averaged over the ranks: make it a sum again
    norm = float(nn.utils.clip_grad_norm_(weights, cfg.grad_clip))
    if not math.isfinite(total["loss"] + norm):
        fail(f"step {step}: loss {total['loss'] / count:.4g}, gradient norm {norm:.4g}; nothing "
             f"was updated and what {cfg.out} holds is intact. Lower --lr; then delete "
             f"{cfg.out}/{NAME}.state.pt or choose another --out")
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


def resume(cfg, modules, optimizers):
    """-> (the first step to do, log). Continues this very configuration's unfinished run."""
    record = {"config": asdict(cfg), "inputs": inputs}
    skip_if_done(f"{cfg.out}/{NAME}.pt", record)
    first = restore(f"{cfg.out}/{NAME}.state.pt", record, modules, optimizers)
    return first, Log(f"{cfg.out}/{NAME}.jsonl", first, cfg)


def keep(cfg, step, modules, optimizers, tokenizer, **extra):
    """After `step` steps: the finished checkpoint, or from time to time what a resume needs."""
    stop = interrupted()                   # Ctrl-C on any rank: all leave after the same step
    parts = dict({name: m.state_dict() for name, m in modules.items()}, tokenizer=tokenizer.spec,
                 gpt=asdict(modules["model"].cfg), record={"config": asdict(cfg), "inputs": inputs})
    state = f"{cfg.out}/{NAME}.state.pt"
    if step == cfg.steps:
        save(f"{cfg.out}/{NAME}.pt", then_remove=state, **parts, **extra)
    elif stop or step % cfg.save_every == 0:
        save(state, **parts, step=step, optimizers=[o.state_dict() for o in optimizers])
    if stop and step < cfg.steps:
        fail(f"stopped after step {step}; the same command continues", 130)


if __name__ == "__main__":
    main(cli(Config))
