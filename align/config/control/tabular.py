"""Keys of the tabular algorithms: Q-learning and SARSA."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from align.config.base import GymEnvironment
from align.config.control.base import Control, PolicyShape


class Tabular(Control):
    """Q-learning or SARSA: a table of action values, with an epsilon-greedy policy.

    The environment needs numbered states and actions, such as those of ``CliffWalking-v1``.
    """

    code_version: ClassVar[int] = 1

    algorithm: Literal["q_learning", "sarsa"]
    """Algorithm."""
    learning_rate: float = Field(0.5, gt=0.0, le=1.0)
    """Part of each temporal-difference error by which a value changes."""
    schedule: Literal["linear", "constant"] = "constant"
    """Schedule of the learning rate; ``linear`` decays to 0 over the run."""
    epsilon: float = Field(0.1, ge=0.0, le=1.0)
    """Probability of a uniformly random action in training."""

    @property
    def policy_shape(self) -> PolicyShape:
        """A table: one linear layer on the number of the state as a vector with a single 1."""
        return PolicyShape([], "tanh", "categorical")

    @property
    def gym_environments(self) -> tuple[GymEnvironment, ...]:
        """The one environment of the stage, with numbered states and actions."""
        needs = ("numbered states", "discrete actions")
        return (GymEnvironment(self.environment, self.environment_options, needs=needs),)
