"""The formulas of the papers, one sequence and one token at a time, in float64 NumPy. Written from
the papers; nothing here comes from the stages or from model.py, which are compared with it.

Log-probs, values and masks are (B, T), advantages and scores (B,), rewards of groups (P, G); pairs
are B / 2 chosen rows, then their rejected ones. A loss is the mean that the paper minimises. What
its gradient holds constant is an argument of its own: finite differences then hold it constant too.
"""
import numpy as np


def gradient(f, x, h=1e-5):
    """Central differences of a scalar function f at the array x."""
    x, grad = np.array(x, dtype=np.float64), np.zeros(np.shape(x))
    for at in np.ndindex(x.shape):
        kept = x[at]
        x[at] = kept + h
        above = f(x)
        x[at] = kept - h
        grad[at] = (above - f(x)) / (2 * h)
        x[at] = kept
    return grad


def tokens(x, mask):
    """(B, T) -> for each row the values at its completion's tokens, a list."""
    return [[float(v) for v, m in zip(row, keep) if m] for row, keep in zip(x, mask)]


def sequence_logprobs(logprobs, mask):
    """log p(y | x), the sum over y's tokens, for each row."""
    return [sum(row) for row in tokens(logprobs, mask)]


def halves(rows):
    """Rows -> [(chosen, rejected)]."""
    n = len(rows) // 2
    return [(rows[i], rows[n + i]) for i in range(n)]


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def clip(x, low, high):
    return low if x < low else high if x > high else x


# ---------------------------------------------------------------------------- 00, 01, 02


def pretrain(logprobs):
    return -sum(float(v) for row in logprobs for v in row) / np.size(logprobs)


def sft(logprobs, mask):
    """One mean over all completion tokens of the batch."""
    rows = tokens(logprobs, mask)
    return -sum(map(sum, rows)) / sum(map(len, rows))


# ---------------------------------------------------------------------------- pairs


def dpo_rewards(logprobs, ref, mask, beta):
    """Rafailov et al. 2023, section 4: the implicit reward beta log p(y|x) / p_ref(y|x)."""
    return [beta * (p - q) for p, q in zip(sequence_logprobs(logprobs, mask),
                                           sequence_logprobs(ref, mask))]


def dpo(logprobs, ref, mask, beta):
    """Rafailov et al. 2023, eq. 7."""
    rewards = halves(dpo_rewards(logprobs, ref, mask, beta))
    return -np.mean([log_sigmoid(w - l) for w, l in rewards])


def ipo(logprobs, ref, mask, tau, mean=False):
    """Azar et al. 2023, eq. 17: h is the difference of whole completions' log-ratios, a sum over
    tokens. With `mean` each log-ratio is divided by its length, which the paper does not write."""
    lengths = [len(row) if mean else 1 for row in tokens(logprobs, mask)]
    logratios = [r / n for r, n in zip(dpo_rewards(logprobs, ref, mask, 1), lengths)]
    return np.mean([(w - l - 1 / (2 * tau)) ** 2 for w, l in halves(logratios)])


def simpo_rewards(logprobs, mask, beta):
    """Meng et al. 2024, eq. 4: beta times the mean log-prob of a token; no reference."""
    return [beta * np.mean(row) for row in tokens(logprobs, mask)]


def simpo(logprobs, mask, beta, gamma):
    """Meng et al. 2024, eq. 6: gamma is a target for the margin of rewards, beta included."""
    rewards = halves(simpo_rewards(logprobs, mask, beta))
    return -np.mean([log_sigmoid(w - l - gamma) for w, l in rewards])


def log_odds(logprobs, mask):
    """Hong et al. 2024, eq. 3-4: log of odds(y) = P / (1 - P) for each row, where log P(y | x) is
    the mean log-prob of a token."""
    P = [np.exp(np.mean(row)) for row in tokens(logprobs, mask)]
    return [np.log(p / (1 - p)) for p in P]


def orpo(logprobs, mask, lam):
    """Hong et al. 2024, eq. 6-7: the likelihood of the chosen one (eq. 3: a mean over its tokens)
    and the odds ratio."""
    nll = [-np.mean(w) for w, _ in halves(tokens(logprobs, mask))]
    ratio = [-log_sigmoid(w - l) for w, l in halves(log_odds(logprobs, mask))]
    return np.mean([a + lam * b for a, b in zip(nll, ratio)])


def kto_baseline(logprobs, ref, mask):
    """Ethayarajh et al. 2024, the estimate of eq. 8's z0: max(0, mean of log p(y'|x) / p_ref(y'|x))
    over mismatched rows, a prompt with another prompt's completion."""
    return max(0.0, np.mean(dpo_rewards(logprobs, ref, mask, 1)))


