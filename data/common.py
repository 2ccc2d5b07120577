"""What every preparer in data/ shares: the command line, files in, a set of files out.

In: files in the source's own format (.jsonl, .json, .csv, .parquet, .txt, also as .gz or .zst),
folders of them, or the Hub. Out: the files that one run makes are a set. It is written aside and
put in place whole, and takes away what an earlier run of the same script left there, so that no old
test question lies beside new training rows. A killed run leaves the old set or the new one. A file
that would come out equal is left alone: its time stamp keeps telling when the data last changed.
What a row means is in rows.py.
"""
import os
import signal
import sys


def stopped(*_):
    print("stopped", file=sys.stderr, flush=True)
    os._exit(130)


handler = signal.signal(signal.SIGINT, stopped)   # the imports take seconds, and do not unwind well

import csv  # noqa: E402
import fcntl  # noqa: E402
import filecmp  # noqa: E402
import gzip  # noqa: E402
import hashlib  # noqa: E402
import io  # noqa: E402
import json  # noqa: E402
import shutil  # noqa: E402
import time  # noqa: E402
import urllib.error  # noqa: E402
import urllib.request  # noqa: E402
import zlib  # noqa: E402
from contextlib import contextmanager, suppress  # noqa: E402

import numpy as np  # noqa: E402

from model import (Tokenizer, cannot_read, cannot_write, fail,  # noqa: E402
                   load_tokenizer, make_tokenizer, parse_json, read_checkpoint, say,
                   write_text)

signal.signal(signal.SIGINT, handler)


# ---------------------------------------------------------------------------- writing

# In --out: the folder of a set in the making, the file that says whose it is, the list of sets.
WORK, MARK, MANIFEST = ".preparing", "by-a-preparer", "prepared.json"


