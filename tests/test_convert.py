"""convert.py: folders in Hugging Face's own format, made here, to checkpoints and back; what is
refused; the chats that models bring. (tests/slow compares the logits with transformers'.)"""
import functools
import json
import shutil
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, config as stage_config, load_stage, run, steps_of
from model import GPT, GPTConfig, Tokenizer, generate, load, read_checkpoint, save, verify

safetensors = pytest.importorskip("safetensors.torch")
convert = load_stage("convert")
render = convert.render_chats
rendered = functools.cache(lambda jinja, names: render(jinja, dict(names)))      # a process each
convert.render_chats = lambda jinja, names: list(rendered(jinja, tuple(sorted(names.items()))))

CHATML = ("{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
          "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
          "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
QWEN3 = ("{%- for m in messages %}{%- set content = m.content %}{%- if m.role == 'assistant' %}"
         "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
         "{{- '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}{%- endfor %}"
         "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}")
LLAMA3 = ("{{- bos_token }}{%- if messages[0]['role'] == 'system' %}"
          "{%- set said = messages[0]['content'] | trim %}"
          "{%- set messages = messages[1:] %}{%- else %}"
          "{%- set said = '' %}{%- endif %}{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}"
          "{{- 'Cutting Knowledge Date: December 2023\n\n' }}{{- said }}{{- '<|eot_id|>' }}"
          "{%- for m in messages %}{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
          "+ m['content'] | trim + '<|eot_id|>' }}{%- endfor %}{%- if add_generation_prompt %}"
          "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}")
IM = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
L3 = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
# what each family's folder says of its chat: special tokens, others (Qwen3's <think>), template
CHATS = {"gpt2": (["<|endoftext|>"], [], None), "llama": (L3, [], LLAMA3), "smol": (IM, [], CHATML),
         "mistral": (IM, [], CHATML), "qwen2": (IM, [], CHATML),
         "qwen3": (IM, ["<think>", "</think>"], QWEN3)}
TEXT = "How many nuts are there? There are 12+5=17 nuts.\n\n<|im_end|> Zoë 日本 <think>x</think>"


def tokenizer_json(special, others=(), qwen=False):
    """A byte-level BPE as GPT-2's, or with Qwen's rules; added tokens come after the vocabulary."""
    from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, normalizers,
                            pre_tokenizers, trainers)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if qwen:
        bpe.normalizer = normalizers.NFC()
        bpe.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(convert.QWEN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator([TEXT * 3, "system user assistant You help."], trainers.BpeTrainer(
        vocab_size=300, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe.add_special_tokens([AddedToken(t, normalized=False) for t in special])
    bpe.add_tokens([AddedToken(t, normalized=False) for t in others])
    return json.loads(bpe.to_str())


def their_config(family, vocab):
    if family == "gpt2":
        return dict(model_type="gpt2", architectures=["GPT2LMHeadModel"], vocab_size=vocab,
                    n_positions=64, n_embd=16, n_layer=2, n_head=2, n_inner=None,
                    activation_function="gelu_new", layer_norm_epsilon=1e-5)
    name = {"llama": "Llama", "smol": "Llama", "mistral": "Mistral", "qwen2": "Qwen2",
            "qwen3": "Qwen3"}[family]
    out = dict(model_type=name.lower(), architectures=[f"{name}ForCausalLM"], vocab_size=vocab,
               hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
               num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-6,
               rope_theta=500000.0, hidden_act="silu", tie_word_embeddings=family != "llama")
    if family == "llama":
        out["rope_scaling"] = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0,
                                   high_freq_factor=4.0, original_max_position_embeddings=16)
    return out | ({"head_dim": 8} if family == "qwen3" else {})


def their_weights(family, config):
    """Random tensors under the names and shapes that the family's files have."""
    torch.manual_seed(0)
    V, rand = config["vocab_size"], lambda *shape: torch.randn(shape) * 0.2
    if family == "gpt2":            # the Hub's own file: no prefix, (in, out), and a buffer
        out = {"wte.weight": rand(V, 16), "wpe.weight": rand(64, 16)}
        out |= {f"ln_f.{k}": rand(16) for k in ("weight", "bias")}
        for i in range(2):
            h = f"h.{i}."
            out[h + "attn.bias"] = torch.ones(1, 1, 64, 64).tril()
            out |= {f"{h}{n}.{k}": rand(16) for n in ("ln_1", "ln_2") for k in ("weight", "bias")}
            for n, a, b in [("attn.c_attn", 16, 48), ("attn.c_proj", 16, 16), ("mlp.c_fc", 16, 64),
                            ("mlp.c_proj", 64, 16)]:
                out |= {f"{h}{n}.weight": rand(a, b), f"{h}{n}.bias": rand(b)}
        return out
    d = config.get("head_dim", 4)
    out = {"model.embed_tokens.weight": rand(V, 16), "model.norm.weight": rand(16)}
    if not config["tie_word_embeddings"]:
        out["lm_head.weight"] = rand(V, 16)
    for i in range(2):
        h = f"model.layers.{i}."
        out |= {f"{h}{n}.weight": rand(16) for n in ("input_layernorm", "post_attention_layernorm")}
        for n, a, b in [("self_attn.q_proj", 4 * d, 16), ("self_attn.k_proj", 2 * d, 16),
                        ("self_attn.v_proj", 2 * d, 16), ("self_attn.o_proj", 16, 4 * d),
                        ("mlp.gate_proj", 24, 16), ("mlp.up_proj", 24, 16),
                        ("mlp.down_proj", 16, 24)]:
            out[f"{h}{n}.weight"] = rand(a, b)
            if family == "qwen2" and n[10:] in ("q_proj", "k_proj", "v_proj"):
                out[f"{h}{n}.bias"] = rand(a)
        if family == "qwen3":
            out |= {f"{h}self_attn.{x}_norm.weight": rand(d) for x in "qk"}
    return out


def write_folder(folder, family, padding=0, shards=1):
    """A model's folder as the Hub has it -> its tensors."""
    special, others, template = CHATS[family]
    tokenizer = tokenizer_json(special, others, family.startswith("qwen"))
    size = 1 + max([*tokenizer["model"]["vocab"].values()]
                   + [t["id"] for t in tokenizer["added_tokens"]])
    config = their_config(family, size + padding)
    weights = their_weights(family, config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    chat = {"bos_token": {"content": special[0]}, "eos_token": special[-1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(
        chat | ({"chat_template": template} if template else {})))
    if shards == 1:
        safetensors.save_file(weights, folder / "model.safetensors")
        return weights
    names, index = list(weights), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        index |= {name: file for name in names[i::shards]}
        safetensors.save_file({n: weights[n] for n in names[i::shards]}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return weights


def go(source, target):
    convert.main(SimpleNamespace(source=str(source), target=str(target)))
    return target


def equal(a, b):
    a, b = read_checkpoint(a), read_checkpoint(b)
    assert a["gpt"] == b["gpt"] and a["tokenizer"] == b["tokenizer"]
    assert list(a["model"]) == list(b["model"])
    for name, w in a["model"].items():
        assert w.dtype == b["model"][name].dtype and torch.equal(w, b["model"][name]), name


# ---------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("family", CHATS)
@pytest.mark.parametrize("shards, padding", [(1, 0), (3, 20)])
def test_there_and_back(family, shards, padding, tmp_path, capsys):
    """Every tensor of the folder comes back bit for bit, and so does the checkpoint."""
    theirs = write_folder(tmp_path / "hf", family, padding, shards)
    one = go(tmp_path / "hf", tmp_path / "one.pt")
    said = capsys.readouterr().out
    go(one, tmp_path / "back")
    equal(one, go(tmp_path / "back", tmp_path / "two.pt"))
    back, (model, tok, _) = safetensors.load_file(tmp_path / "back/model.safetensors"), load(one)
    for name, w in theirs.items():
        new, rows = f"transformer.{name}" if family == "gpt2" else name, len(w)
        if rows >= tok.base:            # a table of all ids: the tags' rows are new
            rows = tok.base
        if ".attn.bias" not in name:
            assert torch.equal(back[new][:rows], w[:rows]), name
            assert back[new].shape == w.shape or rows == tok.base, name
    own = {"gpt2": 8, "qwen3": 2}.get(family, 4)
    ids = sorted(tok.tags.values())[-own:]
    assert ids == list(range(tok.base, tok.base + own)) and tok.vocab_size == tok.base + own
    assert model.cfg.vocab_size == tok.base + (padding or own)
    for table in [model.embed.weight] + ([] if model.cfg.tied else [model.head.weight]):
        assert torch.equal(table[ids], table[:tok.base].mean(0, keepdim=True).expand(own, -1))
    assert f"<answer> {tok.tags['<answer>']}" in said
    assert ("rows that no token used" if padding else "the embedding grows from") in said


def test_values_land_where_they_belong(tmp_path):
    """One tensor of each kind, by hand: q, k, v side by side and transposed in GPT-2."""
    theirs = write_folder(tmp_path / "gpt2", "gpt2")
    ours = read_checkpoint(go(tmp_path / "gpt2", tmp_path / "gpt2.pt"))["model"]
    for i, part in enumerate("qkv"):
        assert torch.equal(ours[f"blocks.1.attention.{part}.weight"],
                           theirs["h.1.attn.c_attn.weight"][:, 16 * i : 16 * i + 16].t())
        assert torch.equal(ours[f"blocks.1.attention.{part}.bias"],
                           theirs["h.1.attn.c_attn.bias"][16 * i : 16 * i + 16])
    assert torch.equal(ours["blocks.0.mlp.proj.weight"], theirs["h.0.mlp.c_proj.weight"].t())
    theirs = write_folder(tmp_path / "llama", "llama")
    parts = read_checkpoint(go(tmp_path / "llama", tmp_path / "llama.pt"))
    assert torch.equal(parts["model"]["blocks.1.mlp.gate.weight"],
                       theirs["model.layers.1.mlp.gate_proj.weight"])
    assert parts["gpt"] == asdict(GPTConfig(
        vocab_size=len(parts["model"]["embed.weight"]), block_size=64, n_layer=2, n_head=4,
        n_embd=16, n_kv_head=2, head_dim=4, n_ff=24, position="rope", norm="rms", mlp="swiglu",
        bias="none", tied=0, rope_theta=5e5, rope_factor=8.0, rope_low=1.0, rope_high=4.0,
        rope_context=16, norm_eps=1e-6))


def test_half_precision_becomes_fp32(tmp_path):
    weights = write_folder(tmp_path / "hf", "smol")
    safetensors.save_file({k: v.bfloat16() for k, v in weights.items()},
                          tmp_path / "hf/model.safetensors")
    ours = read_checkpoint(go(tmp_path / "hf", tmp_path / "a.pt"))["model"]
    assert {w.dtype for w in ours.values()} == {torch.float32}
    assert torch.equal(ours["norm.weight"], weights["model.norm.weight"].bfloat16().float())


@pytest.mark.parametrize("kind", ["json", "tiktoken"])
@pytest.mark.parametrize("tied", [0, 1])
def test_own_checkpoint_there_and_back(kind, tied, tmp_path):
    """A model of this project with its own tags: GPT-2's architecture, a padded vocabulary."""
    spec = {"kind": "json", "json": tokenizer_json(["<|im_start|>"])}
    if kind == "tiktoken":
        try:
            __import__("tiktoken").get_encoding("gpt2")
        except Exception as e:
            pytest.skip(f"tiktoken has no gpt2 here: {type(e).__name__}")
        spec = {"kind": "tiktoken", "name": "gpt2"}
    tok = Tokenizer(spec)
    cfg = GPTConfig(vocab_size=tok.vocab_size + 7, block_size=32, n_layer=1, n_head=2, n_embd=8,
                    tied=tied)
    save(tmp_path / "a.pt", model=GPT(cfg).state_dict(), gpt=asdict(cfg), tokenizer=spec)
    go(tmp_path / "a.pt", tmp_path / "hf")
    equal(tmp_path / "a.pt", go(tmp_path / "hf", tmp_path / "b.pt"))
    plain = Tokenizer({"kind": "json", "json": json.loads(
        (tmp_path / "hf/tokenizer.json").read_text())})
    text = TEXT + " 's 've I'm\t  many   spaces \n\n 1234567 ünïcode <answer>"
    assert plain.tags == tok.tags and plain.encode(text) == tok.encode(text)
    assert plain.decode(tok.encode(text)) == text


# ---------------------------------------------------------------------------- chats


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    """tok(family) -> the Tokenizer of an imported folder."""
    out, made = tmp_path_factory.mktemp("chats"), {}

    def tok(family):
        if family not in made:
            write_folder(out / family, family)
            made[family] = load(go(out / family, out / f"{family}.pt"))[1]
        return made[family]
    return tok


def test_chatml(tok):
    """The ids by hand: its control tokens, its default system turn, our <|end|> = <|im_end|>."""
    tok = tok("smol")
    start, end = (tok.hf.token_to_id(t) for t in IM[1:])
    e = tok.encode
    system = [start, *e("system\nYou help."), end, *e("\n")]
    user = tok.prompt("How many?")
    assert user == system + [start, *e("user\n"), *e("How many?"), end, *e("\n"), start,
                             *e("assistant\n")]
    assert tok.end == end == tok.tags["<|end|>"]
    ids, mask = tok.chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                          {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}])
    assert tok.decode([i for i, m in zip(ids, mask) if m]) == "b<|end|>d<|end|>"
    assert len(ids) == len(mask) and ids[-1] == end
    assert tok.decode(ids) == (
        "<|im_start|>system\nYou help.<|end|>\n<|im_start|>user\na<|end|>\n<|im_start|>assistant\n"
        "b<|end|>\n<|im_start|>user\nc<|end|>\n<|im_start|>assistant\nd<|end|>")
    assert tok.decode(tok.prompt([{"role": "system", "content": "S"}, {"role": "user", "content":
                                  "u"}])) == ("<|im_start|>system\nS<|end|>\n<|im_start|>user\nu"
                                              "<|end|>\n<|im_start|>assistant\n")
    with pytest.raises(ValueError, match="no 'user' turn after a turn of 'user'"):
        tok.chat([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])
    with pytest.raises(ValueError, match="at the start"):
        tok.chat([{"role": "assistant", "content": "a"}])


def test_llama3(tok):
    tok = tok("llama")
    head = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: "
    assert tok.decode(tok.prompt("Hi")) == (
        head + "December 2023\n\n<|end|><|start_header_id|>user<|end_header_id|>\n\nHi<|end|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n")
    assert tok.end == tok.hf.token_to_id("<|eot_id|>")


@pytest.mark.parametrize("family", CHATS)
def test_control_tokens_are_never_text(family, tok):
    """A user cannot write a control token, the model's own or ours; completions may write the
    reasoning tags; training and rollouts see the same prompt."""
    tok = tok(family)
    control = set(tok.control) | {t["id"] for t in tok.spec["json"]["added_tokens"]}
    spoof = "".join([*CHATS[family][0], *CHATS[family][1], *tok.tags, "<|user|>"])
    assert not control & set(tok.encode(spoof)) and tok.decode(tok.encode(spoof)) == spoof
    bare, asked = tok.prompt("x"), tok.prompt(spoof)
    assert [i for i in asked if i in control] == [i for i in bare if i in control]
    text = "<think>1+1=2</think><answer>2</answer>"
    ids = tok.encode_completion(text) + [tok.end]
    assert [i for i in ids if i in control] == [tok.tags[t] for t in (
        "<think>", "</think>", "<answer>", "</answer>", "<|end|>")]
    assert tok.decode(ids) == text + "<|end|>" and verify(tok.decode(ids), "2") == 1.0
    assert verify(tok.decode(ids[:-1]), "2") is None
    row = [{"role": "user", "content": spoof}, {"role": "assistant", "content": text}]
    whole, mask = tok.chat(row)
    assert whole == asked + ids and mask == [0] * len(asked) + [1] * len(ids)
    assert tok.prompt(spoof, "<think>") == asked + [tok.tags["<think>"]]


def test_qwen3_keeps_its_think(tok):
    tok = tok("qwen3")
    assert [tok.tags[t] for t in ("<think>", "</think>")] == [
        tok.hf.token_to_id(t) for t in ("<think>", "</think>")]
    assert tok.vocab_size == tok.base + 2 and tok.tags["<answer>"] == tok.base


def test_a_template_that_is_not_fixed_text(tmp_path, capsys):
    """No <|end|> of its own, or a header that depends on the turn: our tags, and it is said."""
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    counted = "{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}"
    for jinja, why in [(plain + "{% if add_generation_prompt %}assistant: {% endif %}",
                        "no special token"), (plain, "varies"), (counted, "varies"),
                       ("{{ raise_exception('no chat') }}", "no chat"), ("{% if %}", "Syntax")]:
        write_folder(tmp_path / "hf", "smol")
        (tmp_path / "hf/chat_template.jinja").write_text(jinja)
        tok = load(go(tmp_path / "hf", tmp_path / "a.pt"))[1]
        said = capsys.readouterr().out
        assert "cannot be kept" in said and why in said, said
        assert tok.decode(tok.prompt("Hi")) == "<|user|>Hi<|assistant|>"


def test_an_imported_model_trains_and_talks(stages, data, tmp_path, capsys):
    """01 and 04 on a ChatML model, then chat.py, whose answer ends where its chat's turns end."""
    write_folder(tmp_path / "hf", "smol")
    go(tmp_path / "hf", tmp_path / "00_pretrain.pt")
    go(tmp_path / "hf", tmp_path / "02_cot.pt")
    for name in ("01_sft", "04_rlvr"):
        stage = stages[name]
        run(stage, stage_config(stage, data, tmp_path, tmp_path, lr=1e-4, muon_lr=0.0))
        assert len(steps_of(tmp_path / f"{name}.jsonl")) == 2
    go(tmp_path / "04_rlvr.pt", tmp_path / "out")
    equal(tmp_path / "04_rlvr.pt", go(tmp_path / "out", tmp_path / "again.pt"))
    model, tok, _ = load(tmp_path / "01_sft.pt")
    [said], _ = generate(model, [tok.prompt("hi")], 8, tok.end, temperature=0.0)
    chat = load_stage("chat")
    capsys.readouterr()
    chat.main(SimpleNamespace(checkpoints=[str(tmp_path / "01_sft.pt")], max_new=8, device="cpu",
                              prompt="hi", raw=False, temperature=0.0, top_p=1.0, seed=0))
    assert capsys.readouterr().out == tok.decode([i for i in said if i != tok.end]) + "\n"


# ---------------------------------------------------------------------------- refusals


def change(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize("family, values, parts", [
    ("smol", dict(architectures=["PhiForCausalLM"], model_type="phi"),
     ["PhiForCausalLM", "GPT2LMHeadModel, LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausal"]),
    ("smol", dict(architectures="LlamaForCausalLM"), ["not supported"]),
    ("smol", dict(model_type=[]), ["not supported"]),
    ("gpt2", dict(architectures=["GPT2Model"]), ["GPT2Model", "not supported"]),
    ("smol", dict(rope_scaling=dict(type="yarn", factor=4.0)), ["'yarn'"]),
    ("smol", dict(hidden_act="gelu"), ["hidden_act='gelu'"]),
    ("smol", dict(attention_bias=True), ["do not match", "q_proj.bias is missing"]),
    ("smol", dict(mlp_bias=True), ["mlp_bias without attention_bias"]),
    ("qwen2", dict(attention_bias=True), ["attention_bias=True"]),
    ("mistral", dict(sliding_window=63), ["sliding_window=63", "context of 64"]),
    ("mistral", dict(sliding_window=True), ["sliding_window=True"]),
    ("mistral", dict(max_position_embeddings=8192), ["sliding_window=4096"]),
    ("smol", dict(is_causal=False), ["is_causal=False"]),
    ("smol", dict(is_causal=None), ["is_causal=None"]),
    ("smol", dict(logit_scale=0.5), ["logit_scale=0.5"]),
    ("smol", dict(text_config=dict(hidden_size=8)), ["text_config"]),
    ("smol", dict(rope_scaling=dict(rope_type="llama3", factor=0.5, low_freq_factor=1.0,
                                    high_freq_factor=4.0)), ["factor=0.5"]),
    ("llama", dict(rope_scaling=dict(rope_type="llama3", factor=2.0, low_freq_factor=4.0,
                                     high_freq_factor=4.0)), ["low_freq_factor=4.0", "not below"]),
    ("qwen3", dict(rope_parameters=dict(rope_type="default", rope_theta=5e5),
                   rope_scaling=dict(type="yarn", factor=4.0)), ["contradict", "rope_type"]),
    ("smol", dict(rope_parameters=dict(rope_type="default", rope_theta=1e4)),
     ["contradict", "rope_theta"]),
    ("smol", dict(rope_scaling=dict(rope_type="default", type="yarn")), ["contradict", "type"]),
    ("smol", dict(rope_scaling=dict(rope_type="default", factor=2.0)), ["'default' with factor"]),
    ("smol", dict(rope_scaling=[1]), ["no dict"]),
    ("smol", dict(partial_rotary_factor=0.5), ["partial_rotary_factor"]),
    ("smol", dict(partial_rotary_factor={}), ["partial_rotary_factor"]),
    ("smol", dict(rope_theta=0.0), ["rope_theta=0.0 is outside"]),
    ("smol", dict(rope_theta=float("inf")), ["rope_theta=inf is outside"]),
    ("smol", dict(rope_theta=float("nan")), ["rope_theta"]),
    ("smol", dict(rope_theta=None), ["rope_theta=None is no float"]),
    ("smol", dict(rms_norm_eps=-1e-6), ["rms_norm_eps=-1e-06 is outside"]),
    ("gpt2", dict(layer_norm_epsilon="x"), ["layer_norm_epsilon='x' is no float"]),
    ("smol", dict(vocab_size=0), ["vocab_size=0 is outside"]),
    ("smol", dict(num_attention_heads=0), ["num_attention_heads=0 is outside"]),
    ("smol", dict(num_key_value_heads=3), ["n_kv_head=3 does not divide n_head=4"]),
    ("smol", dict(head_dim=3), ["head_dim=3 must be even"]),
    ("smol", dict(num_hidden_layers=10 ** 9), ["num_hidden_layers=1000000000 is outside"]),
    ("smol", dict(max_position_embeddings=10 ** 12), ["max_position_embeddings=1000000000000"]),
    ("smol", dict(hidden_size=16.0), ["hidden_size=16.0 is no int"]),
    ("smol", dict(hidden_size=True), ["hidden_size=True is no int"]),
    ("gpt2", dict(hidden_size=32), ["hidden_size=32 is not supported"]),
    ("gpt2", dict(n_head=3), ["n_head=3 does not divide n_embd=16"]),
    ("gpt2", dict(n_inner=0), ["n_inner=0 is outside"]),
    ("smol", dict(tie_word_embeddings=1), ["tie_word_embeddings=1 is no bool"]),
    ("qwen2", dict(use_sliding_window=True), ["use_sliding_window"]),
    ("qwen3", dict(layer_types=["full_attention", "sliding_attention"]), ["layer_types"]),
    ("smol", dict(quantization_config=dict(bits=4)), ["quantization_config"]),
    ("gpt2", dict(activation_function="relu"), ["activation_function='relu'"]),
    ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), ["scale_attn_by_inverse"]),
    ("smol", dict(hidden_size=32), ["do not match", "embed_tokens"]),
    ("smol", dict(num_hidden_layers=1), ["do not match", "model.layers.1"]),
    ("smol", dict(num_hidden_layers=3), ["do not match", "model.layers.2", "missing"]),
    ("smol", dict(tie_word_embeddings=False), ["lm_head.weight is missing"])])
def test_refused_configurations(family, values, parts, tmp_path, refuses):
    write_folder(tmp_path / "hf", family)
    change(tmp_path / "hf", **values)
    refuses(lambda: go(tmp_path / "hf", tmp_path / "a.pt"), tmp_path / "hf", *parts)
    assert not (tmp_path / "a.pt").exists()


def test_refused_folders(tmp_path, refuses, monkeypatch):
    folder, target = tmp_path / "hf", tmp_path / "a.pt"
    attempt = lambda *parts: refuses(lambda: go(folder, target), *parts)
    write_folder(folder, "smol", shards=2)
    (folder / "adapter_config.json").write_text("{}")
    attempt("an adapter")
    (folder / "adapter_config.json").unlink()
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"\0" * 20)
    attempt("model-00002-of-00002.safetensors", "cannot be read")
    (folder / "model-00002-of-00002.safetensors").unlink()
    attempt("model-00002-of-00002.safetensors is missing")
    (folder / "model.safetensors.index.json").unlink()
    attempt("no weights", "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    attempt("no weights", "pytorch_model.bin is another format")
    (folder / "tokenizer.json").write_text("{}")
    attempt("tokenizer.json", "KeyError: 'model'")
    (folder / "tokenizer.json").unlink()
    attempt("no tokenizer.json")
    for text, part in [("{", "not JSON"), ("[]", "no Hugging Face configuration"),
                       ('{"model_type": "llama"}', "a llama configuration: it has no max_pos")]:
        (folder / "config.json").write_text(text)
        attempt("config.json", part)
    (folder / "config.json").unlink()
    attempt("no config.json")
    import huggingface_hub

    def offline(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    refuses(lambda: go("someone/model", target), "someone/model", "no folder here", "no route",
            "pass the folder")
    refuses(lambda: go(folder, tmp_path / "b"), "ends in .pt")
    assert not target.exists()


@pytest.mark.parametrize("grown", [False, True])
def test_another_model_s_tokenizer(grown, tmp_path, refuses):
    """More ids than rows, or far fewer."""
    write_folder(tmp_path / "hf", "smol", padding=2000 if grown else 0)
    if not grown:
        (tmp_path / "hf/tokenizer.json").write_text(
            json.dumps(tokenizer_json(IM + [f"<|{i}|>" for i in range(9)])))
    refuses(lambda: go(tmp_path / "hf", tmp_path / "a.pt"), "tokenizer and weights do not match")


def test_not_byte_level(tmp_path, refuses):
    """A tokenizer that puts a space before each piece would put one at each seam."""
    write_folder(tmp_path / "hf", "smol")
    spec = json.loads((tmp_path / "hf/tokenizer.json").read_text())
    spec["pre_tokenizer"]["add_prefix_space"] = True
    (tmp_path / "hf/tokenizer.json").write_text(json.dumps(spec))
    refuses(lambda: go(tmp_path / "hf", tmp_path / "a.pt"), "byte-level")


def test_refused_exports(tmp_path, refuses, chain):
    """The toy's characters; mixtures of families; reward models; folders that hold other things."""
    target = tmp_path / "hf"
    refuses(lambda: go(chain / "01_sft.pt", target), "characters", "the toy's")
    spec = {"kind": "json", "json": tokenizer_json(IM)}
    size, rope = Tokenizer(spec).vocab_size, dict(position="rope", norm="rms", mlp="swiglu",
                                                  bias="none")

    def put(head=(), **switches):
        cfg = GPTConfig(vocab_size=size, block_size=16, n_layer=1, n_head=2, n_embd=8, **switches)
        save(tmp_path / "a.pt", model=GPT(cfg).state_dict(), gpt=asdict(cfg), tokenizer=spec,
             **{name: {} for name in head})

    for switches in [dict(position="rope"), dict(norm="rms"), dict(bias="none"), dict(qk_norm=1),
                     dict(mlp="swiglu"), dict(n_kv_head=1), rope | dict(norm="layer"),
                     rope | dict(qk_norm=1, bias="qkv"),
                     rope | dict(bias="qkv", rope_factor=8.0, rope_context=8)]:
        put(**switches)
        refuses(lambda: go(tmp_path / "a.pt", target), "no Hugging Face family", "a.pt")
    put(**rope | dict(bias="qkv"))
    refuses(lambda: go(tmp_path / "a.pt", target), "Qwen2's architecture and another tokenizer")
    put(head=["head"])
    refuses(lambda: go(tmp_path / "a.pt", target), "reward model")
    assert not target.exists()
    put(**rope)
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    refuses(lambda: go(tmp_path / "a.pt", target), "holds what this command did not write")
    assert (target / "notes.txt").read_text() == "mine"
    shutil.rmtree(target)
    go(tmp_path / "a.pt", target)
    go(tmp_path / "a.pt", target)                       # its own folder is replaced
    assert {p.name for p in target.iterdir()} == {*convert.FILES}


# ---------------------------------------------------------------------------- numbers and files


def put_weights(folder, **changes):
    path = folder / "model.safetensors"
    weights = safetensors.load_file(path) | changes
    safetensors.save_file({k: v for k, v in weights.items() if v is not None}, path)


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize("tensor, parts", [
    (torch.ones(16) * float("nan"), [NORM, "NaN"]),
    (torch.tensor([float("inf")] + [1.0] * 15), [NORM, "infinity"]),
    (torch.ones(16, dtype=torch.bfloat16) * float("-inf"), [NORM, "infinity"]),
    (torch.ones(16, dtype=torch.float64) * 1e39, [NORM, "too large for fp32"]),
    (torch.ones(16).to(torch.float8_e4m3fn), [NORM, "float8_e4m3fn", "quantized"]),
    (torch.ones(16, dtype=torch.int8), [NORM, "int8"]),
    (torch.ones(16, dtype=torch.bool), [NORM, "bool"]),
    (torch.ones(16, dtype=torch.complex64), [NORM]),
    (torch.ones(17), [NORM, "(17,)", "expected (16,)"]), (torch.ones(4, 4), [NORM, "(4, 4)"]),
    (torch.tensor(1.0), [NORM, "()"]), (None, [NORM, "missing"])])
def test_numbers_that_are_not_taken(tensor, parts, tmp_path, refuses):
    write_folder(tmp_path / "hf", "smol")
    put_weights(tmp_path / "hf", **{NORM: tensor})
    refuses(lambda: go(tmp_path / "hf", tmp_path / "a.pt"), tmp_path / "hf", *parts)
    assert not (tmp_path / "a.pt").exists()


def test_float64_is_rounded_and_said(tmp_path, capsys):
    write_folder(tmp_path / "hf", "smol")
    precise = torch.full((16,), 1 / 3, dtype=torch.float64)
    put_weights(tmp_path / "hf", **{NORM: precise})
    ours = read_checkpoint(go(tmp_path / "hf", tmp_path / "a.pt"))["model"]
    assert torch.equal(ours["blocks.1.norm1.weight"], precise.float())
    assert {w.dtype for w in ours.values()} == {torch.float32}
    assert "float64 weights are rounded" in capsys.readouterr().out


def test_nan_is_not_exported(tmp_path, refuses):
    write_folder(tmp_path / "hf", "smol")
    parts = read_checkpoint(go(tmp_path / "hf", tmp_path / "a.pt"))
    parts["model"]["blocks.0.mlp.up.weight"][3, 5] = float("nan")
    save(tmp_path / "b.pt", **parts)
    refuses(lambda: go(tmp_path / "b.pt", tmp_path / "out"), "b.pt", "blocks.0.mlp.up.weight")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("equal_head", [True, False])
def test_a_head_beside_a_tied_embedding(equal_head, tmp_path, capsys):
    """transformers ties them only where they are equal."""
    weights = write_folder(tmp_path / "hf", "smol")
    head = weights["model.embed_tokens.weight"] * (1.0 if equal_head else -2.0)
    put_weights(tmp_path / "hf", **{"lm_head.weight": head})
    model, tok, _ = load(go(tmp_path / "hf", tmp_path / "a.pt"))
    assert model.cfg.tied == int(equal_head)
    assert ("not tied" in capsys.readouterr().out) != equal_head
    if not equal_head:
        assert torch.equal(model.head.weight[: len(head)][:tok.base], head[:tok.base])


@pytest.mark.parametrize("table, parts", [
    ({"a": "../hf2/model.safetensors"}, ["'../hf2/model.safetensors'"]),
    ({"a": "/etc/passwd"}, ["'/etc/passwd'"]), ({"a": "sub/model.safetensors"}, ["sub/model"]),
    ({"a": ".."}, [".. is missing"]), ({"a": 5}, ["no index"]),
    ([], ["no index"]), ({}, ["no index"]), (None, ["no index"]),
    ({"a": "model-9.safetensors"}, ["model-9.safetensors is missing"]),
    ({"a": "m1.safetensors", "b": "m2.safetensors"}, ["m2.safetensors holds", "another file"])])
def test_an_index_that_leads_elsewhere(table, parts, tmp_path, refuses):
    for name in ("hf", "hf2"):
        write_folder(tmp_path / name, "smol")
    folder = tmp_path / "hf"
    (folder / "model.safetensors").rename(folder / "m1.safetensors")
    shutil.copy(folder / "m1.safetensors", folder / "m2.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    refuses(lambda: go(folder, tmp_path / "a.pt"), *parts)


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


MALFORMED = [
    ("config.json", b"", "not JSON"), ("config.json", b"\xff\xfe", "config.json"),
    ("config.json", b"5", "no Hugging Face"), ("config.json", b"null", "no Hugging Face"),
    ("config.json", b'{"model_type": "llama"', "not JSON"),
    ("tokenizer.json", b"", "not JSON"), ("tokenizer.json", b"[]", "tokenizer.json"),
    ("tokenizer.json", b"5", "tokenizer.json"), ("tokenizer.json", b"null", "tokenizer.json"),
    ("tokenizer.json", b'{"model": {}}', "tokenizer.json"),
    ("tokenizer.json", b'{"model": {"vocab": []}}', "tokenizer.json"),
    ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "tokenizer.json"),
    ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}', "tokeniz"),
    ("tokenizer.json", b'{"added_tokens": [5], "model": {"vocab": {}}}', "tokenizer.json"),
    ("tokenizer.json", b'{"added_tokens": {}, "model": {"vocab": {}}}', "tokenizer.json"),
    ("tokenizer_config.json", b"[]", "no object"), ("tokenizer_config.json", b"{", "not JSON"),
    ("tokenizer_config.json", b'{"chat_template": 5}', "no text"),
    ("tokenizer_config.json", b'{"chat_template": {"a": 1}}', "no text"),
    ("tokenizer_config.json", b'{"chat_template": [5]}', "tokenizer_config.json"),
    ("tokenizer_config.json", b'{"chat_template": [{"name": "default"}]}', "'template'"),
    ("tokenizer_config.json", b'{"eos_token": 5}', "no text"),
    ("tokenizer_config.json", b'{"eos_token": {"x": 1}}', "'content'"),
    ("tokenizer_config.json", b'{"pad_token": "[PAD]"}', "special token '[PAD]' of"),
    ("tokenizer_config.json", b'{"added_tokens_decoder": []}', "tokenizer.json"),
    ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {"content": "a"}}}', "tokenizer"),
    ("tokenizer_config.json", b'{"added_tokens_decoder": {"400": {}}}', "tokenizer"),
    ("tokenizer_config.json", b'{"added_tokens_decoder": {"400": {"content": "<x>"}}}', "holes"),
    ("tokenizer_config.json", b'{"added_tokens_decoder": {"5": {"content": "<|im_end|>"}}}',
     "has two ids"),
    ("tokenizer_config.json", b'{"additional_special_tokens": ["<x>"]}', "special token '<x>' of"),
    ("tokenizer_config.json", b'{"extra_special_tokens": 5}', "tokenizer.json"),
    ("added_tokens.json", b"[]", "no object"), ("added_tokens.json", b'{"<x>": "y"}', "'y'"),
    ("added_tokens.json", b'{"<x>": 400}', "holes"), ("special_tokens_map.json", b"5", "no object"),
    ("chat_template.jinja", b"\xff", "chat_template.jinja"),
    ("generation_config.json", b"{", "not JSON"), ("generation_config.json", b"[]", "no object"),
    ("model.safetensors", b"", "cannot be read"), ("model.safetensors", b"\0" * 8, "cannot be re"),
    ("model.safetensors", b"\xff" * 64, "cannot be read"),
    ("model.safetensors", b"\x02" + b"\0" * 7 + b"{}", "is missing"),
    ("model.safetensors", b"\x08" + b"\0" * 7 + b'{"a": 5}', "cannot be read"),
    ("model.safetensors", None, "cannot be read")]


