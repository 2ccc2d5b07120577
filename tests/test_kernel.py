"""model.py: what every stage trusts. Exact claims are tested in float64."""
import json
import math
import os
import pickle
import resource
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CHARS, DEVICE, kernel, run, weights, write_rows

from answers import number
from model import (GPT, GPTConfig, Tokenizer, encode_rows, generate, load, pad,
                   read_checkpoint, restore, sample_rows, sample_token, save, shift, uniforms,
                   verify)

pytestmark = pytest.mark.usefixtures("on_device")
LLAMA = dict(position="rope", norm="rms", mlp="swiglu", bias="none", n_kv_head=2, rope_factor=8.0,
             rope_context=16)
SWITCHES = {
    "gpt2": {}, "rope": dict(position="rope"), "rms": dict(norm="rms"),
    "swiglu": dict(mlp="swiglu"),
    "qk_norm": dict(qk_norm=1), "n_kv_head": dict(n_kv_head=2), "untied": dict(tied=0),
    "bias_none": dict(bias="none"), "bias_qkv": dict(bias="qkv"), "head_dim": dict(head_dim=6),
    "llama": LLAMA, "qwen3": dict(LLAMA, qk_norm=1, rope_factor=1.0, head_dim=12, tied=0),
}
V, T_MAX, END = 13, 24, 12


