"""data/text.py: any text -> train.bin, val.bin and tokenizer.json for 00_pretrain.py.

    python data/text.py tinystories              a name: pile, fineweb-edu, openwebtext, tinystories
    python data/text.py fineweb-edu --tokens 2500000000           the first 2.5 billion tokens of it
    python data/text.py HuggingFaceFW/fineweb --config sample-10BT          any other id of the Hub
    python data/text.py corpus/ more.jsonl.zst --out out/data/mine          local files and folders
    python data/text.py wiki.txt --separator "\\n" --tokenizer tokenizer.json

Local files are .jsonl, .json, .csv or .parquet with the text under --key, or .txt and .md; all also
as .gz or .zst. A .txt file is one document unless --separator (a regular expression; the default is
<|endoftext|>) says where the next begins; it is read whole, so large text is better kept as .jsonl.

Each document is followed by the end token, and its hash decides whether it is train or val. All
cores encode; one process reads and writes, in order. So the files do not depend on --workers, and
an interrupted run continues where it was (text.part.json in --out knows) and ends in the same
bytes; what an earlier run made stays until the new files are whole.
"""
# These first: they make Ctrl-C a line while the rest is imported.
from common import (NewSet, about_ids, add_flags, add_tokenizer, draw, find_files, find_tokenizer,
                    id_type, kind_of, load_hub, no_hub, place, read_file, read_text, reading)
from model import (Parser, Progress, Tokenizer, cannot_write, check_ranges, fail, parse_json, say,
                   write_text)

import gc
import json
import os
import re
import signal
import threading
import time
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np

SOURCES = {"pile": ("monology/pile-uncopyrighted", ""),
           "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT"),
           "openwebtext": ("Skylion007/openwebtext", ""),
           "tinystories": ("roneneldan/TinyStories", "")}
PARTS = ("train", "val")
FILES = ("train.bin", "train.bin.json", "val.bin", "val.bin.json", "tokenizer.json", "text.json")
PIECE = 1_000_000       # characters that a worker gets at once
SECONDS = 5             # between two records of where we are

# ---------------------------------------------------------------------------- documents
# A source is (an iterator of (document, share of the source read, or None), where it is now).


def local_source(files, key, separator, at):
    """Documents of local files, from the place `at` on."""
    at = at or {"file": 0, "row": 0}
    sizes = [os.path.getsize(path) for path in files]

    def documents():
        for i in range(at["file"], len(files)):
            skip = at["row"]
            for n, text, read in texts(files[i], key, separator):
                if n > skip:
                    at.update(file=i, row=n)
                    yield text, (sum(sizes[:i]) + read) / max(1, sum(sizes))
            at.update(file=i + 1, row=0)

    return documents(), lambda: dict(at)


def texts(path, key, separator):
    """-> (number, text, bytes of the file read so far) of each document of a file."""
    if kind_of(path) not in (".txt", ".md"):
        for n, row, read in read_file(path, [key]):
            yield n, text_of(row, key, place(path, n)), read
        return
    for n, piece in enumerate(re.split(separator, read_text(path)), 1):
        yield n, (piece or "").strip(), os.path.getsize(path)


def text_of(row, key, where):
    if not isinstance(row, dict) or not isinstance(row.get(key, 0), (str, type(None))):
        has = f"it has {', '.join(map(str, row))[:80]}" if isinstance(row, dict) else "no object"
        fail(f"{where}: no text under {key!r} ({has}); --key names the field that holds the text")
    return row[key] or ""


def hub_source(hub, config, split, key, at):
    """Documents of a Hub data set, streamed: nothing is kept on disk but the ids."""
    data = load_hub(hub, config, split, "data/text.py FILE", streaming=True)
    about = (data.info.splits or {}).get(split)
    total, at = about and about.num_examples, at or {"read": 0, "state": None}
    if at["state"]:
        data.load_state_dict(at["state"])

    def documents():
        try:
            for row in data:
                at["read"] += 1
                yield (text_of(row, key, f"{hub} {split}, row {at['read']}"),
                       at["read"] / total if total else None)
        except Exception as e:
            no_hub(hub, e, "data/text.py FILE; or run the same command again, which continues")

    return documents(), lambda: {"read": at["read"], "state": data.state_dict()}


def find_source(args):
    """The command line's sources -> what identifies them, and open(at) -> a source."""
    if all(map(os.path.exists, args.sources)):
        files = find_files(args.sources)
        stats = [(path, os.path.getsize(path), os.stat(path).st_mtime_ns) for path in files]
        return stats, lambda at: local_source(files, args.key, args.separator, at)
    first = args.sources[0]
    hub, config = SOURCES.get(first, (first, ""))
    if len(args.sources) > 1 or kind_of(first):
        gone = next(path for path in args.sources if not os.path.exists(path))
        fail(f"{gone} is missing: no such file or folder")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", hub):
        fail(f"unknown source {first!r}: expected {', '.join(SOURCES)}, a Hub id owner/name, "
             "or local files and folders")
    config = args.config or config
    return [hub, config, args.split], lambda at: hub_source(hub, config, args.split, args.key, at)


