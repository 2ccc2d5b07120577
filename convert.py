"""convert.py: open weights in Hugging Face's format -> a checkpoint of this project, and back.

    python convert.py HuggingFaceTB/SmolLM2-135M-Instruct out/smollm2/base.pt   from the Hub
    python convert.py path/to/folder out/smollm2/base.pt                 from a local folder
    python convert.py out/smollm2/01_sft.pt out/smollm2/hf               and back

GPT-2, Llama 3 (and what shares its architecture: SmolLM2), Mistral where its window spans the whole
context, Qwen2.5 and Qwen3; with attention_bias, mlp_bias and Llama 3's scaling of RoPE. A folder
holds config.json, tokenizer.json (byte-level) and model.safetensors, or its shards. Weights become
fp32, as all checkpoints here are. What goes out comes back equal, bit for bit.

What transformers 5 computes is what is right. Each key of a config.json is read, or is one that
changes no logit, or must be off: else the model is refused in one line.

A model that has a chat of its own keeps it if the template's text and ids are those that this
project writes: fixed text between the turns, contents as they are or stripped. If that holds for a
first question alone (Qwen3 drops <think> from earlier turns), no second one is taken. <|end|> is
the token that closes its turns. Tags that its tokenizer lacks get the ids after its last one:
unused rows of the embedding, or new ones, both the mean of the others.
"""
import hashlib, inspect, json, os, re, shutil, subprocess, sys, tempfile, unicodedata
from dataclasses import asdict
from pathlib import Path

from model import (GPT, GPTConfig, Parser, TAGS, Tokenizer, cannot_read, cannot_write, fail,
                   file_hashes, finite, load, make_tokenizer, read_checkpoint, read_json, save,
                   say, write_text)
import torch                                 # after the kernel, as in the stages: its hook is set

# ---------------------------------------------------------------------------- configurations

FAMILIES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM",
            "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
SUPPORTED = f"{', '.join(FAMILIES.values())} (GPT-2, Llama 3, SmolLM2, Mistral, Qwen2.5, Qwen3)"
LIMITS = dict(                               # a number of a config.json: smallest, largest
    vocab_size=(1, 2 ** 24), n_positions=(1, 2 ** 22), max_position_embeddings=(1, 2 ** 22),
    n_layer=(1, 1024), num_hidden_layers=(1, 1024), n_head=(1, 1024), num_attention_heads=(1, 1024),
    num_key_value_heads=(1, 1024), head_dim=(1, 4096), n_embd=(1, 2 ** 17), n_inner=(1, 2 ** 20),
    hidden_size=(1, 2 ** 17), intermediate_size=(1, 2 ** 20), layer_norm_epsilon=(1e-30, 1),
    rms_norm_eps=(1e-30, 1), rope_theta=(1, 1e9), factor=(1, 1e6), low_freq_factor=(1e-6, 1e6),
    high_freq_factor=(1e-6, 1e6), original_max_position_embeddings=(1, 2 ** 24))
# What changes no logit: names, ids and labels; what acts in training, in generation or on other
# heads; how precisely and with which code transformers computes the same thing.
IDLE = re.compile(
    r"_.*|.*drop(out)?|.*_token_ids?|summary_.*|model_type|architectures|transformers.*|dtype"
    r"|torch_dtype|initializer_range|use_cache|n_ctx|pretraining_tp|reorder_and_upcast_attn"
    r"|output_(attentions|hidden_states)|return_dict|use_return_dict|chunk_size_feed_forward"
    r"|is_decoder|is_llama_config|torchscript|gradient_checkpointing|attn_implementation|id2label"
    r"|label2id|num_labels|problem_type|finetuning_task|task_specific_params|name_or_path"
    r"|tokenizer_class|use_bfloat16|gpt_mini_.*")
# What nothing here takes, and names a part of the computation, in this family or in another one.
PART = re.compile(
    r"attn|attention|window|layer|block|head|hidden|intermediate|embed|posit|rope|rotary|yarn|alibi"
    r"|norm|eps|bias|scal|multipl|factor|cap|act(_|ivation)|mlp|ffn?(_|$)|gate|expert|moe|rout|conv"
    r"|ssm|mamba|resid|logit|causal|cross|rank|lora|quant|compress|group|sink|kv|qk|query|key|value"
    r"|share|prune|per_|decoder|parallel|auto_map|sparse|soft|theta|context|_config|tie_|mtp")


