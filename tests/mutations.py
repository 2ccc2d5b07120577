"""mutations.py: does a test notice when a known mistake is put back?

    python tests/mutations.py                  # all of them; --jobs N (2), --only NAME, --list
    python tests/mutations.py --changed        # those whose file or test changed since the record

A green suite shows that the code passes its tests, not that the tests would see an error. Each
mutation below is a small change of text that restores a mistake of the field, and names the tests
that should notice. The tree is copied, the named tests pass on the copy, and then each mutation is
applied to a copy of its own:

    killed      an assertion fails in a named test: what should happen
    survived    all of them pass: a test is missing
    broken      the text to replace is not there exactly once, the code no longer runs (an import,
                a set-up, any error that is no assertion), or the time is up: mend the mutation

The end of a complete run is recorded in results/mutations.json; the exit code is 1 if anything
survived or is broken. Mistakes of the field that have no mutation are at the end of the list.
"""
import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "results/mutations.json"
LIMIT = 600                      # seconds for the named tests of one mutation


@dataclass
class Mutation:
    name: str
    slip: str                    # the mistake that it restores, in words
    file: str
    old: str                     # must be in the file exactly once
    new: str
    tests: list                  # pytest's node ids


MUTATIONS = []


def put(name, slip, file, old, new, *tests):
    MUTATIONS.append(Mutation(name, slip, file, old, new, [f"tests/test_{t}" for t in tests]))


# ---------------------------------------------------------------------------- masks and templates

put("mask-without-end", "the stop token is not in the loss: the model never learns to stop",
    "model.py", "mask += [0] * len(head) + [int(new)] * len(body)",
    "mask += ([0] * len(head) + [int(new)] * len(body))[:-1] + [0]",
    "kernel.py::test_multi_turn_mask", "kernel.py::test_completion_mask")

put("mask-with-header", "the mask begins one token early: the assistant's header is learned",
    "model.py", "mask += [0] * len(head) + [int(new)] * len(body)",
    "mask += [0] * (len(head) - 1) + [int(new)] * (len(body) + 1)",
    "kernel.py::test_multi_turn_mask", "kernel.py::test_completion_mask")

put("mask-not-shifted", "targets are shifted, their mask is not: the last target is lost",
    "model.py", "mask = completion_mask[:, 1:]", "mask = completion_mask[:, :-1]",
    "kernel.py::test_shift", "kernel.py::test_completion_mask")

put("mask-dropped", "the mask gets lost in a refactoring: the prompt is learned as well",
    "01_sft.py", "ids, targets, mask = shift(ids, completion_mask)",
    "ids, targets, mask = shift(ids, torch.ones_like(completion_mask))",
    "gaps.py::test_gradient_of_a_step[01_sft]")

put("mask-from-padding", "the mask is built from ids that are not padding, where the pad id is one "
    "that occurs", "01_sft.py", "return pad(ids, device), pad(masks, device)",
    "return pad(ids, device), pad(masks, device) * (pad(ids, device) != 0)",
    "kernel.py::test_completion_mask[01_sft]")

put("pairs-without-end", "the end token is missing from chosen and rejected", "model.py",
    "return ids, [0] * n + [1] * (len(ids) - n)",
    "return ids[:-1], [0] * n + [1] * (len(ids) - n - 1)",
    "kernel.py::test_prompt_ids_are_the_same_in_training_and_rollouts")

put("tags-in-user-text", "a user who writes <answer> gets a control token", "model.py",
    "(self.encode_completion if new else self.encode)(text)",
    "self.encode_completion(text)", "kernel.py::test_tags_in_text_stay_text")

put("special-tokens-in-user-text", "a user who writes <|im_start|> gets the file's own control "
    "token", "model.py", "self.hf.encode_special_tokens = True",
    "self.hf.encode_special_tokens = False", "kernel.py::test_tags_in_text_stay_text")

put("long-rows-cut", "a row that is too long is cut: the completion loses its end", "model.py",
    "            dropped += 1\n",
    "            dropped += 1\n"
    "            kept.append([(ids[:block_size], m[:block_size]) for ids, m in items])\n",
    "kernel.py::test_long_rows_are_dropped_whole")

put("only-a-question", "a row without a completion is taken, and teaches nothing", "01_sft.py",
    "if sum(mask) < 2:", "if sum(mask) < 0:", "errors.py::test_row_of_the_wrong_form")

put("equal-pairs", "a pair of equal sides is taken, and has no gradient", "03_dpo.py",
    "if pairs[0] == pairs[1]:", "if pairs[0] is pairs[1]:", "errors.py::test_equal_pair[03_dpo]")

# ---------------------------------------------------------------------------- the model

put("not-causal", "a token sees what follows it", "model.py",
    "F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=groups)",
    "F.scaled_dot_product_attention(q, k, v, is_causal=False, enable_gqa=groups)",
    "kernel.py::test_causal[gpt2]")

put("large-tied-embedding", "a tied embedding that is scaled for the input: the first loss is far "
    "above ln V", "model.py", "nn.init.normal_(m.weight, std=0.02)",
    "nn.init.normal_(m.weight, std=0.2 if isinstance(m, nn.Embedding) else 0.02)",
    "kernel.py::test_first_loss_is_ln_v")

put("residual-not-scaled", "what writes into the residual stream is not scaled down with depth",
    "model.py", "std=0.02 / math.sqrt(2 * self.cfg.n_layer)", "std=0.02",
    "kernel.py::test_first_loss_is_ln_v")

put("decay-on-norms", "norms and biases decay", "model.py",
    "{\"params\": vectors, \"weight_decay\": 0.0}",
    "{\"params\": vectors, \"weight_decay\": weight_decay}", "kernel.py::test_optimizers")

put("temperature-forgotten-by-the-trainer", "log-probs at temperature 1 of samples at another",
    "model.py", "(logits if ctx.temperature == 1 else logits / ctx.temperature).log_softmax(-1)",
    "logits.log_softmax(-1)", "kernel.py::test_token_logprobs",
    "kernel.py::test_generate_in_fp32")

put("temperature-forgotten-in-the-gradient", "the gradient of log-probs as at temperature 1",
    "model.py", "g = g[:, None] / ctx.temperature", "g = g[:, None]",
    "kernel.py::test_token_logprobs")

put("qk-norm-without-its-gradient", "the norm of q and k is taken for a constant", "model.py",
    "return back.mul_(weight).addcmul_(x, -along), d_weight", "return back.mul_(weight), d_weight",
    "kernel.py::test_norm_rotate")

# ---------------------------------------------------------------------------- rollouts

put("temperature-forgotten-by-the-sampler", "the sampler reports log-probs at temperature 1",
    "model.py", "return token, logprobs.gather(",
    "return token, at_least_fp32(logits).log_softmax(-1).gather(",
    "kernel.py::test_generate_in_fp32", "kernel.py::test_generate[gpt2-2.0]")

put("top-p-in-the-log-prob", "log-probs of the truncated softmax, which the trainer never sees",
    "model.py", ".scatter(-1, order, outside), 0)\n",
    ".scatter(-1, order, outside), 0)\n            logprobs = (probs / probs.sum(-1, "
    "keepdim=True)).log()\n", "kernel.py::test_top_p")

put("uniform-rounds-up", "a uniform just below 1 rounds to 1 in fp32: the search passes the end",
    "model.py", "at = torch.minimum(u[:, None].to(cdf.dtype) * total, below)",
    "at = u[:, None].to(cdf.dtype) * total",
    "kernel.py::test_sample_token_never_takes_what_is_impossible")

put("one-draw-for-all-rows", "all rows of a batch share their uniforms", "model.py",
    "np.random.default_rng([seed, step, row]).random(n)",
    "np.random.default_rng([seed, step]).random(n)",
    "kernel.py::test_rows_draw_their_own_numbers")

put("one-draw-for-the-first-token", "the first token is drawn once for the whole group", "model.py",
    "    u = u.to(dtype).to(device)",
    "    u[:, 0] = u[0, 0]\n    u = u.to(dtype).to(device)",
    "kernel.py::test_rows_draw_their_own_numbers")

put("same-draws-every-step", "the sampler starts again with the same seed in every step",
    "model.py", "np.random.default_rng([seed, step, row]).random(n)",
    "np.random.default_rng([seed, row]).random(n)", "kernel.py::test_rows_draw_their_own_numbers")

put("positions-of-the-longest", "in a ragged batch every row decodes at the longest one's position",
    "model.py", "place = [len(prompts[i]) + len(out[i]) - 1",
    "place = [max(map(len, prompts)) + len(out[i]) - 1", "kernel.py::test_generate_in_fp32")

put("first-token-from-padding", "the first token is drawn at the batch's last place, not at the "
    "prompt's", "model.py", "torch.tensor([len(p) - 1 for p in unique], device=ids.device)",
    "torch.tensor([ids.shape[1] - 1 for p in unique], device=ids.device)",
    "kernel.py::test_generate_in_fp32")

put("padding-is-seen", "a short row attends to what lies behind its end", "model.py",
    "device=like.device) > position[:, None]", "device=like.device) > position.max() + 0 * "
    "position[:, None]", "kernel.py::test_generate_in_fp32")

put("cache-not-moved", "rows leave, and the others keep decoding with their neighbours' keys",
    "model.py", "                           cache.longest)", "                           0)",
    "kernel.py::test_generate_in_fp32", "kernel.py::test_generate[gpt2-2.0]")

put("stop-token-not-reinforced", "the sampled <|end|> has mask 0: stopping is never reinforced",
    "04_rlvr.py", "rollouts = [(p + c, [0] * len(p) + [1] * len(c),",
    "rollouts = [(p + c, [0] * len(p) + ([1] * (len(c) - 1) + [0] if c[1:] else [1]),",
    "stages.py::test_rollout_of_04")

put("groups-by-stride", "the group of a completion is taken from the order of rows", "04_rlvr.py",
    "torch.tensor([s or 0.0 for s in scores]).view(-1, G)",
    "torch.tensor([s or 0.0 for s in scores]).view(G, -1).T", "gaps.py::test_groups[04_rlvr]")

put("temperature-forgotten-in-the-loss", "new log-probs at temperature 1, old ones as sampled",
    "04_rlvr.py", "ddp(ids, targets, cfg.temperature)", "ddp(ids, targets)",
    "stages.py::test_first_ratio_is_one[04_rlvr]")

put("rollouts-repeat", "each batch of rollouts draws the numbers of the first", "04_rlvr.py",
    "cfg.temperature, cfg.seed, step, numbers)", "cfg.temperature, cfg.seed, 0, numbers)",
    "gaps.py::test_no_draw_is_used_twice[04_rlvr]")

put("evaluation-without-the-primer", "what is judged lacks the <think> that it was primed with",
    "04_rlvr.py", "said = [\"<think>\" + tokenizer.decode(c) for c in completions]",
    "said = [tokenizer.decode(c) for c in completions]", "gaps.py::test_evaluation[04_rlvr]")

# ---------------------------------------------------------------------------- verifier