def pieces(documents, position):
    """Documents in lists of about PIECE characters, each with the place behind it."""
    some, size, done = [], 0, None
    for text, done in documents:
        some.append(text)
        size += len(text)
        if size >= PIECE:
            yield some, position(), done
            some, size = [], 0
    if some:
        yield some, position(), done


# ---------------------------------------------------------------------------- workers


def start_worker(spec, val_share, parent):
    """Runs once in each worker. Ctrl-C is the parent's; without a parent there is no work."""
    global tokenizer, share
    tokenizer, share = Tokenizer(spec), val_share
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def encode(some):
    """Documents -> the bytes of their ids, train and val apart, and what was counted. ValueError
    on a character that the tokenizer lacks."""
    ids, count = {part: [] for part in PARTS}, Counter(read=len(some))
    for text in some:
        raw = text.encode(errors="replace")            # half a surrogate pair becomes "?"
        if not text.strip():
            count["empty"] += 1
            continue
        part = "val" if draw(text) < share else "train"
        before = len(ids[part])
        try:
            ids[part] += tokenizer.encode(raw.decode()) + [tokenizer.end]
        except ValueError as e:
            raise ValueError(f"{e}, for the document that begins {text.strip()[:40]!r}") from None
        count.update({part: 1, f"{part}_tokens": len(ids[part]) - before, "bytes": len(raw)})
    kind = id_type(tokenizer.vocab_size)
    return {part: np.array(ids[part], kind).tobytes() for part in PARTS}, count


def encode_all(pool, source, workers):
    """The source's pieces, encoded, in their order; only a few wait at a time."""
    waiting = deque()
    for some, position, done in pieces(*source):
        waiting.append((pool.submit(encode, some), position, done))
        if len(waiting) > 2 * workers:
            future, *rest = waiting.popleft()
            yield *future.result(), *rest
    for future, *rest in waiting:
        yield *future.result(), *rest


# ---------------------------------------------------------------------------- where we are


def resume(out, record):
    """What text.part.json says of an interrupted run with this very record; a new run's state; or
    None if there is nothing left to do: text.json is the record of the files that are there."""
    begun, done = read_state(f"{out}/text.part.json"), read_state(f"{out}/text.json")
    if begun is not None:
        other = [k for k in record if begun["record"].get(k) != record[k]]
        if other:
            fail(f"{out}/text.part.json is an unfinished run with other {', '.join(other)}: delete "
                 "it to start afresh, or choose another --out")
        return begun
    if done and done["record"] == record and all(os.path.isfile(f"{out}/{f}") for f in FILES):
        return None
    return {"record": record, "position": None, "count": {}}


def read_state(path):
    if not os.path.isfile(path):
        return None
    with reading(path, "JSON") as f:
        text = f.read()
    try:
        state = parse_json(text)
        state["record"].items(), state["position"], state["count"].items()
    except (ValueError, LookupError, TypeError, AttributeError):
        fail(f"{path} is damaged: delete it to start afresh")
    return state


def open_parts(out, state, width):
    """The two files that grow, cut back to what text.part.json has recorded."""
    files = {}
    for part in PARTS:
        path, size = f"{out}/{part}.bin.part", state["count"].get(f"{part}_tokens", 0) * width
        if size and (not os.path.isfile(path) or os.path.getsize(path) < size):
            fail(f"{path} holds less than {out}/text.part.json says: delete text.part.json to "
                 "start afresh")
        try:
            files[part] = open(path, "r+b" if size else "wb")
            files[part].truncate(size)
            files[part].seek(size)
        except OSError as e:
            cannot_write(path, e)
    return files


def record_state(out, state, files):
    """First the ids are on disk, then text.part.json says so."""
    for file in files.values():
        file.flush()
        os.fsync(file.fileno())
    write_text(f"{out}/text.part.json", json.dumps(state) + "\n")


def forget(out):
    """What this run has begun cannot become a set."""
    for name in ("text.part.json", "train.bin.part", "val.bin.part"):
        if os.path.isfile(f"{out}/{name}"):
            os.remove(f"{out}/{name}")


def reporter(args, count):
    """progress(count, share of the source or None): percents and time left, where they are known;
    else a line from time to time."""
    first, begun, shown = count["train_tokens"] + count["val_tokens"], time.monotonic(), []

    def progress(count, share):
        tokens = count["train_tokens"] + count["val_tokens"]
        speed = (tokens - first) / (time.monotonic() - begun)
        text = f"{tokens:,} tokens  {speed:,.0f} tokens/s"
        if args.tokens:
            share = min(1, max(share or 0, count["train_tokens"] / args.tokens))
        if share is not None:
            shown[:] = shown or [Progress(args.name, 100, int(100 * share))]
            shown[0](int(100 * share), text)
        elif not shown or time.monotonic() > shown[-1] + 6 * SECONDS:
            shown.append(time.monotonic())
            say(f"{args.name:>12}  {text}")

    return progress


