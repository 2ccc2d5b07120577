"""data/alpaca.py: Stanford Alpaca's instructions -> sft_train.jsonl, sft_val.jsonl.

    {"instruction", "input", "output"}  ->  {"prompt": instruction, blank line, input; "completion"}

Alpaca's own frame ("Below is an instruction ...") is left out: the chat template says who speaks.
An input that says "no input" in some spelling is none. Taori et al. 2023; CC BY-NC 4.0.

    python data/alpaca.py --train alpaca_data.json      a local file (.json, .jsonl, .parquet, .gz)
    python data/alpaca.py                               from the Hub (tatsu-lab/alpaca)
"""
import re

from common import Drop, check, cli, field, prepare, untagged


def convert(row):
    task, given, answer = (field(row, key) for key in ("instruction", "input", "output"))
    if not task or not answer:
        raise Drop("empty instruction or output")
    if re.fullmatch(r"\W*no\s*input\W*", given, re.IGNORECASE):
        given = ""
    return {"prompt": f"{task}\n\n{given}" if given else task, "completion": untagged(answer)}


def main(argv=None):
    args = check(cli(__doc__, "alpaca", hub="tatsu-lab/alpaca").parse_args(argv))
    prepare(args, "sft", convert)


if __name__ == "__main__":
    main()
