"""convert.py: folders in Hugging Face's own format, made here, to checkpoints and back; what is
refused; the chats that models bring. (tests/slow compares the logits with transformers'.)"""
import json
import shutil
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, config as stage_config, load_stage, run, steps_of
from model import GPT, GPTConfig, Tokenizer, generate, load, read_checkpoint, save, verify

safetensors = pytest.importorskip("safetensors.torch")
convert = load_stage("convert")

CHATML = ("{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
          "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
          "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
QWEN3 = ("{%- for m in messages %}{%- set content = m.content %}{%- if m.role == 'assistant' %}"
         "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
         "{{- '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}{%- endfor %}"
         "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}")
LLAMA3 = ("{{- bos_token }}{%- if messages[0]['role'] == 'system' %}"
          "{%- set said = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}{%- else %}"
          "{%- set said = '' %}{%- endif %}{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}"
          "{{- 'Cutting Knowledge Date: December 2023\n\n' }}{{- said }}{{- '<|eot_id|>' }}"
          "{%- for m in messages %}{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
          "+ m['content'] | trim + '<|eot_id|>' }}{%- endfor %}{%- if add_generation_prompt %}"
          "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}")
IM = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
L3 = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
# what each family's folder says of its chat: special tokens, others (Qwen3's <think>), template
CHATS = {"gpt2": (["<|endoftext|>"], [], None), "llama": (L3, [], LLAMA3), "smol": (IM, [], CHATML),
         "qwen2": (IM, [], CHATML), "qwen3": (IM, ["<think>", "</think>"], QWEN3)}
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
    name = {"llama": "Llama", "smol": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
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
    ("smol", dict(architectures=["MistralForCausalLM"], model_type="mistral"),
     ["MistralForCausalLM", "GPT2LMHeadModel, LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCaus"]),
    ("gpt2", dict(architectures=["GPT2Model"]), ["GPT2Model", "not supported"]),
    ("smol", dict(rope_scaling=dict(type="yarn", factor=4.0)), ["'yarn'"]),
    ("smol", dict(hidden_act="gelu"), ["hidden_act='gelu'"]),
    ("smol", dict(attention_bias=True), ["attention_bias=True"]),
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
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"\0" * 20)
    attempt("model-00002-of-00002.safetensors", "cannot be read")
    (folder / "model-00002-of-00002.safetensors").unlink()
    attempt("model-00002-of-00002.safetensors is missing")
    (folder / "model.safetensors.index.json").unlink()
    attempt("no weights", "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    attempt("no weights", "pytorch_model.bin is another format")
    (folder / "tokenizer.json").write_text("{}")
    attempt("tokenizer.json cannot be read")
    (folder / "tokenizer.json").unlink()
    attempt("no tokenizer.json")
    for text, part in [("{", "not JSON"), ("[]", "no Hugging Face configuration"),
                       ('{"model_type": "llama"}', "not a whole llama configuration")]:
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
    refuses(lambda: go(tmp_path / "a.pt", target), "other files")
    assert (target / "notes.txt").read_text() == "mine"
    shutil.rmtree(target)
    go(tmp_path / "a.pt", target)
    go(tmp_path / "a.pt", target)                       # its own folder is replaced
    assert {p.name for p in target.iterdir()} == {*convert.FILES}


# ---------------------------------------------------------------------------- data/smollm2.py


def test_gguf_rows_are_put_back(monkeypatch):
    """GGUF has each head's channel pairs (i, i + d/2) side by side: 0 3 1 4 2 5 for d = 6."""
    monkeypatch.syspath_prepend(ROOT / "data")
    smollm2 = load_stage("data/smollm2")
    stored = torch.tensor([0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11])[:, None].numpy()
    assert smollm2.unpermute(stored, 2)[:, 0].tolist() == list(range(12))
    assert smollm2.their_name("blk.3.attn_q.weight") == "model.layers.3.self_attn.q_proj.weight"
    assert smollm2.their_name("output_norm.weight") == "model.norm.weight"
