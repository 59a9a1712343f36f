"""Environments in worker processes against those in the training process, and their failures."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.wrappers.utils import RunningMeanStd
from helpers import failing_env
from numpy.testing import assert_array_equal

from align.config.control.policy_gradient import PolicyGradient
from align.control import spaces
from align.control.environments import Environments
from align.control.policy_gradient import PolicyGradientTrainer
from align.control.vector.workers import Workers
from align.errors import UserError

ICY_ROAD = "align.control.icy_road:IcyRoad-v0"


def build(environment: str, vectorization: str, **options: Any) -> Environments:
    return Environments(
        environment,
        options,
        2,
        statistics=RunningMeanStd(shape=(4,)),
        reward_gamma=0.9,
        vectorization=vectorization,
    )


def test_steps_equal_those_in_the_training_process_also_after_they_were_restored() -> None:
    # An episode of the road has 20 sections and costs, which arrive in `info`.
    here, workers, restored = (build(ICY_ROAD, v) for v in ("gymnasium", "async", "async"))
    actions = np.random.default_rng(0).uniform(size=(45, 2, 1)).astype(np.float32)
    assert_array_equal(here.reset(7), workers.reset(7))
    n_ended = 0
    for time, row in enumerate(actions):
        if time == 25:
            restored.restore(workers.state())
        expected = here.step(row)
        for continued in (workers, restored) if time >= 25 else (workers,):
            for name, value in continued.step(row)._asdict().items():
                assert_array_equal(value, getattr(expected, name), err_msg=name)
        n_ended += len(expected.episode_costs)
    assert n_ended == 4
    processes = [p for e in (workers, restored) for p in e._unscaled.env.processes]
    # A signal to the group of the training process, as from Ctrl-C, does not reach them.
    assert len({os.getpgid(process.pid) for process in processes} - {os.getpgrp()}) == 4
    for environments in (workers, restored):
        environments.close()
    assert not any(process.is_alive() for process in processes)


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("raise", "failed: ValueError: the third step is missing; `vectorization: gymnasium`"),
        ("kill", "ended with exit code -9; -9 often is a lack of memory; `vectorization: gymnasi"),
    ],
)
def test_a_worker_that_fails_ends_all_with_one_line(how: str, text: str, recwarn: Any) -> None:
    environments = Environments(failing_env.ID, {"how": how}, 2, vectorization="async")
    environments.reset(0)
    environments.step(np.zeros(2, np.int64))
    environments.step(np.zeros(2, np.int64))
    with pytest.raises(UserError) as error:
        environments.step(np.zeros(2, np.int64))
    (line,) = error.value.lines
    assert line.startswith("a worker process of Failing-v0 ")
    assert text in line.replace("-9, -9", "-9")  # the second worker may have ended as well
    workers = environments._unscaled.env
    assert isinstance(workers, Workers)
    assert workers.closed
    assert not any(process.is_alive() for process in workers.processes)
    assert not recwarn.list


@pytest.mark.slow
def test_training_reaches_the_same_weights() -> None:
    def train(vectorization: str) -> PolicyGradientTrainer:
        config = PolicyGradient(
            environment="Pendulum-v1", steps=200, n_envs=2, n_steps=50, vectorization=vectorization
        )
        trainer = PolicyGradientTrainer(config, spaces.inspect_env(*config.gym_environments), 0)
        while not trainer.done:
            trainer.train_step()
        trainer.close()
        return trainer

    here, workers = train("gymnasium"), train("async")
    for first, second in zip(here.policy.parameters(), workers.policy.parameters(), strict=True):
        assert torch.equal(first, second)