@pytest.mark.parametrize("name, content, part", MALFORMED,
                         ids=[f"{i}-{m[0]}" for i, m in enumerate(MALFORMED)])
def test_malformed(name, content, part, tmp_path, refuses):
    """One line that says why; nothing is written, nothing changed. (None: half of the file.)"""
    write_folder(tmp_path / "hf", "smol")
    (tmp_path / "out").mkdir()
    path, old = tmp_path / "hf" / name, tmp_path / "out/a.pt"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content is None else content)
    old.write_bytes(b"what was there before")
    before = tree(tmp_path)
    refuses(lambda: go(tmp_path / "hf", old), part)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_folder_in_a_file_s_place(name, tmp_path, refuses):
    write_folder(tmp_path / "hf", "smol")
    (tmp_path / "hf" / name).unlink()
    (tmp_path / "hf" / name).mkdir()
    refuses(lambda: go(tmp_path / "hf", tmp_path / "a.pt"), "has no")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "added_tokens.json",
                                  "special_tokens_map.json", "generation_config.json",
                                  "chat_template.jinja"])
@pytest.mark.parametrize("link", [False, True])
def test_what_may_be_absent_is_not_a_folder(name, link, tmp_path, refuses):
    write_folder(tmp_path / "hf", "smol")
    path = tmp_path / "hf" / name
    path.unlink(missing_ok=True)
    path.symlink_to("nowhere") if link else path.mkdir()
    refuses(lambda: go(tmp_path / "hf", tmp_path / "a.pt"), path, "missing" if link else "director")


