"""model.py: the kernel. One GPT, its tokenizers, rollouts, verifier and checkpoints.

Every stage imports this file and no other, and none of them changes it. One section at a time:

    GPT           GPT-2 by default; a few switches reach the Llama and Qwen family
    generate      the one rollout engine: KV cache, ragged prompts, continuous batching
    tokenizers    characters, tiktoken's gpt2, a Hugging Face tokenizer.json; the chat template
    rows          JSONL and .bin files -> Python; padding; which rows a step sees
    verify        the one verifier; which answers are the same is said in answers.py

and then what serves training:

    optimizers    AdamW, or Muon on the matrices and AdamW on the rest
    scale         compile, checkpointing, FSDP2 or DDP, two functions with a backward pass of their
                  own: speed and memory, never results
    checkpoints   atomic, strict, without pickle execution; an unfinished run goes on where it was

Files, flags, ranks and the log are in frame.py; the scripts have them from here.
"""
import hashlib, json, math, os, re, signal, zipfile
from array import array
from contextlib import nullcontext
from dataclasses import InitVar, asdict, dataclass, fields
from decimal import Decimal

from frame import (FIRST, ON_CTRL_C, RANGES, SWITCHES, Log, Parser, Progress,  # noqa: F401
                   all_agree, all_max, all_sum, append, begin, believing, cannot_read, cannot_write,
                   check_ranges, claim, cli, command_for, diverged, fail, file_hashes,
                   has_bf16, in_words, init_distributed, interrupt, interrupted, last_words,
                   parse_json, pick_device, read_bytes, read_json, release, say, script_of, setup,
                   speaks, to_width, write_text)
from answers import right
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

