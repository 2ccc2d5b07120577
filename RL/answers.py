"""answers.py: when are two answers the same? What `verify` of model.py asks, and nothing else.

    right("1,000 clips", "1000")        True      a number is compared by its value
    right("5 dozen", "5")               False     no word may change it
    right("12 hrs", "12 hours")         True      where the gold has a unit, it must be that one
    right("(a)", "A")                   True      the rest by what it says

Written as tables of words and a few rules, the same for every stage, eval.py and data/.
"""
import re
from decimal import Context
from fractions import Fraction

# Words that change the number before them: "5 dozen" is not 5. COUNTS do so in the plural as well;
# the plurals of the others are things that one counts ("5 zeros", "5 kilos").
CARDINALS = ("two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
             "sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty "
             "ninety hundred thousand million milliard lakh lac crore myriad googol").split()
ORDINALS = [re.sub("(ve|t|e|y)$", lambda end: {"ve": "f", "y": "ie"}.get(end[1], ""), word) + "th"
            for word in CARDINALS]                       # fif-th, eigh-th, nin-th, twentie-th
MULTIPLES = ("halve double triple treble quadruple quintuple sextuple septuple octuple nonuple "
             "decuple centuple").split()
GROUPS = ("dozen score gross pair couple brace duo trio quartet quintet sextet septet octet "
          "triplet quadruplet quintuplet").split()
PREFIXES = ("kilo mega giga tera peta exa zetta yotta hecto deca deka deci centi milli micro nano "
            "pico femto atto").split()
COUNTS = [*CARDINALS, *ORDINALS, *MULTIPLES, *GROUPS,
          *"half quarter third nth grand thou mil mln mio mn bil bln bn tril trln trn tn".split(),
          *(prefix + coin for prefix in PREFIXES for coin in ("dollar", "buck", "euro", "pound"))]
CHANGES = {*COUNTS, *(re.sub("y$", "ie", word) + "s" for word in COUNTS), "sixes", *PREFIXES,
           *(word[:-1] + end for word in MULTIPLES for end in ("ed", "ing")),
           *(word + "fold" for word in CARDINALS),
           *"one zero twice thrice quartered squared cubed factorial reciprocal inverse inverted "
           "recurring repeating th ths minus plus negative negated below under beneath subzero "
           "divided multiplied modulo or nor not binary octal hex hexadecimal mille alpha beta "
           "gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau "
           "upsilon phi chi omega".split()}
# Names of one unit. LETTERS are units only where both answers have one, or after "per": beside a
# bare 5, "5 m" may be five million, and "5 g" algebra.
UNITS = ("hour hr/minute min/second sec/week wk/month mo/year yr/inch in/foot ft feet/yard yd/"
         "mile mi/pound lb/ounce oz/gallon gal/quart qt/pint pt/teaspoon tsp/tablespoon tbsp/cent/"
         "percent pct/dollar usd buck/euro eur/degree deg/square sq/cubic cu/calorie cal/am/pm/"
         "person people/child children/penny pence/tooth teeth/goose geese/mouse mice/hertz hz/"
         "meter/gram gramme/liter/watt/byte/volt/kilogram kilo/celsius/fahrenheit").split("/")
UNITS = {short: names.split()[0] for names in UNITS for short in names.split()} | {
    "mph": "mile per hour", "kph": "kilometer per hour", "kmh": "kilometer per hour",
    "mpg": "mile per gallon", "cc": "cubic centimeter"} | {
    short: prefix + base for bases, prefixes in (
        ("meter gram liter second", "kilo deci centi milli nano"),
        ("watt byte volt", "kilo mega giga tera"))
    for base in bases.split() for prefix in prefixes.split()
    for short in (prefix + base, prefix[0] + base[0])}
LETTERS = {name[0]: name for name in ("meter gram liter second hour day watt byte volt celsius "
                                      "fahrenheit").split()}
SYMBOLS = {"$": "dollars", "€": "euros", "£": "pounds", "¥": "yen", "₹": "rupees", "¢": "cents",
           "%": "percent", "°": "degrees", "/": "per"}
UNIT = re.compile(r"( ?)([a-zà-ÿ]+(?:['-][a-zà-ÿ]+)*)\.?(\^[23]| squared| cubed)?")

