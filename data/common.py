"""What every preparer in data/ shares: writing a file whole or not at all, and saying so.

A file is made next to its place and then moved there, so a reader never sees half of one, and a
killed run leaves the old one. A file that would come out equal is left alone: its time stamp
keeps telling when the data last changed.
"""
import json
import os

import numpy as np


def write_bytes(path, content, what):
    """Put `content` at `path` atomically and print one line: where, what, how large."""
    path = str(path)
    equal = False
    if os.path.isfile(path):
        with open(path, "rb") as file:
            equal = file.read() == content
    if not equal:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path + ".part", "wb") as file:
            file.write(content)
        os.replace(path + ".part", path)
    state = "unchanged" if equal else "written"
    print(f"{path:<36} {what:>16} {len(content) / 1e6:8.2f} MB  {state}", flush=True)


def write_rows(path, rows):
    """One JSON object a line."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_bytes(path, text.encode(), f"{len(rows):,} rows")


def write_ids(path, ids, vocab_size):
    """Token ids and nothing else: uint16 where every id of the vocabulary fits, else uint32."""
    dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
    write_bytes(path, np.asarray(ids, dtype).tobytes(), f"{len(ids):,} tokens")


def write_json(path, value):
    write_bytes(path, (json.dumps(value, ensure_ascii=False) + "\n").encode(), "json")
