"""What a sibling changes, and that it changes nothing else: each against its parent or by hand."""
import inspect
import math

import pytest
import torch
from conftest import LOSS, ROLLOUTS, SIBLINGS, against, kernel, run, stem, steps_of
from test_gaps import calls
from test_losses import EPS, ragged

pytestmark = pytest.mark.usefixtures("double")


def have(B=8, T=9, seed=0):
    """What the losses ask for, by name: B rows of ragged completions, and the constants."""
    torch.manual_seed(seed)
    mask = ragged(B, T, seed)
    logprobs, old, ref = -torch.rand(3, B, T) * mask
    return dict(logprobs=logprobs, old_logprobs=old, ref_logprobs=ref, completion_mask=mask,
                advantages=torch.randn(B), rewards=torch.rand(B), clip_eps=EPS, clip_eps_high=0.28,
                beta=0.3, max_new=T, values=torch.randn(B, T), old_values=torch.randn(B, T),
                returns=torch.randn(B, T), vf_coef=0.1, gamma=0.5, lam=0.7, lam_d=1.3, lam_u=0.6,
                kl=0.2, desirable=(torch.arange(8) < 4).long())


def loss(stages, name, given):
    """The script's loss of the values that it names."""
    f = getattr(stages[name], LOSS[name])
    given = given | ({"advantages": given["returns"] / 2} if name == "RL/ppo" else {})
    return f(*[given[p] for p in inspect.signature(f).parameters])


def gradient(stages, name, given):
    """-> (B, T), of the mean: the sum over the count."""
    logprobs = given["logprobs"].clone().requires_grad_()
    total, count, _ = loss(stages, name, given | {"logprobs": logprobs})
    return torch.autograd.grad(total, logprobs)[0] / count


def at_ratio_one(given):
    return given | {"old_logprobs": given["logprobs"]}


# ---------------------------------------------------------------------------- all


@pytest.mark.parametrize("name", SIBLINGS)
def test_same_inputs(stages, name):
    """The same data files, start, budget and places as the parent's."""
    mine, other = stages[name].Config(), stages[against(name)[0]].Config()
    for field in ("init", "data", "train", "val", "out", "steps", "batch_size", "group_size",
                  "minibatches", "epochs", "max_new", "temperature", "eval_rows", "seed"):
        if hasattr(mine, field):
            wanted = getattr(other, field)
            if (name, field) == ("DPO/kto", "batch_size"):
                wanted *= 2                                          # rows, of which a pair has two
            assert getattr(mine, field) == wanted, field


@pytest.mark.parametrize("name", SIBLINGS)
def test_splitting_a_batch(stages, name):
    """A sum and a count: parts add up to the whole, whatever their lengths."""
    given = have()

    def part(rows):
        return loss(stages, name, {k: v[rows] if torch.is_tensor(v) else v
                                   for k, v in given.items()})

    pairs = name.startswith("DPO/")
    parts = [[0, 4], [1, 2, 3, 5, 6, 7]] if pairs else [[0], [1, 2], [3, 4, 5, 6, 7]]
    whole, cut = part(list(range(8))), [part(rows) for rows in parts]
    assert float(whole[0]) == pytest.approx(sum(float(c[0]) for c in cut), rel=1e-12)
    assert float(whole[1]) == pytest.approx(sum(float(c[1]) for c in cut), rel=1e-12)
    for k, v in whole[2].items():
        assert float(v) == pytest.approx(sum(float(c[2][k]) for c in cut), rel=1e-12, abs=1e-15), k


@pytest.mark.parametrize("name", SIBLINGS)
def test_padding_is_never_seen(stages, name):
    """Prompt and padding have log-prob 0 in a run; here they are noise, and get no gradient."""
    given = have()
    noise = torch.randn(3, 8, 9) * (given["completion_mask"] == 0)
    names = ("logprobs", "old_logprobs", "ref_logprobs")
    noisy = given | {k: given[k] + x for k, x in zip(names, noise)}
    assert torch.allclose(loss(stages, name, noisy)[0], loss(stages, name, given)[0], rtol=1e-12)
    grad = gradient(stages, name, noisy)
    assert grad[given["completion_mask"] == 0].abs().max() == 0
    assert torch.allclose(grad, gradient(stages, name, given), atol=1e-14)