def test_nothing_of_others_is_deleted(tmp_path, refuses):
    """NAME.new beside the target is somebody's; so is a folder of the same file names, and one that
    was changed since; a target that is a file, or lies under one, is a line."""
    write_folder(tmp_path / "hf", "smol")
    go(tmp_path / "hf", tmp_path / "a.pt")
    (tmp_path / "out.new").mkdir()
    (tmp_path / "out.new/notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    again = lambda target: go(tmp_path / "a.pt", tmp_path / target)
    again("out")
    again("out")                                        # its own folder is replaced
    for change in [lambda: put_weights(tmp_path / "out", x=torch.zeros(1)),
                   lambda: (tmp_path / "out/config.json").write_text("{}"),
                   lambda: (tmp_path / "out/tokenizer_config.json").write_text("{}"),
                   lambda: (tmp_path / "out/model.safetensors").write_bytes(b"mine"),
                   lambda: (tmp_path / "out/model.safetensors").unlink()]:
        again("out")
        change()
        before = tree(tmp_path)
        refuses(lambda: again("out"), tmp_path / "out", "another folder")
        assert tree(tmp_path) == before
        shutil.rmtree(tmp_path / "out")
    again("out")
    (tmp_path / "out/generation_config.json").unlink()
    (tmp_path / "out/generation_config.json").mkdir()
    before = tree(tmp_path)
    for target, part in [("out", "another folder"), ("hf", "another folder"),
                         ("file", "another folder"), ("file/x", "cannot write"), (".", "another")]:
        refuses(lambda: again(target), part)
        assert tree(tmp_path) == before
    refuses(lambda: convert.main(SimpleNamespace(source=str(tmp_path / "a.pt"), target="")), ".pt")
    stage = read_checkpoint(tmp_path / "a.pt") | {"record": {"config": {"steps": 3}}}
    save(tmp_path / "01_sft.pt", **stage)
    (tmp_path / "other.pt").write_text("mine")
    before = tree(tmp_path)
    for name, part in [("01_sft.pt", "no conversion of"), ("other.pt", "no checkpoint")]:
        refuses(lambda: go(tmp_path / "hf", tmp_path / name), part)
        assert tree(tmp_path) == before


# ---------------------------------------------------------------------------- other tokenizers


def sentencepiece(prefix):
    """As Llama 2's: spaces are marks, bytes as a last resort; with a mark before each text, or
    none (Gemma's)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    vocab = ["<unk>"] + [f"<0x{i:02X}>" for i in range(256)] + ["\u2581", "a", "b", "\u2581a"]
    bpe = Tokenizer(models.BPE({t: i for i, t in enumerate(vocab)}, [("\u2581", "a")],
                               unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    mark = normalizers.Replace(" ", "\u2581")
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), mark]) if prefix else mark
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    bpe.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if prefix else []))
    bpe.add_special_tokens([AddedToken(t, normalized=False) for t in IM])
    spec = json.loads(bpe.to_str())
    assert Tokenizer.from_str(json.dumps(spec)).decode(bpe.encode("a b a").ids) == "a b a"
    return spec


def metaspace():
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    letters = sorted({chr(i) for i in range(1, 0x250)} | {"\u2581"})
    tok = Tokenizer(models.Unigram([("<unk>", 0.0)] + [(c, -1.0) for c in letters], 0, False))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tok.add_special_tokens([AddedToken(t, normalized=False) for t in IM])
    return json.loads(tok.to_str())


def with_normalizer(**normalizer):
    return tokenizer_json(IM) | {"normalizer": normalizer}


def with_prefix():
    """A blank before each text, taken off again: one piece alone comes back as it was."""
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    spec = with_normalizer(type="Prepend", prepend=" ")
    return spec | {"decoder": {"type": "Sequence", "decoders": [spec["decoder"], strip]}}


def with_dropout():
    spec = tokenizer_json(IM)
    spec["model"]["dropout"] = 0.5
    return spec


@pytest.mark.parametrize("make", [
    lambda: sentencepiece(True), lambda: sentencepiece(False), metaspace, with_dropout, with_prefix,
    lambda: with_normalizer(type="Lowercase"), lambda: with_normalizer(type="NFKC"),
    lambda: with_normalizer(type="Strip", strip_left=True, strip_right=True),
    lambda: with_normalizer(type="Replace", pattern={"Regex": " {2,}"}, content=" ")])
def test_only_what_gives_back_its_text(make, tmp_path, refuses):
    write_folder(tmp_path / "hf", "smol")
    (tmp_path / "hf/tokenizer.json").write_text(json.dumps(make()))
    refuses(lambda: go(tmp_path / "hf", tmp_path / "a.pt"), "byte-level")


@pytest.mark.parametrize("where", ["added_tokens.json", "tokenizer_config.json", "both"])
def test_added_tokens_keep_their_rows(where, tmp_path):
    """Tokens that stand outside of tokenizer.json have trained rows: they are no free padding."""
    theirs = write_folder(tmp_path / "hf", "smol", padding=20)
    folder = tmp_path / "hf"
    spec = json.loads((folder / "tokenizer.json").read_text())
    first = 1 + max(t["id"] for t in spec["added_tokens"])
    more = {"<tool>": first, "extra": first + 1}
    if where != "tokenizer_config.json":
        (folder / "added_tokens.json").write_text(json.dumps(more))
    if where != "added_tokens.json":
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config["added_tokens_decoder"] = {str(i): {"content": t, "special": t[0] == "<"}
                                          for t, i in more.items()}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    model, tok, _ = load(go(folder, tmp_path / "a.pt"))
    assert tok.base == first + 2 and tok.tags["<think>"] == tok.base
    assert torch.equal(model.embed.weight[: first + 2],
                       theirs["model.embed_tokens.weight"][: first + 2])
    assert "<tool>" in tok.decode([first]) and first not in tok.encode("<tool>")
    go(tmp_path / "a.pt", tmp_path / "out")
    equal(tmp_path / "a.pt", go(tmp_path / "out", tmp_path / "b.pt"))


# ---------------------------------------------------------------------------- other templates


def chat_of(tmp_path, jinja, special=IM, others=(), **tokens):
    """-> the Tokenizer of a folder with this template."""
    write_folder(tmp_path / "hf", "smol", padding=9)
    (tmp_path / "hf/tokenizer.json").write_text(json.dumps(tokenizer_json(special, others)))
    (tmp_path / "hf/tokenizer_config.json").write_text(json.dumps(
        {"chat_template": jinja} | tokens))
    return load(go(tmp_path / "hf", tmp_path / "a.pt"))[1]


# what is compared with transformers as well: edges and five turns
FIVE = [{"role": r, "content": c} for r, c in [
    ("user", " How? "), ("assistant", " a "), ("user", "b "), ("assistant", "c"), ("user", " d")]]


def test_llama3_strips(tok):
    """Its template trims, so contents are stripped here: the same ids with and without blanks."""
    tok = tok("llama")
    bare = [m | {"content": m["content"].strip()} for m in FIVE]
    assert tok.chat(FIVE) == tok.chat(bare) and "\n\nHow?<|end|>" in tok.decode(tok.chat(FIVE)[0])
    assert tok.spec["strip"] is True


def test_chatml_does_not_strip(tok):
    ids = tok("smol").chat(FIVE)[0]
    assert "user\n How? <|end|>" in tok("smol").decode(ids)


def test_qwen3_is_for_one_question(tok, tmp_path, capsys):
    """It drops <think> from earlier turns: prompts and one exchange are its own, a second question
    is refused, where the kept text would not be the template's."""
    write_folder(tmp_path / "hf", "qwen3")
    go(tmp_path / "hf", tmp_path / "a.pt")
    said = capsys.readouterr().out
    assert "kept for one question" in said and "with 3 turns it writes" in said, said
    own = load(tmp_path / "a.pt")[1]
    assert own.decode(own.prompt(" x ")) == "<|im_start|>user\n x <|end|>\n<|im_start|>assistant\n"
    ids, mask = own.chat([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}])
    assert own.decode(ids[-2:]) == "y<|end|>" and mask[-3:] == [0, 1, 1]
    with pytest.raises(ValueError, match="no 'user' turn after a turn of 'assistant'"):
        own.chat(FIVE)
    go(tmp_path / "a.pt", tmp_path / "out")
    equal(tmp_path / "a.pt", go(tmp_path / "out", tmp_path / "b.pt"))


