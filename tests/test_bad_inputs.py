"""Bad inputs, by kind: one line that gives the reason, exit code 2, nothing on disk changed.

    ./test.sh tests/test_bad_inputs.py                        a fixed 200 of them
    BAD_INPUTS=all ./test.sh tests/test_bad_inputs.py -k json     all of a kind

A case is a command in a folder of tiny files (harness.make_world), what is done to the folder
first, and the reason as a pattern.
"""
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from harness import ROOT, Machine, listing, make_world

TINY = "--device cpu --steps 2 --batch_size 4 --micro_batch 4 --warmup 1"
SHAPE = "--n_layer 1 --n_head 2 --n_embd 16 --block_size 64 --window 24"
PRE = f"00_pretrain.py --data data --out out {SHAPE} {TINY}"
SFT = f"01_sft.py --data data --init start/00_pretrain.pt --out out {TINY}"
COT = SFT.replace("01_sft", "02_cot")
DPO = f"03_dpo.py --data data --init start/01_sft.pt --out out {TINY}"
ROLL = f"--data data --init start/01_sft.pt --out out {TINY} --group_size 2 --minibatches 1 " \
       "--max_new 8 --eval_rows 2"
RLVR, DAPO = f"04_rlvr.py {ROLL}", f"RL/dapo.py {ROLL} --overlong 4"
PPO = f"05_ppo.py {ROLL} --reward start/06_reward.pt".replace("--group_size 2 ", "")
REWARD = DPO.replace("03_dpo", "06_reward")
KTO, ORPO, SIMPO = (DPO.replace("03_dpo", f"DPO/{x}") for x in ("kto", "orpo", "simpo"))
EVAL = "eval.py --out start --data data --device cpu --max_new 8 --n_greedy 2 --n_second 2 " \
       "--n_primed 2 --n_sampled 2 --samples 2 start/01_sft.pt"
CHAT = "chat.py start/01_sft.pt --device cpu --max_new 8"
TASKS = "tasks.py start/01_sft.pt --device cpu --out out/tasks.json"
REACH = "data/within_reach.py start/01_sft.pt --rows data/rl_train.jsonl --device cpu --max_new 8"
TO, BACK = "convert.py hf new.pt", "convert.py bpe/00_pretrain.pt new_hf"

CASES, KINDS = [], {}


def case(command, reason, change=None, code=2, **options):
    """`change`: {path: text, bytes, None (removed) or f(what is there)}, or f(folder)."""
    kind = KINDS["now"]
    n = sum(c.kind == kind for c in CASES)
    CASES.append(SimpleNamespace(
        id=f"{kind}-{n}", kind=kind, command=command, reason=reason, change=change, code=code,
        options=options))


def kind(name):
    KINDS["now"] = name


def rows(path, *new):
    """Replace the first lines of a JSONL file."""
    text = [x if isinstance(x, str) else json.dumps(x) for x in new]

    def change(old):
        return "\n".join(text + old.decode().splitlines()[len(text):]) + "\n"
    return {path: change}


def pt(path, edit):
    """Change the parts of a checkpoint."""
    def change(folder):
        parts = torch.load(folder / path, weights_only=True)
        edit(parts)
        torch.save(parts, folder / path)
    return change


def js(path, edit):
    """Change the value of a JSON file."""
    def change(old):
        value = json.loads(old)
        new = edit(value)
        return json.dumps(new if isinstance(new, list) or isinstance(new, dict) and len(new) > 2
                          else value)
    return {path: change}


# ---------------------------------------------------------------------------- flags

kind("flags")
for command, reason in [
        (SFT + " --lr nan", r"--lr must lie in \[0, 10\], not nan"),
        (SFT + " --lr -1", "--lr must lie"), (SFT + " --lr 1e39", "--lr must lie"),
        (SFT + " --lr x", "argument --lr: invalid float value: 'x'"),
        (SFT + " --steps 1.5", "argument --steps: invalid int"),
        (SFT + " --steps 0", "--steps must lie"), (SFT + " --steps", "--steps: expected one arg"),
        (SFT + " --step 3", "unrecognized arguments: --step 3"),
        (SFT + " --seed 100000000000000000000000", "--seed must lie"),
        (SFT + " --seed -1", "--seed must lie"), (SFT + " --grad_clip inf", "--grad_clip must lie"),
        (SFT + " --warmup -1", "--warmup must lie"), (SFT + " --eval_every 0", "--eval_every must"),
        (SFT + " --save_every -5", "--save_every must"), (SFT + " extra", "unrecognized.*extra"),
        (SFT + " --batch_size 1e3", "invalid int"), (SFT + " --batch_size 0", "--batch_size must"),
        (SFT + " --batch_size 99999999999", "--batch_size must lie"),
        (SFT + " --micro_batch 0", "--micro_batch must lie"),
        (SFT + " --compile 2", "--compile: invalid choice"),
        (SFT + " --bf16 yes", "--bf16: invalid int"), (SFT + " --overwrite -1", "--overwrite"),
        (SFT + " --fsdp", "--fsdp: expected one"), (SFT + " --device cuda", "--device.*cpu"),
        (SFT + " --device nope", "--device nope: this machine has cpu"),
        (SFT + " --device cpu:7", "--device cpu:7"), (SFT + " --device ''", "--device"),
        (SFT + " --device meta", "--device meta"), (SFT + " --muon_lr -1", "--muon_lr must lie"),
        (SFT + " --out ''", "--out is empty"), (PRE + " --n_layer 0", "--n_layer must lie"),
        (PRE + " --n_head 3", "n_head=3 does not divide"), (PRE + " --n_embd 0", "--n_embd must"),
        (PRE + " --position up", "position must be one of learned, rope"),
        (PRE + " --norm rope", "norm must be one of"), (PRE + " --mlp ''", "mlp must be one of"),
        (PRE + " --bias none,qkv", "bias must be one of"), (PRE + " --tied 2", "--tied must lie"),
        (PRE + " --qk_norm -1", "--qk_norm must lie"),
        (PRE + " --window 65", "--window 65 must fit"),
        (PRE + " --window 0", "--window must lie"), (PRE + " --block_size 1", "--block_size must"),
        (PRE + " --n_embd 2 --n_head 2 --position rope", "head_dim=1 must be even"),
        (PRE + " --block_size 2147483648", "--block_size must lie"),
        (PRE + " --n_embd 100000 --n_layer 1000 --n_head 1", "memory|too large"),
        (RLVR + " --temperature 0", "--temperature must lie"),
        (RLVR + " --temperature inf", "--temperature must lie"),
        (RLVR + " --clip_eps -0.5", "--clip_eps must lie"),
        (RLVR + " --clip_eps 0", "--clip_eps must"), (RLVR + " --clip_eps 1e39", "--clip_eps must"),
        (RLVR + " --group_size 1", "--group_size must lie"),
        (RLVR + " --max_new 0", "--max_new must lie"),
        (RLVR + " --max_new 64", "--max_new leaves no room: lower it"),
        (RLVR + " --max_new 1000000", "--max_new leaves no room: lower it"),
        (RLVR + " --max_new 62", "no row fits the context of 2 tokens"),
        (RLVR + " --minibatches 3", "--batch_size 4 is not divisible among 3"),
        (RLVR + " --epochs 0", "--epochs must"), (RLVR + " --eval_rows 0", "--eval_rows must"),
        (RLVR + " --beta -0.1", "--beta must lie"), (RLVR + " --fsdp 1", "--fsdp 1 is not for RL"),
        (DPO + " --beta -0.5", "--beta must lie"), (DPO + " --beta 0", "--beta must lie"),
        (KTO + " --beta 0", "--beta must"), (KTO + " --lam_d 0", "--lam_d must"),
        (KTO + " --batch_size 0", "--batch_size must lie"),
        (SIMPO + " --beta 0", "--beta must"), (SIMPO + " --gamma -1", "--gamma must lie"),
        (ORPO + " --lam -1", "--lam must lie"), (ORPO + " --lam nan", "--lam must lie"),
        (PPO + " --gamma 1.5", "--gamma must lie"), (PPO + " --lam 2", "--lam must lie"),
        (PPO + " --vf_coef -1", "--vf_coef must"), (PPO + " --beta -0.1", "--beta must"),
        (DAPO + " --overlong 9", "--overlong"), (DAPO + " --overlong -1", "--overlong must lie"),
        (DAPO + " --max_rounds 0", "--max_rounds must"),
        (DAPO + " --clip_eps_high 0", "--clip_eps_high must"),
        (SFT + " --train ''", r"data/ (is missing|cannot be read)"),
        (SFT + " --lr=", "--lr: invalid float"), (SFT + " --lr 1_0_0", "--lr must lie"),
        (SFT + " --compile 1", "C\\+\\+ compiler")]:
    case(command, reason, env={"PATH": "/nowhere"} if "--compile 1" in command else {})

# ---------------------------------------------------------------------------- paths, permissions

kind("path")


def fifo(*paths):
    return lambda folder: [os.mkfifo(folder / p) for p in paths]


def link(**to):
    return lambda folder: [os.symlink(v, folder / k) for k, v in to.items()]


def folder_at(path):
    def change(folder):
        (folder / path).unlink(missing_ok=True)
        (folder / path / "x").mkdir(parents=True)
    return change


LONG = "n" * 300
for out, reason in [
        ("/dev/null", "Not a directory|File exists"), ("/dev/null/x", "Not a directory"),
        ("/proc/x", "cannot write /proc/x"), ("/proc/self/x", "cannot write"),
        ("/sys/x", "cannot write /sys/x"), (LONG, "File name too long"),
        ("d/" * 2100, ""), ("data/tokenizer.json", "File exists|Not a directory"),
        ("data/tokenizer.json/x", "Not a directory"), ("loop", "symbolic links|File exists"),
        ("loop/x", "symbolic links"), ("dangling", "File exists|cannot write"),
        ("start/01_sft.pt", "File exists|Not a dir"),
        ("pipe", "File exists|Not a directory"), ("pipe/x", "Not a directory")]:
    change = link(loop="loop") if "loop" in out else link(dangling="nowhere/else") \
        if out == "dangling" else fifo("pipe") if "pipe" in out else None
    case([*SFT.split(), "--out", out], f"cannot write.*({reason})|({reason})", change)
