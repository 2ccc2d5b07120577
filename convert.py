"""convert.py: open weights in Hugging Face's format -> a checkpoint of this project, and back.

    python convert.py HuggingFaceTB/SmolLM2-135M-Instruct out/smollm2/base.pt   from the Hub
    python convert.py path/to/folder out/smollm2/base.pt                 from a local folder
    python convert.py out/smollm2/01_sft.pt out/smollm2/hf               and back

GPT-2, Llama 3 (and what shares its architecture: SmolLM2), Qwen2.5 and Qwen3. A folder holds
config.json, tokenizer.json and model.safetensors, or its shards. Weights become fp32, as all
checkpoints here are. What goes out comes back equal, bit for bit.

A model that has a chat of its own keeps it: the fixed text between turns is read off its chat
template, and <|end|> is the token that closes its turns. Tags that its tokenizer lacks get the ids
after its last one: unused rows of the embedding, or new ones, both the mean of the others.
"""
import argparse, hashlib, json, os, re, shutil
from dataclasses import asdict
from pathlib import Path

import torch
from model import (GPT, GPTConfig, TAGS, Tokenizer, at_least_fp32, cannot_write, fail,
                   file_hashes, load, read_json, save, write_text)

# ---------------------------------------------------------------------------- configurations

FAMILIES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM",
            "qwen3": "Qwen3ForCausalLM"}
SUPPORTED = f"{', '.join(FAMILIES.values())} (GPT-2, Llama 3, SmolLM2, Qwen2.5, Qwen3)"
USUAL = dict(hidden_act="silu", partial_rotary_factor=1.0, use_sliding_window=False,
             quantization_config=None, scale_attn_weights=True, add_cross_attention=False,
             scale_attn_by_inverse_layer_idx=False)     # what the kernel has no switch for


def read_config(config, path):
    """The dict of a config.json -> GPTConfig, or one line that names what is not supported."""
    if not isinstance(config, dict):
        fail(f"{path} is no Hugging Face configuration")
    family = config.get("model_type")
    names = config.get("architectures") or [FAMILIES.get(family)]
    if family not in FAMILIES or names[0] != FAMILIES[family]:
        fail(f"{path}: the architecture {names[0] or family!r} is not supported, only {SUPPORTED}")
    odd = [k for k, usual in USUAL.items() if config.get(k, usual) != usual]
    odd += [k for k in ["layer_types"] if set(config.get(k) or []) - {"full_attention"}]
    if odd:
        fail(f"{path}: {odd[0]}={config[odd[0]]!r} is not supported: this model computes something "
             "that model.py has no switch for")
    try:
        return read_gpt2(config) if family == "gpt2" else read_llama(config, family)
    except (KeyError, TypeError) as e:
        fail(f"{path} is not a whole {family} configuration: {e!r}")
    except ValueError as e:
        fail(f"{path}: {e} is not supported: this model computes something that model.py has no "
             "switch for")


def read_gpt2(config):
    if config.get("activation_function", "gelu_new") not in ("gelu_new", "gelu_pytorch_tanh"):
        raise ValueError(f"activation_function={config['activation_function']!r}")
    return GPTConfig(
        vocab_size=config["vocab_size"], block_size=config["n_positions"],
        n_layer=config["n_layer"], n_head=config["n_head"], n_embd=config["n_embd"],
        n_ff=config.get("n_inner") or 0, tied=int(config.get("tie_word_embeddings", True)),
        norm_eps=config.get("layer_norm_epsilon", 1e-5))


