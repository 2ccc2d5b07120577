"""data/hh.py: Anthropic's HH-RLHF -> pairs_train.jsonl, pairs_val.jsonl (and pairs_test.jsonl).

    {"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...", "rejected": the same up to the last answer}
    ->  {"prompt": [{"role": "user", "content"}, ...], "chosen": answer, "rejected": answer}

Both transcripts are cut at their last "\\n\\nAssistant:". What stands before must be the same in
both, and is turned into real turns: a transcript inside one user turn would teach the model to
write "Human:" itself. Bai et al. 2022; MIT. It holds offensive text by design.

    python data/hh.py --train harmless-base/train.jsonl.gz helpful-base/train.jsonl.gz \\
                      --test harmless-base/test.jsonl.gz helpful-base/test.jsonl.gz
    python data/hh.py --train harmless-base/test.jsonl.gz --test_share 0.2    one file in three
    python data/hh.py                              from the Hub (Anthropic/hh-rlhf, all of it)
"""
import re

from rows import Drop, cli, field, pair, prepare

SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def transcript(text):
    """"\\n\\nHuman: a\\n\\nAssistant: b ..." -> messages."""
    before, *rest = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    if before.strip() or not rest:
        raise Drop("no transcript of Human and Assistant")
    messages = [{"role": SPEAKERS[who], "content": said.strip()}
                for who, said in zip(rest[::2], rest[1::2])]
    if not all(m["content"] for m in messages):
        raise Drop("an empty turn")
    return messages


def convert(row):
    (prompt, mark, chosen), (other, _, rejected) = (
        field(row, key).rpartition("\n\nAssistant:") for key in ("chosen", "rejected"))
    if not mark:
        raise Drop("no transcript of Human and Assistant")
    if prompt != other:
        raise Drop("the two prompts differ")
    if "\n\nHuman:" in chosen + rejected:
        raise Drop("a turn after the last answer")
    return pair(transcript(prompt), chosen.strip(), rejected.strip())


def main(argv=None):
    args = cli(__doc__, "hh", hub="Anthropic/hh-rlhf", test_split="test").parse_args(argv)
    prepare(args, "hh", "pairs", convert)


if __name__ == "__main__":
    main()