def kto(logprobs, ref, mask, desirable, z0, beta, weights=(1.0, 1.0)):
    """Ethayarajh et al. 2024, eq. 8: lambda_y - v(x, y); z0 is not differentiated."""
    losses = []
    for r, good in zip(dpo_rewards(logprobs, ref, mask, 1), desirable):
        weight = weights[0] if good else weights[1]
        losses.append(weight - weight * sigmoid(beta * (r - z0 if good else z0 - r)))
    return np.mean(losses)


def bradley_terry(scores):
    """Ouyang et al. 2022, eq. 1, one pair a prompt."""
    return -np.mean([log_sigmoid(w - l) for w, l in halves(list(scores))])


# ---------------------------------------------------------------------------- advantages


def group_advantages(rewards):
    """Shao et al. 2024, section 4.1.2: (r - mean) / std in each group. The paper does not say which
    std: here the unbiased one. A group of equal rewards has none, and gets 0."""
    out = []
    for group in rewards:
        mean = sum(group) / len(group)
        std = (sum((r - mean) ** 2 for r in group) / (len(group) - 1)) ** 0.5
        out.append([(r - mean) / std if max(group) > min(group) else 0.0 for r in group])
    return np.array(out)


def centered_advantages(rewards):
    """Liu et al. 2025 (Dr. GRPO), section 3.2, and REINFORCE with the group's mean as baseline."""
    return np.array([[r - sum(group) / len(group) for r in group] for group in rewards])


def rloo_advantages(rewards):
    """Kool et al. 2019; Ahmadian et al. 2024: minus the mean of the others."""
    return np.array([[r - np.mean([s for j, s in enumerate(group) if j != i])
                      for i, r in enumerate(group)] for group in rewards])


def gae(rewards, values, mask, gamma, lam):
    """Schulman et al. 2015, eq. 16, as the sum it is defined by; the value after the last token is
    0. -> advantages, returns (B, T), 0 outside the completion."""
    advantages, returns = np.zeros(np.shape(values)), np.zeros(np.shape(values))
    for i, keep in enumerate(mask):
        at = [t for t, m in enumerate(keep) if m]
        r, v = [rewards[i][t] for t in at], [values[i][t] for t in at] + [0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(at))]
        for t, place in enumerate(at):
            advantages[i, place] = sum((gamma * lam) ** k * d for k, d in enumerate(delta[t:]))
            returns[i, place] = advantages[i, place] + v[t]
    return advantages, returns


def overlong(length, longest, cache):
    """Yu et al. 2025 (DAPO), eq. 13: the soft punishment of a completion of `length` tokens."""
    if length <= longest - cache:
        return 0.0
    return (longest - cache - length) / cache if length <= longest else -1.0


# ---------------------------------------------------------------------------- policy losses


def k1(p, ref):
    """log p - log ref, of log-probs: three estimates of KL(p || ref) from one of p's samples."""
    return p - ref


def k2(p, ref):
    return (p - ref) ** 2 / 2


def k3(p, ref):
    """Shao et al. 2024, eq. 4."""
    return np.exp(ref - p) - (ref - p) - 1


def ratios(logprobs, old, mask):
    """p / p_old at each completion token, row by row."""
    return [[np.exp(a - b) for a, b in zip(*pair)]
            for pair in zip(tokens(logprobs, mask), tokens(old, mask))]


def sequence_ratios(logprobs, old, mask):
    """p(y|x) / p_old(y|x) for each row."""
    return [np.prod(row) for row in ratios(logprobs, old, mask)]


def surrogate(ratio, A, low, high):
    """Schulman et al. 2017, eq. 7, which is maximised; DAPO's eq. 8 with two bounds."""
    return min(ratio * A, clip(ratio, 1 - low, 1 + high) * A)


def clipped(ratio, A, low, high):
    """Whether eq. 7 has no gradient here."""
    return float(A > 0 and ratio > 1 + high or A < 0 and ratio < 1 - low)


def token_means(rows):
    """A mean over completions of the means over their tokens."""
    return np.mean([np.mean(row) for row in rows])


def token_mean(rows):
    """One mean over all tokens of the batch."""
    return sum(map(sum, rows)) / sum(map(len, rows))


def surrogates(logprobs, old, A, mask, low, high, f=surrogate):
    return [[f(r, a, low, high) for r in row] for row, a in zip(ratios(logprobs, old, mask), A)]


