"""What only a mutation showed to be missing: each of these fails under one of mutations.py."""
import copy
import inspect
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import LOSS, ROLLOUTS, SIBLINGS, TEXT, kernel, run, steps_of, write_rows

ANCHORED = [name for name in ROLLOUTS if "old_logprobs, ref_logprobs, advantages" in TEXT[name]]
GROUPED = [name for name in ROLLOUTS if "group_size: int" in TEXT[name]]


@pytest.fixture
def first_step(make, monkeypatch):
    """first_step("01_sft") -> stage, cfg, the model before the step, {name: gradient} of the step,
    as it is just before clipping."""
    def first_step(name, **changes):
        stage, cfg = make(name, steps=1, **changes)
        models, gradients, clip = [], {}, torch.nn.utils.clip_grad_norm_

        def wrap(model, **_):
            if next(model.parameters()).requires_grad:             # else it is the reference
                models.append((model, copy.deepcopy(model)))
            return model

        def record(*args, **kwargs):
            gradients.update({n: p.grad.clone() for n, p in models[0][0].named_parameters()})
            return clip(*args, **kwargs)

        monkeypatch.setattr(stage, "wrap", wrap)
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", record)
        run(stage, cfg)
        return stage, cfg, models[0][1], gradients
    return first_step


def logprob(model, ids, mask):
    """log p of the tokens under the mask, one row, the plainest way -> their sum, their number."""
    logprobs = model(torch.tensor([ids]))[0].log_softmax(-1)
    at = [t for t in range(1, len(ids)) if mask[t]]
    return sum(logprobs[t - 1, ids[t]] for t in at), len(at)


@pytest.mark.parametrize("name", ["00_pretrain", "01_sft", "03_dpo"])
def test_gradient_of_a_step(name, first_step, data, double):
    """From the files to the gradient: that of the mean loss, row by row and token by token."""
    stage, cfg, model, gradients = first_step(name)
    if name == "00_pretrain":
        tokens = np.fromfile(data / cfg.train, np.uint16)
        rows = [row.tolist() for row in stage.windows(tokens, cfg, 0)]
        assert all(len(row) == cfg.window + 1 for row in rows)
        parts = [logprob(model, row, [1] * len(row)) for row in rows]
    else:
        tok = stage.load(cfg.init)[1]
        made = [json.loads(line) for line in (data / cfg.train).read_text().splitlines()]
        made = [made[i] for i in kernel.sample_rows(len(made), cfg.batch_size, cfg.seed, 0)]

        def row(prompt, completion):
            prompt, completion = tok.prompt(prompt), tok.encode_completion(completion) + [tok.end]
            return logprob(model, prompt + completion, [0] * len(prompt) + [1] * len(completion))

        if name == "01_sft":
            parts = [row(r["prompt"], r["completion"]) for r in made]
        else:                              # at the reference the sigmoid is 1/2
            parts = [(cfg.beta / 2 * (row(r["prompt"], r["chosen"])[0]
                                      - row(r["prompt"], r["rejected"])[0]), 1) for r in made]
    loss = -sum(p for p, _ in parts) / sum(n for _, n in parts)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    for (n, _), grad in zip(model.named_parameters(), expected):
        assert (gradients[n] - grad).norm() <= 1e-9 * grad.norm() + 1e-12, n


def test_windows(stages, make, data):
    """Each step has its own rows, at its own places; the targets reach the last token."""
    stage, cfg = make("00_pretrain", batch_size=64)
    tokens = np.arange(cfg.window + 5)
    first, second = ([int(row[0]) for row in stage.windows(tokens, cfg, step)] for step in (0, 1))
    assert first != second and set(first) == set(second) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("name", ["00_pretrain", "01_sft", "02_cot"])
def test_learning_rate(name, make, monkeypatch):
    """Each step's rate is the schedule times the peak of its group: a ramp of --warmup steps, then
    a cosine over the others."""
    stage, cfg = make(name, steps=7, lr=1e-3, muon_lr=0.02, warmup=3)
    rates, make_optimizers = [], stage.make_optimizers

    def watched(*args, **kwargs):
        optimizers = make_optimizers(*args, **kwargs)
        for opt in optimizers:
            opt.register_step_pre_hook(
                lambda opt, *_: rates.append([g["lr"] for g in opt.param_groups]))
        return optimizers

    monkeypatch.setattr(stage, "make_optimizers", watched)
    run(stage, cfg)
    scale = [1 / 3, 2 / 3, 1] + [0.55 + 0.45 * math.cos(math.pi * i / 4) for i in range(4)]
    assert [r[0] for r in rates[::2]] == pytest.approx([1e-3 * s for s in scale])
    assert [r[0] for r in rates[1::2]] == pytest.approx([0.02 * s for s in scale])


def test_log_is_cut_back(make, tmp_path):
    """Steps after the last save are done again, and stand in the log once."""
    path, cfg = tmp_path / "out/01_sft.jsonl", make("01_sft")[1]
    path.parent.mkdir()
    write_rows(path, [{"config": {}}] + [{"step": i, "loss": 1.0} for i in range(1, 6)])
    kernel.Log(cfg, 3, {"device": "cpu"})
    assert [line["step"] for line in steps_of(path)] == [1, 2, 3]


