"""data/messages.py: any rows of dialogues -> sft_train.jsonl, sft_val.jsonl.

    {"messages": [{"role", "content"}, ...]}  or  {"conversations": [{"from", "value"}, ...]}
    or  {"prompt", "completion"}: texts, or messages
    ->  {"messages": [{"role", "content"}, ...]}

Turns must be [system,] user, assistant, user ... and end with the assistant's; the stages learn all
of its turns, not the last alone. A content may be a list of parts {"type": "text", "text"}, which
are joined as they are. The row's "system" text becomes the first turn. An assistant's reasoning
(reasoning_content, reasoning, thinking) becomes <think>...</think> before its content, and tags in
its content are taken as such: rows with traces go in with --kind cot, which names the files cot_*.

Dropped and counted: other roles and orders, empty turns, tools and calls of them, names, pictures,
turns with a weight (train, loss) that is not 1 for the assistant and 0 for others, and rows whose
label is false, which are no demonstrations.

    python data/messages.py --train chats.jsonl --out out/data/chats
    python data/messages.py --hub HuggingFaceH4/no_robots --test_split test
"""
from rows import Drop, as_messages, cli, dialogue, prepare, with_system
from model import REASONING


def convert(row):
    said = next((row[k] for k in ("messages", "conversations") if row.get(k) is not None), None)
    thought = {k: row[k] for k in REASONING if row.get(k)}
    if said is not None and thought:
        raise Drop("a reasoning beside the messages")
    if said is None and row.get("prompt") is not None and "completion" in row:
        answer = row["completion"]
        if isinstance(answer, str) or thought:
            answer = [{"role": "assistant", "content": answer} | thought]
        said = as_messages(row["prompt"]) + as_messages(answer)
    if said is None:
        raise ValueError("no 'messages' or 'conversations', and no 'prompt' with a 'completion'")
    return {"messages": dialogue(with_system(row, as_messages(said)), "assistant")}


def main(argv=None):
    parser = cli(__doc__, "messages")
    parser.add_argument("--kind", choices=("sft", "cot"), default="sft",
                        help="what the files are called ('sft')")
    args = parser.parse_args(argv)
    prepare(args, "messages", args.kind, convert, ("system", "system_prompt", *REASONING))


if __name__ == "__main__":
    main()
