"""figures.py: what is said of many answers: a mean with its n and 95 % interval; votes, 5-grams.

    share([1, 1, 0])    {"mean": 0.667, "n": 3, "low": 0.208, "high": 0.939}
"""
import math, re

from model import parse, verify
import numpy as np

from answers import vote_key

CAREFUL = re.compile(r"\d+[-+*/]\d+=\d+")


def wilson(p, n):
    """A share p of n -> Wilson's interval, which never leaves [0, 1] and always has a width."""
    z2 = 1.96 ** 2
    middle = (p + z2 / 2 / n) / (1 + z2 / n)
    half = 1.96 * math.sqrt(max(0.0, p * (1 - p)) / n + z2 / 4 / n ** 2) / (1 + z2 / n)
    return {"mean": p, "n": n, "low": max(0.0, middle - half), "high": min(1.0, middle + half)}


def share(hits):
    """The mean of 0s and 1s."""
    return wilson(float(np.mean(hits)), len(hits)) if len(hits) else None


def ratio(sums, counts=1.0):
    """sum(sums) / sum(counts) over independent units; the interval by the delta method. Where no
    unit differs from the others (or there is one) it would have no width: nothing is known then."""
    sums, counts = np.asarray(sums, float), np.broadcast_to(counts, len(sums)).astype(float)
    if not counts.sum():
        return None
    n, mean = len(sums), float(sums.sum() / counts.sum())
    spread = float(np.std((sums - mean * counts) / counts.mean()))
    if spread <= 1e-9 * np.abs(sums).max() / counts.mean():
        return {"mean": mean, "n": n}
    half = 1.96 * spread / math.sqrt(n)
    return {"mean": mean, "n": n, "low": mean - half, "high": mean + half}


def rate(sums, counts=1.0):
    """As `ratio`, of what lies in [0, 1], and so does the interval. Where no unit differs it is
    Wilson's, as if each of them were one trial."""
    figure = ratio(sums, counts)
    if figure and "low" in figure:
        return figure | {"low": max(0.0, figure["low"]), "high": min(1.0, figure["high"])}
    n = np.count_nonzero(np.broadcast_to(counts, len(sums)))
    return figure and wilson(figure["mean"], int(n))


def pass_at_k(n, right, k):
    """The chance that k of n samples hold a right one, unbiased (Chen et al. 2021, eq. 1)."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority(texts, answer):
    """1 if the most frequent answer is right; a tie goes to the one said first."""
    said = {}
    for found in filter(None, map(parse, texts)):
        said.setdefault(vote_key(found[1]), []).append(found[1])
    most = max(said.values(), key=len, default=[])
    return float(bool(most) and verify(f"<answer>{most[0]}</answer><|end|>", answer) == 1)


def careful(text, steps):
    """One operation a line and a line for each step of the question."""
    lines = parse(text)[0].split("\n") if parse(text) else []
    return len(lines) == steps and all(CAREFUL.fullmatch(line) for line in lines)


def grouped(keys, values):
    groups = {}
    for key, value in zip(keys, values):
        groups.setdefault(key, []).append(value)
    return dict(sorted(groups.items(), key=lambda item: str(item[0])))


def gram_bits(train, ids, V, order=5):
    """Bits of each id but the first, interpolated from runs of 1..order ids (Witten & Bell 1991):
    p(c | h) = (count(hc) + kinds(h) p(c | h shortened)) / (count(h) + kinds(h))"""
    p = np.full(len(ids), 1 / V)
    for k in range(1, order + 1):          # k ids in a row are one integer
        code = lambda x, k=k: sum(x[j : len(x) - k + 1 + j].astype(np.int64) * V ** (k - 1 - j)
                                  for j in range(k))
        seen, count = np.unique(code(train), return_counts=True)
        heads, begin, kinds = np.unique(seen // V, return_index=True, return_counts=True)
        asked, total = code(ids), np.add.reduceat(count, begin)
        i, h = (np.searchsorted(table, x).clip(max=len(table) - 1)
                for table, x in ((seen, asked), (heads, asked // V)))
        known = heads[h] == asked // V     # else this order adds nothing: (0 + 1 p) / (0 + 1)
        kind = np.where(known, kinds[h], 1)
        p[k - 1:] = np.where(seen[i] == asked, count[i], 0) + kind * p[k - 1:]
        p[k - 1:] /= np.where(known, total[h], 0) + kind
    return -np.log2(p[1:])
