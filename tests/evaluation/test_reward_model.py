"""Evaluation of a reward model: rows that it can score."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import ppo_fixtures, tiny_models

from align.evaluation.reward_model import _fitting
from align.rewards import reward_model


def test_rows_longer_than_the_model_are_counted_and_not_scored(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    folders = ppo_fixtures.folders(tmp_path_factory.getbasetemp())
    model = reward_model.RewardModel.load(
        folders.adapter, dtype="float32", device="cpu", prefix_sharing=False
    )
    lines: list[str] = []
    logger = tiny_models.logger("reward", tmp_path)
    monkeypatch.setattr(logger, "info", lines.append)
    rows = tiny_models.rows(folders.world.data, "pairs-test")
    long = rows[0] | {"chosen": [{"role": "assistant", "content": "word " * 400}]}
    kept = _fitting(model, [*rows, long], ["chosen", "rejected"], logger)
    assert kept == rows
    assert lines == [f"1 of {len(rows) + 1} rows are longer than the model: not scored"]
