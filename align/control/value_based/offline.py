"""Training on recorded steps, behind the trainer of the stage."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from align.config.control.offline import Offline
from align.control.networks import Policy, check_weights
from align.control.recorded_steps import RecordedSteps
from align.control.seeds import derive_seed
from align.control.spaces import EnvSpec
from align.control.trainer import Progress
from align.control.value_based.iql import ImitationLearner

POINTS = 100
"""Points of the learning curve, unless there are fewer updates."""


class OfflineTrainer(Progress):
    """Trains the networks of one seed; a step is one update. The environment is not stepped."""

    statistics = None

    def __init__(self, config: Offline, spec: EnvSpec, seed: int, data: RecordedSteps) -> None:
        super().__init__(config.steps)
        self.config, self.seed, self.data = config, seed, data
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.learner = ImitationLearner(config, spec)
        self.generator = torch.Generator().manual_seed(derive_seed(seed, 1))

    @property
    def policy(self) -> Policy:
        """The trained policy."""
        return self.learner.policy

    @property
    def critic(self) -> nn.Module | None:
        """The values of states; behavior cloning trains none."""
        return self.learner.value if self.config.algorithm == "iql" else None

    def train(self) -> dict[str, Any]:
        """Update on several batches."""
        config = self.config
        n_updates = min(max(1, config.steps // POINTS), config.steps - self.steps)
        for _ in range(n_updates):
            size = (config.batch_size,)
            rows = torch.randint(len(self.data.rewards), size, generator=self.generator)
            losses = self.learner.update(RecordedSteps(*(column[rows] for column in self.data)))
        self.steps += n_updates
        check_weights(
            [self.learner], seed=self.seed, steps=self.steps, environment=config.environment
        )
        metrics = {name: float(loss) for name, loss in losses.items()}
        return {"episodes": 0, "return": None, **metrics}

    def state(self) -> dict[str, Any]:
        """Networks, optimizer, random numbers and the curve so far; the data is read again."""
        return copy.deepcopy(
            {
                "networks": self.learner.state_dict(),
                "optimizer": self.learner.optimizer.state_dict(),
                "generator": self.generator.get_state(),
                **self.progress(),
            }
        )

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that :meth:`state` returned."""
        self.learner.load_state_dict(state["networks"])
        self.learner.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.restore_progress(state)

    def close(self) -> None:
        """There is no environment to release."""
