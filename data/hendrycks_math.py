"""data/hendrycks_math.py: MATH's numeric problems -> rl_train.jsonl, rl_val.jsonl, rl_test.jsonl.

    {"problem", "solution": "... \\boxed{\\frac{14}{3}}", "level": "Level 3", "type"}
    ->  {"prompt": problem, "answer": "14/3", "kind": "level 3"}

A row's own "answer" (as in MATH-500) goes before the last \\boxed of its solution. Answers that the
verifier does not read as one number (points, roots, expressions, words) are dropped and counted: it
compares numbers by value, and would call two spellings of an expression different. Hendrycks et
al. 2021; MIT.

    python data/hendrycks_math.py --train MATH/train --test MATH/test      folders of one JSON a row
    python data/hendrycks_math.py --test math500.jsonl                     MATH-500, for eval.py
    python data/hendrycks_math.py                         from the Hub (EleutherAI/hendrycks_math)
"""
import re

from rows import Drop, cli, field, numeric, prepare

SUBJECTS = ("algebra,counting_and_probability,geometry,intermediate_algebra,number_theory,"
            "prealgebra,precalculus")


def boxed(solution):
    """What the last \\boxed{...} holds, braces matched; "" if there is none."""
    _, _, rest = solution.rpartition("\\boxed{")
    depth = 1
    for i, c in enumerate(rest if "\\boxed{" in solution else ""):
        depth += {"{": 1, "}": -1}.get(c, 0)
        if not depth:
            return rest[:i]
    return ""


def convert(row):
    problem = field(row, "problem")
    answer = field(row, "answer") if "answer" in row else boxed(field(row, "solution"))
    if not problem or not answer:
        raise Drop("empty problem or no answer")
    level = re.sub(r"\D", "", str(row.get("level", "")))
    return {"prompt": problem, "answer": numeric(answer), "kind": f"level {level}"}


def main(argv=None):
    parser = cli(__doc__, "hendrycks_math", hub="EleutherAI/hendrycks_math", config=SUBJECTS,
                 test_split="test")
    prepare(parser.parse_args(argv), "hendrycks_math", "rl", convert)


if __name__ == "__main__":
    main()
