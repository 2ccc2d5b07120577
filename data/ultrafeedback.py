"""data/ultrafeedback.py: UltraFeedback binarized -> pairs_train.jsonl, pairs_val.jsonl, pairs_test.

    {"prompt", "chosen": [user, assistant], "rejected": [user, assistant], "score_chosen", ...}
    ->  {"prompt": [{"role": "user", "content"}], "chosen": answer, "rejected": answer}

Both dialogues must have the same prompt. A pair whose scores are equal, or the other way round,
does not say which answer is better, and is dropped. Cui et al. 2023, binarized by Tunstall et al.
2023; MIT.

    python data/ultrafeedback.py --train train_prefs.parquet --test test_prefs.parquet
    python data/ultrafeedback.py          from the Hub (HuggingFaceH4/ultrafeedback_binarized)
"""
from rows import cli, preference, prepare


def main(argv=None):
    parser = cli(__doc__, "ultrafeedback", hub="HuggingFaceH4/ultrafeedback_binarized",
                 split="train_prefs", test_split="test_prefs")
    prepare(parser.parse_args(argv), "ultrafeedback", "pairs", preference)


if __name__ == "__main__":
    main()