# ---------------------------------------------------------------------------- rollouts

def calls(module, name, monkeypatch):
    """A list of the (arguments by name, result) with which module.name is called from now on."""
    seen, f = [], getattr(module, name)

    def spy(*args, **kwargs):
        bound = inspect.signature(f).bind(*args, **kwargs)
        bound.apply_defaults()
        result = f(*args, **kwargs)
        seen.append((bound.arguments, result))
        return result

    monkeypatch.setattr(module, name, spy)
    return seen


@pytest.mark.parametrize("name", ROLLOUTS)
def test_no_draw_is_used_twice(name, make, stages, monkeypatch):
    """Over a whole run, evaluation included, no two completions share (seed, step, row)."""
    seen = calls(stages[name], "generate", monkeypatch)
    run(*make(name, steps=3))
    keys = [(a["seed"], a["step"], row) for a, _ in seen for row in a["rows"]]
    assert len(set(keys)) == len(keys) >= 3 * 8


@pytest.mark.parametrize("name", ANCHORED)
def test_reference_stays(name, make, stages, monkeypatch):
    """In the first step the reference is the policy; then the policy leaves it behind."""
    seen = calls(stages[name], LOSS[name], monkeypatch)
    run(*make(name, steps=2, lr=1e-2))
    half = len(seen) // 2
    for i, (given, _) in enumerate(seen):
        same = torch.equal(given["ref_logprobs"], given["old_logprobs"])
        assert same == (i < half), i


@pytest.mark.parametrize("name", GROUPED)
def test_groups(name, stages, make, monkeypatch):
    """The completions of one prompt, which stand side by side, are one group."""
    stage, cfg = make(name, group_size=2)
    tok = stage.load(cfg.init)[1]
    said = [tok.encode_completion(f"<answer>{n}</answer>") + [tok.end] for n in (7, 7, 7, 8, 8, 8)]
    monkeypatch.setattr(stage, "generate", lambda *args, **kwargs: (
        said, [[-1.0] * len(c) for c in said]))
    prompts = [(tok.prompt("3+4=?"), "7")] * 3
    rewards = stage.rollout(cfg, None, tok, prompts, 0, 0, 1)[1]
    assert rewards.tolist() == [[1, 1], [1, 0], [0, 0]]


@pytest.mark.parametrize("name", ROLLOUTS)
def test_evaluation(name, stages, make, monkeypatch):
    """The primer is part of what is judged, and every question is asked once."""
    stage, cfg = make(name, eval_rows=5)
    tok = stage.load(cfg.init)[1]
    val = [(tok.prompt(f"{n}+1=?"), str(n + 1)) for n in range(6)]
    asked = []

    def generate(model, prompts, *args, **kwargs):
        asked.extend(prompts)
        said = ["1+1</think><answer>2</answer>", "2</think><answer>3</answer>"]
        return [tok.encode_completion(said[i % 2]) + [tok.end] for i in range(len(prompts))], None

    monkeypatch.setattr(stage, "generate", generate)
    figures = stage.evaluate(cfg, None, tok, val, 0, 1)
    assert figures["accuracy"] == 0                    # right are 1 2 3 4 5; 2 3 2 3 2 is said
    assert asked == [p + [tok.tags["<think>"]] for p, _ in val[:5]]
    val = [(p, "23"[i % 2]) for i, (p, _) in enumerate(val)]
    assert stage.evaluate(cfg, None, tok, val, 0, 1)["accuracy"] == 1


def rewards_of_equal_groups():
    """Groups of equal rewards whose computed mean is not quite the reward."""
    for value in (0.1, 0.3, 0.7, 1 / 3):
        for n in range(2, 12):
            group = torch.full((1, n), value)
            if (group != group.mean()).any():
                yield group


@pytest.mark.parametrize("name", [n for n in GROUPED if "rewards.std(" in TEXT[n]])
def test_equal_rewards(name, stages):
    """Exactly 0, not rounding noise over a tiny number."""
    groups = list(rewards_of_equal_groups())
    assert groups
    for group in groups:
        assert not stages[name].group_advantages(group).any()


# ---------------------------------------------------------------------------- 05

@pytest.mark.parametrize("name", [n for n in ROLLOUTS if n == "05_ppo"])
def test_kl_in_the_reward(name, make, stages, monkeypatch):
    """The score on <|end|>, minus beta times (log p_old - log p_ref) on each token: nothing in the
    first step, and a price once the policy has moved."""
    stage, cfg = make(name, steps=2, lr=1e-2)
    collated, given, losses = (calls(stage, f, monkeypatch) for f in ("collate", "gae", LOSS[name]))
    run(stage, cfg)
    assert len(collated) == len(given) == len(losses) >= 4
    ref = stage.load(cfg.init)[0]
    for i, ((_, rows), (a, _), (b, _)) in enumerate(zip(collated, given, losses)):
        ids, targets, mask = kernel.shift(*rows[:2])
        with torch.no_grad():
            kl = b["old_logprobs"] - ref(ids, targets, cfg.temperature)
        assert (kl.abs().max() > 1e-3) == (i >= len(losses) // 2)
        for r, k, m, score in zip(a["rewards"], kl, mask, rows[3]):
            expected = -cfg.beta * k[m == 1]
            expected[-1] += score
            assert torch.allclose(r[m == 1], expected, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in ROLLOUTS if n == "05_ppo"])