TURN = "{{ '<|im_start|>' + m.role + '\n' + CONTENT + '<|im_end|>\n' }}"
WHOLE = "{% for m in messages %}" + TURN + ("{% endfor %}{% if add_generation_prompt %}"
                                            "{{ '<|im_start|>assistant\n' }}{% endif %}")


@pytest.mark.parametrize("content, why", [
    ("m.content | upper", "writes"), ("m.content.replace('  ', ' ')", "writes"),
    ("(m.content if m.role == 'assistant' else m.content | trim)", None),   # stripped
    ("m.content.lstrip()", "writes"), ("m.content | e", "varies"), ("m.content[:12]", "writes"),
    ("m.content.replace('<think>', '')", "writes"), ("(m.content or 'nothing')", "writes"),
    ("m.content + 'x' * (loop.index0 // 4)", None), ("m.content + loop.index | string", "varies")])
def test_templates_that_depend_on_the_content(content, why, tmp_path, capsys):
    """Refused, or kept for the one question on which both agree; the line says what differs."""
    tok = chat_of(tmp_path, WHOLE.replace("CONTENT", content))
    said = capsys.readouterr().out
    if why:
        assert "cannot be kept" in said and why in said and "this project's tags instead" in said
        assert tok.decode(tok.prompt("Hi")) == "<|user|>Hi<|assistant|>"
    else:
        assert "kept for one question" in said and "turns it writes" in said, said
        with pytest.raises(ValueError, match="after a turn of 'assistant'"):
            tok.chat(FIVE)