def take(rest, key, kind, *default):
    """Take one value out of the dict: of this type, within its limits. A default of None allows
    null. ValueError, in words."""
    value = rest.pop(key, *default) if default else rest.pop(key, take)
    if value is take:
        raise ValueError(f"it has no {key}")
    if value is None and default == (None,):
        return None
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise ValueError(f"{key}={value!r} is no {kind.__name__}")
    low, high = LIMITS.get(key, (value, value))
    if not low <= value <= high:                       # NaN is refused as well
        raise ValueError(f"{key}={value!r} is outside {low:g} to {high:g}")
    return kind(value)


def read_config(config, path):
    """The dict of a config.json -> GPTConfig, or one line that names what is not supported."""
    if not isinstance(config, dict):
        fail(f"{path} is no Hugging Face configuration")
    family, names = config.get("model_type"), config.get("architectures") or []
    known = isinstance(family, str) and family in FAMILIES
    if not known or names not in ([], [FAMILIES[family]]):
        fail(f"{path}: the architecture {names or family!r} is not supported, only {SUPPORTED}")
    rest = dict(config)
    try:
        sizes = read_gpt2(rest) if family == "gpt2" else read_llama(rest, family)
        for key, usual in [("is_causal", True), ("scale_attn_weights", True)]:
            if rest.pop(key, usual) is not usual:
                raise ValueError(f"{key}={config[key]!r} is not supported")
        off = (None, False, "", [], {})
        left = [k for k in rest if rest[k] not in off and not IDLE.fullmatch(k)]
        for key in filter(PART.search, left):
            raise ValueError(f"{key}={config[key]!r} is not supported: this model computes "
                             "something that model.py has no switch for")
    except ValueError as e:
        fail(f"{path}, a {family} configuration: {e}")
    if left:
        say(f"{path}: keys that transformers does not know either, ignored: {', '.join(left)}")
    return GPTConfig(**sizes, where=f"{path}: ")


def read_gpt2(rest):
    act = rest.pop("activation_function", "gelu_new")
    if act not in ("gelu_new", "gelu_pytorch_tanh"):
        raise ValueError(f"activation_function={act!r} is not supported")
    size = {k: take(rest, k, int) for k in ("vocab_size", "n_positions", "n_layer", "n_head",
                                            "n_embd")}
    return dict(
        block_size=size.pop("n_positions"), n_ff=take(rest, "n_inner", int, None) or 0,
        tied=int(take(rest, "tie_word_embeddings", bool, True)),
        norm_eps=take(rest, "layer_norm_epsilon", float, 1e-5), **size)


def read_llama(rest, family):
    """Llama, Mistral, Qwen2 and Qwen3, with transformers' defaults for what is not said."""
    context, layers, width, heads = (take(rest, k, int) for k in (
        "max_position_embeddings", "num_hidden_layers", "hidden_size", "num_attention_heads"))
    few = take(rest, "num_key_value_heads", int,
               *{"llama": [None], "mistral": [8]}.get(family, [32])) or heads
    head_dim = take(rest, "head_dim", int, 128 if family == "qwen3" else None) or width // heads
    if width % heads and family == "llama":
        raise ValueError(f"num_attention_heads={heads} does not divide hidden_size={width}")
    if (act := rest.pop("hidden_act", "silu")) != "silu":
        raise ValueError(f"hidden_act={act!r} is not supported")
    if rest.pop("layer_types", None) not in (None, ["full_attention"] * layers):
        raise ValueError("layer_types other than full_attention in every layer are not supported")
    if family == "mistral":
        window = rest.pop("sliding_window", 4096)
        if window is not None and not (type(window) is int and window >= context):
            raise ValueError(f"sliding_window={window!r} is shorter than the context of {context}: "
                             "model.py has no switch for it")
    elif family != "llama":                 # Qwen's other keys act where this one is true
        if take(rest, "use_sliding_window", bool, False):
            raise ValueError("use_sliding_window=True is not supported")
        rest.pop("sliding_window", None), rest.pop("max_window_layers", None)
    biases = {k: take(rest, k, bool, False) for k in ("attention_bias", "mlp_bias")[
        : {"llama": 2, "qwen3": 1}.get(family, 0)]}
    attention, mlp = biases.get("attention_bias", False), biases.get("mlp_bias", False)
    if mlp and not attention:
        raise ValueError("mlp_bias without attention_bias is not supported")
    return dict(
        vocab_size=take(rest, "vocab_size", int), block_size=context, n_layer=layers, n_head=heads,
        n_kv_head=few, n_embd=width, head_dim=head_dim, n_ff=take(rest, "intermediate_size", int),
        position="rope", norm="rms", mlp="swiglu", qk_norm=int(family == "qwen3"),
        bias="qkv" if family == "qwen2" else "all" if mlp else "attention" if attention else "none",
        tied=int(take(rest, "tie_word_embeddings", bool, False)),
        norm_eps=take(rest, "rms_norm_eps", float, 1e-6), **read_rope(rest, context))


