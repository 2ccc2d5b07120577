"""data/messages.py: any rows of dialogues -> sft_train.jsonl, sft_val.jsonl.

    {"messages": [{"role", "content"}, ...]}  or  {"conversations": [{"from", "value"}, ...]}
    ->  {"messages": [{"role", "content"}, ...]}

Turns must be [system,] user, assistant, user ... and end with the assistant's; other rows are
dropped and counted. <think> and <answer> in an assistant's turn are taken as such: rows with
reasoning traces go in with --kind cot, which names the files cot_*.

    python data/messages.py --train chats.jsonl --out out/data/chats
    python data/messages.py --hub HuggingFaceH4/no_robots --test_split test
"""
from common import as_messages, check, cli, dialogue, prepare


def convert(row):
    messages = row.get("messages", row.get("conversations"))
    if messages is None:
        raise ValueError("no 'messages' or 'conversations'")
    return {"messages": dialogue(as_messages(messages), "assistant")}


def main(argv=None):
    parser = cli(__doc__, "messages")
    parser.add_argument("--kind", choices=("sft", "cot"), default="sft")
    args = check(parser.parse_args(argv))
    prepare(args, args.kind, convert)


if __name__ == "__main__":
    main()
