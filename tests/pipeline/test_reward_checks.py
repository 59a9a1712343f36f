"""Functions that score are called with rows of the data before anything is trained."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

import align
from align.cli import main as cli
from align.pipeline import reward_checks

RECIPE = """\
stages:
  prepare: {source: rows.jsonl, keep_columns: [answer], test_fraction: 0.0}
  sft: {model: {vocab_size: 300, hidden_size: 32}}
  ppo: {model: sft, rewards: [REWARD], steps: 2, batch_size: 4}
"""


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Any:
    """``check(reward, source)`` runs ``align check``; it returns exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {
            "prompt": f"What is {i} + {i}?",
            "chosen": f"It is {2 * i}.",
            "rejected": f"It is {2 * i + 1}, I think.",
            "answer": str(2 * i),
        }
        for i in range(40)
    ]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")

    def run(reward: str, source: str = "") -> tuple[int, str, str]:
        sys.modules.pop("mine", None)
        Path("mine.py").write_text(source, encoding="utf-8")
        Path("recipe.yaml").write_text(RECIPE.replace("REWARD", reward), encoding="utf-8")
        monkeypatch.setattr(sys, "argv", ["align", "check", "recipe.yaml"])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capfd.readouterr()
        return int(stopped.value.code or 0), out, err

    yield run
    sys.modules.pop("mine", None)


def test_a_reward_that_fits_the_data_separates_answers_from_those_of_other_prompts(check: Any):
    code, out, err = check("number")
    assert (code, err) == (0, "")
    # 32 of the 40 prompts; every shuffled answer is the number of another prompt, which is wrong.
    assert (
        "ppo.rewards.0: number separates answers from those of other prompts: mean 1 against 0, "
        "higher in 32, equal in 0, lower in 0 of 32 (sign test p = 4.7e-10); chosen from rejected "
        "answers: mean 1 against 0, higher in 32"
    ) in out
    assert "warning: number" not in out


def test_functions_are_compared_once_where_the_data_are_finished_already(check: Any):
    assert check("number")[0] == 0  # writes the recipe
    align.run(align.load_recipe("recipe.yaml"), runs="runs", until="prepare")
    code, out, err = check("number")
    assert (code, err) == (0, "")
    assert out.count("ppo.rewards.0: number separates") == 1


SHUFFLED = "does not separate answers from those of other prompts: "
REJECTED = "does not separate chosen from rejected answers: "
FORM = "; unless it rewards form alone, check the function and its answer column"
EQUAL = "higher in 0, equal in 32, lower in 0 of 32 (sign test p = 1)"
REVERSED = (
    "it prefers the rejected answers: check the columns `chosen` and `rejected`, or reverse the "
    "sign of the score"
)


@pytest.mark.parametrize(
    ("reward", "separated", "warnings"),
    [
        pytest.param(
            "{function: regex, answer: 'x+'}",
            [],
            [
                f"{SHUFFLED}mean 0 against 0, {EQUAL}{FORM}",
                f"{REJECTED}mean 0 against 0, {EQUAL}; unless it measures something else, check "
                "the function and the pairs",
            ],
            id="a pattern that never matches",
        ),
        pytest.param(
            # Every chosen answer ends after its number; every rejected one has more words.
            "{function: regex, answer: '^It is [0-9]+[.]$'}",
            ["chosen from rejected answers: mean 1 against 0, higher in 32, equal in 0"],
            [f"{SHUFFLED}mean 1 against 1, {EQUAL}{FORM}"],
            id="a preference for chosen answers, whatever the prompt",
        ),
        pytest.param(
            "{function: contains, answer: 'I think'}",
            [],
            [
                f"{SHUFFLED}mean 0 against 0, {EQUAL}{FORM}",
                f"{REJECTED}mean 0 against 1, higher in 0, equal in 0, lower in 32 of 32 (sign "
                f"test p = 4.7e-10); {REVERSED}",
            ],
            id="a preference for rejected answers",
        ),
    ],
)
def test_each_comparison_that_fails_is_a_warning_with_numbers_and_advice(
    check: Any, reward: str, separated: list[str], warnings: list[str]
):
    code, out, err = check(reward)
    assert (code, err) == (0, "")
    lines = [line for line in out.splitlines() if line.startswith("ppo.rewards.0: ")]
    found = [line for line in lines if " warning: " in line]
    assert [line.split(": warning: ")[1].split(" ", 1)[1] for line in found] == warnings
    others = [line for line in lines if line not in found]
    assert len(others) == len(separated)
    for line, expected in zip(others, separated, strict=True):
        assert f" separates {expected}" in line
    assert f"no errors, {len(warnings)} warning" in out