put("last-number-anywhere", "the last number is the answer, wherever it stands", "model.py",
    "    found = parse(completion)\n",
    "    found = parse(completion) or (\"\", (re.findall(r\"\\d+\", completion) or [\"-\"])[-1])\n",
    "kernel.py::test_verify")

put("part-of-the-completion", "an answer counts although other text stands around it", "model.py",
    "match = WHOLE.fullmatch(completion)", "match = WHOLE.search(completion)",
    "kernel.py::test_verify")

put("no-end-needed", "a completion that was cut, or never stops, is rewarded", "model.py",
    "</answer><\\|end\\|>\", re.DOTALL)", "</answer>(?:<\\|end\\|>)?\", re.DOTALL)",
    "kernel.py::test_verify", "stages.py::test_rollout_of_04")

put("sign-of-the-answer", "the minus is stripped with the spaces around a number", "model.py",
    "return match and (match[1] or \"\", match[2].strip())",
    "return match and (match[1] or \"\", match[2].strip(\" \\n-\"))", "kernel.py::test_verify")

put("words-by-their-beginning", "a word that begins like a number word counts as one: 5 tents",
    "answers.py", "CHANGES & {*re.split(\"['-]\", word)}",
    "any(word.startswith(w) for w in CHANGES)", "verify.py::test_whole_words_change_a_number")

put("first-word-alone", "only the word beside the number is looked at: 5 clips and a half is 5",
    "answers.py", "or not rate and CHANGES &", "or not names and CHANGES &",
    "verify.py::test_answers")

put("no-plurals", "5 ten is no number, 5 tens is", "answers.py",
    "*(re.sub(\"y$\", \"ie\", word) + \"s\" for word in COUNTS)", "*COUNTS",
    "verify.py::test_the_rule_reaches_every_member")

put("fractions-by-hand", "5 twelfths is 5: the ordinals lose a letter", "answers.py",
    "{\"ve\": \"f\", \"y\": \"ie\"}.get(end[1], \"\")", "end[1]",
    "verify.py::test_the_rule_reaches_every_member")

put("letters-as-units", "5 m beside a bare 5 is 5 meters, although it may be five million",
    "answers.py", "not letters and not (a[1] and b[1])", "not (a[1] and b[1])",
    "verify.py::test_answers")

put("units-unread", "5 miles is 5 km", "answers.py", "return a[0] == b[0] and (a[1] == b[1] or",
    "return a[0] == b[0] and (True or", "verify.py::test_answers")

put("units-required", "72 is not 72 clips, so bare answers are never right", "answers.py",
    "(a[1] == b[1] or not letters and not (a[1] and b[1]))", "a[1] == b[1]",
    "verify.py::test_right_before_is_right_now")

put("scale-after-a-currency", "$5k is 5", "answers.py",
    "if (before or after) and words[:1].isalpha():", "if False:", "verify.py::test_answers")

put("squared-dollars", "5 dollars squared is 5", "answers.py",
    "if power and not (known or \"\").endswith(", "if power and not known and not (\"\").endswith(",
    "verify.py::test_answers")

put("exponent-cut", "10^35 is read as 10^3", "answers.py",
    "[{(]?([+-]?\\d{1,3})(?!\\d)[)}]?\"", "[{(]?([+-]?\\d{1,1})\\d*[)}]?\"",
    "verify.py::test_answers")

put("another-variable", "y = 5 answers x = 5", "answers.py", "if x and y and x != y:", "if False:",
    "verify.py::test_answers")

put("case-of-symbols", "P-Q is p-q", "answers.py", "return text.casefold() if words else text",
    "return text.casefold()", "verify.py::test_answers")

put("first-alternative-alone", "of a list of right answers only the first counts", "answers.py",
    "any(right(said, one) for one in answer)", "any(right(said, one) for one in answer[:1])",
    "verify.py::test_answers")

put("votes-without-units", "5 miles and 5 km are one vote", "answers.py",
    "return found[:2] if found else wording(text)", "return found[0] if found else wording(text)",
    "verify.py::test_votes_keep_their_units")

put("prepared-without-units", "a prepared answer of 5.4 cents is 5.4", "answers.py",
    "return f\"{value}{words}\"", "return f\"{value}\"",
    "verify.py::test_prepared_answers_keep_their_units")

put("unwrapped-without-end", "a thousand nested boxes take a thousand rounds", "answers.py",
    "    while rounds and (found :=", "    while (found :=", "verify.py::test_time_is_linear")

# ---------------------------------------------------------------------------- sums and counts

put("mean-of-means", "the mean of micro-batch means: short completions weigh more", "01_sft.py",
    "return -(logprobs * completion_mask).sum(), completion_mask.sum(), {}",
    "return -(logprobs * completion_mask).sum() / completion_mask.sum(), 1, {}",
    "losses.py::test_sft_counts_completion_tokens_alone", "stages.py::test_micro_batches[01_sft]")

put("never-divided", "gradients of sums are clipped and applied as if they were means",
    "01_sft.py", "for p in weights], world / count)", "for p in weights], world)",
    "gaps.py::test_gradient_of_a_step[01_sft]")

put("target-not-shifted", "each token predicts itself: a loss that falls and teaches nothing",
    "00_pretrain.py", "return pretrain_loss(ddp(ids[:, :-1], ids[:, 1:]))",
    "return pretrain_loss(ddp(ids[:, :-1], ids[:, :-1]))",
    "gaps.py::test_gradient_of_a_step[00_pretrain]")

put("same-windows-every-step", "the data begin again in every step", "00_pretrain.py",
    "np.random.default_rng([cfg.seed, step])", "np.random.default_rng([cfg.seed])",
    "gaps.py::test_windows")

put("same-order-every-epoch", "every epoch sees the rows in the same order", "model.py",
    "np.random.default_rng([seed, epoch])", "np.random.default_rng([seed])",
    "kernel.py::test_sample_rows")

put("gradients-not-cleared", "gradients add up from step to step", "01_sft.py",
    "opt.zero_grad(set_to_none=True)", "pass", "resume.py::test_stopped_at_any_step[01_sft]")

put("learning-rate-compounds", "the schedule scales the last rate instead of the peak",
    "01_sft.py", "g[\"lr\"] = g[\"peak\"] * schedule(cfg, step)",
    "g[\"lr\"] *= schedule(cfg, step)",
    "gaps.py::test_learning_rate[01_sft]")

# ---------------------------------------------------------------------------- 03 and 06

put("dpo-sign", "rejected is preferred", "03_dpo.py", "margins = chosen - rejected",
    "margins = rejected - chosen", "losses.py::test_dpo_at_the_reference",
    "losses.py::test_dpo_value")

put("dpo-mean-over-tokens", "means over tokens where the derivation has sums: another beta",
    "03_dpo.py", "rewards = beta * (sums - (ref_logprobs * completion_mask).sum(1))",
    "rewards = beta * (sums - (ref_logprobs * completion_mask).sum(1)) / completion_mask.sum(1)",
    "losses.py::test_dpo_at_the_reference", "losses.py::test_dpo_value")

put("dpo-reference-moves", "the reference is the model itself: nothing to compare with",
    "03_dpo.py", "ref = wrap(load(cfg.init, device)[0].requires_grad_(False))", "ref = model",
    "stages.py::test_training_lowers_the_loss[03_dpo]")

put("dpo-pairs-interleaved", "chosen and rejected alternate, but are taken apart as two halves",
    "03_dpo.py", "for side in (0, 1) for row in rows", "for row in rows for side in (0, 1)",
    "gaps.py::test_gradient_of_a_step[03_dpo]")

put("dpo-ties-are-right", "at step 0 the accuracy is 1 although nothing is learned", "03_dpo.py",
    "\"accuracy\": (margins > 0).sum()", "\"accuracy\": (margins >= 0).sum()",
    "losses.py::test_dpo_at_the_reference")

put("score-at-the-last-place", "the score is read at the batch's last place, which may be padding",
    "06_reward.py", "last = T - 1 - completion_mask.flip(1).argmax(1)",
    "last = torch.full_like(ids[:, 0], T - 1)",
    "losses.py::test_score_is_of_the_last_real_token")

put("score-before-the-end", "the score is read one token early: <|end|> is not judged",
    "06_reward.py", "last = T - 1 - completion_mask.flip(1).argmax(1)",
    "last = T - 2 - completion_mask.flip(1).argmax(1)",
    "losses.py::test_score_is_of_the_last_real_token")

put("score-where-padding-begins", "the last token is found by the pad id, which equals the end",
    "06_reward.py", "last = T - 1 - completion_mask.flip(1).argmax(1)",
    "last = (ids != 9).sum(1) - 1", "losses.py::test_score_is_of_the_last_real_token")

put("reward-sign", "the reward model learns what people reject", "06_reward.py",
    "margins = chosen - rejected", "margins = rejected - chosen", "losses.py::test_reward_loss")

# ---------------------------------------------------------------------------- 04

put("std-of-the-wrong-axis", "the std is that of the batch, not of the group", "04_rlvr.py",
    "centered / rewards.std(1, keepdim=True)", "centered / rewards.std(0, keepdim=True)",
    "losses.py::test_group_advantages")

put("std-of-the-population", "the std is biased: for small groups another learning rate",
    "04_rlvr.py", "rewards.std(1, keepdim=True)", "rewards.std(1, keepdim=True, unbiased=False)",
    "losses.py::test_group_advantages")

put("equal-rewards-by-eps", "a group of equal rewards: rounding noise divided by a tiny eps",
    "04_rlvr.py",
    "return torch.where(same, 0.0, centered / rewards.std(1, keepdim=True).where(~same, 1.0))",
    "return centered / (rewards.std(1, keepdim=True) + 1e-12)",
    "gaps.py::test_equal_rewards[04_rlvr]")

put("baseline-of-the-batch", "the baseline is the batch's mean, not the group's", "04_rlvr.py",
    "centered = rewards - rewards.mean(1, keepdim=True)", "centered = rewards - rewards.mean()",
    "losses.py::test_group_advantages")

put("clip-by-sign", "the max for A < 0: the gradient flows where it should stop, and stops where "
    "it should flow", "04_rlvr.py",
    "surrogate = torch.min(ratio * A, ratio.clamp(1 - clip_eps, 1 + clip_eps) * A)",
    "surrogate = ratio * A, ratio.clamp(1 - clip_eps, 1 + clip_eps) * A\n"
    "    surrogate = torch.where(A >= 0, torch.min(*surrogate), torch.max(*surrogate))",
    "losses.py::test_grpo_quadrants")

put("clip-by-max", "the max instead of the min: leaving the clip range is rewarded", "04_rlvr.py",
    "surrogate = torch.min(ratio * A", "surrogate = torch.max(ratio * A",
    "losses.py::test_grpo_quadrants")

put("clip-fraction-both-ways", "the clip fraction also counts where the gradient flows",
    "04_rlvr.py", "clipped = ((ratio - 1) * A.sign() > clip_eps)",
    "clipped = ((ratio - 1).abs() > clip_eps)", "losses.py::test_grpo_quadrants")