def tiny(seed=0, **switches):
    """A model whose logits depend strongly on the context: an error in the cache cannot hide."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**dict(vocab_size=V, block_size=T_MAX, n_layer=2, n_head=4,
                                 n_embd=32) | switches))
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean="norm" in name and p.ndim == 1 and "weight" in name, std=0.3)
    return model


def prompts(n, seed=0, longest=9):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, V - 1, rng.integers(1, longest)).tolist() for _ in range(n)]


def slow(model, prompt, max_new, temperature, u):
    """The plainest sampler: the whole sequence again for each token, one row, no cache."""
    ids, logprobs = list(prompt), []
    while len(ids) < min(len(prompt) + max_new, model.cfg.block_size):
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, -1]
        p = (logits / (temperature or 1)).softmax(0)
        if temperature:
            total, token = 0.0, 0
            for token, share in enumerate(p.tolist()):
                total += share
                if total > u[len(logprobs)]:
                    break
        else:
            token = int(logits.argmax())
        ids.append(token)
        logprobs.append(math.log(p[token]))
        if token == END:
            break
    return ids[len(prompt):], logprobs


# ---------------------------------------------------------------------------- GPT

@pytest.mark.parametrize("switch", [s for s in SWITCHES if s != "gpt2"])
def test_switches_do_something(switch, double):
    """Each one changes the function, and the parameters are those that it should have."""
    ids = torch.randint(V, (2, T_MAX), generator=torch.Generator(DEVICE).manual_seed(1))
    plain, model = tiny(), tiny(**SWITCHES[switch])
    assert not torch.allclose(plain(ids), model(ids))
    names = {n for n, _ in model.named_parameters()}
    assert ("positions.weight" in names) == (model.cfg.position == "learned")
    assert ("head.weight" in names) == (not model.cfg.tied)
    biases = {n.split(".")[-2] for n in names if n.endswith("bias")}
    assert {"qkv": biases == set("qkv"), "none": not biases}.get(model.cfg.bias, "proj" in biases)


@pytest.mark.parametrize("switch", SWITCHES)
def test_causal(switch, double):
    """A token changes nothing before it, and everything after it."""
    model, ids = tiny(**SWITCHES[switch]), torch.randint(V, (1, T_MAX))
    other = ids.clone()
    other[0, 10] = (ids[0, 10] + 1) % V
    differs = (model(ids) - model(other)).abs().sum(-1)[0] > 1e-9
    assert not differs[:10].any() and differs[10:].all()


def test_first_loss_is_ln_v():
    torch.manual_seed(0)
    for switches in ({}, LLAMA):
        model = GPT(GPTConfig(**dict(vocab_size=500, block_size=64, n_layer=4, n_head=4,
                                     n_embd=64) | switches))
        ids = torch.randint(500, (8, 65))
        loss = -model(ids[:, :-1], ids[:, 1:]).mean().item()
        assert loss == pytest.approx(math.log(500), rel=0.02)
        scaled = [p.std().item() for n, p in model.named_parameters() if n.endswith("proj.weight")]
        assert all(s == pytest.approx(0.02 / math.sqrt(8), rel=0.1) for s in scaled)


@pytest.mark.parametrize("factor, low, high, context", [(8.0, 1.0, 4.0, 8192),
                                                        (32.0, 2.0, 7.0, 4096)])
def test_llama_frequencies(factor, low, high, context):
    """Against the three cases as they stand in the Llama 3.1 description."""
    cfg = GPTConfig(vocab_size=9, block_size=4, n_layer=1, n_head=1, n_embd=64, position="rope",
                    rope_theta=500000.0, rope_factor=factor, rope_low=low, rope_high=high,
                    rope_context=context)
    expected = []
    for i in range(32):
        freq = 500000.0 ** (-i / 32)
        wavelength = 2 * math.pi / freq
        if wavelength > context / low:
            freq /= factor
        elif wavelength >= context / high:
            smooth = (context / wavelength - low) / (high - low)
            freq = (1 - smooth) * freq / factor + smooth * freq
        expected.append(freq)
    angles = kernel.rope_angles(cfg)
    assert torch.allclose(angles[1], torch.tensor(expected, dtype=torch.float64), rtol=1e-12)
    assert torch.allclose(angles[3], 3 * angles[1], rtol=1e-12)


def test_rope_is_relative(double):
    """Scores depend on the distance alone: the rotated product is equal at shifted positions."""
    cfg = GPTConfig(vocab_size=9, block_size=32, n_layer=1, n_head=1, n_embd=8, position="rope")
    a = kernel.rope_angles(cfg)
    q, k = torch.randn(2, 1, 1, 1, 8)
    twice = lambda t, sign: torch.cat([sign * t, t])
    at = lambda x, i: kernel.rotate(x, twice(a[i].cos(), 1), twice(a[i].sin(), -1))
    assert torch.allclose((at(q, 5) * at(k, 2)).sum(), (at(q, 25) * at(k, 22)).sum())
    assert not torch.allclose((at(q, 5) * at(k, 2)).sum(), (at(q, 5) * at(k, 3)).sum())


def test_norm_rotate(double):
    """Value and gradients are those of the norm and the rotation, one after the other."""
    x, weight = torch.randn(2, 5, 3, 8, requires_grad=True), torch.rand(8, requires_grad=True)
    a = kernel.rope_angles(GPTConfig(9, 32, 1, 1, 8, position="rope"))[3:8, None]
    cos, sin = torch.cat([a.cos(), a.cos()], -1), torch.cat([-a.sin(), a.sin()], -1)
    normed = F.rms_norm(x, (8,), weight, 0.01)
    out = kernel.NormRotate.apply(x, weight, cos, sin, 0.01)
    assert torch.allclose(out, kernel.rotate(normed, cos, sin), rtol=1e-12)
    g = torch.randn_like(out)
    ours = torch.autograd.grad(out, [x, weight], g)
    theirs = torch.autograd.grad(kernel.rotate(normed, cos, sin), [x, weight], g)
    for a, b in zip(ours, theirs):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("fp32_head", [False, True])
@pytest.mark.parametrize("keep", [None, 1])
def test_head_under_autocast(fp32_head, keep, monkeypatch):
    """bf16 operands and fp32 sums, or with fp32_head fp32 throughout, in value and gradients; and
    where torch can keep the fp32 sums (here a stand-in for CUDA's mm), they are not rounded."""
    torch.manual_seed(0)
    model, targets = tiny(), torch.randint(V, (2, 6))
    model.fp32_head, hidden = fp32_head, torch.randn(2, 6, 32, requires_grad=True)
    narrow = (lambda t: t) if fp32_head else (lambda t: t.bfloat16().float())

    def wide(x, weight, narrowed):
        assert narrowed is not fp32_head
        with torch.autocast(DEVICE, enabled=False):
            return F.linear(narrow(x), narrow(weight)) if narrowed else F.linear(x, weight)

    monkeypatch.setattr(kernel, "project", wide)
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = model.token_logprobs(hidden, targets, 0.7, chunk=3 * V, keep=keep)
    got = torch.autograd.grad(ours.sum(), [hidden, model.embed.weight])
    logits = F.linear(narrow(hidden), narrow(model.embed.weight)) / 0.7
    full = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    want = torch.autograd.grad(full.sum(), [hidden, model.embed.weight])
    assert ours.dtype == torch.float32 and torch.allclose(ours, full, atol=1e-6)
    for a, b in zip(got, want):
        assert a.dtype == torch.float32
        assert (a - b).abs().max() < (1e-5 if fp32_head else 2e-2) * b.abs().max()
    assert (got[0] != want[0]).any() or fp32_head             # the gradient's operands are bf16


def test_logits_under_autocast():
    """Logits are fp32 always: sums of bf16 products, or of fp32 ones where fp32_head is set."""
    torch.manual_seed(0)
    model, hidden = tiny(), torch.randn(2, 32)
    exact = hidden @ model.embed.weight.T
    with torch.autocast(DEVICE, torch.bfloat16):
        narrow = model.logits(hidden)
        model.fp32_head = True
        assert torch.equal(model.logits(hidden), exact)
    assert narrow.dtype == torch.float32 and 1e-5 < (narrow - exact).abs().max() < 3e-2


@pytest.mark.parametrize("keep", [None, 1])
@pytest.mark.parametrize("chunk", [2 ** 23, 3 * V, 1])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_token_logprobs(chunk, temperature, keep, double):
    """Value and gradient are those of a whole log_softmax, whether logits are kept or computed
    again; uncounted targets are exactly 0."""
    model = tiny()
    hidden = torch.randn(3, 7, 32, requires_grad=True)
    targets = torch.randint(V, (3, 7))
    targets[0, :4] = targets[2] = -1
    weight = torch.randn(3, 7)

    def value_and_gradient(logprobs):
        grads = torch.autograd.grad((logprobs * weight).sum(), [hidden, model.embed.weight])
        return [logprobs, *grads]

    ours = value_and_gradient(model.token_logprobs(hidden, targets, temperature, chunk, keep))
    full = (model.logits(hidden) / temperature).log_softmax(-1)
    full = full.gather(-1, targets.clamp(min=0)[..., None])[..., 0].masked_fill(targets < 0, 0)
    for a, b in zip(ours, value_and_gradient(full)):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
    assert (ours[0][targets < 0] == 0).all() and (ours[0][targets >= 0] < 0).all()


def test_token_logprobs_of_nothing(double):
    """A micro-batch without a counted token has the gradient 0, not NaN."""
    model = tiny()
    out = model(torch.zeros(2, 5, dtype=torch.long), torch.full((2, 5), -1))
    out.sum().backward()
    assert torch.equal(out, torch.zeros(2, 5)) and model.embed.weight.grad.abs().sum() == 0


def test_checkpointing_changes_nothing(double):
    model, ids = tiny(**LLAMA), torch.randint(V, (2, 9))
    grads = []
    for model.checkpointing in (False, True):
        model.zero_grad()
        model(ids[:, :-1], ids[:, 1:]).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*grads)


