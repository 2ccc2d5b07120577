"""data/dolly.py: Databricks Dolly's instructions -> sft_train.jsonl, sft_val.jsonl.

    {"instruction", "context", "response", "category"}
    ->  {"prompt": instruction, blank line, context; "completion": response; "kind": category}

Copies that say input and output for context and response are read as well. Wikipedia's marks such
as [42] leave the context, as the data's authors advise. Conover et al. 2023; CC BY-SA 3.0.

    python data/dolly.py --train databricks-dolly-15k.jsonl     a local file
    python data/dolly.py                           from the Hub (databricks/databricks-dolly-15k)
"""
import re

from rows import Drop, cli, field, prepare, task, untagged


def convert(row):
    answer = field(row, "response", "output")
    given = re.sub(r"\[\d+\]", "", field(row, "context", "input")).strip()
    if not answer:
        raise Drop("empty response")
    return {"prompt": task({**row, "context": given}, "context"), "completion": untagged(answer),
            "kind": field(row, "category")}


def main(argv=None):
    args = cli(__doc__, "dolly", hub="databricks/databricks-dolly-15k").parse_args(argv)
    prepare(args, "dolly", "sft", convert, ("context", "input"))


if __name__ == "__main__":
    main()
