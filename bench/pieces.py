"""pieces.py: what bench/speed.py times. Both sides of each piece, and the code of those that are
no script.

    python bench/pieces.py KIND TREE '{"work": folder, ...}'      # speed.py calls it, nobody else

runs one side in a process of its own and prints one line of JSON last: the seconds of each step
after the first. TREE is the folder whose model.py is used where a kind needs one: this project's,
or that of an older commit.
"""
import json, os, sys, time
from collections import namedtuple
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

OLD = "26820e8"
SIZES = {"toy": ({"n_layer": 4, "n_head": 4, "n_embd": 128}, 87),
         "small": ({"n_layer": 6, "n_head": 6, "n_embd": 384}, 50304)}
GPT2 = "--position learned --qk_norm 0 --muon_lr 0"
GRPO = dict(num_generations=8, steps_per_generation=2, beta=0.02, loss_type="grpo",
            use_bias_correction_kl=False, pieces=2)


def stage(script, flags, n):
    """What our side of a piece runs: a script and its flags, n counted steps."""
    flags += f" --steps {n + 2} --eval_every 1000000 --save_every 1000000 --device cpu"
    return {"script": script, "n": n, "flags": flags.split()}


def call(of, **given):
    """What a side runs that is no script: a function of bench/pieces.py and its arguments."""
    return {"kind": of, "given": given}


Piece = namedtuple("Piece", "size what tokens ours other against cost")
# what a step is; its tokens, or 0; two sides; whom the other belongs to; seconds a process takes,
# about, which only weigh the progress


def training_pieces():
    """00 beside transformers' GPT-2, and beside itself at commit OLD."""
    made = {}
    for size, batch, window, n, cost in (("toy", 64, 128, 12, 12), ("small", 8, 256, 5, 20)):
        shape = " ".join(f"--{k} {v}" for k, v in SIZES[size][0].items())
        flags = f"{shape} --window {window} --batch_size {batch} --micro_batch {batch} {GPT2}"
        for bf16 in range(1 + (size == "small")):
            made[f"pretrain-{size}" + "-bf16" * bf16] = Piece(
                size, f"pretraining step, {batch} x {window} tokens" + ", bf16" * bf16,
                batch * window, stage("00_pretrain.py", flags + " --bf16 1" * bf16, n),
                call("hf_pretrain", batch=batch, window=window, steps=n, bf16=bf16),
                "transformers' GPT-2", cost)
    ours = stage("00_pretrain.py", "--window 128 --batch_size 64 --micro_batch 64", 12)
    made["default-toy"] = Piece("toy", "00's default step (RoPE, QK-norm, Muon), 64 x 128 tokens",
                                64 * 128, ours, ours, OLD, 12)
    return made


def rollout_pieces():
    """The engine beside transformers' generate."""
    made = {}
    for name, n, group, cost in (("rollouts-toy", 64, 1, 10), ("rollouts-small", 64, 1, 25),
                                 ("grouped-toy", 16, 8, 10)):
        given = dict(prompts=n, group=group, max_new=64, steps=3)
        made[name] = Piece(
            name.split("-")[1], f"rollouts, {n} ragged prompts x {group}, 64 new tokens each",
            n * group * 64, call("generate", **given), call("hf_generate", **given),
            "transformers' generate", cost)
    return made


def post_pieces():
    """01, 03 and 04 beside TRL's trainers, 05 beside itself at commit OLD."""
    made, both = {}, "--batch_size 16 --micro_batch 16 --micro_tokens 100000"
    data = lambda kind: f"--train {kind}.jsonl --val {kind}_val.jsonl"
    for size, n, new, cost in (("toy", 10, 64, 10), ("small", 4, 32, 40)):
        made[f"sft-{size}"] = Piece(
            size, "SFT step, 16 rows of 56-124 tokens", 0,
            stage("01_sft.py", f"{both} {data('sft')} --muon_lr 0", n),
            call("trl", kind="sft", batch=16, steps=n), "TRL's SFTTrainer", cost)
        made[f"dpo-{size}"] = Piece(
            size, "DPO step, 16 pairs of 56-124 tokens a side", 0,
            stage("03_dpo.py", f"{both} {data('pairs')}", n),
            call("trl", kind="dpo", batch=16, steps=n), "TRL's DPOTrainer", cost)
        n = 3 if size == "toy" else 1
        flags = f"--max_new {new} --eval_rows 1 --minibatches 2 {data('rl')}"
        flags += " --micro_batch 64 --micro_tokens 100000"
        said = f"{new} new tokens each, two optimizer steps, micro-batch 64"
        made[f"grpo-{size}"] = Piece(
            size, f"GRPO step, 16 prompts x 8, {said}", 0,
            stage("04_rlvr.py", f"--batch_size 16 --group_size 8 {flags}", n),
            call("trl", kind="grpo", batch=64, steps=n, max_completion_length=new, **GRPO),
            "TRL's GRPOTrainer", 3 * cost)
        if size == "toy":
            ppo, old = (stage("05_ppo.py", f"--batch_size 128 {f}", n) for f in (
                flags, flags.removesuffix(" --micro_tokens 100000")))       # which OLD has not
            made["ppo-toy"] = Piece(size, f"PPO step, 128 prompts, {said}", 0, ppo, old, OLD, 15)
    return made


