"""The machine of test_bad_inputs.py and test_writers.py: a script in a forked process.

    machine = Machine()
    done = machine.run("01_sft.py --steps 2", cwd, stdout="/dev/full")     # .code, .out, .err

One process has torch loaded and forks for every run: the child gets its own arguments, folder,
environment and streams, executes the script as `python script` would (as __main__, with the kernel
imported anew, uncaught exceptions through sys.excepthook, exit functions, the last flush), and is
gone. The loaded process itself computes nothing, so that no thread is lost in a fork.
"""
import atexit
import ctypes
import functools
import hashlib
import json
import os
import resource
import select
import shlex
import signal
import socket
import subprocess
import sys
import threading
import types
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent


class Machine:
    def __init__(self):
        env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self.process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True, env=env)
        self.count = 0

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, command, cwd, **options):
        """-> a run to wait for. `options`: stdin (text, or "closed"); stdout (a file, or "closed",
        "left", "head"); env; bound (by permissions, root too); limits {"FSIZE": bytes}; umask;
        strike [signal, function of the kernel, at which call]; patch "parity" (rewards that vary,
        where a tiny model is never right)."""
        argv = shlex.split(command) if isinstance(command, str) else list(command)
        self.count += 1
        files = {k: f"{cwd}/../.{os.path.basename(cwd)}.{self.count}.{k}" for k in ("out", "err")}
        pid = self.ask(start=argv, cwd=str(cwd), **files, **options)
        return SimpleNamespace(pid=pid, **files)

    def wait(self, run, timeout=60):
        code = self.ask(wait=run.pid, timeout=timeout)
        texts = {}
        for name in ("out", "err"):
            path = Path(getattr(run, name))
            texts[name] = path.read_bytes().decode(errors="replace") if path.exists() else ""
            path.unlink(missing_ok=True)
        return SimpleNamespace(code=code, **texts)

    def run(self, command, cwd, timeout=60, **options):
        return self.wait(self.start(command, cwd, **options), timeout)

    def ranks(self, commands, folders, timeout=60, env=(), **options):
        """One process a rank, as torchrun would start them -> their results."""
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        world = {"WORLD_SIZE": str(len(commands)), "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": str(port)}
        runs = [self.start(command, cwd, env=world | {"RANK": str(i), "LOCAL_RANK": str(i)}
                           | dict(env), **options)
                for i, (command, cwd) in enumerate(zip(commands, folders))]
        return [self.wait(run, timeout) for run in runs]

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def listing(folder):
    """{file: what it is}: the hash of its bytes, or where it points. Empty folders and locks do not
    count: --out is made before the first reading, and a lock dies with its process."""
    found = {}
    for at, names, files in os.walk(folder):
        for name in files + [n for n in names if os.path.islink(f"{at}/{n}")]:
            path = f"{at}/{name}"
            where = os.path.relpath(path, folder)
            if os.path.islink(path):
                found[where] = os.readlink(path)
            elif os.path.isfile(path) and not name.endswith(".lock"):
                found[where] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            elif not name.endswith(".lock"):
                found[where] = "no file"
    return found


# ---------------------------------------------------------------------------- the loaded process


def serve():
    sys.path.insert(0, str(ROOT))
    import model  # noqa: F401
    import torch
    torch.set_num_threads(1)
    import jinja2.sandbox, safetensors.torch, tokenizers  # noqa: E401, F401
    import torch._dynamo, torch.distributed, torch.utils.checkpoint  # noqa: E401, F401
    replies = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = await_end(request["wait"], request["timeout"])
        else:
            answer = os.fork()
            if answer == 0:
                replies.close()
                child(request)
        print(json.dumps(answer), file=replies, flush=True)


def await_end(pid, timeout):
    """The exit code, minus the signal, or "timeout"."""
    fd, late = os.pidfd_open(pid), False
    if not select.select([fd], [], [], timeout)[0]:
        late = True
        os.killpg(pid, signal.SIGKILL)
    os.close(fd)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return "timeout" if late else code


