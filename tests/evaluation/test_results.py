"""Typed results: read from stored metrics, written as stored metrics, without heavy libraries."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from align.evaluation.results import EvaluationMetrics, PerSide
from align.evaluation.reward_results import RewardModelReport

OLD_COMPARISON = {  # as version 0.2.0 stored it
    "policy": "dpo",
    "baseline": "sft",
    "judge": "gold",
    "win_rate": 0.75,
    "ci": [0.5, 0.9],
    "ties": 0.1,
    "n_prompts": 20,
    "n_completions": 4,
    "length_controlled_win_rate": None,
    "p_value": 0.01,
    "mean_tokens": {"policy": 12.0, "baseline": 10.0},
    "mean_score": {"policy": 0.7, "baseline": 0.5},
    "score_difference": 0.2,
    "score_difference_ci": [0.1, 0.3],
    "finished": {"policy": 1.0, "baseline": 0.9},
    "consistency": None,
    "invalid": 0,
}
COMPARISON = OLD_COMPARISON | {
    "n_pairs": 80,
    "adjusted_p_value": 0.02,
    "mean_characters": {"policy": 60.0, "baseline": None},
    "invalid": 1,
    "bounds": [0.7, 0.8],
    "corrected": {"value": 0.6, "ci": [0.5, 0.7]},
    "criteria": {"clear": {"value": 0.6, "ci": [0.5, 0.7]}},
}
IMPLICIT_REWARDS = {
    "policy": "dpo",
    "reference": "sft",
    "accuracy": 0.8,
    "ci": [0.7, 0.9],
    "mean_margin": 1.5,
    "n_pairs": 30,
    "n_prompts": 20,
    "invalid": 1,
}
HELD_OUT = {
    "split": "test",
    "pairs": 30,
    "accuracy": 0.8,
    "ci": [0.7, 0.9],
    "mean_margin": 1.5,
    "calibration": [{"confidence": 0.6, "accuracy": 0.5, "pairs": 30}],
    "expected_calibration_error": 0.1,
}


@pytest.mark.parametrize(
    "metrics",
    [
        {"comparisons": [COMPARISON], "temperature": 0.7},
        {"implicit_rewards": [IMPLICIT_REWARDS]},
        {"comparisons": [COMPARISON], "temperature": 0.7, "implicit_rewards": [IMPLICIT_REWARDS]},
    ],
    ids=["win rates", "implicit rewards", "both"],
)
def test_stored_metrics_are_read_and_written_unchanged(metrics):
    assert EvaluationMetrics.from_metrics(metrics).to_metrics() == metrics
    assert json.loads(json.dumps(EvaluationMetrics.from_metrics(metrics).to_metrics())) == metrics


def test_metrics_of_an_earlier_version_are_read():
    (read,) = EvaluationMetrics.from_metrics({"comparisons": [OLD_COMPARISON]}).comparisons
    assert (read.win_rate, read.bounds, read.mean_characters) == (0.75, None, None)


def test_results_have_typed_fields():
    metrics = {"comparisons": [COMPARISON], "implicit_rewards": [IMPLICIT_REWARDS]}
    read = EvaluationMetrics.from_metrics(metrics)
    assert read.comparisons[0].ci.low == 0.5
    assert read.comparisons[0].mean_tokens == PerSide(policy=12.0, baseline=10.0)
    assert read.implicit_rewards[0].ci.high == 0.9


def test_unknown_keys_of_a_later_version_are_ignored():
    metrics = {"comparisons": [COMPARISON | {"later": 1}], "later": 2}
    assert EvaluationMetrics.from_metrics(metrics).comparisons[0].win_rate == 0.75


def test_a_reward_model_report_is_read_from_the_metrics_of_its_stage():
    report = RewardModelReport.from_metrics({"loss": 0.5, "held_out": HELD_OUT})
    assert report is not None
    assert report.calibration[0].confidence == 0.6
    assert report.to_metrics() == HELD_OUT
    assert report.accuracy_upper_bound is None
    bounded = HELD_OUT | {"accuracy_upper_bound": 0.9, "agreement_with_gold": 0.85}
    report = RewardModelReport.from_metrics({"held_out": bounded})
    assert report is not None
    assert (report.accuracy_upper_bound, report.agreement_with_gold) == (0.9, 0.85)
    assert report.to_metrics() == bounded
    assert RewardModelReport.from_metrics({"loss": 0.5, "held_out": None}) is None


def test_the_module_loads_no_heavy_library():
    code = "import sys, align.evaluation.results; print({'torch', 'pandas'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert (done.stdout.strip(), done.stderr) == ("set()", "")