put("ratio-always-one", "the old log-probs are the new ones, detached: no ratio, no clip",
    "04_rlvr.py", "ratio = (logprobs - old_logprobs).exp()",
    "ratio = (logprobs - logprobs.detach()).exp()", "losses.py::test_grpo_quadrants")

put("ratio-detached", "the ratio has no gradient", "04_rlvr.py",
    "ratio = (logprobs - old_logprobs).exp()", "ratio = (logprobs - old_logprobs).exp().detach() "
    "+ 0 * logprobs", "losses.py::test_grpo_quadrants")

put("k3-sign", "k3 with p and ref exchanged", "04_rlvr.py", "d = ref_logprobs - logprobs",
    "d = logprobs - ref_logprobs", "losses.py::test_k3")

put("k1-in-the-loss", "k1 in the loss: its gradient is pure noise", "04_rlvr.py",
    "kl = torch.expm1(d) - d", "kl = -d", "losses.py::test_k3")

put("k3-cancels", "exp(d) - 1 - d in fp32: near 0 all its digits are lost", "04_rlvr.py",
    "kl = torch.expm1(d) - d", "kl = d.exp() - 1 - d", "losses.py::test_k3")

put("kl-rewarded", "the KL has the wrong sign in the loss", "04_rlvr.py",
    "mean(beta * kl - surrogate)", "mean(-beta * kl - surrogate)", "losses.py::test_k3")

put("mean-over-padding", "a completion's mean divides by the padded length", "04_rlvr.py",
    "A, length = advantages[:, None], completion_mask.sum(1)",
    "A, length = advantages[:, None], completion_mask.sum(1) * 0 + completion_mask.shape[1]",
    "losses.py::test_grpo_gradient_at_ratio_one")

put("token-mean-in-grpo", "long completions weigh more: the mean over all tokens, called GRPO",
    "04_rlvr.py", "return ((x * completion_mask).sum(1) / length).sum()",
    "return (x * completion_mask).sum() / length.sum() * len(length)",
    "losses.py::test_grpo_gradient_at_ratio_one")

put("grpo-reference-moves", "the reference follows the policy: no anchor", "04_rlvr.py",
    "ref = wrap(ref)", "ref = model", "gaps.py::test_reference_stays[04_rlvr]")

# ---------------------------------------------------------------------------- 05

put("gae-past-the-end", "GAE bootstraps from what stands behind <|end|>", "05_ppo.py",
    "rewards, values = rewards * completion_mask, values * completion_mask",
    "rewards = rewards * completion_mask", "losses.py::test_gae_against_a_loop")

put("gae-without-gamma", "the trace decays with lambda alone", "05_ppo.py",
    "delta + gamma * lam * later", "delta + lam * later", "losses.py::test_gae_against_a_loop")

put("gae-sign-of-the-value", "delta adds the value that it should subtract", "05_ppo.py",
    "gamma * following - values[:, t]", "gamma * following + values[:, t]",
    "losses.py::test_gae_against_a_loop", "losses.py::test_gae_is_reward_to_go")

put("whiten-each-micro-batch", "each micro-batch is its own yardstick", "05_ppo.py",
    "(b[-3] - mean) / std,",
    "(b[-3] - b[-3][b[-1] == 1].mean()) / b[-3][b[-1] == 1].std(unbiased=False),",
    "losses.py::test_whiten")

put("whiten-padding", "padding counts in the mean and the std of the advantages", "05_ppo.py",
    "total.update(n=int(mask.sum()), sum=", "total.update(n=mask.numel(), sum=",
    "losses.py::test_whiten")

put("value-clip-by-min", "the min of the two value losses: leaving the range is forgiven",
    "05_ppo.py", "torch.max((values - returns) ** 2", "torch.min((values - returns) ** 2",
    "losses.py::test_ppo_value_loss")

put("ppo-clip-by-max", "the max instead of the min in PPO", "05_ppo.py",
    "surrogate = torch.min(ratio * advantages", "surrogate = torch.max(ratio * advantages",
    "losses.py::test_ppo_quadrants")

put("score-behind-the-end", "the score lands on padding, where no token is learned", "05_ppo.py",
    "last = mask.shape[1] - 1 - mask.flip(1).argmax(1)",
    "last = torch.full_like(mask[:, 0], mask.shape[1] - 1)", "stages.py::test_ppo_rewards")

put("kl-reward-sign", "leaving the reference is rewarded", "05_ppo.py",
    "rewards = -cfg.beta * kl +", "rewards = cfg.beta * kl +", "gaps.py::test_kl_in_the_reward")

put("endless-completions-pay", "a completion without <|end|> keeps its score", "05_ppo.py",
    "rewards = torch.where(cut, worst, rewards)", "rewards = torch.where(cut, rewards, rewards)",
    "stages.py::test_rollout_of_05")

put("cut-completions-at-minus-one", "the reward of a cut completion lies above a weak start's",
    "05_ppo.py", "worst = -all_max(-min([-1.0, *rewards[~cut].tolist()]))", "worst = -1.0",
    "stages.py::test_rollout_of_05")

put("ppo-reference-moves", "the reference is the policy: the KL is 0 for ever", "05_ppo.py",
    "ref = wrap(ref)", "ref = model", "gaps.py::test_kl_in_the_reward")

put("score-not-centred", "the judge's raw score: its mean and its scale are arbitrary", "05_ppo.py",
    "return (at_least_fp32(scores) - parts[\"val_mean\"]) / parts[\"val_std\"]",
    "return at_least_fp32(scores)", "gaps.py::test_score_has_a_scale")

put("values-start-anywhere", "a value head that starts with noise", "05_ppo.py",
    "nn.init.zeros_(self.value.weight)", "nn.init.normal_(self.value.weight)",
    "gaps.py::test_first_values")

put("judge-reads-the-last-place", "the reward model judges padding, in PPO's own copy of it",
    "05_ppo.py", "last = T - 1 - completion_mask.flip(1).argmax(1)",
    "last = torch.full_like(ids[:, 0], T - 1)", "gaps.py::test_judge")

# ---------------------------------------------------------------------------- RL

put("reinforce-mean-over-tokens", "a completion's log-prob as a mean: long ones matter less",
    "RL/reinforce.py", "return ((beta * kl - A * logprobs) * completion_mask).sum(), len(length)",
    "return mean(beta * kl - A * logprobs), len(length)", "siblings.py::test_reinforce_gradient")

put("rloo-baseline-with-itself", "the baseline contains the completion that it judges",
    "RL/rloo.py",
    "others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)",
    "others = rewards.mean(1, keepdim=True)", "siblings.py::test_rloo_advantages")

put("rloo-kl-sign", "leaving the start is rewarded", "RL/rloo.py",
    "rewards.to(device) - cfg.beta * kl", "rewards.to(device) + cfg.beta * kl",
    "siblings.py::test_rloo_rewards")

put("rloo-ratio-of-tokens", "a ratio for each token where the completion is one action",
    "RL/rloo.py",
    "ratio = (log_ratio - (log_ratio - 20).clamp(min=0).detach()).exp()",
    "ratio = (((logprobs - old_logprobs).exp() * completion_mask).sum(1)\n"
    "             / completion_mask.sum(1))", "siblings.py::test_rloo_quadrants")

put("rloo-ratio-overflows", "a whole completion's ratio is inf, and inf * 0 is NaN", "RL/rloo.py",
    "ratio = (log_ratio - (log_ratio - 20).clamp(min=0).detach()).exp()",
    "ratio = log_ratio.exp()", "siblings.py::test_rloo_of_far_completions")

put("rloo-gradient-cut-off", "where the ratio is capped nothing pushes a bad completion down",
    "RL/rloo.py", "ratio = (log_ratio - (log_ratio - 20).clamp(min=0).detach()).exp()",
    "ratio = log_ratio.clamp(max=20).exp()", "siblings.py::test_rloo_of_far_completions")

put("padding-learns-from-lengths", "DAPO at the cap: groups without signal learn to be short",
    "RL/dapo.py", ".masked_fill(same, 0.0)", "", "siblings.py::test_dapo_at_the_cap")

put("gap-at-temperature-one", "the sampler's log-probs against others at temperature 1",
    "04_rlvr.py", "return module(ids, targets, cfg.temperature)", "return module(ids, targets)",
    "gap.py::test_gap[04_rlvr]")

put("gap-shifted", "each token's gap is the next one's", "04_rlvr.py",
    "sampled[:, 1:], score(model", "sampled[:, :-1], score(model", "gap.py::test_gap[04_rlvr]")

put("gap-over-padding", "the mean gap a token counts prompts and padding", "model.py",
    "(old - sampled).abs()[targets >= 0]", "(old - sampled).abs().flatten()",
    "gap.py::test_gap[04_rlvr]")

put("narrow-head-in-rl", "the sampler's bf16 logits differ from the trainer's", "04_rlvr.py",
    "model.fp32_head = ref.fp32_head = True", "pass", "gap.py::test_head[04_rlvr]")

put("micro-tokens-without-padding", "the bound is of real tokens, padding comes on top",
    "model.py", "(held[j] - held[i]) * width for i in starts",
    "sum(map(longest, rows[i:j])) for i in starts", "scale.py::test_pieces_by_length[64-90-1]")

put("micro-tokens-of-one-side", "a pair's second completion is not counted", "model.py",
    "held.append(held[-1] + len(parts(row)))", "held.append(held[-1] + 1)",
    "scale.py::test_pieces_by_length[64-90-2]")

put("more-forwards-on-one-rank", "ranks cut by their own lengths: FSDP2 waits for ever", "model.py",
    'int(all_max(len(pieces))) if SWITCHES["fsdp"] else len(pieces)', "len(pieces)",
    "scale.py::test_pieces_by_length_of_ranks[2]")

put("rloo-kl-of-another-row", "micro-batches are sorted by length, the KL is used in the old order",
    "RL/rloo.py", "kl[numbers.argsort()]", "kl",
    "siblings.py::test_rloo_rewards")

put("dr-grpo-keeps-the-std", "half of Dr. GRPO: the length is gone, the std is not",
    "RL/dr_grpo.py", "return rewards - rewards.mean(1, keepdim=True)",
    "return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)",
    "siblings.py::test_advantages_without_std")

put("dr-grpo-keeps-the-length", "the other half: the std is gone, the mean of each row is not",
    "RL/dr_grpo.py", "return ((beta * kl - surrogate) * completion_mask).sum() / max_new",
    "return mean(beta * kl - surrogate)", "siblings.py::test_dr_grpo_has_a_constant_denominator")

put("dapo-discarded-are-free", "groups that are sampled and discarded do not count as sampled",
    "RL/dapo.py", "        total.update(sums)\n", "        total = Counter(sums)\n",
    "siblings.py::test_dapo_fills_the_batch")

put("dapo-same-draw-again", "each round asks the same prompts with the same uniforms again",
    "RL/dapo.py", "draw = rounds * cfg.steps + step", "draw = step",
    "siblings.py::test_dapo_fills_the_batch", "gaps.py::test_no_draw_is_used_twice[RL/dapo]")

