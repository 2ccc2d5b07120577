"""model.py: the kernel. One GPT, its tokenizers, rollouts, verifier and checkpoints.

Every stage imports this file and no other, and none of them changes it. One section at a time:

    errors        one clear line instead of a traceback
    tokenizers    characters, tiktoken's gpt2, a Hugging Face tokenizer.json; the chat template
    rows          JSONL and .bin files -> Python; padding; which rows a step sees
    GPT           GPT-2 by default; a few switches reach the Llama and Qwen family
    generate      the one rollout engine: KV cache, ragged prompts, continuous batching
    verify        the one verifier
    optimizers    AdamW, or Muon on the matrices and AdamW on the rest
    scale         compile, checkpointing, FSDP2 or DDP: speed and memory, never results
    ranks and log torchrun's ranks, sums over them, Ctrl-C, one line a step
    checkpoints   atomic, strict, without pickle execution
"""
import atexit, hashlib, json, math, os, re, shutil, signal, sys, threading, time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from fractions import Fraction

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------------------------------------- errors


def fail(message, code=2):
    """Print one line on stderr (rank 0 alone) and leave with this exit code, on every rank."""
    if os.environ.get("RANK", "0") == "0":
        print(message if code == 130 else f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)


LEAST = dict(steps=1, batch_size=1, micro_batch=1, eval_every=1, save_every=1, warmup=0, lr=0,
             grad_clip=0, group_size=2, minibatches=1, epochs=1, max_new=1, temperature=1e-3,
             eval_rows=1, seed=0, max_rounds=1, overlong=0)


# ---------------------------------------------------------------------------- tokenizers

TAGS = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>",
        "<think>", "</think>", "<answer>", "</answer>"]


class Tokenizer:
    """Text <-> ids. `spec` is plain JSON and travels inside the checkpoint:
    {"kind": "chars", "chars": "..."}, {"kind": "tiktoken", "name": "gpt2"} or
    {"kind": "json", "json": {a Hugging Face tokenizer.json}}. The tags get the ids after the base.

    A tokenizer.json may bring a chat of its own: "template", the fixed text between turns, by the
    roles before and after ("user": at the start, "user assistant", "assistant user", ...). Then
    <|end|> is the token that closes its assistant's turns, and only the reasoning tags that it
    lacks get new ids. "config" is what convert.py hands back to a tokenizer_config.json.

    `encode` never yields a tag, whatever the text says; `encode_completion` and the template do.
    """

    def __init__(self, spec):
        self.spec, kind, own, self.between = spec, spec.get("kind"), {}, {}
        if kind == "chars":
            self.chars = spec["chars"]
            self.index = {c: i for i, c in enumerate(self.chars)}
            base = len(self.chars)
        elif kind == "tiktoken":
            import tiktoken
            try:
                self.bpe = tiktoken.get_encoding(spec["name"])
            except Exception as e:
                fail(f"tiktoken cannot load {spec['name']!r} ({type(e).__name__}): it downloads "
                     "its files once; go online, or set TIKTOKEN_CACHE_DIR to a folder with them")
            base = self.bpe.n_vocab
        elif kind == "json":
            import tokenizers
            self.hf = tokenizers.Tokenizer.from_str(json.dumps(as_control(spec["json"])))
            self.hf.no_truncation()
            self.hf.no_padding()
            for roles, text in spec.get("template", {}).items():
                self.between[roles] = self.hf.encode(text, add_special_tokens=False).ids
            self.hf.encode_special_tokens = True     # "<|im_start|>" in user text stays text
            own = {t.content: i for i, t in self.hf.get_added_tokens_decoder().items()}
            base = 1 + max(self.hf.get_vocab(with_added_tokens=True).values())
        else:
            fail(f"unknown tokenizer kind {kind!r}: expected chars, tiktoken or json")
        if self.between:
            own["<|end|>"] = self.between["assistant user"].pop(0)
        wanted = TAGS[:1] + TAGS[4 if self.between else 1:]
        new = [tag for tag in wanted if tag not in own]
        ids = own | {tag: base + i for i, tag in enumerate(new)}
        self.kind, self.base, self.vocab_size = kind, base, base + len(new)
        self.tags = {tag: ids[tag] for tag in wanted}
        self.control = {i: tag for tag, i in self.tags.items()}
        self.end = self.tags["<|end|>"]

    def encode(self, text):
        """Plain text -> ids; tags in it stay text. ValueError on unknown characters."""
        if self.kind == "chars":
            try:
                return [self.index[c] for c in text]
            except KeyError as e:
                raise ValueError(f"the character {e.args[0]!r} is not in the tokenizer") from None
        if self.kind == "tiktoken":
            return self.bpe.encode_ordinary(text)
        return self.hf.encode(text, add_special_tokens=False).ids

    def encode_completion(self, text):
        """As encode, but the tags that a completion may write become their single ids."""
        ids = []
        for piece in re.split("(</?think>|</?answer>)", text):
            ids += [self.tags[piece]] if piece in self.tags else self.encode(piece) if piece else []
        return ids

    def decode(self, ids):
        """ids -> text, tags written out."""
        out, plain = [], []
        for i in list(ids) + [None]:
            if i is not None and i < self.base and i not in self.control:
                plain.append(i)
                continue
            if plain:
                out.append("".join(self.chars[j] for j in plain) if self.kind == "chars"
                           else self.bpe.decode(plain) if self.kind == "tiktoken"
                           else self.hf.decode(plain, skip_special_tokens=False))
                plain = []
            if i is not None:
                out.append(self.control.get(i, ""))     # "": padding ids
        return "".join(out)

    def header(self, before, role):
        """The ids that open a turn of `role` after one of `before` ("" at the start)."""
        if not self.between:
            return [self.tags[f"<|{role}|>"]]
        if f"{before} {role}".strip() not in self.between:
            raise ValueError(f"this model's own chat has no {role!r} turn "
                             + (f"after a turn of {before!r}" if before else "at the start"))
        return self.between[f"{before} {role}".strip()]

    def chat(self, messages):
        """[{"role", "content"}, ...] -> ids, completion_mask (lists of equal length).

        The mask comes from the roles: 1 on an assistant's content and the <|end|> that closes it,
        0 on everything else. Each turn is encoded apart, so that no merge crosses a seam and the
        prompt has the same ids in training and in rollouts. If the last turn is the user's, the
        assistant's header is appended: this is the prompt to complete.
        """
        ids, mask, before = [], [], ""
        for m in messages:
            new, head = m["role"] == "assistant", self.header(before, m["role"])
            body = (self.encode_completion if new else self.encode)(m["content"])
            body = body + [self.end] * new
            ids += head + body
            mask += [0] * len(head) + [int(new)] * len(body)
            before = m["role"]
        if before != "assistant":
            head = self.header(before, "assistant")
            ids, mask = ids + head, mask + [0] * len(head)
        return ids, mask

    def prompt(self, prompt, primer=""):
        """A prompt (string or messages) -> ids up to where the completion begins.
        `primer` opens the completion, for example "<think>"."""
        ids, _ = self.chat(turns(prompt))
        return ids + self.encode_completion(primer)


