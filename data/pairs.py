"""data/pairs.py: any rows of preferences -> pairs_train.jsonl, pairs_val.jsonl (pairs_test.jsonl).

    {"prompt", "chosen", "rejected"}: texts, or lists of {"role", "content"} or {"from", "value"}
    ->  {"prompt": [{"role", "content"}, ...], "chosen": answer, "rejected": answer}

Where chosen and rejected are whole dialogues, they are cut at their last turn, and what stands
before must be the same in both; a row without "prompt" has its prompt there. "conversations" and
"instruction" are other names for "prompt".

    python data/pairs.py --train pairs.jsonl --out out/data/mine
    python data/pairs.py --hub trl-lib/ultrafeedback_binarized --test_split test
"""
from common import check, cli, preference, prepare


def main(argv=None):
    prepare(check(cli(__doc__, "pairs").parse_args(argv)), "pairs", preference)


if __name__ == "__main__":
    main()
