"""data/alpaca.py: Stanford Alpaca's instructions -> sft_train.jsonl, sft_val.jsonl.

    {"instruction", "input", "output"}  ->  {"prompt": instruction, blank line, input; "completion"}

Alpaca's own frame ("Below is an instruction ...") is left out: the chat template says who speaks.
An input that says "no input" in some spelling is none, and rows without the field are read as well.
Copies with a "system" text, or a "history" of [question, answer], become {"messages": [...]}.
Taori et al. 2023; CC BY-NC 4.0.

    python data/alpaca.py --train alpaca_data.json      a local file (.json, .jsonl, .parquet, .gz)
    python data/alpaca.py                               from the Hub (tatsu-lab/alpaca)
"""
from rows import Drop, as_messages, cli, field, prepare, task, untagged, with_history, with_system


def convert(row):
    prompt, answer = task(row, "input"), untagged(field(row, "output"))
    if not answer:
        raise Drop("empty output")
    messages = with_system(row, with_history(row, as_messages(prompt)))
    if len(messages) > 1:
        return {"messages": messages + [{"role": "assistant", "content": answer}]}
    return {"prompt": prompt, "completion": answer}


def main(argv=None):
    args = cli(__doc__, "alpaca", hub="tatsu-lab/alpaca").parse_args(argv)
    prepare(args, "alpaca", "sft", convert, ("system", "system_prompt", "history", "input"))


if __name__ == "__main__":
    main()
