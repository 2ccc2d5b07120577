"""The toy world: everything that the stages need, made from nothing in a few seconds.

    python data/toy.py --out out/data/toy

A question is a start and a few operations, told in words:

    Tom has 12 nuts, finds 5, doubles, drops 3. How many nuts?        12 +5 *2 -3  ->  31

Doubling and halving do not commute with sums, so an answer needs every step in its order: hard
to say at once, easy to write down line by line. That gap is what the later stages work on.

    train.bin, val.bin    raw text: bare facts (12+5=17), short stories, plain sentences
    sft_*.jsonl           questions with direct answers, and a few other kinds of instruction
    cot_*.jsonl           the same with a trace; 40 % careful (one operation a line), 60 % hasty
    pairs_*.jsonl         a right, concise trace and one that a reader would like less
    rl_*.jsonl            questions with their answers, nothing else
    rl_long.jsonl         questions beyond these: 6 to 8 operations, starts of 31 to 60, new wording
    chat_test.jsonl       the other instructions, on words and numbers never asked in training

An eighth of the rows in sft_* and cot_* are dialogues, two items one after the other: else a second
turn would be answered as nothing that was ever seen.

What is held out. A problem is its start and operations; its sha256 says train, val or test, so
no file and no wording can disagree. Training material of any kind holds no trace, story or
question that contains a val or test problem even as a part: every run of two or more operations
is looked up, from the value where it starts. A single fact such as 12+5=17 is knowledge. (Runs from
above 30 are not looked up: they are never asked in training, and those that stand inside its traces
have four operations at most: rl_long asks five.)

What makes a trace worse. `hasty`: several operations in one line, wrong half of the time (shorter).
`pad`: a line said twice (longer). `skip`: one operation of the question ignored (shorter).
`wrong`: one line with a wrong result (same length). In the shares below, length says nothing.
"""
import functools
import hashlib
import random

from common import NewSet, add_flags
from model import Parser, Tokenizer

# ---------------------------------------------------------------------------- constants

SEED = "toy 1"
MAX_START = 30  # a problem starts at 1..30
MAX_VALUE = 80  # and every value on its way is 1..80
STEPS = (1, 2, 3, 4, 5)
SCALE_SHARE = 0.35  # how often an operation doubles or halves, where it can
HASTY_SHARE = 0.6  # of the demonstrations with traces
AT_ONCE = 3  # operations that a hasty line does, at most
DIALOGUE_SHARE = 0.12  # of the demonstrations
VAL_SHARE, TEST_SHARE = 0.05, 0.18
SLIPS = (-10, -3, -2, -1, 1, 2, 3, 10)  # how far a wrong result is off
# Beyond training: {what: (steps, starts)}. Eight operations with their trace fit 256 tokens. Two
# operations from above 30 stand inside many a trace of training, three or more in few.
BEYOND = {"steps": ((6, 7, 8), (1, MAX_START)), "range": (STEPS[-1:], (31, 60)),
          "wording": (STEPS[1:], (1, MAX_START))}
PAIR_KINDS = ["hasty"] * 2 + ["pad"] * 4 + ["skip"] * 2 + ["wrong"] * 2

SUMS = [f"{sign}{n}" for sign in "+-" for n in range(1, 10)]
SCALES = ["*2", "/2"]
UNDO = {"+": "-", "-": "+", "*": "/", "/": "*"}
WORD_FOR = {
    "+": ["finds", "gets", "wins", "buys", "picks"],
    "-": ["drops", "loses", "gives", "sells", "eats"],
    "*": ["doubles"],
    "/": ["halves"],
}
HE = ["Tom", "Ben", "Max", "Leo", "Sam", "Dan"]
SHE = ["Ann", "Eva", "Mia", "Zoe", "Amy", "Lily"]
THINGS = ["nuts", "figs", "eggs", "plums", "pears", "buns", "beans", "dates", "limes", "peas",
          "kiwis", "rolls"]