put("dapo-keeps-all-groups", "dynamic sampling that discards nothing", "RL/dapo.py",
    "(kept if len(set(group[1])) > 1 else discarded).append(group)", "kept.append(group)",
    "siblings.py::test_dapo_fills_the_batch")

put("dapo-clip-not-higher", "clip-higher with the lower bound on both sides", "RL/dapo.py",
    "ratio.clamp(1 - clip_eps, 1 + clip_eps_high) * A",
    "ratio.clamp(1 - clip_eps, 1 + clip_eps) * A",
    "siblings.py::test_dapo_quadrants")

put("dapo-mean-of-means", "completions weigh the same in what is called a token mean",
    "RL/dapo.py", "return -total(surrogate), length.sum()",
    "return -((surrogate * completion_mask).sum(1) / length).sum(), len(length)",
    "siblings.py::test_dapo_token_mean")

put("dapo-long-is-paid", "the price on the last tokens is a prize", "RL/dapo.py",
    "return ((max_new - overlong - lengths) / max(overlong, 1)).clamp(-1, 0)",
    "return -((max_new - overlong - lengths) / max(overlong, 1)).clamp(-1, 0)",
    "siblings.py::test_overlong_penalty")

put("gspo-sum-of-logs", "the ratio of the whole completion where GSPO has its length's root",
    "RL/gspo.py", "ratio = (((logprobs - old_logprobs) * completion_mask).sum(1) / length).exp()",
    "ratio = ((logprobs - old_logprobs) * completion_mask).sum(1).exp()",
    "siblings.py::test_gspo_quadrants", "siblings.py::test_gspo_at_ratio_one")

put("cispo-weight-not-detached", "the importance weight has a gradient of its own",
    "RL/cispo.py", "ratio = (logprobs - old_logprobs).exp().detach()",
    "ratio = (logprobs - old_logprobs).exp()", "siblings.py::test_cispo_weight")

put("cispo-drops-clipped-tokens", "a clipped token teaches nothing, as in PPO", "RL/cispo.py",
    "surrogate = ratio.clamp(max=1 + clip_eps_high) * advantages[:, None] * logprobs",
    "surrogate = ratio * (ratio <= 1 + clip_eps_high) * advantages[:, None] * logprobs",
    "siblings.py::test_cispo_weight")

put("ppo-verdict-on-the-first", "the verdict is given to the first token", "RL/ppo.py",
    "last = mask.shape[1] - 1 - mask.flip(1).argmax(1)", "last = mask.argmax(1)",
    "siblings.py::test_ppo_rewards")

# ---------------------------------------------------------------------------- DPO

put("ipo-target-sign", "rejected is to win by the margin", "DPO/ipo.py",
    "((margins - 1 / (2 * beta)) ** 2).sum()", "((margins + 1 / (2 * beta)) ** 2).sum()",
    "dpo_siblings.py::test_ipo", "dpo_siblings.py::test_signs")

put("ipo-target-doubled", "the target is 1 / beta instead of 1 / (2 beta)", "DPO/ipo.py",
    "((margins - 1 / (2 * beta)) ** 2).sum()", "((margins - 1 / beta) ** 2).sum()",
    "dpo_siblings.py::test_ipo")

put("ipo-mean-over-tokens", "means over tokens: the target margin means something else",
    "DPO/ipo.py", "rewards = sums - (ref_logprobs * completion_mask).sum(1)",
    "rewards = (sums - (ref_logprobs * completion_mask).sum(1)) / completion_mask.sum(1)",
    "dpo_siblings.py::test_ipo")

put("simpo-not-normalised", "sums over tokens without a reference to cancel the length",
    "DPO/simpo.py", "rewards = beta * sums / completion_mask.sum(1)", "rewards = beta * sums",
    "dpo_siblings.py::test_simpo_is_blind_to_length")

put("simpo-gamma-sign", "chosen may lose by the margin", "DPO/simpo.py",
    "F.logsigmoid(margins - gamma)", "F.logsigmoid(margins + gamma)",
    "dpo_siblings.py::test_simpo_of_equal_means", "dpo_siblings.py::test_simpo_value")

put("orpo-odds-cancel", "log(1 - p) as it is written: near p = 1 all its digits are lost",
    "DPO/orpo.py", "(-torch.expm1(near)).log()", "(1 - near.exp()).log()",
    "gaps.py::test_orpo_in_fp32")

put("orpo-imitates-rejected", "the likelihood term is rejected's", "DPO/orpo.py",
    "nll = -means.chunk(2)[0]", "nll = -means.chunk(2)[1]",
    "dpo_siblings.py::test_orpo_imitates_chosen_alone")

put("kto-matched-pairs", "the KL of the very completions that are pushed", "DPO/kto.py",
    "(split[a][0], split[b][1]) for a, b in", "(split[a][0], split[a][1]) for a, b in",
    "dpo_siblings.py::test_mismatch", "dpo_siblings.py::test_baseline_is_of_mismatched_pairs")

put("kto-shifted-values", "the batch's own gains in another order: their mean is the same",
    "DPO/kto.py", "mixed = [(split[a][0], split[b][1])", "mixed = [(split[b][0], split[b][1])",
    "dpo_siblings.py::test_baseline_is_of_mismatched_pairs")

put("kto-own-prompt", "a pair's two rows are neighbours: its prompt gets its own completion",
    "DPO/kto.py", "other[a] = b if split[a][0] != split[b][0] else other[b]", "other[a] = b",
    "dpo_siblings.py::test_mismatch", "dpo_siblings.py::test_one_prompt_has_no_mismatch")

put("kto-other-rows", "the kl of other rows than the step's", "DPO/kto.py",
    "[mixed[i] for i in at]", "mixed[: len(at)]", "dpo_siblings.py::test_kto_baseline_in_a_run")

put("kto-all-good", "a label that is false is read as true", "DPO/kto.py",
    "label_of(row))]", "1)]", "dpo_siblings.py::test_a_pair_is_two_rows")

put("label-of-any-word", "a label that is neither true nor false counts as true", "model.py",
    "if not said or said - {\"true\", \"1\", \"1.0\"} and not bad", "if False and not bad",
    "dpo_siblings.py::test_rows_that_are_refused")

put("score-in-bf16", "the one-row head under autocast: near scores are ties", "06_reward.py",
    "return (at_least_fp32(hidden) * self.head.weight).sum(-1) + self.head.bias",
    "return at_least_fp32(self.head(hidden))[:, 0]", "precision.py::test_score_of_the_reward_model",
    "precision.py::test_no_ties")

put("judge-in-bf16", "05 rounds the scores of 06's judge to bf16", "05_ppo.py",
    "return (at_least_fp32(hidden) * self.head.weight).sum(-1) + self.head.bias",
    "return at_least_fp32(self.head(hidden))[:, 0]",
    "precision.py::test_score_of_the_reward_model[05_ppo]")

put("values-in-bf16", "the values are rounded to bf16 before GAE subtracts them", "05_ppo.py",
    "(at_least_fp32(hidden) * self.value.weight).sum(-1) + self.value.bias",
    "at_least_fp32(self.value(hidden))[..., 0]", "precision.py::test_values[05_ppo]")

put("worst-of-one-rank", "a cut completion's reward depends on which rank sampled it", "05_ppo.py",
    "worst = -all_max(-min([-1.0, *rewards[~cut].tolist()]))",
    "worst = min([-1.0, *rewards[~cut].tolist()])", "judge.py::test_reward_of_a_cut_completion")

put("worst-of-the-cut", "a cut completion's own score decides what it costs", "05_ppo.py",
    "*rewards[~cut].tolist()", "*rewards.tolist()", "judge.py::test_reward_of_a_cut_completion")

put("judge-too-short", "a judge that cannot read the longest completion is found out in some step",
    "05_ppo.py", "cfg.block_size < longest:", "cfg.block_size < longest - 1:",
    "judge.py::test_context_of_the_judge")

put("scale-of-one-pair", "the std of the scores of one pair is the unit of 05's rewards",
    "06_reward.py", "if len(val) < 8:", "if len(val) < 1:", "judge.py::test_scale_of_few_pairs")

put("no-decay-in-rl", "--weight_decay is not looked at", "04_rlvr.py",
    "weight_decay=cfg.weight_decay", "weight_decay=0.0", "precision.py::test_weight_decay[04_rlvr]")

put("largest-gap-of-one-rank", "the largest gap is that of rank 0", "model.py",
    "all_max(float(gaps.max()))", "float(gaps.max())", "gap.py::test_gap_over_ranks")

put("decay-not-passed", "--weight_decay is a flag that nobody reads", "01_sft.py",
    ", weight_decay=cfg.weight_decay)", ")", "precision.py::test_weight_decay[01_sft]")

put("vectors-decay", "norms and biases shrink as well", "model.py",
    "{\"params\": vectors, \"weight_decay\": 0.0}",
    "{\"params\": vectors, \"weight_decay\": weight_decay}",
    "precision.py::test_weight_decay[01_sft]")

put("muon-does-not-decay", "the blocks' matrices keep their size under Muon", "model.py",
    "lr=muon_lr, weight_decay=weight_decay,", "lr=muon_lr, weight_decay=0.0,",
    "precision.py::test_weight_decay[00_pretrain]")

put("sides-not-trimmed", "a preference keeps blanks that the model's own chat takes off",
    "model.py",
    "ids, _ = self.chat([*turns(prompt), {\"role\": \"assistant\", \"content\": completion}])",
    "ids = self.prompt(prompt) + self.encode_completion(completion) + [self.end]",
    "losses.py::test_sides_are_what_the_chat_says[03_dpo-True]")

put("kto-kl-of-one-rank", "each rank has its own KL, clamped before the sum", "DPO/kto.py",
    "return max(0.0, all_sum(gap=gap)[\"gap\"] / len(mixed))",
    "return all_sum(gap=max(0.0, gap))[\"gap\"] / len(mixed)",
    "gaps.py::test_kto_baseline_of_two_ranks")

put("kto-kl-negative", "a KL below 0 is used as it is", "DPO/kto.py",
    "return max(0.0, all_sum(gap=gap)[\"gap\"] / len(mixed))",
    "return all_sum(gap=gap)[\"gap\"] / len(mixed)",
    "dpo_siblings.py::test_baseline_is_of_mismatched_pairs")

put("kto-undesirable-sign", "undesirable rows are made likelier", "DPO/kto.py",
    "above = (2 * desirable - 1) * (rewards - kl)", "above = rewards - kl",
    "dpo_siblings.py::test_signs", "dpo_siblings.py::test_kto_value")

put("kto-weights-exchanged", "the weight of desirable rows on the undesirable", "DPO/kto.py",
    "lam_d * desirable + lam_u * (1 - desirable)", "lam_u * desirable + lam_d * (1 - desirable)",
    "dpo_siblings.py::test_kto_value")

# ---------------------------------------------------------------------------- checkpoints, resume

