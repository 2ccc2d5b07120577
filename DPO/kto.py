"""kto.py: pairs are rare, thumbs are not; each completion alone is desirable or undesirable.

    reward(x, y) = log p(y | x) - log p_ref(y | x)                implicit, summed over y's tokens
    kl = max(0, mean of reward(x_i, y_j))                         of mismatched rows; a constant
    loss = mean over rows of lam_d * (1 - sigmoid(beta * (reward - kl)))        where desirable,
                             lam_u * (1 - sigmoid(beta * (kl - reward)))        where undesirable

KTO (Ethayarajh et al. 2024, eq. 8 at ICML, eq. 7 in arXiv v1). Rows {"prompt", "completion",
"label"}; a pair is read as two that do not know of each other. With n_d desirable rows and n_u
others, the paper wants lam_d n_d / (lam_u n_u) in [1, 4/3], and 2 to 10 times DPO's rate.
Its y_j is of the next row in the batch; here, of the next in the file that has another prompt.
Against 03_dpo.py: each completion is compared with kl, not with another; the sections that differ:
config, data, loss, training, evaluation.
    torchrun --nproc_per_node=4 DPO/kto.py --lam_d 1.3
"""
import math, os
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

from model import (all_sum, autocast, by_length, cli, diverged, encode_rows, fail, label_of, load,
                   make_optimizers, packed, pad, read_rows, resume, sample_rows, save_checkpoint,
                   setup, shift, wrap)
import torch
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
    batch_size: int = 64        # rows a step, over all ranks; a pair has two
    micro_batch: int = 64       # rows a rank holds at once, at most
    micro_tokens: int = 1536    # tokens it holds at once, padding counted
    beta: float = 0.5           # how soon value saturates away from the reference
    lam_d: float = 1.0          # weight of desirable rows
    lam_u: float = 1.0          # weight of undesirable rows
    lr: float = 2e-4            # AdamW's learning rate
    weight_decay: float = 0.0   # of matrices; vectors never decay
    warmup: int = 10            # steps until the full rate
    grad_clip: float = 1.0      # the gradient's norm, at most; 0: off
    eval_every: int = 100       # steps between evaluations
    save_every: int = 50        # steps between saves of an unfinished run
    seed: int = 0               # of weights, order and samples
    device: str = "auto"        # auto: cuda, then mps, then cpu


# ---------------------------------------------------------------------------- data


def encode(tokenizer, row):
    """{"prompt", "completion", "label"} -> [(ids, completion_mask, 1 or 0)], a pair -> two of them.

    Only the last turn is compared: earlier assistant turns belong to the prompt."""
    if row.get("chosen") is None:
        return [(*tokenizer.answered(row["prompt"], row["completion"]), label_of(row))]
    if any(row.get(key) is not None for key in ("completion", "label", "kto_tag")):
        raise ValueError("a row is a pair, or a completion with its label, and not both")
    pairs = [tokenizer.answered(row["prompt"], row[key]) for key in ("chosen", "rejected")]
    if pairs[0] == pairs[1]:
        raise ValueError("chosen and rejected are the same: nothing to learn")
    return [(*pair, label) for pair, label in zip(pairs, (1, 0))]


def read(cfg, name, tokenizer, model):
    path = f"{cfg.data}/{name}"
    rows = read_rows(path, "prompt", "chosen|completion", "rejected|label|kto_tag")
    return encode_rows(rows, path, lambda row: encode(tokenizer, row), model.cfg.block_size)


def collate(rows, device):
    """[(ids, completion_mask, label)] -> ids (B, T), completion_mask (B, T), desirable (B,)."""
    ids, masks, labels = zip(*rows)
    return pad(ids, device), pad(masks, device), torch.tensor(labels, device=device)


def mismatch(rows, block_size, path):
    """For each row its prompt before the completion of the next row, round and round, that has
    another prompt; cut at the context's edge. Of a whole file, in its order: of one batch's, rank's
    or micro-batch's rows, their number would change the result, and one row has no other."""
    split = [(ids[: mask.index(1)], ids[mask.index(1) :]) for ids, mask, _ in rows]
    n, other = len(rows), [None] * len(rows)
    for i in reversed(range(2 * n)):                # twice: the last row's may be among the first
        a, b = i % n, (i + 1) % n
        other[a] = b if split[a][0] != split[b][0] else other[b]
    if None in other:
        fail(f"all rows of {path} have one prompt: kl needs completions of other prompts")
    mixed = [(split[a][0], split[b][1]) for a, b in enumerate(other)]
    return [packed((x + y)[:block_size], ([0] * len(x) + [1] * len(y))[:block_size], 0)
            for x, y in mixed]


# ---------------------------------------------------------------------------- loss


