"""What the stage requires of a trainer, whichever algorithm it implements."""

from __future__ import annotations

from collections.abc import Mapping
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
