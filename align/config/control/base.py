"""Keys that all algorithms of ``control`` share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from align.config.base import GymEnvironment, Workload, between_keys, duplicates
from align.config.reporting import ReportingStage
from align.errors import shown


@dataclass(frozen=True, slots=True)
class PolicyShape:
    """The shape of a policy, as ``policy.json`` stores it."""

    hidden_sizes: Sequence[int]
    activation: str
    distribution: str | None


Algorithm = Literal[
    "reinforce",
    "a2c",
    "ppo",
    "q_learning",
    "sarsa",
    "value_iteration",
    "policy_iteration",
    "dqn",
    "sac",
    "td3",
    "self_play",
    "maddpg",
    "iql",
    "behavior_cloning",
]


class Control(ReportingStage):
    """Train one policy per seed on a Gymnasium environment, and evaluate it.

    ``algorithm`` decides which further keys the stage has.
    """

    algorithm: Algorithm = "ppo"
    """Algorithm."""
    environment: str = Field(min_length=1)
    """Gymnasium id, such as ``CartPole-v1``; ``module:Name-v0`` imports the module first."""
    environment_options: dict[str, Any] = Field({})
    """Keyword arguments of ``gymnasium.make``, such as ``max_episode_steps``."""
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field([0], min_length=1)
    """Seeds; one policy is trained and evaluated for each. Processes share them."""
    steps: int = Field(ge=1)
    """Environment steps per seed."""
    gamma: float = Field(0.99, ge=0.0, le=1.0)
    """Discount per step."""
    episodes: int = Field(100, ge=1)
    """Episodes of the greedy policy in the evaluation of each seed."""
    confidence: float = Field(0.95, gt=0.0, lt=1.0)
    """Confidence level of the bootstrap intervals."""
    resamples: int = Field(2000, ge=100)
    """Number of bootstrap resamples."""
    keep_checkpoints: bool = False
    """Keep the checkpoints after the stage is complete."""

    @between_keys
    def _check_environment_options(self) -> Iterator[str]:
        options = self.environment_options
        limit = options.get("max_episode_steps", 1)
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            yield (
                "`environment_options.max_episode_steps` must be a whole number from 1, got "
                f"{shown(limit)}: an episode without a limit may never end; remove it to use the "
                "limit of the environment"
            )
        if "render_mode" in options:
            yield (
                "`environment_options.render_mode` has no effect in training; remove it, and watch "
                "the trained policy with `align play`"
            )

    @between_keys
    def _check_seeds(self) -> Iterator[str]:
        repeated = duplicates(self.seeds)
        if repeated:
            yield f"`seeds` contains {repeated[0]} more than once; list it once"

    @property
    def policy_shape(self) -> PolicyShape:
        """The networks of the policy that the algorithm trains."""
        raise NotImplementedError

    @property
    def n_recorded_steps(self) -> int:
        """Environment steps of each trained policy that are recorded for offline algorithms."""
        return 0

    @property
    def steps_before_learning(self) -> int:
        """Environment steps without an update at the start, which take less time than others."""
        return 0

    @property
    def gym_environments(self) -> tuple[GymEnvironment, ...]:
        """The one environment of the stage."""
        return (GymEnvironment(self.environment, self.environment_options),)

    def workload(self, statistics: Mapping[str, Any], world_size: int) -> Workload:
        """Environment steps of all seeds."""
        return Workload(steps=self.steps * len(self.seeds))
