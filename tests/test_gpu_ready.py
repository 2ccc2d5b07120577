"""What a GPU needs, as far as a CPU can show it: rows as arrays, operations by formula, one line
where memory ends, the settings of CUDA. Nothing here has run on a GPU."""
import json
import os
import subprocess
import sys
import tracemalloc
from array import array
from types import SimpleNamespace

import frame
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, flags, kernel, run, steps_of, weights, write_rows
from flops import CARDS, card, cards_like, flops, matrices
from torch.utils.flop_counter import FlopCounterMode

# ---------------------------------------------------------------------------- rows

def as_lists(ids, mask=None, *rest):
    return ids, mask, *rest


@pytest.mark.parametrize("name", ["01_sft", "03_dpo", "06_reward", "DPO/kto", "04_rlvr"])
def test_arrays_train_as_lists(name, make, monkeypatch, tmp_path):
    """The same bits from arrays as from lists, in every way in which rows are put together: alone,
    as pairs, mismatched, prompts before their completions."""
    for way in ("arrays", "lists"):
        if way == "lists":
            monkeypatch.setattr(kernel, "packed", as_lists)
        run(*make(name, steps=2, eval_every=1, out=tmp_path / way))
    last = name.split("/")[-1]
    assert torch.equal(*(weights(tmp_path / way / f"{last}.pt") for way in ("arrays", "lists")))
    assert [*map(repr, steps_of(tmp_path / "arrays" / f"{last}.jsonl"))] == [
        *map(repr, steps_of(tmp_path / "lists" / f"{last}.jsonl"))]


@pytest.mark.parametrize("name", ["01_sft", "03_dpo", "DPO/kto"])
def test_bytes_a_token(name, stages, data, tmp_path):
    """Rows of some 500 tokens: what stays in memory is at most 8 bytes a token. While they are read
    the file, its lines and its rows are there as well: no more than 8 bytes a character."""
    rng, stage = np.random.default_rng(0), stages[name]
    said = lambda n: "".join(rng.choice([*"abcdefghijklmnop 0123456789+-"], n))
    rows = [{"prompt": said(80), "completion": said(420), "chosen": said(420),
             "rejected": said(420)} for _ in range(300)]
    keep = ("prompt", "completion") if name == "01_sft" else ("prompt", "chosen", "rejected")
    write_rows(tmp_path / "rows.jsonl", [{k: row[k] for k in keep} for row in rows])
    model = kernel.GPT(kernel.GPTConfig(vocab_size=64, block_size=1024, n_layer=1, n_head=1,
                                        n_embd=8))
    tokenizer = kernel.load_tokenizer(f"{data}/tokenizer.json")
    tracemalloc.start()
    try:
        read = stage.read(SimpleNamespace(data=str(tmp_path)), "rows.jsonl", tokenizer, model)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    sides = read if name == "01_sft" else [side for row in read for side in row]
    tokens, text = sum(len(ids) for ids, *_ in sides), os.path.getsize(tmp_path / "rows.jsonl")
    assert len(sides) == 300 * (len(keep) - 1) and tokens > 480 * len(sides)
    assert kept / tokens <= 8 and peak <= 8 * tokens + 8 * text, (kept / tokens, peak / tokens)
    for ids, mask, *_ in sides:
        assert (ids.typecode, mask.typecode) == ("i", "b") and len(ids) == len(mask)
    if name == "DPO/kto":
        for ids, mask, _ in stage.mismatch(sides, 1024, "here"):
            assert (ids.typecode, mask.typecode) == ("i", "b") and len(ids) == len(mask)


def test_what_is_packed():
    """ids with a mask alone; the largest ids, too. Answers stay what they are, also where there are
    as many as the prompt has tokens."""
    assert kernel.packed([2 ** 31 - 1, 0], [0, 1], 7) == (array("i", [2 ** 31 - 1, 0]),
                                                         array("b", [0, 1]), 7)
    for item in (([5, 6], ["0", "1"]), ([5, 6], "01"), ([5, 6], {"a": 1}), ([5, 6], 2), ([5],)):
        assert kernel.packed(*item)[:len(item)] == item and type(kernel.packed(*item)[0]) is list