for name in ("01_sft.lock", "01_sft.jsonl", "01_sft.samples.jsonl", "01_sft.pt", "01_sft.pt.new",
             "01_sft.jsonl.new"):
    case(SFT, r"cannot write out/01_sft\.\w+", folder_at(f"out/{name}"))
for command, change, reason in [
        (SFT, None, r"cannot write out.*Permission denied"),
        (PRE + " --out shut", None, "cannot write shut/00_pretrain.lock.*Permission denied"),
        (SFT + " --out open --init closed.pt", None, r"closed.pt cannot be read: Permission"),
        (SFT + " --out open --data closed", None, r"closed/sft_train.jsonl cannot be read: Perm"),
        (SFT + " --out open --train closed.jsonl", None, r"closed.jsonl cannot be read: Perm"),
        (PRE + " --out open --train closed.bin", None, r"closed.bin cannot be read: Permission"),
        (PRE + " --out open --data half", None, r"half/tokenizer.json cannot be read: Permission"),
        (PPO + " --out open --reward closed.pt", None, "closed.pt cannot be read: Permission"),
        (SFT + " --out open/01", None, "01_sft.state.pt cannot be read: Permission"),
        (SFT + " --out open/02", None, "01_sft.pt cannot be read: Permission"),
        (CHAT.replace("start/01_sft.pt", "closed.pt") + " --prompt x", None, "Permission denied"),
        (EVAL + " --out shut", None, "cannot write shut.*Permission denied"),
        (TASKS + " --text data/sft_train.jsonl --out shut/x", None, "cannot write.*Permission"),
        (TASKS + " --text closed.jsonl --out open/x", None, "closed.jsonl.*Permission"),
        ("convert.py hf shut/new.pt", None, "cannot write.*Permission"),
        ("convert.py closed new.pt", None, "closed.*(cannot be read|Permission)"),
        ("data/messages.py --train closed.jsonl --out open/x", None, "closed.jsonl.*Permission"),
        ("data/pairs.py --train data/pairs_train.jsonl --out shut", None, "shut.*Permission"),
        ("data/mix.py closed --out open/x", None, "closed.*(Permission|no sft_)"),
        ("data/toy.py --out shut", None, "shut.*Permission")]:
    case(command, reason, "closed", bound=True if command.startswith("0") else "eval, data")
for command, change, reason in [
        (SFT, folder_at("data/sft_train.jsonl"), "sft_train.jsonl cannot be read: Is a directory"),
        (PRE, folder_at("data/tokenizer.json"), "tokenizer.json cannot be read: Is a directory"),
        (PRE, folder_at("data/train.bin"), "train.bin cannot be read: Is a directory"),
        (PRE, folder_at("data/train.bin.json"), "train.bin.json cannot be read: Is a directory"),
        (SFT + " --init data", None, "data cannot be read: Is a directory"),
        (SFT + " --init ''", None, "is missing"),
        (SFT + " --init /dev/null", None, "no checkpoint"),
        (SFT + " --init /dev/zero", None,
         "no (checkpoint|regular file)|does not fit|cannot be read"),
        (SFT + " --init data/train.bin/x", None, "is missing"),
        (SFT + f" --init {LONG}", None, "File name too long"),
        (SFT + " --init loop", link(loop="loop"), "loop cannot be read: Too many levels of symb"),
        (SFT + " --data loop", link(loop="loop"), "Too many levels of symbolic"),
        (SFT + f" --data {LONG}", None, "File name too long"),
        (SFT + " --data data/train.bin", None, "is missing"),
        (SFT + " --data nowhere", None, "nowhere/sft_train.jsonl is missing"),
        (SFT + " --train /dev/null", None, "data//dev/null is missing"),
        (SFT + " --val none.jsonl", None, "data/none.jsonl is missing"),
        (SFT, folder_at("out/01_sft.state.pt"), "01_sft.state.pt: it is a folder"),
        (SFT, lambda f: os.symlink("gone.jsonl", f / "data/sft_train.jsonl.x") or os.replace(
            f / "data/sft_train.jsonl.x", f / "data/sft_train.jsonl"),
                "sft_train.jsonl is missing"),
        (REACH + " --rows data", None, "data cannot be read: Is a directory"),
        (CHAT.replace("start/01_sft.pt", "data") + " --prompt x", None, "Is a directory"),
        (PRE + " --train ../start/01_sft.pt", None, "bytes: no|id \\d+"
         "|id 0 at")]:
    case(command, reason, change)
for size in (200, 2000, 6000, 12000):
    case(SFT + " --save_every 1", r"cannot write out/01_sft.*\(File too large\)", allow_log=True,
         limits={"FSIZE": size})

# ---------------------------------------------------------------------------- JSON

kind("json")
DAMAGE = {
    "cut": lambda t: t[:-9], "comma": lambda t: t[:-1] + ",}", "single": lambda t: t.replace(
        '"', "'"), "deep": lambda t: "[" * 100_000, "deep objects": lambda t: '{"a":' * 100_000,
    "closed": lambda t: "[" * 100_000 + "]" * 100_000, "text": lambda t: "hello",
    "no quotes": lambda t: "{prompt: 1}", "two": lambda t: t + " " + t, "digits": lambda t:
    '{"prompt": ' + "9" * 5000 + "}", "control": lambda t: t[:5] + "\x01" + t[5:],
    "nul": lambda t: t[:5] + "\0" + t[5:], "bom": lambda t: "\ufeff{" + t,
    "comment": lambda t: "// rows\n", "True": lambda t: "True", "escape": lambda t:
    '{"prompt": "\\x"}', "array begun": lambda t: "[", "minus": lambda t: "-",
    "half string": lambda t: '"', "yaml": lambda t: "prompt: 1+1"}
for name, f in DAMAGE.items():
    case(SFT, r"data/sft_train.jsonl, line 1: not JSON",
         {"data/sft_train.jsonl": lambda old, f=f: "\n".join(
             [f(old.decode().splitlines()[0]), *old.decode().splitlines()[1:]]) + "\n"})
for name in ("cut", "deep", "closed", "digits", "nul", "single"):
    f = DAMAGE[name]
    case(PRE, "data/tokenizer.json is not JSON",
         {"data/tokenizer.json": lambda old, f=f: f(old.decode())})
    case(PRE.replace("--data data", "--data bpe"), "bpe/train.bin.json is not JSON",
         {"bpe/train.bin.json": lambda old, f=f: f('{"dtype": "uint16", "count": 12345}')})
    case(TO, r"hf/config.json is not JSON", {"hf/config.json": lambda old, f=f: f(old.decode())})
    case("data/messages.py --train x.jsonl --out out", "x.jsonl, line 1: not JSON",
         {"x.jsonl": f('{"messages": []}      ') + "\n"})
for raw, reason in [
        (b"\xff\xfe{\0}\0", "no '"), (b"\x80\x81\x82\n", "not JSON"),
        (b"\x1f\x8b\x08\0", "not JSON"),
        ('{"prompt": "é"}'.encode("latin-1"), "not JSON"), (b"PK\3\4" + b"\0" * 60, "not JSON"),
        ('{"prompt": "1"}\n'.encode("utf-16"), "not JSON|no '"),
        ('{"prompt": "1"}\n'.encode("utf-32-le"), "not JSON|no '")]:
    case(SFT, f"sft_train.jsonl, line 1: ({reason})", {"data/sft_train.jsonl": raw})
for text, reason in [
        ("[1]", "no 'messages or"), ("5", "no '"), ("null", "no '"), ('"text"', "no '"),
        ("[]", "no '"), ("NaN", "no '|not JSON"), ("true", "no '"), ("{}", "no '"),
        ("1e999", "no '|not JSON"), ("-Infinity", "no '|not JSON"),
        ('["prompt", "completion"]', "no '")]:
    case(SFT, f"sft_train.jsonl, line 2: ({reason})", rows("data/sft_train.jsonl", "", text))
case(SFT, "sft_train.jsonl, line 1: not JSON", {"data/sft_train.jsonl": lambda old: json.dumps(
    [json.loads(line) for line in old.splitlines()], indent=1)})
case(SFT, "sft_train.jsonl, line 1: not JSON", {"data/sft_train.jsonl": lambda old: json.dumps(
    json.loads(old.splitlines()[0]), indent=1)})
case(SFT, "data/sft_train.jsonl, line 20: not JSON",
     {"data/sft_train.jsonl": lambda old: old[:-10]})
case(SFT, "sft_train.jsonl has no rows", {"data/sft_train.jsonl": ""})
case(SFT, "sft_train.jsonl has no rows", {"data/sft_train.jsonl": "\n \n\t\n"})
case(SFT, "sft_val.jsonl has no rows", {"data/sft_val.jsonl": "\n"})
case(SFT, "sft_train.jsonl, line 1: not JSON", {"data/sft_train.jsonl": b"\0" * 4096})

# ---------------------------------------------------------------------------- rows and messages

