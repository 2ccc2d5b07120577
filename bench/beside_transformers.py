"""bench/beside_transformers.py: the same weights through model.py and through transformers.

    pip install -r requirements-test.txt
    python bench/beside_transformers.py out/smollm2/base.pt out/smollm2/hf page.txt

A checkpoint that convert.py made and the folder that it came from (or went to). Prints: whether
chat and page have the same ids, the largest difference of two logits, the perplexity of the first
--chars characters of the page, and both greedy answers to --prompt. New tags have rows that the
folder lacks: its ids alone are compared, and our perplexity is given with and without the rest.
"""
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import Parser, check_ranges, fail, generate, load, read_bytes  # noqa: E402
import torch  # noqa: E402


def perplexity(logits, ids):
    """exp of the mean loss of each token but the first: logits (T, V), ids (T,)."""
    return float(torch.nn.functional.cross_entropy(logits[:-1], ids[1:]).exp())


@torch.no_grad()
def main(args):
    check_ranges(vars(args), "beside_transformers")
    if not os.path.isdir(args.folder):                 # else it would be looked for on the Hub
        fail(f"{args.folder} is no folder: give one that transformers reads")
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        fail("transformers is not installed: pip install -r requirements-test.txt")
    try:
        text = read_bytes(args.text).decode()[:args.chars]
    except ValueError as e:
        fail(f"{args.text} is not UTF-8: {e}")
    ours, tok, _ = load(args.checkpoint)
    theirs = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32).eval()
    theirs_tok = AutoTokenizer.from_pretrained(args.folder)
    ids = tok.encode(text)
    print("page: the same", len(ids), "ids:",
          ids == theirs_tok(text, add_special_tokens=False).input_ids)
    batch = torch.tensor([ids])
    a, b = ours.eval()(batch)[0], theirs(batch).logits[0]
    rows, known = b.shape[-1], a[:, : b.shape[-1]]
    print(f"logits ({len(ids)} x {rows}): largest difference {float((known - b).abs().max()):.2g}, "
          f"largest value {float(b.abs().max()):.3g}; the same first choice at "
          f"{float((known.argmax(-1) == b.argmax(-1)).float().mean()):.2%}")
    print(f"perplexity: {perplexity(known, batch[0]):.6f} here, {perplexity(b, batch[0]):.6f} in "
          f"transformers; {perplexity(a, batch[0]):.6f} here over all {a.shape[-1]} ids")
    prompt = tok.prompt(args.prompt)
    chat = theirs_tok.apply_chat_template([{"role": "user", "content": args.prompt}],
                                          add_generation_prompt=True, return_dict=True)
    print("chat: the same", len(prompt), "ids:", prompt == list(chat["input_ids"]))
    [said], _ = generate(ours, [prompt], args.max_new, tok.end, temperature=0.0)
    out = theirs.generate(torch.tensor([prompt]), max_new_tokens=args.max_new, do_sample=False,
                          eos_token_id=tok.end, attention_mask=torch.ones(1, len(prompt)))
    same = said == out[0, len(prompt):].tolist()
    print(f"greedy: the same {len(said)} ids: {same}\n{tok.decode(said)}")


if __name__ == "__main__":
    parser = Parser(__doc__)
    for name in ("checkpoint", "folder", "text"):
        parser.add_argument(name)
    parser.add_argument("--prompt", default="What is the capital of France?")
    parser.add_argument("--chars", type=int, default=3000)
    parser.add_argument("--max_new", type=int, default=60)
    main(parser.parse_args())
