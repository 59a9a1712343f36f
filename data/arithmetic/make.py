"""Write the data set of the environment ``arithmetic``: questions with demonstrations.

Half of the demonstrations call the calculator, some of them wrongly; the others guess. Every run
writes the same bytes. It needs `align` to be installed::

    python data/arithmetic/make.py
"""

import gzip
import json
from pathlib import Path
from random import Random
from typing import Any, Final

from align.rewards.arithmetic import calculate

SEED: Final = 20261127
N_QUESTIONS: Final = 2000
NAMES: Final = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana")
THINGS: Final = ("pens", "shells", "coins", "stamps", "plums", "cards", "keys", "beads")
KINDS: Final = {
    "{a} + {b}": (
        "{name} has {a} {things} and finds {b} more. How many does {name} have?",
        "There are {a} {things} on the table and {b} in the box. How many are there?",
    ),
    "{a} - {b}": (
        "{name} has {a} {things} and loses {b}. How many are left?",
        "Of {a} {things}, {name} sells {b}. How many are left?",
    ),
    "{a} * {b}": (
        "{name} fills {a} boxes with {b} {things} each. How many are there?",
        "A box holds {b} {things}. How many does {name} have in {a} boxes?",
    ),
    "{a} * {b} + {c}": (
        "{name} has {a} boxes of {b} {things} and {c} more. How many are there?",
        "{name} has {c} {things}, and {a} boxes of {b}. How many are there?",
    ),
}
GUESSES: Final = 0.4
"""Share of the demonstrations that answer without the calculator."""
SLIPS: Final = 0.15
"""Share of the calls with another operator, or another number."""


def question(rng: Random) -> tuple[str, str]:
    """A question, and the expression whose value is its answer."""
    expression, phrasings = rng.choice(list(KINDS.items()))
    a = rng.randint(2, 4) if "*" in expression else rng.randint(40, 69)
    numbers = {"a": a, "b": rng.randint(10, 19), "c": rng.randint(10, 19)}
    words = {"name": rng.choice(NAMES), "things": rng.choice(THINGS)}
    return rng.choice(phrasings).format(**numbers, **words), expression.format(**numbers)


def slip(rng: Random, expression: str) -> str:
    """An expression with another operator, or with another number."""
    parts = expression.split()
    place = rng.randrange(len(parts))
    wrong = "+-*" if place % 2 else [str(number) for number in range(10, 20)]
    parts[place] = rng.choice([each for each in wrong if each != parts[place]])
    return " ".join(parts)


def row(rng: Random) -> dict[str, Any]:
    """A question with its answer and a demonstration."""
    text, expression = question(rng)
    answer = calculate(expression)
    prompt = [{"role": "user", "content": text}]
    if rng.random() < GUESSES:
        result = rng.randint(10, 99)
    else:
        call = slip(rng, expression) if rng.random() < SLIPS else expression
        result = calculate(call)
        prompt += [
            {"role": "assistant", "content": f"calculate: {call}"},
            {"role": "tool", "content": f"result: {result}"},
        ]
    completion = [{"role": "assistant", "content": f"result: {result}"}]
    return {"prompt": prompt, "completion": completion, "answer": answer}


def rows() -> list[dict[str, Any]]:
    """All rows, with different questions."""
    rng, by_question = Random(SEED), dict[str, dict[str, Any]]()
    while len(by_question) < N_QUESTIONS:
        new = row(rng)
        by_question.setdefault(new["prompt"][0]["content"], new)
    return list(by_question.values())


def main() -> None:
    """Write ``demonstrations.jsonl.gz`` beside this file."""
    text = "".join(json.dumps(each) + "\n" for each in rows())
    file = Path(__file__).parent / "demonstrations.jsonl.gz"
    file.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))


if __name__ == "__main__":
    main()