def read_rope(rest, context):
    """-> rope_theta and Llama 3's scaling. transformers 4 writes rope_theta and rope_scaling, 5
    rope_parameters, and reads rope_scaling where both stand: so they must not contradict."""
    old, new = rest.pop("rope_scaling", None) or {}, rest.pop("rope_parameters", None) or {}
    if not isinstance(old, dict) or not isinstance(new, dict):
        raise ValueError("rope_scaling or rope_parameters is no dict")
    top = {"rope_theta": rest.pop("rope_theta")} if "rope_theta" in rest else {}
    rope = {"rope_theta": 10000.0} | top | (old or new)
    rope["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    for key, value in [*top.items(), *old.items(), *new.items()]:
        if value != rope.get("rope_type" if key == "type" else key):
            raise ValueError(f"rope_theta, rope_scaling and rope_parameters contradict each other "
                             f"on {key}")
    kind, _ = rope.pop("rope_type"), rope.pop("type", None)
    part = [d.pop("partial_rotary_factor", 1) for d in (rope, rest)]
    if kind not in ("default", "llama3") or any(x not in (1, None) for x in part):
        raise ValueError(f"RoPE of the kind {kind!r}, partial_rotary_factor={part}, is not "
                         "supported")
    out = {"rope_theta": take(rope, "rope_theta", float)}
    if kind == "llama3":
        factor, low, high = (take(rope, k, float) for k in (
            "factor", "low_freq_factor", "high_freq_factor"))
        trained = take(rope, "original_max_position_embeddings", int, context)
        if low >= high:
            raise ValueError(f"low_freq_factor={low} is not below high_freq_factor={high}")
        if factor > 1:
            out |= dict(rope_factor=factor, rope_low=low, rope_high=high, rope_context=trained)
    if rope:
        raise ValueError(f"RoPE of the kind {kind!r} with {sorted(rope)[0]} is not supported")
    return out


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
        if cfg.bias == "none":
            return "mistral"
        if cfg.bias == "qkv" and not scaled:
            return "qwen2"
    elif kind == ("rope", "rms", "swiglu", 1) and cfg.bias in ("none", "attention") and not scaled:
        return "qwen3"
    what = ", ".join(f"{k}={getattr(cfg, k)}" for k in (
        "position", "norm", "mlp", "bias", "qk_norm", "n_head", "n_kv_head", "rope_factor"))
    fail(f"{path} belongs to no Hugging Face family that convert.py knows ({what}): it writes "
         "GPT-2 (learned positions, LayerNorm, GELU, biases), Llama, Mistral, Qwen2 and Qwen3 "
         "(RoPE, RMSNorm, SwiGLU)")


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
    more = {"llama": dict(attention_bias=cfg.bias != "none", mlp_bias=cfg.bias == "all"),
            "qwen3": dict(attention_bias=cfg.bias != "none"), "mistral": dict(sliding_window=None)}
    return config | dict(
        max_position_embeddings=cfg.block_size, num_hidden_layers=cfg.n_layer,
        num_attention_heads=cfg.n_head, num_key_value_heads=cfg.n_kv_head, head_dim=cfg.head_dim,
        hidden_size=cfg.n_embd, intermediate_size=cfg.n_ff, rms_norm_eps=cfg.norm_eps,
        hidden_act="silu", rope_theta=cfg.rope_theta, rope_scaling=scaling,
        rope_parameters=(scaling or {"rope_type": "default"}) | {"rope_theta": cfg.rope_theta},
        **more.get(family, {}))


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


def one_line(e):
    return f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"


def shards(folder):
    """The names of the files that hold the weights."""
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if whole.is_file():
        return [whole.name]
    if not index.is_file():
        other = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".gguf", ".pth", ".pt")]
        fail(f"{folder} has no weights: no model.safetensors, nor model.safetensors.index.json"
             + (f" ({other[0]} is another format: save it again with transformers' "
                "save_pretrained)" if other else ""))
    table = read_json(index)
    table = table.get("weight_map") if isinstance(table, dict) else None
    names = set(table.values()) if isinstance(table, dict) and all(
        isinstance(v, str) for v in table.values()) else set()
    for name in [*names] or [""]:
        if Path(name).name != name or not name:
            fail(f"{index} is no index: its weight_map gives each tensor a file of this folder, "
                 f"not {name!r}")
        if not (folder / name).is_file():
            fail(f"{folder / name} is missing: the index names it; download the folder again")
    return sorted(names)


