"""02_cot.py: a direct answer has one forward pass for all the steps; a trace has one for each.

    loss = - sum_t mask_t log p(ids_t | ids_<t) / sum_t mask_t
    mask_t = 1 on the assistant's tokens and their <|end|>: now <think>, the trace, and the answer

The code is 01's: only the data and the start change. Against 01_sft.py: the demonstrations show
their work, and the start is 01's model; the sections that differ: config.
    torchrun --nproc_per_node=4 02_cot.py --lr 1e-3
"""
import math, os
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass

from model import (all_sum, autocast, by_length, cli, diverged, encode_rows, load, make_optimizers,
                   pad, read_rows, resume, sample_rows, save_checkpoint, setup, shift, turns, wrap)
import torch
from torch import nn

# ---------------------------------------------------------------------------- config


@dataclass
class Config:
    init: str = "out/toy/01_sft.pt"  # the checkpoint to start from
    data: str = "out/data/toy"  # folder of prepared rows
    train: str = "cot_train.jsonl"  # its file to learn from
    val: str = "cot_val.jsonl"  # its file to evaluate on
    out: str = "out/toy"        # folder for the checkpoint and the log
    steps: int = 420            # optimizer steps
    batch_size: int = 32        # rows a step, over all ranks
    micro_batch: int = 64       # rows a rank holds at once, at most
    micro_tokens: int = 1536    # tokens it holds at once, padding counted
    lr: float = 2e-3            # AdamW: embeddings, norms, biases
    muon_lr: float = 0.02       # Muon: the blocks' matrices; 0 gives them to AdamW
    weight_decay: float = 0.0   # of matrices, by AdamW and Muon; vectors never decay
    warmup: int = 10            # steps until the full rate
    grad_clip: float = 1.0      # the gradient's norm, at most; 0: off
    eval_every: int = 140       # steps between evaluations
    save_every: int = 100       # steps between saves of an unfinished run
    seed: int = 0               # of weights, order and samples
    device: str = "auto"        # auto: cuda, then mps, then cpu


# ---------------------------------------------------------------------------- data


def encode(tokenizer, row):
    """{"prompt", "completion"} or {"messages"} -> [(ids, completion_mask)]."""
    messages = row.get("messages") or turns(row["prompt"]) + [
        {"role": "assistant", "content": row["completion"]}]
    ids, mask = tokenizer.chat(messages)
    if sum(mask) < 2:
        raise ValueError("there is no completion to learn from")
    return [(ids, mask)]


def read(cfg, name, tokenizer, model):
    path = f"{cfg.data}/{name}"
    rows = read_rows(path, "messages|prompt", "messages|completion")
    encoded = encode_rows(rows, path, lambda row: encode(tokenizer, row), model.cfg.block_size)
    return [pairs[0] for pairs in encoded]


def collate(rows, device):
    """[(ids, completion_mask)] -> (B, T), (B, T); padding is 0 in the mask."""
    ids, masks = zip(*rows)
    return pad(ids, device), pad(masks, device)


# ---------------------------------------------------------------------------- loss


def sft_loss(logprobs, completion_mask):
    """(B, T-1), (B, T-1) -> sum over completion tokens, their number, metrics."""
    return -(logprobs * completion_mask).sum(), completion_mask.sum(), {}


# ---------------------------------------------------------------------------- training


def main(cfg):
    rank, world, device = setup(cfg)
    model, tokenizer, _ = load(cfg.init, device)
    train, val = (read(cfg, name, tokenizer, model) for name in (cfg.train, cfg.val))
    ddp = wrap(model)
    optimizers = make_optimizers([model], cfg.lr, cfg.muon_lr, weight_decay=cfg.weight_decay)
    first, log = resume(cfg, {"model": model}, optimizers, rows=len(train))

    def objective(ids, completion_mask):
        ids, targets, mask = shift(ids, completion_mask)
        return sft_loss(ddp(ids, targets), mask)

    for step in range(first, cfg.steps):
        rows = [train[i] for i in sample_rows(len(train), cfg.batch_size, cfg.seed, step)]
        batches = [collate(b, device) for b in by_length(rows[rank::world], cfg)]
        metrics = update(cfg, step, ddp, optimizers, batches, objective)
        if (step + 1) % cfg.eval_every == 0 or step + 1 == cfg.steps:
            metrics |= evaluate(cfg, model, val, rank, world, device)
        log(step + 1, sum(len(ids) for ids, _ in rows), **metrics)
        save_checkpoint(cfg, step + 1, {"model": model}, optimizers, tokenizer)


# ---------------------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(cfg, model, val, rank, world, device):
    """Loss a completion token on the held-out rows, sharded over ranks."""
    total = Counter(loss=0.0, count=0)
    for rows in by_length(val, cfg, rank, world):
        ids, targets, mask = shift(*collate(rows, device))
        with autocast(device):
            loss, count, _ = sft_loss(model(ids, targets), mask)
        total.update(loss=float(loss), count=int(count))
    total = all_sum(**total)
    return {"val_loss": total["loss"] / total["count"]}


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