put("architecture-by-default", "a switch that the checkpoint does not name gets its default",
    "model.py", "sorted({*parts[\"gpt\"], *known}, key=str)", "sorted(parts[\"gpt\"], key=str)",
    "kernel.py::test_strict")

put("pickle-runs-code", "a foreign checkpoint may run code", "model.py",
    "torch.load(path, map_location=\"cpu\", weights_only=True)",
    "torch.load(path, map_location=\"cpu\", weights_only=False)",
    "kernel.py::test_a_pickle_with_code_is_refused")

put("save-in-place", "a save that stops half way destroys the old checkpoint", "model.py",
    "path, new, parts = str(path), f\"{path}.new\", gather_full(parts)",
    "path, new, parts = str(path), str(path), gather_full(parts)",
    "kernel.py::test_save_is_atomic")

put("resume-under-other-flags", "an unfinished run is continued under another configuration",
    "model.py", "names, step = differing(parts[\"record\"], record_of(cfg)), parts",
    "names, step = [], parts",
    "kernel.py::test_restore_is_strict")

put("optimizer-not-restored", "a resume begins with fresh moments", "model.py",
    "opt.load_state_dict({\"state\": state,", "str({\"state\": state,",
    "resume.py::test_stopped_at_any_step[01_sft]")

put("data-order-not-restored", "a resumed run sees the first batches again", "01_sft.py",
    "sample_rows(len(train), cfg.batch_size, cfg.seed, step)",
    "sample_rows(len(train), cfg.batch_size, cfg.seed, step - first)",
    "resume.py::test_stopped_at_any_step[01_sft]")

put("log-not-cut-back", "after a resume the log has some steps twice", "frame.py",
    "if 0 < row[\"step\"] <= first else []", "if 0 < row[\"step\"] else []",
    "gaps.py::test_log_is_cut_back")

# ---------------------------------------------------------------------------- evaluation

put("pass-at-k-biased", "pass@k from the mean of the samples, as if they were drawn again",
    "figures.py", "return 1 - math.comb(n - right, k) / math.comb(n, k)",
    "return 1 - (1 - right / n) ** k", "eval_chat.py::test_pass_at_k_counts_subsets")

put("judged-by-name", "a checkpoint is judged by its file's name instead of its record", "eval.py",
    "name, kind = Path(path).stem, kind_of(parts)", "name = kind = Path(path).stem",
    "eval_chat.py::test_siblings_of_dpo_are_scored_by_their_own_reward[03_dpo-original]")

put("votes-by-the-letter", "maj@k counts 7 and 7.0 as two answers", "figures.py",
    "said.setdefault(vote_key(found[1]), [])", "said.setdefault(found[1], [])",
    "eval_chat.py::test_majority_and_careful")

put("interval-of-no-width", "where all units are equal the figure is taken for certain",
    "figures.py", "if spread <= 1e-9", "if spread < 0 * 1e-9",
    "eval_chat.py::test_no_interval_has_no_width")

put("cut-answer-used-again", "an answer cut at --max_new is taken for one with the primer",
    "eval.py", "if ids[: len(opener)] == opener and ids[-1] == end}",
    "if ids[: len(opener)] == opener}",
    "eval_chat.py::test_no_answer_is_computed_twice")

put("second-turn-as-the-first", "a second turn is judged by the answer of the first", "eval.py",
    "before = [stage.right[\"free\"][row[\"id\"]] for row in rows]", "before = right",
    "eval_chat.py::test_second_turns")

put("scores-rounded-by-autocast", "eval.py multiplies a reward model's head in bf16", "eval.py",
    "return ((hidden * stage.head.weight).sum(-1) + stage.head.bias).tolist()",
    "return stage.head(hidden)[:, 0].tolist()", "eval_chat.py::test_scores_are_not_rounded_to_bf16")

put("untrimmed-pairs", "eval.py scores blanks that the template takes off", "eval.py",
    "sides = [tok.answered(row[\"prompt\"], row[key]) for key in (\"chosen\", \"rejected\")]",
    "p = tok.prompt(row[\"prompt\"]); sides = [(p + c, [0] * len(p) + [1] * len(c)) for c in ("
    "tok.encode_completion(row[key]) + [tok.end] for key in (\"chosen\", \"rejected\"))]",
    "eval_chat.py::test_pairs_are_trimmed_as_the_template_does")

put("range-as-in-training", "questions beyond the range start where training does", "data/toy.py",
    "start, ops = draw(rng, n, \"test\", starts)", "start, ops = draw(rng, n, \"test\")",
    "toy.py::test_questions_beyond_training")

put("dialogue-of-one-problem", "two turns spell out a longer problem, which may be held out",
    "data/toy.py", "while turns == 2 and goes_on(*items):", "while False:",
    "toy.py::test_training_spells_out_no_held_out_problem")

put("one-item-said-twice", "a dialogue's second turn repeats its first", "data/toy.py",
    "rows.append(items[0] if turns == 1 else dialogue(items))",
    "rows.append(items[0] if turns == 1 else dialogue([items[0]] * 2))",
    "toy.py::test_dialogues")

put("half-of-an-interval", "what is printed of Wilson's interval is half of its width", "report.py",
    "if abs(high + low - 2 * mean) > 1e-6 * (high - low):", "if False:",
    "eval_chat.py::test_what_is_printed_of_an_interval")

put("history-from-text", "what the model repeats is encoded again, tags and all", "chat.py",
    "self.ids = ids + content(tok, said) + [tok.end]",
    "self.ids = ids + tok.encode_completion(tok.decode(content(tok, said))) + [tok.end]",
    "eval_chat.py::test_what_the_model_repeats_becomes_no_control_token")

put("cue-twice", "a question that ends with its cue gets another one", "tasks.py",
    "re.sub(r\"\\s*\\bAnswer:$\", \"\", context)", "context",
    "tasks.py::test_nothing_is_written_twice")

# ---------------------------------------------------------------------------- ranks

put("wrapper-bypassed", "the training forward calls the raw module: replicas drift apart",
    "04_rlvr.py", "grpo_loss(ddp(ids, targets", "grpo_loss(model(ids, targets",
    "ranks.py::test_weights[04_rlvr-2]")

put("no-sync-inverted", "gradients of the last micro-batch are not reduced", "03_dpo.py",
    "with nullcontext() if last or world == 1", "with nullcontext() if not last or world == 1",
    "ranks.py::test_weights[03_dpo-4]")

put("counts-of-one-rank", "each rank divides by its own count: a mean of means over ranks",
    "frame.py", "    dist.all_reduce(t)\n", "    t = t * dist.get_world_size()\n",
    "ranks.py::test_first_gradient[01_sft-2]")

put("divided-twice", "the sum over ranks is divided by their number as well", "02_cot.py",
    "for p in weights], world / count)", "for p in weights], 1 / count)",
    "ranks.py::test_first_gradient[02_cot-2]")

put("head-by-rank", "a head that each rank draws for itself, after the wrapper made them equal",
    "06_reward.py", "    ddp = wrap(scorer)\n",
    "    ddp = wrap(scorer)\n    torch.manual_seed(cfg.seed + rank)\n"
    "    nn.init.normal_(scorer.head.weight, std=0.1)\n", "ranks.py::test_weights[06_reward-2]")

# ---------------------------------------------------------------------------- speed and memory

put("fsdp-dropped", "--fsdp changes nothing: every rank holds everything", "model.py",
    "if dist.is_initialized() and SWITCHES[\"fsdp\"]:", "if dist.is_initialized() and False:",
    "ranks.py::test_fsdp[03_dpo-1-2]")

put("fsdp-resume-without-momenta", "a run that goes on under FSDP2 has lost its momenta",
    "model.py", "{k: shard_like(v, weights[i]) for",
    "{k: shard_like(v * (k == \"step\" or not hasattr(weights[i], \"full_tensor\")),\n"
    "                               weights[i]) for",
    "ranks.py::test_fsdp[01_sft-0-2]")

put("fsdp-in-rl", "--fsdp is taken in RL, where sampling would gather the weights for every token",
    "frame.py", "if SWITCHES[\"fsdp\"] and \"max_new\" in flags:", "if False:",
    "scale.py::test_fsdp_in_rl[04_rlvr]")

put("uneven-pieces", "ranks differ in their number of micro-batches: FSDP2 waits for ever",
    "model.py", "return min(-(-n // world) * world, ", "return min(n, ",
    "scale.py::test_pieces_of_ranks")

put("checkpointing-dropped", "--checkpointing changes nothing", "model.py",
    "gpt.checkpointing = bool(SWITCHES[\"checkpointing\"])", "gpt.checkpointing = False",
    "scale.py::test_checkpointing[00_pretrain]")

put("compiled-by-length", "every length of a batch is compiled anew", "model.py",
    "torch.compile(block.forward, dynamic=ragged or None)",
    "torch.compile(block.forward, dynamic=False)",
    "scale.py::test_compile")

put("compiled-names", "compiled blocks are saved under names that only compiled blocks load",
    "model.py", "block.forward = torch.compile(block.forward, dynamic=ragged or None)",
    "gpt.blocks[list(gpt.blocks).index(block)] = torch.compile(block, dynamic=True)",
    "scale.py::test_compile")

put("compiled-rollouts", "generation goes through the compiled blocks", "model.py",
    "x = Block.forward(block, x, rope, cache, i, at)", "x = block(x, rope, cache, i, at)",
    "scale.py::test_rollouts_are_not_compiled")

put("recipe-rows-uneven", "a recipe's rows do not come out even on some numbers of GPUs", "run.sh",
    "--batch_size 480", "--batch_size 500", "scale.py::test_dry_run[406m-406.4]")

put("control-ids-by-number", "control ids that a model brought are counted as text", "eval.py",
    "if i in tok.control else pieces", "if i >= tok.base else pieces",
    "eval_chat.py::test_bits_count_a_control_token_once")

put("invented-command", "a missing checkpoint names a command that is not there", "model.py",
    "if os.path.isfile(f\"{root}/{script}\") and not os.path.islink(f\"{root}/{script}\"):",
    "if True:",
    "errors.py::test_missing_checkpoint_of_no_script")

# ---------------------------------------------------------------------------- real rows and weights

put("q-and-k-swapped", "GPT-2's packed q, k, v are taken apart in another order", "convert.py",
    "zip(\"qkv\", theirs.pop(name).chunk(3))", "zip(\"kqv\", theirs.pop(name).chunk(3))",
    "convert.py::test_values_land_where_they_belong")

put("tags-from-nothing", "new tags start at zero instead of the mean: softmax hardly finds them",
    "convert.py", "model[name][list(new.values())] = mean",
    "model[name][list(new.values())] = 0.0", "convert.py::test_there_and_back")

put("user-writes-think", "an added tag that is not marked special can come from a user's text",
    "model.py", "text[:1] == \"<\" and text[-1:] == \">\" or text in fixed", "text in fixed",
    "convert.py::test_the_kernel_keeps_added_tokens_out_of_text")