kind("rows")
U, A = ({"role": r, "content": "1+1=?"} for r in ("user", "assistant"))
S = {"role": "system", "content": "be short"}
for bad, reason in [
        ({"prompt": 5, "completion": "x"}, "turns are a text"),
        ({"prompt": "x", "completion": 5}, "complet"),
        ({"prompt": "x", "completion": ["x"]}, "completion"),
        ({"prompt": "x"}, "no '.*or completion'"),
        ({"prompt": "", "completion": "x"}, "no '.*prompt'"),
        ({"prompt": None, "completion": "x"}, "no"),
        ({"prompt": "x", "completion": {"text": "x"}}, "completion"),
        ({"prompt": True, "completion": "x"}, "turns are a text"),
        ({"messages": "hello"}, "messages|list"),
        ({"messages": {}}, "no '|list"), ({"messages": []}, "no '"),
        ({"messages": [1]}, "message|role"),
        ({"messages": ["hello", "world"]}, "message|role"),
        ({"messages": [[U, A]]}, "message|role"),
        ({"messages": [{"role": "user"}]}, "content"), ({"messages": [{"content": "x"}]}, "role"),
        ({"messages": [U, {"role": "robot", "content": "x"}]}, "robot"),
        ({"messages": [U, {"role": "end", "content": "x"}]}, "end"),
        ({"messages": [U, {"role": "Assistant", "content": "x"}]}, "Assistant"),
        ({"messages": [{"role": "tool", "content": "x"}, U, A]}, "tool"),
        ({"messages": [{"role": 5, "content": "x"}, U, A]}, "role|5"),
        ({"messages": [{"role": None, "content": "x"}, U, A]}, "role|None"),
        ({"messages": [{"role": ["user"], "content": "x"}, U, A]}, "role"),
        ({"messages": [U, {"role": "assistant", "content": None}]}, "content"),
        ({"messages": [U, {"role": "assistant", "content": 5}]}, "content"),
        ({"messages": [U, {"role": "assistant", "content": {"a": "b"}}]}, "content"),
        ({"messages": [U, {"role": "assistant", "content": [1, 2]}]}, "content"),
        ({"messages": [{"role": "user", "content": {"x": 1}}, A]}, "content"),
        ({"messages": [U]}, "assistant"), ({"messages": [S, U]}, "assistant"),
        ({"messages": [U, A, U]}, "assistant"), ({"messages": [U, U]}, "assistant"),
        ({"prompt": "é", "completion": "x"}, "'é' is not in the tokenizer"),
        ({"prompt": "x", "completion": "\t"}, "is not in the tokenizer"),
        ({"prompt": "\ud800", "completion": "x"}, "is not in the tokenizer|UTF-8"),
        ({"prompt": [U, A], "completion": "x"}, "assistant's turn follows"),
        ({"prompt": [], "completion": "x"}, "no '.*prompt'"),
        ({"prompt": [U, {"role": "user"}], "completion": "x"}, "content"),
        ({"prompt": {"role": "user", "content": "x"}, "completion": "x"}, "prompt|list"),
        ({"completion": "x", "Prompt": "x"}, "no '.*prompt'")]:
    case(SFT, f"data/sft_train.jsonl, line 3: .*({reason})", change=
         rows("data/sft_train.jsonl", *[{"prompt": "1+1=?", "completion": "2"}] * 2, bad))
for bad, reason in [
        ({"prompt": "x", "chosen": "a", "rejected": "a"}, "same"),
        ({"prompt": "x", "chosen": "a"}, "no"),
        ({"prompt": "x", "chosen": 5, "rejected": "a"}, "chosen"),
        ({"prompt": "x", "chosen": {"a": 1}, "rejected": "a"}, "chosen"),
        ({"prompt": "x", "chosen": [], "rejected": "a"}, "no"),
        ({"prompt": "x", "chosen": [U], "rejected": [A]}, "chosen|assistant"),
        ({"prompt": "x", "chosen": [1], "rejected": [A]}, "chosen|message"),
        ({"prompt": "x", "chosen": [{"role": "assistant"}], "rejected": "a"}, "content"),
        ({"prompt": [U, A], "chosen": "a", "rejected": "b"}, "prompt ends with the assist"),
        ({"prompt": "x", "chosen": [U, {"role": "assistant", "content": None}], "rejected": "b"},
         "content"), ({"prompt": "x", "chosen": "a", "rejected": None}, "no"),
        ({"prompt": 1.5, "chosen": "a", "rejected": "b"}, "turns are a text"),
        ({"prompt": "x", "chosen": True, "rejected": "b"}, "chosen")]:
    for command in (DPO, KTO) if bad.get("chosen") == [U] else (DPO,):
        case(command, f"pairs_train.jsonl, line 1: .*({reason})", change=
             rows("data/pairs_train.jsonl", bad))
for bad, reason in [
        ({"prompt": "x"}, "no 'answer"), ({"prompt": "x", "answer": None}, "no 'answer"),
        ({"prompt": "x", "answer": ""}, "no 'answer"),
        ({"prompt": "x", "answer": []}, "no 'answer"),
        ({"prompt": "x", "answer": {"value": 5}}, "answer"),
        ({"prompt": "x", "answer": True}, "answer"),
        ({"prompt": "x", "answer": [None]}, "answer"),
        ({"prompt": "x", "answer": [["5"]]}, "answer"),
        ({"prompt": "x", "answer": [{"a": 1}]}, "answer"),
        ({"prompt": {}, "answer": "5"}, "prompt"),
        ({"prompt": "x", "answer": ["5", True]}, "answer"),
        ({"prompt": [A], "answer": "5"}, "ends with the assistant"),
        ('{"prompt": "x", "answer": NaN}', "answer|not JSON"),
        ('{"prompt": "x", "answer": Infinity}', "answer|not JSON")]:
    for command in (RLVR, REACH):
        case(command, f"rl_train.jsonl, line 2: .*({reason})", change=
             rows("data/rl_train.jsonl", {"prompt": "1+1=?", "answer": 2}, bad))
long = "1+" * 40
case(SFT, "no row fits the context of 64 tokens", {"data/sft_train.jsonl": json.dumps(
    {"prompt": long, "completion": "x"}) + "\n"})
case(RLVR, "no row fits", {"data/rl_val.jsonl": json.dumps({"prompt": long, "answer": "x"}) + "\n"})
case(DPO, "no row fits", {"data/pairs_train.jsonl": json.dumps(
    {"prompt": "x", "chosen": long, "rejected": "x"}) + "\n"})

# ---------------------------------------------------------------------------- tokenizer.json

kind("tokenizer")
for value in [
        [], 5, {}, None, "x", True, [1, 2], {"kind": None}, {"kind": 5}, {"kind": "words"},
        {"kind": "chars"}, {"kind": "chars", "chars": 5}, {"kind": "chars", "chars": ""},
        {"kind": "chars", "chars": "aa"}, {"kind": "chars", "chars": ["a", "b"]},
        {"kind": "chars", "chars": None}, {"kind": "chars", "chars": {"a": 1}},
        {"kind": ["chars"]}, {"kind": "json"}, {"kind": "json", "json": 5},
        {"kind": "json", "json": {}},
        {"kind": "json", "json": []}, {"kind": "json", "json": None}, {"version": "1.0"},
        {"model": {}}, {"model": {"type": "BPE"}}, {"model": {"type": "Nope", "vocab": {}}},
        {"model": {"type": "BPE", "vocab": [], "merges": {}}}, {"added_tokens": 5},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["b c"]}},
        {"model": {"type": "BPE", "vocab": {}, "merges": []}},
        {"model": {"type": "WordLevel", "vocab": {"a": -1}, "unk_token": "a"}},
        {"kind": "tiktoken"}, {"kind": "tiktoken", "name": "nope"}, {"kind": "tiktoken", "name": 5},
        {"kind": "tiktoken", "name": None}, {"kind": "tiktoken", "name": ["gpt2"]}]:
    case(PRE, r"data/tokenizer.json holds no tokenizer that works|tiktoken cannot load",
         {"data/tokenizer.json": json.dumps(value)})
BPE = PRE.replace("--data data", "--data bpe")


def inner(edit):
    return js("bpe/tokenizer.json", lambda spec: edit(spec["json"]) or spec)


for edit in [
        lambda j: j.pop("model"), lambda j: j["model"].pop("vocab"), lambda j: j["model"].update(
            merges=[["x", "y", "z"]]), lambda j: j.update(added_tokens=[{"id": 1}]),
        lambda j: j.update(added_tokens=5), lambda j: j.update(added_tokens=["<x>"]),
        lambda j: j.update(pre_tokenizer={"type": "Nope"}), lambda j: j.update(decoder=5),
        lambda j: j["model"].update(vocab={k: -1 for k in "abc"}),
        lambda j: j["model"].update(vocab={k: 2 ** 40 for k in "abc"}),
        lambda j: j.update(normalizer={"type": "Nope"}),
        lambda j: j.update(added_tokens=[{"id": 5, "content": "", "special": True}])]:
    case(BPE, "bpe/tokenizer.json (holds no tokenizer|.*cannot be)|written with another tokenizer",
         inner(edit))
for template in [5, {"user": 5}, {"user": "x"}, ["x"], {"assistant user": ""}, "x",
                 {"user": "<a>", "user assistant": "<b>", "assistant user": None}]:
    case(BPE, "bpe/tokenizer.json holds no tokenizer|written with another tokenizer",
         js("bpe/tokenizer.json", lambda spec, t=template: spec | {"template": t}))
for name in ("start/01_sft.pt",):
    for value in (5, [], None, {}, {"kind": "chars"}, {"kind": "json", "json": {}}, "x",
                  {"kind": "chars", "chars": "ab" * 9}):
        case(DPO, f"{name} (holds no tokenizer|is no checkpoint)",
             pt(name, lambda p, v=value: p.update(tokenizer=v)))
case(DPO, "its tokenizer has \\d+ ids, its model 83|its tokenizer has", pt(
    "start/01_sft.pt", lambda p: p["tokenizer"].update(chars="".join(map(chr, range(200, 900))))))
case(PPO, "has another tokenizer than --init", pt("start/06_reward.pt", lambda p: p[
    "tokenizer"].update(chars=p["tokenizer"]["chars"][::-1])))

# ---------------------------------------------------------------------------- .bin

kind("bin")
bare = {"data/train.bin.json": None}


