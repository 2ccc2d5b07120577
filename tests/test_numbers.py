"""Each number that a script passes on, at a value at which a mistake shows: no temperature of 1, no
mean of 0, no seed 0, no single epoch, not the first step, where the policy is its reference."""
import inspect
import json
from dataclasses import fields

import numpy as np
import pytest
import reference as R
import torch
from conftest import LOSS, ROLLOUTS, SCRIPTS, TEXT, kernel, run, stem, steps_of, weights
from test_gaps import GROUPED, calls

pytestmark = pytest.mark.usefixtures("double")
REFERENCED = [name for name in ROLLOUTS if "ref = wrap(" in TEXT[name]]
IN_THE_LOSS = [name for name in REFERENCED if "ref_logprobs, advantages" in TEXT[name]]
CRITICS = [name for name in ROLLOUTS if "def gae(" in TEXT[name]]
COLD = 0.6                                                  # a temperature


# ---------------------------------------------------------------------------- temperature


@pytest.mark.parametrize("name", REFERENCED)
def test_no_distance_at_the_start(name, make, tmp_path):
    """Before the first update the policy is its reference, at whatever temperature both are read:
    the KL is 0. Afterwards it is not."""
    run(*make(name, steps=3, minibatches=1, lr=1e-2, temperature=COLD))
    kl = [line["kl"] for line in steps_of(tmp_path / f"out/{stem(name)}.jsonl")]
    assert abs(kl[0]) < 1e-12 and max(map(abs, kl[1:])) > 1e-4


@pytest.mark.parametrize("name", IN_THE_LOSS)
def test_reference_at_the_temperature(name, make, stages, monkeypatch):
    """What the loss compares with is the log-prob that the start gives, at the temperature, also
    when the policy has left it."""
    stage, cfg = make(name, steps=3, minibatches=1, lr=1e-2, temperature=COLD)
    shifts, losses = (calls(stage, f, monkeypatch) for f in ("shift", LOSS[name]))
    start = stage.load(cfg.init)[0]
    run(stage, cfg)
    assert len(shifts) == len(losses) >= 6
    for (_, (ids, targets, mask)), (given, _) in zip(shifts, losses):
        with torch.no_grad():
            expected = (start(ids) / COLD).log_softmax(-1)
        expected = expected.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        assert torch.allclose(given["ref_logprobs"][mask == 1], expected[mask == 1], atol=1e-9)


# ---------------------------------------------------------------------------- 06 and 05


def held_out(stage, cfg, tok):
    """[(ids, mask)] of both sides of the held-out pairs, read in the plainest way."""
    rows = [json.loads(line) for line in open(f"{cfg.data}/pairs_val.jsonl")]
    return [side for row in rows for side in stage.encode(tok, row)]


def test_scale_of_the_scores(make, tmp_path):
    """06 saves the mean and the std of the scores of the held-out completions, chosen and rejected:
    one by one, without padding."""
    stage, cfg = make("06_reward", steps=3, lr=1e-2)
    run(stage, cfg)
    model, tok, parts = kernel.load(f"{cfg.out}/06_reward.pt", kind="reward")
    scorer = stage.RewardModel(model)
    scorer.head.load_state_dict(parts["head"])
    scores = [scorer(*(torch.tensor([x]) for x in side)).item() for side in held_out(
        stage, cfg, tok)]
    mean, std = np.mean(scores), np.std(scores)
    assert abs(mean) > 0.05 * std > 0
    assert [parts["val_mean"], parts["val_std"]] == pytest.approx([mean, std], rel=1e-9)
    line = steps_of(tmp_path / "out/06_reward.jsonl")[-1]
    assert [line["val_mean"], line["val_std"]] == pytest.approx([mean, std], rel=1e-9)


