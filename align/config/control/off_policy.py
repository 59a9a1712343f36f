"""Keys of the off-policy algorithms: DQN, SAC and TD3."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from align.config.base import GymEnvironment, between_keys
from align.config.control.base import PolicyShape
from align.config.control.replay import Replay

OWN_KEYS = {
    "target": "dqn",
    "network": "dqn",
    "target_update_interval": "dqn",
    "exploration_fraction": "dqn",
    "exploration_final": "dqn",
    "action_noise": "td3",
}
"""Keys of one algorithm."""


class OffPolicy(Replay):
    """DQN, SAC or TD3 of Stable-Baselines3: one environment, and a buffer of its steps.

    DQN needs discrete actions, SAC and TD3 bounded continuous ones.
    """

    code_version: ClassVar[int] = 1
    later_keys: ClassVar = {"schedule": "constant"}

    algorithm: Literal["dqn", "sac", "td3"]
    """Algorithm."""
    hidden_sizes: list[Annotated[int, Field(ge=1)]] = Field([256, 256], min_length=1)
    """Widths of the hidden layers, with ReLU, of the policy and of the critics."""
    schedule: Literal["linear", "constant"] = "constant"
    """Learning rate over the run: constant, or decaying to 0."""
    train_every: int = Field(1, ge=1)
    """Environment steps between updates."""
    gradient_steps: int = Field(1, ge=1)
    """Optimizer steps of each update."""
    tau: float | None = Field(None, gt=0.0, le=1.0)
    """Part of the trained weights in each update of the target networks. Default: 0.005; 1 for DQN.
    """
    replay: Literal["uniform", "hindsight"] = "uniform"
    """Steps of a batch: ``uniform`` as they were, or most of them with a goal that the same episode
    reached later (``hindsight``, Andrychowicz et al. 2017, arXiv:1707.01495)."""
    hindsight_goals: int | None = Field(None, ge=1)
    """``hindsight``: steps with another goal for each step with its own. Default: 4."""
    target: Literal["max", "double"] | None = None
    """DQN: the next action is the best one of the target network (``max``, the default), or of the
    trained network (``double``, van Hasselt et al. 2016, arXiv:1509.06461)."""
    network: Literal["plain", "dueling"] | None = None
    """DQN: one network of action values (``plain``, the default), or two streams for the value and
    the advantages (``dueling``, Wang et al. 2016, arXiv:1511.06581)."""
    target_update_interval: int | None = Field(None, ge=1)
    """DQN: environment steps between updates of the target network. Default: 1,000."""
    exploration_fraction: float | None = Field(None, gt=0.0, le=1.0)
    """DQN: part of the run in which the probability of a random action decays. Default: 0.2."""
    exploration_final: float | None = Field(None, ge=0.0, le=1.0)
    """DQN: probability of a random action afterwards. Default: 0.05."""
    action_noise: float | None = Field(None, ge=0.0)
    """TD3: standard deviation of the noise on actions, whose bounds are scaled to ±1. Default: 0.1.
    """

    @between_keys
    def _check_algorithm(self) -> Iterator[str]:
        for key, algorithm in OWN_KEYS.items():
            if getattr(self, key) is not None and self.algorithm != algorithm:
                yield (
                    f"`{key}` has no effect with `algorithm: {self.algorithm}`; remove it, or set "
                    f"`algorithm: {algorithm}`"
                )
        if self.hindsight_goals is not None and self.replay != "hindsight":
            yield (
                "`hindsight_goals` has no effect with `replay: uniform`; remove it, or set "
                "`replay: hindsight`"
            )

    @property
    def policy_shape(self) -> PolicyShape:
        """A perceptron with ReLU; greedy actions of SAC and TD3 are a squashed mean."""
        distribution = "categorical" if self.algorithm == "dqn" else "squashed"
        return PolicyShape(self.hidden_sizes, "relu", distribution)

    @property
    def required_packages(self) -> dict[str, tuple[str, str]]:
        """Stable-Baselines3."""
        packages = {"algorithm": ("stable_baselines3", "-e '.[off-policy]'")}
        return super().required_packages | packages

    @property
    def gym_environments(self) -> tuple[GymEnvironment, ...]:
        """The one environment of the stage, with the actions of the algorithm."""
        actions = "discrete actions" if self.algorithm == "dqn" else "bounded continuous actions"
        needs = (actions, "goals") if self.replay == "hindsight" else (actions,)
        return (GymEnvironment(self.environment, self.environment_options, needs=needs),)
