"""data/mix.py: prepared folders -> one folder; files of the same name are joined.

    python data/mix.py out/data/alpaca out/data/dolly out/data/gsm8k --out out/data/mix
    python data/mix.py out/data/hh out/data/ultrafeedback --out out/data/pairs

Reads sft_, cot_, pairs_ and rl_ {train,val,test}.jsonl; stages draw rows in random order, so theirs
does not matter. What is held out in one folder is held out in all: a train row whose prompt is val
or test anywhere, and a val row whose prompt is test, are dropped and counted. Text is mixed where
it is encoded: data/text.py takes several sources at once.
"""
import os

from common import NewSet, add_flags, place, read_file
from model import Parser, fail, say
from rows import said_first

PARTS = ("test", "val", "train")


def read_all(folders):
    """-> {(kind, part): [(row, key of its prompt)]}, test first: each part drops what the ones
    before it ask."""
    files = {}
    for part in PARTS:
        for kind in ("sft", "cot", "pairs", "rl"):
            paths = [f"{folder}/{kind}_{part}.jsonl" for folder in folders]
            rows = [row for path in paths if os.path.isfile(path) for row in read_rows(path)]
            if rows:
                files[kind, part] = rows
    if not files:
        fail(f"{', '.join(folders)}: no sft_, cot_, pairs_ or rl_ rows; prepare them first")
    return files


def read_rows(path):
    for n, row, _ in read_file(path):
        try:
            yield row, said_first(row)
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            what = e if isinstance(e, ValueError) else "not a row that a preparer wrote"
            fail(f"{place(path, n)}: {what}")


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("folders", nargs="+", help="folders that other preparers have written")
    add_flags(parser, ("out", "out/data/mix", "folder; what an earlier run made is replaced"))
    args = parser.parse_args(argv)
    for folder in args.folders:
        if not os.path.isdir(folder):
            fail(f"{folder} is no folder" if os.path.exists(folder) else f"{folder} is missing")
        if os.path.realpath(folder) == os.path.realpath(args.out):
            fail(f"{folder} is --out as well: the mixture needs a folder of its own")
    with NewSet(args.out, "mix") as new:
        files, held = read_all(args.folders), set()
        for part in PARTS:
            asked = set()
            for (kind, of), rows in files.items():
                if of != part:
                    continue
                kept = [row for row, key in rows if key not in held]
                asked.update(key for _, key in rows)
                say(f"{kind} {part}: {len(rows):,} rows read, {len(kept):,} kept, "
                    f"{len(rows) - len(kept):,} dropped (held out elsewhere)")
                if not kept:
                    fail(f"{kind} {part}: no row is left: all its prompts are held out elsewhere")
                new.rows(f"{kind}_{part}.jsonl", kept)
            held |= asked


if __name__ == "__main__":
    main()
