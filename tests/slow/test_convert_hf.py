"""convert.py against transformers: random weights of each family, at tiny sizes, give the same
logits in fp32, the same ids of texts and chats and the same greedy answers, both ways."""
import json
from dataclasses import asdict

import pytest
import torch
from model import GPT, GPTConfig, Tokenizer, generate, load, save
from test_convert import CHATML, CHATS, FIVE, IM, TEXT, convert, go, tokenizer_json
from transformers import (AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig,
                          MistralConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config, logging)

SHAPE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=128)
ROPE3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
             original_max_position_embeddings=32, rope_theta=500000.0)
THETA = {"rope_type": "default", "rope_theta": 100000.0}
MODELS = {
    "gpt2": ("gpt2", GPT2Config, dict(n_embd=32, n_layer=3, n_head=4, n_positions=128)),
    "gpt2-untied": ("gpt2", GPT2Config, dict(n_embd=32, n_layer=2, n_head=2, n_positions=128,
                                             n_inner=50, tie_word_embeddings=False)),
    "llama3": ("llama", LlamaConfig, SHAPE | dict(rope_parameters=ROPE3)),
    "llama-biases": ("llama", LlamaConfig, SHAPE | dict(attention_bias=True, mlp_bias=True)),
    "llama-attention-bias": ("llama", LlamaConfig, SHAPE | dict(attention_bias=True)),
    "mistral": ("smol", MistralConfig, SHAPE | dict(sliding_window=None, head_dim=10)),
    "mistral-window": ("smol", MistralConfig, SHAPE | dict(sliding_window=128)),
    "smollm2": ("smol", LlamaConfig, SHAPE | dict(rope_parameters=THETA, tie_word_embeddings=True)),
    "qwen2.5": ("qwen2", Qwen2Config, SHAPE | dict(rope_parameters=THETA)),
    "qwen3": ("qwen3", Qwen3Config, SHAPE | dict(head_dim=16, tie_word_embeddings=True)),
    "qwen3-bias": ("qwen3", Qwen3Config, SHAPE | dict(head_dim=16, attention_bias=True))}
CHAT = [{"role": "system", "content": "S"}, {"role": "user", "content": "How many?"},
        {"role": "assistant", "content": "12 nuts"}, {"role": "user", "content": "There?"}]