def read_files(folder):
    """All tensors of model.safetensors or of the shards that its index names -> {name: tensor}."""
    from safetensors.torch import load_file
    weights = {}
    for name in shards(folder):
        try:
            part = load_file(folder / name)
        except Exception as e:
            fail(f"{folder / name} cannot be read ({one_line(e)}): download it again")
        if twice := sorted(weights.keys() & part.keys()):
            fail(f"{folder / name} holds {twice[0]}, and so does another file of the index")
        weights |= part
    return weights


def check_numbers(weights, path):
    """Only floats of 16 to 64 bits, and finite as fp32."""
    for name, w in weights.items():
        if w.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            fail(f"{path}: {name} holds {w.dtype}: only float32, bfloat16, float16 and float64 "
                 "are read; a quantized model has to be widened first")
        if not finite(w.float()):
            fail(f"{path}: {name} holds NaN or infinity, or a number too large for fp32: the "
                 "weights are damaged")


def read_weights(folder, cfg, family):
    """A folder's tensors under our names, fp32; every one is used, none is missing."""
    theirs = {k: v for k, v in read_files(folder).items() if not BUFFERS.fullmatch(k)}
    check_numbers(theirs, folder)
    if any(v.dtype == torch.float64 for v in theirs.values()):
        say("float64 weights are rounded to fp32")
    if family == "gpt2":
        theirs = {k if k.startswith(("transformer.", "lm_head.")) else f"transformer.{k}": v
                  for k, v in theirs.items()}
        theirs = {k: turn(k, v) for k, v in theirs.items()}
        for name in [k for k in theirs if ".c_attn." in k]:
            for part, tensor in zip("qkv", theirs.pop(name).chunk(3)):
                theirs[name.replace("c_attn", f"c_attn.{part}")] = tensor.clone()
    if cfg.tied and (head := theirs.pop("lm_head.weight", None)) is not None:
        if not torch.equal(head, theirs.get(their_name("embed.weight", family), head[:0])):
            say("lm_head.weight differs from the embedding: not tied, whatever config.json says")
            cfg.tied, theirs["lm_head.weight"] = 0, head
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
    return {k: v.float() for k, v in ours.items()}


def write_weights(model, family):
    """Our state dict -> {their name: tensor}."""
    theirs = {their_name(k, family): v.contiguous() for k, v in model.items()}
    if family == "gpt2":
        for name in [k for k in theirs if ".c_attn.q." in k]:
            parts = [theirs.pop(name.replace(".q.", f".{x}.")) for x in "qkv"]
            theirs[name.replace(".q.", ".")] = torch.cat(parts)
        theirs = {k: turn(k, v) for k, v in theirs.items()}
    return theirs


# ---------------------------------------------------------------------------- chats

OURS = {"user": "<|user|>", "system": "<|system|>", "system user": "<|user|>",
        "user assistant": "<|assistant|>", "assistant user": "<|end|><|user|>"}
JINJA = ("{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
         "{% if m['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")
TURNS = [["user"], ["system", "user"], ["user", "assistant", "user"],
         ["user", "assistant", "user", "assistant", "user"],
         ["system", "user", "assistant", "user", "assistant", "user"]]
# What the turns say. The ids are compared for the first two: a content that begins with a newline
# is encoded apart from the text before it here, and one with tags has ids of its own.
SAID = ["TURN{}", " TURN{} ", "\n\n  TURN{}\t\n", "<think>\nwhy\n</think>\n\nTURN{}",
        "<think>TURN{}", "'<&>\" {{{{ 1 }}}} {{% %}} Zoë 日本 TURN{}", ""]
