"""What autocast may not narrow: scores, implicit rewards, margins, log-sigmoids; weight decay."""
import pytest
import torch
from conftest import LOSS, PAIRS, ROLLOUTS, ROOT, kernel, run

BF16 = dict(device_type="cpu", dtype=torch.bfloat16)


def model_of(seed=0):
    torch.manual_seed(seed)
    model = kernel.GPT(kernel.GPTConfig(vocab_size=20, block_size=16, n_layer=1, n_head=2,
                                        n_embd=16, position="rope"))
    torch.nn.init.normal_(model.embed.weight)
    return model


def rows_of(n, seed=0):
    """n sequences that differ, at most, in one token: their scores lie near each other."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(20, (1, 9), generator=g).repeat(n, 1)
    ids[:, 7] = torch.arange(n) % 20
    return ids, torch.tensor([0] * 5 + [1] * 4).repeat(n, 1)


@pytest.mark.parametrize("name", ["06_reward", "05_ppo"])
def test_score_of_the_reward_model(stages, name):
    """The head multiplies in fp32 under autocast, forward and backward: on the same bf16 trunk its
    scores are those of fp32 arithmetic, and 20 near ones are 20 numbers."""
    scorer = stages["06_reward"].RewardModel(model_of())
    if name == "05_ppo":
        scorer = stages[name].RewardModel(scorer.model, scorer.head.state_dict())
    with torch.no_grad():
        scorer.head.bias.fill_(8.0)                # bf16 has no number between 8 and 8.06
    ids, mask = rows_of(20)
    with torch.autocast(**BF16):
        hidden = scorer.model.forward_hidden(ids)[:, -1]
        scores = scorer(ids, mask)
    expected = hidden.float() @ scorer.head.weight[0] + scorer.head.bias
    assert scores.dtype == torch.float32 and len(scores.unique()) == 20
    assert torch.allclose(scores, expected, rtol=1e-6)
    (scores.sum()).backward()
    assert scorer.head.weight.grad.dtype == torch.float32
    assert torch.allclose(scorer.head.weight.grad[0], hidden.float().sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["05_ppo", "RL/ppo"])
def test_values(stages, name):
    """So does the value head at every place, and the log-probs beside it are fp32."""
    actor = stages[name].ActorCritic(model_of())
    with torch.no_grad():
        actor.value.weight.normal_()
        actor.value.bias.fill_(8.0)
    ids = rows_of(20)[0]
    with torch.autocast(**BF16):
        hidden = actor.model.forward_hidden(ids[:, :-1])
        logprobs, values = actor(ids[:, :-1], ids[:, 1:], 0.7)
    expected = hidden.float() @ actor.value.weight[0] + actor.value.bias
    assert logprobs.dtype == values.dtype == torch.float32 and values.shape == (20, 8)
    assert torch.allclose(values, expected, rtol=1e-6)
    values.sum().backward()
    assert torch.allclose(actor.value.weight.grad[0], hidden.float().sum((0, 1)), rtol=1e-5,
                          atol=1e-4)


def test_no_ties(stages):
    """Pairs that differ in one token: none is a tie, and the loss tells them apart."""
    stage = stages["06_reward"]
    scorer = stage.RewardModel(model_of())
    ids, mask = rows_of(20)
    with torch.autocast(**BF16):
        scores = scorer(ids, mask)
        loss, _, metrics = stage.reward_loss(scores)
    margins = scores[:10] - scores[10:]
    assert (margins != 0).all() and metrics["accuracy"] == (margins > 0).sum()
    assert loss.dtype == metrics["margins"].dtype == torch.float32
    assert loss.item() == pytest.approx(
        torch.log1p(torch.exp(-margins.double())).sum().item(), rel=1e-6)


@pytest.mark.parametrize("name", [n for n in PAIRS if n != "06_reward"] + ROLLOUTS)
def test_everything_after_the_log_probs(name, stages, make, monkeypatch):
    """In a run with --bf16 1 the loss gets fp32 log-probs, and each tensor it makes is fp32."""
    stage, seen, made = stages[name], [], []
    loss = getattr(stage, LOSS[name])

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **kwargs or {})
            made.extend(t.dtype for t in (out if isinstance(out, tuple) else (out,))
                        if torch.is_tensor(t) and t.is_floating_point())
            return out

    def spy(*args):
        seen.append([t.dtype for t in args if torch.is_tensor(t) and t.is_floating_point()])
        with Watch():
            return loss(*args)

    monkeypatch.setitem(kernel.SWITCHES, "bf16", 1)
    monkeypatch.setattr(stage, LOSS[name], spy)
    run(*make(name, steps=1))
    assert seen and {d for dtypes in seen for d in dtypes} == {torch.float32} == set(made)


# ---------------------------------------------------------------------------- weight decay

DECAYED = ["00_pretrain", "01_sft", "02_cot", *PAIRS, *ROLLOUTS]


@pytest.mark.parametrize("name", DECAYED)
def test_weight_decay(name, make, tmp_path, monkeypatch):
    """The flag arrives: with gradients of 0 a matrix shrinks by its rate times the decay, AdamW's
    and Muon's, and no vector does. The default is none."""
    made, load = {}, torch.load
    for decay in (0.0, 0.5):
        stage, cfg = make(name, steps=1, warmup=0, lr=0.1, muon_lr=0.2, weight_decay=decay,
                          out=tmp_path / str(decay))
        assert type(cfg)().weight_decay == 0
        objective = stage.update

        def still(cfg, step, ddp, optimizers, batches, objective):
            for opt in optimizers:
                for group in opt.param_groups:
                    for p in group["params"]:
                        p.grad = torch.zeros_like(p)
                opt.step()
                opt.zero_grad(set_to_none=True)
            return {"loss": 0.0}

        monkeypatch.setattr(stage, "update", still)
        run(stage, cfg)
        monkeypatch.setattr(stage, "update", objective)
        made[decay] = load(f"{cfg.out}/{name.split('/')[-1]}.pt", weights_only=True)
    muon, steps = hasattr(cfg, "muon_lr"), getattr(cfg, "minibatches", 1)
    for part in ("model", *["head"] * (name == "06_reward")):
        for key, old in made[0.0][part].items():
            rate = 0.2 if muon and "blocks." in key else 0.1
            kept = (1 - 0.5 * rate) ** steps if old.ndim == 2 else 1
            assert torch.allclose(made[0.5][part][key], kept * old, rtol=1e-5), key
            assert kept == 1 or not torch.equal(made[0.5][part][key], old), key


def test_recipes_decay():
    """Pretraining on GPUs decays by 0.1, as GPT-3 does."""
    text = (ROOT / "run.sh").read_text()
    stage = text[text.index("stage 00_pretrain"):]
    assert "--weight_decay 0.1 " in stage[: stage.index("stage 01_sft")]