def test_generation_tags_and_the_date(tmp_path, capsys):
    """transformers' {% generation %} changes no text; a date is said, and stays."""
    marked = WHOLE.replace("CONTENT", "m.content").replace(
        "{{ '<|im_start|>'", "  {%- generation -%} {{ '<|im_start|>'").replace(
        "{% endfor %}", "{%- endgeneration %}{% endfor %}")
    own = chat_of(tmp_path, marked)
    assert own.decode(own.prompt("a")) == "<|im_start|>user\na<|end|>\n<|im_start|>assistant\n"
    assert "date" not in capsys.readouterr().out
    dated = "{{ strftime_now('%d') if strftime_now is defined else 'May' }}" + marked
    own = chat_of(tmp_path, dated)
    assert own.decode(own.prompt("a")).startswith("May<|im_start|>user\na<|end|>")
    assert "it writes today's date" in capsys.readouterr().out


@pytest.mark.parametrize("jinja, part", [
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "not end"),
    ("{{ 'a' * 3000000000 }}", "MemoryError"), ("{{ 'a' * 5000000 }}", "more than 4 MB"),
    ("{{ ''.__class__.__mro__ }}", "unsafe"), ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ("{% include 'x' %}", "no loader"), ("{{ messages.append(1) }}", "unsafe")])