put("user-writes-the-end", "an end token that looks like a word can come from a user's text",
    "model.py", "text[:1] == \"<\" and text[-1:] == \">\" or text in fixed",
    "text[:1] == \"<\" and text[-1:] == \">\"",
    "convert.py::test_the_kernel_keeps_added_tokens_out_of_text")

put("contents-not-stripped", "Llama 3's template trims contents, prompts here do not", "model.py",
    "m[\"content\"].strip() if self.spec.get(\"strip\") else m[\"content\"]", "m[\"content\"]",
    "convert.py::test_llama3_strips")

put("second-question", "a chat that is the model's own for one question alone takes a second one",
    "convert.py", "own |= {\"template\": template | {\"assistant user\": end}}", "pass",
    "convert.py::test_qwen3_is_for_one_question")

put("template-on-easy-contents", "a template is tried with contents that have no edges",
    "convert.py", "if ours != text:", "if ours != text and style == 0:",
    "convert.py::test_templates_that_depend_on_the_content")

put("keys-of-other-families", "a key that no family here reads is taken for one that does nothing",
    "convert.py", "for key in filter(PART.search, left):", "for key in []:",
    "convert.py::test_refused_configurations")

put("scaling-beside-parameters", "rope_scaling beside rope_parameters is not looked at",
    "convert.py", "[*top.items(), *old.items(), *new.items()]", "[*top.items(), *old.items()]",
    "convert.py::test_refused_configurations")

put("window-within-the-context", "Mistral's window is taken for the context", "convert.py",
    "type(window) is int and window >= context", "type(window) is int",
    "convert.py::test_refused_configurations")

put("head-dropped", "a head that differs from the tied embedding is dropped", "convert.py",
    "cfg.tied, theirs[\"lm_head.weight\"] = 0, head", "pass",
    "convert.py::test_a_head_beside_a_tied_embedding")

put("nan-is-taken", "NaN among the weights is converted", "convert.py",
    "if not finite(w.float()):", "if w.isinf().any():",
    "convert.py::test_numbers_that_are_not_taken")

put("rows-of-added-tokens", "tokens of added_tokens.json lose their trained rows", "convert.py",
    "more = [added(content, int(i)) for content, i in old.items()]", "more = []",
    "convert.py::test_added_tokens_keep_their_rows")

put("marks-between-pieces", "a tokenizer is tried with one piece at a time: SentencePiece passes",
    "convert.py", "tokenizer.decode(pieces[a] + pieces[b]) != a + b",
    "tokenizer.decode(pieces[a]) != a",
    "convert.py::test_only_what_gives_back_its_text")

put("export-over-others", "a folder with the five file names is replaced, whoever filled it",
    "convert.py", "(f.metadata() or {}).get(\"gpt_mini\") == stamp(folder)", "True",
    "convert.py::test_nothing_of_others_is_deleted")

put("gguf-rows-permuted", "q and k rows stay in GGUF's order: RoPE turns the wrong pairs",
    "data/smollm2.py", "rows.shape[-1]).swapaxes(1, 2)", "rows.shape[-1])",
    "convert.py::test_gguf_rows_are_put_back")

put("split-by-row", "val is drawn by row: the same prompt is in train and val", "data/rows.py",
    "        x = draw(key)\n", "        x = draw(f\"{key}{len(parts['train'])}\")\n",
    "data.py::test_equal_prompts_never_straddle")

put("test-rows-in-train", "training rows that ask what the test file asks stay", "data/rows.py",
    "        if key in asked:\n", "        if False:\n",
    "data.py::test_equal_prompts_never_straddle")

put("calculator-marks", "GSM8K's calculator marks stay in the traces", "data/gsm8k.py",
    "re.sub(r\"<<.*?>>\", \"\", untagged(body))", "untagged(body)", "gsm8k.py::test_rows")

put("two-prompts", "a pair whose two transcripts differ before the last answer is kept",
    "data/hh.py", "    if prompt != other:", "    if False:", "data.py::test_dropped_and_why")

put("documents-run-together", "no end token between documents", "data/text.py",
    "tokenizer.encode(raw.decode()) + [tokenizer.end]", "tokenizer.encode(raw.decode())",
    "data.py::test_text_folder_and_tokens")

put("always-solved-kept", "prompts solved 8 times of 8 stay: no advantage, all cost",
    "data/within_reach.py", "if 0 < tried[row[\"id\"]] < args.samples]",
    "if 0 < tried[row[\"id\"]]]",
    "data.py::test_within_reach")

put("old-test-rows-stay", "test rows of an earlier run stay beside the new training rows",
    "data/common.py", "gone = [name for name in was if name not in self.made and exists(name)]",
    "gone = []", "sets.py::test_old_parts_do_not_stay")

put("new-beside-old", "a killed preparer leaves some files of the new set beside old ones",
    "data/common.py", "for name in todo[\"remove\"] + [name for name, path in move.items() "
    "if os.path.isfile(path)]:", "for name in todo[\"remove\"]:",
    "sets.py::test_kill_at_any_moment")

put("stranger-overwritten", "a file that no preparer made is replaced", "data/common.py",
    "if name in own or not os.path.lexists(path) or self.equal(name):", "if True:",
    "sets.py::test_files_of_others_are_not_touched")

put("lossy-tokenizer", "text is encoded by a tokenizer that lower-cases it", "data/common.py",
    "    if text is not None:\n", "    if False:\n",
    "sets.py::test_only_tokenizers_that_return_their_text")

put("input-lost", "a pair's instruction is kept, the text that it is about is not", "data/rows.py",
    "said = task(row, \"input\") if key == \"instruction\" else row[key]", "said = row[key]",
    "rows.py::test_used")

put("false-label-kept", "a completion that is labelled as bad is a demonstration", "data/rows.py",
    "    if false_label(row):\n", "    if False:\n", "rows.py::test_dropped")

put("units-lost", "5.4 cents is prepared as 5.4, and 5.40 dollars is then right", "data/rows.py",
    "    said = canonical(text)\n",
    "    said = (canonical(text) or \"\").split(\" \")[0] or None\n",
    "data.py::test_latex")

put("weight-ignored", "a turn with weight 0 is learned", "data/rows.py",
    "if any(bool(v) != (role == \"assistant\") or v not in (0, 1) for v in learned.values()):",
    "if False:", "rows.py::test_dropped")

put("field-lost-by-a-stage", "a stage reads a row with a system text and drops it", "model.py",
    "    if lost:\n        raise ValueError(f\"no stage uses {lost!r}",
    "    if False:\n        raise ValueError(f\"no stage uses {lost!r}",
    "rows.py::test_stages_refuse")

put("dialogue-in-chosen-lost", "of a chosen dialogue the last turn is taken, whatever came before",
    "model.py", "    if before and before != checked(turns(prompt)):", "    if False:",
    "rows.py::test_stages_refuse")

put("user-turn-learned", "chosen ends with the user's turn, which is learned", "model.py",
    "    if last[\"role\"] != \"assistant\":", "    if False:", "rows.py::test_stages_refuse")

put("acc-norm-by-nothing", "acc_norm without the division by length", "tasks.py",
    "np.argmax(np.array(log_p) / list(map(len, options)))", "np.argmax(np.array(log_p))",
    "tasks.py::test_the_length_decides_acc_norm")

put("windows-overlap", "tokens at the seam of two windows are predicted twice", "tasks.py",
    "found.append((ids[max(0, end - block_size - 1) : end], len(new)))",
    "found.append((ids[max(0, end - block_size - 1) : end], min(end - 1, block_size)))",
    "tasks.py::test_text_predicts_every_token_once")

# ---------------------------------------------------------------------------- numbers passed on
# Invisible at a neutral value: temperature 1, mean 0, seed 0, one epoch, gamma 1, the first step.

put("reference-at-temperature-one", "the policy is scored at the temperature, the reference at 1",
    "04_rlvr.py", "score(ref, ids, targets),", "ref(ids, targets),",
    "numbers.py::test_no_distance_at_the_start[04_rlvr]",
    "numbers.py::test_reference_at_the_temperature[04_rlvr]")

put("reinforce-reference-at-one", "the same without a ratio", "RL/reinforce.py",
    "score(ref, ids, targets),", "ref(ids, targets),",
    "numbers.py::test_no_distance_at_the_start[RL/reinforce]",
    "numbers.py::test_reference_at_the_temperature[RL/reinforce]")

put("gspo-reference-at-one", "the same with one ratio for a completion", "RL/gspo.py",
    "score(ref, ids, targets),", "ref(ids, targets),",
    "numbers.py::test_no_distance_at_the_start[RL/gspo]",
    "numbers.py::test_reference_at_the_temperature[RL/gspo]")

put("dr-grpo-reference-at-one", "the same without lengths", "RL/dr_grpo.py",
    "score(ref, ids, targets),", "ref(ids, targets),",
    "numbers.py::test_no_distance_at_the_start[RL/dr_grpo]",
    "numbers.py::test_reference_at_the_temperature[RL/dr_grpo]")

put("ppo-reference-at-one", "the same with the KL in the reward", "05_ppo.py",
    "kl = old_logprobs - ref(ids, targets, cfg.temperature)",
    "kl = old_logprobs - ref(ids, targets)",
    "numbers.py::test_no_distance_at_the_start[05_ppo]")

put("rl-ppo-reference-at-one", "the same under the verifier", "RL/ppo.py",
    "kl = old_logprobs - ref(ids, targets, cfg.temperature)",
    "kl = old_logprobs - ref(ids, targets)",
    "numbers.py::test_no_distance_at_the_start[RL/ppo]")

put("rloo-reference-at-one", "the same with the KL of whole completions", "RL/rloo.py",
    "score(ref, ids, targets)", "ref(ids, targets)",
    "numbers.py::test_no_distance_at_the_start[RL/rloo]")

put("mean-with-the-wrong-sign", "06 saves minus the mean of its scores: 05 then doubles it",
    "06_reward.py", "\"val_mean\": mean,", "\"val_mean\": -mean,",
    "numbers.py::test_scale_of_the_scores", "numbers.py::test_scores_are_centred")

put("spread-around-zero", "the std of the scores around 0, not around their mean", "06_reward.py",
    "math.sqrt(max(square - mean ** 2, 1e-12))", "math.sqrt(max(square, 1e-12))",
    "numbers.py::test_scale_of_the_scores", "numbers.py::test_scores_are_centred")

put("mean-added", "05 adds the mean that it should subtract", "05_ppo.py",
    "(at_least_fp32(scores) - parts[\"val_mean\"])",
    "(at_least_fp32(scores) + parts[\"val_mean\"])",
    "numbers.py::test_scores_are_centred")

put("mean-of-one-side", "the mean over pairs counts both sides' scores", "06_reward.py",
    "\"score\": scores.detach().sum() / 2", "\"score\": scores.detach().sum()",
    "numbers.py::test_scale_of_the_scores")

put("clip-and-beta-exchanged", "two numbers of the loss in the wrong order", "RL/gspo.py",
    "*rest, cfg.clip_eps, cfg.beta)", "*rest, cfg.beta, cfg.clip_eps)",
    "numbers.py::test_numbers_of_the_loss[RL/gspo]")

