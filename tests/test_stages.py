"""Every stage runs; the stages are one program with some sections exchanged, as docstrings say."""
import inspect
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import (LOSS, PAIRS, ROLLOUTS, ROOT, SCRIPTS, SIBLINGS, STAGES, TEXT, against,
                      outputs, run, stem, steps_of, weights)

SECTIONS = ["config", "data", "loss", "training", "evaluation", "update"]


def sections(name):
    """{section: its text}; "" is what comes before the first."""
    parts = re.split(r"^# -{60,} (\w+)$", TEXT[name], flags=re.MULTILINE)
    assert len(parts[1::2]) == len(set(parts[1::2]))
    return {"": parts[0]} | dict(zip(parts[1::2], parts[2::2]))


# ---------------------------------------------------------------------------- text

@pytest.mark.parametrize("name", SCRIPTS)
def test_sections(name):
    assert list(sections(name)) == ["", *SECTIONS]


@pytest.mark.parametrize("name", SCRIPTS)
def test_update_is_the_same(name):
    assert sections(name)["update"] == sections(STAGES[0])["update"]


@pytest.mark.parametrize("name", SCRIPTS[1:])
def test_sections_that_differ(name):
    """The docstring says against which script, and exactly which sections differ."""
    parent, claimed = against(name)
    mine, other = sections(name), sections(parent)
    assert claimed == [name for name in SECTIONS if mine[name] != other[name]]


