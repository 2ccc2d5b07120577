"""Does tasks.py agree with lm-evaluation-harness, question by question, for the same weights?

    python -m venv venv && venv/bin/pip install -r requirements.txt lm_eval==0.4.13 \\
        transformers==5.23.0 accelerate==1.15.0
    venv/bin/python bench/harness.py ours.pt hf_folder --limit 100 --arc_easy arc_easy.jsonl \\
        --piqa piqa.jsonl --openbookqa openbook_qa.jsonl --lambada_openai lambada.jsonl

hf_folder holds the weights of ours.pt as transformers reads them. The harness gets the same rows in
the Hub's columns and keeps its own prompts, tokens, batches and metrics; the files are those of
llm-foundry. Leaves with 1 if a log-prob differs by 1e-3 nats or a judgement differs.
"""
import json, os, sys, tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import Parser, check_ranges, fail, load, read_rows  # noqa: E402
import tasks  # noqa: E402

SPLIT = {"arc_easy": "test", "piqa": "validation", "openbookqa": "test", "lambada_openai": "test"}


def hub_row(name, row):
    """A row of llm-foundry -> the columns that the harness's own template reads."""
    if name == "lambada_openai":
        return {"text": f"{row['context']} {row['continuation']}"}
    query = row["query"].removesuffix("\n")
    if name == "piqa":
        return {"goal": query.removeprefix("Question: "), "label": row["gold"],
                "sol1": row["choices"][0], "sol2": row["choices"][1]}
    letters = [chr(65 + i) for i in range(len(row["choices"]))]
    return {"question": query.removeprefix("Question: "), "question_stem": query,
            "answerKey": letters[row["gold"]],
            "choices": {"text": row["choices"], "label": letters}}


def harness(folder, name, rows, batch_size, work):
    """-> [{"log_p", "acc", "acc_norm"}] of every row, by lm_eval.simple_evaluate."""
    try:
        import lm_eval
        import yaml
        from lm_eval.models.huggingface import HFLM
    except ImportError as e:
        fail(f"{e.name} is not installed: the first lines of --help say how")
    [path] = Path(lm_eval.__file__).parent.joinpath("tasks").rglob(f"{name}.yaml")
    config = yaml.safe_load(path.read_text())
    (work / f"{name}.jsonl").write_text("".join(json.dumps(hub_row(name, r)) + "\n" for r in rows))
    config |= {"dataset_path": "json", "dataset_name": None,
               "dataset_kwargs": {"data_files": {SPLIT[name]: str(work / f"{name}.jsonl")}}}
    for split in ("training_split", "validation_split", "test_split"):
        if config.get(split) != SPLIT[name]:
            config.pop(split, None)
    model = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=batch_size)
    found = lm_eval.simple_evaluate(model, tasks=[config], bootstrap_iters=0)
    samples = sorted(found["samples"][name], key=lambda s: s["doc_id"])
    return [{"log_p": [float(r[0][0]) for r in s["resps"]], "acc": s["acc"],
             "acc_norm": s.get("acc_norm")} for s in samples], found["results"][name]


def compare(args, name, path, work):
    rows = read_rows(path)[: args.limit or None]
    ours = tasks.lambada if name == "lambada_openai" else tasks.choices
    model, tokenizer, _ = load(args.checkpoint)
    figures, kept = ours(args, model.eval(), tokenizer, path)
    theirs, totals = harness(args.folder, name, rows, args.batch_size, work)
    gap, differ = 0.0, 0
    for row, mine, other in zip(rows, kept, theirs, strict=True):
        log_p = mine["log_p"] if "gold" in row else [mine["log_p"]]
        gap = max([gap] + [abs(a - b) for a, b in zip(log_p, other["log_p"], strict=True)])
        judged = {"acc": mine.get("right")} if "gold" not in row else {
            "acc": log_p.index(max(log_p)) == row["gold"]}
        if "gold" in row:
            norm = [x / len(c) for x, c in zip(log_p, row["choices"])]
            judged["acc_norm"] = norm.index(max(norm)) == row["gold"]
        differ += any(float(value) != float(other[key]) for key, value in judged.items())
    means = {k: round(f["mean"], 4) for k, f in figures.items()}
    theirs = {k.split(",")[0]: round(v, 4) for k, v in totals.items()
              if k.split(",")[0] in means}
    print(f"{name}: {len(rows)} questions, {sum(len(r.get('choices', [1])) for r in rows)} "
          f"log-probs, largest difference {gap:.1e} nats, {differ} judged otherwise; "
          f"ours {means}, theirs {theirs}", flush=True)
    return differ == 0 and gap < 1e-3


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("folder")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=8)
    for name in SPLIT:
        parser.add_argument(f"--{name}", metavar="FILE")
    args = parser.parse_args()
    check_ranges(vars(args), "harness")
    if not os.path.isdir(args.folder) or not any(getattr(args, name) for name in SPLIT):
        fail(f"{args.folder} is no folder that transformers reads, or no file is given to --"
             + ", --".join(SPLIT))
    args.rank, args.world, args.device = 0, 1, "cpu"
    with tempfile.TemporaryDirectory() as work:
        agree = [compare(args, name, getattr(args, name), Path(work)) for name in SPLIT
                 if getattr(args, name)]
    sys.exit(not all(agree))
