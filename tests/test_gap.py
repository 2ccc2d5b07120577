"""The gap between sampler and trainer, as every RL script logs it."""
import pytest
import torch
from conftest import ROLLOUTS, kernel, run, steps_of


@pytest.mark.parametrize("name", ROLLOUTS)
def test_gap(name, make, stages, monkeypatch):
    """With known errors in the sampler's log-probs, at a temperature and for ragged completions:
    their mean and their largest, a token."""
    stage, cfg = make(name, steps=1, temperature=0.7)
    generate, planted = stage.generate, []

    def off(*args, **kwargs):
        completions, logprobs = generate(*args, **kwargs)
        if kwargs.get("step") == 10 ** 6:                       # the evaluation's
            return completions, logprobs
        errors = [[(-1) ** j * (0.1 + 0.01 * j + 0.001 * i) for j in range(len(c))]
                  for i, c in enumerate(completions)]
        planted.extend(abs(e) for row in errors for e in row)
        return completions, [[a + e for a, e in zip(*rows)] for rows in zip(logprobs, errors)]

    monkeypatch.setattr(stage, "generate", off)
    run(stage, cfg)
    [line] = steps_of(f"{cfg.out}/{name.split('/')[-1]}.jsonl")
    if name != "RL/dapo":                                       # which discards some of them
        assert line["gap"] == pytest.approx(sum(planted) / len(planted), abs=2e-5)
        assert line["gap_max"] == pytest.approx(max(planted), abs=1e-4)
    assert min(planted) < line["gap"] < line["gap_max"] <= max(planted) + 1e-4


@pytest.mark.parametrize("name", ROLLOUTS)
def test_no_gap(name, make, stages):
    """In fp32 sampler and trainer say the same, up to rounding."""
    stage, cfg = make(name, steps=1, temperature=0.7)
    run(stage, cfg)
    [line] = steps_of(f"{cfg.out}/{name.split('/')[-1]}.jsonl")
    assert 0 < line["gap"] <= line["gap_max"] < 1e-4


@pytest.mark.parametrize("name", ROLLOUTS)
def test_head(name, make, stages, monkeypatch):
    """With --bf16 1 the logits of policy and reference are fp32 products, in rollouts, scores and
    updates; 05's judge has no logits."""
    stage, cfg = make(name, steps=1)
    project, narrow = kernel.project, []
    monkeypatch.setattr(kernel, "project", lambda x, weight, bf16: (
        narrow.append(bf16), project(x, weight, bf16))[1])
    monkeypatch.setitem(kernel.SWITCHES, "bf16", 1)
    run(stage, cfg)
    assert len(narrow) > 4 and not any(narrow)


def test_gap_over_ranks(monkeypatch):
    """The sum over all ranks' tokens by their number, and the largest of all."""
    targets = torch.tensor([[-1, 3, 4], [-1, -1, 5]])
    sampled, old = torch.tensor([[9.0, 1, 2], [9, 9, 3]]), torch.tensor([[0.0, 1.5, 1], [0, 0, 3]])
    monkeypatch.setattr(kernel, "all_sum", lambda **n: {k: float(v) + 3 for k, v in n.items()})
    monkeypatch.setattr(kernel, "all_max", lambda x: max(x, 2.5))
    assert kernel.sampler_gap([(None, targets, sampled, old)]) == {"gap": 4.5 / 6, "gap_max": 2.5}