def test_sft_and_cot_are_one_program():
    """Apart from the docstring and values of the config, equal bytes; the same flags."""
    sft, cot = sections("01_sft"), sections("02_cot")
    assert sft[""].split('"""')[2] == cot[""].split('"""')[2]
    assert {name for name in SECTIONS if sft[name] != cot[name]} == {"config"}
    a, b = sft["config"].splitlines(), cot["config"].splitlines()
    assert len(a) == len(b)
    assert [line.split(":")[0] for line in a] == [line.split(":")[0] for line in b]
    changed = [line.split(":")[0].strip() for line, new in zip(a, b) if line != new]
    own = {"steps", "batch_size", "lr", "muon_lr", "eval_every"}
    assert set(changed) - own == {"init", "train", "val"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_form(name):
    """One name under __main__, lines of at most 100 columns, and the docstring names the file."""
    text = TEXT[name]
    assert text.startswith(f'"""{stem(name)}.py: ') and text.endswith("    main(cli(Config))\n")
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("folder", sorted({name.split("/")[0] for name in SIBLINGS}))
def test_siblings_are_scripts(folder):
    """They run from the root, and find the one model.py by a link."""
    assert os.readlink(ROOT / folder / "model.py") == "../model.py"
    name = next(name for name in SIBLINGS if name.startswith(folder))
    out = subprocess.run([sys.executable, f"{name}.py", "--help"], cwd=ROOT, text=True,
                         capture_output=True)
    assert out.returncode == 0 and TEXT[name].split('"""')[1].strip() in out.stdout


# ---------------------------------------------------------------------------- runs

@pytest.mark.parametrize("name", SCRIPTS)
def test_two_steps(name, make, chain, tmp_path):
    """A checkpoint that the next stage can read, a log line a step, and nothing left over."""
    stage, cfg = make(name)
    run(stage, cfg)
    file = stem(name)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == outputs(name)
    log = steps_of(tmp_path / f"out/{stem(name)}.jsonl")
    assert [line["step"] for line in log] == [1, 2]
    for line in log:
        assert all(isinstance(v, int | float) and v == v for v in line.values()), line
        assert {"loss", "grad_norm"} <= set(line)
    assert len(log[1]) > len(log[0])                       # the last step evaluates
    parts = torch.load(tmp_path / f"out/{stem(name)}.pt", weights_only=True)
    assert parts["record"]["config"]["steps"] == 2
    used = {p.split("/")[-1] for p in parts["record"]["inputs"]}
    assert {cfg.train.split("/")[-1], cfg.val.split("/")[-1]} <= used
    # The same flags give the same bits.
    assert torch.equal(weights(tmp_path / f"out/{file}.pt"), weights(chain / f"{file}.pt"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_training_moves_the_weights(name, make, tmp_path):
    stage, cfg = make(name, steps=1)
    run(stage, cfg)
    if hasattr(cfg, "init"):
        assert not torch.equal(weights(f"{tmp_path}/out/{stem(name)}.pt", "model"),
                               weights(cfg.init, "model"))
    assert steps_of(tmp_path / f"out/{stem(name)}.jsonl")[0]["grad_norm"] > 0


@pytest.mark.parametrize("name", ["00_pretrain", "01_sft", *PAIRS])
def test_training_lowers_the_loss(name, make, tmp_path):
    stage, cfg = make(name, steps=30, lr=5e-3, batch_size=12)
    run(stage, cfg)
    loss = [line["loss"] for line in steps_of(tmp_path / f"out/{stem(name)}.jsonl")]
    assert sum(loss[-3:]) / 3 < loss[0] - 0.1, loss


@pytest.mark.parametrize("name", SCRIPTS)
def test_micro_batches(name, make, tmp_path, gradients, double):
    """How a batch is split changes nothing, though its completions have different lengths."""
    for size, tokens in ((2, 9999), (3, 90), (8, 9999)):
        run(*make(name, steps=1, micro_batch=size, micro_tokens=tokens, out=tmp_path / str(size)))
    n = len(gradients) // 3
    for i in range(n):
        whole = gradients[2 * n + i]
        assert whole.norm() > 0
        for part in (gradients[i], gradients[n + i]):
            assert (part - whole).norm() <= 1e-9 * whole.norm()
    first = [steps_of(tmp_path / f"{size}/{stem(name)}.jsonl")[0] for size in (2, 8)]
    assert first[0] == pytest.approx(first[1], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", ROLLOUTS)
def test_first_ratio_is_one(name, make, stages, monkeypatch):
    """Before the first update, log-probs and old log-probs are the same bits, also where the
    micro-batches pad differently; afterwards they are not. The sampler agrees with them."""
    stage, seen, samples = stages[name], [], []
    loss, generate = getattr(stage, LOSS[name]), stage.generate
    names = list(inspect.signature(loss).parameters)
    has_ratio = "old_logprobs" in names
    assert has_ratio or name == "RL/reinforce"

    def spy_loss(*args):
        args_of = dict(zip(names, args))
        logprobs = args_of["logprobs"].detach().clone()
        seen.append((logprobs, args_of["old_logprobs"] if has_ratio else logprobs))
        return loss(*args)

    def spy_generate(*args, **kwargs):
        completions, logprobs = generate(*args, **kwargs)
        samples.extend(logprobs if "rows" not in kwargs else [])       # training, not evaluation
        return completions, logprobs

    monkeypatch.setattr(stage, LOSS[name], spy_loss)
    monkeypatch.setattr(stage, "generate", spy_generate)
    run(*make(name, steps=1, batch_size=16, micro_batch=4, temperature=0.7, lr=1e-2))
    first = len(seen) // 2                          # micro-batches of the first of 2 updates
    assert first >= 2
    for logprobs, old in seen[:first]:
        assert logprobs.any() and torch.equal(logprobs, old)
    assert not has_ratio or not any(torch.equal(*pair) for pair in seen[first:])
    rows = [row[row != 0] for _, old in (seen if has_ratio else seen[:first]) for row in old]
    if has_ratio and name != "RL/dapo":                # which discards, and fills up
        assert len(rows) == len(samples)
    for row in rows:                                   # each is one of the samples, in some order
        found = [i for i, s in enumerate(samples) if len(row) == len(s)
                 and torch.allclose(row, torch.tensor(s), atol=1e-4)]
        assert found
        samples.pop(found[0])


def test_rollout_of_04(stages, make, data, monkeypatch):
    """Each completion is judged by its own prompt's answer; <|end|> is in the mask."""
    stage, cfg = make("04_rlvr", group_size=2)
    tok = stage.load(cfg.init)[1]
    right = [tok.encode_completion(t) + [tok.end] for t in
             ("<answer>7</answer>", "<answer>9</answer>", "<answer>8</answer>")]
    cut = tok.encode_completion("<answer>8</answer>")       # right but for the <|end|>
    said = [right[0], right[1], cut, right[2]]

    def generate(model, prompts, max_new, end, temperature, seed, step, rows):
        assert rows == [2, 3, 6, 7]                         # rank 1 of 2 has prompts 1 and 3
        assert end == tok.end and prompts[0] == prompts[1] and prompts[2] == prompts[3]
        return said, [[-1.0] * len(c) for c in said]

    monkeypatch.setattr(stage, "generate", generate)
    prompts = [(tok.prompt("3+4=?"), "7"), (tok.prompt("3+5=?"), "8")]
    rollouts, rewards, metrics = stage.rollout(cfg, None, tok, prompts, 0, 1, 2)
    assert rewards.tolist() == [[1, 0], [0, 1]]
    for (ids, mask, drawn), completion, at in zip(rollouts, said, (0, 0, 1, 1)):
        prompt = prompts[at][0]
        assert ids == prompt + completion
        assert mask == [0] * len(prompt) + [1] * len(completion)
        assert drawn == [0.0] * len(prompt) + [-1.0] * len(completion)
    assert metrics["reward"] == 0.5 and metrics["truncated"] == 0.25 and metrics["unparsed"] == 0


@pytest.mark.skipif("05_ppo" not in STAGES, reason="05_ppo.py is not there yet")
def test_rollout_of_05(stages, make, monkeypatch):
    """The score of each whole rollout is its reward. Where <|end|> is missing it is -1, or the
    worst of the others if that is lower."""
    stage, cfg = make("05_ppo", micro_batch=2)
    tok = stage.load(cfg.init)[1]
    said = [tok.encode("1") + [tok.end], tok.encode("12"), tok.encode("123") + [tok.end]]

    def generate(model, prompts, max_new, end, temperature, seed, step, rows):
        assert rows == [1, 3, 5] and end == tok.end
        return said, [[-1.0] * len(c) for c in said]

    def scorer(rows):
        assert all(mask == [0] * (len(ids) - sum(mask)) + [1] * sum(mask) for ids, mask, _ in rows)
        return torch.tensor([float(sum(mask)) for _, mask, _ in rows])

    monkeypatch.setattr(stage, "generate", generate)
    prompts = [(tok.prompt("3+4=?"), "7")] * 3
    rollouts, rewards, metrics = stage.rollout(cfg, None, scorer, tok, prompts, 0, 1, 2)
    assert rewards.tolist() == [2, -1, 4]
    assert [ids for ids, *_ in rollouts] == [prompts[0][0] + c for c in said]
    assert metrics["truncated"] == pytest.approx(1 / 3)
    rewards = stage.rollout(cfg, None, lambda rows: scorer(rows) - 7, tok, prompts, 0, 1, 2)[1]
    assert rewards.tolist() == [-5, -5, -3]                 # -1 would be the best of them


@pytest.mark.skipif("05_ppo" not in STAGES, reason="05_ppo.py is not there yet")
def test_ppo_rewards(make, stages, monkeypatch, chain):
    """What gae sees: the whole score on <|end|>, minus beta times k1 on each completion token, in
    micro-batches that pad differently; the advantages are whitened once over the batch."""
    stage, rewards, scored, batches = stages["05_ppo"], [], [], []
    gae, rollout, whiten = stage.gae, stage.rollout, stage.whiten

    def spy_gae(r, values, mask, *rest):
        rewards.extend(row[m == 1].tolist() for row, m in zip(r, mask))
        return gae(r, values, mask, *rest)

    def spy_rollout(*args):
        scored.append(rollout(*args))
        return scored[-1]

    def spy_whiten(given):
        batches.append(whiten(given))
        return batches[-1]

    for name, spy in (("gae", spy_gae), ("rollout", spy_rollout), ("whiten", spy_whiten)):
        monkeypatch.setattr(stage, name, spy)
    run(*make("05_ppo", steps=1, micro_batch=2))            # here p is still the reference: no KL
    for row, score in zip(rewards, scored[0][1]):
        assert row[-1] == pytest.approx(score.item(), rel=1e-6) and not any(row[:-1])
    A = torch.cat([b[-3][b[-1] == 1] for b in batches[0]])
    assert A.mean().abs() < 1e-5 and A.std(unbiased=False).item() == pytest.approx(1, rel=1e-5)
    assert len(batches[0]) > 1 and all(len(b[-1]) == 2 for b in batches[0])
