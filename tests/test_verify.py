"""verify on answers as people and models write them: every case says why by its group."""
import time

import pytest
import answers
from conftest import kernel

SAY = "<think>so</think><answer>{}</answer><|end|>"

# group: [(what stands in <answer>, the gold answer, expected)]
CASES = {
    "the number itself": [
        ("72", "72", 1), (" 72\n", "72", 1), ("73", "72", 0), ("720", "72", 0), ("7", "72", 0)],
    "gold as GSM8K writes it": [
        ("72", "She sold 48+24 = 72 clips.\n#### 72", 1), ("72", "#### 72", 1),
        ("48", "48/2 = 24\n#### 72", 0), ("1080", "#### 1,080", 1), ("72", "#### 5 #### 72", 1),
        ("", "####", 0), ("72", "", 0)],
    "the model may not copy the source's mark": [
        ("#### 72", "72", 0), ("5 #### 72", "72", 0)],
    "commas between thousands": [
        ("1,234", "1234", 1), ("1234", "1,234", 1), ("1,234,567.5", "1234567.5", 1),
        ("12,34", "1234", 0), ("1,2345", "12345", 0), ("0,123", "123", 0),
        ("1, 234", "1,234", 0), ("1234,567", "1234567", 0)],
    "currency": [
        ("$18", "18", 1), ("18", "$18", 1), ("$ 18", "18", 1), ("-$18", "-18", 1),
        ("$-18", "-18", 1), ("18 dollars", "$18", 1), ("$18 dollars", "$18", 1),
        ("$1,234.50", "1234.5", 1), ("18€", "18", 1), ("£18", "$18", 0), ("$18", "19", 0)],
    "percent is a unit: 50 % is 50, not a half": [
        ("50%", "50", 1), ("50 %", "50", 1), ("50 percent", "50%", 1), ("50%", "0.5", 0),
        ("$50", "50%", 0)],
    "where the gold has no unit, any trailing words": [
        ("72 clips", "72", 1), ("5 km", "5", 1), ("20 square feet", "20", 1), ("6 months", "6", 1),
        ("60 miles per hour", "60", 1), ("1/2 cup", "0.5", 1), ("5cm", "5", 1), ("5 km", "6", 0),
        ("72 clips in May", "72", 1), ("5 red apples", "5", 1), ("$5 per hour", "5", 1),
        ("5 dollars a day", "5", 1), ("5 hens", "5", 1), ("5 tents", "5", 1), ("5 tenses", "5", 1),
        ("5 tenants", "5", 1), ("5 seconds", "5", 1), ("5 millionaires", "5", 1),
        ("5 scoreboards", "5", 1), ("5 quarterbacks", "5", 1), ("5 stallions", "5", 1),
        ("5 medallions", "5", 1), ("5 pavilions", "5", 1),
        ("5 zeros", "5", 1), ("5 ones", "5", 1), ("5 kilos", "5", 1), ("5 decades", "5", 1),
        ("5 microscopes", "5", 1), ("5 centipedes", "5", 1), ("5 canteens", "5", 1),
        ("5 foldables", "5", 1), ("5 times", "5", 1), ("5 fewer", "5", 1), ("5 t-shirts", "5", 1),
        ("5 o'clock", "5", 1), ("5 p.m.", "5", 1), ("5 jalapeños", "5", 1), ("5 in.", "5", 1),
        ("5 dollars per dozen", "5", 1), ("5 per dozen", "5", 0), ("5 square", "5", 1),
        ("Clips 72", "72", 0), ("5 clips, 2 pens", "5", 0), ("5 clips 2", "5", 0)],
    "where the gold has a unit, that one, its plural or its abbreviation": [
        ("5", "5 km", 1), ("5 km", "5 km", 1), ("5 km", "5 miles", 0), ("5 km", "5 kilometers", 1),
        ("5 centimetres", "5 cm", 1), ("5cm", "5 centimeter", 1), ("5 cm", "5 mm", 0),
        ("1 hours", "1 hour", 1), ("12 hrs", "12 hours", 1), ("12 h", "12 hours", 1),
        ("12h", "12 h", 1), ("12 hr.", "12 hrs", 1), ("12 hours", "12 minutes", 0),
        ("5 apple", "5 apples", 1), ("5 boxes", "5 box", 1), ("5 cookie", "5 cookies", 1),
        ("5 ponies", "5 pony", 1), ("5 bus", "5 buses", 1), ("5 glass", "5 glasses", 1),
        ("5 knives", "5 knife", 1), ("5 women", "5 woman", 1), ("5 people", "5 person", 1),
        ("5 feet", "5 ft", 1), ("5 lbs", "5 pounds", 1), ("5 planes", "5 plans", 0),
        ("60 mph", "60 miles per hour", 1), ("60 miles/hour", "60 miles an hour", 1),
        ("60 miles", "60 miles per hour", 0), ("5 km/h", "5 kph", 1), ("5 m/s", "5 m/s", 1),
        ("5 meters per second", "5 m/s", 1), ("5 sq. ft", "5 square feet", 1),
        ("5 feet", "5 square feet", 0), ("15 square centimeters", "15\\mbox{ cm}^2", 1),
        ("15 cm²", "15 cm^2", 1), ("15 cm^3", "15 cm^2", 0), ("5 meters squared", "5 m^2", 1),
        ("5 kilograms", "5 grams", 0), ("5 kilos", "5 kg", 1), ("5 USD", "$5", 1),
        ("5¢", "5 cents", 1), ("5 cents", "$5", 0), ("50 per cent", "50%", 1),
        ("30°C", "30 degrees Celsius", 1), ("30°", "30°C", 0), ("5 red apples", "5 apples", 0)],
    "words that change the number are no units": [
        *((f"5 {word}", "5", 0) for word in (
            "hundred thousand million billion quintillion squillions bn mn mln mil tn lakh "
            "lakhs crore grand milliard myriad tens hundreds gross pair pairs couple couples "
            "score dozens trios ten twenty seven one fives sixes nineties twenty-one half "
            "halves third quarters fifths eighth ninths tenths eleventh twelfths thirteenths "
            "twentieth thirtieths hundredths millionths tenfold threefold hundredfold double "
            "doubled tripling quadrupled halved twice thrice kilo mega milli micro megabucks "
            "kilodollars minus negative below squared cubed factorial pi theta recurring binary "
            "not").split()),
        ("5 below zero", "5", 0), ("5 and a half", "5", 0), ("5 clips and a half", "5", 0),
        ("5 half-dozen clips", "5", 0), ("5 point five", "5", 0), ("5 degrees below", "5", 0),
        ("5 dollars squared", "5", 0), ("$5 million", "5", 0), ("$5 squared", "5", 0),
        ("5 parts per million", "5", 0), ("5 or so", "5", 0), ("5bn", "5", 0),
        ("5 hundred", "500", 0),
        ("5 million", "5 million", 1), ("5 Million.", "5 million", 1),
        ("5 million", "5 billion", 0)],
    "letters at the number are no units": [
        ("2x", "2", 0), ("5k", "5", 0), ("6i", "6", 0), ("2 x", "2", 0), ("52_8", "52", 0),
        ("5 m", "5", 0), ("5M", "5", 0), ("5 K", "5", 0), ("2", "2k", 0), ("6", "6m^2", 0),
        ("6 m^2", "6", 0), ("5 xy", "5", 1), ("5xy", "5", 0), ("5th", "5", 0), ("$5k", "5", 0),
        ("$5m", "5", 0), ("52₈", "528", 0), ("5²", "52", 0), ("5²", "25", 0)],
    "powers of ten": [
        ("1e3", "1000", 1), ("1E3", "1000", 1), ("1e+3", "1000", 1), ("1e1", "10", 1),
        ("4.5e33", "45" + "0" * 32, 1), ("10^3", "1000", 1), ("10^{3}", "1000", 1),
        ("10³", "1000", 1), ("10**3", "1000", 1), ("1.0 \\times 10^3", "1000", 1),
        ("2.5 x 10^{-3}", "0.0025", 1), ("2.5 × 10⁻³", ".0025", 1), ("2 \\cdot 10^4", "2e4", 1),
        ("-10^3", "-1000", 1), ("5e3 clips", "5000", 1), ("1e3", "3", 0), ("10^3", "13", 0),
        ("10^35", "1000", 0), ("2^3", "8", 0), ("1e9999999", "10", 0), ("5 10^3", "5000", 0),
        ("1e-3", "1000", 0)],
    "a name before the value": [
        ("x=5", "5", 1), ("x = 5", "5", 1), ("5", "x=5", 1), ("$x = 5$", "5", 1),
        ("x=\\frac{1}{2}", "0.5", 1), ("Total = 5 clips", "5", 1), ("y=5", "x=5", 0),
        ("x=6", "5", 0), ("x=5 or x=6", "5", 0), ("2x=5", "5", 0), ("y=2x+3", "y = 2x + 3", 1)],
    "wrapping": [
        ("**72**", "72", 1), ("*72*", "72", 1), ("`72`", "72", 1), ("\"blue\"", "blue", 1),
        ("\\(9\\)", "9", 1), ("\\[9\\]", "9", 1), ("$$9$$", "9", 1), ("(9)", "9", 1),
        ("\\left(\\frac12\\right)", "1/2", 1), ("\\boxed{\\text{(B)}}", "B", 1),
        ("$\\boxed{9}$.", "9", 1), ("\\mathrm{9}", "9", 1), ("**9** or **7**", "9", 0),
        ("(3,4)", "3,4", 0), ("**8**", "9", 0)],
    "letters of choices": [
        ("(A)", "A", 1), ("A)", "A", 1), ("**A**", "A", 1), ("A.", "A", 1), ("(A).", "A", 1),
        ("**(A)**", "A", 1), ("A", "(A)", 1), ("C", "\\text{(C)}", 1), ("a", "A", 1),
        ("A:", "A", 1),
        ("(B)", "A", 0), ("A) or B)", "A", 0), ("AB", "A", 0), ("", "A", 0)],
    "twins of characters": [
        ("７２", "72", 1), ("－７", "-7", 1), ("\u20137", "-7", 1), ("\u20147", "-7", 1),
        ("1{,}000", "1000", 1), ("1\\,000", "1000", 1), ("1\u202f000", "1000", 1),
        ("1\u2009000\u2009000", "1000000", 1), ("7\u20098", "78", 0), ("½", "1/2", 1),
        ("5½", "5.5", 1), ("5½", "51/2", 0), ("1\u20442", "0.5", 1), ("72\u200b", "72", 1),
        ("x²", "x^{2}", 1), ("７", "8", 0), ("\u20137", "7", 0)],
    "more than one number, or a sentence, is no answer": [
        ("7 or 8", "7", 0), ("7 8", "7", 0), ("7 8", "78", 0), ("7, 8", "7", 0), ("6+1", "7", 0),
        ("7=7", "7", 0), ("7 and a half", "7", 0), ("the answer is 7", "7", 0),
        ("7/7/7", "7", 0), ("7-8", "7", 0), ("seven", "7", 0)],
    "trailing period": [
        ("72.", "72", 1), ("72 clips.", "72", 1), ("$72.", "72", 1), ("72", "72.", 1),
        ("blue.", "blue", 1), (".", "72", 0), (".", ".", 0)],
    "signs": [
        ("-7", "-7", 1), ("+7", "7", 1), ("- 7", "-7", 1), ("\u22127", "-7", 1), ("7", "-7", 0),
        ("-7", "7", 0), ("--7", "7", 0), ("+-7", "-7", 0), ("-0", "0", 1)],
    "decimals": [
        ("7.0", "7", 1), ("7.50", "7.5", 1), (".5", "0.5", 1), ("007", "7", 1), ("7.5", "7", 0),
        ("0.3333", "1/3", 0), ("7.5.1", "7.5", 0), ("7,5", "7.5", 0)],
    "fractions": [
        ("1/2", "0.5", 1), ("2/4", "1/2", 1), ("-1/2", "-0.5", 1), ("1 1/2", "1.5", 1),
        ("-1 1/2", "-1.5", 1), ("1/2", "2", 0), ("1/0", "0", 0), ("1 / 2", "1/2", 0),
        ("1 1/2", "5.5", 0)],
    "LaTeX of a number": [
        ("\\frac{14}{3}", "14/3", 1), ("14/3", "\\frac{14}{3}", 1), ("\\dfrac{1}{2}", "0.5", 1),
        ("\\frac43", "4/3", 1), ("\\cfrac{4}{3}", "4/3", 1), ("\\tfrac 43", "4/3", 1),
        ("-\\frac{1}{2}", "-1/2", 1), ("1\\frac{4}{5}", "9/5", 1),
        ("1\\frac{4}{5}", "14/5", 0), ("\\boxed{7}", "7", 1), ("\\boxed{\\frac{1}{2}}", "1/2", 1),
        ("$7$", "7", 1), ("10080", "10,\\!080", 1), ("36", "\\$36", 1), ("10", "10\\%", 1),
        ("145", "145^\\circ", 1), ("145 degrees", "145^\\circ", 1), ("7 \\pi", "7", 0),
        ("\\boxed{6} or \\boxed{7}", "7", 0), ("\\sqrt{49}", "7", 0)],
    "LaTeX of anything else, to the letter but for spaces": [
        ("(3, \\frac{\\pi}{2})", "\\left( 3, \\frac{\\pi}{2} \\right)", 1),
        ("3\\sqrt{13}", "3 \\sqrt{13}", 1), ("Evelyn", "\\text{Evelyn}", 1),
        ("3,5,7", "3, 5, 7", 1), ("x+2", "x + 2", 1), ("x+2", "2+x", 0),
        ("\\frac{11+9a}{20}", "11+9a/20", 0), ("(3,4)", "(4,3)", 0),
        ("13\\sqrt{3}", "3\\sqrt{13}", 0)],
    "words, whatever their case; of signs and symbols the case counts": [
        ("blue", "blue", 1), ("Blue", "blue", 1), ("Yes", "yes", 1), ("NO", "No", 1),
        ("yes", "no", 0),
        ("new york", "New York", 1), ("light  blue", "light blue", 1),
        ("lightblue", "light blue", 0),
        ("", "blue", 0), ("blue or red", "blue", 0), ("P-Q", "p-q", 0), ("3R^2", "3r^2", 0),
        ("\\Pi", "\\pi", 0)],
    "a gold that is a number, or a list of alternatives": [
        ("5", 5, 1), ("5.0", 5, 1), ("5", 5.0, 1), ("0.1", 0.1, 1), ("1e24", 1e24, 1), ("6", 5, 0),
        ("-5", -5, 1), ("5", [5], 1), ("5 km", ["5 miles", "5 km"], 1), ("blue", [5, "blue"], 1),
        ("6", [5, "blue"], 0), ("5", [], 0), ("", [""], 0), ("9", ["#### 8", "so\n#### 9"], 1)],
}