def test_a_template_is_a_strangers_program(jinja, part, tmp_path, capsys, monkeypatch):
    if part == "not end":
        monkeypatch.setattr(convert, "SECONDS", 1)
    tok = chat_of(tmp_path, jinja)
    said = capsys.readouterr().out
    assert "cannot be kept" in said and part in said, said
    assert tok.decode(tok.prompt("Hi")) == "<|user|>Hi<|assistant|>"


@pytest.mark.parametrize("end", ["IM_END", "[/INST]", "[END", "stop"])
def test_an_end_that_looks_like_a_word(end, tmp_path):
    """Neither special nor a <tag>: a user who writes it writes text."""
    jinja = WHOLE.replace("CONTENT", "m.content").replace("<|im_end|>", end)
    tok = chat_of(tmp_path, jinja, IM[:2], [end])
    assert tok.end == tok.hf.token_to_id(end) == tok.chat(FIVE[:2])[0][-1]
    assert tok.end not in tok.encode(f"x{end} {end}") and tok.decode(tok.encode(end)) == end
    assert tok.chat(FIVE[:1])[0].count(tok.end) == 1


@pytest.mark.parametrize("token", ["<think>", "IM_END", "[/INST]"])
def test_the_kernel_keeps_added_tokens_out_of_text(token):
    """Not special in the file, but a <tag>, or a part of the chat's fixed text."""
    template = {"user": "", "user assistant": "\n", "assistant user": token + "\n"}
    spec = {"kind": "json", "json": tokenizer_json([], [token])}
    tok = Tokenizer(spec | ({} if token[0] == "<" else {"template": template}))
    own = tok.tags["<think>" if token[0] == "<" else "<|end|>"]
    assert own == tok.hf.token_to_id(token)
    assert own not in tok.encode(token) and tok.decode(tok.encode(f"a{token} ")) == f"a{token} "