def ids(path, *values, dtype=np.uint16, times=1):
    return {path: np.asarray(list(values) * times, dtype).tobytes()} | bare


for part in ("train", "val"):
    for raw, reason in [
            (b"", "0 bytes"), (b"\1", "1 bytes"), (b"\1\0", "2 bytes"), (b"\1\0\2", "3 bytes"),
            (b"\1\0" * 100 + b"\1", "201 bytes"), (b"\1\0" * 20, ".bin files"),
            (b"\1\0" * 24, ".bin files"), (b"\0" * 400, "nothing but id 0"),
            (b"\1\0\0\0" * 99, "id 0 at every second place"), (b"\xff" * 200, "id 65535"),
            (b"\1\0" * 99 + b"\x6a\0", "id 106"), (b"\x6a\0" + b"\1\0" * 99, "id 106"),
            (b'{"text": "hello"}\n' * 9, "id \\d+"), (b"\x93NUMPY\1\0" + b"\1\0" * 99, "id \\d+")]:
        case(PRE, reason if "files" in reason else f"data/{part}.bin.* {reason}",
            {f"data/{part}.bin": raw,
                                                   f"data/{part}.bin.json": None})
for edit, reason in [
        (lambda j: j.update(count=5), "count"), (lambda j: j.update(dtype="uint32"), "dtype"),
        (lambda j: j.update(tokenizer="x"), "tokenizer"), (lambda j: j.update(edges="x"), "edges"),
        (lambda j: j.update(max_id=99999), "max_id"), (lambda j: j.update(max_id=-1), "max_id"),
        (lambda j: j.update(max_id="5"), "max_id"), (lambda j: j.update(max_id=None), "max_id"),
        (lambda j: j.update(max_id=1.5), "max_id"),
        (lambda j: j.update(max_id=[5]), "max_id"), (lambda j: j.pop("max_id"), "max_id"),
        (lambda j: j.pop("dtype"), "dtype"), (lambda j: j.pop("count"), "count"),
        (lambda j: j.pop("edges"), "edges"), (lambda j: j.pop("tokenizer"), "tokenizer"),
        (lambda j: j.update(count=str(j["count"])), "count"),
        (lambda j: j.update(count=None), "count"),
        (lambda j: [], "dtype"), (lambda j: [1], "dtype")]:
    case(BPE, f"bpe/train.bin was written with another tokenizer, or has changed.*{reason}",
         js("bpe/train.bin.json", edit))
for value in ("null", "5", '"x"', "{}", "true"):
    case(BPE, "bpe/val.bin was written with another tokenizer, or has changed",
         {"bpe/val.bin.json": value})
