"""06_reward.py: one number for how good a completion is, learned from which of two people prefer.

    r(x, y) = w . hidden(x, y)_last + b             at the last real token, the completion's <|end|>
    loss = - mean over pairs of log sigmoid(r(x, chosen) - r(x, rejected))

Bradley-Terry (Ouyang et al. 2022, eq. 1). Against 03_dpo.py: a head that scores instead of a
reference to compare with; the sections that differ: config, loss, training, evaluation.
    torchrun --nproc_per_node=4 06_reward.py --lr 5e-4
"""
import math, os
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass

from model import (all_sum, at_least_fp32, autocast, by_length, cli, diverged, encode_rows, fail,
                   load, make_optimizers, pad, read_rows, resume, sample_rows, save_checkpoint,
                   setup, wrap)
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
    lr: float = 2e-3            # AdamW's learning rate
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


class RewardModel(nn.Module):
    """The trunk and a head: ids (B, T), completion_mask (B, T) -> scores (B,)."""

    def __init__(self, model):
        super().__init__()
        self.model, self.head = model, nn.Linear(model.cfg.n_embd, 1)
        nn.init.normal_(self.head.weight, std=(model.cfg.n_embd + 1) ** -0.5)
        nn.init.zeros_(self.head.bias)
        if not model.cfg.tied:              # no gradient reaches it, and DDP would wait for one
            model.head.requires_grad_(False)

    def forward(self, ids, completion_mask):
        T = ids.shape[1]
        last = T - 1 - completion_mask.flip(1).argmax(1)     # by the mask, whatever the padding is
        hidden = self.model.forward_hidden(ids)[torch.arange(len(ids), device=ids.device), last]
        # Not head(hidden): autocast would round the scores to bf16, where near ones are equal.
        return (at_least_fp32(hidden) * self.head.weight).sum(-1) + self.head.bias


def reward_loss(scores):
    """(2B,), chosen then rejected -> sum over pairs, their number, metrics. Equal scores: ln 2."""
    chosen, rejected = scores.chunk(2)
    margins = chosen - rejected
    return -F.logsigmoid(margins).sum(), len(margins), {
        "margins": margins.detach().sum(), "accuracy": (margins > 0).sum(),
        "score": scores.detach().sum() / 2, "score_square": scores.detach().square().sum() / 2}


# ---------------------------------------------------------------------------- training


def main(cfg):
    rank, world, device = setup(cfg)
    model, tokenizer, _ = load(cfg.init, device)
    scorer = RewardModel(model).to(device)
    train, val = (read(cfg, name, tokenizer, model) for name in (cfg.train, cfg.val))
    if len(val) < 8:
        fail(f"{cfg.data}/{cfg.val}: {len(val)} pairs are too few for the mean and std of the "
             "scores, in which 05_ppo.py counts: 8 at least")
    ddp = wrap(scorer)
    optimizers = make_optimizers([scorer], cfg.lr, weight_decay=cfg.weight_decay)
    modules = {"model": model, "head": scorer.head}
    first, log = resume(cfg, modules, optimizers, pairs=len(train))

    def objective(ids, completion_mask, scorer=ddp):
        return reward_loss(scorer(ids, completion_mask))

    for step in range(first, cfg.steps):
        rows = [train[i] for i in sample_rows(len(train), cfg.batch_size, cfg.seed, step)]
        batches = [collate(b, device) for b in by_length(rows[rank::world], cfg)]
        metrics = update(cfg, step, ddp, optimizers, batches, objective)
        if (step + 1) % cfg.eval_every == 0 or step + 1 == cfg.steps:
            metrics |= evaluate(cfg, scorer, objective, val, rank, world, device)
        log(step + 1, sum(len(ids) for row in rows for ids, _ in row), **metrics)
        scale = {k: metrics.get(k, 0.0) for k in ("val_mean", "val_std")}   # 05 centres with them
        save_checkpoint(cfg, step + 1, modules, optimizers, tokenizer, **scale)


# ---------------------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(cfg, scorer, objective, val, rank, world, device):
    """Loss, accuracy, margin, the scores' mean and std on held-out pairs, sharded over ranks."""
    total = Counter(loss=0, count=0, margins=0, accuracy=0, score=0, score_square=0)
    for rows in by_length(val, cfg, rank, world):
        with autocast(device):
            loss, count, metrics = objective(*collate(rows, device), scorer)
        total.update({k: float(v) for k, v in dict(metrics, loss=loss, count=count).items()})
    total = all_sum(**total)
    count = total.pop("count")
    mean, square = (total.pop(k) / count for k in ("score", "score_square"))
    return {f"val_{k}": v / count for k, v in total.items()} | {
        "val_mean": mean, "val_std": math.sqrt(max(square - mean ** 2, 1e-12))}


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
