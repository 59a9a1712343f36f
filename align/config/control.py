"""Configuration of ``control``: REINFORCE, A2C and PPO on Gymnasium environments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from align.config.base import GymEnvironment, Stage, Workload, duplicates
from align.errors import shown

PPO_KEYS = ("epochs", "minibatches", "clip", "clip_high", "value_clip", "target_kl")


class Control(Stage):
    """REINFORCE, A2C or PPO on a Gymnasium environment, with the update of language models."""

    code_version: ClassVar[int] = 3

    environment: str = Field(min_length=1)
    """Gymnasium id, such as ``CartPole-v1``; ``module:Name-v0`` imports the module first."""
    environment_options: dict[str, Any] = Field({})
    """Keyword arguments of ``gymnasium.make``, such as ``max_episode_steps``."""
    algorithm: Literal["reinforce", "a2c", "ppo"] = "ppo"
    """Algorithm."""
    baseline: Literal["value", "none"] = "value"
    """Baseline of ``reinforce``: a learned value function, or none."""
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field([0], min_length=1)
    """Seeds; one policy is trained and evaluated for each. Processes share them."""
    steps: int = Field(ge=1)
    """Environment steps per seed."""
    n_envs: int = Field(16, ge=1)
    """Number of environments that are stepped in parallel."""
    n_steps: int | None = Field(None, ge=1)
    """Steps of each environment between updates. Default: 128 for PPO, 16 for A2C. REINFORCE
    collects whole episodes."""
    gamma: float = Field(0.99, ge=0.0, le=1.0)
    """Discount per step."""
    gae_lambda: float | None = Field(None, ge=0.0, le=1.0)
    """Lambda of generalized advantage estimation. Default: 0.95; 1 for REINFORCE."""
    learning_rate: float = Field(1e-3, gt=0.0)
    """Learning rate of the policy."""
    value_learning_rate: float | None = Field(None, gt=0.0)
    """Learning rate of the critic. Default: that of the policy."""
    schedule: Literal["linear", "constant"] = "linear"
    """Schedule of the learning rates; ``linear`` decays to 0 over the run."""
    epochs: int | None = Field(None, ge=1)
    """PPO: passes over the steps of an update. Default: 4."""
    minibatches: int | None = Field(None, ge=1)
    """PPO: optimizer steps per pass. Default: 4."""
    clip: float | None = Field(None, gt=0.0)
    """PPO: clipping range of the probability ratio. Default: 0.2."""
    clip_high: float | None = Field(None, gt=0.0)
    """PPO: clipping range above 1. Default: ``clip``."""
    value_clip: float | None = Field(None, gt=0.0)
    """PPO: clipping range of the values, in units of returns. Default: none."""
    target_kl: float | None = Field(None, gt=0.0)
    """PPO: KL divergence from the old policy at which an update stops early. Default: none."""
    entropy_coef: float = Field(0.0, ge=0.0)
    """Weight of the entropy bonus."""
    max_grad_norm: float | None = Field(None, gt=0.0)
    """Gradients of policy and critic with a larger joint norm are scaled down to it. Default: no
    clipping."""
    normalize_advantages: bool = True
    """Normalize advantages to mean 0 and variance 1 in each update."""
    hidden_sizes: list[Annotated[int, Field(ge=1)]] = Field([64, 64])
    """Widths of the hidden layers of the policy, and of the separate critic."""
    activation: Literal["tanh", "relu"] = "tanh"
    """Activation function of the hidden layers."""
    distribution: Literal["categorical", "gaussian", "squashed"] | None = None
    """Distribution of the actions. Default: categorical or gaussian, by the action space of the
    environment."""
    normalize_observations: bool = False
    """Normalize observations by their running mean and deviation, which are saved with the policy.
    """
    normalize_rewards: bool = False
    """Scale rewards by the running deviation of the discounted returns, in training only."""
    episodes: int = Field(100, ge=1)
    """Episodes of the greedy policy in the evaluation of each seed."""
    confidence: float = Field(0.95, gt=0.0, lt=1.0)
    """Confidence level of the bootstrap intervals."""
    resamples: int = Field(2000, ge=100)
    """Number of bootstrap resamples."""
    keep_checkpoints: bool = False
    """Keep the checkpoints after the stage is complete."""

    @model_validator(mode="after")
    def _check_algorithm(self) -> Control:
        unused = [key for key in PPO_KEYS if getattr(self, key) is not None]
        if self.algorithm != "ppo" and unused:
            raise ValueError(
                f"`{unused[0]}` has no effect with `algorithm: {self.algorithm}`, which takes one "
                "step per update; remove it, or set `algorithm: ppo`"
            )
        if self.algorithm != "reinforce" and self.baseline == "none":
            raise ValueError(
                f"`algorithm: {self.algorithm}` requires values; remove `baseline: none`"
            )
        if self.algorithm == "reinforce" and self.n_steps is not None:
            raise ValueError("`algorithm: reinforce` collects whole episodes; remove `n_steps`")
        if self.algorithm == "reinforce" and self.gae_lambda not in (None, 1.0):
            raise ValueError(
                "`algorithm: reinforce` uses whole returns (`gae_lambda: 1.0`); remove `gae_lambda`"
            )
        return self

    @model_validator(mode="after")
    def _check_environment_options(self) -> Control:
        options = self.environment_options
        limit = options.get("max_episode_steps", 1)
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            raise ValueError(
                "`environment_options.max_episode_steps` must be a whole number from 1, got "
                f"{shown(limit)}: an episode without a limit may never end; remove it to use the "
                "limit of the environment"
            )
        if "render_mode" in options:
            raise ValueError(
                "`environment_options.render_mode` has no effect in training; remove it, and watch "
                "the trained policy with `align play`"
            )
        return self

    @model_validator(mode="after")
    def _check_batch_sizes(self) -> Control:
        collected = self.n_envs * (self.rollout_steps or 1)
        if self.update_minibatches > collected:
            raise ValueError(
                f"`minibatches` ({self.update_minibatches}) must not exceed `n_envs` times "
                f"`n_steps` ({collected}); lower it, or raise `n_steps`"
            )
        return self

    @model_validator(mode="after")
    def _check_seeds(self) -> Control:
        repeated = duplicates(self.seeds)
        if repeated:
            raise ValueError(f"`seeds` contains {repeated[0]} more than once; list it once")
        return self

    @property
    def collects_episodes(self) -> bool:
        """Whether an update collects whole episodes instead of ``rollout_steps``."""
        return self.algorithm == "reinforce"

    @property
    def rollout_steps(self) -> int | None:
        """Steps of each environment between updates, with the default of the algorithm."""
        if self.collects_episodes:
            return None
        return self.n_steps or (128 if self.algorithm == "ppo" else 16)

    @property
    def advantage_lambda(self) -> float:
        """Lambda of generalized advantage estimation, with the default of the algorithm."""
        if self.gae_lambda is not None:
            return self.gae_lambda
        return 1.0 if self.collects_episodes else 0.95

    @property
    def critic_learning_rate(self) -> float:
        """Learning rate of the critic; by default that of the policy."""
        return self.value_learning_rate or self.learning_rate

    @property
    def update_epochs(self) -> int:
        """Passes over the steps of an update: 1 unless the algorithm is PPO."""
        return (self.epochs or 4) if self.algorithm == "ppo" else 1

    @property
    def update_minibatches(self) -> int:
        """Optimizer steps per pass: 1 unless the algorithm is PPO."""
        return (self.minibatches or 4) if self.algorithm == "ppo" else 1

    @property
    def gym_environments(self) -> tuple[GymEnvironment, ...]:
        """The one environment of the stage."""
        return (GymEnvironment(self.environment, self.environment_options, self.distribution),)

    def workload(self, statistics: Mapping[str, Any], world_size: int) -> Workload:
        """Environment steps of all seeds."""
        return Workload(steps=self.steps * len(self.seeds))