def test_pad_keeps_what_is_no_whole_number(double):
    """The sampler's log-probs go through the same door as ids."""
    rows = [[-0.25], [-1.5, -2.75]]
    assert kernel.pad(rows, "cpu").tolist() == [[-0.25, 0.0], [-1.5, -2.75]]
    assert kernel.pad(rows, "cpu").dtype == torch.float64


@pytest.mark.parametrize("kind", [list, lambda x: array("i", x)])
def test_pad(kind):
    padded = kernel.pad([kind([3, 40000]), kind([1]), kind([7, 8, 9])], "cpu", fill=-1)
    assert padded.dtype == torch.int64
    assert padded.tolist() == [[3, 40000, -1], [1, -1, -1], [7, 8, 9]]


# ---------------------------------------------------------------------------- operations

SHAPES = [{}, dict(tied=0), dict(mlp="swiglu", n_kv_head=2, norm="rms", bias="none",
                                 position="rope"), dict(head_dim=24, n_ff=80, qk_norm=1)]


def plain_attention(q, k, v, is_causal=False, enable_gqa=False, **_):
    """All of q k and p v, as the counter sees them: twice what a causal mask leaves."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.mT + torch.full((q.shape[2], k.shape[2]), -torch.inf).triu(1)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("switches", SHAPES)
def test_flops(switches, monkeypatch):
    """torch's own counter, over one forward and backward pass: three times the formula. It counts
    the whole square of attention, of which a causal mask leaves half."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", plain_attention)
    T, B, cfg = 32, 2, kernel.GPTConfig(**dict(vocab_size=96, block_size=64, n_layer=3, n_head=4,
                                               n_embd=48) | switches)
    model, ids = kernel.GPT(cfg), torch.randint(96, (B, T))
    shape = vars(cfg)
    for head in (True, False):
        with FlopCounterMode(display=False) as counter:
            hidden = model.forward_hidden(ids)
            (model.logits(hidden) if head else hidden).sum().backward()
        whole = flops(shape, 2 * T, head)                  # all T places, not the T / 2 before
        assert counter.get_total_flops() == pytest.approx(3 * B * T * whole, rel=1e-12)
    blocks = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    assert matrices(shape) == (blocks, 96 * 48)
    by_hand = 2 * (blocks + 96 * 48) + 3 * 4 * cfg.head_dim * 4 * T / 2
    assert flops(shape, T) == pytest.approx(by_hand, rel=1e-12)


def test_shape_from_flags():
    """What a command line leaves out is GPT-2's: the same numbers as from the whole GPTConfig."""
    given = dict(vocab_size=50304, n_layer=12, n_head=12, n_embd=768)
    assert flops(given, 1024) == flops(vars(kernel.GPTConfig()), 1024)
    swiglu = dict(given, mlp="swiglu")
    assert flops(swiglu, 9) == flops(vars(kernel.GPTConfig(mlp="swiglu")), 9)


