"""data/gsm8k.py: GSM8K's own rows -> text, demonstrations, traces and questions for the stages.

    {"question", "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\\n...\\n#### 72"}
    ->  sft_*   <answer>72</answer>
        cot_*   <think>Natalia sold 48/2 = 24 clips in May.\\n...</think><answer>72</answer>
        rl_*    {"prompt", "answer": "72", "steps": the number of calculator marks}
        *.bin   question and solution as plain text, for 00_pretrain.py

The calculator marks go: a model that has no calculator should not learn to call one. One question
in twenty, by its hash, is val; the test file is only asked, never trained on. The rows are
Cobbe et al. 2021; MIT.

    python data/gsm8k.py --train train.jsonl --test test.jsonl    local files, the source's format
    python data/gsm8k.py                                              from the Hub (openai/gsm8k)
    python data/gsm8k.py --tokenizer out/text/00_pretrain.pt       ids for the text of a checkpoint
"""
import re

from common import NewSet, add_tokenizer, find_tokenizer
from rows import Drop, check, cli, field, numeric, split_rows, untagged


def convert(row, tokenizer):
    """A source row -> {"prompt", "solution", "answer", "steps", "ids"}. ValueError where the
    tokenizer lacks a character, so that the row is named."""
    question = field(row, "question")
    body, mark, answer = field(row, "answer").rpartition("####")
    solution = re.sub(r"<<.*?>>", "", untagged(body)).strip()
    if not mark:
        raise Drop("no answer after '####'")
    if not question or not solution:
        raise Drop("empty text")
    return {"prompt": question, "solution": solution, "answer": numeric(answer),
            "steps": body.count("<<"),
            "ids": tokenizer.encode(f"{question}\n{solution}") + [tokenizer.end]}


def write_part(new, part, rows, tokenizer):
    """All files of train or val; of test the questions alone."""
    new.rows(f"rl_{part}.jsonl", [{k: r[k] for k in ("prompt", "answer", "steps")} for r in rows])
    if part == "test":
        return
    direct = [f"<answer>{r['answer']}</answer>" for r in rows]
    traced = [f"<think>{r['solution']}</think>{a}" for r, a in zip(rows, direct)]
    for kind, completions in (("sft", direct), ("cot", traced)):
        new.rows(f"{kind}_{part}.jsonl", [{"prompt": r["prompt"], "completion": c}
                                          for r, c in zip(rows, completions)])
    new.ids(f"{part}.bin", [i for r in rows for i in r["ids"]], tokenizer)


def main(argv=None):
    parser = cli(__doc__, "gsm8k", hub="openai/gsm8k", config="main", test_split="test")
    add_tokenizer(parser)
    args = check(parser.parse_args(argv))
    with NewSet(args.out, "gsm8k") as new:
        tokenizer = find_tokenizer(args.tokenizer)
        parts = split_rows(args, lambda row: convert(row, tokenizer))
        new.json("tokenizer.json", tokenizer.spec)
        for part, rows in parts.items():
            write_part(new, part, rows, tokenizer)


if __name__ == "__main__":
    main()