CHATS = [(style, [{"role": r, "content": said.format(i)} for i, r in enumerate(roles)])
         for style, said in enumerate(SAID) for roles in TURNS]

SECONDS = 20                                 # for all of a template's chats


def render():
    """What a child process runs, its time and memory bounded: a template is a stranger's program.
    [template, names, chats] on stdin -> their texts as JSON, or one line on stderr."""
    import json, resource, sys
    try:
        for kind, most in [(resource.RLIMIT_CPU, 10), (resource.RLIMIT_AS, 2 ** 30)]:
            resource.setrlimit(kind, (most, most))
    except (ValueError, OSError):
        pass                                   # macOS does not bound memory: the time is bounded
    try:
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def stop(message):
            raise ValueError(message)

        jinja, names, chats = json.load(sys.stdin)
        world = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                              extensions=["jinja2.ext.loopcontrols"])
        world.filters["tojson"] = lambda x, ensure_ascii=False, **more: json.dumps(
            x, ensure_ascii=ensure_ascii, **more)
        template = world.from_string(jinja)
        texts = [template.render(messages=chat, tools=None, documents=None, raise_exception=stop,
                                 add_generation_prompt=True, **names) for chat in chats]
        names["strftime_now"] = lambda form: "today"
        texts.append(template.render(messages=chats[0], tools=None, documents=None,
                                     raise_exception=stop, add_generation_prompt=True, **names))
        if sum(map(len, texts)) > 2 ** 22:
            raise ValueError("it writes more than 4 MB")
        print(json.dumps(texts))
    except Exception as e:
        sys.exit(f"{type(e).__name__}: {e}")


def render_chats(jinja, names):
    """-> the template's text for each of CHATS, and for the first on another day. ValueError, in
    words."""
    tag = r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})"         # transformers' own, changes no text
    jinja = re.sub(tag, lambda m: m[1] + ("endif" if m[2] else "if true") + m[3], jinja)
    try:
        child = subprocess.run(
            [sys.executable, "-c", inspect.getsource(render) + "render()"], timeout=SECONDS,
            input=json.dumps([jinja, names, [chat for _, chat in CHATS]]).encode(),
            capture_output=True, env=os.environ | {"PYTHONIOENCODING": "utf-8"})
    except subprocess.TimeoutExpired:
        raise ValueError("it does not end") from None
    if child.returncode:
        lines = child.stderr.decode(errors="replace").strip().splitlines()
        raise ValueError(" ".join(lines[-1].split())[:200] if lines else "it does not end")
    return json.loads(child.stdout)


def fixed_text(texts):
    """The texts of CHATS -> the text between turns, by roles, read off the first and simplest.
    ValueError where it is not the same each time."""
    found = {}
    for text, (_, chat) in zip(texts, CHATS[:3]):
        before = ""
        for m in chat + [{"role": "assistant", "content": ""}]:
            piece, _, text = text.partition(m["content"]) if m["content"] else (text, "", "")
            if found.setdefault(f"{before} {m['role']}".strip(), piece) != piece or "TURN" in piece:
                raise ValueError(f"what stands before a turn of {m['role']!r} varies")
            before = m["role"]
    return found


def differing(tokenizer, texts):
    """[how many turns, what differs] of the chats that the tokenizer writes in another way than
    the template: other text, or other ids of the same text."""
    hf, spec, out = tokenizer.hf, tokenizer.spec, []
    for text, (style, chat) in zip(texts, CHATS):
        ours, before = "", ""
        for m in chat + [{"role": "assistant", "content": ""}]:
            content = m["content"].strip() if spec.get("strip") else m["content"]
            ours += spec["template"][f"{before} {m['role']}".strip()] + content
            before = m["role"]
        at = len(os.path.commonprefix([ours, text]))
        if ours != text:
            cut = slice(max(0, at - 20), at + 20)
            out.append((len(chat), f"with {len(chat)} turns it writes {text[cut]!r}, not "
                                   f"{ours[cut]!r}"))
        elif style < 2:
            hf.encode_special_tokens = False
            whole = hf.encode(text, add_special_tokens=False).ids
            hf.encode_special_tokens = True
            if whole != tokenizer.chat(chat)[0]:
                out.append((len(chat), f"{text[-60:]!r} has other ids as a whole than by turns"))
    return out