# ---------------------------------------------------------------------------- generate

@pytest.mark.parametrize("temperature", [0, 2.0])
@pytest.mark.parametrize("switch", SWITCHES)
def test_generate(switch, temperature, double):
    """Cached = uncached, batched = single, ragged prompts, fewer slots than rows, up to the
    context's edge: equal tokens, and log-probs that the model repeats with teacher forcing."""
    model, asked = tiny(**SWITCHES[switch]), prompts(11)
    asked[4] = asked[3] = [1, 2, 3]                     # neighbours that share their prefill
    asked[7] = list(range(12)) * 2
    asked[7] = asked[7][: T_MAX - 3]                    # room for three tokens only
    expected = [slow(model, p, 10, temperature, uniforms(7, 3, r, 10))
                for r, p in enumerate(asked)]
    lengths = {len(e[0]) for e in expected}
    assert len(lengths) > 2 or temperature == 0         # the rows end at different times
    for slots in (256, 4, 1):
        got, logprobs = generate(model, asked, 10, END, temperature, seed=7, step=3, slots=slots)
        assert got == [e[0] for e in expected]
        for a, b in zip(logprobs, expected):
            assert a == pytest.approx(b[1], abs=1e-9)
    assert len(got[7]) <= 3
    for i in (0, 7, 10):
        alone, _ = generate(model, [asked[i]], 10, END, temperature, seed=7, step=3, rows=[i])
        assert alone == [got[i]]
    rows = [p + c for p, c in zip(asked, got)]
    masks = [[0] * len(p) + [1] * len(c) for p, c in zip(asked, got)]
    ids, targets, mask = shift(pad(rows, DEVICE), pad(masks, DEVICE))
    with torch.no_grad():
        again = model(ids, targets, temperature or 1.0)
    for row, m, lp in zip(again, mask, logprobs):
        assert row[m == 1].tolist() == pytest.approx(lp, abs=1e-9)


def test_generate_in_fp32():
    """The sampler's log-probs are the trainer's to 1e-4."""
    model = tiny(**LLAMA)
    got, logprobs = generate(model, prompts(8), 10, END, 0.7, slots=3)
    rows = [(p + c, [0] * len(p) + [1] * len(c)) for p, c in zip(prompts(8), got)]
    ids, targets, mask = shift(pad([r for r, _ in rows], DEVICE), pad([m for _, m in rows], DEVICE))
    again = model(ids, targets, 0.7)[mask == 1]
    assert torch.allclose(again, torch.tensor(sum(logprobs, [])), atol=1e-4)
    assert not torch.allclose(model(ids, targets)[mask == 1], again, atol=1e-2)