def as_control(spec):
    """A tokenizer.json with every added <tag> as a special token: Qwen3's <think> is none, and
    could be written by a user."""
    tag = lambda t: t["content"][:1] == "<" and t["content"][-1:] == ">"
    return spec | {"added_tokens": [t | {"special": t.get("special", False) or tag(t)}
                                    for t in spec.get("added_tokens", [])]}


def turns(prompt):
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def load_tokenizer(path):
    """tokenizer.json: one of our specs, or a file of the tokenizers library."""
    spec = read_json(path)
    return Tokenizer(spec if "kind" in spec else {"kind": "json", "json": spec})


# ---------------------------------------------------------------------------- rows

inputs = {}   # every file that this process has read -> its hash, for the checkpoint's record


def read_bytes(path, made_by=""):
    """The bytes of a file, remembered by hash. A missing file names the command that makes it."""
    if not os.path.isfile(path):
        fail(f"{path} is missing" + (f": run {made_by} first" if made_by else ""))
    with open(path, "rb") as f:
        raw = f.read()
    inputs[str(path)] = hashlib.sha256(raw).hexdigest()
    return raw


def prepares(path):
    """The command that makes the data file `path`, by the name of its folder."""
    name = os.path.basename(os.path.dirname(os.path.abspath(path)))
    made_by = os.path.join(os.path.dirname(os.path.realpath(__file__)), "data", f"{name}.py")
    return f"python data/{name}.py" if os.path.isfile(made_by) else "its script in data/"


def read_json(path):
    try:
        return json.loads(read_bytes(path, prepares(path)))
    except ValueError as e:
        fail(f"{path} is not JSON: {e}")