def test_scores_are_centred(make, stages, tmp_path, monkeypatch):
    """Of the very pairs by which 06 measured them, 05's scores have the mean 0 and the std 1."""
    judge, cfg = make("06_reward", steps=3, lr=1e-2)
    run(judge, cfg)
    stage, cfg = make("05_ppo", steps=1, reward=f"{cfg.out}/06_reward.pt", out=tmp_path / "2")
    seen = calls(stage, "rollout", monkeypatch)
    run(stage, cfg)
    given = seen[0][0]
    scores = given["scorer"](held_out(judge, cfg, given["tokenizer"]))
    assert abs(kernel.load(cfg.reward, kind="reward")[2]["val_mean"]) > 0.05
    assert abs(scores.mean()) < 1e-9
    assert scores.std(unbiased=False).item() == pytest.approx(1, rel=1e-9)


# ---------------------------------------------------------------------------- the flags arrive

NUMBERS = dict(clip_eps=0.11, clip_eps_high=0.37, beta=0.23, gamma=0.83, lam=0.61, vf_coef=0.47,
               lam_d=1.7, lam_u=0.6, max_new=11)


def numbers_of(stage, name):
    """The parameters of its loss that are flags."""
    names = {f.name for f in fields(stage.Config)}
    return names & set(inspect.signature(getattr(stage, LOSS[name])).parameters)


@pytest.mark.parametrize("name", [n for n in SCRIPTS if n not in (
    "00_pretrain", "01_sft", "02_cot", "06_reward")])
def test_numbers_of_the_loss(name, make, stages, monkeypatch):
    """Each of the loss's numbers is its own flag's, in training and in evaluation."""
    wanted = {k: NUMBERS[k] for k in numbers_of(stages[name], name)}
    assert wanted
    stage, cfg = make(name, steps=1, **NUMBERS)
    seen = calls(stage, LOSS[name], monkeypatch)
    run(stage, cfg)
    for given, _ in seen:
        assert {k: given[k] for k in wanted} == wanted