def kto_loss(logprobs, ref_logprobs, completion_mask, desirable, kl, beta, lam_d, lam_u):
    """(B, T-1) thrice, (B,) -> sum over rows, their number, metrics: how far a row is on its own
    side of kl, and how many are. At the first step every sigmoid is 1/2. The gradient vanishes for
    rows already settled and for hopeless ones."""
    rewards = ((logprobs - ref_logprobs) * completion_mask).sum(1)
    above = (2 * desirable - 1) * (rewards - kl)
    weights = lam_d * desirable + lam_u * (1 - desirable)
    losses = weights * torch.sigmoid(-beta * above)                 # 1 - sigmoid(x) = sigmoid(-x)
    return losses.sum(), len(losses), {"above": above.detach().sum(), "right": (above > 0).sum()}


@torch.no_grad()
def baseline(cfg, model, ref, mixed, rank, world, device):
    """kl, over the rows of all ranks: how far the policy has moved on unrelated completions.
    (Matched rows were pushed, good and bad apart: their mean says nothing of that.)"""
    gap = 0.0
    for b in by_length(mixed, cfg, rank, world):
        ids, targets, mask = shift(*collate(b, device)[:2])
        with autocast(device):
            gap += float(((model(ids, targets) - ref(ids, targets)) * mask).sum())
    return max(0.0, all_sum(gap=gap)["gap"] / len(mixed))


# ---------------------------------------------------------------------------- training


def main(cfg):
    rank, world, device = setup(cfg)
    model, tokenizer, _ = load(cfg.init, device)
    ref = wrap(load(cfg.init, device)[0].requires_grad_(False))
    train, val = (read(cfg, name, tokenizer, model) for name in (cfg.train, cfg.val))
    train, flat = ([row for part in rows for row in part] for rows in (train, val))
    mixed, val_mixed = (mismatch(rows, model.cfg.block_size, f"{cfg.data}/{name}")
                        for rows, name in ((train, cfg.train), (flat, cfg.val)))
    ddp = wrap(model)
    optimizers = make_optimizers([model], cfg.lr, weight_decay=cfg.weight_decay)
    first, log = resume(cfg, {"model": model}, optimizers, rows=len(train),
                        desirable=sum(label for *_, label in train))

    def objective(kl, ids, completion_mask, desirable, policy=ddp):
        ids, targets, mask = shift(ids, completion_mask)
        with torch.no_grad():
            ref_logprobs = ref(ids, targets)
        return kto_loss(policy(ids, targets), ref_logprobs, mask, desirable, kl, cfg.beta,
                        cfg.lam_d, cfg.lam_u)

    for step in range(first, cfg.steps):
        at = sample_rows(len(train), cfg.batch_size, cfg.seed, step)
        rows = [train[i] for i in at]
        kl = baseline(cfg, model, ref, [mixed[i] for i in at], rank, world, device)
        batches = [collate(b, device) for b in by_length(rows[rank::world], cfg)]
        metrics = update(cfg, step, ddp, optimizers, batches, partial(objective, kl)) | {"kl": kl}
        if (step + 1) % cfg.eval_every == 0 or step + 1 == cfg.steps:
            kl = baseline(cfg, model, ref, val_mixed, rank, world, device)
            metrics |= evaluate(cfg, model, ref, kl, val, rank, world, device)
        log(step + 1, sum(len(ids) for ids, *_ in rows), **metrics)
        save_checkpoint(cfg, step + 1, {"model": model}, optimizers, tokenizer)


# ---------------------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(cfg, model, ref, kl, val, rank, world, device):
    """Loss and side of kl of the held-out rows; accuracy and margin of pairs among them."""
    total = Counter(loss=0.0, count=0, above=0.0, right=0, pairs=0, accuracy=0, margins=0.0)
    for parts in by_length(val, cfg, rank, world):
        ids, mask, desirable = collate(sum(parts, []), device)
        ids, targets, mask = shift(ids, mask)
        with autocast(device):
            logprobs, ref_logprobs = model(ids, targets), ref(ids, targets)
            loss, count, metrics = kto_loss(logprobs, ref_logprobs, mask, desirable, kl, cfg.beta,
                                            cfg.lam_d, cfg.lam_u)
        rewards = ((logprobs - ref_logprobs) * mask).sum(1).split([len(part) for part in parts])
        margins = [float(r[0] - r[1]) for r in rewards if len(r) == 2]
        total.update(loss=float(loss), count=count, above=float(metrics["above"]),
                     right=int(metrics["right"]), pairs=len(margins), margins=sum(margins),
                     accuracy=sum(m > 0 for m in margins))
    total = all_sum(**total)
    count, pairs = total.pop("count"), total.pop("pairs")
    of_pairs = {k: total.pop(k) for k in ("accuracy", "margins")}
    return {f"val_{k}": v / count for k, v in total.items()} | (
        {f"val_{k}": v / pairs for k, v in of_pairs.items()} if pairs else {})


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
