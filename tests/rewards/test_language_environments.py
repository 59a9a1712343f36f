"""Environments: what their classes may return, and one error for everything else."""

from __future__ import annotations

import random
import sys
from typing import Any

import numpy as np
import pytest
import torch

from align.errors import UserError
from align.rewards.arithmetic import Arithmetic, calculate
from align.rewards.environments import Environment, load_environment

ROW = {"prompt": [{"role": "user", "content": "How many?"}], "prompt_id": "0", "answer": 5}
HELLO = [{"role": "user", "content": "Hello"}]


def environment(
    reset: Any = lambda row: row["prompt"], step: Any = lambda text: (HELLO, 1, False)
) -> Environment:
    """An environment whose methods are functions."""
    methods = {"reset": staticmethod(reset), "step": staticmethod(step)}
    return Environment("world:World", type("World", (), methods))


def test_an_episode_begins_with_messages_and_continues_with_those_of_each_step():
    world = environment()
    episode, messages = world.reset(ROW, seed=0)
    assert messages == ROW["prompt"]
    step = world.step(episode, ROW, "Five.")
    assert (step.messages, step.reward, step.ended) == (HELLO, 1.0, False)


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (([], True, True), ([], 1.0, True)),
        ((None, np.float32(0.5), np.bool_(True)), ([], 0.5, True)),
        ([HELLO, torch.tensor(-2.0), torch.tensor(False)], (HELLO, -2.0, False)),
        ((({"role": "tool", "content": "", "name": "f"},), 0, False),
         ([{"role": "tool", "content": "", "name": "f"}], 0.0, False)),
    ],
)  # fmt: skip
def test_numbers_of_other_libraries_are_numbers(result: Any, expected: Any):
    world = environment(step=lambda text: result)
    step = world.step(world.new(), ROW, "x")
    assert (step.messages, step.reward, step.ended) == expected


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "returned None; `step` must return (messages, reward, done)"),
        (([], 1.0), "returned tuple ([], 1.0); `step` must return"),
        ((HELLO, 1.0, "no"), "`done` is str 'no', expected True or False"),
        ((HELLO, None, False), "the reward is None; expected a finite number"),
        ((HELLO, float("nan"), False), "the reward is float nan; expected a finite number"),
        ((HELLO, "1", False), "the reward is str '1'; expected a finite number"),
        ((HELLO, 10**400, False), "the reward is int 1000"),
        (([], 1.0, False), "returned no messages although the episode continues"),
        (("Hello", 1.0, False), "expected a list of messages, got str 'Hello'"),
        ((["Hello"], 1.0, False), "message 1 is str 'Hello'; expected {'role': …, 'content': …}"),
        (([{"role": "bot", "content": ""}], 0, False), "message 1 has the role 'bot'; allowed are"),
        (([*HELLO, {"role": "tool", "content": 5}], 0, False),
         "message 2 has the content int 5; expected a text"),
        (([{"role": "tool", "content": "5", "x": 1}], 0, False),
         "message 1 has the field `x`; allowed are `content`,"),
        (([{"role": "assistant", "content": "x"}], 0, False),
         "returned a message of the role `assistant` although the episode continues"),
    ],
)  # fmt: skip
def test_other_results_of_a_step_are_refused_with_turn_and_row(result: Any, message: str):
    world = environment(step=lambda text: result)
    with pytest.raises(UserError) as error:
        world.step(world.new(), ROW, "Five.")
    start = "world:World: `step` with 'Five.' in the episode of the row 'How many?': "
    assert str(error.value).startswith(start)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([], "returned no message at the end, expected one of `user` or `tool`"),
        ([*HELLO, {"role": "assistant", "content": "x"}],
         "returned a message of the role `assistant` at the end"),
        ({"role": "user"}, "expected a list of messages, got dict {'role': 'user'}"),
    ],
)  # fmt: skip
def test_other_results_of_reset_are_refused(result: Any, message: str):
    with pytest.raises(UserError) as error:
        environment(reset=lambda row: result).reset(ROW, seed=0)
    assert f"world:World: `reset` of the row 'How many?': {message}" in str(error.value)