def kl_rows(logprobs, ref, mask, k=k3):
    return [[k(a, b) for a, b in zip(*pair)]
            for pair in zip(tokens(logprobs, mask), tokens(ref, mask))]


def reinforce(logprobs, ref, A, mask, beta):
    """Williams 1992, with a baseline in A: - A log p(y | x), the sum over y's tokens, and with the
    sum of k3 over them; a mean over completions."""
    rows = zip(A, sequence_logprobs(logprobs, mask), kl_rows(logprobs, ref, mask))
    return -np.mean([a * p - beta * sum(kl) for a, p, kl in rows])


def rloo(logprobs, old, A, mask, eps):
    """Ahmadian et al. 2024: the completion is the action, so the ratio is the whole sequence's. The
    clip is PPO's eq. 7 on it, for when a batch of rollouts serves several steps."""
    pairs = zip(sequence_ratios(logprobs, old, mask), A)
    return -np.mean([surrogate(r, a, eps, eps) for r, a in pairs])


def grpo(logprobs, old, ref, A, mask, eps, beta):
    """Shao et al. 2024, eq. 3."""
    gain = token_means(surrogates(logprobs, old, A, mask, eps, eps))
    return -(gain - beta * token_means(kl_rows(logprobs, ref, mask)))


def dr_grpo(logprobs, old, ref, A, mask, eps, beta, longest):
    """Liu et al. 2025, section 3.2: 1 / |o| is gone; sums over tokens, divided by the same constant
    for every completion, the most tokens that it may have."""
    gain = sum(map(sum, surrogates(logprobs, old, A, mask, eps, eps)))
    kl = sum(map(sum, kl_rows(logprobs, ref, mask)))
    return -(gain - beta * kl) / (len(A) * longest)


def dapo(logprobs, old, A, mask, low, high):
    """Yu et al. 2025, eq. 8: two bounds, one mean over all tokens, no KL."""
    return -token_mean(surrogates(logprobs, old, A, mask, low, high))


def length_normalised_ratios(logprobs, old, mask):
    """Zheng et al. 2025, eq. 7: the sequence's ratio to the power 1 / |y|."""
    rows = zip(sequence_ratios(logprobs, old, mask), tokens(logprobs, mask))
    return [ratio ** (1 / len(row)) for ratio, row in rows]


def gspo(logprobs, old, ref, A, mask, low, high, beta=0.0):
    """Zheng et al. 2025, eq. 5, and GRPO's KL, which the paper leaves out."""
    s = length_normalised_ratios(logprobs, old, mask)
    gain = np.mean([surrogate(r, a, low, high) for r, a in zip(s, A)])
    return -(gain - beta * token_means(kl_rows(logprobs, ref, mask)))


def cispo_weights(logprobs, old, mask, low, high):
    """MiniMax 2025 (M1), eq. 5: the clipped ratio at each token, held constant in eq. 4."""
    return [[clip(r, 1 - low, 1 + high) for r in row] for row in ratios(logprobs, old, mask)]


def cispo(logprobs, weights, A, mask):
    """MiniMax 2025 (M1), eq. 4: one mean over all tokens of weight A log p."""
    rows = [[w * a * p for w, p in zip(*row)]
            for row, a in zip(zip(weights, tokens(logprobs, mask)), A)]
    return -token_mean(rows)


def value_loss(values, old_values, returns, mask, eps):
    """Half the squared error, the larger one of the value and of the value held within eps of the
    old one (not in PPO's paper: it comes from OpenAI's code); a mean over all tokens."""
    rows = zip(*(tokens(x, mask) for x in (values, old_values, returns)))
    return token_mean([[max((v - R) ** 2, (clip(v, o - eps, o + eps) - R) ** 2) / 2
                        for v, o, R in zip(*row)] for row in rows])


def ppo(logprobs, values, old, old_values, advantages, returns, mask, eps, vf_coef):
    """Schulman et al. 2017, eq. 7 and 9 (without the entropy); advantages are (B, T)."""
    rows = zip(ratios(logprobs, old, mask), tokens(advantages, mask))
    gain = token_mean([[surrogate(r, a, eps, eps) for r, a in zip(*row)] for row in rows])
    return vf_coef * value_loss(values, old_values, returns, mask, eps) - gain


# ---------------------------------------------------------------------------- exact KL


def softmax(logits):
    e = np.exp(logits - np.max(logits))
    return e / e.sum()


def kl(p, q):
    """KL(p || q) of two distributions over a vocabulary, summed over all of it."""
    return sum(a * np.log(a / b) for a, b in zip(p, q))
