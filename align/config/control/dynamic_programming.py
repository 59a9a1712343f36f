"""Keys of dynamic programming: value iteration and policy iteration."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from align.config.base import GymEnvironment
from align.config.control.base import Control, PolicyShape


class DynamicProgramming(Control):
    """Value iteration or policy iteration: the optimal policy, computed from the transitions.

    The environment needs numbered states and actions, and a table of its transitions, such as that
    of ``FrozenLake-v1``. Time limits count in the evaluation only.
    """

    code_version: ClassVar[int] = 1

    algorithm: Literal["value_iteration", "policy_iteration"]
    """Algorithm."""
    steps: int = Field(10_000, ge=1)
    """Largest number of iterations; each passes over all states."""
    tolerance: float = Field(1e-10, gt=0.0)
    """Training is complete when no value changes by more than this."""

    @property
    def policy_shape(self) -> PolicyShape:
        """A table: one linear layer on the number of the state as a vector with a single 1."""
        return PolicyShape([], "tanh", "categorical")

    @property
    def gym_environments(self) -> tuple[GymEnvironment, ...]:
        """The one environment of the stage, with numbered states, actions and transitions."""
        needs = ("numbered states", "discrete actions", "a table of transitions")
        return (GymEnvironment(self.environment, self.environment_options, needs=needs),)