def randomize(model, seed=0):
    """All weights away from their start: norms from 1, biases from 0."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.15 + (p.ndim == 1) * 0.5)
    return model.eval()


def batch(V):
    torch.manual_seed(1)
    return torch.randint(V, (2, 100))


def same_logits(ours, theirs, V):
    """Within 1e-4, on ids that both have; the logits themselves are of order 1 and vary."""
    ids = batch(V)
    with torch.no_grad():
        a, b = ours.eval()(ids), theirs.eval()(ids).logits
    assert b.std() > 0.3 and a.dtype == b.dtype == torch.float32
    torch.testing.assert_close(a[..., :V], b[..., :V], atol=1e-4, rtol=0)


def same_text(tok, theirs, chats):
    """Control tokens apart, which transformers reads in any text and we in none. A chat that is
    for one question alone refuses a second one."""
    plain = TEXT.replace("<|im_end|>", " 's\t").replace("<think>x</think>", "  many\n")
    assert theirs(plain, add_special_tokens=False).input_ids == tok.encode(plain)
    for messages in chats:
        if len(messages) > 2 and "assistant user" not in (tok.between or ["assistant user"]):
            pytest.raises(ValueError, tok.chat, messages)
            continue
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        assert list(ids["input_ids"]) == tok.chat(messages)[0]


@pytest.mark.parametrize("padding", [0, 40])
@pytest.mark.parametrize("name", MODELS)
def test_from_transformers_and_back(name, padding, tmp_path):
    family, Config, shape = MODELS[name]
    special, others, template = CHATS[family]
    (tmp_path / "t.json").write_text(json.dumps(tokenizer_json(special, others, "qwen" in name)))
    hf_tok = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "t.json"), eos_token=special[-1],
                                     bos_token=special[0], chat_template=template)
    V = len(hf_tok)
    theirs = randomize(AutoModelForCausalLM.from_config(Config(vocab_size=V + padding, **shape)))
    for part in (theirs, hf_tok):
        part.save_pretrained(tmp_path / "hf", **({"max_shard_size": "20KB"} if padding else {}))
    ours, tok, _ = load(go(tmp_path / "hf", tmp_path / "a.pt"))
    same_logits(ours, theirs, V)
    chats = [CHAT, CHAT[:2], CHAT[1:2], FIVE, CHAT[:1] + FIVE, FIVE[:1]] if template else []
    assert len(hf_tok) == tok.base and ("assistant user" in tok.between) == (
        family in ("llama", "smol", "qwen2"))
    same_text(tok, hf_tok, chats)

    prompt = tok.encode("How many nuts") if not template else tok.prompt("How many?")
    [said], _ = generate(ours, [prompt], 12, tok.end, temperature=0.0)
    go(tmp_path / "a.pt", tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    same_logits(ours, again, ours.cfg.vocab_size)
    out = again.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False,
                         attention_mask=torch.ones(1, len(prompt), dtype=torch.long))
    assert out[0, len(prompt):].tolist() == said
    back = AutoTokenizer.from_pretrained(tmp_path / "out")
    same_text(tok, back, chats or [CHAT])
    assert back.convert_tokens_to_ids("<answer>") == tok.tags["<answer>"]
    assert back.eos_token_id == tok.end or template
    if template:
        assert back.chat_template == template

    again.save_pretrained(tmp_path / "resaved")           # what transformers itself makes of it
    back.save_pretrained(tmp_path / "resaved")
    last, last_tok, _ = load(go(tmp_path / "resaved", tmp_path / "b.pt"))
    assert asdict(last.cfg) == asdict(ours.cfg) and last_tok.tags == tok.tags
    assert last_tok.chat(CHAT[:2])[0] == tok.chat(CHAT[:2])[0]
    for key, w in ours.state_dict().items():
        assert torch.equal(w, last.state_dict()[key]), key


@pytest.mark.parametrize("switches", [
    {}, dict(tied=0), dict(position="rope", norm="rms", mlp="swiglu", bias="none"),
    dict(position="rope", norm="rms", mlp="swiglu", bias="none", n_kv_head=1, tied=0,
         rope_factor=4.0, rope_context=64),
    dict(position="rope", norm="rms", mlp="swiglu", bias="attention", rope_factor=4.0),
    dict(position="rope", norm="rms", mlp="swiglu", bias="all"),
    dict(position="rope", norm="rms", mlp="swiglu", bias="attention", qk_norm=1, head_dim=6),
    dict(position="rope", norm="rms", mlp="swiglu", bias="qkv", n_kv_head=2, head_dim=10),
    dict(position="rope", norm="rms", mlp="swiglu", bias="none", qk_norm=1, head_dim=6,
         norm_eps=1e-6)])
@pytest.mark.parametrize("own", [False, True])
def test_from_here(switches, own, tmp_path):
    """A checkpoint of this project, with its tags or a chat of its own."""
    spec = {"kind": "json", "json": tokenizer_json(
        IM, qwen=switches.get("bias") == "qkv")}
    if own:
        spec |= {"template": convert_template(), "config": {"chat_template": CHATML}}
    tok = Tokenizer(spec)
    cfg = GPTConfig(vocab_size=tok.vocab_size, block_size=128, n_layer=2, n_head=4, n_embd=32,
                    **switches)
    ours = randomize(GPT(cfg))
    save(tmp_path / "a.pt", model=ours.state_dict(), gpt=asdict(cfg), tokenizer=spec)
    go(tmp_path / "a.pt", tmp_path / "hf")
    same_logits(ours, AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), cfg.vocab_size)
    same_text(tok, AutoTokenizer.from_pretrained(tmp_path / "hf"), [CHAT, CHAT[1:]])


def convert_template():
    return convert.fixed_text(convert.render_chats(CHATML, {})[:3])


def test_mistral_with_odd_heads(tmp_path):
    """hidden_size that the heads do not divide, which Llama does not allow: out as Mistral."""
    tok = Tokenizer({"kind": "json", "json": tokenizer_json(IM)})
    cfg = GPTConfig(vocab_size=tok.vocab_size, block_size=64, n_layer=2, n_head=3, n_embd=32,
                    head_dim=8, position="rope", norm="rms", mlp="swiglu", bias="none")
    ours = randomize(GPT(cfg))
    save(tmp_path / "a.pt", model=ours.state_dict(), gpt=asdict(cfg), tokenizer=tok.spec)
    theirs = AutoModelForCausalLM.from_pretrained(go(tmp_path / "a.pt", tmp_path / "hf"))
    assert isinstance(theirs.config, MistralConfig)
    ids = torch.arange(50)[None]
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)
    assert asdict(load(go(tmp_path / "hf", tmp_path / "b.pt"))[0].cfg) == asdict(cfg)


@pytest.mark.parametrize("where", ["added_tokens.json", "tokenizer_config.json", "named"])
def test_tokens_outside_of_tokenizer_json(where, tmp_path):
    """transformers' ids of them, and of a chat that is made of them."""
    (tmp_path / "t.json").write_text(json.dumps(tokenizer_json(IM)))
    tok = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "t.json"), eos_token=IM[2],
                                  chat_template=CHATML)
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tok) + 9, **SHAPE))
    for part in (model, tok):
        part.save_pretrained(tmp_path / "hf")
    spec = json.loads((tmp_path / "hf/tokenizer.json").read_text())
    ids = {t["content"]: t["id"] for t in spec["added_tokens"]}
    spec["added_tokens"] = []
    config = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    config.pop("added_tokens_decoder", None)
    if where == "added_tokens.json":
        (tmp_path / "hf/added_tokens.json").write_text(json.dumps(ids))
    elif where == "named":                          # in the vocabulary, special by their names
        spec["model"]["vocab"] |= ids
        config |= {"bos_token": IM[1], "pad_token": IM[0]}
    else:
        config["added_tokens_decoder"] = {str(i): {
            "content": t, "special": True, "normalized": False, "lstrip": False, "rstrip": False,
            "single_word": False} for t, i in ids.items()}
    (tmp_path / "hf/tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "hf/tokenizer_config.json").write_text(json.dumps(config))
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "hf"), load(
        go(tmp_path / "hf", tmp_path / "a.pt"))[1]
    assert len(theirs) == ours.base and ours.end == ids[IM[2]]
    assert theirs.convert_tokens_to_ids(IM) == [ids[t] for t in IM]
    same_text(ours, theirs, [CHAT, FIVE, FIVE[:1]])


