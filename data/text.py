"""data/text.py: any text -> train.bin, val.bin and tokenizer.json for 00_pretrain.py.

    python data/text.py tinystories              a name: pile, fineweb-edu, openwebtext, tinystories
    python data/text.py fineweb-edu --tokens 2500000000           the first 2.5 billion tokens of it
    python data/text.py HuggingFaceFW/fineweb --config sample-10BT          any other id of the Hub
    python data/text.py corpus/ more.jsonl.zst --out out/data/mine          local files and folders
    python data/text.py wiki.txt --separator "\\n" --tokenizer tokenizer.json

Local files are .jsonl, .json or .parquet with the text under --key, or .txt and .md; all also as
.gz or .zst. A .txt file is one document unless --separator (a regular expression; <|endoftext|> is
the default) says where the next begins; it is read whole, so large text is better kept as .jsonl.

Each document is followed by the end token, and its hash decides whether it is train or val. All
cores encode; one process reads and writes, in order. So the files do not depend on --workers, and
an interrupted run continues where it was (text.json in --out knows) and ends in the same bytes.
"""
import argparse
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

from common import (add_tokenizer, check, draw, find_files, find_tokenizer, id_type, kind_of,
                    load_hub, no_hub, place, read_file, read_text, write_json)
from model import Tokenizer, cannot_write, fail, write_text

SOURCES = {"pile": ("monology/pile-uncopyrighted", ""),
           "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT"),
           "openwebtext": ("Skylion007/openwebtext", ""),
           "tinystories": ("roneneldan/TinyStories", "")}
PARTS = ("train", "val")
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
    """Documents -> the bytes of their ids, train and val apart, and what was counted."""
    ids, count = {part: [] for part in PARTS}, Counter(read=len(some))
    for text in some:
        raw = text.encode(errors="replace")            # half a surrogate pair becomes "?"
        if not text.strip():
            count["empty"] += 1
            continue
        part = "val" if draw(text) < share else "train"
        before = len(ids[part])
        ids[part] += tokenizer.encode(raw.decode()) + [tokenizer.end]
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
    """What text.json says of an interrupted run with this very record; a new run's state; or None
    if there is nothing left to do."""
    path = f"{out}/text.json"
    new = {"record": record, "finished": False, "position": None, "count": {}}
    if not os.path.isfile(path):
        return new
    try:
        with open(path) as f:
            state = json.load(f)
        other = [k for k in record if state["record"].get(k) != record[k]]
        finished = state["finished"]
    except (ValueError, KeyError, AttributeError, TypeError):
        fail(f"{path} is damaged: delete it to start afresh")
    if other and not finished:
        fail(f"{path} is an unfinished run with other {', '.join(other)}: delete it to start "
             "afresh, or choose another --out")
    if not other and finished:
        publish(out)
        if all(os.path.isfile(f"{out}/{name}") for name in ("train.bin", "val.bin",
                                                            "tokenizer.json")):
            return None
    return new if finished else state


def publish(out):
    for part in PARTS:
        if os.path.isfile(f"{out}/{part}.bin.part"):
            os.replace(f"{out}/{part}.bin.part", f"{out}/{part}.bin")


def open_parts(out, state, width):
    """The two files that grow, cut back to what text.json has recorded."""
    files = {}
    for part in PARTS:
        path, size = f"{out}/{part}.bin.part", state["count"].get(f"{part}_tokens", 0) * width
        if size and (not os.path.isfile(path) or os.path.getsize(path) < size):
            fail(f"{path} holds less than {out}/text.json says: delete text.json to start afresh")
        files[part] = open(path, "r+b" if size else "wb")
        files[part].truncate(size)
        files[part].seek(size)
    return files


def record_state(out, state, files):
    """First the ids are on disk, then text.json says so."""
    for file in files.values():
        file.flush()
        os.fsync(file.fileno())
    write_text(f"{out}/text.json", json.dumps(state) + "\n")


class Progress:
    """A line from time to time: how far, tokens a second, time left."""

    def __init__(self, name, tokens):
        self.name, self.begun, self.first, self.last = name, time.monotonic(), tokens, 0.0
        self.share = None

    def __call__(self, tokens, done):
        now = time.monotonic()
        self.share = self.share if self.share is not None else done or 0.0
        if now - self.last < SECONDS:
            return
        self.last = now
        speed, left = (tokens - self.first) / (now - self.begun), ""
        if done and done > self.share:
            seconds = int((now - self.begun) / (done - self.share) * max(0, 1 - done))
            left = f"  {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"
        print(f"{self.name}: {f'{100 * done:5.1f} %  ' if done else ''}{tokens:,} tokens  "
              f"{speed:,.0f} tokens/s{left}", flush=True)