@pytest.mark.parametrize("name", [name for name in ROLLOUTS if name != "RL/reinforce"])
def test_logs(make, tmp_path, name):
    """Each step tells how much was clipped and how many tokens it cost."""
    run(*make(name, lr=3e-2))
    for line in steps_of(tmp_path / f"out/{stem(name)}.jsonl"):
        assert 0 <= line["clip_frac"] <= 1 and line["sampled_tokens"] >= 8


# ---------------------------------------------------------------------------- reinforce


def test_reinforce_gradient(stages):
    """-A on each token of a completion, whatever its length; nothing else, old log-probs least."""
    given = have() | {"beta": 0.0}
    expected = -given["advantages"][:, None] * given["completion_mask"] / 8
    assert torch.allclose(gradient(stages, "RL/reinforce", given), expected, atol=1e-15)
    assert "old_logprobs" not in inspect.signature(stages["RL/reinforce"].reinforce_loss).parameters
    d = given["ref_logprobs"] - given["logprobs"]
    expected += 0.3 * (1 - d.exp()) * given["completion_mask"] / 8             # k3, token by token
    assert torch.allclose(gradient(stages, "RL/reinforce", given | {"beta": 0.3}), expected,
                          atol=1e-15)


@pytest.mark.parametrize("name", ["RL/reinforce", "RL/dr_grpo"])
def test_advantages_without_std(stages, name):
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [5, 1, 1, 1]])
    A = stages[name].group_advantages(rewards)
    assert A.tolist() == [[0.75, -0.25, -0.25, -0.25], [0] * 4, [0] * 4, [3, -1, -1, -1]]


# ---------------------------------------------------------------------------- rloo


def test_rloo_advantages(stages):
    """r minus the mean of the others, which is G / (G - 1) of r minus the mean of all."""
    f, rewards = stages["RL/rloo"].rloo_advantages, torch.rand(5, 4)
    assert torch.allclose(f(rewards), 4 / 3 * (rewards - rewards.mean(1, keepdim=True)))
    assert torch.allclose(f(torch.tensor([[1.0, 0, 0, 0]])),
                          torch.tensor([[1, -1 / 3, -1 / 3, -1 / 3]]))
    rewards[0, 0] += 7                           # its own reward is no part of its baseline
    changed = f(rewards)
    rewards[0, 0] -= 7
    assert changed[0, 0].item() == pytest.approx(f(rewards)[0, 0].item() + 7)


@pytest.mark.parametrize("A", [1.0, -1.0])
@pytest.mark.parametrize("ratio", [0.5, 0.9, 1.1, 1.5])
def test_rloo_quadrants(stages, A, ratio):
    """One ratio for the completion, the product of its tokens'; kept or clipped whole."""
    mask = torch.tensor([[0, 1, 1, 1, 0]])
    given = dict(logprobs=torch.tensor([[9.0, 2.0, -1.0, -1.0 + math.log(ratio), 9.0]]),
                 old_logprobs=torch.zeros(1, 5), completion_mask=mask,
                 advantages=torch.tensor([A]), clip_eps=EPS)
    total, count, metrics = loss(stages, "RL/rloo", given)
    stopped = (A, ratio) in [(1.0, 1.5), (-1.0, 0.5)]
    held = {(1.0, 1.5): 1 + EPS, (-1.0, 0.5): 1 - EPS}.get((A, ratio), ratio)
    assert total.item() == pytest.approx(-held * A) and count == 1
    assert metrics["clip_frac"] == float(stopped)
    expected = 0.0 if stopped else -ratio * A
    assert torch.allclose(gradient(stages, "RL/rloo", given), expected * mask.double())


@pytest.mark.parametrize("A", [-1.0, 0.0, 1.0])
def test_rloo_of_far_completions(stages, A):
    """A whole completion's log-ratio of 300, in fp32 (float64 holds exp(300)): finite, and a bad
    completion is still pushed down, a good one and one without signal no further."""
    mask = torch.tensor([[0, 1, 1, 1, 0]])
    logprobs = torch.tensor([[9.0, 99.0, 101.0, 100.0, 9.0]], dtype=torch.float32)
    given = dict(logprobs=logprobs, old_logprobs=torch.zeros_like(logprobs), completion_mask=mask,
                 advantages=torch.tensor([A], dtype=torch.float32), clip_eps=EPS)
    total, _, _ = loss(stages, "RL/rloo", given)
    grad = gradient(stages, "RL/rloo", given)
    assert total.dtype == torch.float32 and total.isfinite() and grad.isfinite().all()
    assert (grad[mask == 1] > 1).all() if A < 0 else not grad.any()
    assert not grad[mask == 0].any()


