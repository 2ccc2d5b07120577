"""data/questions.py: any rows of questions and answers -> rl_train, rl_val and rl_test.jsonl.

    --prompt KEY --answer KEY  ->  {"prompt": text or messages, "answer": text, or a list of texts}

A KEY is a field's name; dots lead inside ("reward_model.ground_truth", "answers.0"). Several keys
of --prompt are joined by a space; one with braces is a pattern: "{question}\\nWhich?\\n{options}"
(a list comes one item a line). An answer is a text or a number, or a list of them, any of which is
right. Of a solution, what stands after its last #### counts. Numbers are written as the verifier
reads them, with their units; rows without an answer, or with one longer than 100 characters, are
dropped and counted; true, false and objects are refused. Files: .jsonl, .json, .csv, .parquet.

    python data/questions.py MultiArith.json --prompt sQuestion --answer lSolutions
    python data/questions.py asdiv.jsonl --prompt body question --answer answer      "9 (apples)"
    python data/questions.py AQuA.jsonl --prompt "{question}\\n{options}" --answer correct     "E"
    python data/questions.py verl.parquet --prompt prompt --answer reward_model.ground_truth
    python data/questions.py countdown.jsonl --prompt "Make {target} of {nums}: which equation?" \\
                             --answer solution        one solution a row; another one is not found
                                                      right: the verifier has answers, no rules
    python data/questions.py train.jsonl --test test.jsonl --prompt question --answer answer
"""
import re

from rows import Drop, as_messages, cli, prepare
from answers import canonical
from model import REASONING, answer_of, fail

LONGEST = 100            # characters of an answer; the verifier reads no longer one as a number


def get(row, key):
    """row["a"]["0"]["b"] for "a.0.b"; a field whose own name has dots goes first."""
    if isinstance(row, dict) and key in row:
        return row[key]
    first, _, rest = key.partition(".")
    if isinstance(row, dict) and first in row and rest:
        return get(row[first], rest)
    if isinstance(row, list) and first.isdecimal() and int(first) < len(row):
        return get(row[int(first)], rest) if rest else row[int(first)]
    has = f"there is {', '.join(map(str, row))[:80]}" if isinstance(row, dict) else "no object"
    raise ValueError(f"no {key!r} ({has})")


def text(value, key):
    """What a field says in a question."""
    if isinstance(value, list) and value:
        return "\n".join(text(v, key) for v in value)
    if value is None or isinstance(value, (bool, dict, list)):
        raise ValueError(f"{key!r} is no text and no number, but {str(value)[:40]!r}")
    return str(value).strip()


def prompt_of(row, keys):
    if len(keys) == 1 and "{" in keys[0]:
        return re.sub(r"{([^{}]+)}", lambda m: text(get(row, m[1]), m[1]), keys[0])
    if len(keys) == 1 and isinstance(get(row, keys[0]), list):
        return as_messages(get(row, keys[0]))
    return " ".join(text(get(row, key), key) for key in keys)


def written(answer):
    """One answer -> as the verifier reads it."""
    said = answer.rpartition("####")[2].strip()
    said = re.sub(r"^(\S+) \(([^()]*)\)$", r"\1 \2", said)             # ASDiv: 9 (apples)
    if len(said) > LONGEST:
        raise Drop(f"an answer longer than {LONGEST} characters")
    return canonical(said) or said


def convert(row, args):
    prompt, value = prompt_of(row, args.prompt), get(row, args.answer)
    if value is None or value == [] or isinstance(value, str) and not value.strip():
        raise Drop("no answer")
    found = answer_of(value)
    answers = list(dict.fromkeys(map(written, found if isinstance(found, list) else [found])))
    if not prompt or not all(answers):
        raise Drop("empty text")
    if isinstance(prompt, list) and prompt[-1]["role"] != "user":
        raise Drop("the last turn is not the user's")
    return {"prompt": prompt, "answer": answers[0] if len(answers) == 1 else answers}


def main(argv=None):
    parser = cli(__doc__, "questions")
    parser.add_argument("files", nargs="*", metavar="FILE", help="the same as --train FILE")
    parser.add_argument("--prompt", nargs="+", default=["prompt"], metavar="KEY",
                        help="fields of the question, or a pattern ('prompt')")
    parser.add_argument("--answer", default="answer", metavar="KEY",
                        help="field of the answer ('answer')")
    args = parser.parse_args(argv)
    args.train = args.files + args.train
    args.prompt = [key.replace("\\n", "\n") for key in args.prompt]
    if not all([*args.prompt, args.answer]) or len(args.prompt) > 1 and "{" in "".join(args.prompt):
        fail("--prompt wants keys, or one pattern with {keys}; --answer wants a key")
    used = {key.split(".")[0] for k in args.prompt for key in re.findall(r"{([^{}]+)}", k) or [k]}
    used |= {*REASONING, args.answer.split(".")[0]}           # a question needs no reasoning
    prepare(args, "questions", "rl", lambda row: convert(row, args), used)


if __name__ == "__main__":
    main()
