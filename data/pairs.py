"""data/pairs.py: any rows of preferences -> pairs_train.jsonl, pairs_val.jsonl (pairs_test.jsonl).

    {"prompt", "chosen", "rejected"}: texts, or lists of {"role", "content"} or {"from", "value"}
    ->  {"prompt": [{"role": "user", "content"}, ...], "chosen": answer, "rejected": answer}

Where chosen and rejected are whole dialogues, they are cut at their last turn, and what stands
before must be the same in both (and as in "prompt"); a row without "prompt" has its prompt there.
"conversations", and "instruction" with its "input", are other names for "prompt". A "system" text
and a "history" of [question, answer] go before the prompt. Rows whose score_chosen is not above
score_rejected, whose turns have tools, names or weights, and whose label is false are dropped and
counted; so are completions with a tag in them, as <think>. Unpaired rows {"prompt", "completion",
"label"} are refused: DPO/kto.py reads them as they are (--data FOLDER --train FILE --val FILE).

    python data/pairs.py --train pairs.jsonl --out out/data/mine
    python data/pairs.py --hub trl-lib/ultrafeedback_binarized --test_split test
"""
from rows import cli, preference, prepare


def main(argv=None):
    prepare(cli(__doc__, "pairs").parse_args(argv), "pairs", "pairs", preference,
            ("system", "system_prompt", "history", "input"))


if __name__ == "__main__":
    main()
