"""03_dpo.py: a demonstration cannot say what is worse; a pair can, and needs no reward model.

    reward(x, y) = beta * (log p(y | x) - log p_ref(y | x))       implicit, summed over y's tokens
    loss = - mean over pairs of log sigmoid(reward(x, chosen) - reward(x, rejected))

DPO (Rafailov et al. 2023, eq. 7). Against 01_sft.py: pairs, a frozen reference, log-probs summed
over a completion; the sections that differ: config, data, loss, training, evaluation.
    torchrun --nproc_per_node=4 03_dpo.py --beta 0.1
"""
import math, os
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass

from model import (all_sum, autocast, by_length, cli, diverged, encode_rows, load, make_optimizers,
                   pad, read_rows, resume, sample_rows, save_checkpoint, setup, shift, wrap)
import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------------------- config


@dataclass
class Config:
    init: str = "out/toy/02_cot.pt"  # the checkpoint to start from
    data: str = "out/data/toy"  # folder of prepared rows
    train: str = "pairs_train.jsonl"  # its file to learn from
    val: str = "pairs_val.jsonl"  # its file to evaluate on
    out: str = "out/toy"        # folder for the checkpoint and the log
    steps: int = 100            # optimizer steps
    batch_size: int = 32        # pairs a step, over all ranks
    micro_batch: int = 64       # pairs a rank holds at once, at most
    micro_tokens: int = 1536    # tokens it holds at once, padding counted
    beta: float = 0.5           # strength of the KL constraint: larger stays closer
    lr: float = 3e-5            # AdamW's learning rate
    weight_decay: float = 0.0   # of matrices; vectors never decay
    warmup: int = 10            # steps until the full rate
    grad_clip: float = 1.0      # the gradient's norm, at most; 0: off
    eval_every: int = 100       # steps between evaluations
    save_every: int = 50        # steps between saves of an unfinished run
    seed: int = 0               # of weights, order and samples
    device: str = "auto"        # auto: cuda, then mps, then cpu


# ---------------------------------------------------------------------------- data


def encode(tokenizer, row):
    """{"prompt", "chosen", "rejected"} -> [(ids, completion_mask)] x 2.

    Only the last turn is compared: earlier assistant turns belong to the prompt."""
    pairs = [tokenizer.answered(row["prompt"], row[key]) for key in ("chosen", "rejected")]
    if pairs[0] == pairs[1]:
        raise ValueError("chosen and rejected are the same: nothing to learn")
    return pairs


def read(cfg, name, tokenizer, model):
    path = f"{cfg.data}/{name}"
    rows = read_rows(path, "prompt", "chosen", "rejected")
    return encode_rows(rows, path, lambda row: encode(tokenizer, row), model.cfg.block_size)


def collate(rows, device):
    """[[chosen, rejected]] -> ids (2B, T), completion_mask (2B, T): all chosen, then all rejected,
    so that one forward pass scores both at the same padding."""
    ids, masks = zip(*[row[side] for side in (0, 1) for row in rows])
    return pad(ids, device), pad(masks, device)


# ---------------------------------------------------------------------------- loss


def dpo_loss(logprobs, ref_logprobs, completion_mask, beta):
    """(2B, T-1) thrice -> sum over pairs, their number, metrics. Sums over tokens, not means: the
    log-prob of a completion is what the derivation has. At the first step the loss is ln 2."""
    sums = (logprobs * completion_mask).sum(1)
    rewards = beta * (sums - (ref_logprobs * completion_mask).sum(1))
    chosen, rejected = rewards.chunk(2)
    margins = chosen - rejected
    chosen_logprobs, rejected_logprobs = sums.detach().chunk(2)      # both usually fall: watch them
    return -F.logsigmoid(margins).sum(), len(margins), {
        "margins": margins.detach().sum(), "accuracy": (margins > 0).sum(),
        "chosen_logprobs": chosen_logprobs.sum(), "rejected_logprobs": rejected_logprobs.sum()}


# ---------------------------------------------------------------------------- training


def main(cfg):
    rank, world, device = setup(cfg)
    model, tokenizer, _ = load(cfg.init, device)
    ref = wrap(load(cfg.init, device)[0].requires_grad_(False))
    train, val = (read(cfg, name, tokenizer, model) for name in (cfg.train, cfg.val))
    ddp = wrap(model)
    optimizers = make_optimizers([model], cfg.lr, weight_decay=cfg.weight_decay)
    first, log = resume(cfg, {"model": model}, optimizers, pairs=len(train))

    def objective(ids, completion_mask, policy=ddp):
        ids, targets, mask = shift(ids, completion_mask)
        with torch.no_grad():
            ref_logprobs = ref(ids, targets)
        return dpo_loss(policy(ids, targets), ref_logprobs, mask, cfg.beta)

    for step in range(first, cfg.steps):
        rows = [train[i] for i in sample_rows(len(train), cfg.batch_size, cfg.seed, step)]
        batches = [collate(b, device) for b in by_length(rows[rank::world], cfg)]
        metrics = update(cfg, step, ddp, optimizers, batches, objective)
        if (step + 1) % cfg.eval_every == 0 or step + 1 == cfg.steps:
            metrics |= evaluate(cfg, model, objective, val, rank, world, device)
        log(step + 1, sum(len(ids) for row in rows for ids, _ in row), **metrics)
        save_checkpoint(cfg, step + 1, {"model": model}, optimizers, tokenizer)


# ---------------------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(cfg, model, objective, val, rank, world, device):
    """Loss, accuracy and margin on the held-out pairs, sharded over ranks."""
    total = Counter(loss=0.0, count=0, accuracy=0.0, margins=0.0)
    for rows in by_length(val, cfg, rank, world):
        with autocast(device):
            loss, count, metrics = objective(*collate(rows, device), model)
        total.update(loss=float(loss), count=count, accuracy=float(metrics["accuracy"]),
                     margins=float(metrics["margins"]))
    total = all_sum(**total)
    count = total.pop("count")
    return {f"val_{k}": v / count for k, v in total.items()}


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
