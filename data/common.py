"""What every preparer in data/ shares: rows in, rows out, and saying what became of them.

In: files in the source's own format (.jsonl, .json, .parquet, .txt, also as .gz or .zst), folders
of them, or the Hub. Out: a file is made next to its place and then moved there, so a reader never
sees half of one, and a killed run leaves the old one. A file that would come out equal is left
alone: its time stamp keeps telling when the data last changed.

What is held out is decided by the prompt: a hash of its first user turn, without case and white
space. So equal prompts, and one conversation told to different lengths, never straddle train and
val, in whatever file or source they are.
"""
import argparse
import gzip
import hashlib
import json
import os
import re
import urllib.error
import urllib.request
import zlib
from collections import Counter
from contextlib import contextmanager
from decimal import Decimal

import numpy as np

from answers import number
from model import (TAGS, Tokenizer, cannot_write, fail, load_tokenizer,
                   read_checkpoint)

# ---------------------------------------------------------------------------- writing


def write_bytes(path, content, what):
    """Put `content` at `path` atomically and print one line: where, what, how large."""
    path = str(path)
    equal = False
    if os.path.isfile(path):
        with open(path, "rb") as file:
            equal = file.read() == content
    if not equal:
        try:
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            with open(path + ".part", "wb") as file:
                file.write(content)
            os.replace(path + ".part", path)
        except OSError as e:
            cannot_write(path, e)
    state = "unchanged" if equal else "written"
    print(f"{path:<36} {what:>16} {len(content) / 1e6:8.2f} MB  {state}", flush=True)


def write_rows(path, rows):
    """One JSON object a line. Half a surrogate pair, which is no UTF-8, becomes "?"."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_bytes(path, text.encode(errors="replace"), f"{len(rows):,} rows")


def id_type(vocab_size):
    """uint16 where every id of the vocabulary fits, else uint32."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def write_ids(path, ids, vocab_size):
    """Token ids and nothing else."""
    content = np.asarray(ids, id_type(vocab_size)).tobytes()
    write_bytes(path, content, f"{len(ids):,} tokens")


def write_json(path, value):
    write_bytes(path, (json.dumps(value, ensure_ascii=False) + "\n").encode(), "json")


# ---------------------------------------------------------------------------- local files

KINDS = (".jsonl", ".json", ".parquet", ".txt", ".md")


def kind_of(path):
    """"shard-00.jsonl.zst" -> ".jsonl"."""
    name = str(path).lower().removesuffix(".gz").removesuffix(".zst")
    return os.path.splitext(name)[1]


def find_files(paths, kinds=KINDS):
    """Files as they are given, and what folders hold of these kinds, in a fixed order."""
    found = []
    for path in map(str, paths):
        if os.path.isdir(path):
            inside = sorted(os.path.join(at, name) for at, _, names in os.walk(path)
                            for name in names)
            some = [name for name in inside if kind_of(name) in kinds]
            if len(some) < len(inside):
                print(f"{path}: {len(inside) - len(some)} of {len(inside)} files are not "
                      f"{', '.join(kinds)} and were left out", flush=True)
            found += some
        elif not os.path.isfile(path):
            fail(f"{path} is missing: no such file or folder")
        elif kind_of(path) in kinds:
            found.append(path)
        else:
            fail(f"{path} is of an unknown format: expected {', '.join(kinds)}, also .gz or .zst")
    if not found:
        fail(f"{', '.join(map(str, paths))} has no file of the kinds {', '.join(kinds)}")
    return found


def unpack(raw, path):
    """An open file -> the stream of what is in it."""
    if str(path).lower().endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    if str(path).lower().endswith(".zst"):
        from backports import zstd               # Python 3.14 has it as compression.zstd
        return zstd.ZstdFile(raw)
    return raw


def read_parquet(path, columns):
    import pyarrow
    import pyarrow.parquet
    try:
        file = pyarrow.parquet.ParquetFile(path)
        columns = columns and [c for c in columns if c in file.schema_arrow.names]
        n, size, total = 0, os.path.getsize(path), max(1, file.metadata.num_rows)
        for batch in file.iter_batches(batch_size=1000, columns=columns):
            for row in batch.to_pylist():
                n += 1
                yield n, row, size * n // total
    except pyarrow.ArrowException as e:
        fail(f"{path} cannot be read as parquet ({str(e).splitlines()[0][:120]}): is it complete?")


def read_json_rows(raw, path):
    """.json: an array of rows, a single row (MATH has one a file), or after all one a line."""
    text = unpack(raw, path).read()
    try:
        value = json.loads(text)
    except ValueError:
        value = [json.loads(line) for line in text.splitlines() if line.strip()]
    for n, row in enumerate(value if isinstance(value, list) else [value], 1):
        yield n, row, raw.tell()


def read_lines(raw, path):
    for n, line in enumerate(unpack(raw, path), 1):
        if line.strip():
            try:
                yield n, json.loads(line), raw.tell()
            except ValueError as e:
                fail(f"{path}, line {n}: not JSON ({e}); every line is one object")


