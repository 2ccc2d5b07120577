"""What a row means: sources' fields -> the rows of the stages, and what is held out.

A field that changes what a row means is used, or the row is dropped and counted by reason: a system
text, an input, a history, tools, a label, a weight, a reasoning. Fields that only describe a row
(ids, scores, topics) are passed over.

What is held out is decided by the prompt: a hash of its first user turn, without case and white
space. So equal prompts, and one conversation told to different lengths, never straddle train and
val, in whatever file or source they are.
"""
import hashlib
import json
import re
from collections import Counter

from common import NewSet, add_flags, draw, find_files, load_hub, place, read_file
from answers import canonical
from model import (IN_MESSAGE, IN_ROW, REASONING, TAGS, Parser, check_ranges, fail, false_label,
                   say, text_of, unused)

# ---------------------------------------------------------------------------- fields


class Drop(Exception):
    """Raised on a row that is left out; the message says why, and is counted."""


def field(row, *names):
    """The text under the first of `names` that the row has, stripped; "" for null."""
    for name in names:
        if name in row:
            if not isinstance(row[name], (str, type(None))):
                raise ValueError(f"{name!r} is no text but {type(row[name]).__name__}")
            return (row[name] or "").strip()
    raise ValueError(f"no {' or '.join(map(repr, names))}")


def maybe(row, *names):
    """As field, but "" where the row has none of them."""
    return field(row, *names) if any(name in row for name in names) else ""


def untagged(text):
    """A completion as it is, unless it holds a tag: that would become a control token."""
    if any(tag in text for tag in TAGS):
        raise Drop("a tag in the completion")
    return text


def task(row, *inputs):
    """An instruction and the text that it is about. "No input", in some spelling, is none."""
    said, given = field(row, "instruction"), maybe(row, *inputs)
    if not said:
        raise Drop("empty instruction")
    if re.fullmatch(r"\W*no\s*input\W*", given, re.IGNORECASE):
        given = ""
    return f"{said}\n\n{given}" if given else said


def numeric(text):
    """A number as the verifier reads it, in one spelling and with its unit, so that 5.40 dollars
    are not right where "5.4 \\text{ cents}" are asked for. (A bare 5.4 is right for either.)"""
    said = canonical(text)
    if said is None:
        raise Drop("the answer is not a number")
    return said


# ---------------------------------------------------------------------------- messages

ROLE_OF = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant",
           "system": "system", "developer": "system"}


def as_messages(value):
    """A text, {"role", "content"} rows or ShareGPT's {"from", "value"} rows -> messages. An
    assistant's reasoning, where it is a field, goes before the content as <think>...</think>."""
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list) or not all(isinstance(m, dict) for m in value):
        raise ValueError("a dialogue is a text or a list of {'role', 'content'}")
    return list(map(as_message, value))


def as_message(m):
    role = ROLE_OF.get(field(m, "role", "from"))
    if role is None:
        raise Drop("a role other than system, user and assistant")
    learned = {k: m[k] for k in ("weight", "train", "loss") if m.get(k) is not None}
    if any(bool(v) != (role == "assistant") or v not in (0, 1) for v in learned.values()):
        raise Drop("a turn whose weight is not what is learned: the assistant's 1, others' 0")
    lost = unused(m, [k for k in IN_MESSAGE if k not in (*learned, *REASONING)])
    if lost:
        raise Drop(f"a turn with {lost}")
    content = m.get("content", m.get("value"))
    if isinstance(content, list) and content and all(isinstance(p, dict) for p in content):
        try:
            m = {"content": text_of(content)} | {k: m[k] for k in REASONING if k in m}
        except ValueError:
            raise Drop("a part of a turn that is not text") from None
    said, thought = field(m, "content", "value"), {maybe(m, k) for k in REASONING} - {""}
    if not said:
        raise Drop("empty text")
    if thought and (role != "assistant" or len(thought) > 1 or "<think>" in said):
        raise Drop("two reasonings, or one that is not the assistant's")
    if thought:
        said = f"<think>{untagged(*thought)}</think>{said}"
    return {"role": role, "content": said}


def with_system(row, messages):
    """The messages under the row's own system text, if it has one."""
    said = {maybe(row, k) for k in ("system", "system_prompt")} - {""}
    said |= {m["content"] for m in messages[:1] if m["role"] == "system"}
    if len(said) > 1:
        raise Drop("two system texts")
    return [{"role": "system", "content": s} for s in said] + [
        m for m in messages[:1] if m["role"] != "system"] + messages[1:]