PIECES = training_pieces() | rollout_pieces() | post_pieces()


def tuned(side):
    """A peer's side with what ours has and it could have: GELU in one kernel, and an allocator that
    keeps the memory of big tensors, so that the system need not clear it anew (frame.py)."""
    keep = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(2000 << 20)}
    return side | {"env": keep, "given": side["given"] | {"activation": "gelu_pytorch_tanh"}}


# ---------------------------------------------------------------------------- data, our side

BLOCK = 256                                          # the context of every model here
USER, ASSISTANT, END = "\ue001", "\ue002", "<|end|>"     # as text for the peers' tokenizer
ROWS = {"sft": 512, "pairs": 512, "rl": 512, "val": 1}


def text(rng, vocab, low, high):
    """Some characters of the tokenizer: ragged rows, uniform in length."""
    return "".join(chr(256 + i) for i in rng.integers(0, vocab - 8, rng.integers(low, high + 1)))


def make_data(work, vocab):
    """What the stages read: tokens, and rows of 16-44 ids of prompt and 40-80 of completion, tags
    counted. Characters from 256 on, so that any vocabulary has enough."""
    rng, work = np.random.default_rng(0), Path(work)
    spec = {"kind": "chars", "chars": "".join(chr(256 + i) for i in range(vocab - 8))}
    (work / "tokenizer.json").write_text(json.dumps(spec))
    for name, n in (("train", 2 ** 20), ("val", 2 * BLOCK)):
        rng.integers(0, vocab - 8, n).astype(np.uint16).tofile(work / f"{name}.bin")
    prompt, said = lambda: text(rng, vocab, 14, 42), lambda: text(rng, vocab, 39, 79)
    for kind, row in (("sft", lambda: {"prompt": prompt(), "completion": said()}),
                      ("pairs", lambda: {"prompt": prompt(), "chosen": said(), "rejected": said()}),
                      ("rl", lambda: {"prompt": prompt(), "answer": "7"})):
        for part, n in ((kind, ROWS[kind]), (f"{kind}_val", ROWS["val"])):
            (work / f"{part}.jsonl").write_text(
                "".join(json.dumps(row()) + "\n" for _ in range(n)))
    return spec


def endless(weight, bias, end):
    """Weights with which `end` is never drawn: every completion then has the same length."""
    weight[end, 0], bias[0] = -10.0, 10.0


def make(work, shape, vocab):
    """Data, start.pt, endless.pt and a reward.pt, by the tree's own model.py."""
    import model as kernel
    spec = make_data(work, vocab)
    torch.manual_seed(0)
    cfg = kernel.GPTConfig(vocab_size=vocab, block_size=BLOCK, **shape)
    model, head = kernel.GPT(cfg), torch.nn.Linear(cfg.n_embd, 1)
    parts = dict(tokenizer=spec, gpt=asdict(cfg), record={})
    kernel.save(f"{work}/start.pt", model=model.state_dict(), **parts)
    kernel.save(f"{work}/reward.pt", model=model.state_dict(), head=head.state_dict(),
                val_mean=0.0, val_std=1.0, **parts)
    with torch.no_grad():
        endless(model.embed.weight, model.norm.bias, kernel.Tokenizer(spec).end)
    kernel.save(f"{work}/endless.pt", model=model.state_dict(), **parts)
    return []


def prompts_of(work, n):
    """The first n prompts of the RL rows, as ids."""
    vocab = len(json.loads(Path(work, "tokenizer.json").read_text())["chars"])
    rows = [json.loads(line) for line in Path(work, "rl.jsonl").read_text().splitlines()[:n]]
    return [[vocab + 1, *(ord(c) - 256 for c in row["prompt"]), vocab + 2] for row in rows]


def timed(steps, do):
    """Seconds of do(0), do(1), ... but the first: it warms up."""
    stamps = []
    for step in range(steps + 1):
        do(step)
        stamps.append(time.monotonic())
    return [b - a for a, b in zip(stamps, stamps[1:])]


def generate(work, prompts, group, max_new, steps, **_):
    """Ours: the rollout engine, as 04 calls it."""
    import model as kernel
    model, tokenizer, _ = kernel.load(f"{work}/endless.pt")
    asked = [p for p in prompts_of(work, prompts) for _ in range(group)]

    def do(step):
        said, _ = kernel.generate(model, asked, max_new, tokenizer.end, 1.0, 0, step)
        assert sum(map(len, said)) == len(asked) * max_new
    return timed(steps, do)


# ---------------------------------------------------------------------------- transformers, TRL