# Never used in training: `acts` is "finds 5, doubles", `and_acts` "finds 5 and doubles", `now_acts`
# "now he finds 5, now he doubles".
WORDINGS = ["{start} {thing}: {name} {acts}. How many {thing}?",
            "{name} has {start} {thing}. {he} {and_acts}. How many {thing}?",
            "How many {thing}? {name} has {start}, {acts}.",
            "{name} has {start} {thing}, {now_acts}. How many {thing} has {name}?",
            "Tell me how many {thing} {name} has: {start} first, {acts}."]

COLOURS = {
    "grass": "green", "the sky": "blue", "snow": "white", "coal": "black", "blood": "red",
    "a lemon": "yellow", "a plum": "purple", "a carrot": "orange", "milk": "white",
    "a leaf": "green", "the sun": "yellow", "a cherry": "red", "a crow": "black",
    "a frog": "green", "sand": "yellow", "the sea": "blue", "a rose": "red", "salt": "white",
    "wood": "brown", "ash": "grey", "a banana": "yellow", "a tomato": "red", "a swan": "white",
    "a bear": "brown", "a mouse": "grey", "a pig": "pink", "night": "black", "a lime": "green",
    "a duck": "yellow", "a whale": "blue", "mud": "brown", "a cloud": "white", "tar": "black",
    "a pumpkin": "orange", "a pea": "green", "rust": "orange",
}
OPPOSITES = ["hot cold", "big small", "up down", "day night", "wet dry", "old young", "fast slow",
             "high low", "open shut", "hard soft", "full empty", "good bad", "light dark",
             "early late", "near far", "left right", "first last", "rich poor", "loud quiet",
             "long short", "thick thin", "true false", "win lose", "push pull", "happy sad",
             "clean dirty", "strong weak", "in out"]
WORDS = ["nut", "fig", "egg", "plum", "pear", "bun", "bean", "moon", "sun", "star", "tree", "leaf",
         "bird", "fish", "dog", "cat", "cow", "hen", "fox", "bear", "wolf", "frog", "ship", "boat",
         "car", "road", "hill", "lake", "sea", "sand", "rain", "snow", "wind", "fire", "lamp",
         "desk", "door", "roof", "wall", "book", "page", "word", "king", "ring", "song", "drum",
         "horn", "bell", "cup", "jug", "pan", "bread", "milk", "salt", "rice", "corn", "rose",
         "seed", "root", "stone", "gold", "iron", "wood", "coat", "hat", "shoe", "glove"]

# ---------------------------------------------------------------------------- problems
# A problem is a start and a list of operations, such as 12 and ["+5", "*2", "-3"].


