"""frame.py: what every script needs around its algorithm, and no part of any algorithm.

    files       one way in and one way out; one clear line instead of a traceback
    flags       the range of every number, the command line, what a script begins with
    ranks       torchrun's processes, sums over them, Ctrl-C
    log         one line a step, progress and time left

model.py hands all of it on: a script imports model.py alone.
"""
import argparse, atexit, ctypes, errno, fcntl, gc, hashlib, inspect, json, math, os, re, select
import shutil, signal, sys, threading, time
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields

from flops import card, flops


def last_words(kind, error, trace):
    """Instead of a traceback, where a line says it all: Ctrl-C, memory, another rank that is gone.
    Set before torch is imported, which takes a second."""
    said = f"{kind.__name__}: {error}"
    if issubclass(kind, KeyboardInterrupt):
        raise SystemExit(130)
    if issubclass(kind, BrokenPipeError) and not has_reader():        # | head: as other programs
        to_nobody()
        raise SystemExit(141)
    if no_memory(error):
        fail(f"{in_words(error)}; what is on disk is intact")
    if os.environ.get("WORLD_SIZE", "1") != "1" and re.search(
            r"DistBackendError|gloo|onnection (closed|reset|refused)|Broken pipe", said):
        fail("another rank has left: its own line says why; the same command continues")
    sys.__excepthook__(kind, error, trace)


def has_reader():
    """Whether whoever reads our stdout is still there."""
    poll = select.poll()
    poll.register(1, 0)                             # only what is always told: an error, an end
    return not poll.poll(0)


def to_nobody():
    """From here on stdout leads nowhere: what waits in its buffer would raise at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


@atexit.register
def last_lines():
    try:
        if sys.stdout and not sys.stdout.closed:
            sys.stdout.flush()
    except BrokenPipeError:
        to_nobody()


known_flags = {}       # of the script at hand, when its command line has been read


def no_memory(error):
    """Whether an exception says, in its own words, that the host or the device has none left."""
    said = f"{type(error).__name__}: {error}"
    return bool(re.search(r"(?i)MemoryError|OutOfMemory|bad_alloc|_ALLOC_FAILED|out of memory|"
                          r"not enough memory|ca(n't|nnot) allocate memory", said))


def needs_less_memory():
    """What the flags of this script offer."""
    lower = [f"--{flag}" for flag in ("micro_batch", "micro_tokens", "batch_size", "max_new",
                                      "window") if flag in known_flags]
    if "--micro_batch" in lower and "--batch_size" in lower:
        lower.remove("--batch_size")                # an optimizer's step: nothing of it waits
    other = ("--checkpointing 1" if "checkpointing" in known_flags else
             "--device cpu" if pick_device.picked not in ("", "cpu") else "a machine with more")
    return f"lower {' or '.join(lower)}, or use {other}" if lower else f"use {other}"


def in_words(error):
    """Any exception in one line."""
    return (f"out of memory: {needs_less_memory()}" if no_memory(error) else
            " ".join(f"{type(error).__name__}: {error}".split()))


sys.excepthook = last_words
# A Ctrl-C that finds torch half imported would end in an abort; model.py puts this one back.
ON_CTRL_C = signal.signal(signal.SIGINT, lambda *_: os._exit(130))
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # no log of C++ beside our own line
# Threads that wait give a shared core away soon: beside another program they are faster by far.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.distributed.nn  # noqa: E402, F401   DDP loads it, and its defaults are the group then

if sys.platform == "linux":           # big tensors keep their memory: no new page faults
    with suppress(OSError, AttributeError):                            # a libc without mallopt
        ctypes.CDLL(None).mallopt(-3, 1 << 30)                         # M_MMAP_THRESHOLD
        ctypes.CDLL(None).mallopt(-1, 2000 << 20)                      # M_TRIM_THRESHOLD

# ---------------------------------------------------------------------------- files


def fail(message, code=2):
    """Print one line on stderr, one rank a machine, and leave with this exit code."""
    if speaks():
        said = " ".join(str(message).split("\n"))
        print(said if code == 130 else f"error: {said}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def speaks():
    """Whether this rank prints an error: of each machine's ranks the first that has one. (Before
    they know each other they all see the same one, and the first of them prints it.)"""
    local, world = os.environ.get("LOCAL_RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not dist.is_initialized():
        return world == "1" or not world.isdigit() or local == "0" or not local.isdigit()
    try:
        store = dist.distributed_c10d._get_default_store()
        return store.add(f"errors of machine {os.environ.get('GROUP_RANK', 0)}", 1) == 1
    except RuntimeError:
        return local == "0"


def say(text):
    """Print a line, on rank 0 alone. A reader that has left (| head) ends no training."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            print(text, flush=True)
        except OSError:
            to_nobody()


