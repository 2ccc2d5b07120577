"""What 05_ppo.py asks of the model that scores, and what no score may do."""
import pytest
import torch
from conftest import run


@pytest.fixture
def judged(make, chain, tmp_path):
    """judged(change) -> 05 and its Config, with a reward model after change(its checkpoint)."""
    def judged(change, **changes):
        for path in chain.glob("0*.pt"):
            parts = torch.load(path, weights_only=True)
            if path.stem == "06_reward":
                change(parts)
            torch.save(parts, tmp_path / path.name)
        return make("05_ppo", start=tmp_path, steps=1, **changes)
    return judged


def longest(stage, cfg):
    model, tokenizer, _ = stage.load(cfg.init)
    return max(len(p) for p, _ in stage.read(cfg, cfg.train, tokenizer, model)) + cfg.max_new


def test_context_of_the_judge(judged, make, refuses):
    """It must read the longest prompt with its longest completion, to the token; the policy's own
    context may be longer."""
    room = longest(*make("05_ppo"))
    short = judged(lambda parts: parts["gpt"].update(block_size=room - 1))
    refuses(lambda: run(*short), "06_reward.pt", f"reads {room - 1} tokens", room, "--max_new")
    run(*judged(lambda parts: parts["gpt"].update(block_size=room)))


@pytest.mark.parametrize("pairs, enough", [(1, False), (7, False), (8, True)])
def test_scale_of_few_pairs(pairs, enough, make, data, tmp_path, refuses):
    """One pair's std would be anything: the rewards that 05 counts in it as well."""
    for path in data.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    lines = (data / "pairs_val.jsonl").read_text().splitlines(True)
    (tmp_path / "pairs_val.jsonl").write_text("".join(lines[:pairs]))
    stage, cfg = make("06_reward", data=tmp_path, steps=1)
    if enough:
        return run(stage, cfg)
    refuses(lambda: run(stage, cfg), "pairs_val.jsonl", f"{pairs} pairs are too few")
    assert not (tmp_path / "out/06_reward.pt").exists()


@pytest.mark.parametrize("elsewhere", [-0.5, -9.0])
@pytest.mark.parametrize("low", [3.0, -1.0, -5.0])
def test_reward_of_a_cut_completion(low, elsewhere, make, monkeypatch):
    """At most -1, and the worst finished score of all ranks; what it scored itself says nothing."""
    stage, cfg = make("05_ppo", micro_batch=2)
    tok = stage.load(cfg.init)[1]
    said = [tok.encode("1"), tok.encode("12") + [tok.end], tok.encode("1") + [tok.end]]
    scores = iter([torch.tensor([-77.0, low]), torch.tensor([low + 2])])
    monkeypatch.setattr(stage, "generate", lambda *args: (said, [[-1.0] * len(c) for c in said]))
    monkeypatch.setattr(stage, "all_max", lambda x: max(x, -elsewhere))
    prompts = [(tok.prompt("3+4=?"), "7")] * 3
    rewards = stage.rollout(cfg, None, lambda rows: next(scores), tok, prompts, 0, 0, 2)[1]
    assert rewards.tolist() == [min(-1.0, low, elsewhere), low, low + 2]
