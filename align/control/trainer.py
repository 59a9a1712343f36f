"""What all trainers have in common: progress, learning curve, checks of the weights, and state."""

from __future__ import annotations

import abc
import copy
import time
from collections import deque
from collections.abc import Collection, Mapping
from typing import Any, Generic, TypeVar

import torch
from gymnasium.wrappers.utils import RunningMeanStd
from torch import nn

from align.config.control.base import Control
from align.control.networks import Policy
from align.control.seeds import derive_seed
from align.errors import UserError

RECENT = 100
"""Episodes in the running mean of the learning curve."""
Settings = TypeVar("Settings", bound=Control)
"""The configuration class of the algorithm."""


class Trainer(abc.ABC, Generic[Settings]):
    """Trains the policy of one seed.

    Between two calls of :meth:`train_step` the whole state can be saved, and a trainer that is
    restored from it reaches the same policy.
    """

    critic: nn.Module | None = None
    """The network of values that is saved with the policy, if there is one."""
    statistics: RunningMeanStd | None = None
    """What the policy's observations are normalized by; None if they are not."""
    env: Any = None
    """The environments that :meth:`close` releases, if there are any."""

    def __init__(self, config: Settings, seed: int) -> None:
        self.config, self.seed = config, seed
        self.steps, self.seconds = 0, 0.0  # of training, also before an interruption
        self.curve: list[dict[str, Any]] = []
        self.recent_returns: deque[float] = deque(maxlen=RECENT)
        self.generator = torch.Generator().manual_seed(derive_seed(seed, 1))
        self.parts: dict[str, Any] = {}  # networks and optimizers, which the state contains

    @property
    def policy(self) -> Policy:
        """The policy; its most probable actions are those of the greedy policy."""
        policy: Policy = self.parts["policy"]
        return policy

    @property
    def done(self) -> bool:
        """Whether training is complete."""
        return self.steps >= self.config.steps

    def train_step(self) -> dict[str, Any]:
        """Train until there is a new point of the learning curve, and return it.

        A point has ``steps``, ``episodes``, ``return`` and ``seconds``, and metrics of the
        algorithm.
        """
        started = time.perf_counter()
        measured = self.train()
        self.seconds += time.perf_counter() - started
        point = measured | {"steps": self.steps, "seconds": round(self.seconds, 4)}
        self.curve.append(point)
        return point

    @abc.abstractmethod
    def train(self) -> dict[str, Any]:
        """Train for a part of the run. Returns ``episodes``, ``return`` and further metrics."""

    def check_weights(self, *others: nn.Module) -> None:
        """Stop where an update has made a weight of ``parts`` or ``others`` NaN or infinite.

        Raises:
            UserError: A weight is not finite.
        """
        networks = [part for part in (*self.parts.values(), *others) if isinstance(part, nn.Module)]
        weights = [weight for network in networks for weight in network.parameters()]
        if not all(bool(weight.isfinite().all()) for weight in weights):
            raise UserError(
                f"seed {self.seed}: a weight is not finite after {self.steps:,} steps: lower "
                "`learning_rate`, clip gradients, or check the rewards and observations of "
                f"{self.config.environment}"
            )

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on, in tensors, numbers and text."""
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        return copy.deepcopy(parts) | {
            "generator": self.generator.get_state(),
            "steps": self.steps,
            "seconds": self.seconds,
            "curve": list(self.curve),
            "recent_returns": list(self.recent_returns),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that :meth:`state` returned."""
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.generator.set_state(state["generator"])
        self.steps, self.seconds = state["steps"], state["seconds"]
        self.curve = list(state["curve"])
        self.recent_returns.extend(state["recent_returns"])

    def close(self) -> None:
        """Release the environments."""
        if self.env is not None:
            self.env.close()


def recent_mean(values: Collection[float]) -> float | None:
    """The mean of the last episodes; None before the first one has ended."""
    return sum(values) / len(values) if values else None