@pytest.mark.parametrize("name, known", [
    ("NVIDIA H100 80GB HBM3", (989.4e12, 80e9, 3350e9)), ("NVIDIA L4", (121e12, 24e9, 300e9)),
    ("NVIDIA GeForce RTX 4090", (165.2e12, 24e9, 1008e9)),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA A10G", None), ("Tesla T4", None),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("", None), ("AMD Instinct MI300X", None)])
def test_cards(name, known):
    assert card(name) == known


def test_cards_like():
    assert cards_like("rtx 4090") == cards_like("4090") == ["RTX 4090"]
    assert cards_like("L4") == ["L4"] and cards_like("a10") == ["A10"]
    assert cards_like("h100") == ["H100 80GB HBM3", "H100 PCIe"]
    assert not cards_like("") and not cards_like("0") and not cards_like("nvidia")
    assert all(card(name) for name in CARDS)


# ---------------------------------------------------------------------------- the log

@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize("name", ["00_pretrain", "02_cot", "03_dpo", "06_reward"])
def test_mfu(name, world, make, monkeypatch, tmp_path):
    """3 passes x operations a token x tokens a second, of all cards' peak; where a token passes the
    model more than once, or backward only here and there, no such field."""
    stage, cfg = make(name, batch_size=4)
    model = vars(kernel.GPTConfig(vocab_size=50304))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA L4")
    monkeypatch.setattr(frame.dist, "is_initialized", lambda: world > 1)
    monkeypatch.setattr(frame.dist, "get_world_size", lambda: world)
    monkeypatch.setattr(frame.dist, "get_rank", lambda: 0)
    os.makedirs(cfg.out)
    log = kernel.Log(cfg, 0, {"model": model, "device": f"{world} x cuda"})
    log.last = frame.time.monotonic() - 2.0
    log(1, 40_000, loss=1.0)
    row = json.loads((tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()[-1])
    assert row["tok_s"] == pytest.approx(20_000, rel=0.01)
    if name[:2] not in ("00", "02"):
        assert "mfu" not in row
        return
    trained = 2 * (12 * 12 * 768 ** 2 + (name == "00_pretrain") * 50304 * 768)
    attention = 4 * 12 * 768 * 5_000                 # 40,000 tokens in 4 rows
    expected = 3 * (trained + attention) * row["tok_s"] / (world * 121e12)
    assert row["mfu"] == pytest.approx(expected, abs=5e-5) and expected > 0.01


@pytest.mark.parametrize("device, name", [("cpu (2 threads)", "NVIDIA L4"), ("cuda", "NVIDIA L5")])
def test_no_mfu(device, name, make, monkeypatch, tmp_path):
    """Of a CPU, and of a card that is not known, nothing is said."""
    cfg = make("00_pretrain")[1]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    os.makedirs(cfg.out)
    kernel.Log(cfg, 0, {"model": vars(kernel.GPTConfig()), "device": device})(1, 100, loss=1.0)
    row = json.loads((tmp_path / "out/00_pretrain.jsonl").read_text().splitlines()[-1])
    assert "tok_s" in row and "mfu" not in row


# ---------------------------------------------------------------------------- CUDA's settings

def test_settings_of_cuda(monkeypatch):
    """cuDNN's attention is off on CUDA, whichever script asks for the device; fp32 products stay
    fp32, as the fp32 heads need them."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        assert kernel.pick_device("cpu") == "cpu" and torch.backends.cuda.cudnn_sdp_enabled()
        assert kernel.pick_device("cuda", local=1, world=2) == "cuda:1"
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled()
        assert torch.backends.cuda.mem_efficient_sdp_enabled()
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


# ---------------------------------------------------------------------------- bench/gpu.py

@pytest.fixture
def bench(tmp_path):
    """bench("micro") -> bench/gpu.py as a module, and that part's Bench, tiny and on the CPU."""
    sys.path.append(str(ROOT / "bench"))
    import gpu
    sys.path.remove(str(ROOT / "bench"))
    return lambda part: (gpu, gpu.Bench(SimpleNamespace(
        device="cpu", tiny=True, out=str(tmp_path), part=part)))


def records(path):
    return [json.loads(line) for line in (path / "gpu.jsonl").read_text().splitlines()]


def test_bench_in_one_command(tmp_path):
    """A table at the end and a record of every figure, without what only data need; the parts of a
    step of 04 are all of it."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name in ("datasets", "tiktoken", "tokenizers", "safetensors", "matplotlib"):
        (stubs / f"{name}.py").write_text("raise ImportError('not installed')\n")
    done = subprocess.run(
        [sys.executable, "bench/gpu.py", "--device", "cpu", "--tiny", "--only", "cu,grpo", "--out",
         str(tmp_path)], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(stubs)})
    assert done.returncode == 0 and not done.stderr, done.stderr
    machine, cudnn, *grpo = records(tmp_path)
    assert machine["part"] == "machine" and machine["torch"] == torch.__version__
    assert cudnn["error"] == "on CUDA alone"
    made = {row["what"].split(",")[0]: row for row in grpo}
    assert sorted(made) == ["rollout", "score", "step", "update"]
    parts = [made[name] for name in ("rollout", "score", "update")]
    assert sum(row["ms"] for row in parts) == pytest.approx(made["step"]["ms"])
    assert sum(row["share"] for row in parts) == pytest.approx(1) and min(
        row["share"] for row in parts) > 0
    text = (tmp_path / "gpu.txt").read_text()
    assert text in done.stdout and text.count("\n") == 6 and "rollout, 4 x 2" in text


@pytest.mark.parametrize("part, n", [("chunk", 4), ("micro", 3), ("pretrain", 2), ("decode", 3)])
def test_parts_of_the_bench(part, n, bench, tmp_path):
    gpu, b = bench(part)
    gpu.PARTS[part](b)
    rows = records(tmp_path)
    assert len(rows) == n == len({row["what"] for row in rows})
    assert not [row for row in rows if "error" in row]
    for row in rows[part == "decode":]:
        assert row["tok_s"] > 0 and row["ms"] > 0 and "mfu" not in row and "peak_gb" not in row
    assert gpu.table([{"part": "machine", "card": "x"}, *rows]).count("\n") == n + 1


def test_bench_counts_what_it_says(bench, monkeypatch):
    """A step of 00 sees all rows, so many at once; MFU by the card's peak."""
    gpu, b = bench("pretrain")
    seen, forward = [], kernel.GPT.forward
    monkeypatch.setattr(kernel.GPT, "forward", lambda self, ids, *a: (
        seen.append(tuple(ids.shape)), forward(self, ids, *a))[1])
    gpu.step_of_00(b, "124M", 6, 32, 2)()
    assert seen == [(2, 32)] * 3
    b.card = 1e12, 1e9, 1e9
    figures = gpu.trained(b, "124M", 6, 32, 2)
    work = 3 * flops(dict(TINY_SHAPE), 32)
    assert figures["tflops"] == pytest.approx(work * figures["tok_s"] / 1e12)
    assert figures["mfu"] == pytest.approx(figures["tflops"])


TINY_SHAPE = dict(n_layer=2, n_head=2, n_embd=32, vocab_size=128)


def test_bench_goes_on(bench, tmp_path, monkeypatch):
    """What finds no memory and what fails are recorded in a line, and the next figure follows; a
    part that takes too long is ended with what it has started."""
    gpu, b = bench("chunk")

    def fails(error):
        raise error
    b.record("a", fails, torch.OutOfMemoryError("CUDA out of memory.\nSee"))
    b.record("b", fails, ValueError("no\nway"))
    b.record("c", lambda: {"ms": 2.0})
    assert [(r["what"], r.get("error"), r.get("ms")) for r in records(tmp_path)] == [
        ("a", "out of memory", None), ("b", "ValueError: no way", None), ("c", None, 2.0)]
    monkeypatch.setitem(gpu.SECONDS, "chunk", 0.2)
    args = SimpleNamespace(out=str(tmp_path), device="cpu", tiny=True)
    gpu.run_part("chunk", args, f"{tmp_path}/gpu.jsonl")
    assert records(tmp_path)[-1]["error"] == "not finished in 0.2 s"
    assert sum(gpu.SECONDS.values()) < 8 * 60


# ---------------------------------------------------------------------------- out of memory

TORCH = 'torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\\nSee here")'
ERRORS = {
    "cuda": TORCH, "host": 'RuntimeError("[enforce fail at alloc_cpu.cpp:127] data. '
    'DefaultCPUAllocator: can\'t allocate memory: you tried to allocate 8 bytes")',
    "python": "MemoryError()", "numpy": "numpy_error()", "mps": 'RuntimeError("MPS backend out of '
    'memory (MPS allocated: 1 GB)")', "c++": 'RuntimeError("std::bad_alloc")',
    "cublas": 'RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")'}
LATER = """
import os, runpy, sys, torch, numpy as np
def numpy_error():
    try: np.empty(2 ** 50)
    except MemoryError as e: return e
sys.path.insert(0, {root!r})
import model
calls, forward = [], model.GPT.forward_hidden
def short(*args, **kwargs):
    calls.append(1)
    if len(calls) > {calls}:
        raise {error}
    return forward(*args, **kwargs)
model.GPT.forward_hidden = short
sys.argv = {argv!r}
os.chdir({root!r})
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def short_of_memory(error, calls, argv):
    """A script whose model has memory for so many forward passes, in a process of its own."""
    text = LATER.format(root=str(ROOT), error=ERRORS[error], calls=calls, argv=argv)
    return subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, input="")


@pytest.mark.parametrize("error", ERRORS)
def test_words_for_no_memory(error):
    """Whoever has none, and however it is said; and not what only looks like it."""
    with pytest.raises(Exception) as e:
        raise eval(ERRORS[error], {"torch": torch, "numpy_error": no_room})
    assert frame.no_memory(e.value)
    for other in (ValueError("the memory of a cat"), RuntimeError("CUDA error: unknown error")):
        assert not frame.no_memory(other)


def no_room():
    try:
        np.empty(2 ** 50)
    except MemoryError as e:
        return e


@pytest.mark.parametrize("error", ["cuda", "host"])
def test_out_of_memory(error, make, tmp_path):
    """In the third step: one line, exit code 2, and the state of the second is there. The same
    command with half of the micro-batch goes on from it, to the end."""
    _, cfg = make("01_sft", steps=4, save_every=1, micro_batch=8)
    done = short_of_memory(error, 2, ["01_sft.py", *flags(cfg)])
    assert done.returncode == 2, done.stderr
    assert done.stderr == ("error: out of memory: lower --micro_batch or --micro_tokens, or use "
                           "--checkpointing 1; "
                           "what is on disk is intact\n")
    assert torch.load(f"{cfg.out}/01_sft.state.pt", weights_only=True)["step"] == 2
    if error == "cuda":
        again = subprocess.run([sys.executable, "01_sft.py", *flags(cfg), "--micro_batch", "4"],
                               cwd=ROOT, capture_output=True, text=True)
        assert again.returncode == 0 and " 2/4 " not in again.stdout, again
        assert [row["step"] for row in steps_of(f"{cfg.out}/01_sft.jsonl")] == [1, 2, 3, 4]


ADVICE = {"00_pretrain": "lower --micro_batch or --window, or use --checkpointing 1",
          "04_rlvr": "lower --micro_batch or --micro_tokens or --max_new, or use --checkpointing 1"}


@pytest.mark.parametrize("name", ADVICE)
def test_what_to_lower(name, make):
    """The flags that this script has, and that take memory from it."""
    done = short_of_memory("cuda", 0, [f"{name}.py", *flags(make(name)[1])])
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert f"out of memory: {ADVICE[name]}; what" in done.stderr


def test_chat_out_of_memory(chain):
    done = short_of_memory("cuda", 0, ["chat.py", f"{chain}/02_cot.pt", "--prompt", "1+1=?"])
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "out of memory: lower --max_new, or use a machine with more; what" in done.stderr


def test_eval_out_of_memory(chain, data, tmp_path):
    """One line for each part that found no memory, though torch says several."""
    done = short_of_memory("cuda", 0, ["eval.py", f"{chain}/02_cot.pt", "--data", str(data),
                                       "--out", str(tmp_path)])
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) > 1, done.stderr
    assert all(line.startswith("error: ") for line in lines), done.stderr
    assert any("out of memory: lower --max_new or --window" in line for line in lines), lines


def test_convert_out_of_memory(chain, tmp_path):
    """The checkpoint stays, and the folder holds nothing that looks whole."""
    text = LATER.replace("model.GPT.forward_hidden = short", "torch.Tensor.to = short").replace(
        "forward = [], model.GPT.forward_hidden", "forward = [], torch.Tensor.to").format(
        root=str(ROOT), error=ERRORS["host"], calls=0,
        argv=["convert.py", f"{chain}/02_cot.pt", f"{tmp_path}/hf"])
    before = (chain / "02_cot.pt").read_bytes()
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "out of memory" in done.stderr and "machine with more" in done.stderr
    assert (chain / "02_cot.pt").read_bytes() == before and not (tmp_path / "hf").exists()


@pytest.mark.parametrize("picked, kind", [
    ("cuda:0", "--device cpu"), ("cpu", "a machine with more"), ("", "a machine with more")])
def test_another_device(picked, kind, monkeypatch):
    """Who is on a CPU already is not sent there."""
    monkeypatch.setattr(frame.pick_device, "picked", picked)
    monkeypatch.setattr(frame, "known_flags", {"max_new": 1, "device": "auto"})
    assert frame.needs_less_memory() == f"lower --max_new, or use {kind}"


# ---------------------------------------------------------------------------- who is gone

def program(body, env=(), **how):
    text = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport model\n{body}"
    return subprocess.Popen([sys.executable, "-c", text], stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"PYTHONUNBUFFERED": ""} | dict(env), **how)


@pytest.mark.parametrize("body, code", [
    ("for i in range(10 ** 7): print(i, flush=True)", 141),      # while it works
    ("sys.stdin.read(); print(1)", 0)])                          # at its end, from the buffer
def test_a_reader_that_left(body, code):
    """Silent, as other programs are: it says nothing of ranks, and shows no traceback."""
    with program(body, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as done:
        if code:
            assert done.stdout.readline() == "0\n"
        done.stdout.close()
        done.stdin.close()
        assert done.stderr.read() == "" and done.wait() == code


@pytest.mark.parametrize("world, said", [("1", "Traceback"), ("2", "error: another rank has left")])
def test_another_connection(world, said):
    """Of a lost rank is spoken where there are ranks; a broken pipe that is not stdout is shown."""
    for error in ("ConnectionResetError('Connection reset by peer')",
                  "BrokenPipeError(32, 'Broken pipe')"):
        with program(f"raise {error}", {"WORLD_SIZE": world}, stdout=subprocess.DEVNULL) as done:
            assert done.stderr.read().startswith(said) and done.wait() == (1 if world == "1" else 2)


# ---------------------------------------------------------------------------- bf16, DDP, compile

@pytest.mark.parametrize("able", [True, False])
def test_bf16_by_capability(able, monkeypatch):
    """A card that only emulates bf16 computes in fp32, unless --bf16 asks for it."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: asked.append(including_emulation) or able)
    bf16 = lambda: isinstance(kernel.autocast("cuda"), torch.autocast)
    assert bf16() is able and asked == [False]
    monkeypatch.setitem(kernel.SWITCHES, "bf16", 1)
    assert bf16()
    assert isinstance(kernel.autocast("cpu"), torch.autocast)
    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.float64)
    assert not bf16()


@pytest.mark.parametrize("ragged", [True, False])
def test_wrap(ragged, monkeypatch):
    """DDP sends no buffers and keeps each gradient once; shapes are compiled as they come where
    they stay the same."""
    ddp, compiled = [], []
    monkeypatch.setattr(kernel.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(kernel.nn.parallel, "DistributedDataParallel",
                        lambda module, **how: ddp.append(how) or module)
    monkeypatch.setattr(torch, "compile", lambda f, **how: compiled.append(how) or f)
    monkeypatch.setitem(kernel.SWITCHES, "compile", 1)
    model = kernel.GPT(kernel.GPTConfig(vocab_size=8, block_size=8, n_layer=2, n_head=1, n_embd=8))
    kernel.wrap(model, ragged=ragged)
    assert ddp == [{"gradient_as_bucket_view": True}]
    assert compiled == [{"dynamic": True if ragged else None}] * 2


def test_who_says_that_shapes_stay(stages, make, monkeypatch):
    """00 alone: its windows are equally long."""
    for name in ("00_pretrain", "01_sft"):
        said, wrap = [], kernel.wrap
        monkeypatch.setattr(stages[name], "wrap",
                            lambda m, **how: said.append(how) or wrap(m, **how))
        run(*make(name, steps=1))
        assert said == [{"ragged": False} if name == "00_pretrain" else {}]


@pytest.mark.parametrize("error", ["cuda", "host"])
def test_no_room_is_no_damage(error, chain, make, monkeypatch):
    """A good file that finds no memory is not called a bad one: the error goes up as it is."""
    made = eval(ERRORS[error], {"torch": torch})

    def full(*args, **kwargs):
        raise made
    monkeypatch.setattr(kernel.GPT, "to", full)
    with pytest.raises((RuntimeError, SystemExit)) as e:
        kernel.load(f"{chain}/01_sft.pt")
    assert e.value is made
    monkeypatch.undo()
    monkeypatch.setattr(torch, "load", full)
    with pytest.raises((RuntimeError, SystemExit)) as e:
        kernel.read_checkpoint(f"{chain}/01_sft.pt")
    assert e.value is made


def test_no_room_to_write(tmp_path, monkeypatch, refuses):
    """Not "choose a place that can be written": the place is good."""
    kernel.save(tmp_path / "a.pt", model={"w": torch.ones(2)})
    before = (tmp_path / "a.pt").read_bytes()

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    monkeypatch.setattr(torch, "save", full)
    refuses(lambda: kernel.save(tmp_path / "a.pt", model={"w": torch.zeros(2)}),
            "out of memory while writing", "intact")
    assert (tmp_path / "a.pt").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]
