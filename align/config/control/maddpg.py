"""Keys of MADDPG and of independent learners."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from align.config.base import GymEnvironment, between_keys
from align.config.control.base import PolicyShape
from align.config.control.replay import Replay
from align.errors import shown


class MultiAgent(Replay):
    """MADDPG: an actor and a critic per agent, which act at once in one environment.

    The environment is ``align.control.multi_agent.parallel:Parallel-v0`` with the option
    ``module``, such as ``mpe2.simple_spread_v3``. Returns are means over the agents.
    """

    code_version: ClassVar[int] = 1

    algorithm: Literal["maddpg"]
    """Algorithm."""
    critic: Literal["centralized", "independent"] = "centralized"
    """What the critic of an agent sees: observations and actions of all agents (``centralized``,
    Lowe et al. 2017, arXiv:1706.02275), or those of its agent alone (``independent``, as in DDPG).
    """
    steps: int = Field(ge=1)
    """Environment steps per seed; all agents act in each."""
    gamma: float = Field(0.95, ge=0.0, le=1.0)
    """Discount per step."""
    hidden_sizes: list[Annotated[int, Field(ge=1)]] = Field([64, 64], min_length=1)
    """Widths of the hidden layers, with ReLU, of the policies and of the critics."""
    learning_starts: int = Field(1000, ge=1)
    """Steps with random actions before the first update."""
    train_every: int = Field(25, ge=1)
    """Environment steps between updates."""
    tau: float = Field(0.01, gt=0.0, le=1.0)
    """Part of the trained weights in each update of the target networks."""
    action_noise: float = Field(0.3, ge=0.0)
    """Standard deviation of the noise on actions, whose bounds are scaled to ±1."""

    @between_keys
    def _check_module(self) -> Iterator[str]:
        module = self.environment_options.get("module")
        if not isinstance(module, str):
            yield (
                "`environment_options.module` must be the module of an environment of PettingZoo, "
                f"such as mpe2.simple_spread_v3, got {shown(module)}"
            )

    @property
    def policy_shape(self) -> PolicyShape:
        """A perceptron with ReLU for each agent; greedy actions are a squashed mean."""
        return PolicyShape(self.hidden_sizes, "relu", "squashed")

    @property
    def gym_environments(self) -> tuple[GymEnvironment, ...]:
        """The one environment of the stage, with several agents."""
        needs = ("several agents", "bounded continuous actions")
        return (GymEnvironment(self.environment, self.environment_options, needs=needs),)