@pytest.mark.parametrize("said, answer, expected, group", [
    (*case, group) for group, cases in CASES.items() for case in cases])
def test_answers(said, answer, expected, group):
    assert kernel.verify(SAY.format(said), answer) == expected, group


# None: counted as unparsed. Only what stands in <answer> counts, never a number somewhere else.
UNPARSED = ["", "72", "72<|end|>", "#### 72<|end|>", "\\boxed{72}<|end|>", "<answer>72</answer>",
            "The answer is 72.<|end|>", "<think>72</think><|end|>",
            "<think>72</think>72<|end|>", "<answer>72<|end|>", "so <answer>72</answer><|end|>",
            "<answer>72</answer> clips<|end|>", "<answer>72</answer><answer>72</answer><|end|>",
            "<think><answer>72</answer></think><|end|>", "<answer>72</answer><|end|>\n"]


@pytest.mark.parametrize("completion", UNPARSED)
def test_unparsed_is_none_and_not_zero(completion):
    assert kernel.verify(completion, "72") is None


def test_the_trace_never_counts():
    assert kernel.verify("<think>72</think><answer>5</answer><|end|>", "72") == 0
    assert kernel.verify("<think>72</think><answer></answer><|end|>", "72") == 0


def test_enough_cases():
    assert sum(map(len, CASES.values())) >= 300 and all(len(c) > 1 for c in CASES.values())