# ---------------------------------------------------------------------------- one key at a time

FUZZED = {"gpt2": MODELS["gpt2"][1:], "llama": MODELS["llama3"][1:],
          "llama-biases": MODELS["llama-attention-bias"][1:], "smollm2": MODELS["smollm2"][1:],
          "mistral": MODELS["mistral"][1:], "qwen2": MODELS["qwen2.5"][1:],
          "qwen3": MODELS["qwen3"][1:]}
LINEAR, YARN = dict(rope_type="linear", factor=2.0), dict(type="yarn", factor=4.0)
OTHERS = {                                # keys of other families, of older files, of nobody
    "sliding_window": [8, 127, 128, 4096, 0, "x"], "use_sliding_window": [True],
    "max_window_layers": [0, 1], "layer_types": [["sliding_attention"] * 3, ["full_attention"] * 3,
                                                 ["full_attention"] * 2, [], "full_attention"],
    "attn_logit_softcapping": [5.0], "final_logit_softcapping": [5.0], "logit_scale": [2.0],
    "residual_multiplier": [0.5], "embedding_multiplier": [2.0], "attention_multiplier": [0.1],
    "scale_attn_weights": [False, None, 0], "scale_attn_by_inverse_layer_idx": [True],
    "mlp_bias": [True], "attention_bias": [True], "qkv_bias": [True], "partial_rotary_factor": [
        0.5, 1.0, None], "is_causal": [False, None, 0, True], "head_dim": [4, 8, 16, None],
    "rope_theta": [500.0, 1e6, None, -1.0, 0, "x", float("nan"), float("inf")],
    "rope_scaling": [LINEAR, YARN, ROPE3, ROPE3 | {"factor": 0.5}, {"rope_theta": 500.0},
                     {"type": "default"}, {"rope_type": "default", "type": "linear", "factor": 2.0},
                     {k: v for k, v in ROPE3.items() if k != "rope_theta"}, [], "x"],
    "rope_parameters": [LINEAR | {"rope_theta": 1e4}, THETA, {"rope_theta": 500.0}, ROPE3, {}, None,
                        {"full_attention": THETA}, THETA | {"factor": 3.0}, THETA | {"x": 1}],
    "original_max_position_embeddings": [16], "hidden_size": [16, 64], "n_embd": [16],
    "num_hidden_layers": [1, 2, 4], "num_attention_heads": [2, 8], "n_head": [2, 8],
    "intermediate_size": [24], "n_inner": [64], "hidden_act": ["gelu", "swish", "relu", None],
    "activation_function": ["relu", "gelu", "gelu_pytorch_tanh"], "layer_norm_eps": [0.1],
    "per_layer_config": [{"0": {"rms_norm_eps": 0.5}}], "quantization_config": [{"bits": 4}],
    "auto_map": [{"AutoModel": "x.Y"}], "add_cross_attention": [True], "num_experts": [4],
    "pruned_heads": [{"0": [1]}], "is_decoder": [True, False], "foo": [3], "temperature": [0.5],
    "max_position_embeddings": [16, 256], "n_positions": [16, 256], "n_ctx": [16]}