def read_template(spec, chat):
    """The spec with the model's own chat in it, as far as it is fixed text between turns; said."""
    names = {k: v for k, v in chat.items() if k != "chat_template"}
    try:
        *texts, dated = render_chats(chat["chat_template"], names)
        tries = []
        template = fixed_text(texts)
        for more in ({}, {"strip": True}):
            own = spec | {"template": template, "config": chat} | more
            tokenizer = Tokenizer(own)
            if tokenizer.end not in tokenizer.hf.get_added_tokens_decoder():
                raise ValueError(f"no special token closes a turn, but "
                                 f"{template['assistant user']!r}")
            tries.append((differing(tokenizer, texts), own))
        wrong, own = min(tries, key=lambda t: (len(t[0]), "strip" in t[1]))
        if any(turns < 3 for turns, _ in wrong):
            raise ValueError(wrong[0][1])
    except ValueError as e:
        say(f"its chat template cannot be kept ({e}): this project's tags instead")
        return spec
    if template == OURS and not wrong:
        return spec
    end = tokenizer.hf.id_to_token(tokenizer.end)
    say(f"its own chat: {template['user']!r} question {template['user assistant']!r} answer "
          f"{end!r}, which is <|end|> here" + (", contents stripped" if "strip" in own else ""))
    if dated != texts[0]:
        say("it writes today's date: here it stays what the template writes without a clock")
    if wrong:
        say(f"kept for one question and its answer, no second one: {wrong[0][1]}")
        own |= {"template": template | {"assistant user": end}}
    return own


# ---------------------------------------------------------------------------- tokenizers

QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+")          # how Qwen splits text before its merges
EVERY = unicodedata.normalize("NFC", "".join(      # no control characters: SmolLM2 lacks some
    c for c in map(chr, range(32, 0x30000, 61)) if unicodedata.category(c)[0] != "C"))
PROBES = ["a", " a  B", "\n\n12 ", "Zoë 日本\t<think>", "▁x²½ﬁ", EVERY]


def read_object(path):
    """A JSON object of the folder, {} if there is none."""
    found = read_json(path) if os.path.lexists(path) else {}
    if not isinstance(found, dict):
        fail(f"{path} holds no object {{...}}")
    return found


def read_chat(folder):
    """-> special tokens and chat template of tokenizer_config.json, a string each."""
    path, jinja = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    config, old = read_object(path), read_object(folder / "special_tokens_map.json")
    config |= {} if "added_tokens_decoder" in config else old
    template = config.get("chat_template")
    try:
        if os.path.lexists(jinja):
            template = jinja.read_text(encoding="utf-8")
        if isinstance(template, list):                             # several, by name
            template = {t["name"]: t["template"] for t in template}.get("default")
        chat = {k: v["content"] if isinstance(v, dict) else v for k, v in config.items()
                if k.endswith("_token") and v and not isinstance(v, bool)}
        chat |= {"chat_template": template} if template else {}
        if not all(isinstance(v, str) for v in chat.values()):
            raise ValueError("a special token or the chat template is no text")
    except (KeyError, TypeError, ValueError) as e:
        fail(f"{path} or {jinja.name} is not as transformers writes it ({one_line(e)})")
    return chat


def added(tag, i):
    """How a tag stands in a tokenizer.json that convert.py writes."""
    return {"id": i, "content": tag, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True}


def with_added(whole, folder, chat):
    """A tokenizer.json and the tokens that other files of the folder add to it, with their trained
    rows: added_tokens.json, tokenizer_config.json, and the special tokens that the latter names."""
    config, old = (read_object(folder / f"{n}.json") for n in ("tokenizer_config", "added_tokens"))
    tokens = {t["content"]: t for t in whole.get("added_tokens", [])}
    vocab = whole["model"]["vocab"]
    ids = vocab if isinstance(vocab, dict) else {t[0]: i for i, t in enumerate(vocab)}
    more = [added(content, int(i)) for content, i in old.items()]
    more += [added(t["content"], int(i)) | {k: v for k, v in t.items() if k in added("", 0)}
             for i, t in config.get("added_tokens_decoder", {}).items()]
    for t in sorted(more, key=lambda t: t["id"]):
        if t["id"] != tokens.setdefault(t["content"], t)["id"]:
            raise ValueError(f"{t['content']!r} has two ids: {t['id']} and "
                             f"{tokens[t['content']]['id']}")
    named = [v for k, v in chat.items() if k != "chat_template"]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        extra = config.get(key) or []
        named += extra.values() if isinstance(extra, dict) else extra
    for t in [t["content"] if isinstance(t, dict) else t for t in named]:
        if t not in tokens and t not in ids:
            raise ValueError(f"the special token {t!r} of tokenizer_config.json has no id here")
        tokens.setdefault(t, added(t, ids.get(t)))
    return whole | {"added_tokens": sorted(tokens.values(), key=lambda t: t["id"])}