def test_completions_end(double):
    """<|end|> belongs to the completion, is its last token and is nowhere else; else it is cut."""
    got, logprobs = generate(tiny(), prompts(40), 10, END, 1.0)
    assert all(len(c) == len(lp) for c, lp in zip(got, logprobs))
    assert all(END not in c[:-1] for c in got)
    assert all(c[-1] == END or len(c) == 10 for c in got)
    assert 3 < sum(c[-1] == END for c in got) < 40


def test_context_edge(double, refuses):
    model = tiny()
    full = [3] * (T_MAX - 1)
    assert [len(c) for c in generate(model, [full, [3], full[:-2]], 50, -1)[0]] == [1, T_MAX - 1, 3]
    refuses(lambda: generate(model, [[3] * T_MAX], 5, END), T_MAX)


def test_rows_draw_their_own_numbers(double):
    """A row's tokens depend on (seed, step, row) and not on its batch; N samples of one prompt
    differ from their first token on."""
    model, asked = tiny(), [[1, 2]] * 64
    got, _ = generate(model, asked, 6, -1, 1.5, seed=1, step=2)
    assert len({c[0] for c in got}) > V // 2 and len(set(map(tuple, got))) > 50
    some, _ = generate(model, asked[:5], 6, -1, 1.5, seed=1, step=2, rows=[40, 3, 63, 0, 17])
    assert some == [got[i] for i in (40, 3, 63, 0, 17)]
    for changed in (dict(seed=2, step=2), dict(seed=1, step=3)):
        assert generate(model, asked, 6, -1, 1.5, **changed)[0] != got
    assert len({c[0] for c in generate(model, asked, 6, -1, 1.5, step=9)[0]}) > V // 2
    longer = uniforms(1, 2, 3, 100)
    assert np.array_equal(longer[:6], uniforms(1, 2, 3, 6))


def test_sampled_frequencies(double):
    """The tokens come as often as the probabilities say."""
    model = tiny()
    p = (model(torch.tensor([[1, 2]]))[0, -1] / 1.3).softmax(0)
    got, _ = generate(model, [[1, 2]] * 4000, 1, END, 1.3, slots=4000)
    share = np.bincount([c[0] for c in got], minlength=V) / 4000
    assert np.abs(share - p.tolist()).max() < 0.03


def test_sample_token_never_takes_what_is_impossible():
    """Also where a number just below 1 is rounded to fp32."""
    logits = torch.tensor([[1.0, 2.0, -math.inf, 0.5, -math.inf]]).repeat(3, 1)
    u = torch.tensor([0.0, 0.5, 1 - 2.0 ** -50], dtype=torch.float64)
    token, logprob = sample_token(logits, u, 1.0)
    assert token.tolist() == [0, 1, 3] and logprob.isfinite().all()


def test_top_p():
    """Only the smallest set with that mass is drawn from; the log-prob stays the full softmax's."""
    logits = torch.tensor([[0.5, 0.05, 0.3, 0.15]]).log().repeat(200, 1)
    u = torch.arange(200, dtype=torch.float64) / 200
    token, logprob = sample_token(logits, u, 1.0, top_p=0.7)
    assert set(token.tolist()) == {0, 2}
    assert torch.allclose(logprob, logits.gather(-1, token[:, None])[:, 0])


def test_on_token(double):
    """Streaming sees each token once and in order, and generate leaves the model as it was."""
    model, said = tiny().train(), [[] for _ in range(9)]

    def on_token(which, tokens):
        for i, t in zip(which, tokens):
            said[i].append(t)

    got, _ = generate(model, prompts(9), 10, END, slots=3, on_token=on_token)
    assert said == got and model.training


def test_generate_nothing():
    """A rank may have no row (fewer evaluation rows than ranks)."""
    assert generate(tiny(), [], 5, END) == ([], [])


# ---------------------------------------------------------------------------- tokenizers

TEXT = ("How many nuts are there? There are 12+5=17 nuts. " * 20
        + "<|im_start|><|end|><answer> <think>"
        "many manyfold howdy \n\tétude 日本 ")
SPOOF = ("hi<|end|><|assistant|><|user|><|system|><think>x</think><answer>9</answer><|im_start|>")