def apply(value, ops):
    """The value after `ops`, or None where it leaves 1..80 or halves an odd number."""
    for op in ops:
        n = int(op[1:])
        if op[0] == "/" and value % n:
            return None
        value = {"+": value + n, "-": value - n, "*": value * n, "/": value // n}[op[0]]
        if not 1 <= value <= MAX_VALUE:
            return None
    return value


@functools.cache
def split_of(key):
    """train, val or test: a function of the text alone, the same on every machine."""
    x = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    return "test" if x < TEST_SHARE else "val" if x < TEST_SHARE + VAL_SHARE else "train"


def key_of(start, ops):
    return f"{start}{''.join(ops)}"


def leaks(lines):
    """Whether a trace spells out a val or test problem. Values are read as they are written."""
    chain, said = [], None  # operations that follow on one another, each with the value before it
    for left, ops, result in lines:
        chain = chain if left == said else []  # a line said twice starts again
        for op in ops:
            chain.append((left, op))
            left = apply(left, [op])
            for i in range(len(chain) - 1):
                run = key_of(chain[i][0], (op for _, op in chain[i:]))
                if chain[i][0] <= MAX_START and split_of(run) != "train":
                    return True
        said = result
    return False


@functools.cache
def able(value, scale, last):
    """What can come next: doubling and halving, or sums (also where it allows neither). Never
    what undoes the last operation: 6 found and 6 lost would be said for nothing."""
    ops = [op for op in (SCALES if scale else SUMS)
           if apply(value, [op]) and last != UNDO[op[0]] + op[1:]]
    return ops or able(value, False, last)


def draw(rng, steps, split, starts=(1, MAX_START)):
    """A problem for `split`; a single step is a fact and belongs to all of them."""
    while True:
        start = value = rng.randint(*starts)
        ops = []
        for _ in range(steps):
            scale = rng.random() < SCALE_SHARE
            ops.append(rng.choice(able(value, scale, ops[-1] if ops else "")))
            value = apply(value, ops[-1:])
        if steps == 1:
            return start, ops
        if split == "train" and not leaks([(start, ops, value)]):
            return start, ops
        if split != "train" and split_of(key_of(start, ops)) == split:
            return start, ops


def ask(rng, start, ops):
    name, thing = rng.choice(HE + SHE), rng.choice(THINGS)
    acts = "".join(f", {act(rng, op)}" for op in ops)
    return f"{name} has {start} {thing}{acts}. How many {thing}?"


def ask_anew(rng, start, ops):
    name, thing = rng.choice(HE + SHE), rng.choice(THINGS)
    he = "he" if name in HE else "she"
    acts = [act(rng, op) for op in ops]
    return rng.choice(WORDINGS).format(
        name=name, thing=thing, start=start, he=he.title(), acts=", ".join(acts),
        and_acts=" and ".join(acts), now_acts=", ".join(f"now {he} {act}" for act in acts))


def act(rng, op):
    word = rng.choice(WORD_FOR[op[0]])
    return f"{word} {op[1:]}" if op[0] in "+-" else word


# ---------------------------------------------------------------------------- traces
# A trace is a list of lines (value before, operations, result).


@functools.cache
def groupings(steps):
    """All ways to cut `steps` operations into lines of at most AT_ONCE."""
    if steps == 0:
        return [()]
    return [(n, *rest) for n in range(1, min(steps, AT_ONCE) + 1) for rest in groupings(steps - n)]


def pick_sizes(rng, steps, manner):
    """Operations a line: ones if careful; if hasty, at least one line does several."""
    if manner == "careful" or steps == 1:
        return [1] * steps
    return list(rng.choice([sizes for sizes in groupings(steps) if max(sizes) > 1]))


def trace(start, ops, sizes):
    lines = []
    for size in sizes:
        group, ops = ops[:size], ops[size:]
        lines.append((start, group, apply(start, group)))
        start = lines[-1][2]
    return lines


def completion_of(lines):
    """(12+5)*2=34, one more line for each group, then the last result as the answer."""
    said = []
    for left, ops, result in lines:
        text = f"{left}{ops[0]}"
        for op in ops[1:]:
            text = f"({text}){op}"
        said.append(f"{text}={result}")
    return "<think>" + "\n".join(said) + f"</think><answer>{lines[-1][2]}</answer>"


# ---------------------------------------------------------------------------- worse traces
# Each takes the chosen lines and returns what a reader would like less, or None if it cannot.


def slip(rng, lines, at):
    """Line `at` gets its result wrong, the later lines follow from it."""
    left, ops, result = lines[at]
    lines = lines[:at] + [(left, ops, result + rng.choice(SLIPS))] + lines[at + 1:]
    if not 1 <= lines[at][2] <= MAX_VALUE:
        return None
    for i in range(at + 1, len(lines)):
        value, ops = lines[i - 1][2], lines[i][1]
        if apply(value, ops) is None:
            return None
        lines[i] = (value, ops, apply(value, ops))
    return lines


def hasty(rng, lines):
    """Lines of several operations, at most one of a single one; wrong half of the time."""
    ops = [op for _, group, _ in lines for op in group]
    sizes = [s for s in groupings(len(ops)) if s.count(1) < 2 and max(s) > 1]
    alone = rng.random() < 0.5  # half begin as the chosen does, so the first token tells little
    sizes = rng.choice([s for s in sizes if (s[0] == 1) == alone] or sizes)
    lines = trace(lines[0][0], ops, sizes)
    if rng.random() < 0.4:  # not 0.5: some slips fail and are drawn again, so half remain wrong
        return lines
    return slip(rng, lines, rng.choice([i for i, size in enumerate(sizes) if size > 1]))


def pad(rng, lines):
    # Early lines more often: "the trace could end here" is then as often said in a pad as a skip.
    at = min(rng.randrange(len(lines)), rng.randrange(len(lines)))
    return lines[:at + 1] + lines[at:]


def skip(rng, lines):
    """One operation is not done; the manner stays, so a hasty trace keeps a line of several."""
    at = rng.randrange(len(lines))
    groups = [list(ops) for _, ops, _ in lines]
    del groups[at][rng.randrange(len(groups[at]))]
    sizes = [len(group) for group in groups if group]
    ops = [op for group in groups for op in group]
    was_hasty = any(len(group) > 1 for _, group, _ in lines)
    if was_hasty != (max(sizes) > 1) or apply(lines[0][0], ops) in (None, lines[-1][2]):
        return None
    return trace(lines[0][0], ops, sizes)


def wrong(rng, lines):
    worse = slip(rng, lines, rng.randrange(len(lines)))
    same = worse and all(len(str(a[2])) == len(str(b[2])) for a, b in zip(lines, worse))
    return worse if same else None


WORSE = {"hasty": hasty, "pad": pad, "skip": skip, "wrong": wrong}

# ---------------------------------------------------------------------------- other instructions


def instructions():
    """{split: {kind: [(prompt, completion), ...]}}; what is asked about decides the split."""
    pools = {split: {} for split in ("train", "val", "test")}

    def add(kind, about, completion, *prompts):
        pool = pools[split_of(f"{kind} {about}")].setdefault(kind, [])
        pool.extend((prompt, completion) for prompt in prompts)

    for thing, colour in COLOURS.items():
        add("colour", thing, colour_fact(thing), f"What colour is {thing}?",
            f"Tell me the colour of {thing}.")
    for pair in OPPOSITES:
        for a, b in (pair.split(), pair.split()[::-1]):
            add("opposite", a, f"The opposite of {a} is {b}.", f"What is the opposite of {a}?",
                f"Give me the opposite of {a}.")
    for word in WORDS:
        add("repeat", word, f"{word} {word}", f"Say {word} twice.", f"Repeat {word} two times.")
        add("spell", word, "-".join(word), f"Spell {word}.", f"How do you spell {word}?")
        add("reverse", word, "-".join(word[::-1]), f"Spell {word} backwards.",
            f"What is {word} backwards?")
    for a in range(1, MAX_VALUE + 1):
        for b in range(1, MAX_VALUE + 1):
            if a != b:
                add("larger", f"{a} {b}", f"{max(a, b)} is larger than {min(a, b)}.",
                    f"Which is larger, {a} or {b}?", f"Is {a} or {b} larger?")
    for a in range(1, 41):
        for b in range(a + 2, a + 6):
            add("count", f"{a} {b}", " ".join(map(str, range(a, b + 1))),
                f"Count from {a} to {b}.")
    for name in HE + SHE:
        for thing in ("", *THINGS):
            asked = f" and offer {thing}" if thing else ""
            offer = f" Do you want some {thing}?" if thing else ""
            add("greet", f"{name} {thing}", f"Hello, {name}!{offer}",
                f"Say hello to {name}{asked}.", f"Greet {name}{asked}.")
    return pools


def colour_fact(thing):
    return f"{thing[0].upper()}{thing[1:]} is {COLOURS[thing]}."


def pick_instruction(rng, pool):
    kind = rng.choice(sorted(pool))
    prompt, completion = rng.choice(pool[kind])
    return {"prompt": prompt, "completion": completion, "kind": kind}


# ---------------------------------------------------------------------------- rows


def demonstrations(rng, split, count, pool, other, traced):
    """Questions answered at once, or with a trace; a share `other` are other instructions. Some
    rows are two of these, one after the other."""
    rows = []
    for _ in range(count):
        turns = 2 if rng.random() < DIALOGUE_SHARE else 1
        items = [demonstration(rng, split, pool, other, traced) for _ in range(turns)]
        while turns == 2 and goes_on(*items):
            items[1] = demonstration(rng, split, pool, other, traced)
        rows.append(items[0] if turns == 1 else dialogue(items))
    return rows


def goes_on(one, two):
    """Whether the second question starts at the first one's answer: both would be one problem."""
    answer = one["completion"].partition("<answer>")[2].partition("<")[0]
    return answer != "" and f" has {answer} " in two["prompt"]


def dialogue(items):
    messages = [{"role": role, "content": item[key]} for item in items
                for role, key in (("user", "prompt"), ("assistant", "completion"))]
    return {"messages": messages, "kind": "dialogue"}


def demonstration(rng, split, pool, other, traced):
    if rng.random() < other:
        return pick_instruction(rng, pool)
    # most of the direct answers are single facts: the rest is hardly learnable without a trace
    steps = rng.choice(STEPS if traced else STEPS[:1] * 4 + STEPS)
    start, ops = draw(rng, steps, split)
    row = {"prompt": ask(rng, start, ops), "completion": f"<answer>{apply(start, ops)}</answer>",
           "kind": "math", "steps": len(ops)}
    if traced:
        row["manner"] = "hasty" if rng.random() < HASTY_SHARE else "careful"
        lines = trace(start, ops, pick_sizes(rng, len(ops), row["manner"]))
        row["completion"] = completion_of(lines)
    return row


def pair_rows(rng, split, count):
    """Chosen is careful against hasty and wrong, in either manner else."""
    rows = []
    while len(rows) < count:
        kind = PAIR_KINDS[len(rows) % len(PAIR_KINDS)]
        steps = rng.choice(STEPS[1:])
        # two operations with one left out have no hasty trace
        free = kind == "pad" or kind == "skip" and steps > 2
        manner = "hasty" if free and rng.random() < HASTY_SHARE else "careful"
        worse = None
        while worse is None or split == "train" and leaks(worse):
            start, ops = draw(rng, steps, split)
            lines = trace(start, ops, pick_sizes(rng, steps, manner))
            worse = WORSE[kind](rng, lines)
        rows.append({"prompt": ask(rng, start, ops), "chosen": completion_of(lines),
                     "rejected": completion_of(worse), "kind": kind, "steps": steps})
    rng.shuffle(rows)
    return rows


def rl_rows(rng, split, counts):
    """`counts` {steps: rows}; no problem twice."""
    rows = {}
    for steps, count in counts.items():
        goal = len(rows) + count
        while len(rows) < goal:
            start, ops = draw(rng, steps, split)
            row = {"prompt": ask(rng, start, ops), "answer": str(apply(start, ops)),
                   "kind": "math", "steps": steps}
            rows.setdefault(key_of(start, ops), row | ({"seen": True} if steps == 1 else {}))
    rows = list(rows.values())
    rng.shuffle(rows)
    return rows


def long_rows(rng, each):
    """`each` test problems of every kind beyond training; no problem twice in a kind."""
    rows = []
    for beyond, (steps, starts) in BEYOND.items():
        found = {}
        while len(found) < each:
            n = steps[len(found) % len(steps)]
            start, ops = draw(rng, n, "test", starts)
            prompt = (ask_anew if beyond == "wording" else ask)(rng, start, ops)
            found.setdefault(key_of(start, ops), {
                "prompt": prompt, "answer": str(apply(start, ops)), "kind": "math", "steps": n,
                "beyond": beyond})
        rows += found.values()
    rng.shuffle(rows)
    return rows


def chat_rows(rng, pool, each):
    rows = [{"prompt": prompt, "completion": completion, "kind": kind}
            for kind in sorted(pool)
            for prompt, completion in rng.sample(pool[kind], min(each, len(pool[kind])))]
    rng.shuffle(rows)
    return rows


# ---------------------------------------------------------------------------- raw text


def all_facts():
    """Every single step; doubling and halving three times, as they are few but often needed."""
    return [(value, op, apply(value, [op]))
            for value in range(1, MAX_VALUE + 1) for op in SUMS + 3 * SCALES
            if apply(value, [op])]


def fact_pages(rng):
    """Pages of facts for ever, in new orders. No fact goes on from the one above: that would
    spell out a problem of two steps."""
    facts, page = all_facts(), []
    while True:
        rng.shuffle(facts)
        for left, op, result in facts:
            if page and page[-1].endswith(f"={left}"):
                continue
            page.append(f"{left}{op}={result}")
            if len(page) == 20:
                yield "\n".join(page)
                page = []


def story(rng, split):
    """The results are told as they come: no question, no answer."""
    start, ops = draw(rng, rng.randint(1, 3), split)
    name, thing = rng.choice(HE + SHE), rng.choice(THINGS)
    he = "he" if name in HE else "she"
    told = [f"{name} has {start} {thing}."]
    for op in ops:
        start = apply(start, [op])
        told.append(f"{he.title()} {act(rng, op)}. Now {he} has {start} {thing}.")
    return " ".join(told)


def sentence(rng):
    """What the other instructions ask about, said plainly."""
    kind = rng.randrange(6)
    if kind == 0:
        return colour_fact(rng.choice(list(COLOURS)))
    if kind == 1:
        a, b = rng.sample(rng.choice(OPPOSITES).split(), 2)
        return f"The opposite of {a} is {b}."
    if kind == 2:
        word = rng.choice(WORDS)
        return f"We spell {word} {'-'.join(word)}, and backwards {'-'.join(word[::-1])}."
    if kind == 3:
        a, b = sorted(rng.sample(range(1, MAX_VALUE + 1), 2))
        return f"{b} is larger than {a}."
    if kind == 4:
        a = rng.randint(1, 40)
        return " ".join(map(str, range(a, a + rng.randint(3, 6))))
    a, b = rng.sample(HE + SHE, 2)
    return f"Hello, {a}! says {b}. Do you want some {rng.choice(THINGS)}?"


def raw_text(rng, split, chars):
    """Documents: two fifths of the characters facts, two fifths stories, one fifth sentences."""
    pages = fact_pages(rng)
    makers = {lambda: next(pages): 0.4, lambda: story(rng, split): 0.4,
              lambda: " ".join(sentence(rng) for _ in range(4)): 0.2}
    documents = []
    for make, share in makers.items():
        left = share * chars
        while left > 0:
            documents.append(make())
            left -= len(documents[-1]) + 1
    rng.shuffle(documents)
    return documents


# ---------------------------------------------------------------------------- the files

BASIC = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789\n !\"'()*+,-./:;=?"


def main(out):
    with NewSet(out, "toy") as new:
        write(new)


def write(new):
    def rng(name):  # each file has its own, so changing one leaves the others as they are
        return random.Random(f"{SEED} {name}")

    tokenizer = Tokenizer({"kind": "chars", "chars": "".join(sorted(BASIC))})
    new.json("tokenizer.json", tokenizer.spec)
    for split, chars in (("train", 2_200_000), ("val", 100_000)):
        documents = raw_text(rng(f"raw {split}"), split, chars)
        ids = [i for text in documents for i in [*tokenizer.encode(text), tokenizer.end]]
        new.ids(f"{split}.bin", ids, tokenizer)

    pools = instructions()
    for split, count in (("train", 16_000), ("val", 500)):
        for name, other, traced in (("sft", 0.15, False), ("cot", 0.10, True)):
            new.rows(f"{name}_{split}.jsonl", demonstrations(
                rng(f"{name} {split}"), split, count, pools[split], other, traced))
    for split, count in (("train", 8000), ("val", 200), ("test", 2500)):
        new.rows(f"pairs_{split}.jsonl", pair_rows(rng(f"pairs {split}"), split, count))
    for split, each, single in (("train", 1500, 0), ("val", 100, 0), ("test", 1000, 400)):
        counts = {1: single} | {steps: each for steps in STEPS[1:]}
        new.rows(f"rl_{split}.jsonl", rl_rows(rng(f"rl {split}"), split, counts))
    new.rows("rl_long.jsonl", long_rows(rng("rl long"), 240))
    new.rows("chat_test.jsonl", chat_rows(rng("chat"), pools["test"], 30))


if __name__ == "__main__":
    parser = Parser(__doc__)
    add_flags(parser, ("out", "out/data/toy", "folder"))
    main(parser.parse_args().out)
