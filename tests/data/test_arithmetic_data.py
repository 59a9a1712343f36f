"""The data of the environment ``arithmetic``: the script, the calls and the results agree."""

from __future__ import annotations

import gzip
import json
import runpy
from functools import cache
from typing import Any

from helpers.preference_data import CHECKOUT

from align.rewards.environments import load_environment

FOLDER = CHECKOUT / "data" / "arithmetic"


@cache
def rows() -> list[dict[str, Any]]:
    with gzip.open(FOLDER / "demonstrations.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_the_script_reproduces_the_file():
    assert runpy.run_path(str(FOLDER / "make.py"))["rows"]() == rows()


def test_the_environment_answers_the_calls_of_the_demonstrations_in_the_same_way():
    world, solved, calls = load_environment("arithmetic"), 0.0, 0
    for row in rows():
        episode, messages = world.reset(row, seed=0)
        assert messages == row["prompt"][:1]
        if len(row["prompt"]) > 1:
            call, result = row["prompt"][1:]
            assert world.step(episode, row, call["content"]).messages == [result]
            calls += 1
        step = world.step(episode, row, row["completion"][0]["content"])
        assert step.ended
        solved += step.reward
    # 60 % of the demonstrations call the calculator, and 85 % of the calls are right.
    assert abs(calls / len(rows()) - 0.6) < 0.03
    assert abs(solved / len(rows()) - 0.6 * 0.85) < 0.05


def test_questions_differ_and_have_one_answer():
    questions = [row["prompt"][0]["content"] for row in rows()]
    assert len(set(questions)) == len(questions) == 2000
