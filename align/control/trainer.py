"""What the stage requires of a trainer, whichever algorithm it implements, and what all share."""

from __future__ import annotations

import abc
import time
from collections.abc import Collection, Mapping
from typing import Any, Protocol

from gymnasium.wrappers.utils import RunningMeanStd
from torch import nn

from align.control.networks import Policy

RECENT = 100
"""Episodes in the running mean of the learning curve."""


class Trainer(Protocol):
    """Trains the policy of one seed.

    Between two calls of :meth:`train_step` the whole state can be saved, and a trainer that is
    restored from it reaches the same policy.
    """

    seed: int
    steps: int
    """Steps so far, of the number that ``steps`` of the recipe limits."""
    seconds: float
    """Seconds of training so far, including those before an interruption."""
    curve: list[dict[str, Any]]
    """The points of the learning curve."""

    @property
    def policy(self) -> Policy:
        """The policy; its most probable actions are those of the greedy policy."""

    @property
    def critic(self) -> nn.Module | None:
        """The network of values that is saved with the policy, if there is one."""

    @property
    def statistics(self) -> RunningMeanStd | None:
        """What the policy's observations are normalized by; None if they are not."""

    @property
    def done(self) -> bool:
        """Whether training is complete."""

    def train_step(self) -> dict[str, Any]:
        """Train until there is a new point of the learning curve, and return it.

        A point has ``steps``, ``episodes``, ``return`` and ``seconds``, and metrics of the
        algorithm.
        """

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on, in tensors, numbers and text."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that :meth:`state` returned."""

    def close(self) -> None:
        """Release the environments."""


class Progress(abc.ABC):
    """Steps, seconds and learning curve, the part that all trainers have."""

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps
        self.steps, self.seconds = 0, 0.0
        self.curve: list[dict[str, Any]] = []

    @property
    def done(self) -> bool:
        """Whether all steps are taken."""
        return self.steps >= self.total_steps

    def train_step(self) -> dict[str, Any]:
        """Train until there is a new point of the learning curve, and return it."""
        started = time.perf_counter()
        measured = self.train()
        self.seconds += time.perf_counter() - started
        point = measured | {"steps": self.steps, "seconds": round(self.seconds, 4)}
        self.curve.append(point)
        return point

    @abc.abstractmethod
    def train(self) -> dict[str, Any]:
        """Train for a part of the run. Returns ``episodes``, ``return`` and further metrics."""

    def progress(self) -> dict[str, Any]:
        """The progress so far, for :meth:`restore_progress`."""
        return {"steps": self.steps, "seconds": self.seconds, "curve": list(self.curve)}

    def restore_progress(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that contains what :meth:`progress` returned."""
        self.steps, self.seconds = state["steps"], state["seconds"]
        self.curve = list(state["curve"])


def recent_mean(values: Collection[float]) -> float | None:
    """The mean of the last episodes; None before the first one has ended."""
    return sum(values) / len(values) if values else None