def id_type(vocab_size):
    """uint16 where every id of the vocabulary fits, else uint32."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def about_ids(ids, tokenizer):
    """What NAME.bin.json says of NAME.bin: a stage can then tell that it is whole, and its own."""
    edges = ids[: 2**20].tobytes() + ids[-(2**20):].tobytes() + str(len(ids)).encode()
    spec = json.dumps(tokenizer.spec, sort_keys=True)
    return {"dtype": str(ids.dtype), "count": len(ids), "max_id": int(ids.max(initial=0)),
            "tokenizer": hashlib.sha256(spec.encode()).hexdigest(),
            "edges": hashlib.sha256(edges).hexdigest()}


class NewSet:
    """with NewSet(out, "svamp") as new: new.rows("rl_train.jsonl", rows) ...

    All files are written to out/.preparing and put in place at the end of the block; an error in it
    leaves `out` as it was. out/prepared.json says which script made which files: its own are
    replaced or removed, those of others and of nobody are never touched. `of` names the file that
    this one is drawn from: when that changes, this set goes.
    """

    def __init__(self, out, maker, of=""):
        self.out, self.maker, self.of, self.made = out, maker, of, {}
        self.work, self.is_new = f"{out}/{WORK}", not os.path.isdir(out)

    def __enter__(self):
        if not self.out:
            fail("--out is empty: give it a folder")
        if os.path.lexists(self.out) and not os.path.isdir(self.out):
            fail(f"--out {self.out} is a file, or a link to nowhere; give --out a folder")
        try:
            os.makedirs(self.out, exist_ok=True)
            self.lock = lock(self.out)
        except BlockingIOError:
            fail(f"another preparer is at work in {self.out}: wait for it, or choose another --out")
        except (OSError, ValueError) as e:
            fail(f"--out {self.out!r} cannot be made ({e}): choose another")
        try:
            put_in_place(self.out)                           # what a killed run had begun
            self.listed = read_manifest(self.out)
            if os.path.lexists(self.work) and os.listdir(self.work) and (
                    not os.path.isfile(f"{self.work}/{MARK}")):
                fail(f"{self.work} is not a preparer's: move it away, or choose another --out")
            shutil.rmtree(self.work, ignore_errors=True)
            os.mkdir(self.work)
            open(f"{self.work}/{MARK}", "x").close()
        except OSError as e:
            self.unlock()
            fail(f"--out {self.out} cannot be written to ({e.strerror}): choose another")
        except SystemExit:
            self.unlock()
            raise
        return self

    def __exit__(self, kind, *_):
        try:
            if kind is None and self.made:
                self.commit()
        finally:
            with suppress(OSError):                          # the next start tries it again
                put_in_place(self.out)                       # the rest, after a Ctrl-C
                shutil.rmtree(self.work, ignore_errors=True)
            self.unlock()
        if kind is KeyboardInterrupt:
            fail(f"stopped; {self.out} is as it was", 130)

    def unlock(self):
        if self.is_new and not os.listdir(self.out):
            os.rmdir(self.out)
        with suppress(OSError):
            fcntl.flock(self.lock, fcntl.LOCK_UN)
        os.close(self.lock)

    def write(self, name, content):
        try:
            with open(f"{self.work}/{name}", "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as e:
            cannot_write(f"{self.out}/{name}", e)

    def bytes(self, name, content, what):
        self.write(name, content)
        self.made[name] = f"{WORK}/{name}", what

    def rows(self, name, rows):
        """One JSON object a line. Half a surrogate pair, which is no UTF-8, becomes "?"."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self.bytes(name, text.encode(errors="replace"), f"{len(rows):,} rows")

    def json(self, name, value):
        self.bytes(name, (json.dumps(value, ensure_ascii=False) + "\n").encode(), "json")

    def ids(self, name, ids, tokenizer):
        """NAME.bin: token ids and nothing else; and NAME.bin.json."""
        ids = np.asarray(ids, id_type(tokenizer.vocab_size))
        self.bytes(name, ids.tobytes(), f"{len(ids):,} tokens")
        self.json(f"{name}.json", about_ids(ids, tokenizer))

    def take(self, name, path, what):
        """A file that lies in `out` under another name."""
        self.made[name] = path, what

    def claim(self, names):
        """Refuse where this set would replace a file that is not this script's."""
        own = self.listed.get(self.maker, {}).get("files", [])
        for name in names:
            path = f"{self.out}/{name}"
            if name in own or not os.path.lexists(path) or self.equal(name):
                continue
            by = next((f"data/{k.split()[0]}.py made" for k, v in self.listed.items()
                       if name in v["files"]), "no preparer made")
            fail(f"{path} is there, and {by} it: move it away, or choose another --out")

    def equal(self, name):
        """Whether the file is there already, just as it was made now."""
        path = f"{self.out}/{name}"
        return os.path.isfile(path) and name in self.made and filecmp.cmp(
            path, f"{self.out}/{self.made[name][0]}", shallow=False)

    def commit(self):
        """Write down what is to be done, then do it; what is interrupted is done at next start."""
        self.claim(self.made)
        was = self.listed.pop(self.maker, {}).get("files", [])
        exists = lambda name: os.path.isfile(f"{self.out}/{name}")
        move = {name: path for name, (path, _) in self.made.items() if not self.equal(name)}
        gone = [name for name in was if name not in self.made and exists(name)]
        left = [path for name, (path, _) in self.made.items()
                if name not in move and os.path.dirname(path) != WORK]
        for key, other in list(self.listed.items()):
            if other.get("of") in [*move, *gone]:
                gone += filter(exists, self.listed.pop(key)["files"])
        self.listed[self.maker] = {"files": list(self.made)} | ({"of": self.of} if self.of else {})
        sizes = {name: os.path.getsize(f"{self.out}/{path}")
                 for name, (path, _) in self.made.items()}
        if read_manifest(self.out) != self.listed:
            self.write(MANIFEST, json.dumps(self.listed, indent=1).encode() + b"\n")
            move[MANIFEST] = f"{WORK}/{MANIFEST}"
        if move or gone or left:
            self.write("plan.new", json.dumps({"remove": gone + left, "move": move}).encode())
            try:
                os.replace(f"{self.work}/plan.new", f"{self.work}/plan.json")
                put_in_place(self.out)
            except OSError as e:
                cannot_write(self.out, e)
        for name, (_, what) in self.made.items():
            state = "written" if name in move else "unchanged"
            say(f"{self.out + '/' + name:<36} {what:>16} {sizes[name] / 1e6:8.2f} MB  {state}")
        for name in gone:
            say(f"{self.out + '/' + name:<36} {'of an earlier run':>16} {'':11}  removed")


def lock(folder, seconds=5):
    """A lock that ends with this process, or with the last of the workers that it has forked: they
    leave within a second of a killed parent."""
    opened, begun = os.open(folder, os.O_RDONLY), time.monotonic()
    while True:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return opened
        except BlockingIOError:
            if time.monotonic() > begun + seconds:
                raise
            time.sleep(0.1)
        except OSError:
            return opened                                    # a disk without locks


def put_in_place(out):
    """Do what plan.json says, or the rest of it. All that is old goes before anything new comes, so
    no reader finds a mixture: what is not there yet is missing."""
    plan = f"{out}/{WORK}/plan.json"
    if not os.path.isfile(plan):
        return
    try:
        with open(plan) as file:
            todo = parse_json(file.read())
        move = {name: f"{out}/{path}" for name, path in todo["move"].items()}
        bare(todo["remove"] + list(move))
        bare(path.removeprefix(f"{WORK}/") for path in todo["move"].values())
    except (ValueError, LookupError, TypeError, AttributeError):
        fail(f"{plan} is not what a preparer wrote: remove {out}/{WORK}")
    for name in todo["remove"] + [name for name, path in move.items() if os.path.isfile(path)]:
        if name != MANIFEST and os.path.lexists(f"{out}/{name}"):
            os.remove(f"{out}/{name}")
    for name, path in move.items():
        if os.path.isfile(path):
            os.replace(path, f"{out}/{name}")
    os.remove(plan)