# ---------------------------------------------------------------------------- all of it


def run(args, source, state, tokenizer, workers):
    """Encode what is left of the source into the .part files -> counts of all of it."""
    width = id_type(tokenizer.vocab_size)().itemsize
    files, count = open_parts(args.out, state, width), Counter(state["count"])
    progress, saved = reporter(args, count), 0.0
    gc.collect()       # an earlier pool's remains, collected in a forked worker, would stop it
    pool = ProcessPoolExecutor(workers, initializer=start_worker,
                               initargs=(tokenizer.spec, args.val_share, os.getpid()))
    try:
        pool.submit(int).result()          # the workers start now, before the Hub's threads
        enough = lambda: 0 < args.tokens <= count["train_tokens"]
        if not enough():
            for ids, new, position, done in encode_all(pool, source(state["position"]), workers):
                for part in PARTS:
                    files[part].write(ids[part])
                count.update(new)
                state |= {"position": position, "count": dict(count)}
                if time.monotonic() - saved > SECONDS:
                    record_state(args.out, state, files)
                    saved = time.monotonic()
                progress(count, done)
                if enough():
                    break
        record_state(args.out, state, files)
    except OSError as e:
        cannot_write(f"{args.out}/*.bin.part", e)
    except (BrokenProcessPool, MemoryError):
        fail("a worker process died (no memory?); the same command, with fewer --workers, goes on")
    except ValueError as e:
        forget(args.out)
        fail(f"the tokenizer cannot write this text: {e}")
    except KeyboardInterrupt:
        fail(f"stopped after {count['read']:,} documents; the same command continues", 130)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for file in files.values():
            file.close()
    return count


def finish(args, new, state, tokenizer, count):
    """Say what was read and put the files in place."""
    say(f"{args.name}: {count['read']:,} documents read, {count['train'] + count['val']:,} kept "
        f"({count['train']:,} train, {count['val']:,} val), {count['empty']:,} dropped (empty)")
    if not count["train"] or not count["val"]:
        forget(args.out)
        fail(f"{count['read']} documents leave nothing for train or val at --val_share "
             f"{args.val_share}: raise it, or say with --separator where documents end in .txt")
    tokens = {part: count[f"{part}_tokens"] for part in PARTS}
    for part in PARTS:
        path = f"{part}.bin.part"
        ids = np.memmap(f"{args.out}/{path}", id_type(tokenizer.vocab_size), "r")
        new.take(f"{part}.bin", path, f"{tokens[part]:,} tokens")
        new.json(f"{part}.bin.json", about_ids(ids, tokenizer))
    new.json("tokenizer.json", tokenizer.spec)
    new.take("text.json", "text.part.json", "json")
    say(f"{args.out}: {tokens['train']:,} tokens in train.bin, {tokens['val']:,} in val.bin, "
        f"{count['bytes'] / (sum(tokens.values()) - count['train'] - count['val']):.2f} bytes "
        "a token")


def parse(argv):
    parser = Parser(__doc__)
    parser.add_argument("sources", nargs="+", help="a name, a Hub id, or files and folders")
    add_tokenizer(parser)
    add_flags(
        parser, ("key", "text", "the field that holds the text"),
        ("separator", r"<\|endoftext\|>", "between documents of a .txt file"),
        ("config", "", "configuration of a Hub data set"), ("split", "train", "and its split"),
        ("tokens", 0, "stop after so many train tokens; 0: all"),
        ("val_share", 0.01, "share of the documents held out"),
        ("workers", 0, "processes; 0: all cores"), ("out", "", "folder; '': out/data/NAME"))
    args = parser.parse_args(argv)
    last = os.path.basename(args.sources[0].rstrip("/"))
    args.name = re.sub(r"\W+", "-", last.split(".")[0].lower()).strip("-") or "text"
    args.out = args.out or f"out/data/{args.name}"
    check_ranges(vars(args), "text")
    try:
        re.compile(args.separator)
    except re.error as e:
        fail(f"--separator {args.separator!r} is no regular expression: {e}")
    return args


def main(argv=None):
    os.environ["TOKENIZERS_PARALLELISM"] = "false"     # the workers are the parallelism
    args = parse(argv)
    identity, source = find_source(args)
    with NewSet(args.out, "text") as new:
        tokenizer = find_tokenizer(args.tokenizer)
        spec = json.dumps(tokenizer.spec, sort_keys=True)
        record = {"source": identity, "tokenizer": draw(spec)}
        record |= {k: getattr(args, k) for k in ("key", "separator", "tokens", "val_share")}
        state = resume(args.out, json.loads(json.dumps(record)))
        if state is None:
            say(f"{args.out} is up to date")
            return
        new.claim(FILES)
        count = run(args, source, state, tokenizer, args.workers or os.cpu_count())
        finish(args, new, state, tokenizer, count)


if __name__ == "__main__":
    main()