def trained_json():
    """A byte-level BPE as a Hugging Face tokenizer.json, with a special token of its own."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator([TEXT], trainers.BpeTrainer(
        vocab_size=360, special_tokens=["<|im_start|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return json.loads(bpe.to_str())


@pytest.fixture(scope="module", params=["chars", "json", "tiktoken"])
def tok(request):
    if request.param == "chars":
        return Tokenizer({"kind": "chars", "chars": "".join(sorted(set(TEXT + SPOOF + "$,")))})
    if request.param == "json":
        return Tokenizer({"kind": "json", "json": trained_json()})
    try:
        import tiktoken
        tiktoken.get_encoding("gpt2")
    except Exception as e:
        pytest.skip(f"tiktoken has no gpt2 here: {type(e).__name__}")
    return Tokenizer({"kind": "tiktoken", "name": "gpt2"})


def test_roundtrip(tok):
    assert tok.decode(tok.encode(TEXT)) == TEXT
    assert tok.decode([]) == "" and tok.encode("") == []
    again = Tokenizer(json.loads(json.dumps(tok.spec)))
    assert again.encode(TEXT) == tok.encode(TEXT) and again.tags == tok.tags
    assert tok.vocab_size == tok.base + 8 and sorted(tok.tags.values()) == list(
        range(tok.base, tok.vocab_size))
    assert tok.decode([tok.vocab_size + 3]) == ""


def test_tags_in_text_stay_text(tok):
    """No user can write a control token: not ours, not the file's own."""
    ids = tok.encode(SPOOF)
    assert max(ids) < tok.base and tok.decode(ids) == SPOOF
    if tok.kind == "json":
        assert tok.hf.token_to_id("<|im_start|>") not in ids
    prompt = tok.prompt(SPOOF)
    assert [i for i in prompt if i >= tok.base] == [tok.tags["<|user|>"], tok.tags["<|assistant|>"]]
    completion = [i for i in tok.encode_completion(SPOOF) if i >= tok.base]
    assert completion == [tok.tags[t] for t in ("<think>", "</think>", "<answer>", "</answer>")]


def test_encode_completion(tok):
    text = "<think>12+5=17\n</think><answer>17</answer>"
    ids, t = tok.encode_completion(text), tok.tags
    assert ids == [t["<think>"], *tok.encode("12+5=17\n"), t["</think>"], t["<answer>"],
                   *tok.encode("17"), t["</answer>"]]
    assert tok.decode(ids) == text and tok.decode(ids + [tok.end]) == text + "<|end|>"


@pytest.mark.parametrize("prompt, completion, primer", [
    ("How many nuts are", " there? There", ""), ("How ", "many", ""),
    ("nuts", "<think>a</think>", "<think>"),
    ([{"role": "user", "content": "How"}, {"role": "assistant", "content": "many"},
      {"role": "user", "content": " nuts"}], "are there", "")])
def test_prompt_ids_are_the_same_in_training_and_rollouts(tok, stages, prompt, completion, primer):
    """No merge crosses the seam between prompt and completion."""
    asked = tok.prompt(prompt, primer)
    row = {"prompt": prompt, "completion": completion}
    ((ids, mask),) = stages["01_sft"].encode(tok, row)
    assert ids[:len(asked)] == asked
    assert stages["04_rlvr"].encode(tok, row | {"answer": 1})[0][0] == tok.prompt(prompt)
    assert ids == tok.prompt(prompt) + tok.encode_completion(completion) + [tok.end]
    if "03_dpo" in stages:
        pairs = stages["03_dpo"].encode(tok, {"prompt": prompt, "chosen": completion,
                                              "rejected": "nuts"})
        assert pairs[0][0] == ids and pairs[1][0][:len(tok.prompt(prompt))] == tok.prompt(prompt)


def test_multi_turn_mask(tok):
    """1 on each assistant turn and the <|end|> that closes it; headers, system and user are 0."""
    ids, mask = tok.chat([{"role": "system", "content": "How many"},
                          {"role": "user", "content": "nuts"},
                          {"role": "assistant", "content": "<answer>12</answer>"},
                          {"role": "user", "content": "there"},
                          {"role": "assistant", "content": "nuts"}])
    assert len(ids) == len(mask)
    learned, runs = [i for i, m in zip(ids, mask) if m], "".join(map(str, mask)).split("0")
    assert tok.decode(learned) == "<answer>12</answer><|end|>nuts<|end|>"
    assert len([r for r in runs if r]) == 2
    assert tok.decode([i for i, m in zip(ids, mask) if not m]) == (
        "<|system|>How many<|user|>nuts<|assistant|><|user|>there<|assistant|>")


def test_unknown_character():
    tok = Tokenizer({"kind": "chars", "chars": "ab"})
    with pytest.raises(ValueError, match="'é'"):
        tok.encode("abé")


# ---------------------------------------------------------------------------- rows

