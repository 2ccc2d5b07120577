"""00_pretrain.py: before anything can be taught, text itself: what follows what, and 12+5=17.

    loss = - sum_t log p(ids_t | ids_<t) / T

The first stage: it alone builds the model and takes its tokenizer from the data. The first loss is
ln V, where every token is equally likely.
    torchrun --nproc_per_node=4 00_pretrain.py --n_layer 12 --n_embd 768 --n_head 12
"""
import math, os
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, fields

from model import (GPT, GPTConfig, all_sum, autocast, cli, diverged, fail, load_tokenizer,
                   make_optimizers, read_tokens, resume, save_checkpoint, setup, split, wrap)
import numpy as np
import torch
from torch import nn

# ---------------------------------------------------------------------------- config


@dataclass
class Config:
    data: str = "out/data/toy"  # folder of prepared rows
    train: str = "train.bin"    # its file to learn from
    val: str = "val.bin"        # its file to evaluate on
    out: str = "out/toy"        # folder for the checkpoint and the log
    n_layer: int = 4            # blocks
    n_head: int = 4             # attention heads
    n_embd: int = 128           # width of the residual stream
    block_size: int = 256       # the context of the model
    position: str = "rope"      # "learned" with qk_norm 0 is GPT-2: slower to learn sums
    norm: str = "layer"         # or rms
    mlp: str = "gelu"           # or swiglu
    bias: str = "all"           # or none, or qkv
    qk_norm: int = 1            # 1: RMSNorm on each head's q and k
    tied: int = 1               # 1: the head is the embedding
    window: int = 128           # tokens of text in a row
    steps: int = 450            # optimizer steps
    batch_size: int = 32        # rows a step, over all ranks
    micro_batch: int = 64       # rows a rank holds at once
    lr: float = 4e-3            # AdamW: embeddings, norms, biases
    muon_lr: float = 0.03       # Muon: the blocks' matrices; 0 gives them to AdamW
    weight_decay: float = 0.0   # of matrices, by AdamW and Muon; vectors never decay
    warmup: int = 10            # steps until the full rate
    grad_clip: float = 1.0      # the gradient's norm, at most; 0: off
    eval_every: int = 225       # steps between evaluations
    save_every: int = 150       # steps between saves of an unfinished run
    seed: int = 0               # of weights, order and samples
    device: str = "auto"        # auto: cuda, then mps, then cpu


# ---------------------------------------------------------------------------- data


def windows(tokens, cfg, step):
    """The (B, window + 1) ids of a step: a function of (seed, step), the same on every rank. They
    begin anywhere: no text is cropped away, but some of it is read without its beginning."""
    high = len(tokens) - cfg.window
    starts = np.random.default_rng([cfg.seed, step]).integers(0, high, cfg.batch_size)
    return [tokens[i : i + cfg.window + 1].astype(np.int64) for i in starts]


def collate(rows, device):
    """Rows of ids -> ((B, window + 1),)."""
    return (torch.tensor(np.stack(rows), device=device),)


# ---------------------------------------------------------------------------- loss


def pretrain_loss(logprobs):
    """(B, T) -> sum over all tokens, their number, metrics."""
    return -logprobs.sum(), logprobs.numel(), {}


# ---------------------------------------------------------------------------- training


def main(cfg):
    rank, world, device = setup(cfg)
    tokenizer = load_tokenizer(f"{cfg.data}/tokenizer.json")
    train, val = (read_tokens(f"{cfg.data}/{name}", tokenizer) for name in (cfg.train, cfg.val))
    if not 1 <= cfg.window <= cfg.block_size or len(val) <= cfg.window or len(train) <= cfg.window:
        fail(f"--window {cfg.window} must fit --block_size {cfg.block_size} and both .bin files")
    shape = {f.name: getattr(cfg, f.name) for f in fields(GPTConfig) if hasattr(cfg, f.name)}
    vocab_size = -(-tokenizer.vocab_size // 64) * 64 if tokenizer.vocab_size > 1024 else \
        tokenizer.vocab_size                           # large tables are faster at multiples of 64
    model = GPT(GPTConfig(vocab_size=vocab_size, **shape)).to(device)
    ddp = wrap(model, ragged=False)
    optimizers = make_optimizers([model], cfg.lr, cfg.muon_lr, weight_decay=cfg.weight_decay)
    first, log = resume(cfg, {"model": model}, optimizers, tokens=len(train))

    def objective(ids):
        return pretrain_loss(ddp(ids[:, :-1], ids[:, 1:]))

    for step in range(first, cfg.steps):
        rows = windows(train, cfg, step)
        batches = [collate(b, device) for b in split(rows[rank::world], cfg.micro_batch)]
        metrics = update(cfg, step, ddp, optimizers, batches, objective)
        if (step + 1) % cfg.eval_every == 0 or step + 1 == cfg.steps:
            metrics |= evaluate(cfg, model, val, rank, world, device)
        log(step + 1, cfg.batch_size * cfg.window, **metrics)
        save_checkpoint(cfg, step + 1, {"model": model}, optimizers, tokenizer)


# ---------------------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(cfg, model, val, rank, world, device):
    """Loss a token on held-out text, in 768 consecutive windows, sharded over ranks."""
    starts = range(0, len(val) - cfg.window, cfg.window)[:768]
    rows = [val[i : i + cfg.window + 1].astype(np.int64) for i in starts]
    total = Counter(loss=0.0, count=0)
    for part in split(rows, cfg.micro_batch, rank, world):
        (ids,) = collate(part, device)
        with autocast(device):
            loss, count, _ = pretrain_loss(model(ids[:, :-1], ids[:, 1:]))
        total.update(loss=float(loss), count=count)
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
