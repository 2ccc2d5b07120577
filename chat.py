"""chat.py: talk to a checkpoint, or to several one after another.

    python chat.py                                     # the newest of out/toy
    python chat.py out/toy/01_sft.pt out/toy/04_rlvr.pt
    python chat.py --prompt "Tom has 12 nuts, finds 5, doubles. How many nuts?"
    python chat.py out/toy/00_pretrain.pt --raw        # no template: the text goes on

/reset forgets the conversation; /quit, Ctrl-D and Ctrl-C leave.
"""
import argparse, os, sys
from pathlib import Path

import torch
from model import fail, generate, load

NEWEST = ["04_rlvr", "05_ppo", "03_dpo", "02_cot", "01_sft", "00_pretrain"]


class Printer:
    """Shows ids as they come. A character may need several tokens: until its bytes are complete it
    decodes to U+FFFD, and is held back. Tags are known by their ids: only real ones are dimmed."""

    def __init__(self, tokenizer):
        self.tokenizer, self.ids, self.plain, self.shown = tokenizer, [], [], 0

    def __call__(self, _, tokens):
        for token in tokens:
            self.ids.append(token)
            if token not in self.tokenizer.control:
                self.plain.append(token)
                self.flush(final=False)
                continue
            self.flush()
            if token != self.tokenizer.end:
                tag = self.tokenizer.decode([token])
                print(f"\033[2m{tag}\033[0m" if sys.stdout.isatty() else tag, end="", flush=True)

    def flush(self, final=True):
        text = self.tokenizer.decode(self.plain)
        stable = text if final else text.rstrip("\ufffd")
        if len(stable) > self.shown:
            print(stable[self.shown:], end="", flush=True)
            self.shown = len(stable)
        if final:
            self.plain, self.shown = [], 0


class Talk:
    """One checkpoint and what was said between it and the user."""

    def __init__(self, path, args):
        self.model, self.tokenizer, _ = load(path, args.device)
        self.name, self.args, self.messages, self.turn = Path(path).stem, args, [], 0

    def prompt(self, text):
        """-> ids, or ValueError in words for the user."""
        if self.args.raw:
            ids = self.tokenizer.encode(text)
        else:
            ids, _ = self.tokenizer.chat(self.messages + [{"role": "user", "content": text}])
        room = self.model.cfg.block_size
        if not 0 < len(ids) < room:
            raise ValueError(f"that makes {len(ids)} tokens and the context has {room}"
                             + (": /reset forgets what was said" if self.messages else ""))
        return ids

    def answer(self, text):
        args, show = self.args, Printer(self.tokenizer)
        [ids], _ = generate(self.model, [self.prompt(text)], args.max_new, self.tokenizer.end,
                            args.temperature, args.seed, self.turn, top_p=args.top_p, on_token=show)
        show.flush()
        print(flush=True)
        self.turn += 1
        if not args.raw:
            tok = self.tokenizer           # what an answer may hold; <|user|> would end the turn
            said = tok.decode([i for i in ids if tok.control.get(i, "")[:2] != "<|"])
            self.messages += [{"role": "user", "content": text},
                              {"role": "assistant", "content": said}]


def reply(talks, text):
    """All answer, or ValueError before any does."""
    for talk in talks:
        talk.prompt(text)
    for talk in talks:
        if len(talks) > 1:
            print(f"{talk.name}: ", end="", flush=True)
        talk.answer(text)


def converse(talks):
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if text == "/quit":
            return
        if text == "/reset":
            for talk in talks:
                talk.messages = []
            print("forgotten")
        elif text:
            try:
                reply(talks, text)
            except ValueError as e:
                print(e, flush=True)


def main(args):
    if args.temperature < 0 or not 0 < args.top_p <= 1 or args.max_new < 1 or args.seed < 0:
        fail("--temperature and --seed from 0, --top_p above 0 and up to 1, --max_new from 1")
    names = NEWEST[::-1] if args.raw else NEWEST       # raw text is what the base model knows
    found = [f"out/toy/{s}.pt" for s in names if os.path.isfile(f"out/toy/{s}.pt")]
    if not found and not args.checkpoints:
        fail("out/toy has no checkpoint: run ./run.sh first, or name one")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    talks = [Talk(path, args) for path in args.checkpoints or found[:1]]
    try:
        if args.prompt is None:
            if sys.stdin.isatty():
                print(f"{', '.join(t.name for t in talks)}; /reset and /quit", flush=True)
            return converse(talks)
        reply(talks, args.prompt)
    except ValueError as e:
        fail(str(e))
    except KeyboardInterrupt:
        print()
        raise SystemExit(130)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", help="default: the newest stage of out/toy")
    parser.add_argument("--prompt", help="answer this and leave")
    parser.add_argument("--raw", action="store_true", help="continue the text, without a template")
    for flag, default in [("temperature", 0.0), ("top_p", 1.0), ("max_new", 200), ("seed", 0),
                          ("device", "auto")]:
        parser.add_argument(f"--{flag}", type=type(default), default=default, help="%(default)s")
    main(parser.parse_args())