put("bounds-exchanged", "clip-higher is the lower bound", "RL/dapo.py",
    "*rest, cfg.clip_eps, cfg.clip_eps_high)", "*rest, cfg.clip_eps_high, cfg.clip_eps)",
    "numbers.py::test_numbers_of_the_loss[RL/dapo]")

put("gamma-by-default", "SimPO's margin is a constant, whatever the flag says", "DPO/simpo.py",
    "mask, cfg.beta, cfg.gamma)", "mask, cfg.beta, Config.gamma)",
    "numbers.py::test_numbers_of_the_loss[DPO/simpo]")

put("lambdas-exchanged", "both are 1 by default, and nobody sees which is which", "DPO/kto.py",
    "                        cfg.lam_d, cfg.lam_u)\n\n",
    "                        cfg.lam_u, cfg.lam_d)\n\n",
    "numbers.py::test_numbers_of_the_loss[DPO/kto]")

put("value-loss-always", "the value loss has its default weight, whatever the flag says",
    "05_ppo.py", "*rest, cfg.clip_eps, cfg.vf_coef)", "*rest, cfg.clip_eps, Config.vf_coef)",
    "numbers.py::test_no_value_loss[05_ppo]", "numbers.py::test_numbers_of_the_loss[05_ppo]")

put("gamma-and-lambda-exchanged", "their product is the same: only values that are not 0 tell",
    "05_ppo.py", "gae(rewards, old_values, mask, cfg.gamma, cfg.lam)",
    "gae(rewards, old_values, mask, cfg.lam, cfg.gamma)", "numbers.py::test_discounts[05_ppo]")

put("gamma-not-passed", "later rewards are never discounted", "RL/ppo.py",
    "gae(rewards, old_values, mask, cfg.gamma, cfg.lam)",
    "gae(rewards, old_values, mask, 1.0, cfg.lam)", "numbers.py::test_discounts[RL/ppo]")

put("evaluation-at-the-temperature", "runs of different temperatures are judged differently",
    "RL/cispo.py", "seed=cfg.seed, step=10 ** 6", "temperature=cfg.temperature, seed=cfg.seed, "
    "step=10 ** 6", "numbers.py::test_numbers_of_the_sampler[RL/cispo]")

put("samples-of-seed-0", "every seed draws the same samples", "RL/rloo.py",
    "cfg.temperature, cfg.seed, step, numbers)", "cfg.temperature, 0, step, numbers)",
    "numbers.py::test_numbers_of_the_sampler[RL/rloo]")

put("evaluation-of-seed-0", "every seed is judged by the same samples", "05_ppo.py",
    "seed=cfg.seed, step=10 ** 6", "seed=0, step=10 ** 6",
    "numbers.py::test_numbers_of_the_sampler[05_ppo]")

put("rows-of-seed-0", "every seed sees the rows in the same order", "03_dpo.py",
    "sample_rows(len(train), cfg.batch_size, cfg.seed, step)",
    "sample_rows(len(train), cfg.batch_size, 0, step)", "numbers.py::test_seed_of_the_rows[03_dpo]")

put("windows-of-seed-0", "every seed reads the text at the same places", "00_pretrain.py",
    "np.random.default_rng([cfg.seed, step])", "np.random.default_rng([0, step])",
    "numbers.py::test_seed_of_windows_and_weights")

put("weights-of-seed-0", "every seed begins with the same weights", "frame.py",
    "torch.manual_seed(cfg.seed)", "torch.manual_seed(0)",
    "numbers.py::test_seed_of_windows_and_weights")

put("one-epoch", "--epochs is not looked at", "RL/dr_grpo.py",
    "for minibatch in minibatches * cfg.epochs:", "for minibatch in minibatches:",
    "numbers.py::test_epochs[RL/dr_grpo]")

put("metrics-of-one-epoch", "the log has the sum over epochs where it says mean", "RL/cispo.py",
    "v / (len(minibatches) * cfg.epochs)", "v / len(minibatches)",
    "numbers.py::test_epochs[RL/cispo]")

put("a-minibatch-at-a-time", "all epochs over one minibatch, then all over the next", "04_rlvr.py",
    "for minibatch in minibatches * cfg.epochs:",
    "for minibatch in [m for m in minibatches for _ in range(cfg.epochs)]:",
    "numbers.py::test_epochs[04_rlvr]")

put("no-ramp", "the full rate from the first step on", "01_sft.py",
    "return (step + 1) / cfg.warmup", "return 1.0", "gaps.py::test_learning_rate[01_sft]")

put("cosine-over-all-steps", "the cosine begins with the ramp", "02_cot.py",
    "(step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)", "step / cfg.steps",
    "gaps.py::test_learning_rate[02_cot]")

put("clipped-at-one", "the gradient's norm is bounded by 1, whatever the flag says", "DPO/ipo.py",
    "clip_grad_norm_(weights, cfg.grad_clip or math.inf)", "clip_grad_norm_(weights, 1.0)",
    "numbers.py::test_clipping[DPO/ipo]")

put("clip-0-is-a-bound", "--grad_clip 0 makes every gradient 0, and a healthy log", "06_reward.py",
    "clip_grad_norm_(weights, cfg.grad_clip or math.inf)",
    "clip_grad_norm_(weights, cfg.grad_clip)", "numbers.py::test_clipping[06_reward]")

put("kto-kl-of-the-start", "the baseline that the start has, 0, in every step", "DPO/kto.py",
    "policy(ids, targets), ref_logprobs, mask, desirable, kl,",
    "policy(ids, targets), ref_logprobs, mask, desirable, 0.0 * kl,",
    "numbers.py::test_kl_of_kto")

put("kto-kl-of-the-batch", "held-out rows are judged by the training batch's kl", "DPO/kto.py",
    "            kl = baseline(cfg, model, ref, val_mixed, rank, world, device)\n", "",
    "numbers.py::test_kl_of_kto")

put("price-not-charged", "the price of long completions is computed for nobody", "RL/dapo.py",
    "rewards = rewards + overlong_penalty(", "overlong_penalty(",
    "numbers.py::test_long_completions_are_punished")

put("entropy-sign", "the entropy is logged with the sign of the log-prob", "04_rlvr.py",
    "entropy=-sum(map(sum, logprobs))", "entropy=sum(map(sum, logprobs))",
    "numbers.py::test_metrics_of_rollouts[04_rlvr]")

put("groups-among-completions", "groups without signal are counted once, completions are the whole",
    "RL/dr_grpo.py", "no_signal=G * (rewards", "no_signal=(rewards",
    "numbers.py::test_metrics_of_rollouts[RL/dr_grpo]")

put("low-frequencies-from-1", "Llama's lower edge is 1, whatever the model says", "model.py",
    "turns_in_context - cfg.rope_low)", "turns_in_context - 1)",
    "kernel.py::test_llama_frequencies")

put("eps-by-default", "RMSNorm's eps is torch's, whatever the model says", "model.py",
    "return nn.RMSNorm(size, eps=cfg.norm_eps)", "return nn.RMSNorm(size)",
    "numbers.py::test_norm_eps[rms]")

put("eps-of-q-and-k", "the norms of q and k have an eps of their own", "model.py",
    "(nn.RMSNorm(d, eps=cfg.norm_eps) for _ in \"qk\")", "(nn.RMSNorm(d) for _ in \"qk\")",
    "numbers.py::test_norm_eps[layer]")

put("uniforms-rounded-too-late", "the sampler's uniforms are float64 on a device that has none",
    "model.py", "u = u.to(dtype).to(device)",
    "u = u.to(device).to(dtype)",
    "float32.py::test_generate")

put("wide-angles", "RoPE's cosines stay float64, and widen what they turn", "model.py",
    "torch.cat([cos, cos], 1).to(dtype)", "torch.cat([cos, cos], 1)", "float32.py::test_generate")

put("sums-in-double", "a metric is summed in float64 on the device", "05_ppo.py",
    "float((advantages ** 2 * mask).sum())", "float((advantages.double() ** 2 * mask).sum())",
    "float32.py::test_stages[05_ppo]")

# ---------------------------------------------------------------------------- bench

put("speed-ratio", "a ratio above 1 says that ours is slower", "bench/speed.py",
    "each = [y / x for", "each = [x / y for",
    "bench.py::test_medians_over_all_steps_and_ratios_by_round")

put("speed-evaluation-timed", "the last step's evaluation is in the median", "bench/speed.py",
    "zip(stamps, stamps[1:])][:-1]", "zip(stamps, stamps[1:])]",
    "bench.py::test_a_piece_of_ours_is_timed_from_line_to_line")

put("speed-ragged-ends", "one side's completions end early and it has less to do",
    "bench/pieces.py", "weight[end, 0], bias[0] = -10.0, 10.0",
    "weight[end, 0], bias[0] = 0.0, 0.0",
    "bench.py::test_completions_never_end_early")

put("speed-unequal-batches", "TRL gets a smaller micro-batch", "bench/pieces.py",
    'call("trl", kind="sft", batch=16, steps=n)', 'call("trl", kind="sft", batch=8, steps=n)',
    "bench.py::test_sides_have_the_same_shapes")

put("costs-backward", "the backward pass costs as much as the forward pass", "bench/costs.py",
    "return ((3 + others) * forward(", "return ((2 + others) * forward(",
    "bench.py::test_operations_are_those_of_torch")

put("costs-decode", "each row of a decode step reads all weights by itself", "bench/costs.py",
    "4 * (blocks(s) + head(s)) + 8 * rows", "4 * rows * (blocks(s) + head(s)) + 8 * rows",
    "bench.py::test_costs_by_hand")

# ---------------------------------------------------------------------------- ready for a GPU

put("rows-as-lists", "each token of a row is a Python number: 48 bytes instead of 5", "model.py",
    "return array(\"i\", ids), array(\"b\", mask), *rest", "return ids, mask, *rest",
    "gpu_ready.py::test_bytes_a_token[03_dpo]")

put("pad-cuts-fractions", "log-probs become whole numbers on their way to the trainer", "model.py",
    "for r in rows], device=device)\n\n\ndef shift",
    "for r in rows], device=device, dtype=torch.long)\n\n\ndef shift",
    "gap.py::test_gap[04_rlvr]", "gpu_ready.py::test_pad_keeps_what_is_no_whole_number")

put("pad-with-zero", "padding is 0 whatever was asked for: targets there count", "model.py",
    "list(r) + [fill] * (T - len(r))", "list(r) + [0] * (T - len(r))",
    "gpu_ready.py::test_pad")

put("mfu-of-one-card", "the speed of all ranks beside the peak of one", "frame.py",
    "(dist.get_world_size() if dist.is_initialized() else 1) * known[0]", "known[0]",
    "gpu_ready.py::test_mfu")

put("mfu-without-backward", "the backward pass is not counted", "frame.py",
    "work = 3 * flops(", "work = 1 * flops(", "gpu_ready.py::test_mfu")

put("mfu-of-a-head-not-computed", "prompts count as if they went through the head", "frame.py",
    "head=self.name[:2] == \"00\"", "head=True", "gpu_ready.py::test_mfu")

