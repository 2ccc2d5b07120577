"""data/svamp.py: SVAMP's word problems -> rl_train.jsonl, rl_val.jsonl, rl_test.jsonl.

    {"Body", "Question", "Answer": 51.0, "Equation": "( 76.0 - 25.0 )", "Type"}
    ->  {"prompt": body and question, "answer": "51", "steps": operations, "kind": type}

Rows whose answer is not a number are dropped. Patel et al. 2021; MIT. The authors' SVAMP.json
holds all 1,000 problems: ask them all with --test, or hold a share out with --test_share.

    python data/svamp.py --test SVAMP.json                     questions for eval.py
    python data/svamp.py --train SVAMP.json --test_share 0.3   one file in three
    python data/svamp.py                                       from the Hub (ChilleD/SVAMP)
"""
from rows import Drop, cli, field, numeric, prepare


def convert(row):
    body, question = field(row, "Body"), field(row, "Question")
    if not body or not question:
        raise Drop("empty text")
    if body[-1].isalnum():             # "... on each pack" "How much ...?"
        body += "," if body.split(". ")[-1].startswith("If ") else "."
    return {"prompt": f"{body} {question}", "answer": numeric(str(row["Answer"])),
            "steps": sum(field(row, "Equation").count(f" {sign} ") for sign in "+-*/"),
            "kind": field(row, "Type")}


def main(argv=None):
    args = cli(__doc__, "svamp", hub="ChilleD/SVAMP", test_split="test").parse_args(argv)
    prepare(args, "svamp", "rl", convert)


if __name__ == "__main__":
    main()