@contextmanager
def reading(path, what):
    """An open file; what cannot be read is one line."""
    try:
        with open(path, "rb") as raw:
            yield raw
    except ValueError as e:
        fail(f"{path} is not {what}: {e}")
    except Exception as e:
        if isinstance(e, (OSError, EOFError, zlib.error)) or type(e).__name__ == "ZstdError":
            fail(f"{path} cannot be read ({type(e).__name__}: {e}): is it complete?")
        raise


def read_file(path, columns=None):
    """-> (line or number of the row, row, bytes of the file read so far), one after another."""
    if kind_of(path) == ".parquet":
        yield from read_parquet(path, columns)
        return
    with reading(path, "JSON") as raw:
        yield from (read_lines if kind_of(path) == ".jsonl" else read_json_rows)(raw, path)


def read_text(path):
    """The whole of a text file, unpacked."""
    with reading(path, "UTF-8 text") as raw:
        return unpack(raw, path).read().decode("utf-8-sig")


def place(path, n):
    return f"{path}, {'line' if kind_of(path) == '.jsonl' else 'row'} {n}"


# ---------------------------------------------------------------------------- the Hub


def reachable():
    """Whether the Hub answers. The Hub's own client would try for a minute."""
    try:
        end = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        urllib.request.urlopen(urllib.request.Request(end, method="HEAD"), timeout=10)
    except urllib.error.HTTPError:
        pass
    except (OSError, ValueError):
        return False
    return True


def no_hub(hub, error, local):
    """The one line about a source that the Hub does not give."""
    said = " ".join(str(error).split())[:150]
    if isinstance(error, (ConnectionError, TimeoutError)) or "Offline" in type(error).__name__:
        said = "it cannot be reached from here"
    fail(f"the Hub's {hub} cannot be loaded ({type(error).__name__}: {said}). Without the Hub: "
         f"download its files elsewhere and pass them as {local}")


def load_hub(hub, config, split, local, streaming=False):
    """One split of a Hub data set, through `datasets`; what is in its cache needs no network."""
    print(f"reading {hub} {config} {split} from the Hub".replace("  ", " "), flush=True)
    if not reachable():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import datasets
        datasets.utils.logging.set_verbosity_error()
        datasets.utils.logging.disable_progress_bar()
        return datasets.load_dataset(hub, config or None, split=split, streaming=streaming)
    except Exception as e:
        no_hub(hub, e, local)


# ---------------------------------------------------------------------------- rows


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


def untagged(text):
    """A completion as it is, unless it holds a tag: that would become a control token."""
    if any(tag in text for tag in TAGS):
        raise Drop("a tag in the completion")
    return text


def numeric(text):
    """The value that the verifier reads in an answer: "1,000" -> "1000", "51.0" -> "51",
    "$18.90" -> "18.9", "-\\frac{1}{2}" -> "-1/2"."""
    value = number(text)
    if value is None:
        raise Drop("the answer is not a number")
    if "." in text and value.denominator > 1:
        return str(Decimal(value.numerator) / value.denominator)
    return str(value)


ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant",
         "system": "system"}


def as_messages(value):
    """A string, {"role", "content"} rows or ShareGPT's {"from", "value"} rows -> messages."""
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list) or not all(isinstance(m, dict) for m in value):
        raise ValueError("a dialogue is a text or a list of {'role', 'content'}")
    messages = [{"role": field(m, "role", "from"), "content": field(m, "content", "value")}
                for m in value]
    if not all(m["content"] for m in messages):
        raise Drop("empty text")
    if not all(m["role"] in ROLES for m in messages):
        raise Drop("a role other than system, user and assistant")
    return [m | {"role": ROLES[m["role"]]} for m in messages]


def dialogue(messages, last):
    """The messages, if they are [system,] user, assistant, user ... and end with `last`."""
    said = [m["role"] for m in messages]
    said = said[1:] if said[:1] == ["system"] else said
    if not said or said[-1] != last:
        raise Drop(f"the last turn is not the {last}'s")
    if said != [("user", "assistant")[i % 2] for i in range(len(said))]:
        raise Drop("the turns do not alternate")
    return messages


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
    sides = []
    for key in ("chosen", "rejected"):
        said = row[key] if key in row else field(row, key)
        if isinstance(said, str):
            sides.append(([], said.strip()))
            continue
        *before, last = as_messages([said] if isinstance(said, dict) else said)
        if last["role"] != "assistant":
            raise Drop("the last turn is not the assistant's")
        sides.append((before, last["content"]))
    (prompt, chosen), (other, rejected) = sides
    if prompt != other:
        raise Drop("the two prompts differ")
    named = next((row[k] for k in ("prompt", "conversations", "instruction") if k in row), None)
    if named is None and not prompt:
        raise ValueError("no 'prompt', and none in 'chosen'")
    return pair(prompt or as_messages(named), chosen, rejected)


def said_first(row):
    """What decides where a row belongs: the first user turn, without case and white space."""
    prompt = row.get("prompt") or row.get("messages")
    if not isinstance(prompt, str):
        prompt = next(m["content"] for m in prompt if m["role"] == "user")
    return " ".join(prompt.lower().split())