def read_llama(config, family):
    """Llama, Qwen2 and Qwen3; RoPE as transformers 4 writes it (rope_theta, rope_scaling) or 5."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    bias = [bool(config.get(k)) for k in ("attention_bias", "mlp_bias")]
    if kind not in ("default", "llama3") or rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"RoPE of the kind {kind!r}")
    if bias[0] != bias[1] or family != "llama" and bias[0]:
        raise ValueError(f"attention_bias={bias[0]} with mlp_bias={bias[1]}")
    scaling = {} if kind == "default" else dict(
        rope_factor=float(rope["factor"]), rope_low=float(rope["low_freq_factor"]),
        rope_high=float(rope["high_freq_factor"]),
        rope_context=rope["original_max_position_embeddings"])
    return GPTConfig(
        vocab_size=config["vocab_size"], block_size=config["max_position_embeddings"],
        n_layer=config["num_hidden_layers"], n_head=config["num_attention_heads"],
        n_kv_head=config.get("num_key_value_heads") or 0, n_embd=config["hidden_size"],
        head_dim=config.get("head_dim") or (128 if family == "qwen3" else 0),
        n_ff=config["intermediate_size"], position="rope", norm="rms", mlp="swiglu",
        bias="qkv" if family == "qwen2" else "all" if bias[0] else "none",
        qk_norm=int(family == "qwen3"), tied=int(config.get("tie_word_embeddings", False)),
        rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        norm_eps=config.get("rms_norm_eps", 1e-6), **scaling)


def family_of(cfg, path):
    """The family of FAMILIES that computes what this configuration says, or one line."""
    kind, scaled = (cfg.position, cfg.norm, cfg.mlp, cfg.qk_norm), cfg.rope_factor > 1
    even = cfg.n_head * cfg.head_dim == cfg.n_embd
    if kind == ("learned", "layer", "gelu", 0):
        if cfg.bias == "all" and cfg.n_kv_head == cfg.n_head and even:
            return "gpt2"
    elif kind == ("rope", "rms", "swiglu", 0):
        if cfg.bias != "qkv" and cfg.n_embd % cfg.n_head == 0:
            return "llama"
        if cfg.bias == "qkv" and not scaled:
            return "qwen2"
    elif kind == ("rope", "rms", "swiglu", 1) and cfg.bias == "none" and not scaled:
        return "qwen3"
    what = ", ".join(f"{k}={getattr(cfg, k)}" for k in (
        "position", "norm", "mlp", "bias", "qk_norm", "n_head", "n_kv_head", "rope_factor"))
    fail(f"{path} belongs to no Hugging Face family that convert.py knows ({what}): it writes "
         "GPT-2 (learned positions, LayerNorm, GELU, biases), Llama, Qwen2 and Qwen3 (RoPE, "
         "RMSNorm, SwiGLU)")


def write_config(cfg, family):
    """GPTConfig -> the dict of a config.json that transformers 4 and 5 read."""
    config = dict(architectures=[FAMILIES[family]], model_type=family, vocab_size=cfg.vocab_size,
                  tie_word_embeddings=bool(cfg.tied), dtype="float32", torch_dtype="float32",
                  bos_token_id=None)
    if family == "gpt2":
        return config | dict(
            n_positions=cfg.block_size, n_embd=cfg.n_embd, n_layer=cfg.n_layer, n_head=cfg.n_head,
            n_inner=cfg.n_ff, layer_norm_epsilon=cfg.norm_eps, activation_function="gelu_new",
            attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    scaling = None if cfg.rope_factor <= 1 else dict(
        rope_type="llama3", factor=cfg.rope_factor, low_freq_factor=cfg.rope_low,
        high_freq_factor=cfg.rope_high, original_max_position_embeddings=cfg.rope_context)
    biases = cfg.bias == "all"
    return config | dict(
        max_position_embeddings=cfg.block_size, num_hidden_layers=cfg.n_layer,
        num_attention_heads=cfg.n_head, num_key_value_heads=cfg.n_kv_head, head_dim=cfg.head_dim,
        hidden_size=cfg.n_embd, intermediate_size=cfg.n_ff, rms_norm_eps=cfg.norm_eps,
        hidden_act="silu", rope_theta=cfg.rope_theta, rope_scaling=scaling,
        rope_parameters=(scaling or {"rope_type": "default"}) | {"rope_theta": cfg.rope_theta},
        **({"attention_bias": biases, "mlp_bias": biases} if family == "llama" else {}))


# ---------------------------------------------------------------------------- weights

LLAMA = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head",
         "blocks": "model.layers", "norm1": "input_layernorm", "norm2": "post_attention_layernorm",
         "attention.q": "self_attn.q_proj", "attention.k": "self_attn.k_proj",
         "attention.v": "self_attn.v_proj", "attention.proj": "self_attn.o_proj",
         "attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm",
         "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.proj": "mlp.down_proj"}
GPT2 = {"embed": "transformer.wte", "positions": "transformer.wpe", "norm": "transformer.ln_f",
        "head": "lm_head", "blocks": "transformer.h", "norm1": "ln_1", "norm2": "ln_2",
        "attention.q": "attn.c_attn.q", "attention.k": "attn.c_attn.k",
        "attention.v": "attn.c_attn.v", "attention.proj": "attn.c_proj", "mlp.up": "mlp.c_fc",
        "mlp.proj": "mlp.c_proj"}
BUFFERS = re.compile(r".*\.attn\.(masked_)?bias|.*rotary_emb\.inv_freq")


def their_name(name, family):
    """"blocks.3.mlp.up.weight" -> "model.layers.3.mlp.up_proj.weight"."""
    table, (part, kind) = GPT2 if family == "gpt2" else LLAMA, name.rsplit(".", 1)
    if part.startswith("blocks."):
        _, n, part = part.split(".", 2)
        return f"{table['blocks']}.{n}.{table[part]}.{kind}"
    return f"{table[part]}.{kind}"


def turn(name, tensor):
    """GPT-2 keeps the matrices of its blocks as (in, out); a Linear has (out, in)."""
    return tensor.t().contiguous() if ".h." in name and tensor.ndim == 2 else tensor


def read_files(folder):
    """All tensors of model.safetensors or of the shards that its index names -> {name: tensor}."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not whole.is_file() and not index.is_file():
        other = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".gguf", ".pth", ".pt")]
        fail(f"{folder} has no weights: no model.safetensors, nor model.safetensors.index.json"
             + (f" ({other[0]} is another format: save it again with transformers' "
                "save_pretrained)" if other else ""))
    files = [whole.name] if whole.is_file() else sorted(
        set(read_json(index).get("weight_map", {}).values()))
    weights = {}
    for name in files:
        if not (folder / name).is_file():
            fail(f"{folder / name} is missing: the index names it; download the folder again")
        try:
            weights |= load_file(folder / name)
        except (SafetensorError, OSError) as e:
            fail(f"{folder / name} cannot be read ({e}): download it again")
    return weights