def bare(names):
    """ValueError unless all are names of files in the folder itself: the lists lie in folders that
    may come from elsewhere, and must not lead out of them."""
    if any(os.path.basename(name) != name for name in names):
        raise ValueError


def read_manifest(out):
    """{script: {"files": their names}} of prepared.json; {} where there is none."""
    path = f"{out}/{MANIFEST}"
    if not os.path.lexists(path):
        return {}
    try:
        with open(path) as file:
            listed = parse_json(file.read())
        bare(name for entry in listed.values() for name in entry["files"])
        return listed
    except OSError as e:
        cannot_read(path, e)
    except (ValueError, LookupError, TypeError, AttributeError):
        fail(f"{path} is not the list that preparers keep of their files: move it away, or choose "
             "another --out")


def write_json(path, value):
    """One file alone, which is of no set."""
    write_text(path, json.dumps(value) + "\n")


# ---------------------------------------------------------------------------- local files

KINDS = (".jsonl", ".json", ".csv", ".parquet", ".txt", ".md")
csv.field_size_limit(2**31 - 1)


def kind_of(path):
    """"shard-00.jsonl.zst" -> ".jsonl"."""
    name = str(path).lower().removesuffix(".gz").removesuffix(".zst")
    return os.path.splitext(name)[1]


def find_files(paths, kinds=KINDS):
    """Files as they are given, and what folders hold of these kinds, in a fixed order."""
    found = []
    for path in map(str, paths):
        if os.path.isdir(path):
            inside = sorted(files_of(path))
            some = [name for name in inside if kind_of(name) in kinds]
            if len(some) < len(inside):
                say(f"{path}: {len(inside) - len(some)} of {len(inside)} files are not "
                    f"{', '.join(kinds)} and were left out")
            found += some
        elif not os.path.exists(path):
            fail(f"{path} is missing: no such file or folder")
        elif not os.path.isfile(path):
            fail(f"{path} is neither a file nor a folder")
        elif kind_of(path) in kinds:
            found.append(path)
        else:
            fail(f"{path} is of an unknown format: expected {', '.join(kinds)}, also .gz or .zst")
    if not found:
        fail(f"{', '.join(map(str, paths))} has no file of the kinds {', '.join(kinds)}")
    return found


def files_of(folder):
    """All files in a folder and below; what cannot be looked into is not left out in silence."""
    def cannot(e):
        fail(f"{e.filename} cannot be read ({e.strerror})")

    for at, folders, names in os.walk(folder, onerror=cannot):
        for name in folders:
            if os.path.islink(os.path.join(at, name)):
                say(f"{os.path.join(at, name)} is a link to a folder and was left out")
        yield from (os.path.join(at, name) for name in names)


def unpack(raw, path):
    """An open file -> the stream of what is in it."""
    if str(path).lower().endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    if str(path).lower().endswith(".zst"):
        try:
            if sys.version_info >= (3, 14):
                from compression import zstd
            else:
                from backports import zstd
        except ImportError:
            fail(f"{path}: .zst needs a library: pip install backports.zstd")
        return zstd.ZstdFile(raw)
    return raw


@contextmanager
def reading(path, what):
    """An open file; each thing that can be wrong with it is its own line."""
    try:
        with open(path, "rb") as raw:
            yield raw
    except gzip.BadGzipFile as e:
        fail(f"{path} is no gzip file, or a damaged one ({e})")
    except (EOFError, zlib.error) as e:
        fail(f"{path} is truncated or damaged ({e}): fetch it again")
    except (OSError, MemoryError) as e:
        cannot_read(path, e)
    except (ValueError, csv.Error) as e:
        fail(f"{path} is not {what}: {e}")
    except Exception as e:
        if type(e).__name__ != "ZstdError":                  # of a library that may be missing
            raise
        fail(f"{path} is no zstd file, or a damaged one ({e})")


def read_parquet(path, columns):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        fail(f"{path}: parquet needs a library: pip install pyarrow")
    try:
        file = pyarrow.parquet.ParquetFile(path)
        columns = [c for c in columns or [] if c in file.schema_arrow.names] or None
        n, size, total = 0, os.path.getsize(path), max(1, file.metadata.num_rows)
        for batch in file.iter_batches(batch_size=1000, columns=columns):
            for row in batch.to_pylist():
                n += 1
                yield n, row, size * n // total
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as e:
        said = str(e).strip().splitlines() or [type(e).__name__]
        fail(f"{path} cannot be read as parquet ({said[0][:120]})")