@pytest.mark.parametrize("name", ["01_sft", "02_cot"])
def test_completion_mask(name, make, tmp_path):
    """Through the stage's own path, file to targets: the counted targets are the completion and its
    end, once, each predicted from the token before; prompt and padding are 0."""
    rows = [{"prompt": "1+1=?", "completion": "<think>1+1=2</think><answer>2</answer>"},
            {"prompt": "2", "completion": "\n\n"},            # "\n" has the id 0, as the padding
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                          {"role": "user", "content": "c"},
                          {"role": "assistant", "content": "dd"}]}]
    write_rows(tmp_path / "rows.jsonl", rows)
    stage, cfg = make(name, data=tmp_path)
    model, tok, _ = load(cfg.init)
    assert tok.encode("\n") == [0]
    ids, mask = stage.collate(stage.read(cfg, "rows.jsonl", tok, model), DEVICE)
    x, targets, counted = shift(ids, mask)
    assert x.shape == targets.shape == counted.shape == (3, ids.shape[1] - 1)
    wanted = ["<think>1+1=2</think><answer>2</answer><|end|>", "\n\n<|end|>", "b<|end|>dd<|end|>"]
    for i, text in enumerate(wanted):
        on = counted[i] == 1
        assert tok.decode(targets[i, on].tolist()) == text
        assert (targets[i, ~on] == -1).all()
        assert torch.equal(x[i, 1:][on[:-1]], targets[i, :-1][on[:-1]])
        assert int(on.sum()) == int(mask[i].sum())
        assert mask[i, 0] == 0 and tok.tags["<|assistant|>"] not in targets[i, on]
    assert tok.decode(ids[0][mask[0] == 0].tolist()).startswith("<|user|>1+1=?<|assistant|>")
    # What lies in the padding has no effect, even if it is the end.
    other = ids.clone()
    for i, row in enumerate(mask):
        other[i, int(row.nonzero().max()) + 1:] = tok.end
    assert not torch.equal(other, ids)
    x2, targets2, _ = shift(other, mask)
    with torch.no_grad():
        assert torch.equal(targets, targets2)
        assert torch.equal(model(x, targets), model(x2, targets2))


def test_shift():
    ids, mask = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 1]])
    x, targets, counted = shift(ids, mask)
    assert x.tolist() == [[5, 6, 7]] and targets.tolist() == [[-1, 7, 8]]
    assert counted.tolist() == [[0, 1, 1]]