def cannot_read(path, error, made_by=""):
    """Leave with what is true of a file that cannot be read."""
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        fail(f"{path} is missing" + (f": run {made_by} first" if made_by else ""))
    if isinstance(error, MemoryError):
        fail(f"{path} does not fit into memory")
    fail(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}")


def cannot_write(path, error):
    """Leave with why `path` cannot be written."""
    if no_memory(error):
        fail(f"out of memory while writing {path}; what was there before is intact")
    why, full = getattr(error, "strerror", None), (errno.ENOSPC, errno.EDQUOT)
    fail(f"cannot write {path} ({why or error}); what was there before is intact. "
         + ("Free some space and run the same command again"
            if getattr(error, "errno", None) in full else "Choose a place that can be written"))


@contextmanager
def believing(otherwise):
    """Whatever a foreign file makes our own code raise becomes the line `otherwise`."""
    try:
        yield
    except (SystemExit, KeyboardInterrupt, OSError, MemoryError):
        raise
    except BaseException as e:             # the tokenizers library panics outside of Exception
        if no_memory(e):
            raise
        fail(f"{otherwise} ({type(e).__name__}: {' '.join(str(e).split())[:120]})")


file_hashes = {}   # every file that this process has read -> its hash, for the checkpoint's record


def read_bytes(path, made_by=""):
    """The bytes of a file, remembered by hash. A missing file names the command that makes it."""
    try:
        with open(path, "rb") as f:
            raw = f.read()
    except (OSError, MemoryError) as e:
        cannot_read(path, e, made_by)
    file_hashes[str(path)] = hashlib.sha256(raw).hexdigest()
    return raw


def command_for(path):
    """The command that makes the data file `path`, by the name of its folder."""
    name = os.path.basename(os.path.dirname(os.path.abspath(path)))
    made_by = os.path.join(os.path.dirname(os.path.realpath(__file__)), "data", f"{name}.py")
    return f"python data/{name}.py" if os.path.isfile(made_by) else "its script in data/"


def parse_json(text):
    """JSON -> value; ValueError for whatever is wrong with it, too deep nesting too."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def read_json(path):
    try:
        return parse_json(read_bytes(path, command_for(path)))
    except ValueError as e:
        fail(f"{path} is not JSON: {e}")


def write_text(path, text):
    """Atomic, as `save`: a reader sees the old file or the whole new one."""
    try:
        with open(f"{path}.new", "w") as f:
            f.write(text)
        os.replace(f"{path}.new", path)
    except OSError as e:
        release(f"{path}.new")
        cannot_write(path, e)


def claim(out, name):
    """Make the folder `out`, try whether it can be written, and lock out/name for this process, so
    that no second run writes there. The lock is the system's: it dies with its process."""
    path = f"{out}/{name}.lock"
    if not out:
        fail("--out is empty: name a folder")
    try:
        os.makedirs(out, exist_ok=True)
        lock = open(path, "a+")
    except (OSError, RecursionError) as e:
        cannot_write(path, e)
    for file in os.listdir(out):
        if file.startswith(f"{name}.") and os.path.isdir(f"{out}/{file}"):
            fail(f"cannot write {out}/{file}: it is a folder; choose another --out")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        fail(f"{out}/{name} is being written by another run ({lock.read().strip()}): wait for it, "
             "stop it, or choose another --out")
    except OSError:
        say(f"{out} is on a disk without locks: start no second run of {name} there")
    if not os.path.exists(path) or os.fstat(lock.fileno()).st_ino != os.stat(path).st_ino:
        return claim(out, name)                # its last owner removed it in between
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {os.uname().nodename}")
    lock.flush()
    claim.held.append(lock)
    atexit.register(release, path)


def release(path):
    if os.path.isfile(path):
        os.remove(path)


claim.held = []


# ---------------------------------------------------------------------------- flags