def read_array(raw, path):
    """.json: an array of rows, a single row (MATH has one a file), or after all one a line."""
    text = unpack(raw, path).read()
    try:
        value = parse_json(text)
    except ValueError as e:
        if text.lstrip()[:1] != b"{":
            raise
        try:
            value = [parse_json(line) for line in text.splitlines() if line.strip()]
        except ValueError:
            raise e from None
    for n, row in enumerate(value if isinstance(value, list) else [value], 1):
        yield n, row, raw.tell()


def read_lines(raw, path):
    for n, line in enumerate(unpack(raw, path), 1):
        if line.strip():
            try:
                yield n, parse_json(line), raw.tell()
            except ValueError as e:
                fail(f"{path}, line {n}: not JSON ({e}); every line is one object")


def read_csv(raw, path):
    """The first line names the fields; every value is text."""
    rows = csv.reader(io.TextIOWrapper(unpack(raw, path), "utf-8-sig", newline=""), strict=True)
    names = next(rows, [])
    if len(set(names)) < len(names):
        fail(f"{path}, row 1: two fields have the same name; the first row names the fields")
    for n, values in enumerate(rows, 1):
        if values and len(values) != len(names):
            fail(f"{path}, row {n}: {len(values)} values, but the first line names {len(names)}")
        if values:
            yield n, dict(zip(names, values)), raw.tell()


def read_file(path, columns=None):
    """-> (line or number of the row, row, bytes of the file read so far), one after another."""
    if kind_of(path) == ".parquet":
        yield from read_parquet(path, columns)
        return
    read, what = {".jsonl": (read_lines, "JSON"), ".csv": (read_csv, "CSV in UTF-8")}.get(
        kind_of(path), (read_array, "JSON"))
    with reading(path, what) as raw:
        yield from read(raw, path)


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
    say(f"reading {hub} {config} {split} from the Hub".replace("  ", " "))
    try:
        import datasets
    except ImportError:
        fail(f"the Hub's {hub} needs a library: pip install datasets. Without it: download its "
             f"files and pass them as {local}")
    if not reachable():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        datasets.utils.logging.set_verbosity_error()
        datasets.utils.logging.disable_progress_bar()
        return datasets.load_dataset(hub, config or None, split=split, streaming=streaming)
    except Exception as e:
        no_hub(hub, e, local)


# ---------------------------------------------------------------------------- tokenizers

VARIED = ["The Cat's 12.5 % (or 1,000)?  Two  spaces, 'quotes' and \"more\".", " at both edges ",
          "Zoë naïve Straße İstanbul", "日本語 한국어 Ελλάδα שלום مرحبا",
          "👩‍👩‍👧 ½ ² ™ \u00a0 \u200b ｆｕｌｌ",
          "def f(x):\n\treturn x\r\n\n", "don 't , stop .", "<|end|><think>[UNK] </s>"]


def altered(tokenizer):
    """A text that the tokenizer does not give back as it was, or None. Lower-casing, unknown words
    and joined spaces are losses that a model would learn from."""
    if tokenizer.kind == "chars":
        return None                       # it refuses what it cannot write
    return next((text for text in VARIED if tokenizer.decode(tokenizer.encode(text)) != text), None)


def find_tokenizer(name):
    """gpt2, a tokenizer.json or a checkpoint -> Tokenizer."""
    if name == "gpt2":
        return Tokenizer({"kind": "tiktoken", "name": "gpt2"})
    if name.endswith(".pt"):
        tokenizer = make_tokenizer(read_checkpoint(name)["tokenizer"], name)
    elif not name.endswith(".json"):
        fail(f"--tokenizer {name}: expected gpt2, a tokenizer.json or a checkpoint .pt")
    else:
        tokenizer = load_tokenizer(name)
    text = altered(tokenizer)
    if text is not None:
        back = tokenizer.decode(tokenizer.encode(text))
        fail(f"--tokenizer {name} does not give back its text: {text!r} becomes {back!r}; "
             "byte-level tokenizers do, as those of GPT-2, Llama 3 and Qwen")
    return tokenizer


# ---------------------------------------------------------------------------- command line

def add_flags(parser, *flags):
    """(name, default, help) each; the default's type is the flag's."""
    for name, default, said in flags:
        parser.add_argument(f"--{name}", type=type(default), default=default,
                            help=f"{said} ({default!r})".replace("%", "%%"))


def add_tokenizer(parser):
    parser.add_argument("--tokenizer", default="gpt2",
                        help="gpt2 (by tiktoken), a tokenizer.json, or a checkpoint .pt ('gpt2')")


def draw(text):
    """Text -> [0, 1), evenly, the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode(errors="replace")).digest()[:8], "big") / 2**64