def test_a_control_token_that_text_can_reach(tmp_path, refuses):
    """Llama 3's ignore_merges takes a whole word of the vocabulary, a control token's too."""
    write_folder(tmp_path / "hf", "smol")
    spec = tokenizer_json([])
    model = spec["model"]
    model["vocab"] |= {t: len(model["vocab"]) + i for i, t in enumerate(["START", "END"])}
    model["ignore_merges"] = True
    spec["added_tokens"] = [convert.added(t, model["vocab"][t]) for t in ("START", "END")]
    (tmp_path / "hf/tokenizer.json").write_text(json.dumps(spec))
    jinja = WHOLE.replace("CONTENT", "m.content")
    (tmp_path / "hf/tokenizer_config.json").write_text(json.dumps({
        "chat_template": jinja.replace("<|im_start|>", "START").replace("<|im_end|>", "END")}))
    refuses(lambda: go(tmp_path / "hf", tmp_path / "a.pt"), "would become the control token")


# ---------------------------------------------------------------------------- data/smollm2.py


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\3\0\0\0" + b"\xff" * 64, None])
def test_gguf_that_cannot_be_read(content, monkeypatch, tmp_path, refuses):
    """One line, with the package or without it; nothing is written."""
    monkeypatch.syspath_prepend(ROOT / "data")
    smollm2 = load_stage("data/smollm2")
    path, out = tmp_path / "a.gguf", tmp_path / "hf"
    if content is not None:
        path.write_bytes(content)
    reader = SimpleNamespace(GGUFReader=lambda path: (_ for _ in ()).throw(IndexError("at 24")))
    for module, part in [(None, "pip install gguf"), (reader, "a.gguf")]:
        monkeypatch.setitem(sys.modules, "gguf", module)
        refuses(lambda: smollm2.main(SimpleNamespace(gguf=str(path), out=str(out))), part)
    assert not out.exists()


def test_gguf_rows_are_put_back(monkeypatch):
    """GGUF has each head's channel pairs (i, i + d/2) side by side: 0 3 1 4 2 5 for d = 6."""
    monkeypatch.syspath_prepend(ROOT / "data")
    smollm2 = load_stage("data/smollm2")
    stored = torch.tensor([0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11])[:, None].numpy()
    assert smollm2.unpermute(stored, 2)[:, 0].tolist() == list(range(12))
    assert smollm2.their_name("blk.3.attn_q.weight") == "model.layers.3.self_attn.q_proj.weight"
    assert smollm2.their_name("output_norm.weight") == "model.norm.weight"