def child(request):
    os.setsid()
    atexit._clear()
    script = str(ROOT / request["start"][0])
    sys.argv, sys.path[0] = [script, *request["start"][1:]], os.path.dirname(script)
    os.chdir(request["cwd"])
    keep = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "OMP_NUM_THREADS")}
    os.environ.clear()
    os.environ.update(keep | {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:1",
                              "TIKTOKEN_CACHE_DIR": os.environ.get("TIKTOKEN_CACHE_DIR", ""),
                              "MASTER_ADDR": ""} | request.get("env", {}))
    os.umask(request.get("umask", 0o022))
    streams(request)
    for name, value in request.get("limits", {}).items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    if request.get("bound"):
        bound_by_permissions()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.excepthook = sys.__excepthook__
    for name, module in list(sys.modules.items()):         # the project's own are imported anew
        path = str(getattr(module, "__file__", None) or "")
        if path.startswith(str(ROOT)) and "/.venv/" not in path and name != "__main__":
            del sys.modules[name]
    if request.get("patch") == "parity":
        import model
        model.verify = lambda text, answer: float(sum(map(ord, text)) % 2)
    if request.get("strike"):
        strike(*request["strike"])
    os._exit(execute(script))


def bound_by_permissions():
    """Root gives up its right to pass over permissions (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH)."""
    libc = ctypes.CDLL(None)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()                  # effective, permitted, inheritable; twice
    if os.getuid() == 0:
        libc.capget(header, sets)
        sets[0] &= ~0b110
        assert libc.capset(header, sets) == 0