# One character for all of its twins, one spelling for all of LaTeX's, nothing wrapped around.
TWINS = str.maketrans(dict(zip("−‐‑‒–—⁄∕×·⋅º∘‘’“”", "------//***°°''\"\"")) | {
    chr(0xFF01 + i): chr(0x21 + i) for i in range(94)} | dict.fromkeys("\u200b\u2060\ufeff", "") | {
    c: f" {n}/{d}" for c, n, d in zip("½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞", "112131234151357", "233445555668888")})
RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
SPELLINGS = [
    (r"\\[cdt]frac", r"\\frac"), (r"\{,\}", ","), (r"(?<=,)\\! ?", ""), ("(?i)per cent", "percent"),
    (r"\\frac ?(?:\{ ?(-?\d+) ?\}|(\d)) ?(?:\{ ?(\d+) ?\}|(\d))", r" \1\2/\3\4"),
    (r"\\(?:(?:text|math)(?:bf|it|rm|sf|tt|normal)?|mbox|operatorname) ?\{([^{}]*)\}", r" \1"),
    (r"\^ ?(?:°|\\circ|\{(?:°|\\circ)\})|\\degree", "°"), (r"([_^])\{(\w)\}", r"\1\2"),
    (r"\\left|\\right|\\[!,;:]", ""), (r"~|(?<!\\)\\ ", " "), (r"\\([$%])", r"\1"),
    (r"(?i)(met|lit)re", r"\1er"), (r"(?i)(?<=[0-9 ][ap])\.m\b", "m")]
WRAPPED = re.compile(r"""(?:\$(.*)\$ | \\boxed\ ?\{(.*)\} | \\\((.*)\\\) | \\\[(.*)\\\]
    | \(([^(),\[\]]*)\) | ([A-Za-z])[):] | ([*_`"']{1,3})(.+)\7)\.?""", re.VERBOSE)
NAMED = re.compile(r"(\\?[A-Za-z]\w*) ?= ?([^=]+)")
NUMBER = re.compile(r"""([$€£¥₹]?)\ ?([+-]?)\ ?([$€£¥₹]?)\ ?(?:(\d+)\ (?=\d+/))?
    ((?:[1-9]\d{0,2}(?:,\d{3})+(?:\.\d*)?|\d+\.?\d*|\.\d+)(?:e[+-]?\d{1,3}(?!\d))?)
    (?:/(\d+))?(.*)""", re.VERBOSE | re.ASCII)


def plain(text):
    """**(A).** -> A; \\boxed{\\dfrac12} -> 1/2; "blue." -> blue; the rest stays as it is."""
    text = re.sub("(?<=[0-9])[\u00a0\u2009\u202f](?=[0-9]{3}(?![0-9]))", "", text.translate(TWINS))
    text = re.sub("[⁰¹²³⁴-⁹⁺⁻]+", lambda m: "^" + m[0].translate(RAISED), " ".join(text.split()))
    for pattern, new in SPELLINGS:
        text = re.sub(pattern, new, text)
    text = " ".join(text.split())
    rounds = 8                                     # a rollout may open any number of wrappings
    while rounds and (found := WRAPPED.fullmatch(text)):
        text, rounds = found[found.lastindex].strip(), rounds - 1
    return text.removesuffix(".").strip()


def named(text):
    """"x = 5" -> ("x", "5"); "\\boxed{5}" -> ("", "5")."""
    found = NAMED.fullmatch(text := plain(text))
    return (found[1], plain(found[2])) if found else ("", text)


def unit(said, letters):
    """" sq. ft/hrs" -> "square foot per hour", "" -> ""; None if a word changes the number before
    it (5 dozen), or there is no word (5x, 5 7). Plurals lose their end: boxes, box -> box."""
    names = []
    for gap, word, power in UNIT.findall(said):
        word = re.sub(r"[a-z]+illion", "million", word)                 # bi-, zi-, quattuordec-
        one = re.sub(r"s+$", "", re.sub(r"(?<=[sxzo])es?$|(?<=[cs]h)es?$", "", word))
        one = re.sub(r"men$", "man", re.sub(r"[fv]e?$", "f", re.sub(r"ie$", "y", one)))
        known, after = UNITS.get(word) or UNITS.get(one), names[-1:]
        if word in ("a", "an") and names:
            known = "per"
        elif len(word) == 1:
            known = (letters or after in (["per"], ["degree"])) and LETTERS.get(word)
            if not known:
                return None
        rate = word in GROUPS and after == ["per"] != names             # 5 dollars per dozen
        if not known and not gap or not rate and CHANGES & {*re.split("['-]", word)}:
            return None
        if power and not (known or "").endswith(("meter", "inch", "foot", "yard", "mile",
        "second")):
            return None                            # 5 squared, 5 dollars squared
        power = power and ("square " if power in ("^2", " squared") else "cubic ")
        names += [power + (known or one)] * (after != [known or one])
    return None if UNIT.sub("", said).strip() else " ".join(names)