def test_with_a_negative_weight_the_better_score_is_the_lower_one(check: Any):
    # `I think` is in the rejected answers only; with weight -1 they are the worse ones.
    code, out, err = check("{function: contains, answer: 'I think'}], weights: [-1.0")
    assert (code, err) == (0, "")
    assert (
        "ppo.rewards.0: contains (weight -1) separates chosen from rejected answers: mean 0 "
        "against 1, higher in 0, equal in 0, lower in 32"
    ) in out
    assert "prefers the rejected" not in out
    # The chosen answers alone have the pattern: with weight -1 the reward prefers the others.
    code, out, err = check("{function: regex, answer: '[0-9][.]$'}], weights: [-1.0")
    assert (code, err) == (0, "")
    assert f"regex (weight -1) {REJECTED}mean 1 against 0" in out
    assert REVERSED in out


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def f(prompts, completions): raise ValueError('no')", "mine:f: failed: ValueError: no (line 1 of "),
        ("def f(prompts, completions): import sys; sys.exit(0)", "mine:f: failed: SystemExit: 0 "),
        ("def f(prompts, completions): import os; os._exit(0)", "mine:f: failed: os._exit(0) "),
        ("def f(prompts, completions): return [None] * len(completions)", "is None; a reward is a number"),
        ("def f(prompts, completions): return [float('nan')] * len(completions)", "is nan; scores must be finite"),
        ("def f(prompts, completions): return ['1'] * len(completions)", "is str '1'; return a list of numbers"),
        ("def f(prompts, completions): return [1.0]", "1 score for 8 completions"),
        ("def f(prompts, completions): return [1 / len(c) for c in completions]", "failed: ZeroDivisionError: division by zero (line 1 of"),
        ("from json import *\ng = 1", "mine:f: cannot be imported: AttributeError"),
        ("raise RuntimeError('down')\ndef f(prompts, completions): return []", "mine:f: cannot be imported: RuntimeError: down (line 1 of"),
        ("def f(prompts, completions, level): return []", "mine:f requires the column `level`"),
        ("def f(x): return []", "mine:f: its parameters are x; define it as"),
        ("", "mine:f: cannot be imported: "),
    ],
)  # fmt: skip
def test_an_error_of_a_reward_function_is_one_line_of_the_check(
    check: Any, source: str, message: str
):
    code, out, err = check("'mine:f'", source)
    assert code == 2
    (line,) = err.splitlines()
    assert line.startswith("recipe.yaml:4: ppo.rewards.0: mine:f")
    assert message in line
    assert "no errors" not in out


def test_a_built_in_function_without_its_package_is_an_error(check: Any, monkeypatch: Any):
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    code, _, err = check("sentiment")
    assert code == 2
    assert err.splitlines() == [
        "recipe.yaml:4: ppo.rewards.0: sentiment: vaderSentiment is not installed: pip install -e "
        "'.[sentiment]'"
    ]


def test_a_run_calls_the_functions_before_it_trains(check: Any, launch: Any, tmp_path: Path):
    check("'mine:f'", "def f(prompts, completions): raise ValueError('no')")
    done = launch("recipe.yaml")
    assert done.code == 2
    assert "ppo.rewards.0: mine:f: failed: ValueError: no (line 1 of " in done.err
    assert list(tmp_path.glob("runs/prepare-*/artifact.json"))
    assert not list(tmp_path.glob("runs/sft-*"))
    again = launch("recipe.yaml")  # the prepared data are reused
    assert again.err == done.err


@pytest.mark.parametrize(
    ("higher", "lower", "expected"),
    [(5, 0, 2 / 32), (0, 0, 1.0), (2, 1, 1.0), (9, 1, 2 * (1 + 10) / 1024)],
)
def test_the_p_value_of_the_sign_test_by_hand(higher: int, lower: int, expected: float):
    scores = [1.0] * higher + [0.0] * lower + [0.5, math.nan]
    others = [0.0] * higher + [1.0] * lower + [0.5, 0.0]
    comparison = reward_checks.compare(scores, others)
    assert (comparison.higher, comparison.lower) == (higher, lower)
    assert comparison.n == higher + lower + 1
    assert comparison.p_value == pytest.approx(expected)
    assert comparison.separates == (expected <= 0.05)
    assert not comparison.is_reversed
    opposite = reward_checks.compare(others, scores)
    assert (opposite.is_reversed, opposite.separates) == (comparison.separates, False)
    negative = reward_checks.compare(others, scores, weight=-0.5)
    assert negative.separates == comparison.separates


WORLD = """\
class World:
    def reset(self, row):
        return row["prompt"]
    def step(self, completion):
        return [], float(completion), True
"""


def test_an_environment_plays_a_turn_and_its_error_is_one_line_of_the_check(check: Any):
    code, _, err = check("], environment: mine:World, weights: [", WORLD)
    assert code == 2
    (line,) = err.splitlines()
    assert "ppo.environment: mine:World: `step` with '' in the episode of the row" in line
    assert "could not convert string to float: '' (line 5 of " in line
