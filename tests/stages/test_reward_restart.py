"""A reward stage that is run again in the folder of an interrupted run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import tiny_models

from align.config.training import Reward
from align.rewards import reward_model
from align.runtime import distributed
from align.stages import reward


def test_a_stage_that_runs_again_after_centering_stores_the_same_mean(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
):
    world = tiny_models.world(tmp_path_factory.getbasetemp())
    config = Reward(
        model="sft", lora=tiny_models.LORA, trainer=tiny_models.TRAINER | {"max_steps": 4}
    )
    inputs = {"model": world.sft, "pairs": world.data}
    means = []
    for _ in range(2):
        distributed.reset_process_state(0)  # as before every stage
        reward.run(config, inputs, tmp_path, logger=tiny_models.logger("reward", tmp_path))
        means.append(json.loads((tmp_path / reward_model.FILE).read_text())[reward_model.MEAN])
    assert means[0] == means[1]
    assert abs(means[0]) > 1e-3