# ---------------------------------------------------------------------------- all of it


def run(args, source, state, tokenizer, workers):
    """Encode what is left of the source into the .part files -> counts of all of it."""
    width = id_type(tokenizer.vocab_size)().itemsize
    files, count = open_parts(args.out, state, width), Counter(state["count"])
    progress, saved = Progress(args.name, count["train_tokens"] + count["val_tokens"]), 0.0
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
                tokens = count["train_tokens"]
                progress(tokens + count["val_tokens"],
                         min(1, max(done or 0, tokens / args.tokens)) if args.tokens else done)
                if enough():
                    break
        record_state(args.out, state, files)
    except OSError as e:
        cannot_write(f"{args.out}/*.bin.part", e)
    except BrokenProcessPool:
        fail("a worker process died (no memory?); the same command, with fewer --workers, goes on")
    except ValueError as e:
        fail(f"the tokenizer cannot encode this text: {e}")
    except KeyboardInterrupt:
        fail(f"stopped after {count['read']:,} documents; the same command continues", 130)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for file in files.values():
            file.close()
    return count


def finish(args, state, tokenizer, count):
    """Say what was read and give the files their names."""
    print(f"{args.name}: {count['read']:,} documents read, {count['train'] + count['val']:,} kept "
          f"({count['train']:,} train, {count['val']:,} val), {count['empty']:,} dropped (empty)",
          flush=True)
    if not count["train"] or not count["val"]:
        for name in ("text.json", "train.bin.part", "val.bin.part"):
            os.remove(f"{args.out}/{name}")
        fail(f"{count['read']} documents leave nothing for train or val at --val_share "
             f"{args.val_share}: raise it, or say with --separator where documents end in .txt")
    write_json(f"{args.out}/tokenizer.json", tokenizer.spec)
    write_text(f"{args.out}/text.json", json.dumps(state | {"finished": True}) + "\n")
    publish(args.out)
    tokens = {part: count[f"{part}_tokens"] for part in PARTS}
    print(f"{args.out}: {tokens['train']:,} tokens in train.bin, {tokens['val']:,} in val.bin, "
          f"{count['bytes'] / (sum(tokens.values()) - count['train'] - count['val']):.2f} bytes "
          "a token", flush=True)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", help="a name, a Hub id, or files and folders")
    add_tokenizer(parser)
    for flag, default, said in [
            ("key", "text", "the field that holds the text"),
            ("separator", r"<\|endoftext\|>", "between documents of a .txt file"),
            ("config", "", "configuration of a Hub data set"), ("split", "train", "and its split"),
            ("tokens", 0, "stop after so many train tokens; 0: all"),
            ("val_share", 0.01, "share of the documents held out"),
            ("workers", 0, "processes; 0: all cores"), ("out", "", "folder; '': out/data/NAME")]:
        parser.add_argument(f"--{flag}", type=type(default), default=default,
                            help=f"{said} ({default!r})".replace("%", "%%"))
    args = parser.parse_args(argv)
    last = os.path.basename(args.sources[0].rstrip("/"))
    args.name = re.sub(r"\W+", "-", last.split(".")[0].lower()).strip("-") or "text"
    args.out = args.out or f"out/data/{args.name}"
    if args.tokens < 0 or args.workers < 0:
        fail("--tokens and --workers must be 0 or more")
    try:
        re.compile(args.separator)
    except re.error as e:
        fail(f"--separator {args.separator!r} is no regular expression: {e}")
    return check(args)


def main(argv=None):
    os.environ["TOKENIZERS_PARALLELISM"] = "false"     # the workers are the parallelism
    args = parse(argv)
    identity, source = find_source(args)
    tokenizer = find_tokenizer(args.tokenizer)
    record = {"source": identity, "tokenizer": draw(json.dumps(tokenizer.spec, sort_keys=True))}
    record |= {k: getattr(args, k) for k in ("key", "separator", "tokens", "val_share")}
    try:
        os.makedirs(args.out, exist_ok=True)
        state = resume(args.out, json.loads(json.dumps(record)))
        if state is None:
            print(f"{args.out} is up to date", flush=True)
            return
        count = run(args, source, state, tokenizer, args.workers or os.cpu_count())
    except OSError as e:
        cannot_write(args.out, e)
    finish(args, state, tokenizer, count)


if __name__ == "__main__":
    main()