def check_ids(hf, tokens):
    """The tokenizers library numbers added tokens itself: as their file says, or ValueError."""
    for t in tokens:
        if hf.token_to_id(t["content"]) != t["id"]:
            raise ValueError(f"{t['content']!r} has the id {t['id']}, and the tokenizers library "
                             f"gives it {hf.token_to_id(t['content'])}: the ids have holes")


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


def check_tokenizer(tokenizer):
    """By behaviour, whatever its parts are called. ValueError, in words."""
    pieces = {text: tokenizer.encode(text) for text in PROBES}
    for a in PROBES:
        for b in PROBES[:-1]:
            if tokenizer.decode(pieces[a] + pieces[b]) != a + b or pieces[a] != tokenizer.encode(a):
                raise ValueError("it does not give back the text that it is given, piece by piece: "
                                 "only byte-level tokenizers are supported, as those of GPT-2, "
                                 "Llama 3, SmolLM2 and Qwen")
    own = {i: t.content for i, t in tokenizer.hf.get_added_tokens_decoder().items()}
    fixed = {i for ids in tokenizer.between.values() for i in ids if i in own}
    control = fixed | {*tokenizer.control}
    for text in (own[i] for i in control if i in own):
        if control & {*tokenizer.encode(text), *tokenizer.encode(f"x {text} x")}:
            raise ValueError(f"a user's {text!r} would become the control token")