@pytest.mark.parametrize("text", ["9" * 5000, "$" * 5000, "1," * 5000, "\\frac" * 3000, "{" * 5000,
                                  "\\boxed{" * 3000, "1 " * 5000, " " * 5000, "a" * 5000, "\u0663",
                                  "\u00b2", "1/" + "0" * 50])
def test_whatever_is_said_is_judged_at_once(text):
    """A rollout may say anything: no exception, no regular expression that runs away."""
    assert kernel.verify(SAY.format(text), "72") == 0
    assert answers.number(text) is None


NEAR = [("5 lakh", "5 lake"), ("5 tens", "5 tents"), ("5 score", "5 scorers"), ("5 pi", "5 pies"),
        ("5 bn", "5 bins"), ("5 gross", "5 grosbeaks"), ("5 ninths", "5 nights"),
        ("5 halves", "5 calves"), ("5 mil", "5 miles"), ("5 couple", "5 couplings")]


@pytest.mark.parametrize("changes, counts", NEAR)
def test_whole_words_change_a_number(changes, counts):
    """A word that only begins like one, or differs in a letter, is a thing that one counts."""
    assert answers.number(changes) is None and answers.number(counts) == 5


def test_the_rule_reaches_every_member():
    """Each number word as it is, as a plural, a fraction, many of them, and many times."""
    for word in answers.CARDINALS + answers.ORDINALS + answers.MULTIPLES + answers.GROUPS:
        plural = word[:-1] + "ies" if word.endswith("y") else word + "s"
        for form in (word, plural, word.upper(), "and-" + word, "clips " + word):
            assert answers.number(f"5 {form}") is None, form
    fractions = "fourth fifth eighth ninth twelfth twentieth ninetieth thousandth millionth".split()
    assert set(fractions) <= set(answers.ORDINALS)
    assert not set(answers.UNITS) & answers.CHANGES - {"kilo"}     # no unit is lost to the table


