"""Reward functions of a recipe: import, signature, columns and scores."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from align.errors import UserError
from align.rewards import functions


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that writes ``mine.py`` into the working directory; it is unloaded later."""
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> None:
        sys.modules.pop("mine", None)
        (tmp_path / "mine.py").write_text(text)

    yield write
    sys.modules.pop("mine", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be imported: AttributeError"),
        ("f = 3", "expected a function, got int"),
        ("def f(x): return x", "its parameters are x; define it as"),
        ("def f(", "cannot be imported: SyntaxError"),
        ("raise RuntimeError('down')", "cannot be imported: RuntimeError: down"),
    ],
)
def test_a_reward_function_that_cannot_be_used_is_rejected_in_one_line(
    module: Any, text: str, message: str
):
    module(text)
    with pytest.raises(UserError) as raised:
        functions.load_function("mine:f")
    assert len(raised.value.lines) == 1
    assert message in raised.value.lines[0]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ("None", "expected a list of numbers, got None"),
        ("[None]", "return a list of numbers"),
        ("[1.0, 2.0]", "2 scores for 1 completions"),
        ("[float('nan')]", "scores must be finite"),
    ],
)
def test_the_scores_of_a_reward_function_are_checked(module: Any, scores: str, message: str):
    module(f"def f(prompts, completions): return {scores}")
    function = functions.load_function("mine:f")
    with pytest.raises(UserError, match=message):
        functions.call("mine:f", function, [[]], ["a"], {"prompt_id": ["1"]})


def test_missing_columns_of_a_reward_function_are_reported_before_training(
    module: Any, tmp_path: Path, launch: Any
):
    module("def f(prompts, completions, answer, level=1, **columns): return [0.0]")
    assert functions.missing_columns("mine:f", ["prompt_id"]) == ["answer"]
    assert functions.missing_columns("mine:f", ["prompt_id", "answer"]) == []
    (tmp_path / "recipe.yaml").write_text(
        "stages:\n"
        "  prepare: {source: embedded, max_rows: 40}\n"
        "  sft: {model: {vocab_size: 300, hidden_size: 32}}\n"
        "  ppo: {model: sft, rewards: ['mine:f'], steps: 2, batch_size: 4}\n"
    )
    done = launch("recipe.yaml")
    assert done.code == 2
    assert "ppo.rewards.0: mine:f requires the column `answer`" in done.err
    assert "sft: running" not in done.out