def test_first_values(name, stages):
    """A critic that has seen nothing says 0, so that the first advantages are rewards."""
    model = kernel.GPT(kernel.GPTConfig(vocab_size=20, block_size=16, n_layer=1, n_head=2,
                                        n_embd=16))
    ids = torch.randint(20, (3, 12))
    logprobs, values = stages[name].ActorCritic(model)(ids[:, :-1], ids[:, 1:], 1.0)
    assert not values.any() and values.shape == logprobs.shape == (3, 11)


@pytest.mark.parametrize("name", [n for n in ROLLOUTS if n == "05_ppo"])
def test_score_has_a_scale(name, make, chain, tmp_path, monkeypatch):
    """What is rewarded is the judge's score less the mean, over the std, of 06's held-out pairs."""
    for path in chain.glob("0*.pt"):
        parts = torch.load(path, weights_only=True)
        parts |= {"val_mean": 0.7, "val_std": 2.5} if path.stem == "06_reward" else {}
        torch.save(parts, tmp_path / path.name)
    stage, cfg = make(name, steps=1, start=tmp_path)
    seen = calls(stage, "rollout", monkeypatch)
    run(stage, cfg)
    model, _, parts = stage.load(cfg.reward, kind="reward")
    rows, judge = seen[0][1][0], stage.RewardModel(model, parts["head"])
    ids, mask, _ = (kernel.pad(x, "cpu") for x in zip(*rows))
    with torch.no_grad():
        assert torch.allclose(seen[0][0]["scorer"](rows), (judge(ids, mask) - 0.7) / 2.5, atol=1e-6)


def test_judge(stages, double):
    """05's reward model is 06's: the same scores, whatever the padding is."""
    if not {"05_ppo", "06_reward"} <= set(stages):
        pytest.skip("05_ppo.py or 06_reward.py is not there yet")
    torch.manual_seed(0)
    model = kernel.GPT(kernel.GPTConfig(vocab_size=20, block_size=16, n_layer=1, n_head=2,
                                        n_embd=16))
    torch.nn.init.normal_(model.embed.weight)
    scorer = stages["06_reward"].RewardModel(model)
    judge = stages["05_ppo"].RewardModel(model, scorer.head.state_dict())
    rows = [([1, 2, 3, 4, 5, 9], [0, 0, 1, 1, 1, 1]), ([1, 7, 9], [0, 1, 1]), ([4, 9], [0, 1])]
    ids, mask = kernel.pad([r for r, _ in rows], "cpu"), kernel.pad([m for _, m in rows], "cpu")
    assert torch.equal(judge(ids, mask), scorer(ids, mask))
    assert F.mse_loss(judge(ids, mask)[1:2], judge(ids[1:2, :3], mask[1:2, :3])) < 1e-20


# ---------------------------------------------------------------------------- siblings

@pytest.mark.skipif("DPO/orpo" not in SIBLINGS, reason="DPO/orpo.py is not there yet")
def test_orpo_in_fp32(stages):
    """Log-probs as a run has them, with a mask of integers (one of float64 would lift the sum to
    float64): 1 - exp(-1e-5) would have lost half of its digits, and 1 - exp(-1e-7) most."""
    for near in (-1e-5, -3e-7):
        logprobs = torch.tensor([[near], [-math.log(2)]], dtype=torch.float32)
        metrics = stages["DPO/orpo"].orpo_loss(logprobs, torch.ones(2, 1, dtype=torch.long), 1.0)[2]
        assert metrics["margins"].dtype == torch.float32
        assert metrics["margins"].item() == pytest.approx(-math.log(-math.expm1(near)), rel=1e-6)


@pytest.mark.skipif("DPO/kto" not in SIBLINGS, reason="DPO/kto.py is not there yet")
def test_kto_baseline_of_two_ranks(stages, monkeypatch):
    """The clamp comes after the sum over ranks: one may have a gap below 0."""
    from test_dpo_siblings import world_of
    rows, policy, ref = world_of(lambda q, a: (3.0 if q > 2 else -1.0) * ((q + 1) % 6 == a))
    rows = stages["DPO/kto"].mismatch(rows, 64, "here")
    stage, parts = stages["DPO/kto"], []
    monkeypatch.setattr(stage, "all_sum", lambda gap: parts.append(gap) or {
        "gap": 12 * sum(parts)})
    cfg = SimpleNamespace(micro_batch=6, micro_tokens=999)
    kl = [stage.baseline(cfg, policy, ref, rows, rank, 2, "cpu") for rank in (0, 1)]
    assert parts == [-6, 18] and kl == [0, 12]
