"""torchrun's program in test_ranks.py: some scripts in this world; rank 0 writes what came out.

    torchrun --nproc_per_node=2 tests/rank_worker.py DATA CHAIN REAL OUT 04_rlvr RL/rloo

Everything is float64. Two ways to split the same sums then differ by 1e-16 or so, and the gap to
a forgotten all-reduce is thirteen orders of magnitude.
"""
import itertools
import os
import sys

import torch
import torch.distributed as dist
from conftest import ROLLOUTS, config, kernel, load_stage, run, stem, weights


def main(data, chain, real, out, *names):
    torch.set_default_dtype(torch.float64)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    made = {}
    for name in names:
        stage = load_stage(name)
        gradients, rollouts = watch(stage, name)
        # 8 rows a step: 4 micro-batches of 2 in a world of 1, one of 2 in a world of 4.
        steps = 6 if "/" in name else 20                    # siblings share their parent's loop
        cfg = config(stage, data, f"{out}/{world}", chain, steps=steps, lr=1e-3,
                     muon_lr=0.0, micro_batch=2, group_size=2, eval_every=steps - 1)
        run(stage, cfg)
        seen = [None] * world
        if world > 1:
            dist.all_gather_object(seen, rollouts)
        for part in seen:
            rollouts.update(part or {})
        made[name] = {"rollouts": dict(rollouts), "gradient": gradients[0]}
        if rank == 0:
            made[name]["weights"] = weights(f"{out}/{world}/{stem(name)}.pt")
        if hasattr(cfg, "muon_lr"):
            gradients.clear()
            cfg.muon_lr, cfg.steps, cfg.out = 0.02, 1, f"{out}/{world}/muon"
            run(stage, cfg)
            made[name]["muon_gradient"] = gradients[0]
        gradients.clear()
        run(stage, config(stage, real, f"{out}/{world}/real", real, steps=1, muon_lr=0.0,
                          micro_batch=2, group_size=2))
        made[name]["real_gradient"] = gradients[0]
        torch.nn.utils.clip_grad_norm_ = clip
        for sharded in (1, 0) if world == 2 and name not in ROLLOUTS else ():
            cfg = config(stage, data, f"{out}/sharded{sharded}", chain, steps=4, lr=1e-3,
                         muon_lr=0.02, micro_batch=2, eval_every=2)
            made[name][f"held{sharded}"] = halves(stage, cfg, sharded)
            if rank == 0:
                made[name][f"sharded{sharded}"] = weights(f"{cfg.out}/{stem(name)}.pt")
    if rank == 0:
        torch.save(made, f"{out}/{world}.pt")


def halves(stage, cfg, sharded):
    """Two steps with or without FSDP2, a stop as by Ctrl-C, two the other way -> how much of
    the optimizer's state this rank held in each half, in elements. Muon iterates in float64 here,
    not in bfloat16: of its rounding nothing else could be told."""
    held, make, narrow = [], stage.make_optimizers, torch.Tensor.bfloat16
    torch.Tensor.bfloat16 = lambda self: self
    for kernel.SWITCHES["fsdp"], stop in ((sharded, 2), (1 - sharded, 0)):
        made, steps = [], itertools.count(1)
        stage.make_optimizers = lambda *a, **k: made.extend(make(*a, **k)) or made
        kernel.interrupted = lambda: next(steps) == stop
        try:
            run(stage, cfg)
        except SystemExit as e:
            assert e.code == 130 and stop == 2
        dist.barrier()                                 # rank 0 has written what both read next
        state = [t for opt in made for of in opt.state.values() for t in of.values()]
        held.append(sum(getattr(t, "_local_tensor", t).numel() for t in state if t.ndim))
    kernel.SWITCHES["fsdp"], stage.make_optimizers, torch.Tensor.bfloat16 = 0, make, narrow
    return held


clip = torch.nn.utils.clip_grad_norm_


def watch(stage, name):
    """Lists that get this stage's gradients, before clipping, and its rollouts by (step, row)."""
    gradients, rollouts = [], {}

    def record(params, *args, **kwargs):
        params = list(params)
        gradients.append(torch.cat([p.grad.flatten() for p in params]))
        return clip(params, *args, **kwargs)

    torch.nn.utils.clip_grad_norm_ = record
    if name in ROLLOUTS:
        generate = stage.generate

        def spy(model, prompts, *args, **kwargs):
            completions, logprobs = generate(model, prompts, *args, **kwargs)
            if "rows" not in kwargs:                       # training, not evaluation
                step, rows = args[-2:]
                rollouts.update({(step, r): (p, c) for r, p, c in zip(rows, prompts, completions)})
                # A gap to the trainer of each row's own size: the log must have it over all ranks.
                logprobs = [[x + 0.01 * (1 + r) for x in row] for r, row in zip(rows, logprobs)]
            return completions, logprobs

        stage.generate = spy
    return gradients, rollouts


if __name__ == "__main__":
    main(*sys.argv[1:])