def streams(request):
    """Descriptors 0, 1, 2, and what Python makes of them."""
    stdin, stdout = request.get("stdin", ""), request.get("stdout", request["out"])
    err = os.open(request["err"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(err, 2)
    if stdin == "closed":
        os.close(0)
    else:
        read, write = os.pipe()
        os.write(write, stdin.encode("utf-8", "surrogateescape"))
        os.close(write)
        os.dup2(read, 0)
    if stdout in ("left", "head"):           # the reader is gone at once, or after the first bytes
        read, write = os.pipe()
        os.dup2(write, 1)
        os.close(write)
        if stdout == "head" and os.fork() == 0:
            os.close(1)
            os.read(read, 1)
            os._exit(0)
        os.close(read)
    elif stdout == "closed":
        os.close(1)
    else:
        out = os.open(stdout, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
    sys.stdin = None if stdin == "closed" else open(0, closefd=False)
    sys.stdout = None if stdout == "closed" else open(1, "w", closefd=False)
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)


def strike(sign, name, call):
    """Send ourselves a signal when the kernel's function `name` (or os.replace and the like) is
    called for the n-th time."""
    import frame
    import model
    holders = [os] if name.startswith("os.") else [m for m in (model, frame) if hasattr(m, name)]
    name = name.removeprefix("os.")
    whole, calls = getattr(holders[0], name), []

    def struck(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), sign)
        return whole(*args, **kwargs)

    for holder in holders:
        setattr(holder, name, functools.wraps(whole)(struck))


def execute(script):
    """As `python script` -> exit code."""
    main = types.ModuleType("__main__")
    main.__file__, sys.modules["__main__"] = script, main
    code = 0
    try:
        exec(compile(Path(script).read_bytes(), script, "exec"), main.__dict__)
    except SystemExit as e:
        code = left(e)
    except BaseException:
        try:
            code = 1
            sys.excepthook(*sys.exc_info())
        except SystemExit as e:
            code = left(e)
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as e:
        print(f"Exception ignored in: {sys.stdout}\n{e}", file=sys.stderr)
        code = 120
    return code


def left(e):
    if e.code is not None and not isinstance(e.code, int):
        print(e.code, file=sys.stderr)
    return 1 if isinstance(e.code, str) else e.code or 0


# ---------------------------------------------------------------------------- a world of tiny files


def make_world(machine, folder):
    """data/ and a checkpoint of every kind below `folder`, made by the scripts themselves."""
    import random

    import numpy as np
    sys.path.insert(0, str(ROOT))
    import model as kernel
    rng, data = random.Random(0), folder / "data"
    data.mkdir(parents=True)
    spec = {"kind": "chars", "chars": "".join(sorted(set(
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 \n+-*/=()?.,$<>|!:'")))}
    (data / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = kernel.Tokenizer(spec)
    for part, n in (("train", 20), ("val", 8), ("test", 8)):
        sums = [(rng.randint(1, 30), rng.randint(1, 30)) for _ in range(n)]
        ids = sum((tokenizer.encode(f"{a}+{b}={a + b}") + [tokenizer.end]
                   for a, b in sums * 12), [])
        if part != "test":
            np.asarray(ids, np.uint16).tofile(data / f"{part}.bin")
        think = [f"<think>{a}+{b}={a + b}</think><answer>{a + b}</answer>" for a, b in sums]
        rows = {"sft": [dict(prompt=f"{a}+{b}=?", completion=f"<answer>{a + b}</answer>")
                        for a, b in sums],
                "cot": [dict(prompt=f"{a}+{b}=?", completion=t)
                        for (a, b), t in zip(sums, think)],
                "pairs": [dict(prompt=f"{a}+{b}=?", chosen=t, rejected=t.replace("=", "=1"))
                          for (a, b), t in zip(sums, think)],
                "rl": [dict(prompt=f"{a}+{b}=?", answer=str(a + b)) for a, b in sums]}
        for kind in rows:
            (data / f"{kind}_{part}.jsonl").write_text(
                "".join(json.dumps(row) + "\n" for row in rows[kind]))
    shape = "--n_layer 1 --n_head 2 --n_embd 16 --block_size 64 --window 24"
    tiny = "--device cpu --steps 1 --batch_size 4 --micro_batch 4 --warmup 1"
    for command in (
            f"00_pretrain.py --data data --out out {shape} {tiny}",
            f"01_sft.py --data data --init out/00_pretrain.pt --out out {tiny}",
            f"06_reward.py --data data --init out/01_sft.pt --out out {tiny}"):
        done = machine.run(command, folder)
        assert done.code == 0, done.err
    (folder / "out").rename(folder / "start")
    make_hf(machine, folder, f"{shape} {tiny}")
    unfinished = machine.run(
        f"01_sft.py --data data --init start/00_pretrain.pt --out unfinished {tiny} --steps 4 "
        "--save_every 1", folder, strike=[signal.SIGTERM, "append", 4])
    assert unfinished.code == 130, unfinished
    done = machine.run(f"01_sft.py --data data --init start/00_pretrain.pt --out finished {tiny}",
                       folder)
    assert done.code == 0, done.err
    return folder


def make_hf(machine, folder, flags):
    """hf/: a tiny Llama in Hugging Face's format, with a byte-level tokenizer of its own."""
    import tokenizers
    bpe, text = folder / "bpe", "12+5=17 and some words more. " * 40
    (folder / "source").mkdir()
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = tokenizers.decoders.ByteLevel()
    tok.train_from_iterator([text], tokenizers.trainers.BpeTrainer(
        vocab_size=300, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    tok.save(str(folder / "source/tokenizer.json"))
    (folder / "source/text.txt").write_text("<|endoftext|>".join(f"{i} {text}" for i in range(40)))
    for command in (
            "data/text.py source/text.txt --tokenizer source/tokenizer.json --out bpe --workers 1 "
            "--val_share 0.3",
            f"00_pretrain.py --data bpe --out bpe --position rope --norm rms --mlp swiglu "
            f"--bias none --qk_norm 0 {flags}",
            "convert.py bpe/00_pretrain.pt hf"):
        done = machine.run(command, folder)
        assert done.code == 0, done.err
    for name in ("train.bin", "val.bin"):
        if not (bpe / f"{name}.json").exists():
            describe(bpe / name, bpe / "tokenizer.json")


def describe(path, tokenizer):
    """path.json, as a preparer writes it."""
    import model as kernel
    import numpy as np
    made, spec = np.fromfile(path, np.uint16), kernel.load_tokenizer(str(tokenizer)).spec
    edges = made[: 2 ** 20].tobytes() + made[-2 ** 20:].tobytes() + str(len(made)).encode()
    Path(f"{path}.json").write_text(json.dumps(dict(
        dtype="uint16", count=len(made), max_id=int(made.max()),
        edges=hashlib.sha256(edges).hexdigest(), tokenizer=hashlib.sha256(
            json.dumps(spec, sort_keys=True).encode()).hexdigest())))


if __name__ == "__main__":
    serve()