def read(text, letters=False):
    """A plain text -> its (value, unit, words of the unit), or None: see `quantity`."""
    text = re.sub(r"^(\D{0,4})10(?=\^|\*\*)", r"\g<1>1*10", text.lower()) if len(text) < 101 else ""
    text = re.sub(r"(?<=\d) ?(?:x|\*|\\times|\\cdot) ?10(?:\^|\*\*)[{(]?([+-]?\d{1,3})(?!\d)[)}]?",
                  r"e\1", text)
    match = NUMBER.fullmatch(text)
    if match is None or match[6] and not int(match[6]):
        return None
    before, sign, after, whole, top, bottom, rest = (part or "" for part in match.groups())
    value = Fraction(top.replace(",", "")) / int(bottom or 1) + int(whole or 0)
    words = re.sub(r"[%°$€£¥₹¢/]", lambda m: f" {SYMBOLS[m[0]]} ", rest).rstrip().replace("  ", " ")
    if (before or after) and words[:1].isalpha():                       # $5k
        return None
    words = "".join(f" {SYMBOLS[symbol]}" for symbol in before + after) + words
    name = unit(words, letters)
    return None if name is None else (-value if sign == "-" else value, name, words)


def quantity(text):
    """A number, perhaps with a unit -> (Fraction, "mile per hour" or ""); None for anything else.

    read:     1,000  1{,}000  -7  -$7  .5  1/2  1 1/2  \\frac{1}{2}  4.5e33  1.0 \\times 10^3  10^3
              $18.90  50%  5cm  15 cm^2  60 miles per hour  72 clips in May  x = 5  **5**  \\(5\\)
    not read: 12,34  5x  5k  5 dozen  5 below  5 and a half  7 8  7 or 8  6+1  about 5  1/0"""
    found = read(named(text)[1])
    return found and found[:2]


def number(text):
    """The value of `quantity`, a Fraction, or None."""
    return (quantity(text) or [None])[0]


def canonical(text):
    """One spelling of a number and its unit: "5.40 \\text{ cents}" -> "5.4 cents", "$1,000" ->
    "1000 dollars", "\\frac12" -> "1/2"; None where `quantity` is None."""
    if (found := read(named(text)[1])) is None:
        return None
    value, _, words = found
    if "." in text and 10**100 % value.denominator == 0:
        value = format(Context(prec=2000).divide(value.numerator, value.denominator), "f")
    return f"{value}{words}"


def wording(text):
    """A plain text, to the letter but for spaces at signs and the case of mere words."""
    text = re.sub(r"(?<=[^\w ]) | (?=[^\w ])", "", text)
    words = re.fullmatch(r"[^\W\d_]|(?:[\d.,]+ )?[^\W\d_]{2,}(?:[ ,.'-][^\W\d_]{2,})*", text)
    return text.casefold() if words else text


def vote_key(text):
    """Answers with equal keys are one vote of maj@k. 5 km is 5 kilometers, not 5 miles nor 5."""
    text = named(text)[1]
    found = read(text, letters=True)
    return found[:2] if found else wording(text)


def right(said, answer):
    """Is what was said this answer? A list holds alternatives; numbers may come as numbers."""
    if isinstance(answer, list):
        return any(right(said, one) for one in answer)
    (x, said), (y, answer) = named(said), named(str(answer).rpartition("####")[2])
    if x and y and x != y:
        return False
    for letters in (False, True):
        a, b = read(said, letters), read(answer, letters)
        if a and b:
            return a[0] == b[0] and (a[1] == b[1] or not letters and not (a[1] and b[1]))
    return not (a or b) and wording(said) == wording(answer) != ""