for change in (lambda b: b[:-2], lambda b: b + b"\1\0", lambda b: b[2:], lambda b: b[::-1],
               lambda b: b"\2\0" + b[2:], lambda b: b[:-2] + b"\3\0",
                   lambda b: b[: len(b) // 4 * 2]):
    case(BPE, "bpe/train.bin was written with another tokenizer, or has changed.*edges",
         {"bpe/train.bin": change})
case(PRE + " --data mixed", "train.bin was written with another tokenizer", lambda f: (
    shutil.copytree(f / "bpe", f / "mixed"), shutil.copy(f / "data/tokenizer.json", f / "mixed")))

# ---------------------------------------------------------------------------- checkpoint, state

kind("checkpoint")


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def poison(path):
    def change(folder):
        parts = torch.load(folder / path, weights_only=True)
        torch.save(parts | {"extra": Evil()}, folder / path)
    return change


for cut in (0.05, 0.3, 0.7, 0.95, 0.999):
    case(DPO, "start/01_sft.pt is truncated: its end is missing", {
        "start/01_sft.pt": lambda b, c=cut: b[: int(len(b) * c)]})
for raw in (b"", b"P", b"PK", b"PK\3\4", b"hello\n" * 99, b"\0" * 5000, b"\x80\x02}q\0.",
            pickle.dumps({"model": 1}), pickle.dumps(Evil()), b"\x1f\x8b" + b"\0" * 50,
            b"GGUF" + b"\0" * 99, b"PK\3\4" + b"\0" * 500 + b"PK\5\6" + b"\0" * 18,
            b"PK\5\6" + b"\0" * 18, b"version https://git-lfs.github.com/spec/v1\noid x\n"):
    case(DPO, r"start/01_sft.pt (is no checkpoint|is truncated)", {"start/01_sft.pt": raw})
for at in (100, 700):
    case(DPO, "start/01_sft.pt is no checkpoint", {
        "start/01_sft.pt": lambda b, a=at: b[:a] + b"\xff" * 40 + b[a + 40:]})
case(DPO, "is no checkpoint of this project", poison("start/01_sft.pt"))
for value in ([1, 2], 5, None, {}, {"model": {}}, torch.zeros(3), {"state_dict": {}}, "x"):
    case(DPO, "start/01_sft.pt is no checkpoint of this project", lambda f, v=value: torch.save(
        v, f / "start/01_sft.pt"))
W = "blocks.0.mlp.up.weight"
for edit, reason in [
        (lambda p: p["model"].pop(W), W), (lambda p: p["model"].update(x=torch.zeros(2)), "x"),
        (lambda p: p["model"].update({W: p["model"][W].T.contiguous()}), W),
        (lambda p: p["model"].update({W: None}), W), (lambda p: p["model"].update({W: 5}), W),
        (lambda p: p["model"].update({W: [1.0]}), W), (lambda p: p["model"].update({5: 5}), "5"),
        (lambda p: p["model"].update({W: p["model"][W] * float("nan")}), "NaN|infinity"),
        (lambda p: p["model"].update({W: p["model"][W] / 0}), "NaN|infinity"),
        (lambda p: p["model"].update({W: p["model"][W].int()}), "whole numbers"),
        (lambda p: p["model"].update({W: p["model"][W].to(torch.complex64)}),
         "whole numbers|complex"),
        (lambda p: p["model"].update({W: p["model"][W].to_sparse()}),
         "cannot be made|no checkpoint"),
        (lambda p: p["model"].update({W: p["model"][W].bool()}), "whole numbers"),
        (lambda p: p["model"].update({W: p["model"][W].to("meta")}),
         "does not fit|holds|no data|meta"),
        (lambda p: p.update(model=5), "model"), (lambda p: p.update(model=[]), "model"),
        (lambda p: p.pop("model"), "its model is"), (lambda p: p.pop("gpt"), "its gpt is"),
        (lambda p: p.pop("tokenizer"), "its tokenizer is"),
        (lambda p: p.update(record=None), "record"),
        (lambda p: p.update(gpt=5), "gpt"), (lambda p: p["gpt"].update(n_layer="1"), "n_layer"),
        (lambda p: p["gpt"].update(n_layer=2), "does not fit"),
        (lambda p: p["gpt"].update(n_layer=-1), "n_layer must lie in .*, not -1"),
        (lambda p: p["gpt"].update(n_layer=True), "n_layer"),
        (lambda p: p["gpt"].update(n_layer=1.0), "n_layer"),
        (lambda p: p["gpt"].update(n_head=0), "n_head must lie in .*, not 0"),
        (lambda p: p["gpt"].update(n_head=3), "n_head|head_dim|does not"),
        (lambda p: p["gpt"].update(n_embd=10 ** 9), "does not fit|memory|must lie"),
        (lambda p: p["gpt"].update(n_layer=10 ** 8), "does not fit|memory|must lie"),
        (lambda p: p["gpt"].update(block_size=10 ** 9, position="learned"),
         "does not fit|must lie"),
        (lambda p: p["gpt"].update(block_size=0), "block_size must lie in .*, not 0"),
        (lambda p: p["gpt"].update(block_size=10 ** 9), "must lie"),
        (lambda p: p["gpt"].update(rope_theta=float("nan")), "rope_theta must lie in .*, not nan"),
        (lambda p: p["gpt"].update(norm_eps=-1.0), "norm_eps must lie"),
        (lambda p: p["gpt"].update(norm_eps=float("inf")), "norm_eps must lie"),
        (lambda p: p["gpt"].update(position="up"), "position must be one of"),
        (lambda p: p["gpt"].update(bias=""), "bias must be one of"),
        (lambda p: p["gpt"].update(new=5), "another architecture: new"),
        (lambda p: p["gpt"].pop("norm"), "another architecture: norm"),
        (lambda p: p["gpt"].update(vocab_size=5), "does not fit|its tokenizer has"),
        (lambda p: p["gpt"].update(head_dim=7), "does not fit|even"),
        (lambda p: p["gpt"].update(rope_factor=0.0), "rope_factor must lie")]:
    case(DPO, f"start/01_sft.pt.*({reason})", pt("start/01_sft.pt", edit))
for command, reason in [
        (SFT + " --init start/06_reward.pt", "is a reward model"),
        (RLVR + " --init start/06_reward.pt", "is a reward model"),
        (PPO + " --reward start/01_sft.pt", "is no reward model: python 06_reward.py makes one"),
        (CHAT.replace("01_sft", "06_reward") + " --prompt x", "is a reward model"),
        (REACH.replace("01_sft", "06_reward"), "is a reward model"),
        ("convert.py start/06_reward.pt x", "is a reward model"),
        (SFT + " --init start/07_x.pt", "07_x.pt is missing; beside it are 00_pretrain.pt"),
        (SFT + " --init start/05_ppo.pt", "05_ppo.pt is missing: run python 05_ppo.py first"),
        (RLVR + " --init nowhere/02_cot.pt", "is missing: run python 02_cot.py first")]:
    case(command, reason)
for edit, reason in [
        (lambda p: p["head"].pop("bias"), "bias"), (lambda p: p.update(head={}), "bias|head"),
        (lambda p: p.update(head=5), "head"), (lambda p: p.update(head=None), "head"),
        (lambda p: p["head"].update(weight=torch.zeros(1, 7)), "weight"),
        (lambda p: p["head"].update(bias=torch.full((1,), float("nan"))), "NaN"),
        (lambda p: p.pop("val_std"), "val_std"), (lambda p: p.update(val_std=0.0), "val_std"),
        (lambda p: p.update(val_std=float("nan")), "val_std"),
        (lambda p: p.update(val_mean="x"), "val_mean"),
        (lambda p: p.update(val_mean=None), "val_mean"),
        (lambda p: p.update(val_std=-1.0), "val_std")]:
    case(PPO, f"(start/06_reward.pt|reward model).*({reason})", pt("start/06_reward.pt", edit))
STATE = SFT.replace("--out out", "--out unfinished").replace("--steps 2", "--steps 4") \
    + " --save_every 1 --warmup 1"


def state(edit):
    return pt("unfinished/01_sft.state.pt", edit)


AT = "unfinished/01_sft.state.pt"
for edit, reason in [
        (lambda p: p.pop("step"), "no state of this run"),
        (lambda p: p.update(step="2"), "no state"),
        (lambda p: p.update(step=0), "no state"), (lambda p: p.update(step=-1), "no state"),
        (lambda p: p.update(step=4), "no state"), (lambda p: p.update(step=99), "no state"),
        (lambda p: p.update(step=1.0), "no state"), (lambda p: p.update(step=True), "no state"),
        (lambda p: p.update(step=None), "no state"), (lambda p: p.pop("optimizers"), "optimizer"),
        (lambda p: p.update(optimizers=[]), "no state of this run"),
        (lambda p: p.update(optimizers=5), "no state of this run"),
        (lambda p: p.update(optimizers={}), "no state of this run"),
        (lambda p: p.update(optimizers=[5]), "no state of"),
        (lambda p: p.update(optimizers=p["optimizers"] * 3), "no state of this run"),
        (lambda p: p["optimizers"][0].pop("state"), "no state of this run"),
        (lambda p: p["optimizers"][0]["state"].pop(0), "optimizer state is one of other weights"),
        (lambda p: p["optimizers"][0]["state"].update({999: {}}), "optimizer"),
        (lambda p: p["optimizers"][0]["state"][0].update(exp_avg=torch.zeros(2)),
         "optimizer state of weight 0 does not fit"),
        (lambda p: p["optimizers"][0]["state"][0].pop("exp_avg"), "optimizer"),
        (lambda p: p["optimizers"][0]["state"][0].pop("step"), "optimizer"),
        (lambda p: p["optimizers"][0]["state"][0].update(exp_avg=5), "no state of this run"),
        (lambda p: p["optimizers"][0]["state"][0].update(
            exp_avg_sq=p["optimizers"][0]["state"][0]["exp_avg_sq"] * float("nan")),
                "optimizer|NaN"),
        (lambda p: p["optimizers"][0]["state"][0].update(
            exp_avg=p["optimizers"][0]["state"][0]["exp_avg"].int()), "optimizer"),
        (lambda p: p["model"].pop(W), W), (lambda p: p["model"].update({W: torch.zeros(3)}), W),
        (lambda p: p["model"].update({W: p["model"][W] * float("nan")}), "NaN"),
        (lambda p: p.pop("model"), "its model is"), (lambda p: p.pop("record"), "other|record"),
        (lambda p: p.update(record=5), "record"), (lambda p: p.update(record={}), "other|record"),
        (lambda p: p["record"].update(config=5), "record|other"),
        (lambda p: p["record"].update(inputs=None), "record|other"),
        (lambda p: p["record"].update(inputs=[]), "record|other"),
        (lambda p: p["record"].update(stage="02_cot"), "stage|other|02_cot")]:
    case(STATE, f"{AT}.*({reason})", state(edit))
for cut in (0.1, 0.5, 0.9):
    case(STATE, f"{AT} is truncated", {AT: lambda b, c=cut: b[: int(len(b) * c)]})
case(STATE, f"{AT} is no checkpoint", {AT: b""})
case(STATE, f"{AT} is no checkpoint", poison(AT))

# ---------------------------------------------------------------------------- log and resume

kind("resume")
FINISHED = SFT.replace("--out out", "--out finished").replace("--steps 2", "--steps 1")
for flag, name in [
        ("--lr 1e-3", "lr"), ("--steps 5", "steps"), ("--seed 1", "seed"),
        ("--batch_size 8", "batch_s"),
        ("--warmup 0", "warmup"), ("--grad_clip 2", "grad_clip"), ("--eval_every 3", "eval_every"),
        ("--init start/01_sft.pt", "init"), ("--train sft_val.jsonl", "train"),
        ("--muon_lr 0", "muon"),
        ("--val sft_train.jsonl", "val")]:
    case(f"{STATE} {flag}", f"{AT} is an unfinished run with other .*{name}")
    case(f"{FINISHED} {flag}",
         f"finished/01_sft.pt is finished and was made with other .*{name}.*--overwrite 1")
for path, f in [("data/sft_train.jsonl", lambda b: b[: b.rindex(b"\n", 0, -1) + 1]),
                ("data/sft_val.jsonl", lambda b: b + b"\n"),
                ("start/00_pretrain.pt", "start/00_pretrain.pt")]:
    change = {path: f} if callable(f) else pt(f, lambda p: p["model"]["norm.weight"].mul_(2))
    case(STATE, f"unfinished run with other {path}", change)
    case(FINISHED, f"finished and was made with other {path}", change)
for edit, reason in [
        (lambda p: p.pop("record"), "other|record"),
        (lambda p: p.update(record={}), "other|record"),
        (lambda p: p.update(record=5), "record"),
        (lambda p: p["record"].update(config=5), "record|other"),
        (lambda p: p["record"].update(inputs="x"), "record|other"),
        (lambda p: p["record"].update(stage="00_pretrain"), "other|stage|00_pre"),
        (lambda p: p["record"]["config"].pop("lr"), "lr")]:
    case(FINISHED, f"finished/01_sft.pt.*({reason})", pt("finished/01_sft.pt", edit))
for raw in (b"", b"x", b"PK\3\4"):
    case(FINISHED, "finished/01_sft.pt is (no checkpoint|truncated)", {"finished/01_sft.pt": raw})
case(FINISHED + " --lr 1", "no checkpoint|truncated", {"finished/01_sft.pt": b"PK\3\4 half"})
# What is no error: a damaged or a lost log never stops a resume.
OK = dict(code=0)
for raw in (b"", b"}\n", b"\0" * 99, b'{"step": 1}\n{"step"', b"[1]\n5\nnull\n", b"\xff\xfe\n",
            b'{"step": "1"}\n{"step": null}\n{"step": [1]}\n', b"[" * 50_000, None,
            b'{"step": NaN}\n', b'{"step": true}\n'):
    case(STATE, "", {"unfinished/01_sft.jsonl": raw}, **OK)
    case(STATE, "", {"unfinished/01_sft.samples.jsonl": raw}, **OK)
case(STATE, "", {"unfinished/01_sft.jsonl.new": b"x", "unfinished/01_sft.state.pt.new": b"x"}, **OK)
case(STATE, "", {"unfinished/01_sft.lock": "process 1 on elsewhere"}, **OK)
case(STATE + " --micro_batch 2 --save_every 9", "", **OK)
case(FINISHED + " --overwrite 1 --lr 1e-3", "", **OK)
case(FINISHED, "", **OK)
case(FINISHED + " --lr 1e-3", "", env={"SKIP_DONE": "1"}, **OK)
case(FINISHED, "", env={"SKIP_DONE": "1"}, **OK)

# ---------------------------------------------------------------------------- convert: config

kind("config")
hf = lambda **new: js("hf/config.json", lambda c: c | new)
for new, reason in [
        (dict(model_type="mamba"), "mamba|not supported"), (dict(model_type=None), "not supported"),
        (dict(model_type=5), "not supported"), (dict(architectures=["BertModel"]), "BertModel"),
        (dict(architectures=[]), ""), (dict(architectures=5), "architecture"),
        (dict(architectures=["LlamaForSequenceClassification"]), "LlamaForSequence"),
        (dict(hidden_act="gelu"), "hidden_act"), (dict(vocab_size="300"), "vocab_size"),
        (dict(vocab_size=0), "vocab_size"), (dict(vocab_size=-1), "vocab_size"),
        (dict(vocab_size=None), "vocab_size"), (dict(vocab_size=5), "embed_tokens|vocab"),
        (dict(hidden_size=17), "hidden_size|n_embd|n_head|embed|match"),
        (dict(hidden_size="x"), "hidden_size"), (dict(num_hidden_layers=2), "layers.1"),
        (dict(num_hidden_layers=0), "num_hidden|n_layer"), (dict(num_hidden_layers=1.5), "num_hid"),
        (dict(num_attention_heads=0), "n_head|num_attention"),
        (dict(num_attention_heads=3), "n_head|num_attention|n_kv"),
        (dict(num_key_value_heads=3), "n_kv_head"), (dict(num_key_value_heads="2"), "num_key"),
        (dict(head_dim=7), "head_dim|match"), (dict(head_dim=[8]), "head_dim"),
        (dict(intermediate_size=10), "match|gate"), (dict(intermediate_size=None), "intermediate"),
        (dict(max_position_embeddings=0), "block_size|max_position"),
        (dict(max_position_embeddings=None), "max_position"),
        (dict(max_position_embeddings=1e30), "block_size|max_position"),
        (dict(rope_theta=-1, rope_parameters=None), "rope_theta"),
        (dict(rope_parameters={"rope_theta": "x"}), "rope"),
        (dict(rope_parameters={"rope_theta": float("nan")}), "rope"),
        (dict(rope_parameters=5), "rope"), (dict(rope_parameters=[]), ""),
        (dict(rope_parameters={"rope_type": "yarn", "factor": 2.0}), "yarn"),
        (dict(rope_scaling={"rope_type": "yarn", "factor": 2.0}), "yarn|rope_scaling"),
        (dict(rope_scaling={"type": "linear", "factor": 2.0}), "linear|rope_scaling"),
        (dict(rope_parameters={"rope_type": "llama3"}), "factor|llama3"),
        (dict(rope_parameters={"rope_type": "llama3", "factor": 0.5, "low_freq_factor": 1,
                               "high_freq_factor": 4, "original_max_position_embeddings": 64}),
                                   "factor"),
        (dict(rope_parameters={"rope_type": "llama3", "factor": 8, "low_freq_factor": 4,
                               "high_freq_factor": 4, "original_max_position_embeddings": 64}),
                                   "freq"),
        (dict(rope_parameters={"rope_type": ["default"]}), "rope|RoPE"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
        (dict(is_causal=False), "is_causal"),
        (dict(sliding_window=8, use_sliding_window=True), "sliding"),
        (dict(layer_types=["sliding_attention"]), "layer_types"),
        (dict(layer_types=5), "layer_types"),
        (dict(quantization_config={"bits": 4}), "quantization_config"),
        (dict(mlp_bias=True), "mlp_bias|bias"), (dict(rms_norm_eps="x"), "rms_norm_eps"),
        (dict(rms_norm_eps=-1), "norm_eps"), (dict(rms_norm_eps=None), "norm_eps"),
        (dict(tie_word_embeddings=False), "lm_head"),
        (dict(tie_word_embeddings="no"), "tie_word|lm_head")]:
    if reason:
        case(TO, f"hf.*({reason})", hf(**new))
for text in ("[]", "5", "null", '"x"', "{}"):
    case(TO, "config.json", {"hf/config.json": text})
case(TO, "config.json", {"hf/config.json": None})
case(TO, "config.json", folder_at("hf/config.json"))
for path in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
             "intermediate_size", "max_position_embeddings"):
    case(TO, f"hf/config.json.*{path}", js("hf/config.json", lambda c, p=path: c.pop(p) and None))

# ---------------------------------------------------------------------------- convert: the rest

kind("convert")
TOK = lambda edit: js("hf/tokenizer.json", edit)
for command, reason, change in [
        (TO, "tokenizer.json", {"hf/tokenizer.json": None}),
        (TO, "tokenizer.json", {"hf/tokenizer.json": "[]"}),
        (TO, "tokenizer.json", {"hf/tokenizer.json": "5"}),
        (TO, "tokenizer.json", {"hf/tokenizer.json": "{}"}),
        (TO, "tokenizer.json", {"hf/tokenizer.json": b"\0" * 50}),
        (TO, "tokenizer.json", TOK(lambda t: t.pop("model") and None)),
        (TO, "tokenizer.json", TOK(lambda t: t.update(model=5))),
        (TO, "tokenizer.json", TOK(lambda t: t.update(added_tokens=5))),
        (TO, "tokenizer.json", TOK(lambda t: t.update(added_tokens=[{"id": 3}]))),
        (TO, "tokenizer.json", TOK(lambda t: t.update(added_tokens=[5]))),
        (TO, "tokenizer.json", TOK(lambda t: t.update(decoder=None))),
        (TO, "tokenizer.json", TOK(lambda t: t.update(normalizer={"type": "Lowercase"}))),
        (TO, "tokenizer.json", TOK(lambda t: t.update(normalizer={
            "type": "Prepend", "prepend": "_"}))),
        (TO, "tokenizer.json", TOK(lambda t: t.update(pre_tokenizer={"type": "Whitespace"}))),
        (TO, "tokenizer.json", TOK(lambda t: t["pre_tokenizer"].update(add_prefix_space=True))),
        (TO, "tokenizer", TOK(lambda t: t["model"].update(vocab={"a": 0}, merges=[]))),
        (TO, "tokenizer_config.json", {"hf/tokenizer_config.json": "[]"}),
        (TO, "tokenizer_config.json", {"hf/tokenizer_config.json": "{"}),
        (TO, "tokenizer_config.json", {"hf/tokenizer_config.json": "5"}),
        (TO, "tokenizer_config.json", {"hf/tokenizer_config.json": '{"chat_template": [5]}'}),
        (TO, "model.safetensors", {"hf/model.safetensors": None}),
        (TO, "model.safetensors", {"hf/model.safetensors": b""}),
        (TO, "model.safetensors", {"hf/model.safetensors": b"\xff" * 99}),
        (TO, "model.safetensors", {"hf/model.safetensors": lambda b: b[:-9]}),
        (TO, "model.safetensors", {"hf/model.safetensors": lambda b: b[:99]}),
        (TO, "another format", {"hf/model.safetensors": None, "hf/pytorch_model.bin": b"x"}),
        (TO, "index", {"hf/model.safetensors": None, "hf/model.safetensors.index.json": "[]"}),
        (TO, "index", {"hf/model.safetensors": None,
                       "hf/model.safetensors.index.json": '{"weight_map": 5}'}),
        (TO, "index", {"hf/model.safetensors": None,
                       "hf/model.safetensors.index.json": '{"weight_map": {"a": 5}}'}),
        (TO, "index|missing", {"hf/model.safetensors": None,
                               "hf/model.safetensors.index.json": '{"weight_map": {"a": "b"}}'}),
        (TO, "index|\\.\\./", {"hf/model.safetensors": None, "hf/model.safetensors.index.json":
                               '{"weight_map": {"a": "../source/text.txt"}}'}),
        (TO, "index|/etc", {"hf/model.safetensors": None, "hf/model.safetensors.index.json":
                            '{"weight_map": {"a": "/etc/passwd"}}'}),
        (TO, "index", {"hf/model.safetensors": None, "hf/model.safetensors.index.json": "{}"}),
        ("convert.py nowhere new.pt", "nowhere is no folder here", None),
        ("convert.py data new.pt", "data has no config.json", None),
        ("convert.py hf new", "ends in .pt", None), ("convert.py a.pt b.pt", "ends in .pt", None),
        ("convert.py hf", "required: target", None), ("convert.py", "required: source", None),
        ("convert.py hf a.pt b", "unrecognized arguments: b", None),
        ("convert.py nowhere.pt x", "nowhere.pt is missing", None),
        ("convert.py start/01_sft.pt x", "tokenizer of characters", None),
        ("convert.py bpe/00_pretrain.pt data", "data is there already and holds", None),
        ("convert.py bpe/00_pretrain.pt data/train.bin", "train.bin", None),
        ("convert.py bpe/00_pretrain.pt /proc/x", "cannot write", None),
        ("convert.py bpe/00_pretrain.pt data/train.bin/x", "cannot write|Not a directory", None),
        ("convert.py hf /proc/new.pt", "cannot write", None),
        ("convert.py hf data/train.bin/new.pt", "cannot write|Not a directory", None),
        ("convert.py hf dir.pt", "dir.pt", lambda f: (f / "dir.pt").mkdir()),
        ("convert.py '' new.pt", "", None), ("convert.py hf .pt", "", None),
        (BACK, "NaN|infinity", pt("bpe/00_pretrain.pt", lambda p: p["model"]["norm.weight"].fill_(
            float("nan")))),
        (TO, "NaN|infinity|not finite", lambda f: nan_tensor(f / "hf/model.safetensors"))]:
    if reason:
        case(command, reason, change)


def nan_tensor(path):
    from safetensors.torch import load_file, save_file
    weights = load_file(path)
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})


