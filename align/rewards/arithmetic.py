"""The embedded environment ``arithmetic``: word problems, and a calculator that may be called.

A turn ``calculate: 12 + 7 * 3`` is a call, which the tool answers with the result. A turn ``result:
33`` ends the episode, with reward 1 if the number is right, else 0. Any other turn ends it with
reward 0. The questions are the data set ``arithmetic``; its column ``answer`` is the right number.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

CALL = re.compile(r"calculate: (\d{1,4}(?: [+*-] \d{1,4}){0,4})")
ANSWER = re.compile(r"result: (-?\d+)")


class Arithmetic:
    """One episode: a question, calls of the calculator, an answer."""

    answer: int

    def reset(self, row: Mapping[str, Any]) -> list[dict[str, str]]:
        """The question of a row."""
        if "answer" not in row:
            raise ValueError("the prompts have no column `answer`; set `keep_columns: [answer]`")
        self.answer = int(row["answer"])
        return [turn for turn in row["prompt"] if turn["role"] == "user"][:1]

    def step(self, completion: str) -> tuple[list[dict[str, str]], float, bool]:
        """The result of a call, or the reward of an answer."""
        if call := CALL.fullmatch(completion.strip()):
            result = f"result: {calculate(call[1])}"
            return [{"role": "tool", "content": result}], 0.0, False
        answer = ANSWER.fullmatch(completion.strip())
        return [], float(answer is not None and int(answer[1]) == self.answer), True


def calculate(expression: str) -> int:
    """The value of whole numbers that are added, subtracted and multiplied.

    >>> calculate("12 + 7 * 3 - 1")
    32
    """
    total, sign, product = 0, 1, 1
    for operator, number in re.findall(r"([+*-]?) ?(\d+)", expression):
        if operator == "*":
            product *= int(number)
            continue
        total += sign * product if operator else 0
        sign, product = (-1 if operator == "-" else 1), int(number)
    return total + sign * product