# The range of every number that a flag can set: [ and ] with the end, ( and ) without. Where one
# name means two things, the script's name stands before it.
RANGES = {
    # Of the architecture, in a checkpoint:
    "vocab_size": "[1, 1e8]", "n_kv_head": "[0, 1000]", "head_dim": "[0, 1e5]", "n_ff": "[0, 1e6]",
    "rope_theta": "(0, 1e12]", "rope_factor": "(0, 1e4]", "rope_low": "(0, 1e4]",
    "rope_high": "(0, 1e4]", "rope_context": "[1, 1e8]", "norm_eps": "(0, 1]",
    # Of the scripts:
    "steps": "[1, 1e9]", "batch_size": "[1, 1e6]", "micro_batch": "[1, 1e6]",
    "micro_tokens": "[1, 1e9]",
    "eval_every": "[1, 1e9]", "save_every": "[1, 1e9]", "eval_rows": "[1, 1e9]",
    "warmup": "[0, 1e9]", "lr": "[0, 10]", "muon_lr": "[0, 10]", "weight_decay": "[0, 1]",
    "grad_clip": "[0, 1e9]", "seed": "[0, 4294967295]", "n_layer": "[1, 1000]",
    "n_head": "[1, 1000]", "n_embd": "[1, 1e5]", "block_size": "[2, 1e7]", "window": "[1, 1e6]",
    "qk_norm": "[0, 1]", "tied": "[0, 1]", "group_size": "[2, 1e4]", "minibatches": "[1, 1e4]",
    "epochs": "[1, 1000]", "max_new": "[1, 1e6]", "max_rounds": "[1, 1000]", "overlong": "[0, 1e6]",
    "temperature": "[0.001, 100]", "clip_eps": "(0, 1]", "clip_eps_high": "(0, 100]",
    "beta": "[0, 100]", "03_dpo.beta": "(0, 100]", "ipo.beta": "(0, 100]",
    "kto.beta": "(0, 100]", "simpo.beta": "(0, 100]", "gamma": "[0, 1]", "simpo.gamma": "[0, 100]",
    "lam": "[0, 1]", "orpo.lam": "(0, 100]", "lam_d": "(0, 100]", "lam_u": "(0, 100]",
    "vf_coef": "[0, 100]", "chat.temperature": "[0, 100]", "top_p": "(0, 1]",
    "n_greedy": "[1, 1e9]", "n_primed": "[1, 1e9]", "n_second": "[1, 1e9]", "n_beyond": "[1, 1e9]",
    "n_sampled": "[1, 1e9]", "n_pairs": "[1, 1e9]",
    "samples": "[1, 1e4]", "val_tokens": "[2, 1e12]", "limit": "[0, 1e9]", "jobs": "[1, 1000]",
    "chars": "[1, 1e9]", "questions": "[1, 1e6]", "show": "[0, 1e6]", "val_share": "(0, 1)",
    "test_share": "[0, 1)", "tokens": "[0, 1e15]", "workers": "[0, 1024]", "want": "[0, 1e9]",
    "rounds": "[1, 1000]",
    "within_reach.samples": "[2, 1e4]"}     # of one sample none is sometimes right


def check_ranges(values, script="", where="--"):
    """Leave unless every number of {flag: value} is finite and lies in its range. (A comparison
    with NaN is false: each is written so that NaN fails it.)"""
    for name, value in values.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            span = RANGES.get(f"{script}.{name}") or RANGES[name]
            low, high = map(float, span[1:-1].split(","))
            above = value >= low if span[0] == "[" else value > low
            if not (above and (value <= high if span[-1] == "]" else value < high)):
                fail(f"{where}{name} must lie in {span}, not {value}")


class Parser(argparse.ArgumentParser):
    """argparse, whose help is the script's docstring and whose errors are one line."""
    def __init__(self, doc):
        super().__init__(description=doc, allow_abbrev=False, usage="%(prog)s [--flag value ...]",
                         formatter_class=argparse.RawDescriptionHelpFormatter)
        for stream in (sys.stdout, sys.stderr):          # a name that the terminal cannot show
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")

    def parse_args(self, *args):
        given = super().parse_args(*args)
        known_flags.update(vars(given))
        return given

    def error(self, message):
        fail(f"{message}; --help lists the flags")


# No Config fields: they change results by rounding at most, stand in no record, and a run may be
# resumed with other ones.
SWITCHES = dict(compile=0, checkpointing=0, fsdp=0, bf16=0, overwrite=0)


def script_of(cfg):
    """A Config, or its class -> the name of its script: "03_dpo", "rloo"."""
    cls = cfg if isinstance(cfg, type) else type(cfg)
    return os.path.basename(sys.modules[cls.__module__].__file__).removesuffix(".py")