signal.signal(signal.SIGINT, ON_CTRL_C)

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
    bias: str = "all"           # "none", "qkv" (Qwen2), "attention" (Llama's attention_bias)
    qk_norm: int = 0            # 1: RMSNorm on each head's q and k (Qwen3)
    tied: int = 1               # 1: the head is the embedding
    rope_theta: float = 10000.0
    rope_factor: float = 1.0    # > 1: Llama 3's frequency scaling, with the three below
    rope_low: float = 1.0
    rope_high: float = 4.0
    rope_context: int = 8192
    norm_eps: float = 1e-5

    where: InitVar[str] = ""    # what an error begins with

    def __post_init__(self, where):
        for name, choices in [("position", ("learned", "rope")), ("norm", ("layer", "rms")),
                              ("mlp", ("gelu", "swiglu")),
                              ("bias", ("all", "none", "qkv", "attention"))]:
            if getattr(self, name) not in choices:
                fail(f"{where}{name} must be one of {', '.join(choices)}, "
                     f"not {getattr(self, name)!r}")
        check_ranges(asdict(self), where=where)
        self.n_kv_head = self.n_kv_head or self.n_head
        if not self.head_dim and self.n_embd % self.n_head:
            fail(f"{where}n_head={self.n_head} does not divide n_embd={self.n_embd}")
        if self.n_head % self.n_kv_head:
            fail(f"{where}n_kv_head={self.n_kv_head} does not divide n_head={self.n_head}")
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        swiglu = -(-8 * self.n_embd // 3 // 64) * 64
        self.n_ff = self.n_ff or (4 * self.n_embd if self.mlp == "gelu" else swiglu)
        if self.position == "rope" and self.head_dim % 2:
            fail(f"{where}rope turns pairs of channels: head_dim={self.head_dim} must be even")


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
    """Turn channel pairs (i, i + d/2) of x (B, T, H, d) by the angle of their position; cos, sin
    (T, 1, d) hold it for both halves, -sin for the first. (As Llama's rotate_half; the paper turns
    neighbours, which is the same up to the order of channels.)"""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


class KVCache:
    """Keys and values of B rows, preallocated: two tensors (layers, B, kv_heads, T, head_dim)."""

    def __init__(self, cfg, rows, length, like):
        shape = cfg.n_layer, rows, cfg.n_kv_head, length, cfg.head_dim
        self.k, self.v = (torch.zeros(shape, device=like.device, dtype=like.dtype) for _ in "kv")
        self.longest = 0        # of its rows so far; on the host, so that no step waits for it

    def mask(self, position, like):
        """0 where a row at `position` (B,) may look, -inf behind it: (B, 1, 1, longest so far). On
        CUDA in steps of 64, since each new shape there costs a choice of kernel."""
        length = min(-(-self.longest // 64) * 64 if like.is_cuda else self.longest, self.k.shape[3])
        behind = torch.arange(length, device=like.device) > position[:, None]
        mask = torch.zeros(behind.shape, device=like.device, dtype=self.k.dtype)
        return mask.masked_fill_(behind, -math.inf)[:, None, None]

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
        self.proj = nn.Linear(cfg.n_head * d, cfg.n_embd, bias=cfg.bias in ("all", "attention"))
        if cfg.qk_norm:
            self.q_norm, self.k_norm = (nn.RMSNorm(d, eps=cfg.norm_eps) for _ in "qk")

    def forward(self, x, rope, cache, layer, at):
        B, T, _ = x.shape
        d, groups = self.cfg.head_dim, self.cfg.n_head != self.cfg.n_kv_head
        q, k, v = (f(x).view(B, T, -1, d) for f in (self.q, self.k, self.v))
        fused = at is None and not torch.compiler.is_compiling()    # it fuses by itself
        if fused and self.cfg.qk_norm and rope is not None:
            q, k = (NormRotate.apply(at_least_fp32(t), norm.weight, *rope, norm.eps)
                    for t, norm in ((q, self.q_norm), (k, self.k_norm)))
        else:
            if self.cfg.qk_norm:                                # before the rotation
                q, k = self.q_norm(at_least_fp32(q)), self.k_norm(at_least_fp32(k))
            if rope is not None:
                q, k = rotate(q, *rope), rotate(k, *rope)
        q, k, v = (t.type_as(v).transpose(1, 2) for t in (q, k, v))
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
        self.cfg, self.checkpointing, self.fp32_head = cfg, False, False
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
            at = torch.arange(B, device=ids.device), position, cache.mask(position, x)
        if self.cfg.position == "learned":
            x = x + self.positions(place)
        else:                                                   # (T, 1, d) or (B, 1, 1, d)
            rope = [t[place][..., None, :] for t in (self.cos, self.sin)]
        for i, block in enumerate(self.blocks):
            if cache is not None:                               # generation is never compiled
                x = Block.forward(block, x, rope, cache, i, at)
            elif self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, None, i, None, use_reentrant=False)
            else:
                x = block(x, rope, None, i, None)
        return self.norm(x)

    def logits(self, hidden):
        return project(hidden, self.head_weight(), not self.fp32_head)

    def head_weight(self):
        return self.embed.weight if self.cfg.tied else self.head.weight

    def forward(self, ids, targets=None, temperature=1.0):
        """ids (B, T) -> logits (B, T, V); with targets (B, T) -> their log-probs (B, T)."""
        hidden = self.forward_hidden(ids)
        if targets is None:
            return self.logits(hidden)
        return self.token_logprobs(hidden, targets, temperature)

    def token_logprobs(self, hidden, targets, temperature=1.0, chunk=None, keep=None):
        """log p(target) at each place: hidden (B, T, C), targets (B, T) -> (B, T), fp32 or wider.
        Targets below 0 are not computed and give 0. `chunk`, `keep`: TokenLogprobs."""
        counts, cuda = targets >= 0, hidden.is_cuda
        every = bool(counts.all())
        x, y = (hidden.flatten(0, 1), targets.flatten()) if every else (hidden[counts],
                                                                        targets[counts])
        flat = TokenLogprobs.apply(
            x, self.head_weight(), y, temperature, not self.fp32_head,
            chunk or 2 ** (27 if cuda else 23), keep or 2 ** (29 if cuda else 27),
            torch.is_grad_enabled())
        return flat.view(targets.shape) if every else flat.new_zeros(targets.shape).masked_scatter(
            counts, flat)


def project(x, weight, narrow):
    """Logits x (..., C) @ weight (V, C).T in fp32 or wider. Under autocast the operands are bf16,
    unless not `narrow`; their products are summed in fp32, and stay it where torch lets them."""
    narrow = narrow and torch.is_autocast_enabled(x.device.type)
    with torch.autocast(x.device.type, enabled=False):
        if not narrow:
            return F.linear(at_least_fp32(x), at_least_fp32(weight))
        x, weight = x.bfloat16(), weight.bfloat16()
        if x.is_cuda and not torch.is_grad_enabled():       # this product has no derivative
            wide = torch.mm(x.flatten(0, -2), weight.t(), out_dtype=torch.float32)
            return wide.view(*x.shape[:-1], -1)
        return F.linear(x, weight).float()


def at_least_fp32(x):
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def autocast(device):
    """bf16 matrix products on CUDA cards that have them, and where --bf16 asks for them; never in
    the float64 tests."""
    kind = torch.device(device).type
    use = (SWITCHES["bf16"] or kind == "cuda" and has_bf16()) and (
        torch.get_default_dtype() == torch.float32)
    return torch.autocast(kind, torch.bfloat16) if use else nullcontext()


# ---------------------------------------------------------------------------- generate


def uniforms(seed, step, row, n):
    """n numbers in [0, 1): a function of (seed, step, row) alone, so a row draws the same tokens
    whichever rank or batch it is in, and there is no sampler state to save."""
    return np.random.default_rng([seed, step, row]).random(n)


def sample_token(logits, u, temperature, top_p=1.0):
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
    max_new = min(max_new, T_max - min(map(len, prompts)))     # no memory for what finds no room
    model.eval()
    with autocast(device):
        like = model.blocks[0].attention.k(model.embed.weight[:1])   # the dtype of keys and values
    cache = KVCache(model.cfg, S, min(T_max, longest + max_new), like)
    limit = [min(max_new, T_max - len(p)) for p in prompts]
    dtype = at_least_fp32(like).dtype
    u = torch.as_tensor(np.stack([uniforms(seed, step, r, max_new) for r in rows]))
    u = u.to(dtype).to(device)                      # rounded here: not every device has float64
    out, drawn, active, waiting = [[] for _ in prompts], [], [], 0      # active: row in each slot

    def take(logits, which):
        """Draw and keep one token for each of the rows `which`: the one wait for the device."""
        at = torch.tensor([[i, len(out[i])] for i in which], device=device)
        token, logprob = sample_token(logits, u[at[:, 0], at[:, 1]], temperature, top_p)
        tokens = token.tolist()
        for i, t in zip(which, tokens):
            out[i].append(t)
        drawn.append((which[:], logprob))
        if on_token is not None:
            on_token(which, tokens)

    with autocast(device):
        while True:
            left = [s for s, i in enumerate(active) if out[i][-1] != end and len(out[i]) < limit[i]]
            gaps = sorted(set(range(len(left))) - set(left))
            if gaps:                                # the last rows fill the gaps before them
                last = left[len(left) - len(gaps):]
                cache.move(torch.tensor(last, device=device), torch.tensor(gaps, device=device),
                           cache.longest)
                for gap, s in zip(gaps, last):
                    active[gap] = active[s]
            active = active[:len(left)]
            # A prefill of few prompts costs nearly as much as one of many: let places gather.
            if waiting < N and len(active) <= S - max(1, S // 8):
                new = list(range(waiting, min(N, waiting + S - len(active))))
                waiting += len(new)
                first = prefill(model, cache, [prompts[i] for i in new], len(active))
                active = active + new
                take(first, new)
                continue
            if not active:
                break
            token = torch.tensor([out[i][-1] for i in active], device=device)
            place = [len(prompts[i]) + len(out[i]) - 1 for i in active]      # of the token fed
            cache.longest = max(place) + 1
            hidden = model.forward_hidden(
                token[:, None], cache, torch.tensor(place, device=device))
            take(model.logits(hidden[:, 0]), active)
    model.train(was_training)
    logprobs = [[] for _ in prompts]
    values = torch.cat([logprob for _, logprob in drawn]).tolist()
    for i, value in zip((i for which, _ in drawn for i in which), values):
        logprobs[i].append(value)
    return out, logprobs


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
    cache.longest = max(cache.longest, ids.shape[1])
    hidden = model.forward_hidden(ids, part)
    for whole, new in ((cache.k, part.k), (cache.v, part.v)):
        whole[:, slot : slot + len(prompts), :, : ids.shape[1]] = new[:, inverse]
    last = torch.tensor([len(p) - 1 for p in unique], device=ids.device)
    return model.logits(hidden[torch.arange(len(unique), device=ids.device), last])[inverse]


def sampler_gap(batches):
    """How far the sampler's log-probs are from the trainer's, which should be the same: mean and
    largest |difference| a token, over ranks. batches: [(ids, targets, sampled, old_logprobs, ...)],
    each (B, T); targets below 0 do not count. A ratio carries the gap as if it were an update: the
    logits in fp32 (fp32_head; MiniMax-M1 2025, ScaleRL 2025) make it smaller."""
    gaps = torch.cat([(old - sampled).abs()[targets >= 0]
                      for _, targets, sampled, old, *_ in batches])
    total = all_sum(gap=gaps.sum(), count=len(gaps))
    return {"gap": total["gap"] / total["count"], "gap_max": all_max(float(gaps.max()))}


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
    lacks get new ids. Where nothing follows that token, the chat is for one question alone. "strip"
    takes the blanks off the ends of each content, "config" is for convert.py's way back.

    `encode` never yields a tag, whatever the text says; `encode_completion` and the template do.
    """

    def __init__(self, spec):
        self.spec, kind, own, self.between = spec, spec.get("kind"), {}, {}
        if kind == "chars":
            self.chars = spec["chars"]
            if not isinstance(self.chars, str) or not 0 < len(self.chars) == len(set(self.chars)):
                raise ValueError("chars must be a text of characters, each once")
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
            self.hf = tokenizers.Tokenizer.from_str(json.dumps(as_control(spec)))
            self.hf.no_truncation()
            self.hf.no_padding()
            for roles, text in spec.get("template", {}).items():
                self.between[roles] = self.hf.encode(text, add_special_tokens=False).ids
            self.hf.encode_special_tokens = True     # "<|im_start|>" in user text stays text
            own = {t.content: i for i, t in self.hf.get_added_tokens_decoder().items()}
            base = 1 + max(self.hf.get_vocab(with_added_tokens=True).values())
        else:
            raise ValueError(f"unknown kind {kind!r}: expected chars, tiktoken or json")
        if self.between:
            own["<|end|>"] = self.between["assistant user"].pop(0)
            if not self.between["assistant user"]:
                del self.between["assistant user"]
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
        0 on everything else. So a dialogue teaches all of its assistant's turns, the earlier ones
        too; a preference compares the last alone. Each turn is encoded apart, so that no merge
        crosses a seam and the prompt has the same ids in training and in rollouts. If the last turn
        is not the assistant's, its header is appended: this is the prompt to complete.
        """
        ids, mask, before = [], [], ""
        for m in checked(messages):
            new, head = m["role"] == "assistant", self.header(before, m["role"])
            text = m["content"].strip() if self.spec.get("strip") else m["content"]
            body = (self.encode_completion if new else self.encode)(text)
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
        messages = checked(turns(prompt))
        if messages[-1]["role"] == "assistant":
            raise ValueError("the prompt ends with the assistant's turn: nothing is left to say")
        return self.chat(messages)[0] + self.encode_completion(primer)

    def answered(self, prompt, completion):
        """A prompt and its answer -> ids, completion_mask: as `chat`, but 1 on this last turn,
        and 0 on the assistant's earlier ones."""
        n = len(self.prompt(prompt))
        ids, _ = self.chat([*turns(prompt), {"role": "assistant", "content": completion}])
        return ids, [0] * n + [1] * (len(ids) - n)


def as_control(spec):
    """spec -> its tokenizer.json, with every added token that is a <tag> or stands in the template
    as a special one: Qwen3's <think> is none, and could be written by a user."""
    fixed = "\n".join(spec.get("template", {}).values())
    control = lambda text: text[:1] == "<" and text[-1:] == ">" or text in fixed
    return spec["json"] | {"added_tokens": [
        t | {"special": t.get("special", False) or control(t["content"])}
        for t in spec["json"].get("added_tokens", [])]}


def turns(prompt):
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


ROLES = ("system", "user", "assistant")
# What changes the meaning of a message, or of a row, and no stage follows: `unused` finds it.
REASONING = ("reasoning_content", "reasoning", "thinking")
IN_MESSAGE = ("name", "weight", "train", "loss", "tools", "tool_calls", "tool_call_id",
              "function_call", "refusal", "image", "images", "audio", *REASONING)
IN_ROW = ("system", "system_prompt", "history", "input", "context", "documents", "tools",
          "functions", "weight", "train", "image", "images", "audio", "video", "videos",
          "chat_template_kwargs")


def unused(of, names):
    """The first of the fields that says something (null, empty, 1 and true do not), or None."""
    return next((k for k in names if of.get(k) not in (None, "", "[]", [], {}, 1)), None)


def text_of(content):
    """A content, a string or parts {"type": "text", "text"}, which are joined as they are."""
    part = lambda p: isinstance(p, dict) and p.get("type", "text") == "text" and p.get("text")
    parts = content if isinstance(content, list) and content else [None]
    texts = [content] if isinstance(content, str) else list(map(part, parts))
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a content is a text, or a list of parts {'type': 'text', 'text'}")
    return "".join(texts)


def checked(messages):
    """Messages -> [{"role", "content": text}, ...]; ValueError says what is wrong with others."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError("turns are a text, or a list of {'role', 'content'} that is not empty")
    clean, before = [], ""
    for n, m in enumerate(messages, 1):
        if not isinstance(m, dict) or m.get("role") not in ROLES:
            role = repr(m.get("role")) if isinstance(m, dict) else "none"
            raise ValueError(f"turn {n}: its role is {role[:40]}, and not {', '.join(ROLES)}")
        if unused(m, IN_MESSAGE):
            raise ValueError(f"turn {n}: no stage uses its {unused(m, IN_MESSAGE)!r}: "
                             "data/messages.py prepares such rows, or says why it cannot")
        if m["role"] == before == "assistant":
            raise ValueError(f"turn {n}: the assistant's turn follows another of its turns")
        try:
            clean.append({"role": m["role"], "content": text_of(m.get("content"))})
        except ValueError as e:
            raise ValueError(f"turn {n}: {e}") from None
        before = m["role"]
    return clean


def load_tokenizer(path):
    """tokenizer.json: one of our specs, or a file of the tokenizers library."""
    spec = read_json(path)
    ours = isinstance(spec, dict) and "kind" in spec
    return make_tokenizer(spec if ours else {"kind": "json", "json": spec}, path)


def make_tokenizer(spec, where):
    """A Tokenizer, or the line that says why `spec`, read in the file `where`, makes none."""
    with believing(f"{where} holds no tokenizer that works"):
        return Tokenizer(spec)


# ---------------------------------------------------------------------------- rows


def read_rows(path, *keys):
    """JSONL -> list of dicts that all have `keys`; each key may be alternatives, "a|b"."""
    rows = []
    for n, line in enumerate(read_bytes(path, command_for(path)).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as e:
            fail(f"{path}, line {n}: not JSON ({e}); every line is one object")
        for key in keys:
            if not isinstance(row, dict) or all(
                    row.get(k) in (None, "", [], {}) for k in key.split("|")):
                fail(f"{path}, line {n}: no {key.replace('|', ' or ')!r}, or empty; "
                     f"a row here needs {', '.join(keys)}")
        try:
            rows.append(understood(row, {k for key in keys for k in key.split("|")}) | {"line": n})
        except ValueError as e:
            fail(f"{path}, line {n}: {e}")
    if not rows:
        fail(f"{path} has no rows: run {command_for(path)} again")
    return rows


def understood(row, keys):
    """A row of a stage -> the same, its completions (chosen, rejected) as texts and its answer as a
    text or texts. ValueError where a field would be lost or is not what it must be."""
    if not keys & {"prompt", "messages"}:
        return row                                  # tasks.py has rows of its own
    lost = unused(row, [k for k in IN_ROW + REASONING * ("completion" in keys) if k not in keys])
    if lost:
        raise ValueError(f"no stage uses {lost!r}: data/messages.py and data/pairs.py prepare such "
                         "rows, or say why they cannot")
    if not keys & {"label", "answer"} and false_label(row):
        raise ValueError("its label is false: this is no demonstration, and no pair")
    if "messages" in keys and row.get("messages"):
        if checked(row["messages"])[-1]["role"] != "assistant":
            raise ValueError("the last turn is not the assistant's: there is no completion")
        return row
    checked(turns(row.get("prompt")))
    if "answer" in keys:
        return row | {"answer": answer_of(row["answer"])}
    return row | {key: last_turn(row[key], row["prompt"], key) for key in
                  ("completion", "chosen", "rejected") if key in keys and row.get(key) is not None}


def false_label(row):
    """Rows for KTO say with `label` (or kto_tag) whether the completion is a good one."""
    return any(str(row.get(k)).lower() in ("false", "0", "0.0", "-1") for k in ("label", "kto_tag"))


def label_of(row):
    """The same as 1 or 0, of a row that must say it."""
    said = {str(row[k]).lower() for k in ("label", "kto_tag") if row.get(k) is not None}
    bad = false_label(row)
    if not said or said - {"true", "1", "1.0"} and not bad or bad and said & {"true", "1", "1.0"}:
        raise ValueError(f"its label is true or false, not {', '.join(sorted(said))[:40] or None}")
    return int(not bad)


def answer_of(value):
    """A string, a number, or a list of them, any of which is right -> string or list of strings."""
    if isinstance(value, list) and value and not any(isinstance(v, list) for v in value):
        return [answer_of(v) for v in value]
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else f"{Decimal(repr(value)):f}"
    if isinstance(value, (str, int)) and not isinstance(value, bool) and str(value).strip():
        return str(value)
    raise ValueError(f"the answer is a text, a number or a list of them, not {str(value)[:40]!r}")


def last_turn(said, prompt, key):
    """A completion as text. As messages it ends with the assistant's turn, and what stands before
    that one is the prompt once more, or nothing."""
    if isinstance(said, str):
        return said
    try:
        *before, last = checked(said)
    except ValueError as e:
        raise ValueError(f"{key}: {e}") from None
    if last["role"] != "assistant":
        raise ValueError(f"{key}: its last turn is not the assistant's")
    if before and before != checked(turns(prompt)):
        raise ValueError(f"{key}: the turns before its last one are not the prompt's")
    return last["content"]


def encode_rows(rows, path, encode, block_size):
    """[encode(row) -> (ids, ...)] for the rows whose ids all fit the context; ids with their mask
    as arrays, prompts alone as lists.

    Rows that are too long are dropped and counted, never cut: a cut completion would lose its end.
    """
    kept, dropped = [], 0
    for row in rows:
        try:
            items = encode(row)
        except (ValueError, KeyError, TypeError) as e:
            what = e if isinstance(e, ValueError) else f"not in the format: {e!r}"
            fail(f"{path}, line {row['line']}: {what}")
        if max(len(ids) for ids, *_ in items) > block_size:
            dropped += 1
        else:
            kept.append([packed(*item) for item in items])
    if dropped:
        say(f"{path}: {dropped} of {len(rows)} rows are longer than the context of {block_size} "
            "tokens and were dropped")
    if not kept:
        fail(f"{path}: no row fits the context of {block_size} tokens; use a longer one"
             if block_size > 0 else
             f"{path}: no row fits the context, in which --max_new leaves no room: lower it")
    return kept


def packed(ids, mask=None, *rest):
    """ids and their mask as arrays of 4 and 1 bytes a token: in lists each token has 48."""
    if isinstance(mask, list) and len(mask) == len(ids) and all(x in (0, 1) for x in mask):
        return array("i", ids), array("b", mask), *rest
    return ids, mask, *rest


def read_tokens(path, tokenizer):
    """A .bin of ids -> np.memmap. The vocabulary decides the ids' width, as in data/. What a
    preparer has written says in PATH.json what it holds; another file is scanned once."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2 ** 16 else np.uint32)
    again = f"run {command_for(path)} again"
    try:
        size = os.path.getsize(path)
        if size % dtype.itemsize or size < 2 * dtype.itemsize:
            fail(f"{path} has {size} bytes: no two or more whole ids of {dtype}; {again}")
        ids = np.memmap(path, dtype=dtype, mode="r")
    except OSError as e:
        cannot_read(path, e, command_for(path))
    edge = ids[: 2 ** 20].tobytes() + ids[-2 ** 20:].tobytes()      # a corpus may have many GB
    edges = hashlib.sha256(edge + str(len(ids)).encode()).hexdigest()
    if not os.path.exists(f"{path}.json"):
        scan_tokens(path, ids, tokenizer.vocab_size)
    else:
        said = read_json(f"{path}.json")
        del file_hashes[f"{path}.json"]
        made = {"dtype": dtype.name, "count": len(ids), "edges": edges, "tokenizer": hashlib.sha256(
            json.dumps(tokenizer.spec, sort_keys=True).encode()).hexdigest()}
        wrong = [k for k, v in made.items() if not isinstance(said, dict) or said.get(k) != v]
        if wrong or said.get("max_id") not in range(tokenizer.vocab_size):
            fail(f"{path} was written with another tokenizer, or has changed since "
                 f"({', '.join(wrong) or 'max_id'} differs from {path}.json): {again}")
    file_hashes[str(path)] = edges
    return ids


def scan_tokens(path, ids, vocab_size):
    """Rank 0 looks at every id of a file that says nothing of itself."""
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    progress, empty, halves = Progress(os.path.basename(path), len(ids)), True, True
    for i in range(0, len(ids), 2 ** 24):
        part = ids[i : i + 2 ** 24]
        if part.max() >= vocab_size:
            fail(f"{path}: id {part.max()}, and the tokenizer beside it has {vocab_size}: the two "
                 "do not belong together")
        empty, halves = empty and not part.any(), halves and not part[1::2].any()
        if len(ids) > 2 ** 24:
            progress(min(i + 2 ** 24, len(ids)), "scanned")
    if empty or halves:
        fail(f"{path} holds " + ("nothing but id 0" if empty else
             "id 0 at every second place: it was written as uint32, and this vocabulary's ids are "
             "read as uint16"))


def pad(rows, device, fill=0):
    """Ragged lists or arrays -> (B, T), right-padded; whole numbers stay whole, others do not
    become it. Attention is causal, so padding on the right is never seen by a real token, and masks
    come from lengths: a pad may then equal any id."""
    T = max(len(r) for r in rows)
    return torch.tensor([list(r) + [fill] * (T - len(r)) for r in rows], device=device)


def shift(ids, completion_mask):
    """ids, mask (B, T) -> inputs, targets, mask, each (B, T-1): the token that follows, and whether
    it counts. Uncounted targets are -1, for which token_logprobs computes nothing."""
    mask = completion_mask[:, 1:]
    return ids[:, :-1], ids[:, 1:].masked_fill(mask == 0, -1), mask


def split(items, size, rank=0, world=1):
    """A list in pieces of `size`, the last one perhaps shorter. Of several ranks each gets its own
    pieces, of about equal size, and of 2 where 1 does not come out even."""
    if world == 1:
        return [items[i : i + size] for i in range(0, len(items), size)]
    n = even(-(-len(items) // size), len(items), world)
    edges = [i * len(items) // n for i in range(n + 1)] if n else []
    return [items[a:b] for a, b in zip(edges, edges[1:])][rank::world]


def even(n, rows, world):
    """The number of pieces nearest to n of which every rank gets the same number: under FSDP2 one
    more forward on one rank would wait for ever."""
    if rows < world and SWITCHES["fsdp"]:
        fail(f"--fsdp 1: {rows} rows are fewer than {world} ranks")
    return min(-(-n // world) * world, rows // world * world or rows)


def by_length(rows, cfg, rank=0, world=1):
    """Rows sorted by length, in pieces of at most cfg.micro_batch rows and cfg.micro_tokens tokens,
    padding counted; a row that is longer stands alone. They are cut where that leaves the least
    padding, if a piece costs as much as 1/24 of a full one. For sums, which do not mind the
    order."""
    parts = lambda row: row if isinstance(row[0], tuple) else [row]            # a pair has two
    longest = lambda row: max(len(ids) for ids, *_ in parts(row))
    rows, held = sorted(rows, key=longest), [0]
    cost, start = [0], [0]                  # of the first j rows; where the last of their pieces is
    for j, row in enumerate(rows, 1):
        held.append(held[-1] + len(parts(row)))
        width, starts = longest(row), range(max(0, j - cfg.micro_batch), j)
        tokens = {i: (held[j] - held[i]) * width for i in starts}
        fits = [i for i, n in tokens.items() if n <= cfg.micro_tokens] or [j - 1]
        best = min(fits, key=lambda i: cost[i] + tokens[i])
        start.append(best)
        cost.append(cost[best] + tokens[best] + cfg.micro_tokens / 24)
    pieces, j = [], len(rows)
    while j:
        pieces.insert(0, rows[start[j] : j])
        j = start[j]
    n = int(all_max(len(pieces))) if SWITCHES["fsdp"] else len(pieces)
    n = even(n, len(rows), world)
    while len(pieces) < n:                                    # the fullest one is halved
        i = max(range(len(pieces)), key=lambda i: len(pieces[i]))
        half = len(pieces[i]) // 2
        pieces[i : i + 1] = [pieces[i][:half], pieces[i][half:]]
    while len(pieces) > n:                                    # of the shortest rows
        pieces[:2] = [pieces[0] + pieces[1]]
    return pieces[rank::world]


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


# ---------------------------------------------------------------------------- verify


WHOLE = re.compile(r"(?:<think>((?:(?!</?think>|</?answer>|<\|).)*)</think>)?"
                   r"<answer>((?:(?!</?think>|</?answer>|<\|).)*)</answer><\|end\|>", re.DOTALL)


def parse(completion):
    """The whole completion (primer and <|end|> included) -> (trace or "", answer), or None."""
    match = WHOLE.fullmatch(completion)
    return match and (match[1] or "", match[2].strip())


def verify(completion, answer):
    """1.0 if the completion's answer is `answer`, 0.0 if it is another, None if the completion is
    not [<think>...</think>]<answer>...</answer><|end|> from its first to its last character.
    (None is no reward as well, but counted apart.) `answer` begins after its last ####. Numbers are
    compared by value, and units where both have one (50% is 50); the rest by what it says."""
    found = parse(completion)
    return found and float(right(found[1], answer))


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


def wrap(module, ragged=True):
    """What the training forward calls: call it, not the module. The raw module trains without
    gradient sync, silently. DistributedDataParallel, or with --fsdp the module itself, its
    weights sharded in place. Make the optimizers afterwards. What has no gradient is not reduced.
    `ragged`: rows of many lengths, for which one graph is compiled; else one for the shape that
    comes first, and a second that takes the others.
    """
    for gpt in [m for m in module.modules() if isinstance(m, GPT)]:
        gpt.checkpointing = bool(SWITCHES["checkpointing"])
        for block in gpt.blocks if SWITCHES["compile"] else ():        # no name changes
            block.forward = torch.compile(block.forward, dynamic=ragged or None)
    if dist.is_initialized() and SWITCHES["fsdp"]:
        return shard(module)
    if dist.is_initialized() and any(p.requires_grad for p in module.parameters()):
        return nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)
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


def gather_full(parts):
    """Dicts and lists with FSDP2's shards in them -> the same with whole tensors, on rank 0. All
    ranks take part, tensor after tensor; the others keep nothing."""
    if isinstance(parts, dict):
        return {k: gather_full(v) for k, v in parts.items()}
    if isinstance(parts, list):
        return [gather_full(v) for v in parts]
    if not hasattr(parts, "full_tensor"):
        return parts
    full = parts.full_tensor()
    return full.cpu() if dist.get_rank() == 0 else None


def shard_like(full, mine):
    """`full` as `mine` is: cut to this rank's shard where `mine` is one of FSDP2's."""
    if not hasattr(mine, "full_tensor") or full.shape != mine.shape:
        return full
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(full.to(mine.device), mine.device_mesh, mine.placements,
                             src_data_rank=None)       # every rank has read the file


class NormRotate(torch.autograd.Function):
    """rotate(rms_norm(x, weight, eps), cos, sin): RMSNorm (Zhang & Sennrich 2019) of each head's q
    or k (Henry et al. 2020) and RoPE in half of the passes that autograd would make."""

    @staticmethod
    def forward(ctx, x, weight, cos, sin, eps):
        half = x.shape[-1] // 2
        scale = (torch.linalg.vector_norm(x, dim=-1, keepdim=True) ** 2 / x.shape[-1] + eps).rsqrt()
        ctx.save_for_backward(x, weight, cos, sin, scale)
        y = (x * (weight * cos)).addcmul_(x.roll(half, dims=-1), weight.roll(half) * sin)
        return y.mul_(scale)

    @staticmethod
    def backward(ctx, grad):
        x, weight, cos, sin, scale = ctx.saved_tensors
        grad = grad * scale
        back = (grad * sin).roll(x.shape[-1] // 2, dims=-1).addcmul_(grad, cos)   # turned back
        each = x * back                                                # d loss / d weight, unsummed
        along = (each @ weight)[..., None] * scale ** 2 / x.shape[-1]  # x's length changes nothing
        d_weight = each.sum(tuple(range(x.ndim - 1)))
        return back.mul_(weight).addcmul_(x, -along), d_weight, None, None, None


class TokenLogprobs(torch.autograd.Function):
    """log softmax(x @ weight.T / temperature) at the targets: x (N, C), weight (V, C), targets (N,)
    -> (N,). The softmax runs over `chunk` logits at a time. Up to `keep` of them wait for the
    backward pass, where they become their own gradient; more are computed again."""

    @staticmethod
    def forward(ctx, x, weight, targets, temperature, narrow, chunk, keep, train):
        ctx.rows = max(1, chunk // len(weight))
        ctx.narrow = narrow and torch.is_autocast_enabled(x.device.type)
        ctx.temperature, ctx.kept, out = temperature, [], []
        for part, target in zip(x.split(ctx.rows), targets.split(ctx.rows)):
            logprobs = TokenLogprobs.softmax(ctx, part, weight)
            out.append(logprobs.gather(1, target[:, None])[:, 0])
            if train and len(x) * len(weight) <= keep:
                ctx.kept.append(logprobs)
        ctx.save_for_backward(x, weight, targets)
        return torch.cat(out)

    @staticmethod
    def softmax(ctx, x, weight):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=ctx.narrow):
            logits = project(x, weight, ctx.narrow)
        return (logits if ctx.temperature == 1 else logits / ctx.temperature).log_softmax(-1)

    @staticmethod
    def backward(ctx, grad):
        x, weight, targets = ctx.saved_tensors
        operand = torch.bfloat16 if ctx.narrow else torch.promote_types(x.dtype, torch.float32)
        table, d_x = weight.to(operand), torch.empty_like(x)
        d_weight = torch.zeros_like(weight, dtype=torch.promote_types(operand, torch.float32))
        for part, target, g, d_part in zip(*(t.split(ctx.rows) for t in (x, targets, grad, d_x))):
            logprobs = ctx.kept.pop(0) if ctx.kept else TokenLogprobs.softmax(ctx, part, weight)
            g = g[:, None] / ctx.temperature
            d = logprobs.exp_().mul_(-g).scatter_add_(1, target[:, None], g).to(operand)
            d_part.copy_(d @ table)
            if ctx.narrow:                          # summed over the chunks in fp32
                d_weight += d.t() @ part.to(operand)
            else:
                d_weight.addmm_(d.t(), part.to(operand))
        return d_x, d_weight.to(weight.dtype), *[None] * 6


# ---------------------------------------------------------------------------- checkpoints


def record_of(cfg):
    """What a checkpoint was made from: its stage, configuration and the files read."""
    return {"stage": script_of(cfg), "config": asdict(cfg), "inputs": file_hashes}


# Leave the result unchanged, up to rounding:
NEUTRAL = {"device", "micro_batch", "micro_tokens", "save_every"}


def differing(old, new):
    """What two records disagree on: config fields and input files by name."""
    names = [] if old.get("stage", new["stage"]) == new["stage"] else ["stage"]
    for part in ("config", "inputs"):
        a, b = old.get(part, {}), new[part]
        names += [k for k in sorted(set(a) | set(b)) if k not in NEUTRAL and a.get(k) != b.get(k)]
    return names


def resume(cfg, modules, optimizers, **header):
    """-> (the first step to do, log). Continues this very configuration's unfinished run. `header`:
    what else the log's first line says, as rows=5000."""
    path = f"{cfg.out}/{script_of(cfg)}"
    respect_finished(f"{path}.pt", record_of(cfg))
    first = restore(f"{path}.state.pt", cfg, modules, optimizers)
    all_agree(first)
    model = modules["model"]
    device = next(model.parameters()).device
    threads = f" ({torch.get_num_threads()} threads)" * (device.type == "cpu")
    ranks = f"{dist.get_world_size()} x " if dist.is_initialized() else ""
    return first, Log(cfg, first, {
        "parameters": sum(p.numel() for p in model.parameters()), **header,
        "model": asdict(model.cfg), "device": f"{ranks}{device.type}{threads}"})


def respect_finished(path, record):
    """A finished checkpoint is there. run.sh (SKIP_DONE) leaves at once if it has this very record,
    or remakes it and keeps the old one; by hand, one of another record needs --overwrite 1."""
    old, names = None, []
    if os.path.isfile(path):
        with believing(f"{path} has no record of how it was made: choose another --out"):
            names = differing(old := read_checkpoint(path)["record"], record)
    by_hand = not os.environ.get("SKIP_DONE")
    if all_sum(done=old is not None and not names and not by_hand)["done"]:
        say(f"{path} is up to date")
        raise SystemExit(0)
    if names and by_hand and not SWITCHES["overwrite"]:
        fail(f"{path} is finished and was made with other {', '.join(names)}: choose another "
             "--out, or --overwrite 1 to replace it")
    if names:
        say(f"{path} will be made again (changed: {', '.join(names)}); the old one is kept as "
            f"{path}.old")


def restore(path, cfg, modules, optimizers):
    """Load an unfinished run's state, if there is one -> how many steps it has done."""
    if not os.path.exists(path):
        return 0
    parts, other = read_checkpoint(path), "choose another --out"
    with believing(f"{path} is no state of this run: {other}"):
        names, step = differing(parts["record"], record_of(cfg)), parts["step"]
        if names:
            fail(f"{path} is an unfinished run with other {', '.join(names)}: delete it to start "
                 f"afresh, or {other}")
        if type(step) is not int or not 0 < step < cfg.steps:
            raise ValueError(f"step {step!r} of {cfg.steps}")
        for name, module in modules.items():
            load_strict(module, parts[name], path)
        states = [saved["state"] for saved in parts["optimizers"]]
        if len(states) != len(optimizers):
            raise ValueError(f"{len(states)} optimizer states, not {len(optimizers)}")
        for opt, state in zip(optimizers, states):
            load_optimizer(opt, state)
    return step


def load_optimizer(opt, state):
    """Every weight's state, finite and in the weight's own shape: torch itself takes what does not
    fit. Rates and the like are this run's own."""
    weights = [p for group in opt.param_groups for p in group["params"]]
    names = {"momentum_buffer"} if type(opt) is torch.optim.Muon else {
        "step", "exp_avg", "exp_avg_sq"}
    if sorted(state) != list(range(len(weights))):
        raise ValueError("the optimizer state is one of other weights")
    for i, of in state.items():
        if set(of) != names or not all(v.shape in (weights[i].shape, ()) and v.is_floating_point()
                                       and finite(v) for v in of.values()):
            raise ValueError(f"the optimizer state of weight {i} does not fit")
        state[i] = {k: shard_like(v, weights[i]) for k, v in of.items()}
    opt.load_state_dict({"state": state, "param_groups": opt.state_dict()["param_groups"]})


def save_checkpoint(cfg, step, modules, optimizers, tokenizer, **extra):
    """After `step` steps: the finished checkpoint, or from time to time what a resume needs."""
    path, stop = f"{cfg.out}/{script_of(cfg)}", interrupted()   # any rank: all leave together
    if not (stop or step == cfg.steps or step % cfg.save_every == 0):
        return
    parts = {name: m.state_dict() for name, m in modules.items()}
    bad = [f"{k} of {name}" for name, of in parts.items() for k, v in of.items() if not finite(v)]
    if all_sum(bad=len(bad))["bad"]:
        diverged(cfg, step, f"{(bad or ['a weight'])[0]} is not finite")
    parts |= dict(tokenizer=tokenizer.spec, gpt=asdict(modules["model"].cfg), record=record_of(cfg))
    if step == cfg.steps:
        save(f"{path}.pt", then_remove=f"{path}.state.pt", **parts, **extra)
    else:
        save(f"{path}.state.pt", **parts, step=step,
             optimizers=[o.state_dict() for o in optimizers])
    if stop and step < cfg.steps:
        fail(f"stopped after step {step}; the same command continues", 130)


def finite(tensor):
    local = getattr(tensor, "_local_tensor", tensor)            # of FSDP2's, this rank's shard
    return not local.is_floating_point() or bool(local.isfinite().all())


def save(path, then_remove="", **parts):
    """Write a checkpoint atomically: a reader of `path` sees the old file or the whole new one.
    All ranks call it, rank 0 writes. A finished one of another record is kept as PATH.old."""
    path, new, parts = str(path), f"{path}.new", gather_full(parts)
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(new, "wb") as f:
            torch.save(parts, f)
            f.flush()
            os.fsync(f.fileno())
        if then_remove and os.environ.get("SKIP_DONE") and os.path.isfile(path):
            os.replace(path, f"{path}.old")
        os.replace(new, path)
    except (OSError, RuntimeError) as e:
        release(new)
        while e.__context__:                   # torch's own errors hide the system's
            e = e.__context__
        cannot_write(path, e)
    release(then_remove)


def missing(path):
    """No checkpoint there: name the script that makes it, or those that lie beside it."""
    folder, name = os.path.split(str(path))
    stage, root = name.removesuffix(".pt"), os.path.dirname(os.path.realpath(__file__))
    for script in [f"{stage}.py"] * stage[:2].isdigit() + [f"RL/{stage}.py", f"DPO/{stage}.py"]:
        if os.path.isfile(f"{root}/{script}") and not os.path.islink(f"{root}/{script}"):
            fail(f"{path} is missing: run python {script} first")
    found = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
    found = sorted(n for n in found if n.endswith(".pt") and not n.endswith(".state.pt"))
    fail(f"{path} is missing" + (f"; beside it are {', '.join(found)}" if found else ""))


def read_checkpoint(path):
    """The dict that `save` wrote, on the CPU. weights_only: a foreign file cannot run code."""
    try:
        with open(path, "rb") as f, believing(f"{path} is no checkpoint of this project"):
            if f.read(4) != b"PK\3\4":
                raise ValueError("it is no zip file")
            if not zipfile.is_zipfile(f):
                fail(f"{path} is truncated: its end is missing; delete it and make it again")
            parts = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, NotADirectoryError):
        missing(path)
    except OSError as e:
        cannot_read(path, e)
    parts = parts if isinstance(parts, dict) else {}
    odd = [k for k in ("model", "gpt", "tokenizer") if not isinstance(parts.get(k), dict)]
    odd += [k for k in ("record", "head", "value") if not isinstance(parts.get(k, {}), dict)]
    if odd:
        fail(f"{path} is no checkpoint of this project: its {', '.join(odd)} is missing or odd")
    return parts


def load(path, device="cpu", kind="policy", beside=None):
    """A checkpoint -> model, tokenizer, parts (what else the stage saved: heads, record). `kind`:
    "policy", which writes, "reward", which scores, or "any". `beside`: the tokenizer of another
    model that reads the same ids."""
    parts = read_checkpoint(path)
    try:
        with open(path, "rb") as f:
            file_hashes[str(path)] = hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as e:
        cannot_read(path, e)
    if kind != "any" and (kind == "reward") != ("head" in parts):
        fail(f"{path} is {'a' if 'head' in parts else 'no'} reward model: " + (
            "it scores completions and writes none" if "head" in parts else
            "python 06_reward.py makes one"))
    scale = [parts.get(k) for k in ("val_mean", "val_std")]
    if kind == "reward" and not (
            all(type(x) is float and math.isfinite(x) for x in scale) and scale[1] > 0):
        fail(f"{path}: the mean and std of its scores (val_mean, val_std) cannot be {scale}")
    known = {f.name: type(f.default) for f in fields(GPTConfig)}
    odd = [k for k in sorted({*parts["gpt"], *known}, key=str)
           if type(parts["gpt"].get(k)) is not known.get(k)]
    if odd:
        fail(f"{path} describes another architecture: {', '.join(map(str, odd))}")
    tokenizer = make_tokenizer(parts["tokenizer"], path)
    with believing(f"{path} describes a model that cannot be made"):
        cfg = GPTConfig(**parts["gpt"], where=f"{path}: ")
        with torch.device("meta"):             # shapes first: no memory for what does not fit
            load_shapes(GPT(cfg), parts["model"], path)
        model = GPT(cfg).to(device)
    if beside is not None and beside.spec != tokenizer.spec:
        fail(f"{path} has another tokenizer than --init: make it from that checkpoint")
    if model.cfg.vocab_size < tokenizer.vocab_size:
        fail(f"{path}: its tokenizer has {tokenizer.vocab_size} ids, "
             f"its model {model.cfg.vocab_size}")
    load_strict(model, parts.pop("model"), path)
    return model, tokenizer, parts


def load_shapes(module, weights, path):
    """All names and shapes must agree: a silent partial load would train from random weights."""
    own = module.state_dict()
    wrong = [k for k in sorted(set(own) | set(weights), key=str) if k not in own or k not in weights
             or getattr(weights[k], "shape", None) != own[k].shape]
    if wrong:
        fail(f"{path} does not fit this model: {', '.join(map(str, wrong[:3]))}"
             + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""))
    bad = [k for k, v in weights.items() if not v.is_floating_point() or not finite(v)]
    if bad:
        fail(f"{path}: {bad[0]} holds NaN or infinity, or whole numbers; make it again")


def load_strict(module, weights, path):
    """Put saved weights into a module, all of them or none."""
    own = module.state_dict()
    load_shapes(module, weights, path)
    module.load_state_dict({k: shard_like(v, own[k]) for k, v in weights.items()}, strict=True)