def k1(model, ref, rollouts, temperature):
    """log p - log p_ref of each completion token, one row at a time, at the temperature."""
    rows = []
    for ids, mask, _ in rollouts:
        scores = [(m(torch.tensor([ids[:-1]]))[0] / temperature).log_softmax(-1)
                  for m in (model, ref)]
        rows.append([(scores[0][t, ids[t + 1]] - scores[1][t, ids[t + 1]]).item()
                     for t in range(len(ids) - 1) if mask[t + 1]])
    return rows


def watch_rollouts(stage, cfg, monkeypatch):
    """A list that gets (rewards, k1 to the start) of each training batch as it is sampled."""
    seen, rollout, ref = [], stage.rollout, stage.load(cfg.init)[0].double()

    def spy(cfg, model, *rest):
        out = rollout(cfg, model, *rest)
        with torch.no_grad():
            seen.append((out[1], k1(model, ref, out[0], cfg.temperature)))
        return out

    monkeypatch.setattr(stage, "rollout", spy)
    return seen


def test_rloo_rewards(make, stages, monkeypatch, tmp_path):
    """The KL is in the reward: beta times k1, summed over the completion, is taken from it."""
    stage, cfg = make("RL/rloo", lr=1e-2, beta=0.7, temperature=0.8, micro_batch=3)
    seen, given, advantages = watch_rollouts(stage, cfg, monkeypatch), [], stage.rloo_advantages
    monkeypatch.setattr(stage, "rloo_advantages", lambda r: (given.append(r), advantages(r))[1])
    run(stage, cfg)
    logged = steps_of(tmp_path / "out/rloo.jsonl")
    for (rewards, kl), R, line in zip(seen, given, logged, strict=True):
        sums = torch.tensor([sum(row) for row in kl]).view_as(R)
        assert torch.allclose(R, rewards - 0.7 * sums, atol=1e-10)
        assert line["kl"] == pytest.approx(sums.sum().item() / sum(map(len, kl)), abs=1e-10)
    assert sums.abs().max() > 0.01                    # the second step has left the start


# ---------------------------------------------------------------------------- dr_grpo


def test_dr_grpo_has_a_constant_denominator(stages):
    """A token weighs -A / max_new in a completion of any length, so that a completion of twice the
    tokens weighs twice; where GRPO has its length, at any ratio and with the KL."""
    given = have()
    length = given["completion_mask"].sum(1, keepdim=True)
    assert torch.allclose(gradient(stages, "RL/dr_grpo", given),
                          gradient(stages, "04_rlvr", given) * length / given["max_new"])
    mask = torch.tensor([[0, 1, 1, 1, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1, 1, 0]])
    logprobs = torch.zeros(2, 8)
    given |= dict(logprobs=logprobs, old_logprobs=logprobs, ref_logprobs=logprobs, max_new=50,
                  completion_mask=mask, advantages=torch.tensor([1.0, 1.0]))
    weight = gradient(stages, "RL/dr_grpo", given).sum(1)
    assert torch.allclose(weight, torch.tensor([-3 / 50, -6 / 50]) / 2)
    assert loss(stages, "RL/dr_grpo", given)[1] == 2


# ---------------------------------------------------------------------------- dapo


@pytest.mark.parametrize("A, ratio, held", [(1.0, 1.25, 1.25), (1.0, 1.5, 1.28), (1.0, 0.5, 0.5),
                                            (-1.0, 0.85, 0.85), (-1.0, 0.5, 0.8), (-1.0, 1.5, 1.5)])
def test_dapo_quadrants(stages, A, ratio, held):
    """The upper bound is the wider one, and each holds for its own sign of A alone."""
    given = dict(logprobs=torch.full((1, 1), math.log(ratio)), old_logprobs=torch.zeros(1, 1),
                 advantages=torch.tensor([A]), completion_mask=torch.ones(1, 1), clip_eps=EPS,
                 clip_eps_high=0.28)
    total, count, metrics = loss(stages, "RL/dapo", given)
    assert total.item() == pytest.approx(-held * A) and count == 1
    assert metrics["clip_frac"] == float(held != ratio)
    expected = 0.0 if held != ratio else -ratio * A
    assert gradient(stages, "RL/dapo", given).item() == pytest.approx(expected)


