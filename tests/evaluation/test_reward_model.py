"""Evaluation of a reward model: rows that fit, calibration, and the comparison with gold scores."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import ppo_fixtures, tiny_models
from torch.testing import assert_close

from align.evaluation import reward_accuracy, reward_model
from align.evaluation.results import Interval
from align.evaluation.reward_results import CalibrationBin, RewardModelReport
from align.rewards import gold
from align.rewards.reward_model import RewardModel


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tiny_models.World:
    return tiny_models.world(tmp_path_factory.getbasetemp())


def test_rows_longer_than_the_model_are_counted_and_not_scored(
    tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
):
    folders = ppo_fixtures.folders(tmp_path_factory.getbasetemp())
    model = RewardModel.load(folders.adapter, dtype="float32", device="cpu", prefix_sharing=False)
    rows = tiny_models.rows(folders.world.data, "pairs-test")
    long = rows[0] | {"chosen": [{"role": "assistant", "content": "word " * 400}]}
    fitting = reward_model.rows_that_fit(model, [*rows, long], ["chosen", "rejected"])
    assert fitting == rows
    (record,) = [record for record in caplog.records if record.name == "align.reward"]
    assert record.getMessage() == (
        f"1 of {len(rows) + 1} rows are longer than the reward model's {tiny_models.POSITIONS} "
        "positions and are not scored"
    )


def test_calibration_by_hand():
    # sigmoid(log 3) = 0.75 and sigmoid(log 9) = 0.9: bins 0.75-0.8 and 0.9-0.95 (a little above,
    # for rounding)
    three, nine = math.log(3.001), math.log(9.01)
    margins = torch.tensor([three, three, three, -three, nine, -nine])
    bins = reward_accuracy.calibration(margins)
    assert [(round(b.confidence, 2), b.accuracy, b.pairs) for b in bins] == [
        (0.75, 0.75, 4),
        (0.9, 0.5, 2),
    ]
    # (4 * |0.75 - 0.75| + 2 * |0.9 - 0.5|) / 6
    assert_close(reward_accuracy.calibration_error(margins), 0.8 / 6, rtol=1e-3, atol=1e-4)
    assert reward_accuracy.calibration(torch.zeros(3)) == (CalibrationBin(0.5, 0.5, 3),)


def test_gold_agreement_of_the_gold_score(world: tiny_models.World):
    rows = tiny_models.rows(world.data, "pairs-test")
    gaps = [
        gold.gold_score(r["prompt"][-1]["content"], r["chosen"][-1]["content"])
        - gold.gold_score(r["prompt"][-1]["content"], r["rejected"][-1]["content"])
        for r in rows
    ]
    agreement = reward_accuracy.gold_agreement(rows, torch.tensor(gaps))
    assert agreement["agreement_with_gold"] == 1.0
    by_prompt: dict[str, list[float]] = {}
    for row, gap in zip(rows, gaps, strict=True):
        p = 1 / (1 + math.exp(-gold.LABEL_SLOPE * abs(gap)))  # of the better completion
        by_prompt.setdefault(row["prompt_id"], []).append(p)
    expected = sum(sum(v) / len(v) for v in by_prompt.values()) / len(by_prompt)
    assert_close(agreement["accuracy_upper_bound"], expected)
    reversed_scores = -torch.tensor(gaps)
    assert reward_accuracy.gold_agreement(rows, reversed_scores)["agreement_with_gold"] == 0.0


def test_gold_agreement_of_another_task_is_empty(world: tiny_models.World):
    rows = tiny_models.rows(world.data, "pairs-test")[:1]
    rows[0]["prompt"] = [{"role": "user", "content": "How are you?"}]
    assert reward_accuracy.gold_agreement(rows, torch.tensor([1.0])) == {}


def test_the_result_table_fits_into_80_columns():
    report = RewardModelReport(
        split="test", pairs=12_345, accuracy=0.7612, ci=Interval(0.74, 0.7812), mean_margin=1.0,
        calibration=(), expected_calibration_error=0.0312, accuracy_upper_bound=0.8351,
    )  # fmt: skip
    table = reward_accuracy.result_table(report)
    (row,) = table.rows
    assert row == ("76.1 %", "74.0–78.1 %", "83.5 %", "–", "0.031")
    assert table.title == "reward model on 12,345 held-out pairs"
    assert sum(len(column) + 2 for column in table.columns) <= 80


# Groups of pairs ----------------------------------------------------------------------------------


def pair(chosen: str, rejected: str, prompt: str = "p", **columns: Any) -> dict[str, Any]:
    turns = {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }
    return turns | {"prompt_id": prompt} | columns


def test_groups_of_pairs_by_hand():
    # differences of lengths: +1, +3, -1, 0, -2; the median of the four that are not 0 is 1
    rows = [
        pair("aa", "b", "1", source="x", margin=1.0),
        pair("aaaa", "b", "2", source="x", margin=2.0),
        pair("a", "bb", "3", source="y", margin=3.0),
        pair("a", "b", "4", source="y", margin=3.0),
        pair("a", "bbb", "5", source="y", margin=3.0),
    ]
    chosen, rejected = (
        torch.tensor([1.0, 3.0, 0.0, 2.0, 0.0]),
        torch.tensor([0.0, 0.0, 2.0, 2.0, 4.0]),
    )
    report = reward_accuracy.report(rows, chosen, rejected, split="test")
    # a scorer that prefers length: right where the chosen one is longer, a tie at equal lengths
    by_length = {g.group: (g.pairs, g.accuracy) for g in report.accuracy_by_length_difference}
    assert by_length == {
        "shorter, over 1": (1, 0.0), "shorter, up to 1": (1, 0.0), "equal": (1, 0.5),
        "longer, up to 1": (1, 1.0), "longer, over 1": (1, 1.0),
    }  # fmt: skip
    assert (report.longer_is_chosen, report.longer_scores_higher) == (0.5, 1.0)
    by_source = {g.group: (g.pairs, g.accuracy) for g in report.accuracy_by_source}
    assert by_source == {"x": (2, 1.0), "y": (3, pytest.approx(0.5 / 3))}
    by_margin = {g.group: (g.pairs, g.accuracy) for g in report.accuracy_by_margin}
    assert by_margin == {"1 to 2": (2, 1.0), "3": (3, pytest.approx(0.5 / 3))}
    # absolute differences of scores: 1, 3, 2, 0, 4, in quarters 0 to 1, 2, 3, 4
    by_score = {g.group: (g.pairs, g.accuracy) for g in report.accuracy_by_score_difference}
    assert by_score == {"0 to 1": (2, 0.75), "2": (1, 0.0), "3": (1, 1.0), "4": (1, 0.0)}
    expected = [math.log1p(math.exp(-d)) for d in (1, 3, -2, 0, -4)]
    assert report.log_loss == pytest.approx(sum(expected) / 5)
    assert RewardModelReport.from_metrics({"held_out": report.to_metrics()}) == report


def test_a_prompt_counts_once_in_each_group():
    rows = [pair("aa", "b", "1"), pair("aa", "b", "1"), pair("aa", "b", "1"), pair("aa", "b", "2")]
    chosen, rejected = torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([0.0, 0.0, 0.0, 1.0])
    report = reward_accuracy.report(rows, chosen, rejected, split="test")
    (longer,) = report.accuracy_by_length_difference
    assert (report.accuracy, longer.accuracy, longer.pairs) == (0.5, 0.5, 4)
    assert longer.group == "longer, up to 1"
    assert (report.accuracy_by_source, report.accuracy_by_margin) == ((), ())


def test_the_table_of_groups_fits_into_80_columns():
    rows = [
        pair("a" * (5 * k + 1000), "b" * 700 * k, str(k), margin=1234.5 * k, source="s" * 50)
        for k in range(1, 9)
    ]
    scores = 1000 * torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    table = reward_accuracy.group_table(reward_accuracy.report(rows, *scores, split="test"))
    widths = [max(map(len, cells)) for cells in zip(table.columns, *table.rows, strict=True)]
    assert sum(widths) + 3 * (len(widths) - 1) <= 80
