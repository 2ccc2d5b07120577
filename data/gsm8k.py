"""data/gsm8k.py: GSM8K's own rows -> text, demonstrations, traces and questions for the stages.

    {"question", "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\\n...\\n#### 72"}
    ->  sft_*   <answer>72</answer>
        cot_*   <think>Natalia sold 48/2 = 24 clips in May.\\n...</think><answer>72</answer>
        rl_*    {"prompt", "answer": "72", "steps": the number of calculator marks}
        *.bin   question and solution as plain text, tiktoken's gpt2, for 00_pretrain.py

The calculator marks go: a model that has no calculator should not learn to call one. One training
row in twenty, by position, is val; the test file is only asked, never trained on. The rows are
Cobbe et al. 2021.

    python data/gsm8k.py --train train.jsonl --test test.jsonl    local files, the source's format
    python data/gsm8k.py                                              from the Hub (openai/gsm8k)
"""
import argparse
import re
from pathlib import Path

from common import write_ids, write_json, write_rows
from model import TAGS, Tokenizer, fail, read_rows


def source(split, path, hub):
    """The rows of one split, from a local JSONL file or the Hub."""
    if path:
        return read_rows(path, "question", "answer")
    try:
        import datasets
        return list(datasets.load_dataset(hub, "main", split=split))
    except Exception as e:
        fail(f"the Hub's {hub} cannot be loaded ({type(e).__name__}): download its {split}.jsonl "
             f"elsewhere and pass it as --{split} FILE")


def convert(rows, name):
    """Source rows -> [{"prompt", "solution", "answer", "steps"}], with what was dropped and why."""
    kept, dropped = [], 0
    for row in rows:
        body, mark, answer = row["answer"].rpartition("####")
        if not mark or not answer.strip() or any(tag in body for tag in TAGS):
            dropped += 1
            continue
        kept.append({"prompt": row["question"].strip(),
                     "solution": re.sub(r"<<.*?>>", "", body).strip(),
                     "answer": answer.strip().replace(",", ""), "steps": body.count("<<")})
    print(f"{name}: {len(rows)} rows read, {len(kept)} kept, {dropped} dropped (no '####' answer, "
          "or a tag in the text)")
    if not kept:
        fail(f"{name}: no row has an answer after '####'; is this GSM8K's format?")
    return kept


def main(train="", test="", hub="openai/gsm8k", out="out/data/gsm8k"):
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer({"kind": "tiktoken", "name": "gpt2"})
    rows = convert(source("train", train, hub), "train")
    splits = {"train": [r for i, r in enumerate(rows) if i % 20], "val": rows[::20],
              "test": convert(source("test", test, hub), "test")}
    write_json(out / "tokenizer.json", tokenizer.spec)
    for split, rows in splits.items():
        write_rows(out / f"rl_{split}.jsonl",
                   [{k: r[k] for k in ("prompt", "answer", "steps")} for r in rows])
        if split == "test":
            continue
        direct = [f"<answer>{r['answer']}</answer>" for r in rows]
        traced = [f"<think>{r['solution']}</think>{a}" for r, a in zip(rows, direct)]
        for kind, completions in (("sft", direct), ("cot", traced)):
            write_rows(out / f"{kind}_{split}.jsonl",
                       [{"prompt": r["prompt"], "completion": c}
                        for r, c in zip(rows, completions)])
        ids = []
        for r in rows:
            ids += tokenizer.encode(f"{r['prompt']}\n{r['solution']}") + [tokenizer.end]
        write_ids(out / f"{split}.bin", ids, tokenizer.vocab_size)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", default="", help="local JSONL of the train split")
    parser.add_argument("--test", default="", help="local JSONL of the test split")
    parser.add_argument("--hub", default="openai/gsm8k", help="Hub id, if no files are given")
    parser.add_argument("--out", default="out/data/gsm8k")
    main(**vars(parser.parse_args()))