def fail(text: str) -> Any:
    raise KeyError("a key\nwith two lines")


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (fail, r"failed: KeyError: .a key\\nwith two lines. \(line \d+ of .*\); `step` must"),
        (lambda text: sys.exit(0), "failed: SystemExit: 0"),
    ],
)  # fmt: skip
def test_code_that_fails_or_exits_is_one_error(step: Any, message: str):
    world = environment(step=step)
    with pytest.raises(UserError, match=message) as error:
        world.step(world.new(), ROW, "x")
    assert "\n" not in str(error.value)


def test_the_code_cannot_change_the_row_of_other_episodes():
    def reset(row: Any) -> Any:
        row["prompt"][0]["content"] = "changed"
        return row["prompt"]

    environment(reset=reset).reset(ROW, seed=0)
    assert ROW["prompt"] == [{"role": "user", "content": "How many?"}]


def test_random_numbers_come_from_the_seed():
    def reset(row: Any, seed: int) -> Any:
        return [{"role": "user", "content": str(random.Random(seed).random())}]

    world = environment(reset=reset)
    first, again, other = (world.reset(ROW, seed=seed)[1] for seed in (7, 7, 8))
    assert first == again != other


def test_tools_are_stored_as_json():
    world = environment(reset=lambda row: [{**HELLO[0], "tools": [{"name": "é"}]}])
    assert world.reset(ROW, seed=0)[1] == [{**HELLO[0], "tools": '[{"name": "é"}]'}]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing:World", "cannot be imported: ModuleNotFoundError: No module named 'nothing'"),
        ("json:dumps", "expected a class, got function"),
        ("json:World", "cannot be imported: the module `json` has no class `World`; modules"),
        ("json:JSONDecoder", "the class has no method `reset`; define `reset(self, row)`"),
    ],
)  # fmt: skip
def test_names_that_are_no_environment_are_refused(name: str, message: str):
    with pytest.raises(UserError, match=f"^{name}: ") as error:
        load_environment(name)
    assert message in str(error.value)


def test_the_calculator_multiplies_first():
    # 12 + 21 - 1 = 32; 3 * 4 * 2 = 24; 0 - 10 = -10
    assert calculate("12 + 7 * 3 - 1") == 32
    assert calculate("3 * 4 * 2") == 24
    assert calculate("0 - 2 * 5") == -10
    rng = random.Random(0)
    for _ in range(200):
        expression = str(rng.randrange(100))
        for _ in range(rng.randrange(5)):
            expression += f" {rng.choice('+-*')} {rng.randrange(100)}"
        assert calculate(expression) == eval(expression)


@pytest.mark.parametrize(
    ("turns", "reward", "ended"),
    [
        (["result: 5"], 1.0, True),
        (["result: 4"], 0.0, True),
        (["5"], 0.0, True),
        (["calculate: 2 + 3", "result: 5"], 1.0, True),
        (["calculate: 2 + 3"], 0.0, False),
        (["calculate: 2 +"], 0.0, True),
        (["calculate: __import__('os')"], 0.0, True),
    ],
)  # fmt: skip
def test_the_embedded_environment_calculates_and_judges_the_result(
    turns: list[str], reward: float, ended: bool
):
    world = load_environment("arithmetic")
    assert world.new is Arithmetic
    episode, messages = world.reset(ROW, seed=0)
    assert messages == ROW["prompt"]
    steps = [world.step(episode, ROW, turn) for turn in turns]
    assert [step.ended for step in steps] == [False] * (len(turns) - 1) + [ended]
    assert sum(step.reward for step in steps) == reward
    if len(turns) == 2:
        assert steps[0].messages == [{"role": "tool", "content": "result: 5"}]


def test_the_embedded_environment_needs_the_answers():
    with pytest.raises(UserError, match=r"no column `answer`; set `keep_columns: \[answer\]`"):
        load_environment("arithmetic").reset({"prompt": HELLO}, seed=0)
