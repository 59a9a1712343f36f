"""Reward models among several completions: accuracy, and the score of ties."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from align.data.reward_files import Choice, read_reward_file
from align.errors import DataError
from align.evaluation import reward_choices
from align.evaluation.reward_results import RewardEvaluation


def choice(subset: str = "", name: str = "", right: int = 1, wrong: int = 3) -> Choice:
    completion = [{"role": "assistant", "content": "x"}]
    prompt = [{"role": "user", "content": "p"}]
    return Choice(prompt, [completion] * right, [completion] * wrong, subset, name)


def test_accuracy_by_subset_by_hand():
    choices = [choice("Math"), choice("Math"), choice("Focus"), choice("Focus", right=2, wrong=2)]
    report = reward_choices.report(
        choices,
        chosen=[[3.0], [1.0], [1.0], [0.0, 2.0]],
        rejected=[[0.0, 1.0, 2.0], [2.0, 0.0, 0.0], [1.0, 1.0, 0.0], [2.0, 1.0]],
        place="file",
    )
    math_group, focus = report.groups
    assert (math_group.subset, math_group.accuracy, math_group.chance) == ("Math", 0.5, 0.25)
    # one of three that share the highest score, then one of two
    assert focus.accuracy == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert focus.chance == pytest.approx((1 / 4 + 1 / 2) / 2)
    assert report.accuracy == pytest.approx((1 + 0 + 1 / 3 + 1 / 2) / 4)
    assert report.mean_of_subsets == pytest.approx((0.5 + focus.accuracy) / 2)
    assert report.ties is None
    assert math_group.ci.low <= 0.5 <= math_group.ci.high


def test_the_score_of_ties_by_hand():
    choices = [
        choice("Ties", "tied:1", right=2), choice("Ties", "ref:1"),
        choice("Ties", "tied:2", right=2), choice("Ties", "ref:2"),
        choice("Ties", "tied:3", right=2), choice("Ties", "ref:3"),
    ]  # fmt: skip
    # gap of worst correct and best wrong, spread of the correct: tied 1: 3, 1; tied 2: 2, 1;
    # tied 3: -1, 2; gaps of the reference prompts: 4, 0.5, 1
    chosen = [[4.0, 5.0], [5.0], [4.0, 3.0], [1.5], [1.0, 3.0], [2.0]]
    rejected = [[1.0, 0.0], [1.0], [1.0], [1.0], [2.0], [1.0]]
    report = reward_choices.report(choices, chosen, rejected, place="file")
    ties = report.ties
    assert ties is not None
    assert (ties.accuracy, ties.reference_accuracy) == (pytest.approx(2 / 3), 1.0)
    assert ties.correctness_preferred == pytest.approx(2 / 3)  # 3 > 1, 2 > 1, not -1 > 2
    assert ties.correctness_preferred_hard == pytest.approx(1 / 3)  # 3 > 1, not 0.5 > 1
    margin = (math.tanh(3 / 1 - 1) + math.tanh(0.5 / 1 - 1) + math.tanh(-1 / 2 - 1)) / 3
    assert ties.margin == pytest.approx(margin)
    expected = 0.3 * 2 / 3 + 0.3 + 0.2 * 2 / 3 + 0.2 / 3 + 0.01 * margin
    assert ties.score == pytest.approx(expected)
    assert (report.accuracy, report.prompts, report.groups) == (None, 0, ())
    assert report.mean_of_subsets == ties.score
    json.dumps(RewardEvaluation(model="m", choices=report).to_metrics(), allow_nan=False)


@pytest.mark.parametrize(
    ("gap", "expected"), [(2.0, 1.0), (-2.0, -1.0), (0.0, 0.0)], ids=["above", "below", "equal"]
)
def test_the_margin_where_all_correct_answers_score_alike(gap: float, expected: float):
    ties = reward_choices.report(
        [choice("ties", "tied:1", right=2), choice("ties", "ref:1")],
        chosen=[[3.0, 3.0], [3.0]], rejected=[[3.0 - gap], [3.0 - gap]], place="file",
    ).ties  # fmt: skip
    assert ties is not None and ties.margin == expected


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a:1"], "file: id: `a:1` of the subset `Ties` is not `ref:N` or `tied:N`"),
        (["ref:1", "ref:1"], "file: id: `ref:1` of the subset `Ties` occurs twice"),
        (["ref:1", "tied:2"], "file: id: no prompt of the subset `Ties` has both forms"),
    ],
)
def test_wrong_identities_of_ties_are_named(names: list[str], message: str):
    choices = [choice("Ties", name) for name in names]
    with pytest.raises(DataError, match=message):
        reward_choices.report(choices, [[1.0]] * len(names), [[0.0]] * len(names), place="file")


# Files --------------------------------------------------------------------------------------------


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


CHOICE = {"prompt": "p", "chosen": ["a"], "rejected": ["b", ""], "subset": "Math", "id": 7}
SCORED = {"prompt": "p", "completions": ["a", "b"], "scores": [1, 0.5]}
PAIR = {"prompt": "p", "chosen": "a", "rejected": "b", "subset": "Chat"}


def test_the_three_kinds_of_files_are_read(tmp_path: Path):
    rows = read_reward_file(write(tmp_path / "choices.jsonl", CHOICE))
    (read,) = rows.choices
    assert (read.subset, read.id, len(read.rejected)) == ("Math", "7", 2)
    assert read.rejected[1] == [{"role": "assistant", "content": ""}]
    (scored,) = read_reward_file(write(tmp_path / "scored.jsonl", SCORED)).scored
    assert scored.scores == [1.0, 0.5]
    turns = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "b"}]
    conversation = {"chosen": [turns[0], turns[1] | {"content": "a"}], "rejected": turns}
    equal = PAIR | {"rejected": "a"}
    rows = read_reward_file(write(tmp_path / "pairs.jsonl", PAIR, conversation, equal))
    assert [row["chosen"][0]["content"] for row in rows.pairs] == ["a", "a"]
    assert rows.pairs[0]["subset"] == "Chat"
    assert rows.dropped == {"chosen equals rejected": 1}
    assert rows.examples == {"chosen equals rejected": "row 3"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "p", "chosen": "a"}], "row 1: `rejected`: missing; found the keys"),
        ([CHOICE | {"chosen": []}], "row 1: `chosen`: expected a list of at least one text"),
        ([CHOICE, CHOICE | {"prompt": 3}], "row 2: `prompt`: expected a text, got a number"),
        ([SCORED | {"scores": [1.0]}], "row 1: `scores`: expected one for each of 2 completions"),
        ([SCORED | {"scores": [1.0, None]}], "row 1: `scores`: expected a list of finite numbers"),
        ([CHOICE, SCORED], "row 1 has choices, row 2 has scored completions; write each kind"),
        ([PAIR | {"rejected": "a"}], "has no usable row: 1 × chosen equals rejected (row 1)"),
        ([PAIR | {"rejected": " "}], "1 × blank completion (row 1: `rejected`)"),
        ([], "has no usable row"),
    ],
)
def test_wrong_rows_are_named(tmp_path: Path, rows: list[Any], message: str):
    with pytest.raises(DataError) as error:
        read_reward_file(write(tmp_path / "rows.jsonl", *rows))
    assert message in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "rows.jsonl"))