def cli(Config):
    """The command line -> a Config. Every field is a --flag, and its comment the flag's help."""
    parser = Parser(sys.modules[Config.__module__].__doc__)
    notes = dict(re.findall(r"(?m)^    (\w+): [^#\n]*# *(.+)$", inspect.getsource(Config)))
    for f in fields(Config):
        parser.add_argument(f"--{f.name}", type=type(f.default), default=f.default,
                            metavar=repr(f.default), help=notes.get(f.name, "").replace("%", "%%"))
    group = parser.add_argument_group("speed, memory, safety (0 or 1); results stay the same")
    for name, text in [
            ("compile", "compile the blocks for training and scoring; generation stays as it is"),
            ("checkpointing", "keep one activation a block, compute the others twice"),
            ("fsdp", "FSDP2 under torchrun: each rank holds its part of the weights; not in RL"),
            ("bf16", "bf16 matrix products, as always on CUDA; a gain on CPUs that have them"),
            ("overwrite", "replace a finished checkpoint that was made in another way")]:
        group.add_argument(f"--{name}", type=int, choices=(0, 1), default=0, metavar="0", help=text)
    flags = vars(parser.parse_args())
    SWITCHES.update({name: flags.pop(name) for name in SWITCHES})
    if SWITCHES["fsdp"] and "max_new" in flags:
        fail("--fsdp 1 is not for RL: sampling would gather all weights for every token. Without "
             "it each rank holds the whole model")
    if SWITCHES["compile"] and not any(map(shutil.which, (os.environ.get("CXX", "g++"),
                                                          "clang++"))):
        fail("--compile 1 needs a C++ compiler: install g++ or clang++")
    return Config(**flags)


def setup(cfg):
    """What a stage begins with: refuse what cannot be; ranks, device, seed, and the folder --out,
    locked -> rank, world, device."""
    check_ranges(asdict(cfg), script_of(cfg))
    rank, world, device = init_distributed(cfg.device)
    parts = world * getattr(cfg, "minibatches", 1)
    if cfg.batch_size % parts:
        fail(f"--batch_size {cfg.batch_size} is not divisible among {parts} ranks x minibatches")
    if rank == 0:
        claim(cfg.out, script_of(cfg))
    torch.manual_seed(cfg.seed)            # the same on every rank: replicas and heads start equal
    return rank, world, device


# ---------------------------------------------------------------------------- ranks