def test_dapo_token_mean(stages):
    """Every token of the batch weighs the same, in long completions and in short ones."""
    given = at_ratio_one(have())
    mask = given["completion_mask"]
    assert torch.allclose(gradient(stages, "RL/dapo", given),
                          -given["advantages"][:, None] * mask / mask.sum(), atol=1e-15)


def test_overlong_penalty(stages):
    """0 until the last `overlong` tokens begin, -1 at the limit, a straight line in between."""
    lengths = torch.tensor([1, 80, 81, 90, 99, 100])
    penalty = stages["RL/dapo"].overlong_penalty(lengths, 100, 20)
    assert torch.allclose(penalty, torch.tensor([0, 0, -0.05, -0.5, -0.95, -1]))


@pytest.fixture
def sampling(make, monkeypatch):
    """sampling(patterns, ...) -> full_batch of DAPO where prompt i's group is judged as patterns[i]
    says ("10": its first completion is right), and a list of what was asked for, round by round."""
    def sampling(patterns, step=1, **changes):
        stage, cfg = make("RL/dapo", group_size=2, steps=3, **changes)
        tok = stage.load(cfg.init)[1]
        train = [(tok.prompt(f"{i}=?"), pattern) for i, pattern in enumerate(patterns)]
        rounds, calls = [], []

        def generate(model, prompts, max_new, end, temperature, seed, draw, rows):
            rounds.append((draw, [ids for ids in prompts[::2]], list(rows)))
            return [[tok.end] * (1 + i % 3) for i in range(len(prompts))], [[-1.0]] * len(prompts)

        def verdict(completion, pattern):
            calls.append(1)
            return float(pattern[(len(calls) - 1) % 2])

        monkeypatch.setattr(stage, "generate", generate)
        monkeypatch.setattr(stage, "verify", verdict)
        return stage.full_batch(cfg, None, tok, train, step, 0, 1), rounds, train, cfg
    return sampling


def test_dapo_fills_the_batch(sampling):
    """Groups without signal are discarded and replaced, by fresh draws of what is missing; what
    was discarded has been paid for; the same seed and step give the same."""
    patterns = ["10", "11", "01", "01", "00", "10", "11", "01", "10", "00"]
    (rollouts, rewards, metrics), rounds, train, cfg = sampling(patterns, batch_size=6)
    assert len(rollouts) == 12 and rewards.shape == (6, 2)
    assert (rewards[:, 0] != rewards[:, 1]).all()
    kept, tokens = [], 0
    for n, (draw, asked, rows) in enumerate(rounds):
        assert draw == n * cfg.steps + 1 and rows == list(range(2 * len(asked)))
        picks = kernel.sample_rows(10, 6, cfg.seed, draw)[len(kept):]
        assert asked == [train[i][0] for i in picks]
        kept += [i for i in picks if patterns[i] in ("10", "01")]
        tokens += sum(1 + i % 3 for i in range(2 * len(asked)))
    assert metrics["rounds"] == len(rounds) > 1 and len(kept) == 6
    assert [ids[:len(train[i][0])] for (ids, *_), i in zip(rollouts[::2], kept)] == [
        train[i][0] for i in kept]
    assert rewards.tolist() == [[float(v) for v in patterns[i]] for i in kept]
    assert metrics["sampled_tokens"] == tokens > sum(sum(mask) for _, mask, _ in rollouts)
    again = sampling(patterns, batch_size=6)[0]
    assert again[0] == rollouts and torch.equal(again[1], rewards) and again[2] == metrics


def test_dapo_stops_asking(sampling, refuses):
    """After max_rounds it goes on with groups without signal, if there is one with; else it stops
    and says so."""
    (rollouts, rewards, metrics), rounds, _, _ = sampling(["11"] * 9 + ["10"], batch_size=4,
                                                          max_rounds=5)
    assert metrics["rounds"] == len(rounds) == 5 and len(rollouts) == 8
    signal = [len(set(group)) > 1 for group in rewards.tolist()]
    assert 1 <= sum(signal) < 4 and signal == sorted(signal, reverse=True)
    refuses(lambda: sampling(["11", "00"] * 5, batch_size=4, max_rounds=3),
            "step 2: no prompt of 3", "intact", "--group_size", "--out")


