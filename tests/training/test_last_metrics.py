"""The metrics of a finished training stage, which its summary and its model card show."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

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
    trainer: Any = SimpleNamespace(state=state)
    metrics = _last_metrics(trainer)
    assert metrics["loss"] == loss and metrics.get("mean_token_accuracy") == accuracy
    assert metrics["steps"] == 2
    assert metrics.get("eval_loss") == next(
        (e["eval_loss"] for e in logged if "eval_loss" in e), None
    )
