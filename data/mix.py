"""data/mix.py: prepared folders -> one folder; files of the same name are joined.

    python data/mix.py out/data/alpaca out/data/dolly out/data/gsm8k --out out/data/mix
    python data/mix.py out/data/hh out/data/ultrafeedback --out out/data/pairs

Reads sft_, cot_, pairs_ and rl_ {train,val,test}.jsonl; stages draw rows in random order, so theirs
does not matter. What is held out in one folder is held out in all: a train row whose prompt is val
or test anywhere, and a val row whose prompt is test, are dropped and counted. Text is mixed where
it is encoded: data/text.py takes several sources at once.
"""
import argparse
import os

from common import check, read_file, said_first, write_rows
from model import fail

PARTS = ("test", "val", "train")


def read_all(folders):
    """-> {(kind, part): rows}, test first: each part drops what the ones before it ask."""
    files = {}
    for part in PARTS:
        for kind in ("sft", "cot", "pairs", "rl"):
            paths = [f"{folder}/{kind}_{part}.jsonl" for folder in folders]
            rows = [row for path in paths if os.path.isfile(path) for _, row, _ in read_file(path)]
            if rows:
                files[kind, part] = rows
    if not files:
        fail(f"{', '.join(folders)}: no sft_, cot_, pairs_ or rl_ rows; prepare them first")
    return files


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="folders that other preparers have written")
    parser.add_argument("--out", default="out/data/mix", help="folder (%(default)s)")
    args = check(parser.parse_args(argv))
    for folder in args.folders:
        if not os.path.isdir(folder) or os.path.realpath(folder) == os.path.realpath(args.out):
            fail(f"{folder} is no folder, or the same as --out")
    files, held = read_all(args.folders), set()
    for part in PARTS:
        asked = set()
        for (kind, of), rows in files.items():
            if of != part:
                continue
            keys = [said_first(row) for row in rows]
            kept = [row for row, key in zip(rows, keys) if key not in held]
            asked.update(keys)
            print(f"{kind} {part}: {len(rows):,} rows read, {len(kept):,} kept, "
                  f"{len(rows) - len(kept):,} dropped (held out elsewhere)", flush=True)
            write_rows(f"{args.out}/{kind}_{part}.jsonl", kept)
        held |= asked


if __name__ == "__main__":
    main()