def draw(text):
    """Text -> [0, 1), evenly, the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode(errors="replace")).digest()[:8], "big") / 2**64


def read_part(args, part):
    """("train" or "test") -> (where, row) of its files, or of the Hub, or nothing."""
    files, split = getattr(args, part), args.split if part == "train" else args.test_split
    if files:
        for path in find_files(files, (".jsonl", ".json", ".parquet")):
            for n, row, _ in read_file(path):
                yield place(path, n), row
    elif not args.train and not args.test and split:
        if not args.hub:
            fail("no rows to read: give --train FILE, or --hub owner/name")
        for config in args.config.split(","):
            rows = load_hub(args.hub, config, split, f"--{part} FILE")
            for n, row in enumerate(rows, 1):
                yield f"{args.hub} {split}, row {n}", row


def convert_rows(args, part, convert):
    """The rows of a part, each through convert(row) -> new row. Says what became of them."""
    kept, dropped, seen, read = [], Counter(), set(), 0
    for where, row in read_part(args, part):
        read += 1
        try:
            if not isinstance(row, dict):
                raise ValueError("not an object")
            new = convert(row)
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
        print(f"{part}: {read:,} rows read, {len(kept):,} kept, {read - len(kept):,} dropped"
              + (f" ({why})" if why else ""), flush=True)
        if not kept:
            fail(f"{part}: no row is left: {why}")
    return kept


def split_rows(args, convert):
    """-> {"train", "val", "test": rows}; a part without rows is not there.

    The source's own test rows stay test rows, and training rows that ask the same are dropped."""
    train, test = (convert_rows(args, part, convert) for part in ("train", "test"))
    parts = {"train": [], "val": [], "test": test}
    asked, low = {said_first(row) for row in test}, 0 if test else args.test_share
    same = 0
    for row in train:
        key = said_first(row)
        x = draw(key)
        if key in asked:
            same += 1
        else:
            part = "test" if x < low else "val" if x < low + args.val_share else "train"
            parts[part].append(row)
    if same:
        print(f"train: {same:,} more dropped (their prompts are in test)", flush=True)
    if train and not (parts["train"] and parts["val"]):
        fail(f"{len(train) - same} rows leave nothing for train or val at --val_share "
             f"{args.val_share} and --test_share {args.test_share}: change these, or give more")
    if not train and not test:
        fail("there are no rows: the files are empty")
    return {part: rows for part, rows in parts.items() if rows}


# ---------------------------------------------------------------------------- command line


def cli(doc, name, hub="", config="", split="train", test_split=""):
    """A parser with the flags that all preparers of rows share. `check` follows it."""
    parser = argparse.ArgumentParser(description=doc,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", nargs="+", default=[], metavar="FILE",
                        help="local files or folders; without any, the Hub")
    parser.add_argument("--test", nargs="+", default=[], metavar="FILE",
                        help="the source's own test rows, never trained on")
    for flag, default, said in [
            ("hub", hub, "Hub id owner/name"), ("config", config, "its configuration"),
            ("split", split, "its split to train on"), ("test_split", test_split, "its test split"),
            ("val_share", 0.05, "share of the prompts held out as val"),
            ("test_share", 0.0, "and as test, where the source has no test rows"),
            ("out", f"out/data/{name}", "folder")]:
        parser.add_argument(f"--{flag}", type=type(default), default=default,
                            help=f"{said} (%(default)r)")
    return parser


def add_tokenizer(parser):
    parser.add_argument("--tokenizer", default="gpt2",
                        help="gpt2 (by tiktoken), a tokenizer.json, or a checkpoint .pt ('gpt2')")


def check(args):
    if os.path.exists(args.out) and not os.path.isdir(args.out):
        fail(f"{args.out} is a file; give --out a folder")
    val, test = getattr(args, "val_share", 0.05), getattr(args, "test_share", 0.0)
    if not 0 < val < 1 or not 0 <= test < 1 - val:
        fail("--val_share must lie above 0, --test_share from 0, and their sum below 1")
    return args


def find_tokenizer(name):
    """gpt2, a tokenizer.json or a checkpoint -> Tokenizer."""
    if name == "gpt2":
        return Tokenizer({"kind": "tiktoken", "name": "gpt2"})
    if name.endswith(".pt"):
        return Tokenizer(read_checkpoint(name)["tokenizer"])
    if not name.endswith(".json"):
        fail(f"--tokenizer {name}: expected gpt2, a tokenizer.json or a checkpoint .pt")
    if not os.path.isfile(name):
        fail(f"--tokenizer {name} is missing")
    try:
        return load_tokenizer(name)
    except Exception as e:
        fail(f"--tokenizer {name} is no tokenizer.json ({' '.join(str(e).split())[:120]})")


def prepare(args, kind, convert):
    """All of a preparer whose rows are converted one by one: read, split, write KIND_*.jsonl."""
    for part, rows in split_rows(args, convert).items():
        write_rows(f"{args.out}/{kind}_{part}.jsonl", rows)