def with_history(row, messages):
    """And after the turns of its history, a list of [question, answer]."""
    before = []
    for turn in row.get("history") or []:
        if not isinstance(turn, list) or list(map(type, turn)) != [str, str]:
            raise ValueError("'history' is no list of [question, answer]")
        before += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return as_messages(before) + messages


def dialogue(messages, last):
    """The messages, if they are [system,] user, assistant, user ... and end with `last`."""
    said = [m["role"] for m in messages]
    said = said[1:] if said[:1] == ["system"] else said
    if not said or said[-1] != last:
        raise Drop(f"the last turn is not the {last}'s")
    if said != [("user", "assistant")[i % 2] for i in range(len(said))]:
        raise Drop("the turns do not alternate")
    return messages


# ---------------------------------------------------------------------------- pairs


def pair(prompt, chosen, rejected):
    """Messages and two completions (texts) -> a preference row."""
    if not chosen or not rejected:
        raise Drop("empty completion")
    if chosen == rejected:
        raise Drop("chosen equals rejected")
    return {"prompt": dialogue(prompt, "user"), "chosen": untagged(chosen),
            "rejected": untagged(rejected)}


def preference(row):
    """{"prompt", "chosen", "rejected"}, texts, messages or whole dialogues -> a preference row."""
    if "chosen" not in row and "completion" in row:
        raise ValueError("a completion with a label is no pair: DPO/kto.py reads such rows as they "
                         "are; data/messages.py takes the good ones as demonstrations")
    better, worse = row.get("score_chosen"), row.get("score_rejected")
    if better is not None and worse is not None and not better > worse:
        raise Drop("equal scores" if better == worse else "chosen has the lower score")
    (prompt, chosen), (other, rejected) = (answer_to(row, key) for key in ("chosen", "rejected"))
    if prompt != other:
        raise Drop("the two prompts differ")
    named = named_prompt(row)
    if named is None and not prompt:
        raise ValueError("no 'prompt', and none in 'chosen'")
    if named and prompt and not repeats(named, prompt):
        raise Drop("the prompt differs from the one in chosen")
    longer = max(prompt, named or [], key=len)
    return pair(with_system(row, longer), chosen, rejected)


def answer_to(row, key):
    """chosen or rejected -> the turns before its last one, and that one's text."""
    said = row[key] if key in row else field(row, key)
    if isinstance(said, str):
        return [], said.strip()
    *before, last = as_messages([said] if isinstance(said, dict) else said)
    if last["role"] != "assistant":
        raise Drop("the last turn is not the assistant's")
    return before, last["content"]


def named_prompt(row):
    """What a row calls its prompt -> messages, or None."""
    key = next((k for k in ("prompt", "conversations", "instruction") if k in row), None)
    if key is None:
        return None
    said = task(row, "input") if key == "instruction" else row[key]
    if key != "instruction" and unused(row, ["input"]):
        raise Drop("an input beside the prompt")
    return with_history(row, as_messages(said))


def repeats(named, prompt):
    """Whether both are the same turns (one may have a system text), or `named` one of the user's:
    sources call the first or the last question the prompt of a whole dialogue."""
    a, b = ([m for m in side if m["role"] != "system"] for side in (named, prompt))
    return a == b or len(a) == 1 and a[0] in b


# ---------------------------------------------------------------------------- rows of a source


def said_first(row):
    """What decides where a row belongs: the first user turn, without case and white space."""
    prompt = row.get("messages") or row.get("prompt")
    if isinstance(prompt, list):
        prompt = next((m["content"] for m in prompt if m["role"] == "user"), None)
    if not isinstance(prompt, str):
        raise ValueError("no 'prompt' or 'messages' in which a user says something")
    return " ".join(prompt.lower().split())


def read_part(args, part):
    """("train" or "test") -> (where, row) of its files, or of the Hub, or nothing."""
    files, split = getattr(args, part), args.split if part == "train" else args.test_split
    if files:
        for path in find_files(files, (".jsonl", ".json", ".csv", ".parquet")):
            for n, row, _ in read_file(path):
                yield place(path, n), row
    elif not args.train and not args.test and split:
        if not args.hub:
            fail("no rows to read: give --train FILE, or --hub owner/name")
        for config in args.config.split(","):
            rows = load_hub(args.hub, config, split, f"--{part} FILE")
            for n, row in enumerate(rows, 1):
                yield f"{args.hub} {split}, row {n}", row