put("mfu-of-a-like-name", "a laptop's card has the peak of the desktop's", "flops.py",
    "CARDS.get(name.replace(\"NVIDIA\", \"\").replace(\"GeForce\", \"\").strip())",
    "next((x for k, x in CARDS.items() if k in name), None)", "gpu_ready.py::test_cards")

put("attention-both-halves", "attention's masked half counts", "flops.py",
    "* 2 * wide * length", "* 4 * wide * length", "gpu_ready.py::test_flops")

put("cudnn-attention", "cuDNN plans its attention anew for each key length", "frame.py",
    "enable_cudnn_sdp(False)", "enable_cudnn_sdp(True)", "gpu_ready.py::test_settings_of_cuda")

put("no-memory-is-damage", "a good checkpoint is called none where memory ends", "frame.py",
    "        if no_memory(e):\n            raise\n", "", "gpu_ready.py::test_no_room_is_no_damage")

put("no-memory-no-place", "memory ends while saving: choose another place", "frame.py",
    "    if no_memory(error):\n        fail(f\"out of memory while writing",
    "    if False:\n        fail(f\"out of memory while writing",
    "gpu_ready.py::test_no_room_to_write")

put("gloo-threads-outlive-the-group", "a thread of gloo aborts the process at its end", "frame.py",
    "    gc.collect()\n", "", "writers.py::test_threads_end_before_python")

put("no-memory-traceback", "CUDA's out of memory ends in a traceback", "frame.py",
    "r\"(?i)MemoryError|OutOfMemory|bad_alloc|_ALLOC_FAILED|out of memory|\"",
    "r\"(?i)MemoryError|\"", "gpu_ready.py::test_words_for_no_memory[mps]")

put("estimate-of-one-gpu", "all GPUs together are as fast as one", "bench/estimate.py",
    "operations / (gpus * peak * SHARE)", "operations / (peak * SHARE)",
    "scale.py::test_dry_run_of_named_cards")

# ---------------------------------------------------------------------------- without a mutation

WITHOUT = {
    "a checkpoint that is loaded in part": "refused twice, by load_shapes and by torch's strict",
    "losses of different vocabularies compared": "eval.py has bits a character, with its tests",
    "rows that start at a document's start": "a choice that costs a little, not a mistake",
    "shards gathered on rank 0 alone": "would hang, not assert",
    "a partial accumulation window that never steps": "update gets the step's whole batch",
    "integer types on mps": "needs the hardware",
    "0/0 on a micro-batch without a counted token": "sums are never divided one by one",
    "prompt and completion encoded together": "a tag stands at the seam: nothing can merge there",
    "dropout in policy or reference": "there is none",
    "split of transcripts into turns": "rows arrive as turns",
    "metrics of the last micro-batch alone": "they are summed beside the loss, by the same line",
    "a gradient through KTO's baseline": "it is a Python number",
    "score depends on the batch": "score-at-the-last-place: the same test",
    "unused head under the wrapper": "would hang, not assert: 06 switches its gradient off",
    "negative KL by top-k in rollouts": "generate has no top-k, and the stages use no top-p",
    "early stop by KL that ranks do not agree on": "there is no early stop",
    "advantages normalised twice": "whiten is called once; its test compares the values",
    "text after the answer's marker": "part-of-the-completion: the same test",
    "first or last of two answers": "a second answer is a format error, in test_verify",
    "learning rates that destroy small models": "a measurement: the recorded runs show it",
    "evaluation on rank 0 alone": "would hang at the next sum, not assert",
    "the optimizer's state carried over to the next stage": "a choice: every stage starts afresh",
    "more than one epoch of the reward model": "a measurement: the recorded runs show it",
    "keys and values cached in another type": "exact tests in float64, and 1e-4 in fp32, compare",
    "decoding past a sliding window": "there is no window: the context's edge ends a completion",
}

# ---------------------------------------------------------------------------- the program


def git(*args):
    return subprocess.run(["git", *args], cwd=ROOT, check=True, capture_output=True,
                          text=True).stdout


def tree():
    """What belongs to the project: tracked files and new ones, without what runs leave behind."""
    names = git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    return sorted({n for n in names if n and not n.startswith(("out/", "results/"))
                   and os.path.lexists(ROOT / n)})


def copy_tree(names, to):
    for name in names:
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, to / name, follow_symlinks=False)      # RL/model.py is a link


def pytest(folder, tests, limit):
    """Run the tests in this copy -> "passed", "failed" (an assertion) or "broken", and why."""
    report = folder / "junit.xml"
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "SKIP_DONE")}
    with open(folder / "said", "w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
             f"--basetemp={folder}/tmp", f"--junitxml={report}", *tests], cwd=folder, stdout=said,
            stderr=subprocess.STDOUT, start_new_session=True,
            env=env | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"})
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            for sign in (signal.SIGTERM, signal.SIGKILL):     # torchrun ends its ranks on the first
                os.killpg(process.pid, sign)
                time.sleep(5)
            process.wait()
            return "broken", f"no end after {limit} s"
        said.seek(0)
        tail = said.read()[-1500:]
    if process.returncode == 0:
        return "passed", ""
    if process.returncode != 1 or not report.is_file():
        return "broken", f"pytest ended with {process.returncode}\n{tail}"
    cases = list(ElementTree.parse(report).iter("testcase"))
    said = {kind: [(case.get("name"), e.get("message", "")) for case in cases
                   for e in case.findall(kind)] for kind in ("error", "failure")}
    asserted = [(name, message) for name, message in said["failure"]
                if message.startswith(("assert ", "AssertionError", "Failed: "))]
    if said["error"] or not asserted:
        return "broken", f"no assertion: {(said['error'] + said['failure'] + [tail])[0]}"
    name, message = asserted[0]
    return "failed", f"{name}: {message.splitlines()[0]}"[:78]


def tried(base, work, mutation):
    """Apply one mutation to a copy -> its verdict, the reason, seconds."""
    begun, folder = time.monotonic(), work / mutation.name
    text = (base / mutation.file).read_text() if (base / mutation.file).is_file() else ""
    if text.count(mutation.old) != 1:
        return "broken", f"its text is {text.count(mutation.old)} times in {mutation.file}", 0.0
    shutil.copytree(base, folder, symlinks=True)
    (folder / mutation.file).write_text(text.replace(mutation.old, mutation.new))
    outcome, why = pytest(folder, mutation.tests, LIMIT)
    shutil.rmtree(folder, ignore_errors=True)
    if outcome == "passed":
        why = f"{mutation.file}, {' '.join(mutation.tests)}"
    verdict = {"failed": "killed", "passed": "survived"}.get(outcome, outcome)
    return verdict, why, time.monotonic() - begun


def since_the_record():
    """The recorded names that need no new run, or none where that cannot be known."""
    try:
        record = json.loads(RECORD.read_text())
        changed = set(git("diff", "--name-only", record["commit"], "--").split())
        changed |= set(git("ls-files", "--others", "--exclude-standard").split())
    except (OSError, ValueError, KeyError, subprocess.CalledProcessError):
        return set()
    if {"tests/conftest.py", "tests/mutations.py", "requirements.txt"} & changed:
        return set()
    if "tests/rank_worker.py" in changed:
        changed.add("tests/test_ranks.py")
    return {m.name for m in MUTATIONS if m.name in record["names"] and not changed & {
        m.file, *(t.split("::")[0] for t in m.tests)}}


def write_record(names):
    """Atomic. The commit is named only if the tree is that commit: else nothing is known of it."""
    dirty = [line for line in git("status", "--porcelain").splitlines()
             if not line[3:].startswith(("out/", "results/"))]
    RECORD.parent.mkdir(exist_ok=True)
    new = RECORD.with_suffix(".json.new")
    new.write_text(json.dumps({
        "commit": "" if dirty else git("rev-parse", "HEAD").strip(), "killed": len(names),
        "total": len(MUTATIONS), "names": sorted(names)}, indent=1) + "\n")
    os.replace(new, RECORD)


def attempt(chosen, jobs):
    """Yield (mutation, verdict, reason, seconds) as they come, after the unmutated copy's own:
    its mutation is None. Nothing follows if that does not pass."""
    work = Path(tempfile.mkdtemp(prefix="mutations-"))
    try:
        base, first, begun = work / "unmutated", work / "first", time.monotonic()
        copy_tree(tree(), base)
        shutil.copytree(base, first, symlinks=True)
        tests = sorted({t for m in chosen for t in m.tests})
        outcome, why = pytest(first, tests, 3 * LIMIT)
        yield None, outcome, why, time.monotonic() - begun
        if outcome != "passed":
            return
        with ThreadPoolExecutor(max(1, jobs)) as pool:
            runs = {pool.submit(tried, base, work, m): m for m in chosen}
            try:
                for done in as_completed(runs):
                    yield runs[done], *done.result()
            finally:
                pool.shutdown(cancel_futures=True)         # after Ctrl-C only the running ones end
    finally:
        shutil.rmtree(work, ignore_errors=True)


def show():
    for m in MUTATIONS:
        print(f"{m.name:38} {m.file:15} {m.slip}")
    for slip, reason in WITHOUT.items():
        print(f"{'(none)':38} {'':15} {slip}: {reason}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME", action="append", help="this one; repeatable")
    parser.add_argument("--list", action="store_true", help="names and mistakes, without a run")
    parser.add_argument("--jobs", type=int, default=2, metavar="2")
    parser.add_argument("--changed", action="store_true",
                        help="leave out what the record has and nothing has touched since")
    args = parser.parse_args()
    names = [m.name for m in MUTATIONS]
    assert len(set(names)) == len(names), "a name is there twice"
    if args.list:
        return show()
    unknown = set(args.only or []) - set(names)
    if unknown:
        parser.error(f"no mutation is called {', '.join(sorted(unknown))}; --list shows them")
    kept = since_the_record() if args.changed else set()
    chosen = [m for m in MUTATIONS if m.name in (args.only or names) and m.name not in kept]
    chosen.sort(key=lambda m: "test_ranks" not in str(m.tests))          # the slow ones first
    begun, killed, lost = time.monotonic(), set(), []
    for m, verdict, why, seconds in attempt(chosen, args.jobs) if chosen else []:
        name = f"{m.name}: {m.slip}" if m else "the named tests, without a mutation"
        print(f"{verdict:9} {seconds:6.1f} s  {name}", *([f"\n{'':20}{why}"] if why else []),
              flush=True)
        if m is None and verdict != "passed":
            print("the named tests must pass before anything is changed")
            return 1
        if m is not None:
            (killed.add if verdict == "killed" else lost.append)(m.name)
    seconds = int(time.monotonic() - begun)
    print(f"{len(killed)} of {len(chosen)} killed in {seconds // 60}:{seconds % 60:02}"
          + (f", {len(kept)} unchanged since the record" if kept else "")
          + (f"; not killed: {', '.join(lost)}" if lost else ""))
    if not args.only:
        write_record(killed | kept)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