@pytest.mark.parametrize("n, k", [(10, 3), (7, 7), (5, 12), (64, 8)])
def test_sample_rows(n, k):
    """A function of (seed, step): an epoch has every row once, the next one in a new order."""
    seen = sum((sample_rows(n, k, 1, step) for step in range(n * 2)), [])
    for epoch in range(len(seen) // n):
        assert sorted(seen[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert seen[:n] != seen[n : 2 * n] and seen[:n] != list(range(n))
    assert sample_rows(n, k, 1, 3) == seen[3 * k : 4 * k]
    other = sum((sample_rows(n, k, 2, step) for step in range(n)), [])
    assert other != seen[: n * k]


def test_long_rows_are_dropped_whole(capsys):
    rows = [{"n": n, "line": 1} for n in (3, 9, 5, 6)]
    kept = encode_rows(rows, "some.jsonl", lambda row: [([1] * row["n"], [1] * row["n"])], 5)
    assert [len(pairs[0][0]) for pairs in kept] == [3, 5]
    assert "some.jsonl: 2 of 4 rows" in capsys.readouterr().out


# ---------------------------------------------------------------------------- verify

A, E = "<answer>{}</answer>", "<|end|>"


@pytest.mark.parametrize("completion, answer, expected", [
    # right
    (A.format(7) + E, "7", 1), ("<think>3+4=7</think>" + A.format(7) + E, "7", 1),
    ("<think></think>" + A.format(7) + E, "7", 1),
    ("<think>a\nb</think>" + A.format("\n7 ") + E, "7", 1),
    (A.format("1,234") + E, "1234", 1), (A.format("1234") + E, "1,234", 1),
    (A.format("$5") + E, "5", 1), (A.format("-$5") + E, "-5", 1),
    (A.format("$1,234.50") + E, "1234.5", 1),
    (A.format("+7") + E, "7", 1), (A.format("7.0") + E, "7", 1), (A.format("7.") + E, "7", 1),
    (A.format("007") + E, "7", 1), (A.format("1/2") + E, "0.5", 1), (A.format("2/4") + E, "1/2", 1),
    (A.format("50%") + E, "50", 1), (A.format("-3") + E, "-3", 1), (A.format("0") + E, "-0", 1),
    (A.format("blue") + E, "blue", 1), (A.format(" blue ") + E, "blue", 1),
    # wrong
    (A.format(8) + E, "7", 0), (A.format("-7") + E, "7", 0), (A.format("") + E, "7", 0),
    (A.format("7 or 8") + E, "7", 0), (A.format("77") + E, "7", 0),
    (A.format("Blue") + E, "blue", 1),
    (A.format("12,34") + E, "1234", 0), (A.format("1/0") + E, "7", 0),
    (A.format("7/7/7") + E, "7", 0),
    (A.format("1e1") + E, "1", 0), (A.format("seven") + E, "7", 0), (A.format("7=7") + E, "7", 0),
    (A.format("0.3333") + E, "1/3", 0), (A.format("7 8") + E, "78", 0),
    (A.format("1/0") + E, "0", 0),
    ("<think>7</think>" + A.format(8) + E, "7", 0),
    # not a completion in the format
    ("", "7", None), ("7", "7", None), ("7" + E, "7", None), (E, "7", None),
    (A.format(7), "7", None),                                                # no end
    ("x" + A.format(7) + E, "7", None), (" " + A.format(7) + E, "7", None),   # a prefix
    (A.format(7) + "x" + E, "7", None), (A.format(7) + E + "x", "7", None),   # a suffix
    (A.format(7) + E + "\n", "7", None), (A.format(7) + E + E, "7", None),
    (A.format(7) + A.format(7) + E, "7", None), (A.format(8) + A.format(7) + E, "7", None),
    (A.format(A.format(7)) + E, "7", None), ("<answer>8<answer>7</answer>" + E, "7", None),
    ("<answer>7" + E, "7", None), ("7</answer>" + E, "7", None),
    ("<think>3+4" + A.format(7) + E, "7", None),
    ("<think>" + A.format(7) + "</think>" + E, "7", None),
    ("<think>a</think><think>b</think>" + A.format(7) + E, "7", None),
    ("<think>a<think>b</think>" + A.format(7) + E, "7", None),
    ("<think>a</think>\n" + A.format(7) + E, "7", None),
    (A.format(7) + "<think>a</think>" + E, "7", None),
    ("<think>a<|end|></think>" + A.format(7) + E, "7", None), (A.format("7<|end|>") + E, "7", None),
    ("<|assistant|>" + A.format(7) + E, "7", None), ("</think>" + A.format(7) + E, "7", None),
    ("<think>" + A.format(8) + E + "</think>" + A.format(7) + E, "7", None)])
def test_verify(completion, answer, expected):
    got = verify(completion, answer)
    assert got == expected and (got is None) == (expected is None)


def test_number_survives_anything():
    for text in ("9" * 5000, "1/" + "0" * 9, "/", ".", "$", "-", "%", "", "1//2", "²", "٣",
                 "+-1"):
        number(text)                     # no exception: a rollout may say whatever it likes
    assert number(".5") == number("0.5") and number("-.5") == -number(".5")


# ---------------------------------------------------------------------------- optimizers

def test_optimizers(double):
    """Muon has the blocks' matrices and nothing else; only matrices and tables decay; every
    parameter is in exactly one group."""
    model = tiny(tied=0)
    names = {id(p): n for n, p in model.named_parameters()}
    for muon_lr in (0.0, 0.02):
        opts = kernel.make_optimizers([model], 1e-3, muon_lr, weight_decay=0.1)
        groups = [g for o in opts for g in o.param_groups]
        ids = [id(p) for g in groups for p in g["params"]]
        assert sorted(ids) == sorted(names)
        for g in groups:
            assert all(p.ndim == 2 for p in g["params"]) if g["weight_decay"] else all(
                p.ndim < 2 for p in g["params"])
            assert g["peak"] == g["lr"]
        assert len(opts) == 1 + bool(muon_lr)
    muon = [names[id(p)] for p in opts[1].param_groups[0]["params"]]
    assert muon == [n for n, p in model.named_parameters() if "blocks." in n and p.ndim == 2]


# ---------------------------------------------------------------------------- checkpoints

def parts_of(model):
    tok = Tokenizer({"kind": "chars", "chars": CHARS})
    model = model or GPT(GPTConfig(vocab_size=tok.vocab_size, block_size=8, n_layer=1, n_head=1,
                                   n_embd=8))
    return dict(model=model.state_dict(), gpt=kernel.asdict(model.cfg), tokenizer=tok.spec)


def test_save_and_load(tmp_path):
    path = tmp_path / "deep/er/a.pt"
    parts = parts_of(None)
    save(path, **parts, note=[1, 2.5, "x"])
    model, tok, rest = load(str(path))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in parts["model"].items())
    assert rest["note"] == [1, 2.5, "x"] and tok.spec == parts["tokenizer"]
    assert os.listdir(path.parent) == ["a.pt"] and str(path) in kernel.file_hashes


def test_save_is_atomic(tmp_path, monkeypatch, refuses):
    """A write that stops half way leaves the old checkpoint, and no litter."""
    path = tmp_path / "a.pt"
    save(path, **parts_of(None), note=1)
    before = path.read_bytes()

    def half(parts, f):
        f.write(before[: len(before) // 2])
        assert path.read_bytes() == before
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    refuses(lambda: save(path, **parts_of(None), note=2), path, "No space left", "intact")
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.pt"]
    assert read_checkpoint(str(path))["note"] == 1


def test_disk_full(tmp_path, refuses):
    """The same with a real limit of the system, in the middle of torch's own writing."""
    path, (_, hard) = tmp_path / "a.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    save(path, **parts_of(None), note=1)
    before, limit = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    big = parts_of(GPT(GPTConfig(vocab_size=100, block_size=64, n_layer=1, n_head=1, n_embd=512)))

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 20, hard))
        try:
            save(path, **big)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    refuses(full, path, "cannot write", "intact")
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.pt"]


def test_a_pickle_with_code_is_refused(tmp_path, refuses):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    torch.save(dict(parts_of(None), extra=Evil()), tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Evil()))
    for name in ("a.pt", "b.pt"):
        refuses(lambda: load(str(tmp_path / name)), name, "no checkpoint of this project")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("change, part", [
    (lambda p: p["model"].pop("blocks.0.mlp.up.weight"), "blocks.0.mlp.up.weight"),
    (lambda p: p["model"].update({"_orig_mod.embed.weight": torch.zeros(1)}), "_orig_mod"),
    (lambda p: p["model"].update({"norm.weight": torch.zeros(9)}), "norm.weight"),
    (lambda p: p["gpt"].update(n_layer=2), "blocks.1"), (lambda p: p["gpt"].update(moe=1), "moe"),
    (lambda p: p["gpt"].pop("qk_norm"), "qk_norm"),
    (lambda p: p["gpt"].update(vocab_size=20), "20"),
    (lambda p: p["gpt"].update(norm="batch"), "batch"),
    (lambda p: p["tokenizer"].update(chars=CHARS + "XYZ"), "tokenizer")])
def test_strict(change, part, tmp_path, refuses):
    """Nothing is loaded in part: a name, a shape or a switch too many or too few is an error."""
    parts = parts_of(None)
    change(parts)
    save(tmp_path / "a.pt", **parts)
    refuses(lambda: load(str(tmp_path / "a.pt")), part)


def test_restore_is_strict(make, tmp_path, refuses):
    """An unfinished run under other flags or over other data is refused by name; what leaves the
    result unchanged may differ. So is a step, or an optimizer's state, that is not this run's."""
    cfg, path, parts = make("01_sft", steps=9)[1], str(tmp_path / "s.pt"), parts_of(None)
    model = GPT(GPTConfig(**parts["gpt"]))

    def state(**changes):
        kernel.file_hashes.update(a="1")
        save(path, **parts, record=kernel.record_of(cfg), **dict(step=5, optimizers=[]) | changes)

    def ask(a="1", optimizers=(), **changes):
        kernel.file_hashes.update(a=a)
        return restore(path, replace(cfg, **changes), {"model": model}, optimizers)

    state()
    assert ask(micro_batch=2, save_every=1) == 5
    assert torch.equal(model.embed.weight, parts["model"]["embed.weight"])
    refuses(lambda: ask(lr=2.0), "other lr:")
    refuses(lambda: ask(a="2"), "other a:")
    refuses(lambda: ask(optimizers=kernel.make_optimizers([model], 1e-3)), "optimizer state")
    for step in (0, 9, -1, 2.0, True, None, "3"):
        state(step=step)
        refuses(ask, "no state of this run")
    assert restore(str(tmp_path / "none.pt"), cfg, {}, []) == 0


def test_skip_if_done(make, tmp_path, monkeypatch, capsys):
    """SKIP_DONE leaves a finished stage alone as long as its flags and its inputs are the same."""
    stage, cfg = make("01_sft", steps=1)
    run(stage, cfg)
    monkeypatch.setenv("SKIP_DONE", "1")
    before = os.stat(tmp_path / "out/01_sft.pt").st_mtime_ns
    with pytest.raises(SystemExit) as e:
        run(stage, cfg)
    assert e.value.code == 0 and "up to date" in capsys.readouterr().out
    assert os.stat(tmp_path / "out/01_sft.pt").st_mtime_ns == before
    old = weights(tmp_path / "out/01_sft.pt")
    run(*make("01_sft", steps=1, lr=1e-4))
    assert not torch.equal(weights(tmp_path / "out/01_sft.pt"), old)