def test_dapo_at_the_cap(make, stages, monkeypatch):
    """A group without signal that fills the batch teaches nothing, however long its completions."""
    stage, cfg = make("RL/dapo", steps=1, max_new=12, overlong=11)
    full, punished = stage.full_batch, []

    def capped(*args):
        rollouts, rewards, metrics = full(*args)
        rewards[1:] = 0
        punished.extend(len({sum(mask) for _, mask, _ in group}) > 1
                        for group in stage.split(rollouts, cfg.group_size)[1:])
        return rollouts, rewards, metrics

    monkeypatch.setattr(stage, "full_batch", capped)
    collated = calls(stage, "collate", monkeypatch)
    run(stage, cfg)
    advantages = torch.cat([rows[3] for _, rows in collated])
    assert any(punished)
    assert (advantages != 0).sum() == cfg.group_size < len(advantages)


def test_dapo_without_signal(make, stages, monkeypatch, tmp_path, refuses, overwrite):
    """In the middle of a run: what was saved stays, and the finished checkpoint of before too."""
    stage, cfg = make("RL/dapo", steps=4, save_every=1)
    run(*make("RL/dapo", steps=1))
    before, rounds = (tmp_path / "out/dapo.pt").read_bytes(), []
    full = stage.full_batch

    def dry(*args):
        rounds.append(1)
        if len(rounds) == 3:
            stage.verify = lambda *args: 0.0              # run() puts the old one back
        return full(*args)

    monkeypatch.setattr(stage, "full_batch", dry)
    refuses(lambda: run(stage, cfg), "step 3: no prompt of 10 rounds", "intact")
    assert torch.load(tmp_path / "out/dapo.state.pt", weights_only=True)["step"] == 2
    assert (tmp_path / "out/dapo.pt").read_bytes() == before


# ---------------------------------------------------------------------------- gspo


def test_gspo_at_ratio_one(stages):
    """Its gradient is GRPO's there, and only there."""
    for beta in (0.0, 0.3):
        given = have() | {"beta": beta}
        one = at_ratio_one(given)
        assert torch.allclose(gradient(stages, "RL/gspo", one), gradient(stages, "04_rlvr", one),
                              atol=1e-14)
        off = gradient(stages, "RL/gspo", given) - gradient(stages, "04_rlvr", given)
        assert off.abs().max() > 1e-3


@pytest.mark.parametrize("A", [1.0, -1.0])
@pytest.mark.parametrize("ratio", [0.5, 0.9, 1.1, 1.5])
def test_gspo_quadrants(stages, A, ratio):
    """One ratio for the completion, the geometric mean of its tokens', whose own spread says
    nothing; the completion is kept or clipped whole, and each of its tokens gets the same."""
    logs = torch.tensor([[9.0, 2.0, -1.0, -1.0, 9.0]])            # the ends are not in the mask
    mask = torch.tensor([[0, 1, 1, 1, 0]])
    given = dict(logprobs=logs + math.log(ratio), old_logprobs=logs * torch.tensor([1, 0, 0, 0, 1]),
                 ref_logprobs=logs, completion_mask=mask, advantages=torch.tensor([A]),
                 clip_eps=EPS, beta=0.0)
    total, count, metrics = loss(stages, "RL/gspo", given)
    stopped = (A, ratio) in [(1.0, 1.5), (-1.0, 0.5)]
    held = {(1.0, 1.5): 1 + EPS, (-1.0, 0.5): 1 - EPS}.get((A, ratio), ratio)
    assert total.item() == pytest.approx(-held * A) and count == 1
    assert metrics["clip_frac"] == float(stopped)
    expected = 0.0 if stopped else -ratio * A / 3
    assert torch.allclose(gradient(stages, "RL/gspo", given), expected * mask.double())


# ---------------------------------------------------------------------------- cispo