def read_weights(folder, cfg, family):
    """A folder's tensors under our names, fp32; every one is used, none is missing."""
    theirs = {k: v for k, v in read_files(folder).items() if not BUFFERS.fullmatch(k)}
    if family == "gpt2":
        theirs = {k if k.startswith(("transformer.", "lm_head.")) else f"transformer.{k}": v
                  for k, v in theirs.items()}
        theirs = {k: turn(k, v) for k, v in theirs.items()}
        for name in [k for k in theirs if ".c_attn." in k]:
            for part, tensor in zip("qkv", theirs.pop(name).chunk(3)):
                theirs[name.replace("c_attn", f"c_attn.{part}")] = tensor.clone()
    if cfg.tied:
        theirs.pop("lm_head.weight", None)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in GPT(cfg).state_dict().items()}
    ours = {name: theirs.pop(their_name(name, family), None) for name in shapes}
    for name, shape in shapes.items():
        if ours[name] is None or ours[name].shape != shape:
            found = "missing" if ours[name] is None else f"of shape {tuple(ours[name].shape)}"
            fail(f"{folder}: config.json and the weights do not match: {their_name(name, family)} "
                 f"is {found}, expected {tuple(shape)} or its transpose")
    if theirs:
        fail(f"{folder}: config.json and the weights do not match: nothing here takes "
             f"{sorted(theirs)[0]} ({len(theirs)} such tensors)")
    return {k: at_least_fp32(v) for k, v in ours.items()}


def write_weights(model, family):
    """Our state dict -> {their name: tensor}."""
    theirs = {their_name(k, family): v.contiguous() for k, v in model.items()}
    if family == "gpt2":
        for name in [k for k in theirs if ".c_attn.q." in k]:
            parts = [theirs.pop(name.replace(".q.", f".{x}.")) for x in "qkv"]
            theirs[name.replace(".q.", ".")] = torch.cat(parts)
        theirs = {k: turn(k, v) for k, v in theirs.items()}
    return theirs