@pytest.mark.parametrize("name", CRITICS)
def test_discounts(name, make, stages, monkeypatch):
    """Returns are those of GAE at the gamma and the lambda of the flags, once values are not 0."""
    stage, cfg = make(name, steps=2, minibatches=1, lr=1e-2, gamma=0.8, lam=0.5)
    given, losses = (calls(stage, f, monkeypatch) for f in ("gae", LOSS[name]))
    run(stage, cfg)
    assert len(given) == len(losses) >= 4 and given[-1][0]["values"].abs().max() > 1e-3
    for (a, _), (b, _) in zip(given, losses):
        mask = a["completion_mask"]
        expected = R.gae(*(x.tolist() for x in (a["rewards"], a["values"], mask)), 0.8, 0.5)[1]
        assert np.allclose((b["returns"] * mask).numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("name", CRITICS)
def test_no_value_loss(name, make, tmp_path):
    """At --vf_coef 0 the critic stays where it was: at 0."""
    stage, cfg = make(name, steps=2, lr=1e-2, vf_coef=0.0)
    run(stage, cfg)
    head = torch.load(f"{cfg.out}/{stem(name)}.pt", weights_only=True)["value"]
    assert not any(t.any() for t in head.values())


@pytest.mark.parametrize("name", ROLLOUTS)
def test_numbers_of_the_sampler(name, make, stages, monkeypatch):
    """Samples are drawn at the temperature, the length and the seed of the flags; an evaluation at
    temperature 1, so that runs of different temperatures compare."""
    stage, cfg = make(name, steps=2, eval_every=1, temperature=COLD, max_new=11, seed=5)
    seen = calls(stage, "generate", monkeypatch)
    run(stage, cfg)
    for given, _ in seen:
        assert (given["max_new"], given["seed"]) == (11, 5)
        assert given["temperature"] == (1 if given["step"] == 10 ** 6 else COLD)
    assert {given["step"] for given, _ in seen} >= {0, 1, 10 ** 6}


@pytest.mark.parametrize("name", [n for n in SCRIPTS if "sample_rows" in TEXT[n]])
def test_seed_of_the_rows(name, make, stages, monkeypatch):
    """Another seed, other rows; both in the order that it says."""
    stage, cfg = make(name, steps=2, seed=5)
    seen = calls(stage, "sample_rows", monkeypatch)
    run(stage, cfg)
    assert len(seen) >= 2
    n = 48 if name == "DPO/kto" else 24                           # two rows a pair
    for given, rows in seen:
        assert rows == kernel.sample_rows(n, given["k"], 5, given["step"])
        assert rows != kernel.sample_rows(n, given["k"], 0, given["step"])


def test_seed_of_windows_and_weights(make, tmp_path):
    """00: another seed begins at other places of the text, with other weights."""
    made = []
    for seed in (0, 5):
        stage, cfg = make("00_pretrain", steps=1, lr=0.0, muon_lr=0.0, seed=seed,
                          out=tmp_path / f"{seed}")
        run(stage, cfg)
        made.append((weights(f"{cfg.out}/00_pretrain.pt"), [
            row.tolist() for row in stage.windows(np.arange(500), cfg, 3)]))
    assert not torch.allclose(made[0][0], made[1][0]) and made[0][1] != made[1][1]


# ---------------------------------------------------------------------------- optimizer steps


@pytest.mark.parametrize("name", [n for n in ROLLOUTS if "epochs: int" in TEXT[n]])
def test_epochs(name, make, stages, monkeypatch, tmp_path):
    """Three passes over two minibatches are six optimizer steps, each minibatch in turn; the log
    has the mean of the six."""
    stage, cfg = make(name, steps=2, epochs=3, minibatches=2, lr=1e-2)
    seen = calls(stage, "update", monkeypatch)
    run(stage, cfg)
    assert [given["step"] for given, _ in seen] == [0] * 6 + [1] * 6
    for step, line in enumerate(steps_of(tmp_path / f"out/{stem(name)}.jsonl")):
        six = seen[6 * step : 6 * step + 6]
        first = [given["batches"][0][0] for given, _ in six]
        for i, ids in enumerate(first):
            assert torch.equal(ids, first[i % 2])
        assert first[0].shape != first[1].shape or not torch.equal(*first[:2])
        for key in ("loss", "grad_norm"):
            assert line[key] == pytest.approx(sum(made[key] for _, made in six) / 6, rel=1e-12)


@pytest.mark.parametrize("name", SCRIPTS)
def test_clipping(name, make, monkeypatch, tmp_path):
    """No longer than --grad_clip; 0 leaves every gradient as it is."""
    clip, seen = torch.nn.utils.clip_grad_norm_, []

    def watched(params, *rest):
        params = list(params)
        before = torch.cat([p.grad.flatten() for p in params])
        norm = clip(params, *rest)
        seen.append((before, torch.cat([p.grad.flatten() for p in params])))
        return norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watched)
    for bound in (0.003, 0.0):
        run(*make(name, steps=1, grad_clip=bound, out=tmp_path / f"{bound}"))
        for before, after in seen:
            assert before.norm() > 0.003
            scale = bound / before.norm() if bound else 1
            assert torch.allclose(after, before * scale, rtol=1e-3)
        assert seen
        seen.clear()


# ---------------------------------------------------------------------------- siblings


def test_kl_of_kto(make, stages, monkeypatch, tmp_path):
    """Each step's loss has that step's own kl, which the log names; an evaluation's that of the
    held-out rows. (Of tiny models all would be 0: here they are numbered.)"""
    stage, cfg = make("DPO/kto", steps=3, eval_every=1, micro_batch=8)
    asked, losses = [], calls(stage, LOSS["DPO/kto"], monkeypatch)
    monkeypatch.setattr(stage, "baseline", lambda cfg, model, ref, rows, *rest: (
        asked.append(len(rows)), 0.1 * len(asked))[1])
    run(stage, cfg)
    assert asked == [8, 18] * 3                                   # a step's rows, the held-out ones
    used = [given["kl"] for given, _ in losses]                   # one micro-batch, then two
    assert used == pytest.approx(sum(([x, *[x + 0.1] * 2] for x in (0.1, 0.3, 0.5)), []))
    assert [line["kl"] for line in steps_of(tmp_path / "out/kto.jsonl")] == pytest.approx(
        [0.1, 0.3, 0.5])