# What was 1 before the words were read as words: it must stay so, by (said, gold).
KEPT = [(said.format(n), gold.format(n)) for n in ("5", "1,080", "12.50", "1/2") for said, gold in (
    ("{}", "{}"), ("${}", "{}"), ("{}", "${}"), ("-{}", "-{}"), ("+{}", "{}"), ("{}%", "{}"),
    ("{}", "{} %"), ("{} clips", "{}"), ("{}", "{} clips"), ("{} clips", "{} clips"),
    ("{} per", "{}"), ("{} square feet", "{} square feet"), ("{} miles per hour", "{}"),
    ("{} eggs per dozen", "{}"), ("${} dollars", "${}"), ("{} dollars", "${}"), ("{}€", "{}"),
    ("\\boxed{{{}}}", "{}"), ("${}$", "{}"), ("\\text{{{}}}", "{}"), ("{}^\\circ", "{} degrees"),
    ("{}\\%", "{} percent"), ("\\${}", "{} dollars"), ("{}.", "{}"), ("{} cats.", "{} cats"))]


@pytest.mark.parametrize("said, gold", KEPT)
def test_right_before_is_right_now(said, gold):
    assert kernel.verify(SAY.format(said), gold) == 1


ADVERSE = ["1", "<", "{", "}", "1,", " ", "1 ", "a ", "a", "ab-", "<think>", "\\text{",
           "\\frac{1", "(",
           "\\boxed{", "*", "_", "$", "a=", "\"'", "²", "½", "1\u2009", "^ ", "per ", "\\", "-",
           "1e"]