def converted(row, convert, known):
    """convert(row), unless a field that it does not know would be lost."""
    if not isinstance(row, dict):
        raise ValueError("not an object")
    lost = unused(row, [k for k in IN_ROW + REASONING if k not in known])
    if lost:
        raise Drop(f"{lost}, which is not used here")
    if false_label(row):
        raise Drop("its label is false")
    return convert(row)


def convert_rows(args, part, convert, known):
    """The rows of a part, each through convert(row) -> new row. Says what became of them."""
    kept, dropped, seen, read = [], Counter(), set(), 0
    for where, row in read_part(args, part):
        read += 1
        try:
            new = converted(row, convert, known)
            key = hashlib.sha256(json.dumps(new).encode()).digest()
            if part == "train" and key in seen:
                raise Drop("an exact duplicate")
            seen.add(key)
            kept.append(new)
        except Drop as why:
            dropped[str(why)] += 1
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            what = e if isinstance(e, ValueError) else f"not in the format: {e!r}"
            fail(f"{where}: {what}; --help shows the rows that this script reads")
    if read:
        why = ", ".join(f"{n:,} {reason}" for reason, n in dropped.most_common())
        say(f"{part}: {read:,} rows read, {len(kept):,} kept, {read - len(kept):,} dropped"
            + (f" ({why})" if why else ""))
        if not kept:
            fail(f"{part}: no row is left: {why}")
    return kept


def split_rows(args, convert, known=()):
    """-> {"train", "val", "test": rows}; a part without rows is not there.

    The source's own test rows stay test rows, and training rows that ask the same are dropped.
    `known` are the fields of IN_ROW and REASONING that `convert` uses."""
    train, test = (convert_rows(args, part, convert, known) for part in ("train", "test"))
    if test and args.test_share:
        fail("--test_share is for sources without test rows, and this one has some")
    parts = {"train": [], "val": [], "test": test}
    asked, low, same = {said_first(row) for row in test}, args.test_share, 0
    for row in train:
        key = said_first(row)
        x = draw(key)
        if key in asked:
            same += 1
        else:
            part = "test" if x < low else "val" if x < low + args.val_share else "train"
            parts[part].append(row)
    if same:
        say(f"train: {same:,} more dropped (their prompts are in test)")
    if train and not (parts["train"] and parts["val"]):
        fail(f"{len(train) - same} rows leave nothing for train or val at --val_share "
             f"{args.val_share} and --test_share {args.test_share}: change these, or give more")
    if not train and not test:
        fail("there are no rows: the files are empty")
    return {part: rows for part, rows in parts.items() if rows}


# ---------------------------------------------------------------------------- command line


def cli(doc, name, hub="", config="", split="train", test_split=""):
    """A parser with the flags that all preparers of rows share. `check` follows it."""
    parser = Parser(doc)
    parser.add_argument("--train", nargs="+", default=[], metavar="FILE",
                        help="local files or folders; without any, the Hub")
    parser.add_argument("--test", nargs="+", default=[], metavar="FILE",
                        help="the source's own test rows, never trained on")
    add_flags(parser, ("hub", hub, "Hub id owner/name"), ("config", config, "its configuration"),
              ("split", split, "its split to train on"),
              ("test_split", test_split, "its test split"),
              ("val_share", 0.05, "share of the prompts held out as val"),
              ("test_share", 0.0, "and as test, where the source has no test rows"),
              ("out", f"out/data/{name}", "folder; what an earlier run made there is replaced"))
    parser.set_defaults(source=(hub, config, split, test_split))
    return parser


def check(args):
    check_ranges(vars(args), "rows")
    if args.val_share + args.test_share >= 1:
        fail("--val_share and --test_share must together lie below 1: the rest is train")
    given = args.hub, args.config, args.split, args.test_split
    if (args.train or args.test) and given != args.source:
        fail("--hub, --config, --split and --test_split are for rows of the Hub, --train and "
             "--test for local files: give one or the other")
    return args


def prepare(args, maker, kind, convert, known=()):
    """All of a preparer whose rows are converted one by one: read, split, write KIND_*.jsonl."""
    with NewSet(check(args).out, maker) as new:
        for part, rows in split_rows(args, convert, known).items():
            new.rows(f"{kind}_{part}.jsonl", rows)