def read_rows(path, *keys):
    """JSONL -> list of dicts that all have `keys`; each key may be alternatives, "a|b"."""
    rows = []
    for n, line in enumerate(read_bytes(path, prepares(path)).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as e:
            fail(f"{path}, line {n}: not JSON ({e}); every line is one object")
        for key in keys:
            if not isinstance(row, dict) or all(
                    row.get(k) in (None, "", []) for k in key.split("|")):
                fail(f"{path}, line {n}: no {key.replace('|', ' or ')!r}, or empty; "
                     f"a row here needs {', '.join(keys)}")
        rows.append(row | {"line": n})
    if not rows:
        fail(f"{path} has no rows: run {prepares(path)} again")
    return rows


def encode_rows(rows, path, encode, block_size):
    """[encode(row) -> (ids, ...)] for the rows whose ids all fit the context.

    Rows that are too long are dropped and counted, never cut: a cut completion would lose its end.
    """
    kept, dropped = [], 0
    for row in rows:
        try:
            items = encode(row)
        except (ValueError, KeyError, TypeError) as e:
            what = e if isinstance(e, ValueError) else f"not in the format: {e!r}"
            fail(f"{path}, line {row['line']}: {what}")
        if max(len(ids) for ids, _ in items) > block_size:
            dropped += 1
        else:
            kept.append(items)
    if dropped and os.environ.get("RANK", "0") == "0":
        print(f"{path}: {dropped} of {len(rows)} rows are longer than the context of {block_size} "
              "tokens and were dropped", flush=True)
    if not kept:
        fail(f"{path}: no row fits the context of {block_size} tokens; use a longer one")
    return kept


def read_tokens(path, tokenizer):
    """A .bin of ids -> np.memmap. The vocabulary decides the ids' width, as in data/."""
    if not os.path.isfile(path):
        fail(f"{path} is missing: run {prepares(path)} first")
    dtype = np.uint16 if tokenizer.vocab_size <= 2 ** 16 else np.uint32
    ids = np.memmap(path, dtype=dtype, mode="r") if os.path.getsize(path) else np.zeros(0, dtype)
    if len(ids) < 2 or int(ids[: 2 ** 20].max()) >= tokenizer.vocab_size:
        fail(f"{path} is empty or was written with another tokenizer: run {prepares(path)} again")
    edge = ids[: 2 ** 20].tobytes() + ids[-2 ** 20:].tobytes()      # a corpus may have many GB
    inputs[str(path)] = hashlib.sha256(edge + str(len(ids)).encode()).hexdigest()
    return ids


def pad(rows, device, fill=0):
    """Ragged lists -> (B, T), right-padded. Attention is causal, so padding on the right is never
    seen by a real token, and masks come from lengths: a pad may then equal any id."""
    T = max(len(r) for r in rows)
    return torch.tensor([list(r) + [fill] * (T - len(r)) for r in rows], device=device)


def shift(ids, completion_mask):
    """ids, mask (B, T) -> inputs, targets, mask, each (B, T-1): the token that follows, and whether
    it counts. Uncounted targets are -1, for which token_logprobs computes nothing."""
    mask = completion_mask[:, 1:]
    return ids[:, :-1], ids[:, 1:].masked_fill(mask == 0, -1), mask


def split(items, size, rank=0, world=1):
    """A list in pieces of `size`, the last one perhaps shorter. Of several ranks each gets its own
    pieces, and equally many: FSDP2 gathers weights in every forward, and one more on one rank would
    wait for ever. So they are of about equal size, and of 2 where 1 does not come out even."""
    if world == 1:
        return [items[i : i + size] for i in range(0, len(items), size)]
    if len(items) < world and SCALE["fsdp"]:
        fail(f"--fsdp 1: {len(items)} rows are fewer than {world} ranks")
    n = min(-(-len(items) // (size * world)) * world, len(items) // world * world or len(items))
    edges = [i * len(items) // n for i in range(n + 1)] if n else []
    return [items[a:b] for a, b in zip(edges, edges[1:])][rank::world]


def by_length(rows, size, rank=0, world=1):
    """As `split`, after sorting by length: rows of like length share a micro-batch, which leaves
    little padding. For sums, which do not mind the order."""
    longest = lambda row: max(len(ids) for ids, *_ in ([row] if isinstance(row[0], list) else row))
    return split(sorted(rows, key=longest), size, rank, world)


def sample_rows(n, k, seed, step):
    """Indices of the k rows that `step` sees: a fresh permutation an epoch, a function of (seed,
    step) alone. A resume, or another number of ranks, sees the same rows."""
    picks = []
    for i in range(step * k, (step + 1) * k):
        epoch, at = divmod(i, n)
        if not picks or at == 0:
            order = np.random.default_rng([seed, epoch]).permutation(n)
        picks.append(int(order[at]))
    return picks


# ---------------------------------------------------------------------------- GPT


@dataclass
class GPTConfig:
    """GPT-2 by default. The switches below reach Llama, SmolLM and Qwen."""
    vocab_size: int = 50304
    block_size: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_kv_head: int = 0          # 0: as n_head; fewer: grouped-query attention
    head_dim: int = 0           # 0: n_embd / n_head
    n_ff: int = 0               # 0: 4 n_embd (GELU), or 8/3 n_embd rounded up to 64 (SwiGLU)
    position: str = "learned"   # or "rope"
    norm: str = "layer"         # or "rms"
    mlp: str = "gelu"           # or "swiglu"
    bias: str = "all"           # or "none", or "qkv" (Qwen2)
    qk_norm: int = 0            # 1: RMSNorm on each head's q and k (Qwen3)
    tied: int = 1               # 1: the head is the embedding
    rope_theta: float = 10000.0
    rope_factor: float = 1.0    # > 1: Llama 3's frequency scaling, with the three below
    rope_low: float = 1.0
    rope_high: float = 4.0
    rope_context: int = 8192
    norm_eps: float = 1e-5

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        for name, choices in [("position", ("learned", "rope")), ("norm", ("layer", "rms")),
                              ("mlp", ("gelu", "swiglu")), ("bias", ("all", "none", "qkv"))]:
            if getattr(self, name) not in choices:
                fail(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        if min(self.vocab_size, self.block_size, self.n_layer, self.n_head, self.n_embd) < 1:
            fail("vocab_size, block_size, n_layer, n_head and n_embd must be positive")
        if not self.head_dim and self.n_embd % self.n_head:
            fail(f"n_head={self.n_head} does not divide n_embd={self.n_embd}")
        if self.n_head % self.n_kv_head:
            fail(f"n_kv_head={self.n_kv_head} does not divide n_head={self.n_head}")
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        swiglu = -(-8 * self.n_embd // 3 // 64) * 64
        self.n_ff = self.n_ff or (4 * self.n_embd if self.mlp == "gelu" else swiglu)
        if self.position == "rope" and self.head_dim % 2:
            fail(f"rope turns pairs of channels: head_dim={self.head_dim} must be even")


def make_norm(cfg, size):
    """LayerNorm, or RMSNorm: the same without the mean and the bias."""
    if cfg.norm == "rms":
        return nn.RMSNorm(size, eps=cfg.norm_eps)
    return nn.LayerNorm(size, eps=cfg.norm_eps, bias=cfg.bias == "all")


def rope_angles(cfg):
    """(block_size, head_dim / 2) angles position * theta^(-2i/d), Su et al. 2021, eq. 15.
    Llama 3.1 slows the low frequencies down by `rope_factor` and blends in between."""
    freq = cfg.rope_theta ** -(torch.arange(0, cfg.head_dim, 2, dtype=torch.float64) / cfg.head_dim)
    if cfg.rope_factor > 1:
        turns_in_context = cfg.rope_context * freq / (2 * math.pi)
        blend = (turns_in_context - cfg.rope_low) / (cfg.rope_high - cfg.rope_low)
        blend = blend.clamp(0, 1)
        freq = (1 - blend) * freq / cfg.rope_factor + blend * freq
    return torch.outer(torch.arange(cfg.block_size, dtype=torch.float64), freq)


def rotate(x, cos, sin):
    """Turn channel pairs (i, i + d/2) of x (B, H, T, d) by the angle of their position; cos, sin
    (T, d) hold it for both halves, -sin for the first."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


class KVCache:
    """Keys and values of B rows, preallocated: two tensors (layers, B, kv_heads, T, head_dim)."""

    def __init__(self, cfg, rows, length, like):
        shape = cfg.n_layer, rows, cfg.n_kv_head, length, cfg.head_dim
        self.k, self.v = (torch.zeros(shape, device=like.device, dtype=like.dtype) for _ in "kv")

    def move(self, rows, to, n):
        """Copy rows to other places; only the first n positions hold anything yet."""
        for t in (self.k, self.v):
            t[:, to, :, :n] = t[:, rows, :, :n]


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg, d = cfg, cfg.head_dim
        self.q = nn.Linear(cfg.n_embd, cfg.n_head * d, bias=cfg.bias != "none")
        self.k = nn.Linear(cfg.n_embd, cfg.n_kv_head * d, bias=cfg.bias != "none")
        self.v = nn.Linear(cfg.n_embd, cfg.n_kv_head * d, bias=cfg.bias != "none")
        self.proj = nn.Linear(cfg.n_head * d, cfg.n_embd, bias=cfg.bias == "all")
        if cfg.qk_norm:
            self.q_norm, self.k_norm = (nn.RMSNorm(d, eps=cfg.norm_eps) for _ in "qk")

    def forward(self, x, rope, cache, layer, at):
        B, T, _ = x.shape
        d, groups = self.cfg.head_dim, self.cfg.n_head != self.cfg.n_kv_head
        q, k, v = (f(x).view(B, T, -1, d).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.cfg.qk_norm:                                    # before the rotation
            q, k = self.q_norm(at_least_fp32(q)), self.k_norm(at_least_fp32(k))
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        q, k = q.type_as(v), k.type_as(v)
        if at is None:                                          # a whole sequence from position 0
            if cache is not None:
                cache.k[layer, :B, :, :T], cache.v[layer, :B, :, :T] = k, v
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=groups)
        else:                                                   # one token a row, at its own place
            rows, position, mask = at
            cache.k[layer, rows, :, position] = k[:, :, 0]
            cache.v[layer, rows, :, position] = v[:, :, 0]
            k, v = (t[layer, :B, :, : mask.shape[-1]] for t in (cache.k, cache.v))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=groups)
        return self.proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.up = nn.Linear(cfg.n_embd, cfg.n_ff, bias=cfg.bias == "all")
        self.gate = (nn.Linear(cfg.n_embd, cfg.n_ff, bias=cfg.bias == "all")
                     if cfg.mlp == "swiglu" else None)
        self.proj = nn.Linear(cfg.n_ff, cfg.n_embd, bias=cfg.bias == "all")

    def forward(self, x):
        if self.gate is not None:
            return self.proj(F.silu(self.gate(x)) * self.up(x))
        return self.proj(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.norm1, self.attention = make_norm(cfg, cfg.n_embd), Attention(cfg)
        self.norm2, self.mlp = make_norm(cfg, cfg.n_embd), MLP(cfg)

    def forward(self, x, rope, cache, layer, at):
        x = x + self.attention(self.norm1(x), rope, cache, layer, at)
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """The model under every stage. Heads and losses are composed around `forward_hidden`."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.checkpointing = cfg, False
        self.embed = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        if cfg.position == "learned":
            self.positions = nn.Embedding(cfg.block_size, cfg.n_embd)
        else:
            angles = rope_angles(cfg)
            cos, sin, dtype = angles.cos(), angles.sin(), torch.get_default_dtype()
            self.register_buffer("cos", torch.cat([cos, cos], 1).to(dtype), persistent=False)
            self.register_buffer("sin", torch.cat([-sin, sin], 1).to(dtype), persistent=False)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.norm = make_norm(cfg, cfg.n_embd)
        if not cfg.tied:
            self.head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        self.apply(self._init)

    def _init(self, m):
        """N(0, 0.02); what writes into the residual stream is scaled down by sqrt(2 n_layer), so
        that its variance does not grow with depth (GPT-2). The first loss is then ln V."""
        if isinstance(m, (nn.Linear, nn.Embedding)):
            nn.init.normal_(m.weight, std=0.02)
            if getattr(m, "bias", None) is not None:
                nn.init.zeros_(m.bias)
        if isinstance(m, (Attention, MLP)):
            nn.init.normal_(m.proj.weight, std=0.02 / math.sqrt(2 * self.cfg.n_layer))

    def forward_hidden(self, ids, cache=None, position=None):
        """ids (B, T) -> final hidden states (B, T, C).

        With a `cache`, keys and values are stored in its first B rows. With `position` (B,) as
        well, T is 1 and each row's token stands at its own position after what its row holds.
        """
        B, T = ids.shape
        if T > self.cfg.block_size:
            fail(f"{T} tokens are longer than the context of {self.cfg.block_size}")
        x, rope, at = self.embed(ids), None, None
        place = torch.arange(T, device=ids.device) if position is None else position[:, None]
        if position is not None:
            mask = torch.arange(int(position.max()) + 1, device=ids.device) <= position[:, None]
            at = torch.arange(B, device=ids.device), position, mask[:, None, None]
        if self.cfg.position == "learned":
            x = x + self.positions(place)
        else:                                                   # (T, d) or (B, 1, 1, d)
            place = place if position is None else place[:, None]
            rope = [t[place] for t in (self.cos, self.sin)]
        for i, block in enumerate(self.blocks):
            if cache is not None:                               # generation is never compiled
                x = Block.forward(block, x, rope, cache, i, at)
            elif self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, None, i, None, use_reentrant=False)
            else:
                x = block(x, rope, None, i, None)
        return self.norm(x)

    def logits(self, hidden):
        return F.linear(hidden, self.embed.weight if self.cfg.tied else self.head.weight)

    def forward(self, ids, targets=None, temperature=1.0):
        """ids (B, T) -> logits (B, T, V); with targets (B, T) -> their log-probs (B, T)."""
        hidden = self.forward_hidden(ids)
        if targets is None:
            return self.logits(hidden)
        return self.token_logprobs(hidden, targets, temperature)

    def token_logprobs(self, hidden, targets, temperature=1.0, chunk=2 ** 23):
        """log p(target) at each place: hidden (B, T, C), targets (B, T) -> (B, T), fp32 or wider.

        Targets below 0 are not computed and give 0. The softmax runs over `chunk` logits at a time,
        recomputed in the backward pass, so (B, T, V) is never held in fp32.
        """
        keep = targets >= 0
        x, y = hidden[keep], targets[keep]
        rows = max(1, chunk // self.cfg.vocab_size)
        if len(y) <= rows or not torch.is_grad_enabled():
            run = lambda x, y: self._logprobs(x, y, temperature)
        else:
            run = lambda x, y: checkpoint(self._logprobs, x, y, temperature, use_reentrant=False)
        parts = [run(a, b) for a, b in zip(x.split(rows), y.split(rows))]
        flat = torch.cat(parts) if parts else self._logprobs(x, y, temperature)
        return flat.new_zeros(targets.shape).masked_scatter(keep, flat)

    def _logprobs(self, hidden, targets, temperature):
        logits = at_least_fp32(self.logits(hidden)) / temperature
        return -F.cross_entropy(logits, targets, reduction="none")


def at_least_fp32(x):
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def autocast(device):
    """bf16 matrix products on CUDA, and where --bf16 asks for them; never in the float64 tests."""
    kind = torch.device(device).type
    use = (kind == "cuda" or SCALE["bf16"]) and torch.get_default_dtype() == torch.float32
    return torch.autocast(kind, torch.bfloat16) if use else nullcontext()


# ---------------------------------------------------------------------------- generate


def uniforms(seed, step, row, n):
    """n numbers in [0, 1): a function of (seed, step, row) alone, so a row draws the same tokens
    whichever rank or batch it is in, and there is no sampler state to save."""
    return np.random.default_rng([seed, step, row]).random(n)


def choose(logits, u, temperature, top_p=1.0):
    """logits (B, V) -> token (B,) and its log-prob (B,) at this temperature; 0 is greedy.

    One uniform a row and a search in the cumulative sum: torch.multinomial would draw B x V.
    """
    logprobs = (at_least_fp32(logits) / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        token = logprobs.argmax(-1)
    else:
        probs = logprobs.exp()
        if top_p < 1:               # for chat only: the log-prob stays that of the full softmax
            ordered, order = probs.sort(-1, descending=True)
            outside = ordered.cumsum(-1) - ordered >= top_p
            probs = probs.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), 0)
        cdf = probs.cumsum(-1)
        total = cdf[:, -1:]         # u below 1 may round up to it: the search would pass the end
        below = total.nextafter(torch.zeros_like(total))
        at = torch.minimum(u[:, None].to(cdf.dtype) * total, below)
        token = torch.searchsorted(cdf, at, right=True)[:, 0]       # never one of probability 0
        token = token.clamp(max=logits.shape[-1] - 1)          # NaN logits: the loss reports them
    return token, logprobs.gather(-1, token[:, None])[:, 0]


@torch.no_grad()
def generate(model, prompts, max_new, end, temperature=1.0, seed=0, step=0, rows=None, slots=256,
             top_p=1.0, on_token=None):
    """The rollout engine: prompts (lists of ids) -> completions, logprobs (lists, in order).

    A completion ends with `end`, or is cut at max_new tokens or at the context's edge. Up to
    `slots` rows run at once; rows that finish leave, waiting prompts take their places. `rows`
    are the global row numbers that pick each row's uniforms. Equal neighbours share one prefill.
    """
    if not prompts:
        return [], []
    device, N, T_max = next(model.parameters()).device, len(prompts), model.cfg.block_size
    longest = max(map(len, prompts))
    if longest >= T_max:
        fail(f"a prompt has {longest} tokens, which leaves no room in the context of {T_max}")
    rows = range(N) if rows is None else rows
    S, was_training = min(N, slots), model.training
    model.eval()
    with autocast(device):
        like = model.blocks[0].attention.k(model.embed.weight[:1])   # the dtype of keys and values
    cache = KVCache(model.cfg, S, min(T_max, longest + max_new), like)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    limit = (T_max - lengths).clamp(max=max_new)
    u = torch.tensor(np.stack([uniforms(seed, step, r, max_new) for r in rows]), device=device)
    out = torch.zeros(N, max_new, dtype=torch.long, device=device)
    out_logprobs = torch.zeros(N, max_new, device=device, dtype=at_least_fp32(like).dtype)
    active = torch.zeros(0, dtype=torch.long, device=device)           # which row is in which slot
    count, waiting = torch.zeros(N, dtype=torch.long, device=device), 0
    stopped = torch.zeros(N, dtype=torch.bool, device=device)

    def take(logits, which):
        """Draw one token for the rows `which`, store it, and mark the rows that are finished."""
        n = count[which]
        token, logprob = choose(logits, u[which, n.clamp(max=max_new - 1)], temperature, top_p)
        going = ~stopped[which]                     # finished rows may still ride along in a slot
        at = which[going], n[going]
        out[at], out_logprobs[at] = token[going], logprob[going].to(out_logprobs.dtype)
        count[which] += going
        stopped[which] |= (token == end) | (count[which] >= limit[which])
        if on_token is not None:
            on_token(which[going].tolist(), token[going].tolist())

    with autocast(device):
        while True:
            finished = int(stopped[active].sum())
            if finished == len(active) or finished > len(active) // 8:
                left = (~stopped[active]).nonzero()[:, 0]
                last = left[left >= len(left)]          # the last rows fill the gaps before them
                gaps = stopped[active[: len(left)]].nonzero()[:, 0]
                if len(last):
                    cache.move(last, gaps, int((lengths + count).max()))
                active[gaps] = active[last]
                active = active[: len(left)]
                new = list(range(waiting, min(N, waiting + S - len(active))))
                waiting += len(new)
                if new:
                    first = prefill(model, cache, [prompts[i] for i in new], len(active))
                    new = torch.tensor(new, device=device)
                    active = torch.cat([active, new])
                    take(first, new)
                    continue
                if not len(active):
                    break
            token = out[active, count[active] - 1]
            position = (lengths + count)[active] - 1        # of the token that is fed
            hidden = model.forward_hidden(token[:, None], cache, position)
            take(model.logits(hidden[:, 0]), active)
    model.train(was_training)
    ends = count.tolist()
    return ([r[:n] for r, n in zip(out.tolist(), ends)],
            [r[:n] for r, n in zip(out_logprobs.tolist(), ends)])


def prefill(model, cache, prompts, slot):
    """Run ragged prompts through the model into cache rows slot, slot + 1, ...; equal prompts (the
    group of one question) once. Returns the logits (B, V) after each prompt's last token.

    Padding on the right leaves rubbish behind a short prompt's end; decoding overwrites each place
    before its mask uncovers it.
    """
    unique, inverse = {}, []
    for p in prompts:
        inverse.append(unique.setdefault(tuple(p), len(unique)))
    ids = pad(list(unique), cache.k.device)
    part = KVCache(model.cfg, len(unique), ids.shape[1], cache.k)
    hidden = model.forward_hidden(ids, part)
    for whole, new in ((cache.k, part.k), (cache.v, part.v)):
        whole[:, slot : slot + len(prompts), :, : ids.shape[1]] = new[:, inverse]
    last = torch.tensor([len(p) - 1 for p in unique], device=ids.device)
    return model.logits(hidden[torch.arange(len(unique), device=ids.device), last])[inverse]


# ---------------------------------------------------------------------------- verify

WHOLE = re.compile(r"(?:<think>((?:(?!</?think>|</?answer>|<\|).)*)</think>)?"
                   r"<answer>((?:(?!</?think>|</?answer>|<\|).)*)</answer><\|end\|>", re.DOTALL)


def parse(completion):
    """The whole completion (primer and <|end|> included) -> (trace or "", answer), or None."""
    match = WHOLE.fullmatch(completion)
    return match and (match[1] or "", match[2].strip())


# One number as people write it: $1,234.50, -7, 1/2, 1 1/2, 50 %, 72 clips, 5 miles per hour; no
# unit is a word that would change its value.
NUMBER = re.compile(
    r"([$€£]?) ?([+-]?) ?([$€£]?) ?(?:(\d+) (?=\d+/))?"
    r"([1-9]\d{0,2}(?:,\d{3})+(?:\.\d*)?|\d+\.?\d*|\.\d+)(?:/(\d+))?(?: ?([%°$€£])| (?!dozen|score|"
    r"hundred|thousand|\w+illion|grand\b|hal[fv]|third|quarter|(?:four|fif|six|seven|eigh|nin|ten)"
    r"ths?\b|squared|cubed|factorial|pi\b)((?:(?:square|cubic) )?[a-z]{2,}(?: per [a-z]+)?))?",
    re.ASCII)
UNITS = {"dollar": "$", "dollars": "$", "percent": "%", "degree": "°", "degrees": "°"}
LATEX = [(r"\\[dt]frac", r"\\frac"), (r"^\$(.*)\$\.?$", r"\1"), (r"^\\boxed ?\{(.*)\}\.?$", r"\1"),
         (r"\\frac ?(?:\{(-?\d+)\}|(\d)) ?(?:\{(\d+)\}|(\d))", r" \1\2/\3\4"), ("\u2212", "-"),
         (r"\\text ?\{([^{}]*)\}", r" \1"), (r"\^(\\circ|\{\\circ\})", "°"),
         (r"\\left|\\right|\\[!,;]", ""), (r"\\([$%])", r"\1")]


def plain(text):
    """Simple LaTeX, double spaces and the period at the end go; the rest stays as it is."""
    text = " ".join(text.split())
    for pattern, new in LATEX:
        text = re.sub(pattern, new, text)
    return " ".join(text.split()).removesuffix(".").strip()


def quantity(text):
    """One number, perhaps with a unit -> (Fraction, {unit} or {}); None for anything else."""
    match = NUMBER.fullmatch(plain(text).lower()) if len(text) <= 100 else None
    if match is None or match[6] and not int(match[6]):
        return None
    before, sign, after, whole, top, bottom, symbol, word = (part or "" for part in match.groups())
    value = Fraction(top.replace(",", "")) / int(bottom or 1) + int(whole or 0)
    return -value if sign == "-" else value, {before, after, symbol, UNITS.get(word, word)} - {""}


def number(text):
    """The value of `quantity`, a Fraction, or None."""
    return (quantity(text) or [None])[0]


def verify(completion, answer):
    """1.0 if the completion's answer is `answer`, 0.0 if it is another, None if the completion is
    not [<think>...</think>]<answer>...</answer><|end|> from its first to its last character.
    (None is no reward as well, but counted apart.) `answer` begins after its last ####. Numbers are
    compared by value, and units where both have one (50% is 50); the rest by what it says."""
    found = parse(completion)
    if found is None:
        return None
    said, answer = found[1], answer.rpartition("####")[2]
    a, b = quantity(said), quantity(answer)
    if a and b:
        return float(a[0] == b[0] and (a[1] == b[1] or not a[1] or not b[1]))
    said, answer = (re.sub(r" ?([^\w ]) ?", r"\1", plain(text)) for text in (said, answer))
    return float(not (a or b) and said == answer != "")


# ---------------------------------------------------------------------------- optimizers


def make_optimizers(modules, lr, muon_lr=0.0, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8):
    """[AdamW], or with muon_lr > 0 [Muon on the blocks' matrices, AdamW on the rest].

    Embeddings, head, norms, biases and the heads of other stages always go to AdamW; only matrices
    decay. Every group keeps its `peak` rate, which the schedule scales.
    """
    named = [(n, p) for m in modules for n, p in m.named_parameters() if p.requires_grad]
    matrices = [p for n, p in named if p.ndim == 2 and "blocks." in n]
    tables = [p for n, p in named if p.ndim == 2 and "blocks." not in n]
    vectors = [p for _, p in named if p.ndim < 2]
    rest = ([] if muon_lr else matrices) + tables
    optimizers = [torch.optim.AdamW(
        [{"params": rest, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=lr, betas=betas, eps=eps, fused=True)]
    if muon_lr:
        optimizers.append(torch.optim.Muon(matrices, lr=muon_lr, weight_decay=weight_decay,
                                           adjust_lr_fn="original"))
    for opt in optimizers:
        for group in opt.param_groups:
            group["peak"] = group["lr"]
    return optimizers


# ---------------------------------------------------------------------------- scale

SCALE = dict(compile=0, checkpointing=0, fsdp=0, bf16=0)      # set by the flags of the same names


def parse_flags(parser):
    """The command line -> {field: value} of a Config. SCALE's flags are no fields: they change
    results by rounding at most, are in no record, and a run may be resumed with other ones."""
    group = parser.add_argument_group("speed and memory (0 or 1)")
    for name, text in [
            ("compile", "compile the blocks for training and scoring; generation stays as it is"),
            ("checkpointing", "keep one activation a block, compute the others twice"),
            ("fsdp", "FSDP2 under torchrun: each rank holds its part of the weights; not in RL"),
            ("bf16", "bf16 matrix products, as always on CUDA; a gain on CPUs that have them")]:
        group.add_argument(f"--{name}", type=int, choices=(0, 1), default=0, metavar="0", help=text)
    flags = vars(parser.parse_args())
    SCALE.update({name: flags.pop(name) for name in SCALE})
    if SCALE["fsdp"] and "max_new" in flags:
        fail("--fsdp 1 is not for RL: sampling would gather all weights for every token. Without "
             "it each rank holds the whole model")
    if SCALE["compile"] and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        fail("--compile 1 needs a C++ compiler: install g++ or clang++")
    return flags


def wrap(module):
    """What the training forward calls, instead of `module`: called raw, replicas would train
    unsynchronised without an error. DistributedDataParallel, or with --fsdp the module itself, its
    weights sharded in place. Make the optimizers afterwards. What has no gradient is not reduced.
    """
    for gpt in [m for m in module.modules() if isinstance(m, GPT)]:
        gpt.checkpointing = bool(SCALE["checkpointing"])
        for block in gpt.blocks if SCALE["compile"] else ():
            block.forward = torch.compile(block.forward, dynamic=True)     # no name changes
    if dist.is_initialized() and SCALE["fsdp"]:
        return shard(module)
    if dist.is_initialized() and any(p.requires_grad for p in module.parameters()):
        return nn.parallel.DistributedDataParallel(module)
    return module


def shard(module):
    """FSDP2: a block's weights are whole only while it runs. On CUDA they are gathered in bf16, as
    autocast would narrow them anyway; the residual stream and the gradients' sums stay fp32. (On a
    CPU they are not: its layer_norm takes no narrower weights than its input.)"""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    device = next(module.parameters()).device
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    narrow = device.type == "cuda" and not isinstance(autocast(device), nullcontext)
    policy = MixedPrecisionPolicy(torch.bfloat16 if narrow else None,
                                  torch.float32 if narrow else None, cast_forward_inputs=False)
    for block in [m for m in module.modules() if isinstance(m, Block)]:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    module = fully_shard(module, mesh=mesh)
    module.no_sync = nullcontext           # whole gradients of all micro-batches would not fit
    return module


def whole(parts):
    """Dicts and lists with FSDP2's shards in them -> the same with whole tensors, on rank 0. All
    ranks take part, tensor after tensor; the others keep nothing."""
    if isinstance(parts, dict):
        return {k: whole(v) for k, v in parts.items()}
    if isinstance(parts, list):
        return [whole(v) for v in parts]
    if not hasattr(parts, "full_tensor"):
        return parts
    full = parts.full_tensor()
    return full.cpu() if dist.get_rank() == 0 else None


def part_of(full, mine):
    """`full` as `mine` is: cut to this rank's shard where `mine` is one of FSDP2's."""
    if not hasattr(mine, "full_tensor") or full.shape != mine.shape:
        return full
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(full.to(mine.device), mine.device_mesh, mine.placements,
                             src_data_rank=None)       # every rank has read the file


# ---------------------------------------------------------------------------- ranks and log


def ranks(device):
    """-> rank, world, device, from torchrun's environment; Ctrl-C is from now on a wish."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        device = ("cuda" if torch.cuda.is_available() else
                  "mps" if torch.backends.mps.is_available() and world == 1 else "cpu")
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        atexit.register(dist.destroy_process_group)    # its threads must end before Python does
    interrupt.seen = 0.0
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, interrupt)
    return rank, world, device


def interrupt(*_):
    """The first Ctrl-C lets the step finish, so that a resume can follow; the second does not.
    (torchrun hands one Ctrl-C on, so its ranks see two at once: these are one.)"""
    if interrupt.seen and time.monotonic() > interrupt.seen + 1:
        raise SystemExit(130)
    interrupt.seen = interrupt.seen or time.monotonic()


def interrupted():
    return all_sum(seen=interrupt.seen)["seen"] > 0


def all_sum(**numbers):
    """Sums over ranks, as floats; with one process the numbers themselves."""
    if not dist.is_initialized():
        return {k: float(v) for k, v in numbers.items()}
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    t = torch.tensor([float(v) for v in numbers.values()], dtype=torch.float64, device=device)
    dist.all_reduce(t)
    return dict(zip(numbers, t.tolist()))


class Log:
    """log(step, **metrics): one JSON line in the file, one aligned line on the screen."""

    def __init__(self, path, first, cfg):
        self.path, self.first, self.steps, self.begun = path, first, cfg.steps, time.monotonic()
        self.quiet = os.environ.get("RANK", "0") != "0"
        if self.quiet:
            return
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        lines = [json.dumps({"config": asdict(cfg)})]
        if first and os.path.isfile(path):         # a resumed run continues the file at its step
            with open(path) as f:
                old = [line for line in f.read().splitlines()[1:] if line.endswith("}")]
            lines += [line for line in old if json.loads(line)["step"] < first]
        write_text(path, "".join(line + "\n" for line in lines))

    def __call__(self, step, **metrics):
        if self.quiet:
            return
        try:
            with open(self.path, "a") as f:
                f.write(json.dumps({"step": step, **metrics}) + "\n")
        except OSError as e:
            cannot_write(self.path, e)
        seldom = (step + 1) % max(1, self.steps // 40) and step > self.first
        if seldom and "val_loss" not in metrics:
            return                         # some forty lines on the screen; the file has every step
        left = (time.monotonic() - self.begun) / (step + 1 - self.first) * (self.steps - step - 1)
        shown = "  ".join(f"{k} {v:.4g}" for k, v in metrics.items())
        print(f"{os.path.basename(self.path)[:-6]:>12} {step + 1:>{len(str(self.steps))}}/"
              f"{self.steps}  {int(left) // 60}:{int(left) % 60:02} left  {shown}", flush=True)


# ---------------------------------------------------------------------------- checkpoints


def cannot_write(path, error):
    fail(f"cannot write {path} ({error}); what was there before is intact. Free some space and "
         "run the same command again")


def write_text(path, text):
    """Atomic, as `save`."""
    try:
        with open(f"{path}.new", "w") as f:
            f.write(text)
        os.replace(f"{path}.new", path)
    except OSError as e:
        cannot_write(path, e)


NEUTRAL = {"device", "micro_batch", "save_every"}     # leave the result unchanged (up to rounding)


def differing(old, new):
    """What two records disagree on: config fields and input files by name."""
    names = []
    for part in ("config", "inputs"):
        a, b = old.get(part, {}), new[part]
        names += [k for k in sorted(set(a) | set(b)) if k not in NEUTRAL and a.get(k) != b.get(k)]
    return names


def skip_if_done(path, record):
    """run.sh sets SKIP_DONE: leave at once if the finished checkpoint has this very record."""
    if os.environ.get("SKIP_DONE") and os.path.isfile(path):
        if not differing(read_checkpoint(path).get("record", {}), record):
            if os.environ.get("RANK", "0") == "0":
                print(f"{path} is up to date", flush=True)
            raise SystemExit(0)


def restore(path, record, modules, optimizers):
    """Load an unfinished run's state, if there is one -> the first step to do."""
    if not os.path.isfile(path):
        return 0
    parts = read_checkpoint(path)
    names = differing(parts["record"], record)
    if names:
        fail(f"{path} is an unfinished run with other {', '.join(names)}: "
             "delete it to start afresh, or choose another --out")
    for name, module in modules.items():
        load_strict(module, parts[name], path)
    for opt, state in zip(optimizers, parts["optimizers"]):
        weights = [p for group in opt.param_groups for p in group["params"]]
        state["state"] = {i: {k: part_of(v, weights[i]) for k, v in of.items()}
                          for i, of in state["state"].items()}
        opt.load_state_dict(state)
    return parts["step"]


def save(path, then_remove="", **parts):
    """Write a checkpoint atomically: a reader of `path` sees the old file or the whole new one.
    All ranks call it, rank 0 writes."""
    path, new, parts = str(path), f"{path}.new", whole(parts)
    if os.environ.get("RANK", "0") != "0":
        return
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    try:
        with open(new, "wb") as f:
            torch.save(parts, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(new, path)
    except (OSError, RuntimeError) as e:
        if os.path.exists(new):
            os.remove(new)
        cannot_write(path, e)
    if os.path.exists(then_remove):
        os.remove(then_remove)


def missing(path):
    """No checkpoint there: name the script that makes it, or those that lie beside it."""
    folder, name = os.path.split(str(path))
    stage, root = name.removesuffix(".pt"), os.path.dirname(os.path.realpath(__file__))
    for script in [f"{stage}.py"] * stage[:2].isdigit() + [f"RL/{stage}.py", f"DPO/{stage}.py"]:
        if stage != "model" and os.path.isfile(f"{root}/{script}"):
            fail(f"{path} is missing: run python {script} first")
    found = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
    found = sorted(n for n in found if n.endswith(".pt") and not n.endswith(".state.pt"))
    fail(f"{path} is missing" + (f"; beside it are {', '.join(found)}" if found else ""))


def read_checkpoint(path, device="cpu"):
    """The dict that `save` wrote. weights_only: a foreign file cannot run code."""
    if not os.path.isfile(path):
        missing(path)
    try:
        parts = torch.load(path, map_location=device, weights_only=True)
        parts["model"], parts["gpt"], parts["tokenizer"]
    except Exception as e:
        fail(f"{path} is truncated or no checkpoint of this project ({type(e).__name__}); "
             "delete it and make it again")
    return parts


def load(path, device="cpu"):
    """A checkpoint -> model, tokenizer, parts (what else the stage saved: heads, record)."""
    parts = read_checkpoint(path, device)
    with open(path, "rb") as f:
        inputs[str(path)] = hashlib.file_digest(f, "sha256").hexdigest()
    known = {f.name for f in fields(GPTConfig)}
    if set(parts["gpt"]) != known:
        fail(f"{path} describes another architecture: {sorted(set(parts['gpt']) ^ known)}")
    tokenizer = Tokenizer(parts["tokenizer"])
    model = GPT(GPTConfig(**parts["gpt"])).to(device)
    if model.cfg.vocab_size < tokenizer.vocab_size:
        fail(f"{path}: its tokenizer has {tokenizer.vocab_size} ids, "
             f"its model {model.cfg.vocab_size}")
    load_strict(model, parts.pop("model"), path)
    return model, tokenizer, parts


def load_strict(module, weights, path):
    """All names and shapes must agree: a silent partial load would train from random weights."""
    own = module.state_dict()
    try:
        module.load_state_dict({k: part_of(v, own.get(k)) for k, v in weights.items()}, strict=True)
    except RuntimeError as e:
        what = " ".join(str(e).split())[:200]
        fail(f"{path} does not fit this model: {what}")