# ---------------------------------------------------------------------------- tokenizers

OURS = {"user": "<|user|>", "system": "<|system|>", "system user": "<|user|>",
        "user assistant": "<|assistant|>", "assistant user": "<|end|><|user|>"}
JINJA = ("{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
         "{% if m['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")
KEPT = ["bos_token", "eos_token", "unk_token", "pad_token", "chat_template"]
QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+")          # how Qwen splits text before its merges
PROBES = ["a", " a b", "\n\n12 ", "Zoë 日本\t<think>"]


def fixed_text(jinja, names):
    """A chat template -> the text between turns, by roles, found by rendering three short chats.
    ValueError, in words, where it is not the same each time."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def stop(message):
        raise ValueError(message)

    world = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                          extensions=["jinja2.ext.loopcontrols"])
    world.filters["tojson"] = lambda x, **_: json.dumps(x, ensure_ascii=False)
    found = {}
    for roles in (["user"], ["system", "user"], ["user", "assistant", "user"]):
        turns = [{"role": r, "content": f"TURN{i}"} for i, r in enumerate(roles)]
        try:
            text = world.from_string(jinja).render(
                messages=turns, add_generation_prompt=True, raise_exception=stop, **names)
        except Exception as e:
            raise ValueError(f"{type(e).__name__}: {e}") from None
        before = ""
        for role, mark in zip(roles + ["assistant"], [m["content"] for m in turns] + [""]):
            piece, _, text = text.partition(mark) if mark else (text, "", "")
            if found.setdefault(f"{before} {role}".strip(), piece) != piece or "TURN" in piece:
                raise ValueError(f"what stands before a turn of {role!r} varies")
            before = role
    return found


def read_chat(folder):
    """-> (special tokens and chat template of tokenizer_config.json, a string each)."""
    path, jinja = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    config = read_json(path) if path.is_file() else {}
    if jinja.is_file():
        config["chat_template"] = jinja.read_text()
    if isinstance(config.get("chat_template"), list):          # several, by name
        named = {t["name"]: t["template"] for t in config["chat_template"]}
        config["chat_template"] = named.get("default")
    text = lambda x: x["content"] if isinstance(x, dict) else x
    return {k: text(config[k]) for k in KEPT if config.get(k)}


def added(tag, i):
    """How a tag stands in a tokenizer.json that convert.py writes."""
    return {"id": i, "content": tag, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True}


def without_tags(spec):
    """A tokenizer.json less the tags at its end that convert.py wrote: the Tokenizer gives them the
    same ids again, or they stay."""
    tokens = list(spec["json"].get("added_tokens", []))
    while tokens and tokens[-1] in [added(tag, tokens[-1]["id"]) for tag in TAGS]:
        tokens.pop()
    if tokens == spec["json"].get("added_tokens", []):
        return spec
    bare = spec | {"json": spec["json"] | {"added_tokens": tokens}}
    return bare if Tokenizer(bare).tags == Tokenizer(spec).tags else spec


def read_tokenizer(folder, config):
    """-> spec, and how many ids the folder's own tokenizer has."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        fail(f"{folder} has no tokenizer.json: load it with transformers' AutoTokenizer and "
             "save_pretrained, which writes one")
    spec, chat = {"kind": "json", "json": read_json(path)}, read_chat(folder)
    try:
        size = Tokenizer(spec).base
        ours = config.get("gpt_mini_tokenizer")
        if ours and ours["sha256"] == file_hashes[str(path)]:     # tiktoken's, and nobody changed it
            return ours["spec"], size
        if "chat_template" in chat:
            spec = read_template(spec, chat)
        tokenizer = Tokenizer(without_tags(spec))
    except Exception as e:
        fail(f"{path} cannot be read ({type(e).__name__}: {e}): is it a tokenizer.json?")
    if [tokenizer.decode(tokenizer.encode(text)) for text in PROBES] != PROBES:
        fail(f"{path} does not give back the text that it is given, piece by piece: only "
             "byte-level tokenizers are supported, as those of GPT-2, Llama 3, SmolLM2 and Qwen")
    return tokenizer.spec, size


