"""chat.py: talk to a checkpoint, or to several one after another.

    python chat.py                                     # the newest of out/toy
    python chat.py out/toy/01_sft.pt out/toy/04_rlvr.pt
    python chat.py --prompt "Tom has 12 nuts, finds 5, doubles. How many nuts?"
    python chat.py out/toy/00_pretrain.pt --raw        # no template: the text goes on

/reset forgets the conversation; /quit or /exit, Ctrl-D and Ctrl-C leave; /help says this.
"""
import os, re, sys
from pathlib import Path

from model import Parser, check_ranges, fail, generate, load, pick_device

NEWEST = ["04_rlvr", "05_ppo", "03_dpo", "02_cot", "01_sft", "00_pretrain"]
HELP = "/reset forgets the conversation; /quit, /exit, Ctrl-D and Ctrl-C leave"


def show(text, dim=False, end=""):
    """Print a model's text: what would steer the terminal is written out."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda m: f"\\x{ord(m[0]):02x}", text)
    dim = dim and sys.stdout and sys.stdout.isatty()
    print(f"\033[2m{text}\033[0m" if dim else text, end=end, flush=True)


class Printer:
    """Shows ids as they come. A character may need several tokens: until its bytes are complete it
    decodes to U+FFFD, and is held back. Tags are known by their ids: only real ones are dimmed."""

    def __init__(self, tokenizer):
        self.tokenizer, self.plain, self.shown = tokenizer, [], 0

    def __call__(self, _, tokens):
        for token in tokens:
            if token not in self.tokenizer.control:
                self.plain.append(token)
                self.flush(final=False)
                continue
            self.flush()
            if token != self.tokenizer.end:
                show(self.tokenizer.decode([token]), dim=True)

    def flush(self, final=True):
        text = self.tokenizer.decode(self.plain)
        stable = text if final else text.rstrip("\ufffd")
        if len(stable) > self.shown:
            show(stable[self.shown:])
            self.shown = len(stable)
        if final:
            self.plain, self.shown = [], 0


class Talk:
    """One checkpoint and what was said between it and the user: `ids`, which are never encoded
    again. From text, a tag that the user had the model repeat would become the tag's id."""

    def __init__(self, path, args):
        self.model, self.tokenizer, parts = load(path, args.device)
        self.name, self.args, self.turn = Path(path).stem, args, 0
        self.forget()
        if parts.get("record", {}).get("stage") == "00_pretrain" and not args.raw:
            print(f"{self.name} has seen no conversation: --raw continues a text", file=sys.stderr)

    def forget(self):
        self.ids = []

    def prompt(self, text):
        """-> ids, or ValueError in words for the user."""
        tok, room = self.tokenizer, self.model.cfg.block_size
        if not text.strip() and not (self.args.raw and text):
            raise ValueError("the prompt is empty")
        if re.search("[\ud800-\udfff]", text):
            raise ValueError("the prompt is not valid UTF-8")
        ids = tok.encode(text) if self.args.raw else tok.prompt(text)
        if self.ids:
            ids = self.ids + tok.header("assistant", "user") + ids[len(tok.header("", "user")):]
        if not 0 < len(ids) < room:
            raise ValueError(f"that makes {len(ids)} tokens and the context has {room}"
                             + (": /reset forgets what was said" if self.ids else ""))
        return ids

    def answer(self, text):
        args, tok, ids = self.args, self.tokenizer, self.prompt(text)
        printer = Printer(tok)
        [said], _ = generate(self.model, [ids], args.max_new, tok.end, args.temperature, args.seed,
                             self.turn, top_p=args.top_p, on_token=printer)
        printer.flush()
        if said[-1] != tok.end:
            why = "--max_new" if len(said) == args.max_new else "the context is full"
            show(f" [cut at {len(said)} tokens: {why}]", dim=True)
        show("", end="\n")
        self.turn += 1
        if not args.raw:
            self.ids = ids + content(tok, said) + [tok.end]


def content(tok, said):
    """What stays of an answer: no id that opens or ends a turn, which are all control ids but those
    of reasoning; and no blanks at its ends where the model's own chat has none."""
    turn = {i for i, tag in tok.control.items() if tag[:2] == "<|"}
    if tok.kind == "json":
        added = tok.hf.get_added_tokens_decoder().items()
        turn |= {i for i, token in added if token.special and i not in tok.control}
    kept = [i for i in said if i not in turn]
    for end in (-1, 0) if tok.spec.get("strip") else ():
        while kept and not tok.decode(kept[end:][:1]).strip():
            kept.pop(end)
    return kept


def reply(talks, text):
    """All answer, or ValueError before any does."""
    for talk in talks:
        talk.prompt(text)
    for talk in talks:
        if len(talks) > 1:
            show(f"{talk.name}: ")
        talk.answer(text)


def converse(talks):
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except OSError as e:
            fail(f"stdin cannot be read: {e.strerror}")
        text = line if talks[0].args.raw else line.strip()
        if line.rstrip() in ("/quit", "/exit"):
            return
        if line.rstrip() == "/reset":
            for talk in talks:
                talk.forget()
            show("forgotten", end="\n")
        elif line[:1] == "/":
            known = line.rstrip() == "/help"
            show(HELP if known else f"{line.split()[0]} is no command and was not sent: /help "
                 "lists them, a space before it sends it", end="\n")
        elif text.strip():
            try:
                reply(talks, text)
            except ValueError as e:
                show(str(e), end="\n")


def start(args):
    names = NEWEST[::-1] if args.raw else NEWEST       # raw text is what the base model knows
    found = [f"out/toy/{s}.pt" for s in names if os.path.isfile(f"out/toy/{s}.pt")]
    if not found and not args.checkpoints:
        fail("out/toy has no checkpoint: run ./run.sh first, or name one")
    if sys.stdout is None or args.prompt is None and sys.stdin is None:
        fail("stdout is closed" if sys.stdout is None else "stdin is closed: give --prompt")
    args.device = pick_device(args.device)
    talks = [Talk(path, args) for path in args.checkpoints or found[:1]]
    if args.prompt is not None:
        return reply(talks, args.prompt)
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")     # bytes that are no UTF-8 end nothing
    if sys.stdin.isatty():
        import readline  # noqa: F401       arrow keys
        show(f"{', '.join(t.name for t in talks)}; /help lists the commands", end="\n")
    converse(talks)


def main(args):
    check_ranges(vars(args), "chat")
    try:
        start(args)
    except ValueError as e:
        fail(str(e))
    except KeyboardInterrupt:
        raise SystemExit(130) from None    # without a traceback
    except OSError as e:                   # the reader has left (| head), or the disk is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if not isinstance(e, BrokenPipeError):
            fail(f"cannot write the answer: {e.strerror}")


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("checkpoints", nargs="*", help="default: the newest stage of out/toy")
    parser.add_argument("--prompt", help="answer this and leave")
    parser.add_argument("--raw", action="store_true", help="continue the text, without a template")
    for flag, default, text in [
            ("temperature", 0.0, "0: always the likeliest token; 1: the model's own mixture"),
            ("top_p", 1.0, "draw from the likeliest tokens that have this share together"),
            ("max_new", 200, "tokens of an answer, at most"), ("seed", 0, "of the draws"),
            ("device", "auto", "cpu, cuda, mps")]:
        parser.add_argument(f"--{flag}", type=type(default), default=default,
                            help=f"{text} (%(default)s)")
    main(parser.parse_args())
