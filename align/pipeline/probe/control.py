"""The time of a ``control`` stage, from its first updates."""

from __future__ import annotations

from align.config.control.base import Control
from align.control import spaces
from align.control.build import build_trainer
from align.functional.masked import single_process
from align.pipeline.probe.timing import Seconds, StageTime, Stopwatch

MEASURED = 2.0
"""Seconds of updates that are measured."""


def measure(config: Control, watch: Stopwatch) -> StageTime:
    """Measure updates of one seed."""
    (environment,) = config.gym_environments
    trainer = build_trainer(config, spaces.inspect_env(environment), config.seeds[0])
    with single_process():
        trainer.train_step()  # the first one includes start-up
        while trainer.steps <= config.steps_before_learning and not trainer.done:
            trainer.train_step()
        first, seconds = trainer.steps, 0.0
        while seconds < MEASURED and not trainer.done:
            seconds += watch.once(trainer.train_step)
    steps = trainer.steps - first
    total = seconds / max(steps, 1) * config.steps * len(config.seeds)
    return StageTime(
        {"train": Seconds.exactly(total)}, f"{steps:,} steps", "without the episodes of evaluation"
    )