def read_template(spec, chat):
    """The spec with the model's own chat in it, if that is fixed text between turns; said."""
    try:
        names = {k: v for k, v in chat.items() if k != "chat_template"}
        template = fixed_text(chat["chat_template"], names)
        own = spec | {"template": template, "config": chat}
        tokenizer = Tokenizer(own)
        if tokenizer.end not in tokenizer.hf.get_added_tokens_decoder():
            raise ValueError(f"no special token closes a turn, but {template['assistant user']!r}")
    except ValueError as e:
        print(f"its chat template cannot be kept ({e}): this project's tags instead")
        return spec
    if template == OURS:
        return spec
    end = tokenizer.hf.id_to_token(tokenizer.end)
    print(f"its own chat: {template['user']!r} question {template['user assistant']!r} answer "
          f"{end!r}, which is <|end|> here")
    return own


def gpt2_json():
    """tiktoken's gpt2 as a tokenizer.json. A token's rank says when it was merged; from which two
    parts, its own merging says, with the earlier ranks alone."""
    import tiktoken
    from tokenizers import AddedToken, Tokenizer as HF, decoders, models, pre_tokenizers
    ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]      # GPT-2's printable bytes
    odd = [b for b in range(256) if b not in kept]
    char = {b: chr(b) for b in kept} | {b: chr(256 + i) for i, b in enumerate(odd)}
    text, merges = lambda token: "".join(char[b] for b in token), []
    for token in sorted(ranks, key=ranks.get):
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            i = min(range(len(parts) - 1),
                    key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        merges += [tuple(map(text, parts))] if len(parts) == 2 else []
    hf = HF(models.BPE({text(token): rank for token, rank in ranks.items()}, merges))
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.decoder = decoders.ByteLevel()
    hf.add_special_tokens([AddedToken("<|endoftext|>", normalized=False)])
    return json.loads(hf.to_str())


def write_tokenizer(tokenizer, family, path):
    """-> the dict of a tokenizer.json in which the tags have the ids that they have here."""
    spec = tokenizer.spec
    if spec.get("name", "gpt2") != "gpt2":
        fail(f"{path}: of tiktoken's tokenizers only gpt2 can be exported, not {spec['name']}")
    whole = gpt2_json() if tokenizer.kind == "tiktoken" else spec["json"]
    tags = [added(tag, i) for tag, i in tokenizer.tags.items() if i >= tokenizer.base]
    whole = whole | {"added_tokens": whole.get("added_tokens", []) + tags}
    if family == "qwen2" and json.dumps(QWEN) not in json.dumps(whole.get("pre_tokenizer")):
        fail(f"{path} has Qwen2's architecture and another tokenizer: transformers would read it "
             "with Qwen2's own rules, whatever its tokenizer.json says, and give other ids")
    again = Tokenizer({"kind": "json", "json": whole}).hf
    wrong = [t["content"] for t in whole["added_tokens"]
             if again.token_to_id(t["content"]) != t["id"]]
    if wrong:
        fail(f"{path}: the tokenizers library gives {wrong[0]} another id: the ids have holes")
    return whole


# ---------------------------------------------------------------------------- both ways


def download(name):
    """A Hub id -> the folder of its local copy."""
    try:
        from huggingface_hub import snapshot_download
        return snapshot_download(name, allow_patterns=["*.json", "*.jinja", "*.safetensors"])
    except Exception as e:
        what = " ".join(str(e).split())[:120]
        fail(f"{name} is no folder here, and the Hub did not give it ({type(e).__name__}: {what}); "
             "check the name and the network, log in if the model asks for it, or download its "
             "files elsewhere and pass the folder")


def extend(cfg, model, tokenizer, size):
    """Rows for the tags that the folder's tokenizer (of `size` ids) lacks: the mean of the others,
    in rows of padding that no id used, or appended."""
    rows = cfg.vocab_size
    if size > rows or rows - size > 1024:
        fail(f"tokenizer and weights do not match: the tokenizer has {size} ids, the embedding "
             f"{rows} rows")
    new = {tag: i for tag, i in tokenizer.tags.items() if i >= size}
    cfg.vocab_size = max(rows, tokenizer.vocab_size)
    for name in ["embed.weight", "head.weight"][: 1 if cfg.tied else 2]:
        mean = model[name][:size].mean(0, keepdim=True)
        model[name] = torch.cat([model[name], mean.expand(cfg.vocab_size - rows, -1)])
        model[name][list(new.values())] = mean
    if new:
        where = (f"the embedding grows from {rows} to {cfg.vocab_size} rows"
                 if cfg.vocab_size > rows else f"rows that no token used, of {rows}")
        print(f"new tags, each the mean of the other rows: "
              f"{' '.join(f'{tag} {i}' for tag, i in new.items())} ({where})")


def import_model(source, target):
    """A Hub id or a folder -> the checkpoint `target`."""
    folder = Path(source if os.path.isdir(source) else download(source))
    if not (folder / "config.json").is_file():
        fail(f"{folder} has no config.json: it is no folder of a Hugging Face model")
    config = read_json(folder / "config.json")
    cfg = read_config(config, folder / "config.json")
    family = config["model_type"]
    spec, size = read_tokenizer(folder, config)
    tokenizer, model = Tokenizer(spec), read_weights(folder, cfg, family)
    extend(cfg, model, tokenizer, size)
    save(target, model=model, gpt=asdict(cfg), tokenizer=spec,
         record={"config": {"source": source}, "inputs": file_hashes})
    count = sum(w.numel() for w in model.values())
    print(f"{target}: {FAMILIES[family]}, {count:,} weights, context {cfg.block_size}, "
          f"{tokenizer.vocab_size} ids")


FILES = ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json",
         "model.safetensors"]