def test_cispo_at_ratio_one(stages):
    """Its gradient is there DAPO's, the token mean's; elsewhere it is not."""
    given = have()
    one = at_ratio_one(given)
    assert torch.allclose(gradient(stages, "RL/cispo", one), gradient(stages, "RL/dapo", one),
                          atol=1e-15)
    off = gradient(stages, "RL/cispo", given) - gradient(stages, "RL/dapo", given)
    assert off.abs().max() > 1e-3


@pytest.mark.parametrize("A", [1.0, -1.0])
@pytest.mark.parametrize("ratio", [0.1, 0.9, 1.0, 1.2, 5.0])
def test_cispo_weight(stages, A, ratio):
    """The push is min(ratio, 1 + eps) A for either sign: held, never cut, and no lower clip. The
    weight itself has no gradient, or the push would have a term in log p as well."""
    given = dict(logprobs=torch.full((1, 1), -3.0), advantages=torch.tensor([A]),
                 old_logprobs=torch.full((1, 1), -3.0 - math.log(ratio)), clip_eps_high=0.28,
                 completion_mask=torch.ones(1, 1))
    total, count, metrics = loss(stages, "RL/cispo", given)
    weight = min(ratio, 1.28)
    assert total.item() == pytest.approx(3 * weight * A) and count == 1
    assert gradient(stages, "RL/cispo", given).item() == pytest.approx(-weight * A)
    assert metrics["clip_frac"] == float(ratio > 1.28)


# ---------------------------------------------------------------------------- ppo


@pytest.mark.parametrize("part", ["ppo_loss", "gae", "whiten", "ActorCritic", "evaluate"])
def test_ppo_is_the_one_of_05(stages, part):
    mine, other = (inspect.getsource(getattr(stages[name], part)) for name in ("RL/ppo", "05_ppo"))
    assert mine == other


def test_rollout_of_ppo(stages, make, monkeypatch):
    """Each completion is judged by its own prompt's answer; without <|end|> it earns nothing."""
    stage, cfg = make("RL/ppo")
    tok = stage.load(cfg.init)[1]
    said = [tok.encode_completion(t) + end for t, end in
            (("<answer>7</answer>", [tok.end]), ("<answer>7</answer>", [tok.end]),
             ("<answer>8</answer>", []), ("8", [tok.end]))]

    def generate(model, prompts, max_new, end, temperature, seed, step, rows):
        assert rows == [1, 3, 5, 7] and end == tok.end and (seed, step) == (cfg.seed, 4)
        return said, [[-1.0] * len(c) for c in said]

    monkeypatch.setattr(stage, "generate", generate)
    prompts = [(tok.prompt(f"3+{n}=?"), str(3 + n)) for n in (4, 5, 5, 5)]
    rollouts, rewards, metrics = stage.rollout(cfg, None, tok, prompts, 4, 1, 2)
    assert rewards.tolist() == [1, 0, 0, 0]
    for (ids, mask, _), completion, (prompt, _) in zip(rollouts, said, prompts):
        assert ids == prompt + completion
        assert mask == [0] * len(prompt) + [1] * len(completion)
    assert metrics["reward"] == metrics["truncated"] == metrics["unparsed"] == 0.25
    assert metrics["sampled_tokens"] == sum(map(len, said))


def test_ppo_rewards(make, stages, monkeypatch):
    """What gae sees: minus beta times k1 on each completion token, and the verdict on the last."""
    stage, cfg = make("RL/ppo", lr=1e-2, beta=0.7, temperature=0.8, micro_batch=3)
    seen, given, gae = watch_rollouts(stage, cfg, monkeypatch), [], stage.gae

    def spy(rewards, values, mask, *rest):
        given.extend(row[m == 1].tolist() for row, m in zip(rewards, mask))
        return gae(rewards, values, mask, *rest)

    monkeypatch.setattr(stage, "gae", spy)
    run(stage, cfg)
    expected = [(r.item(), row) for rewards, kl in seen for r, row in zip(rewards, kl)]
    assert len(expected) == len(given) == 16
    assert max(abs(k) for _, kl in expected[8:] for k in kl) > 1e-3
    for reward, kl in expected:                        # in some order: micro-batches are by length
        row = [-0.7 * k + reward * (t + 1 == len(kl)) for t, k in enumerate(kl)]
        found = [r for r in given if r == pytest.approx(row, abs=1e-10)]
        assert found
        given.remove(found[0])
