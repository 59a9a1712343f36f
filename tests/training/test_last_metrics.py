"""The metrics of a finished training stage, which its summary and its model card show."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset

from align.training.trl_trainer import _last_metrics

WHOLE = {"train_loss": 2.5, "mean_token_accuracy": 0.6, "epoch": 1.0}  # the last entry of a run


@pytest.mark.parametrize(
    ("logged", "loss", "accuracy"),
    [
        ([], 2.5, 0.6),  # fewer steps than `logging_steps`
        ([{"loss": 3.0, "mean_token_accuracy": 0.4}, {"loss": 2.0}], 2.0, None),
        ([{"loss": 2.0, "mean_token_accuracy": 0.5}, {"eval_loss": 9.0}], 2.0, 0.5),
    ],
)
def test_they_are_the_last_logged_ones_or_those_of_the_whole_run(
    logged: list[dict[str, float]], loss: float, accuracy: float | None
):
    state = SimpleNamespace(log_history=[*logged, WHOLE], global_step=2, epoch=1.0)
    trainer: Any = SimpleNamespace(state=state, eval_dataset=[1, 2, 3])
    metrics = _last_metrics(trainer)
    assert metrics["loss"] == loss and metrics.get("mean_token_accuracy") == accuracy
    assert metrics["steps"] == 2
    assert metrics.get("eval_loss") == next(
        (e["eval_loss"] for e in logged if "eval_loss" in e), None
    )
    assert metrics.get("eval_rows") == (3 if any("eval_loss" in e for e in logged) else None)


def test_the_prompts_of_validation_pairs_are_counted_once():
    rows = Dataset.from_dict({"prompt_ids": [[1, 2], [1, 2], [1]], "chosen_ids": [[3], [4], [5]]})
    state = SimpleNamespace(log_history=[{"eval_rewards/accuracies": 0.5}], global_step=2, epoch=1)
    trainer: Any = SimpleNamespace(state=state, eval_dataset=rows)
    metrics = _last_metrics(trainer)
    assert (metrics["eval_rows"], metrics["eval_prompts"]) == (3, 2)
    assert metrics["eval_rewards/accuracies"] == 0.5