def export_model(source, target):
    """A checkpoint -> the folder `target`, which transformers loads."""
    from safetensors.torch import save_file
    model, tokenizer, parts = load(source)
    cfg, folder, new = model.cfg, Path(target), Path(f"{target.rstrip('/')}.new")
    if "head" in parts:
        fail(f"{source} is a reward model: its head has no place in a language model's folder")
    if tokenizer.kind == "chars":
        fail(f"{source} has a tokenizer of characters, for which Hugging Face has no form: only "
             "checkpoints with tiktoken's gpt2 or a tokenizer.json can be exported, not the toy's")
    family = family_of(cfg, source)
    whole = write_tokenizer(tokenizer, family, source)
    if folder.exists() and (not folder.is_dir() or {p.name for p in folder.iterdir()} - {*FILES}):
        fail(f"{target} is there already and holds other files: choose another folder")
    config, text = write_config(cfg, family), json.dumps(whole)
    config["eos_token_id"] = tokenizer.end
    if tokenizer.kind == "tiktoken":
        config["gpt_mini_tokenizer"] = {"spec": tokenizer.spec,
                                        "sha256": hashlib.sha256(text.encode()).hexdigest()}
    chat = tokenizer.spec.get("config", {"eos_token": "<|end|>", "chat_template": JINJA}) | {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": cfg.block_size,
        "clean_up_tokenization_spaces": False}
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        save_file(write_weights(model.state_dict(), family), new / "model.safetensors",
                  metadata={"format": "pt"})
        write_text(new / "tokenizer.json", text)
        for name, content in [("config", config), ("tokenizer_config", chat),
                              ("generation_config", {"eos_token_id": tokenizer.end})]:
            write_text(new / f"{name}.json", json.dumps(content, indent=2))
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    except OSError as e:
        cannot_write(target, e)
    left = [k for k in parts if k not in ("gpt", "tokenizer", "record")]
    print(f"{target}: {FAMILIES[family]}, {cfg.vocab_size} ids"
          + (f"; left out: {', '.join(left)}" if left else ""))


def main(args):
    out, back = args.target.endswith(".pt"), args.source.endswith(".pt")
    if out == back:
        fail("one of source and target is a checkpoint of this project and ends in .pt: "
             "convert.py FOLDER_OR_HUB_ID NAME.pt, or convert.py NAME.pt FOLDER")
    (import_model if out else export_model)(args.source, args.target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a Hub id, a folder, or a checkpoint NAME.pt")
    parser.add_argument("target", help="a checkpoint NAME.pt, or a folder")
    main(parser.parse_args())