def test_long_completions_are_punished(make, stages, monkeypatch):
    """DAPO: what the advantages are made from is the verdict and, from one token on, its price."""
    stage, cfg = make("RL/dapo", steps=1, max_new=12, overlong=11)
    batches, given = (calls(stage, f, monkeypatch) for f in ("full_batch", "group_advantages"))
    run(stage, cfg)
    rollouts, rewards, _ = batches[0][1]
    lengths = [sum(mask) for _, mask, _ in rollouts]
    price = torch.tensor([R.overlong(n, 12, 11) for n in lengths]).view_as(rewards)
    assert len(price.unique()) > 2
    assert torch.allclose(given[0][0]["rewards"], rewards + price)


@pytest.mark.parametrize("name", ROLLOUTS)
def test_metrics_of_rollouts(name, make, stages, monkeypatch):
    """Means over completions of unequal lengths, and the entropy over their tokens: it is minus the
    log-prob."""
    stage, cfg = make(name, group_size=2)
    tok = stage.load(cfg.init)[1]
    end = [tok.end]
    said = [tok.encode_completion(t) + e for t, e in [
        ("<answer>7</answer>", end), ("<answer>12</answer>", end), ("<answer>7</answer>", end),
        ("<answer>7</answer>", end), ("no", end), ("12345678", [])]]
    logprobs = [[-0.1 * (i + 1)] * len(c) for i, c in enumerate(said)]
    monkeypatch.setattr(stage, "generate", lambda *args, **kwargs: (said, logprobs))
    prompts = [(tok.prompt("3+4=?"), "7")] * (3 if name in GROUPED else 6)
    scorer = [lambda rows: torch.zeros(len(rows))] * (name == "05_ppo")
    metrics = stage.rollout(cfg, None, *scorer, tok, prompts, 0, 0, 1)[2]
    tokens = sum(map(len, said))
    if "n" in metrics:                                      # DAPO's sums, of one round
        metrics = {k: v / (tokens if k == "entropy" else 6) for k, v in metrics.items()}
    nats = sum(0.1 * (i + 1) * len(c) for i, c in enumerate(said))
    assert metrics["entropy"] == pytest.approx(nats / tokens)
    assert metrics["length"] == pytest.approx(tokens / 6)
    assert metrics["truncated"] == pytest.approx(1 / 6)
    assert metrics.get("unparsed", 1 / 6) == pytest.approx(1 / 6)
    assert metrics.get("no_signal", 2 / 3) == pytest.approx(2 / 3)    # one group of three is mixed
    if name == "05_ppo":
        assert metrics["right"] == 0.5 and metrics["reward"] == pytest.approx(-1 / 6)
    else:
        assert metrics["reward"] == 0.5


# ---------------------------------------------------------------------------- the model


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_norm_eps(norm):
    """Before the root, at its own value, in the norms of the blocks and of q and k."""
    cfg = kernel.GPTConfig(vocab_size=9, block_size=8, n_layer=1, n_head=2, n_embd=16, norm=norm,
                           norm_eps=0.5, qk_norm=1)
    model, x = kernel.GPT(cfg), torch.randn(5, 16)
    centred = x - x.mean(1, keepdim=True) * (norm == "layer")
    expected = centred / (centred.square().mean(1, keepdim=True) + 0.5).sqrt()
    for m in (model.norm, model.blocks[0].norm1, model.blocks[0].norm2):
        assert torch.allclose(m(x), expected)
    x = torch.randn(5, 8)
    for m in (model.blocks[0].attention.q_norm, model.blocks[0].attention.k_norm):
        assert torch.allclose(m(x), x / (x.square().mean(1, keepdim=True) + 0.5).sqrt())