@pytest.mark.parametrize("piece", ADVERSE)
def test_time_is_linear(piece):
    """Eight times the text takes about eight times as long, not 64: in trace, answer and gold."""
    def seconds(length):
        text = piece * (length // len(piece))
        begun = time.process_time()
        kernel.verify(f"<think>{text}</think><answer>{text}</answer><|end|>", text)
        return time.process_time() - begun
    assert seconds(200_000) < 20 * min(seconds(25_000) for _ in range(2)) + 0.05


def test_prepared_answers_keep_their_units():
    shown = {"5.40 \\text{ cents}": "5.4 cents", "$1,000": "1000 dollars", "\\frac12": "1/2",
             "145^\\circ": "145 degrees", "-7.50": "-7.5", "15\\mbox{ cm}^2": "15 cm^2", "9": "9",
             "0.0000672": "0.0000672", "7.5/7": "15/14", "5 hrs": "5 hrs", "$5 per hour":
             "5 dollars per hour", "10\\%": "10 percent", "x=5": "5", "5e3": "5000"}
    for text, plain in shown.items():
        assert answers.canonical(text) == plain
        assert answers.quantity(plain) == answers.quantity(text) is not None
    assert answers.canonical("5 dozen") is None and answers.canonical("blue") is None
    assert kernel.verify(SAY.format("$5.40"), answers.canonical("5.4 \\text{ cents}")) == 0


def test_votes_keep_their_units():
    same = [["5 km", "5km", "5.0 kilometers", "\\text{5 km}"], ["5"], ["5 miles"], ["(A)", "A.",
    "a"],
            ["12 h", "12 hours", "12hrs"], ["Blue", "blue."], ["x+2",
            "x + 2"], ["5 m"], ["5 million"]]
    keys = [{answers.vote_key(text) for text in group} for group in same]
    assert all(len(group) == 1 for group in keys) and len(set.union(*keys)) == len(same)


def test_votes_of_maj_at_k_are_by_value():
    import eval as report
    votes = [SAY.format(a) for a in ("72 clips", "72", "\\frac{144}{2}", "5", "5", "junk 5")]
    assert report.majority(votes, "#### 72") == 1 and report.majority(votes, "5") == 0