# ---------------------------------------------------------------------------- streams and signals

kind("streams")
STOPPED = r"^(stopped; .*\n)?$"
INT, TERM = int(signal.SIGINT), int(signal.SIGTERM)
for stdout in ("/dev/full", "closed", "left", "head"):
    for command in (SFT, PRE, RLVR):
        case(command, "", stdout=stdout, **OK)
    for command in (CHAT + " --prompt hello", EVAL, TASKS + " --text data/sft_train.jsonl", REACH,
                    "data/pairs.py --train data/pairs_train.jsonl --val_share 0.3 --out out"):
        case(command, ".*", stdout=stdout, code=(0, 2, 141))
case(SFT, "", stdin="closed", **OK)
case(SFT, "", stdin="closed", stdout="closed", **OK)
case(CHAT, "", stdin="", **OK)
case(CHAT, "", stdin="closed", code=(0, 2))
case(CHAT, "", stdin="hello\n/reset\n\n/quit\n", **OK)
case(CHAT, "", stdin="é\n1+1\n", **OK)
case(CHAT, "", stdin="\udcff\udcfe\n1+1\n", **OK)
case(CHAT, "", stdin="x" * 200 + "\n", **OK)
case(CHAT, "", stdin="\0\n", **OK)
for command in (SFT, PRE, DPO, REWARD):
    for sign in (INT, TERM):
        case(command + " --save_every 9", "^stopped after step 1; the same command continues$",
             code=130, strike=[sign, "split" if command == PRE else "sample_rows", 1], saved=True)
for sign in (INT, TERM):
    case(RLVR, "^stopped after step 1; the same", code=130, strike=[sign, "generate", 1],
        saved=True)
    case(SFT, "^stopped after step 1; the same", code=130, strike=[sign, "append", 1], saved=True)
    case(SFT, "^stopped after step 1; the same", code=130, strike=[sign, "resume", 1], saved=True)
    case(SFT, "^stopped after step 1; the same", code=130, strike=[sign, "load", 1], saved=True)
    case(SFT, "^stopped after step 1; the same", code=130, strike=[sign, "claim", 1], saved=True)
    case(SFT, "", strike=[sign, "release", 1], **OK)
    case(SFT, "", strike=[sign, "save", 1], **OK)
    case(SFT + " --save_every 1 --steps 3", "^stopped after step 2", code=130, strike=[sign,
        "save", 1],
         saved=True)
