"""verify on answers as people and models write them: every case says why by its group."""
import pytest
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
    "units": [
        ("72 clips", "72", 1), ("5 km", "5", 1), ("5", "5 km", 1), ("5 km", "5 km", 1),
        ("5 km", "5 miles", 0), ("20 square feet", "20", 1), ("60 miles per hour", "60", 1),
        ("1/2 cup", "0.5", 1), ("6 months", "6", 1), ("Clips 72", "72", 0), ("5 km", "6", 0)],
    "words that change the number are no units": [
        ("5 hundred", "5", 0), ("5 million", "5", 0), ("5 dozen", "5", 0), ("5 halves", "5", 0),
        ("5 tenths", "5", 0), ("5 squared", "5", 0), ("8 pi", "8", 0), ("5 hundred", "500", 0)],
    "letters at the number are no units": [
        ("2x", "2", 0), ("5k", "5", 0), ("6i", "6", 0), ("2 x", "2", 0), ("1e1", "10", 0),
        ("52_8", "52", 0)],
    "more than one number, or a sentence, is no answer": [
        ("7 or 8", "7", 0), ("7 8", "7", 0), ("7 8", "78", 0), ("7, 8", "7", 0), ("6+1", "7", 0),
        ("7=7", "7", 0), ("x = 7", "7", 0), ("7 and a half", "7", 0), ("the answer is 7", "7", 0),
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
        ("\\frac43", "4/3", 1), ("-\\frac{1}{2}", "-1/2", 1), ("1\\frac{4}{5}", "9/5", 1),
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
    "words": [
        ("blue", "blue", 1), ("Blue", "blue", 0), ("light  blue", "light blue", 1),
        ("lightblue", "light blue", 0), ("", "blue", 0), ("blue or red", "blue", 0)],
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
    assert sum(map(len, CASES.values())) >= 80 and all(len(c) > 1 for c in CASES.values())


@pytest.mark.parametrize("text", ["9" * 5000, "$" * 5000, "1," * 5000, "\\frac" * 3000, "{" * 5000,
                                  "\\boxed{" * 3000, "1 " * 5000, " " * 5000, "a" * 5000, "\u0663",
                                  "\u00b2", "1/" + "0" * 50])
def test_whatever_is_said_is_judged_at_once(text):
    """A rollout may say anything: no exception, no regular expression that runs away."""
    assert kernel.verify(SAY.format(text), "72") == 0
    assert kernel.number(text) is None


def test_votes_of_maj_at_k_are_by_value():
    import eval as report
    votes = [SAY.format(a) for a in ("72 clips", "72", "\\frac{144}{2}", "5", "5", "junk 5")]
    assert report.majority(votes, "#### 72") == 1 and report.majority(votes, "5") == 0