def init_distributed(device):
    """-> rank, world, device, from torchrun's environment; from here Ctrl-C, or SIGTERM, only
    requests a stop. The rank is what the process group says."""
    env = {name: os.environ.get(name, default) for name, default in
           (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", os.environ.get("RANK", "0")))}
    if not all(value.isdecimal() for value in env.values()) or not (
            int(env["RANK"]) < int(env["WORLD_SIZE"]) >= 1 > 0 <= int(env["LOCAL_RANK"])):
        fail(" ".join(f"{k}={v}" for k, v in env.items()) + " in the environment cannot be: "
             "start several processes with torchrun, or unset them")
    world, local = int(env["WORLD_SIZE"]), int(env["LOCAL_RANK"])
    at, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if world > 1 and not (at and port.isdecimal() and 0 < int(port) < 65536):
        fail(f"WORLD_SIZE={world} with MASTER_ADDR={at} and MASTER_PORT={port}: start with "
             "torchrun, or unset WORLD_SIZE")
    device = pick_device(device, local, world)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        atexit.register(leave_group)
        all_sum(here=1)        # all are connected before one may leave with a line of its own
    interrupt.seen = 0.0
    interrupt.parent = os.getppid() if world > 1 or os.environ.get("SKIP_DONE") else 0
    if threading.current_thread() is threading.main_thread():
        for sign in (signal.SIGINT, signal.SIGTERM):
            signal.signal(sign, interrupt)
    return (dist.get_rank() if world > 1 else 0), world, device


def leave_group():
    """A thread of gloo that lets go of the last collective's tensors while Python ends would abort
    the process. The group ends its threads when nothing holds it: models in DDP are cycles."""
    gc.collect()
    dist.destroy_process_group()
    time.sleep(0.05)           # a cache of FSDP2 still holds it: time for its threads to let go


def pick_device(device, local=0, world=1):
    """--device -> one that is there; auto: cuda, then mps, then cpu."""
    if device == "auto":
        device = ("cuda" if torch.cuda.is_available() else
                  "mps" if torch.backends.mps.is_available() and world == 1 else "cpu")
    if device == "cuda":
        device = f"cuda:{local}"
    there = ["cpu", *["mps"] * torch.backends.mps.is_available(),
             *[f"cuda:{i}" for i in range(torch.cuda.device_count())]]
    if device not in there:
        fail(f"--device {device}: this machine has {', '.join(there)} (auto picks one)")
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
        # Torch prefers cuDNN's attention on newer cards, and that plans anew for each batch and key
        # length: generation would wait for it in nearly every step.
        torch.backends.cuda.enable_cudnn_sdp(False)
    pick_device.picked = device
    return device


pick_device.picked = ""


def has_bf16():
    """Whether this CUDA card multiplies bf16 itself. One before Ampere (T4, V100) only emulates it,
    slower than fp32."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def interrupt(*_):
    """The first Ctrl-C lets the step finish, so that a resume can follow; the second does not.
    (torchrun hands one Ctrl-C on, so its ranks see two at once: these are one.)"""
    if interrupt.seen and time.monotonic() > interrupt.seen + 1:
        raise SystemExit(130)
    interrupt.seen = interrupt.seen or time.monotonic()


interrupt.seen, interrupt.parent = 0.0, 0


def interrupted():
    """Whether any rank was asked to stop, or has lost the launcher (or run.sh, whose process is
    SKIP_DONE) that started it."""
    orphan = interrupt.parent not in (0, os.getppid())
    try:
        os.kill(int(os.environ.get("SKIP_DONE") or os.getpid()), 0)
    except (ValueError, OverflowError, PermissionError):            # one of another user
        pass
    except ProcessLookupError:
        orphan = True
    return all_sum(seen=interrupt.seen + orphan)["seen"] > 0


def all_sum(**numbers):
    """Sums over ranks, as floats; with one process the numbers themselves. All ranks pass the same
    names in the same order."""
    if not dist.is_initialized():
        return {k: float(v) for k, v in numbers.items()}
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    t = torch.tensor([float(v) for v in numbers.values()], dtype=torch.float64, device=device)
    dist.all_reduce(t)
    return dict(zip(numbers, t.tolist()))


def all_max(number):
    """The largest of the ranks' numbers."""
    if not dist.is_initialized():
        return number
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    t = torch.tensor(number, dtype=torch.float64, device=device)
    dist.all_reduce(t, dist.ReduceOp.MAX)
    return float(t)


def all_agree(step):
    """Leave unless all ranks have read the same files and stand at the same step: two machines may
    see two disks, and would then train two runs as if they were one."""
    if not dist.is_initialized():
        return
    seen = [None] * dist.get_world_size()
    dist.all_gather_object(seen, (step, file_hashes))
    for rank, (other, hashes) in enumerate(seen):
        names = [path for path in sorted(set(hashes) | set(seen[0][1]))
                 if hashes.get(path) != seen[0][1].get(path)]
        if names:
            fail(f"rank {rank} has read another {names[0]} than rank 0: all machines need the same")
        if other != seen[0][0]:
            fail(f"rank {rank} would go on after step {other}, rank 0 after step {seen[0][0]}: "
                 "--out must be on a disk that all machines see")


# ---------------------------------------------------------------------------- log


def to_width(text):
    """A line within the terminal's width, and without what would steer the terminal."""
    width = shutil.get_terminal_size((100, 24)).columns
    text = re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", text)
    return text if len(text) <= width else text[: width - 1] + "…"


class Progress:
    """progress(done, text): what is done of `total`, the time left, and the text; some forty lines
    in all, and one wherever `always` asks for it."""

    def __init__(self, name, total, first=0):
        self.name, self.total, self.first, self.shown = name, total, first, first
        self.begun = time.monotonic()

    def __call__(self, done, text="", always=False):
        begins = self.shown == self.first < done
        if not (always or begins or done >= self.total or done - self.shown >= self.total / 40):
            return
        self.shown = done
        spent = (time.monotonic() - self.begun) / max(done - self.first, 1e-9)
        left = int(spent * max(self.total - done, 0))
        clock = f"{left // 3600}:{left // 60 % 60:02}" if left >= 3600 else f"{left // 60}"
        say(to_width(f"{self.name:>12} {done:>{len(str(self.total))}}/{self.total}  "
                    f"{clock}:{left % 60:02} left  {text}"))


# What a screen that is too narrow for all shows first.
FIRST = "val_loss", "val_accuracy", "accuracy", "reward", "kl", "loss"


class Log:
    """log(step, tokens, **metrics): one JSON line in NAME.jsonl, one line on the screen.

    The file's first line is the run: its config, model, device, sizes. `step` counts from 1, and
    `tokens` are those that the step has seen, over all ranks. "samples" among the metrics, rows
    of what the model wrote, go to NAME.samples.jsonl. `mfu`: see `share_of_peak`.
    """

    def __init__(self, cfg, first, header):
        self.cfg, self.name, self.last = cfg, script_of(cfg), time.monotonic()
        self.path, self.progress = f"{cfg.out}/{self.name}", Progress(self.name, cfg.steps, first)
        self.quiet = dist.is_initialized() and dist.get_rank() > 0
        self.model, self.peak = header.get("model"), peak_of_all(header["device"])
        if self.quiet:
            return
        head = {"stage": self.name, "config": asdict(cfg), **header, "resumed_from": first}
        begin(f"{self.path}.jsonl", first, [head])
        begin(f"{self.path}.samples.jsonl", first, [])
        sizes = [f"{v:,} {k}" for k, v in header.items() if isinstance(v, int)]
        say(to_width(f"{self.name}: {', '.join(sizes)}, {cfg.steps} steps on {header['device']}"
                    + (f"; resumed after step {first}" if first else "")))

    def __call__(self, step, tokens, samples=(), **metrics):
        now = time.monotonic()
        metrics["tok_s"], self.last = round(tokens / max(now - self.last, 1e-9)), now
        if self.peak and self.name[:2] in ("00", "01", "02"):
            metrics["mfu"] = self.share_of_peak(tokens, metrics["tok_s"])
        bad = [f"{k} is {v}" for k, v in metrics.items() if not math.isfinite(v)]
        if bad:
            diverged(self.cfg, step, ", ".join(bad))
        if self.quiet:
            return
        append(f"{self.path}.jsonl", [{"step": step, **metrics}])
        append(f"{self.path}.samples.jsonl", [{"step": step, **row} for row in samples])
        rank = {k: i for i, k in enumerate(FIRST)}
        shown = sorted(metrics, key=lambda k: rank.get(k, len(FIRST)))
        text = "  ".join(f"{k} {metrics[k]:.4g}" for k in shown if k != "tok_s")
        self.progress(step, f"{metrics['tok_s']:,} tok/s  {text}",
                      always="val_loss" in metrics or bool(samples))
        for row in samples:
            said = row["completion"].replace("\n", " / ")
            verdict = {1: "right", 0: "wrong"}.get(row["verdict"], "no answer")
            say(to_width(f"{'sample':>12} {verdict}: {said}"))

    def share_of_peak(self, tokens, per_second):
        """MFU: the operations that the formula asks for, of those that the cards could do in bf16.
        Only where each token passes the model once, forward and back: 00, 01 and 02. There 01 and
        02 compute the head for completion tokens alone, so for them it does not count; padding and
        what --checkpointing computes twice count nowhere. Of rows of unequal length the mean."""
        work = 3 * flops(self.model, tokens / self.cfg.batch_size, head=self.name[:2] == "00")
        return round(work * per_second / self.peak, 4)


def peak_of_all(device):
    """FLOP/s of all ranks' cards together, 0 where one is not known. `device` as in the log."""
    known = "cuda" in device and card(torch.cuda.get_device_name())
    return (dist.get_world_size() if dist.is_initialized() else 1) * known[0] if known else 0


def begin(path, first, head):
    """A log file from its head on; a resumed run keeps what there is up to step `first`. Damaged
    lines go: the log is for people, and no reason to stop."""
    kept = []
    if first and os.access(path, os.R_OK):
        with open(path, errors="replace") as f:
            for line in f.read().split("\n"):
                try:
                    row = parse_json(line)
                    kept += [row] if 0 < row["step"] <= first else []
                except (ValueError, TypeError, KeyError):
                    continue
    if head or kept or os.path.isfile(path):
        write_text(path, "".join(json.dumps(row) + "\n" for row in head + kept))


def append(path, rows):
    try:
        if rows:
            with open(path, "a") as f:
                f.write("".join(json.dumps(row) + "\n" for row in rows))
    except OSError as e:
        cannot_write(path, e)


def diverged(cfg, step, what):
    """Leave before anything that is not finite is kept."""
    state = f"{cfg.out}/{script_of(cfg)}.state.pt"
    fail(f"step {step}: {what}; nothing was saved and what {cfg.out} holds is intact. Lower --lr; "
         f"then {f'delete {state} or ' if os.path.exists(state) else ''}choose another --out")
