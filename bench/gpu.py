"""gpu.py: what one GPU shows of this project. One command, unattended, under eight minutes; a short
table last. Random weights and ids: it needs torch and NumPy, no data and no network.

    python bench/gpu.py                          # all parts, into out/gpu
    python bench/gpu.py --only decode,grpo       # beginnings of their names, with commas
    python bench/gpu.py --device cpu --tiny      # whether it runs: seconds, and no figure counts

    cudnn       generate with cuDNN's attention off and on, first and second run: its plans are
                cached by key length, and generation has another one each step
    chunk       token_logprobs, forward and backward, by logits at a time
    micro       00's update with the same rows in micro-batches of several sizes
    pretrain    00's update: tokens a second and MFU of 124M and 406M, with --compile 0 and 1
    decode      a step of generate at 1, 32 and 256 rows, beside what reading the weights and the
                cache takes at the memory's speed
    grpo        a step of 04 as the script runs: rollout, score, update

Each part is a process of its own, with its own seconds: what finds no memory, fails or takes too
long is recorded, and the next one begins. Each figure is in gpu.jsonl as soon as it is there.
"""
import gc, importlib, itertools, json, os, platform, signal, statistics, subprocess, sys, time
from collections import Counter
from contextlib import nullcontext
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from model import (GPT, GPTConfig, SWITCHES, Parser, append, autocast, claim, fail,  # noqa: E402
                   generate, make_optimizers, pick_device, say, wrap, write_text)
from flops import card, flops, matrices  # noqa: E402
from frame import no_memory  # noqa: E402
import torch  # noqa: E402

SHAPES = {"124M": dict(n_layer=12, n_head=12, n_embd=768),
          "406M": dict(n_layer=24, n_head=16, n_embd=1024, tied=0)}
TINY = {"124M": dict(n_layer=2, n_head=2, n_embd=32, vocab_size=128, block_size=128),
        "406M": dict(n_layer=3, n_head=2, n_embd=32, vocab_size=128, block_size=128, tied=0)}
SECONDS = dict(cudnn=60, chunk=45, micro=75, pretrain=150, decode=60, grpo=70)     # 460 together