def read_tokenizer(folder, config):
    """-> spec, and how many ids the folder's own tokenizer has."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        fail(f"{folder} has no tokenizer.json: load it with transformers' AutoTokenizer and "
             "save_pretrained, which writes one")
    whole, chat, ours = read_json(path), read_chat(folder), config.get("gpt_mini_tokenizer")
    try:
        whole = with_added(whole, folder, chat)
        spec = {"kind": "json", "json": whole}
        tokenizer = make_tokenizer(spec, path)
        check_ids(tokenizer.hf, whole["added_tokens"])
        size = tokenizer.base
        if ours and ours["sha256"] == file_hashes[str(path)]:    # tiktoken's, and nobody changed it
            return {"kind": "tiktoken", "name": "gpt2"}, size
        if "chat_template" in chat:
            spec = read_template(spec, chat)
        tokenizer = Tokenizer(without_tags(spec))
        check_tokenizer(tokenizer)
    except ValueError as e:
        fail(f"{path}: {e}")
    except (AttributeError, KeyError, OverflowError, TypeError) as e:
        fail(f"{path} or tokenizer_config.json is not as transformers writes it ({one_line(e)})")
    return tokenizer.spec, size


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
    try:
        check_ids(Tokenizer({"kind": "json", "json": whole}).hf, whole["added_tokens"])
    except ValueError as e:
        fail(f"{path}: {e}")
    return whole


# ---------------------------------------------------------------------------- both ways


def download(name):
    """A Hub id -> the folder of its local copy."""
    try:
        from huggingface_hub import snapshot_download
        return snapshot_download(name, allow_patterns=["*.json", "*.jinja", "model*.safetensors"])
    except Exception as e:
        fail(f"{name} is no folder here, and the Hub did not give it ({one_line(e)}); "
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
        say(f"new tags, each the mean of the other rows: "
              f"{' '.join(f'{tag} {i}' for tag, i in new.items())} ({where})")


def import_model(source, target):
    """A Hub id or a folder -> the checkpoint `target`."""
    folder = Path(source if os.path.isdir(source) else download(source))
    if not (folder / "config.json").is_file():
        fail(f"{folder} has no config.json: it is no folder of a Hugging Face model")
    if (folder / "adapter_config.json").exists():
        fail(f"{folder} holds an adapter (adapter_config.json), which transformers puts on top of "
             "the weights: merge it into them first")
    config = read_json(folder / "config.json")
    cfg = read_config(config, folder / "config.json")
    family = config["model_type"]
    read_object(folder / "generation_config.json")
    spec, size = read_tokenizer(folder, config)
    tokenizer, model = Tokenizer(spec), read_weights(folder, cfg, family)
    extend(cfg, model, tokenizer, size)
    if os.path.lexists(target):
        record = read_checkpoint(target).get("record", {})
        if record.get("config") != {"source": source}:
            fail(f"{target} is there already, and no conversion of {source}: choose another name")
    save(target, model=model, gpt=asdict(cfg), tokenizer=spec,
         record={"config": {"source": source}, "inputs": file_hashes})
    count = sum(w.numel() for w in model.values())
    say(f"{target}: {FAMILIES[family]}, {count:,} weights, context {cfg.block_size}, "
          f"{tokenizer.vocab_size} ids")


FILES = ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json",
         "model.safetensors"]


def stamp(folder):
    """What the file of weights says of the files beside it, so that a change is seen."""
    texts = [(folder / name).read_bytes() for name in FILES[:-1]]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()


def check_target(folder):
    """Only what convert.py wrote, and nobody has changed since, is replaced."""
    from safetensors import SafetensorError, safe_open
    if not folder.exists() or folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.is_dir() and {p.name for p in folder.iterdir() if p.is_file()} == {*FILES} == {
            p.name for p in folder.iterdir()}:
        try:
            with safe_open(folder / FILES[-1], "pt") as f:
                if (f.metadata() or {}).get("gpt_mini") == stamp(folder):
                    return
        except SafetensorError:
            pass
    fail(f"{folder} is there already and holds what this command did not write, or was changed "
         "since: choose another folder")


def export_model(source, target):
    """A checkpoint -> the folder `target`, which transformers loads."""
    model, tokenizer, parts = load(source)
    cfg, folder = model.cfg, Path(os.path.realpath(target))
    if tokenizer.kind == "chars":
        fail(f"{source} has a tokenizer of characters, for which Hugging Face has no form: only "
             "checkpoints with tiktoken's gpt2 or a tokenizer.json can be exported, not the toy's")
    family = family_of(cfg, source)
    whole = write_tokenizer(tokenizer, family, source)
    check_target(folder)
    config, text = write_config(cfg, family), json.dumps(whole)
    config["eos_token_id"] = tokenizer.end
    if tokenizer.kind == "tiktoken":
        config["gpt_mini_tokenizer"] = {"sha256": hashlib.sha256(text.encode()).hexdigest()}
    chat = tokenizer.spec.get("config", {"eos_token": "<|end|>", "chat_template": JINJA}) | {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": cfg.block_size,
        "clean_up_tokenization_spaces": False}
    write_folder(folder, write_weights(model.state_dict(), family), {
        "config": config, "tokenizer": whole, "tokenizer_config": chat,
        "generation_config": {"eos_token_id": tokenizer.end}})
    left = [k for k in parts if k not in ("gpt", "tokenizer", "record")]
    say(f"{target}: {FAMILIES[family]}, {cfg.vocab_size} ids"
          + (f"; left out: {', '.join(left)}" if left else ""))


def write_folder(folder, weights, contents):
    """All or nothing: in a new folder beside it, which then takes its place."""
    from safetensors.torch import save_file
    beside = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.new.", dir=folder.parent))
        new = beside / "new"
        new.mkdir()
        for name, content in contents.items():
            text = json.dumps(content, indent=None if name == "tokenizer" else 2)
            write_text(new / f"{name}.json", text)
        save_file(weights, new / FILES[-1], metadata={"format": "pt", "gpt_mini": stamp(new)})
        if folder.exists():
            folder.rename(beside / "old")
        try:
            new.rename(folder)
        except OSError:
            (beside / "old").rename(folder)
            raise
    except Exception as e:
        cannot_write(folder, e)
    finally:
        if beside:
            shutil.rmtree(beside, ignore_errors=True)


def main(args):
    out, back = args.target.endswith(".pt"), args.source.endswith(".pt")
    if out == back or not args.target:
        fail("one of source and target is a checkpoint of this project and ends in .pt: "
             "convert.py FOLDER_OR_HUB_ID NAME.pt, or convert.py NAME.pt FOLDER")
    try:
        (import_model if out else export_model)(args.source, args.target)
    except OSError as e:
        cannot_read(e.filename or args.source, e)


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("source", help="a Hub id, a folder, or a checkpoint NAME.pt")
    parser.add_argument("target", help="a checkpoint NAME.pt, or a folder")
    main(parser.parse_args())
