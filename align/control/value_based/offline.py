"""Training on recorded steps, behind the trainer of the stage."""

from __future__ import annotations

from typing import Any

import torch

from align.config.control.offline import Offline
from align.control.recorded_steps import RecordedSteps
from align.control.spaces import EnvSpec
from align.control.trainer import Trainer
from align.control.value_based.iql import ImitationLearner

POINTS = 100
"""Points of the learning curve, unless there are fewer updates."""


class OfflineTrainer(Trainer[Offline]):
    """Trains the networks of one seed; a step is one update. The environment is not stepped."""

    def __init__(self, config: Offline, spec: EnvSpec, seed: int, data: RecordedSteps) -> None:
        super().__init__(config, seed)
        self.data = data
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.learner = ImitationLearner(config, spec)
        optimizer = self.learner.optimizer
        self.parts = {**dict(self.learner.named_children()), "optimizer": optimizer}
        self.critic = self.learner.value if config.algorithm == "iql" else None

    def train(self) -> dict[str, Any]:
        """Update on several batches."""
        config = self.config
        n_updates = min(max(1, config.steps // POINTS), config.steps - self.steps)
        for _ in range(n_updates):
            size = (config.batch_size,)
            rows = torch.randint(len(self.data.rewards), size, generator=self.generator)
            losses = self.learner.update(RecordedSteps(*(column[rows] for column in self.data)))
        self.steps += n_updates
        self.check_weights()
        metrics = {name: float(loss) for name, loss in losses.items()}
        return {"episodes": 0, "return": None, **metrics}