def gpt2(shape, vocab, activation="gelu_new", end=None):
    """transformers' GPT-2 of the same shape, without dropout; its attention is torch's own."""
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=vocab, n_positions=BLOCK, n_layer=shape["n_layer"], n_head=shape["n_head"],
        n_embd=shape["n_embd"], activation_function=activation, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=vocab - 8, eos_token_id=vocab - 8, pad_token_id=vocab - 8,
        attn_implementation="sdpa"))
    if end is not None:
        with torch.no_grad():
            endless(model.transformer.wte.weight, model.transformer.ln_f.bias, end)
    return model


def hf_pretrain(work, shape, vocab, batch, window, steps, bf16=0, activation="gelu_new"):
    """A plain loop: forward, loss, backward, clipping, fused AdamW; the loss is read each step, as
    ours is for its log."""
    model = gpt2(shape, vocab, activation)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    tokens = np.memmap(f"{work}/train.bin", dtype=np.uint16, mode="r")

    def do(step):
        starts = np.random.default_rng([0, step]).integers(0, len(tokens) - window, batch)
        ids = torch.tensor(np.stack([tokens[i : i + window + 1].astype(np.int64) for i in starts]))
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(bf16)):
            logits = model(ids[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)) + float(loss.detach())
        opt.step()
        opt.zero_grad(set_to_none=True)
    return timed(steps, do)


def hf_generate(work, shape, vocab, prompts, group, max_new, steps, activation="gelu_new"):
    """generate() with its dynamic cache, prompts padded on the left; sampled, temperature 1."""
    end, asked = vocab - 8, prompts_of(work, prompts)
    model, longest = gpt2(shape, vocab, activation, end).eval(), max(map(len, asked))
    ids = torch.tensor([[end] * (longest - len(p)) + p for p in asked])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in asked])

    def do(step):
        torch.manual_seed(step)
        out = model.generate(ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0,
                             top_p=1.0, max_new_tokens=max_new, num_return_sequences=group)
        assert out.shape == (len(asked) * group, longest + max_new)
    return timed(steps, do)


def tokenizer_for(vocab):
    """The same ids as ours, for TRL: a character each; the tags of a turn as characters, too."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    table = {chr(256 + i): i for i in range(vocab - 8)}
    table |= {END: vocab - 8, USER: vocab - 7, ASSISTANT: vocab - 6}
    tok = Tokenizer(models.WordLevel(table, unk_token=END))
    tok.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tok.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token=END, pad_token=END)


def trl(kind, work, shape, vocab, batch, steps, pieces=1, activation="gelu_new", **flags):
    """A TRL trainer's own train(); seconds between the ends of its steps. `pieces`: optimizer
    steps to one of ours, which has a batch of rollouts."""
    import trl as library
    from datasets import Dataset
    from transformers import TrainerCallback
    stamps, name = [], {"sft": "SFT", "dpo": "DPO", "grpo": "GRPO"}[kind]

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            stamps.append(time.monotonic())

    args = getattr(library, f"{name}Config")(
        output_dir=f"{work}/trl", max_steps=(steps + 1) * pieces, per_device_train_batch_size=batch,
        gradient_accumulation_steps=1, learning_rate=1e-4, lr_scheduler_type="constant",
        optim="adamw_torch_fused", bf16=False, gradient_checkpointing=False, use_cpu=True,
        logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, **flags)
    path = {"sft": "sft", "dpo": "pairs", "grpo": "rl"}[kind]
    rows = [json.loads(line) for line in Path(work, f"{path}.jsonl").read_text().splitlines()]
    rows = [row | {"prompt": USER + row["prompt"] + ASSISTANT} for row in rows]
    model = gpt2(shape, vocab, activation, end=vocab - 8 if kind == "grpo" else None)
    tok = tokenizer_for(vocab)
    more = {}
    if kind != "sft":                      # they load the reference from the policy's folder
        model.save_pretrained(f"{work}/hf")
        model = f"{work}/hf"
    if kind == "grpo":
        more["reward_funcs"] = lambda completions, **_: [0.0] * len(completions)
    trainer = getattr(library, f"{name}Trainer")(
        model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tok,
        callbacks=[Clock()], **more)
    trainer.train()
    stamps = stamps[pieces - 1 :: pieces]
    return [b - a for a, b in zip(stamps, stamps[1:])]


KINDS = {"make": make, "generate": generate, "hf_pretrain": hf_pretrain,
         "hf_generate": hf_generate, "trl": trl}

if __name__ == "__main__":
    kind, tree, given = sys.argv[1:] if len(sys.argv) == 4 else ("", "", "{}")
    if kind not in KINDS or not os.path.isfile(f"{tree}/model.py"):
        print("error: bench/speed.py calls this file; run that one", file=sys.stderr)
        sys.exit(2)
    sys.path[0] = tree
    print(json.dumps({"seconds": KINDS[kind](**json.loads(given))}), flush=True)
