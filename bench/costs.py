"""costs.py: the operations and the bytes of each piece of work, by formula; they fill in the tables
of docs/performance.md.

    python bench/costs.py       # writes docs/performance.md anew; a test compares the two

An operation is a multiplication or an addition of a matrix product: 2 for each weight and token.
Bytes are what must go through memory at fp32, caches aside. A shape has L layers of width C, a
vocabulary of V and an MLP of 4 C; n tokens stand in rows of T.
"""
import json
import sys
from collections import namedtuple
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
Shape = namedtuple("Shape", "L C V")
TOY, SMALL = Shape(4, 128, 87), Shape(6, 384, 50304)
KEPT = 17       # numbers x C that a block keeps of a token for its backward pass, about
ADAMW = 28      # bytes a weight: itself, its gradient and two moments read, three of them written
LOGITS = 6      # passes over the logits in softmax, its backward pass and the products, about
DRAW = 4        # over the logits of a decode step: written, softmax, their sums, search


def blocks(s):
    return 12 * s.L * s.C ** 2


def head(s):
    return s.V * s.C


def forward(s, n, T, scored):
    """Operations: all n tokens through the blocks, `scored` of them through the head. A token sees
    T / 2 places, and each costs 4 C in every layer."""
    return n * (2 * blocks(s) + 2 * s.L * s.C * T) + 2 * scored * head(s)


def train(s, n, T, scored=None, others=0):
    """-> operations, bytes of forward, backward (two forwards), clipping and AdamW; before it
    `others` forward passes of the same tokens without gradient."""
    scored = n if scored is None else scored
    kept = 4 * n * KEPT * s.L * s.C
    logits = 4 * scored * s.V
    weights = 4 * (blocks(s) + head(s))
    return ((3 + others) * forward(s, n, T, scored),
            (2 + others) * kept + (LOGITS + 2 * others) * logits + (ADAMW / 4 + others) * weights)


def logprobs(s, n):
    """The head and its softmax, forward and backward, logits kept: 3 products."""
    return 6 * n * head(s), 4 * (LOGITS * n * s.V + 3 * head(s) + 2 * n * s.C)


def prefill(s, prompts, T):
    """Prompts into the cache; only their last token goes through the head."""
    n = prompts * T
    return (forward(s, n, T, prompts),
            4 * (blocks(s) + head(s)) + 4 * n * s.L * s.C * (2 + KEPT) + 4 * DRAW * prompts * s.V)


def decode(s, rows, length):
    """One token for each row: all weights once, and every row's keys and values so far."""
    return (rows * (2 * blocks(s) + 2 * head(s) + 4 * s.L * s.C * length),
            4 * (blocks(s) + head(s)) + 8 * rows * s.L * s.C * length + 4 * DRAW * rows * s.V)


def rollouts(s, prompts, group, T, new, slots=256):
    """Prefill once a prompt, then `new` steps of all rows, `slots` at a time."""
    parts, left = [prefill(s, prompts, T)], prompts * group
    while left > 0:
        operations, moved = decode(s, min(slots, left), T + new / 2)
        parts.append((new * operations, new * moved))
        left -= slots
    return tuple(map(sum, zip(*parts)))


def rl(s, prompts, group, T, new, others, updates=2):
    """Rollouts, `others` scoring passes, one epoch in `updates` optimizer steps."""
    rows = prompts * group
    operations, moved = train(s, rows * (T + new), T + new, rows * new, others)
    moved += (updates - 1) * ADAMW * (blocks(s) + head(s))
    return tuple(a + b for a, b in zip(rollouts(s, prompts, group, T, new), (operations, moved)))


def ppo(s, prompts, T, new):
    """As GRPO without groups, and a reward model of the same shape, which has no vocabulary."""
    operations, moved = rl(s, prompts, 1, T, new, others=2)
    n = prompts * (T + new)
    return (operations + forward(s, n, T + new, 0),
            moved + 4 * n * KEPT * s.L * s.C + 4 * blocks(s))


def works(s):
    """{piece of work: (operations, bytes)}, in the shapes of bench/speed.py: the longest of 16
    rows has about 120 tokens, and of a row 60 are its completion's."""
    batch, window = (64, 128) if s == TOY else (8, 256)
    new = 64 if s == TOY else 32
    return {f"pretraining step, {batch} x {window} tokens": train(s, batch * window, window),
            "of it token_logprobs": logprobs(s, batch * window),
            "prefill, 64 prompts of 32": prefill(s, 64, 32),
            "decode step, 1 row at place 64": decode(s, 1, 64),
            "decode step, 64 rows at place 64": decode(s, 64, 64),
            "SFT step, 16 rows": train(s, 16 * 120, 120, 16 * 60),
            "DPO step, 16 pairs": train(s, 32 * 120, 120, 32 * 60, others=1),
            f"GRPO step, 16 x 8, {new} new": rl(s, 16, 8, 32, new, others=2),
            f"PPO step, 128, {new} new": ppo(s, 128, 32, new)}


# ---------------------------------------------------------------------------- docs/performance.md


def machine():
    """What bench/growth.py measured of the machine, or None."""
    path = ROOT / "results/growth/growth.jsonl"
    rows = map(json.loads, path.read_text().splitlines()) if path.is_file() else []
    return next((r for r in rows if r["point"] == "limits {}"), None)


def examples(found):
    """The table of works; with the machine's two numbers also the limit of each."""
    lines = []
    for name, s in (("TOY", TOY), ("SMALL", SMALL)):
        head = [f"{name}, {s.L} x {s.C}, {s.V:,}", "G operations", "GB", "operations a byte"]
        head += ["at best, s", "limit"] * bool(found)
        lines += ["", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for work, (operations, moved) in works(s).items():
            cells = [work, f"{operations / 1e9:.3g}", f"{moved / 1e9:.3g}",
                     f"{operations / moved:.3g}"]
            if found:
                by = operations / found["operations_s"], moved / found["bytes_s"]
                cells += [f"{max(by):.2g}", "operations" if by[0] > by[1] else "bytes"]
            lines.append("| " + " | ".join(cells) + " |")
    if found:
        lines += ["", f"With {found['operations_s'] / 1e9:.0f} G operations/s and "
                  f"{found['bytes_s'] / 1e9:.1f} GB/s, as bench/growth.py measured them; the "
                  f"balance is {found['operations_s'] / found['bytes_s']:.0f} operations a byte."]
    return "\n".join(lines).strip()


def renewed(text, script, parts):
    """The text with what stands after each mark <!-- script: mark --> made anew, up to the next
    <!-- end -->."""
    for mark, part in parts.items():
        before, begin, rest = text.partition(f"<!-- {script}: {mark} -->\n")
        text = f"{before}{begin}{part}\n<!-- end -->{rest.split('<!-- end -->', 1)[1]}"
    return text


def document():
    """The text of docs/performance.md with its generated parts renewed."""
    recorded = {mark: ROOT / path for mark, path in (("speed", "results/speed/table.md"),
                                                     ("growth", "results/growth/growth.md"))}
    made = {mark: path.read_text().strip() if path.is_file() else
            f"Not recorded yet: `python bench/{mark}.py`." for mark, path in recorded.items()}
    return renewed((ROOT / "docs/performance.md").read_text(), "bench/costs.py",
                   made | {"examples": examples(machine())})


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(f"error: it takes no arguments, not {sys.argv[1]}", file=sys.stderr)
        sys.exit(2)
    (ROOT / "docs/performance.md").write_text(document())