for command in (SFT, CHAT + " --prompt hello", EVAL, TASKS + " --text data/sft_val.jsonl", REACH):
    case(command, STOPPED, code=130, strike=[INT, "read_checkpoint" if command != SFT else "cli",
        1])
case("data/pairs.py --train data/pairs_train.jsonl --val_share 0.3 --out out", STOPPED, code=130,
     strike=[INT, "parse_json", 3])

# ---------------------------------------------------------------------------- ranks, environment

kind("ranks")
for env, reason in [
        (dict(RANK="1"), "RANK=1"), (dict(RANK="-1"), "RANK=-1"), (dict(RANK="x"), "RANK=x"),
        (dict(RANK=""), "RANK= "), (dict(RANK="1.0"), "RANK=1.0"), (dict(RANK="²"), "RANK"),
        (dict(RANK="99999999999"), "RANK="), (dict(RANK="0x1"), "RANK=0x1"),
        (dict(RANK="1 "), "RANK"), (dict(RANK="٣"), "RANK"),
        (dict(WORLD_SIZE="8"), "MASTER_ADDR|RANK"), (dict(WORLD_SIZE=""), "WORLD_SIZE= "),
        (dict(WORLD_SIZE="x"), "WORLD_SIZE=x"), (dict(WORLD_SIZE="0"), "WORLD_SIZE=0"),
        (dict(WORLD_SIZE="-2"), "WORLD_SIZE=-2"), (dict(WORLD_SIZE="1e3"), "WORLD_SIZE=1e3"),
        (dict(WORLD_SIZE="2", RANK="2"), "RANK=2 WORLD_SIZE=2"),
        (dict(WORLD_SIZE="2", RANK="0"), "WORLD_SIZE=2 with MASTER_ADDR= and MASTER_PORT=:"),
        (dict(WORLD_SIZE="2", RANK="1", LOCAL_RANK="x"), "LOCAL_RANK=x"),
        (dict(WORLD_SIZE="2", RANK="1", LOCAL_RANK="-1"), "LOCAL_RANK=-1"),
        (dict(LOCAL_RANK=""), "LOCAL_RANK="), (dict(LOCAL_RANK="nan"), "LOCAL_RANK=nan"),
        (dict(WORLD_SIZE="2", RANK="0", MASTER_ADDR="127.0.0.1"), "MASTER_PORT"),
        (dict(WORLD_SIZE="2", RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="x"), "MASTER_PORT"),
        (dict(WORLD_SIZE="2", RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=""), "MASTER_PORT"),
        (dict(WORLD_SIZE="2", RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0"), "MASTER_PORT"),
        (dict(WORLD_SIZE="2", RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="99999"),
         "MASTER_PORT"),
        (dict(WORLD_SIZE="2", RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="-1"), "MASTER_PORT"),
        (dict(OMP_NUM_THREADS="x"), ""), (dict(COLUMNS="x"), ""), (dict(COLUMNS="0"), ""),
        (dict(COLUMNS="1"), ""), (dict(COLUMNS="-5"), ""), (dict(LANG="C", LC_ALL="C"), ""),
        (dict(SKIP_DONE=""), ""), (dict(GROUP_RANK="x"), ""), (dict(CUDA_VISIBLE_DEVICES="x"), "")]:
    for command in (SFT, EVAL) if env in (dict(RANK="1"), dict(WORLD_SIZE="x"),
        dict(RANK="")) else (
            SFT,):
        case(command, f"^(error: )?.*({reason})" if reason else "", env=env,
            code=2 if reason else 0)
# Two ranks (each in a folder of its own where `apart`): both leave, the error stands once.
for command, reason, change in [
        (SFT + " --lr nan", "--lr must lie", None), (SFT + " --out ''", "--out is empty", None),
        (SFT + " --data nowhere", "nowhere/sft_train.jsonl is missing", None),
        (SFT + " --batch_size 3", "--batch_size 3 is not divisible among 2", None),
        (SFT + " --init nowhere.pt", "nowhere.pt is missing", None),
        (SFT + " --steps x", "invalid int", None), (SFT + " --device nope", "--device nope", None),
        (SFT + " --out /proc/x", "cannot write /proc/x", None),
        (SFT, "line 1: not JSON", {"data/sft_train.jsonl": "{"}),
        (SFT, "is truncated", {"start/00_pretrain.pt": lambda b: b[:-99]}),
        (STATE, "no state of this run", state(lambda p: p.update(optimizers=[]))),
        (STATE + " --lr 1", "unfinished run with other lr", None),
        (FINISHED + " --lr 1", "finished and was made with other lr", None),
        (PRE, "nothing but id 0", {"data/train.bin": b"\0" * 400}),
        (PRE, "id 65535", {"data/val.bin": b"\xff" * 400}),
        (RLVR + " --max_new 64", "no row fits", None)]:
    case(command, reason, change, world=2)
for change, reason in [
        ({"data/sft_train.jsonl": None}, "data/sft_train.jsonl is missing"),
        ({"data/sft_val.jsonl": lambda b: b + b"\n"}, "rank 1 has read another data/sft_val.jsonl"),
        ({"data/sft_val.jsonl": "{"}, "data/sft_val.jsonl, line 1: not JSON"),
        ({"start/00_pretrain.pt": None}, "start/00_pretrain.pt is missing"),
        ({"start/00_pretrain.pt": lambda b: b[:-9]}, "00_pretrain.pt is truncated"),
        (pt("start/00_pretrain.pt", lambda p: p["model"]["norm.weight"].mul_(2)),
         "rank 1 has read another start/00_pretrain.pt"),
        (rows("data/sft_train.jsonl", {"prompt": "é", "completion": "x"}), "'é' is not in")]:
    case(SFT, reason, change, world=2, apart=True)
case(STATE, "rank 1 would go on after step 0, rank 0 after step|--out must be on a disk",
     {"unfinished/01_sft.state.pt": None}, world=2, apart=True)
case(FINISHED + " --lr 1", "finished and was made with other lr", {"finished/01_sft.pt": None},
     world=2, apart=True)

# ---------------------------------------------------------------------------- other scripts

kind("scripts")
for command, reason in [
        (EVAL + " --samples 0", "--samples"), (EVAL + " --samples -1", "--samples"),
        (EVAL + " --n_sampled 0", "--n_sampled"), (EVAL + " --n_greedy 0", "--n_greedy"),
        (EVAL + " --n_pairs -1", "--n_pairs"), (EVAL + " --n_primed 0", "--n_primed"),
        (EVAL + " --max_new 0", "--max_new"), (EVAL + " --window 0", "--window"),
        (EVAL + " --val_tokens 0", "--val_tokens"), (EVAL + " --seed -1", "--seed"),
        (EVAL + " --seed 99999999999999999999", "--seed"), (EVAL + " --device nope", "--device"),
        (EVAL + " --device cuda", "--device cuda"),
        (EVAL + " --out data/train.bin", "cannot write"),
        (EVAL + " --out ''", "--out"), (EVAL + " --out /proc/x", "cannot write"),
        (EVAL + " --data nowhere", "nowhere holds no test file"),
        (EVAL + " nope.pt", "nope.pt is miss"),
        (EVAL + " --samples x", "invalid int"), (EVAL + " --nope 1", "unrecognized"),
        ("eval.py --out nowhere", "nowhere.* has no checkpoint"),
        (CHAT + " --prompt x --temperature nan", "--temperature"),
        (CHAT + " --prompt x --temperature -1", "--temperature"),
        (CHAT + " --prompt x --temperature inf", "--temperature"),
        (CHAT + " --prompt x --top_p 0", "--top_p"), (CHAT + " --prompt x --top_p nan", "--top_p"),
        (CHAT + " --prompt x --top_p 2", "--top_p"),
        (CHAT + " --prompt x --max_new 0", "--max_new"),
        (CHAT + " --prompt x --max_new 100000000000", "--max_new"),
        (CHAT + " --prompt x --seed -1", "--seed"),
        (CHAT + " --prompt x --seed 1e3", "invalid int"),
        (CHAT + " --prompt x --device cuda", "--device"), (CHAT + " --prompt ''", "prompt|tokens"),
        (CHAT + " --prompt é", "'é' is not in the tokenizer"),
        (CHAT + f" --prompt {'x' * 200}", "tokens and the context has 64"),
        (CHAT + " --nope", "unrecognized"),
        ("chat.py nowhere.pt --prompt x", "nowhere.pt is missing"),
        (TASKS, "nothing to ask"), (TASKS + " --text nowhere.txt", "nowhere.txt is missing"),
        (TASKS + " --text data/sft_val.jsonl --limit -1", "--limit"),
        (TASKS + " --text data/sft_val.jsonl --batch_size 0", "--batch_size"),
        (TASKS + " --choices data/sft_val.jsonl", "sft_val.jsonl, line 1"),
        (TASKS + " --lambada data/sft_val.jsonl", "sft_val.jsonl, line 1"),
        (TASKS + " --text data/sft_val.jsonl --out data", "data"),
        (TASKS + " --text data/sft_val.jsonl --out ''", "--out|cannot write"),
        (TASKS + " --text data/sft_val.jsonl --out /proc/x/y", "cannot write"),
        (TASKS + " --text data", "data (is|cannot)"), (TASKS + " --text", "--text: expected"),
        (TASKS + " --text data/train.bin", "train.bin"), ("tasks.py", "required: checkpoints"),
        (REACH + " --max_new 0", "--max_new"),
        (REACH + " --max_new 64", "no row fits|no room for a prompt"),
        (REACH + " --samples 1", "--samples"), (REACH + " --temperature 0", "--temperature"),
        (REACH + " --temperature nan", "--temperature"), (REACH + " --seed -1", "--seed"),
        (REACH + " --want -1", "--want"), (REACH + " --rows nowhere", "nowhere is missing"),
        (REACH + " --name ''", "--name"), (REACH + " --name a/b", "--name|cannot write"),
        (REACH + " --device nope", "--device nope"),
        ("data/within_reach.py", "required: checkpoint")]:
    case(command, reason)
MSG = "data/messages.py --out out --train x.jsonl"
for command, reason, change in [
        (MSG, "x.jsonl is missing", None),
        (MSG + " --val_share 0", "--val_share", {"x.jsonl": "{}"}),
        (MSG + " --val_share nan", "--val_share", {"x.jsonl": "{}"}),
        (MSG + " --val_share 1", "--val_share", {"x.jsonl": "{}"}),
        (MSG + " --test_share -1", "--test_share", {"x.jsonl": "{}"}),
        (MSG + " --test_share inf", "--test_share", {"x.jsonl": "{}"}),
        (MSG, "x.jsonl, line 1", {"x.jsonl": "{}\n"}), (MSG, "x.jsonl|no rows", {"x.jsonl": ""}),
        (MSG, "x.jsonl, line 1", {"x.jsonl": "5\n"}), (MSG, "x.jsonl", {"x.jsonl": "[]\n"}),
        (MSG + " --kind x", "--kind: invalid choice", {"x.jsonl": "{}"}),
        (MSG + " --out data/train.bin", "train.bin", {"x.jsonl": "{}"}),
        (MSG + " --out ''", "--out", {"x.jsonl": "{}"}),
        ("data/messages.py --out out --train x.csvv", "x.csvv", {"x.csvv": "a"}),
        ("data/messages.py --out out --train x.parquet", "x.parquet", {"x.parquet": "a"}),
        ("data/messages.py --out out --train x.jsonl.gz", "x.jsonl.gz", {"x.jsonl.gz": "a"}),
        ("data/messages.py --out out --train x.jsonl.zst", "x.jsonl.zst", {"x.jsonl.zst": "a"}),
        ("data/messages.py --out out --train x.json", "x.json", {"x.json": "["}),
        ("data/messages.py --out out --train x.json", "x.json", {"x.json": "[" * 100_000}),
        ("data/messages.py --out out", "no rows to read", None),
        ("data/messages.py --out out --hub a/b", "the Hub's a/b cannot be loaded", None),
        ("data/text.py nowhere.txt --out out", "nowhere.txt is missing", None),
        ("data/text.py x.txt --out out --tokens -1", "--tokens", {"x.txt": "a"}),
        ("data/text.py x.txt --out out --workers -1", "--workers", {"x.txt": "a"}),
        ("data/text.py x.txt --out out --separator (", "--separator", {"x.txt": "a"}),
        ("data/text.py x.txt --out out --val_share 2", "--val_share", {"x.txt": "a"}),
        ("data/text.py x.txt --out out --tokenizer nope", "--tokenizer nope", {"x.txt": "a"}),
        ("data/text.py x.txt --out out --tokenizer nope.json", "nope.json", {"x.txt": "a"}),
        ("data/text.py x.txt --out out --tokenizer y.json", "y.json", {"x.txt": "a",
         "y.json": "5"}),
        ("data/text.py x.txt --out out --tokenizer nope.pt", "nope.pt", {"x.txt": "a"}),
        ("data/text.py bad --out out", "unknown source 'bad'", None),
        ("data/mix.py nowhere --out out", "nowhere is (no folder|missing)", None),
        ("data/mix.py hf --out out", "no sft_, cot_, pairs_ or rl_ rows", None),
        ("data/mix.py data --out data", "same as --out|is --out as well", None),
        ("data/mix.py --out out", "required: folders", None),
        ("data/toy.py --out data/train.bin", "train.bin is a file", None),
        ("data/toy.py --nope", "unrecognized", None),
        ("bench/estimate.py --nope", "takes --gpu NAME, not --nope", None),
        ("bench/gpu.py --only nope", "the parts are cudnn, chunk", None),
        ("bench/gpu.py --device cuda:9 --out gpu", "--device cuda:9: this machine has", None),
        ("bench/estimate.py --gpu Radeon", "no card 'Radeon' is known; known are H200", None),
        ("bench/summary.py nowhere", "takes no arguments, not nowhere", None),
        ("report.py nowhere", "nowhere", None), ("report.py data", "data", None),
        ("report.py --nope", "unrecognized", None), ("bench/shootout.py --jobs 0", "--jobs", None),
        ("bench/shootout.py --nope", "unrecogn", None),
        ("bench/exploits.py nope.pt", "nope.pt is missing", None),
        ("bench/exploits.py start/01_sft.pt --reward start/01_sft.pt", "reward", None),
        ("bench/exploits.py start/01_sft.pt --reward start/06_reward.pt --data data --questions 0",
         "--questions", None),
        ("bench/exploits.py start/01_sft.pt --reward start/06_reward.pt --data nowhere", "missing",
         None)]:
    case(command, reason, change)

# ---------------------------------------------------------------------------- running them

del KINDS["now"]
for c in CASES:
    KINDS.setdefault(c.kind, []).append(c)
FEW = -(-200 // len(KINDS))
CHOSEN = [of[i * len(of) // FEW] for of in KINDS.values() for i in range(FEW)]
RUN = CASES if os.environ.get("BAD_INPUTS") == "all" else CHOSEN
COUNT = Counter()


@pytest.fixture(scope="module")
def world():
    """The loaded process and the folder that every case gets a copy of."""
    machine, top = Machine(), Path(tempfile.mkdtemp(prefix="bad-inputs-"))
    top.chmod(0o755)
    try:
        yield machine, make_world(machine, top / "world"), top
    finally:
        machine.close()
        shutil.rmtree(top, ignore_errors=True)


def prepare(folder, change):
    """Make the changes of a case."""
    if change == "closed":                     # for one who may not do everything
        for name in ("open", "open/01", "open/02", "open/03", "closed", "half", "shut"):
            (folder / name).mkdir()
        for path, source in (("closed.pt", "start/01_sft.pt"), ("closed.bin", "data/train.bin"),
                             ("data/closed.jsonl", "data/sft_train.jsonl"),
                             ("closed.jsonl", "data/sft_train.jsonl"),
                             ("data/closed.bin", "data/train.bin"),
                             ("half/tokenizer.json", "data/tokenizer.json"),
                             ("open/01/01_sft.state.pt", "unfinished/01_sft.state.pt"),
                             ("open/02/01_sft.pt", "finished/01_sft.pt"),
                             ("open/03/01_sft.jsonl", "finished/01_sft.jsonl")):
            shutil.copy(folder / source, folder / path)
            (folder / path).chmod(0)
        for name, bits in (("open", 0o777), ("open/01", 0o777), ("open/02", 0o777),
                           ("open/03", 0o777), ("closed", 0), ("shut", 0o555), (".", 0o555)):
            (folder / name).chmod(bits)
    elif callable(change):
        change(folder)
    for path, new in (change if isinstance(change, dict) else {}).items():
        path = folder / path
        new = new(path.read_bytes()) if callable(new) else new
        if new is None:
            path.unlink(missing_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(new.encode("utf-8", "surrogatepass") if isinstance(new, str) else new)


@pytest.mark.parametrize("c", RUN, ids=lambda c: c.id)
def test_bad_input(c, world):
    machine, source, top = world
    options = dict(c.options)
    n, apart = options.pop("world", 1), options.pop("apart", False)
    saved, log = options.pop("saved", False), options.pop("allow_log", False)
    folders = [top / f"{c.id}-{i}" for i in range(n if apart else 1)]
    for i, folder in enumerate(folders):
        shutil.copytree(source, folder)
        if not apart or i:
            prepare(folder, c.change)
    before = [listing(folder) for folder in folders]
    if n > 1:
        done = machine.ranks([c.command] * n, folders if apart else folders * n, **options)
    else:
        done = [machine.run(c.command, folders[0], **options)]
    after = [listing(folder) for folder in folders]
    COUNT[c.kind] += 1
    for folder in folders:
        os.chmod(folder, 0o755)
        shutil.rmtree(folder)
    check(c, done, before, after, saved or log)


def check(c, done, before, after, may_change):
    err = "".join(d.err for d in done)
    said = f"{c.id}: {c.command}\n{[d.code for d in done]} {err[-3000:]}"
    assert "Traceback" not in err, said
    codes = c.code if isinstance(c.code, tuple) else (c.code,)
    assert all(d.code in codes for d in done), said
    if c.code == 0:
        assert err == "", said
    elif c.reason == STOPPED:
        assert re.search(STOPPED, err), said
    elif c.code == 2 or c.code == 130:
        assert err.count("\n") == 1 and err.endswith("\n"), said
        assert re.search(c.reason, err), said
        assert c.code == 130 or err.startswith("error: "), said
    if c.code == 2 and not may_change:
        assert before == after, (said, {k: v for old, new in zip(before, after)
                                        for k, v in new.items() if old.get(k) != v})


def test_the_counts(world):
    """At least 40 of each kind, all of them different; 200 in the usual run."""
    for name, of in KINDS.items():
        assert len(of) >= 40, name
        assert len({(str(c.command), c.reason, str(c.options),
            id(c.change)) for c in of}) == len(of)
    print("\n" + "\n".join(
        f"{name:>12} {COUNT[name]:>4} tried of {len(of):>4}" for name, of in KINDS.items()))
    assert len(CHOSEN) >= 200


@pytest.mark.parametrize("name", [str(p.relative_to(ROOT)) for folder in (".", "RL", "DPO", "data")
                                  for p in sorted((ROOT / folder).glob("*.py"))
                                  if "__main__" in p.read_text()])
def test_ctrl_c_while_importing(name, tmp_path):
    """Importing torch takes a second, and whoever mistypes presses Ctrl-C then: no traceback."""
    (tmp_path / "numpy.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = subprocess.run([sys.executable, ROOT / name, "--help"], cwd=tmp_path, text=True,
                          capture_output=True, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 130 and done.stdout == "" and done.stderr in ("", "stopped\n"), done