NESTED = [{k: v} for k in ROPE3 for v in (None, "x", -1, 0, 0.5, 2.0, 3, 1e6)]


def changed(value):
    """Other values, by the type of the one that stands there."""
    if isinstance(value, bool):
        return [not value, None, "x", 2]
    if isinstance(value, int):
        return [value + 1, value * 2, value // 2, 0, -1, None, value + 0.5, "x", True]
    if isinstance(value, float):
        return [value * 2, value * 1e4, 0.0, -1.0, None, "x", float("nan")]
    if isinstance(value, str):
        return ["other", None, 1]
    if isinstance(value, list):
        return [[], None, value[::-1][1:], "x"]
    if isinstance(value, dict):
        return [{}, None, "x"] + [value | one for one in NESTED]
    return [True, 1, 0.5, "x"]


@pytest.mark.parametrize("name", FUZZED)
def test_every_key_changes_both_alike_or_is_refused(name, tmp_path, capsys):
    """Every key of the family's configuration, and OTHERS. Where transformers itself refuses, a
    conversion may pass only with the logits of the unchanged model."""
    logging.set_verbosity_error()
    Config, shape = FUZZED[name]
    theirs = randomize(AutoModelForCausalLM.from_config(Config(vocab_size=60, **shape)))
    theirs.save_pretrained(tmp_path)
    config, path = theirs.config.to_dict(), tmp_path / "config.json"
    torch.manual_seed(1)
    ids = torch.randint(60, (2, 16))

    def theirs_now():
        try:
            model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
            return model.eval()(ids, return_dict=True).logits.detach()
        except Exception:
            return None

    def ours_now():
        capsys.readouterr()
        try:
            told = json.loads(path.read_text())
            cfg = convert.read_config(told, path)
            weights = convert.read_weights(tmp_path, cfg, told["model_type"])
            model = GPT(cfg)
            model.load_state_dict(weights)
            return model.eval()(ids).detach()
        except SystemExit as e:
            err = capsys.readouterr().err
            assert e.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
            return None

    path.write_text(json.dumps(config))
    base, seen, silent = ours_now(), {"alike": set(), "same": set(), "refused": set()}, []
    torch.testing.assert_close(base, theirs_now(), atol=1e-4, rtol=0)
    for key in sorted({*config, *OTHERS}):
        for value in (changed(config[key]) if key in config else []) + OTHERS.get(key, []):
            path.write_text(json.dumps(config | {key: value}))
            ours = ours_now()
            if ours is None:
                seen["refused"].add(key)
                continue
            right = theirs_now()
            right = base if right is None else right
            if ours.shape != right.shape or (ours - right).abs().max() > 1e-4:
                silent.append(f"{key}={value!r}")
            seen["alike" if (ours - base).abs().max() > 1e-3 else "same"].add(key)
    assert not silent, silent
    acts = {"layer_norm_epsilon"} if name == "gpt2" else {"rms_norm_eps", "rope_parameters"}
    assert acts <= seen["alike"], seen
    assert {"is_causal", "attn_logit_softcapping", "vocab_size"} <= seen["refused"], seen
    assert {"foo", "use_cache", "pad_token_id", "dtype"} <= seen["same"], seen
