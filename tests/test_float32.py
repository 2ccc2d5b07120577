"""Nothing makes float64 on a device in an fp32 run: Apple's mps has none, and refuses. There is no
mps here, so every tensor says that it is on "cpu:0"; what names no device stays on the host."""
import runpy
import sys

import numpy as np
import pytest
import torch
import conftest
import frame
from conftest import ROOT, SCRIPTS, kernel, run
from test_eval_chat import world  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE, WIDE = torch.device(conftest.DEVICE, 0), (torch.float64, torch.complex128)
HOST = {"aten.lift_fresh.default", "aten._to_copy.default"}       # numpy -> torch, and narrowing


def wide(values, least=0):
    """The tensors of float64 among them, of at least so many dimensions."""
    return [t for t in tree_leaves(values)
            if torch.is_tensor(t) and t.dtype in WIDE and t.dim() >= least]


class Narrow(TorchDispatchMode):
    """Refuses every operation on float64, but for what the host does with NumPy's numbers before
    they are handed over: to wrap them, and to round them."""
    def __init__(self):
        super().__init__()
        self.host, self.seen = 0, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs, out = kwargs or {}, op(*args, **kwargs or {})
        self.seen += 1
        # Of what goes in, not the 0-d: a Python number beside a tensor, which takes its type.
        if not self.host and (wide(args, 1) or wide(out)):
            assert str(op) in HOST, f"{op} on float64"
            assert not wide(out) or wide(args) and kwargs.get("device") != DEVICE, (
                f"{op}: float64 on the device")
        return out


@pytest.fixture
def narrow(monkeypatch):
    """Under this, what mps would refuse is an AssertionError."""
    mode, init = Narrow(), kernel.GPT.__init__
    if conftest.DEVICE == "cpu":
        monkeypatch.setattr(torch.Tensor, "device", property(lambda self: DEVICE), raising=False)
    monkeypatch.setattr(frame, "pick_device", lambda *args: str(DEVICE))

    def on_the_host(model, cfg):                   # its angles are computed there, and then rounded
        mode.host += 1
        init(model, cfg)
        mode.host -= 1
        assert not wide(list(model.state_dict().values()) + list(model.buffers()))

    def refused(make):
        def made(*args, device=None, **kwargs):
            out = make(*args, device=device, **kwargs)
            assert device is None or not wide(out), f"{make.__name__} of float64 on the device"
            return out
        return made

    monkeypatch.setattr(kernel.GPT, "__init__", on_the_host)
    for name in ("tensor", "as_tensor", "asarray"):
        monkeypatch.setattr(torch, name, refused(getattr(torch, name)))
    with mode:
        yield mode
    assert mode.seen > 100


ON_THE_DEVICE = {
    "numpy's own": lambda x: torch.as_tensor(np.ones(3)).to(x.device),
    "numpy's, at once": lambda x: torch.as_tensor(np.ones(3), device=x.device),
    "by name": lambda x: torch.zeros(3, dtype=torch.float64, device=x.device),
    "a list by name": lambda x: torch.tensor([1.0, 2.0], dtype=torch.float64, device=x.device),
    "widened": lambda x: x.double(), "summed": lambda x: x.sum(0, dtype=torch.float64),
    "beside numpy's": lambda x: x * torch.as_tensor(np.ones(3))}


@pytest.mark.parametrize("way", ON_THE_DEVICE)
def test_it_is_noticed(way, narrow):
    """The seven ways to make one; and the right way round."""
    x = sum(torch.ones(3) for _ in range(60)).to(DEVICE)
    with pytest.raises((AssertionError, RuntimeError), match="float64|same device"):
        ON_THE_DEVICE[way](x)
    y = torch.as_tensor(np.ones(3)).to(x.dtype).to(x.device) * 2.5 + x
    assert y.dtype == torch.float32


@pytest.mark.parametrize("switches", [{}, dict(position="rope", norm="rms", mlp="swiglu", tied=0,
                                               qk_norm=1, n_kv_head=2, rope_factor=8.0)])
@pytest.mark.parametrize("temperature, top_p", [(0, 1), (0.7, 1), (1.3, 0.8)])
def test_generate(switches, temperature, top_p, narrow):
    cfg = kernel.GPTConfig(**dict(vocab_size=13, block_size=24, n_layer=2, n_head=4,
                                  n_embd=32) | switches)
    asked = [[1, 2, 3], [4], [4], [5] * 9, [7, 8]]
    said, logprobs = kernel.generate(kernel.GPT(cfg).to(DEVICE), asked, 10, 12, temperature,
                                     slots=3, top_p=top_p)
    assert len(said) == len(logprobs) == 5


@pytest.mark.parametrize("name", SCRIPTS)
def test_stages(name, make, narrow):
    """Two steps, an evaluation after each; Muon and AdamW where both are used."""
    run(*make(name, steps=2, eval_every=1))


def test_evaluation(world, tmp_path, narrow, monkeypatch):  # noqa: F811
    """eval.py over a folder: bits, greedy and sampled answers, pairs, scores, the chat."""
    out, data = world
    monkeypatch.setattr(sys, "argv", ["eval.py", *(str(out / f"{name}.pt") for name in (
        "00_pretrain", "02_cot", "03_dpo", "06_reward")), "--out", str(tmp_path), "--data",
        str(data), "--n_greedy", "3", "--n_sampled", "4", "--samples", "2",
        "--max_new", "6"])
    runpy.run_path(str(ROOT / "eval.py"), run_name="__main__")
    assert (tmp_path / "results.json").is_file()


def test_chat(world, narrow, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(sys, "argv", ["chat.py", str(world[0] / "02_cot.pt"), "--prompt", "2+2=?",
                                      "--max_new", "4", "--temperature", "0.7", "--top_p", "0.9"])
    try:
        runpy.run_path(str(ROOT / "chat.py"), run_name="__main__")
    except SystemExit as e:
        assert not e.code, capsys.readouterr().err