class Bench:
    """The device, sizes, and the two things that all parts do: measure, record."""

    def __init__(self, args):
        self.device, self.tiny = pick_device(args.device), args.tiny
        self.path, self.part = f"{args.out}/gpu.jsonl", args.part
        self.cuda = self.device.startswith("cuda")
        self.card = card(torch.cuda.get_device_name()) if self.cuda else None
        self.shapes = TINY if args.tiny else SHAPES
        self.context = 64 if args.tiny else 1024
        torch.manual_seed(0)

    def size(self, full, tiny):
        return tiny if self.tiny else full

    def model(self, name):
        with torch.device(self.device):
            return GPT(GPTConfig(**self.shapes[name]))

    def ids(self, *shape):
        vocab = self.shapes["124M"].get("vocab_size", 50257)
        return torch.randint(vocab, shape, device=self.device)

    def wait(self):
        if self.cuda:
            torch.cuda.synchronize()

    def timed(self, f, n=3, warm=1):
        """Median seconds of f() after `warm` calls that do not count, and the peak memory, GB."""
        seconds = []
        for i in range(warm + n):
            if i == warm and self.cuda:
                torch.cuda.reset_peak_memory_stats()
            self.wait()
            begun = time.perf_counter()
            f()
            self.wait()
            seconds.append(time.perf_counter() - begun)
        return statistics.median(seconds[warm:]), self.peak()

    def peak(self):
        return {"peak_gb": torch.cuda.max_memory_allocated() / 1e9} if self.cuda else {}

    def record(self, what, measure, *given, **how):
        """One line of gpu.jsonl: the figures of measure(...), or why there are none."""
        gc.collect()                                        # a compiled model is a circle
        try:
            figures = measure(*given, **how)
        except Exception as e:
            full = no_memory(e)
            figures = {"error": "out of memory" if full else
                       f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"}
        if self.cuda and "error" in figures:
            torch.cuda.empty_cache()
        append(self.path, [{"part": self.part, "what": what, **figures}])


def stage(name):
    return importlib.import_module(name)


def never_ends(b, model, rows, prompt, new):
    """generate, of `rows` different prompts, none of which meets its end."""
    return lambda: generate(model, b.ids(rows, prompt).tolist(), new, end=-1, slots=rows)


def rate(b, f, tokens, n=3, warm=1):
    """The figures of f(), which handles so many tokens."""
    seconds, peak = b.timed(f, n, warm)
    return {"tok_s": tokens / seconds, "ms": 1e3 * seconds, **peak}


# ---------------------------------------------------------------------------- parts


def cudnn(b):
    if not b.cuda:
        return b.record("cuDNN's attention", lambda: {"error": "on CUDA alone"})
    model, rows, new = b.model("124M"), b.size(64, 4), b.size(64, 8)
    never_ends(b, model, 2, 8, 4)()                         # what CUDA loads at its first use
    run = never_ends(b, model, rows, 32, new)
    for on in (False, True):
        torch.backends.cuda.enable_cudnn_sdp(on)
        for time_ in ("first", "second"):
            b.record(f"{'on' if on else 'off'}, {time_} run, {rows} rows x {new} tokens",
                     rate, b, run, rows * new, n=1, warm=0)


def chunk(b):
    model, rows = b.model("124M"), b.size(8, 2)
    ids = b.ids(rows, b.context)
    hidden = torch.randn(*ids.shape, model.cfg.n_embd, device=b.device, requires_grad=True)

    def run(**how):
        with autocast(b.device):
            model.token_logprobs(hidden, ids, **how).sum().backward()
        hidden.grad = None
        model.zero_grad(set_to_none=True)

    for power in b.size(range(23, 29), range(10, 12)):
        b.record(f"2^{power} logits at a time, computed twice",
                 rate, b, partial(run, chunk=2 ** power, keep=1), ids.numel())
    b.record("as it comes", rate, b, run, ids.numel())
    b.record("as it comes, all kept", rate, b, partial(run, keep=2 ** 40), ids.numel())


def step_of_00(b, name, rows, window, at_once, compiled=0):
    """One optimizer step of 00 on synthetic ids, as a function."""
    pretrain, model = stage("00_pretrain"), b.model(name)
    SWITCHES["compile"] = compiled
    cfg = pretrain.Config(lr=6e-4, muon_lr=0.0, weight_decay=0.1, device=b.device)
    ddp, optimizers = wrap(model), make_optimizers([model], cfg.lr, weight_decay=cfg.weight_decay)
    batches = [(ids,) for ids in b.ids(rows, window + 1).split(at_once)]

    def objective(ids):
        return pretrain.pretrain_loss(ddp(ids[:, :-1], ids[:, 1:]))

    return lambda: pretrain.update(cfg, 100, ddp, optimizers, batches, objective)


def trained(b, name, rows, window, at_once, compiled=0, n=2):
    """The figures of such a step."""
    run = step_of_00(b, name, rows, window, at_once, compiled)
    figures = rate(b, run, rows * window, n, warm=1 + compiled)
    work = 3 * flops(vars(GPTConfig(**b.shapes[name])), window) * figures["tok_s"]
    return figures | {"tflops": work / 1e12} | ({"mfu": work / b.card[0]} if b.card else {})


def micro(b):
    long, short = b.context, b.context // 8
    for window, rows, sizes in ((long, b.size(32, 4), b.size((1, 2, 4, 8, 16, 32), (2, 4))),
                                (short, b.size(256, 8), b.size((8, 16, 32, 64, 128, 256), (8,)))):
        for at_once in sizes:
            b.record(f"{rows} rows of {window}, {at_once} at once",
                     trained, b, "124M", rows, window, at_once)


def pretrain(b):
    for name, at_once in (("124M", b.size(16, 2)), ("406M", b.size(8, 2))):
        for compiled in b.size((0, 1), (0,)):
            b.record(f"{name}, {at_once} x {b.context} at once, --compile {compiled}",
                     trained, b, name, 4 * at_once, b.context, at_once, compiled, n=3)


def speed_of_memory(b):
    """Bytes a second of a copy, read and written."""
    x = torch.empty(b.size(2 ** 29, 2 ** 20), dtype=torch.float32, device=b.device)
    y = torch.empty_like(x)
    return 2 * 4 * len(x) / b.timed(lambda: y.copy_(x), n=5)[0]


def decoded(b, model, rows, moved):
    """A step of generate: the difference of two lengths, in which the prefill is the same. Its
    limit: all weights and the cache once, in the width of the products."""
    few, many, prompt = b.size((32, 96, 64), (4, 12, 8))
    short, long = (b.timed(never_ends(b, model, rows, prompt, n), n=2) for n in (few, many))
    step = (long[0] - short[0]) / (many - few)
    cache = 2 * model.cfg.n_layer * model.cfg.n_embd * rows * (prompt + (few + many) / 2)
    width = 4 if isinstance(autocast(b.device), nullcontext) else 2
    limit = width * (sum(matrices(vars(model.cfg))) + cache) / moved
    return {"ms": 1e3 * step, "tok_s": rows / step, "limit_ms": 1e3 * limit,
            "of_limit": limit / step, **long[1]}


def decode(b):
    moved, model = speed_of_memory(b), b.model("124M")
    b.record("a copy", lambda: {"gb_s": moved / 1e9} | (
        {"of_data_sheet": moved / b.card[2]} if b.card else {}))
    for rows in b.size((1, 32, 256), (1, 4)):
        b.record(f"rows: {rows}", decoded, b, model, rows, moved)


class Wordless:
    """Stands in for a tokenizer: random weights have nothing to say."""
    end, spec = -1, {}

    def decode(self, ids):
        return ""


class Laps:
    """Seconds and peak memory of the last step of 04: of the functions that `of` has wrapped by
    name, and of "score", which is all that happens between them."""

    def __init__(self, b):
        self.b, self.ends = b, []
        self.clear()

    def clear(self):
        self.seconds, self.peaks = Counter(), {}

    def mark(self, name):
        """What has happened since the last mark was `name`."""
        self.b.wait()
        for k, v in self.b.peak().items():
            self.peaks[name] = {k: max(v, self.peaks.get(name, {}).get(k, 0))}
        if self.b.cuda:
            torch.cuda.reset_peak_memory_stats()
        now = time.perf_counter()
        self.seconds[name] += now - (self.ends[-1] if self.ends else now)
        self.ends.append(now)

    def of(self, name, f):
        def wrapped(*args, **kwargs):
            self.mark("score")
            out = f(*args, **kwargs)
            self.mark(name)
            return out
        return wrapped


def steps_of_04(b, prompts, group, asked, new):
    """main of 04 on random weights and prompts, rewards 0 and 1 in turns -> Laps of a step."""
    rlvr, laps, judged = stage("04_rlvr"), Laps(b), itertools.count()
    cfg = rlvr.Config(steps=3, batch_size=prompts, group_size=group, max_new=new,
                      micro_batch=b.size(32, 4), micro_tokens=10 ** 9, eval_every=10 ** 9,
                      device=b.device)
    rows = [(b.ids(asked).tolist(), "1") for _ in range(prompts)]

    def log(step, tokens, **metrics):
        laps.mark("score")
        if step < cfg.steps:                                # only the last one counts
            laps.clear()

    patches = dict(setup=lambda *a: (0, 1, b.device), read=lambda *a: rows,
                   load=lambda *a: (b.model("124M"), Wordless(), {}),
                   resume=lambda *a, **k: (0, log), save_checkpoint=lambda *a, **k: None,
                   evaluate=lambda *a: {}, verify=lambda *a: float(next(judged) % 2),
                   rollout=laps.of("rollout", rlvr.rollout), update=laps.of("update", rlvr.update))
    for name, patch in patches.items():
        setattr(rlvr, name, patch)
    rlvr.main(cfg)
    return laps


def grpo(b):
    prompts, group, asked, new = b.size((32, 8, 128, 256), (4, 2, 8, 8))
    try:
        laps = steps_of_04(b, prompts, group, asked, new)
    except Exception as e:
        return b.record("a step", raised, e)
    whole, rows = sum(laps.seconds.values()), prompts * group
    for name, seconds in [*laps.seconds.items(), ("step", whole)]:
        b.record(f"{name}, {prompts} x {group} completions of {new}", lambda part: part, {
            "ms": 1e3 * seconds, "share": seconds / whole, **laps.peaks.get(name, {}),
            "tok_s": rows * new / seconds if name in ("rollout", "step") else None})


def raised(error):
    raise error


PARTS = {f.__name__: f for f in (cudnn, chunk, micro, pretrain, decode, grpo)}

# ---------------------------------------------------------------------------- all of them

# Key of a figure -> how the table says it.
SAID = {"tok_s": "{:,.0f} tok/s", "ms": "{:.2f} ms", "limit_ms": "limit {:.2f} ms",
        "of_limit": "{:.0%} of it", "mfu": "MFU {:.1%}", "tflops": "{:.0f} TFLOP/s",
        "share": "{:.0%}", "gb_s": "{:,.0f} GB/s", "of_data_sheet": "{:.0%} of the data sheet's",
        "peak_gb": "{:.1f} GB", "error": "{}"}


def machine(device):
    if not device.startswith("cuda"):
        return {"card": platform.processor() or platform.machine(), "torch": torch.__version__}
    at = torch.cuda.get_device_properties(device)
    known = card(at.name)
    return {"card": at.name, "memory_gb": at.total_memory / 1e9, "torch": torch.__version__,
            "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
            "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
            "peak_tflops": known and known[0] / 1e12, "data_sheet_gb_s": known and known[2] / 1e9}


def table(rows):
    """The records as text: a line each."""
    lines = [", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                       for k, v in rows[0].items() if k != "part")]
    for row in rows[1:]:
        figures = [said.format(row[key]) for key, said in SAID.items() if row.get(key) is not None]
        lines.append(f"{row['part']:>8}  {row['what']:<44}  {'  '.join(figures)}")
    return "\n".join(lines) + "\n"


def run_part(name, args, path):
    """A part in a process of its own; what it did not finish is recorded."""
    command = [sys.executable, __file__, "--part", name, "--out", args.out, "--device",
               args.device, *["--tiny"] * args.tiny]
    begun = time.monotonic()
    child = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        why = child.wait(SECONDS[name]) and f"ended with {child.returncode}"
    except subprocess.TimeoutExpired:
        why = f"not finished in {SECONDS[name]} s"
    finally:                                                # and what a compiler has started
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        child.wait()
    if why:
        append(path, [{"part": name, "what": "the rest of it", "error": why}])
    say(f"{name}: {time.monotonic() - begun:.0f} s")


def main(args):
    chosen = [n for n in PARTS if any(n.startswith(o) for o in args.only.split(",") if o)]
    if args.only and not chosen:
        fail(f"--only {args.only}: the parts are {', '.join(PARTS)}")
    if args.part:
        return PARTS[args.part](Bench(args))
    device, path = pick_device(args.device), f"{args.out}/gpu.jsonl"
    claim(args.out, "gpu")
    write_text(path, "")
    append(path, [{"part": "machine", **machine(device)}])
    for name in chosen or PARTS:
        run_part(name, args, path)
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    write_text(f"{args.out}/gpu.txt", table(rows))
    say(table(rows) + f"in {args.out}: gpu.jsonl, gpu.txt")


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("--only", default="", help="parts, by the beginnings of their names")
    parser.add_argument("--out", default="out/gpu", help="folder of the records (%(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="sizes that show only that it runs")
    parser.add_argument("--part", choices=list(PARTS), help="this one alone, in this process")
    main(parser.parse_args())
