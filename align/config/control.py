"""config.control"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from align.config.base import Stage


class Control(Stage):
    """REINFORCE, A2C or PPO on a Gymnasium environment, through the update that language models are trained with."""

    environment: str = Field(min_length=1)
    """A Gymnasium id, such as ``CartPole-v1``; ``module:Name-v0`` imports the module first."""
    environment_options: dict[str, Any] = {}
    """Passed to ``gymnasium.make``."""
    algorithm: Literal["reinforce", "a2c", "ppo"] = "ppo"
    baseline: Literal["value", "none"] = "value"
    """REINFORCE's: a learned value, or nothing."""
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field([0], min_length=1)
    """Each is trained and evaluated by itself; several processes share them."""
    steps: int = Field(ge=1)
    """Steps of the environments, for each seed."""
    envs: int = Field(16, ge=1)
    """Environments in step with each other."""
    stretch: int | None = Field(None, ge=1)
    """Steps of each environment between updates: 128 for PPO, 16 for A2C. REINFORCE takes whole episodes."""
    gamma: float = Field(0.99, ge=0.0, le=1.0)
    lam: float | None = Field(None, ge=0.0, le=1.0)
    """Of generalised advantage estimation: 0.95, and 1 for REINFORCE."""
    learning_rate: float = Field(1e-3, gt=0.0)
    value_learning_rate: float | None = Field(None, gt=0.0)
    """The critic's; without it, that of the policy."""
    schedule: Literal["linear", "constant"] = "linear"
    """``linear`` takes the learning rates to 0 over the run."""
    epochs: int | None = Field(None, ge=1)
    """PPO's passes over what was collected: 4."""
    minibatches: int | None = Field(None, ge=1)
    """PPO's optimizer steps in a pass: 4."""
    clip: float | None = Field(None, gt=0.0)
    """PPO's bound on the ratio: 0.2."""
    clip_high: float | None = Field(None, gt=0.0)
    """PPO's upper bound, where it differs."""
    value_clip: float | None = Field(None, gt=0.0)
    """PPO's bound on the critic's step, in units of returns."""
    target_kl: float | None = Field(None, gt=0.0)
    """PPO's KL at which an update stops early."""
    entropy_coef: float = Field(0.0, ge=0.0)
    max_grad_norm: float | None = Field(None, gt=0.0)
    """Of policy and critic together; without it, gradients stay as they are."""
    whiten: bool = True
    """Advantages get mean 0 and variance 1 in each update."""
    hidden: list[Annotated[int, Field(ge=1)]] = [64, 64]
    """Widths of the layers of policy and critic, which share none."""
    activation: Literal["tanh", "relu"] = "tanh"
    distribution: Literal["categorical", "gaussian", "squashed"] | None = None
    """Over actions; without it, what the environment takes: categorical, or gaussian."""
    normalize_observations: bool = False
    """By running mean and deviation, which stay with the policy."""
    normalize_rewards: bool = False
    """By the running deviation of discounted returns; in training only."""
    episodes: int = Field(100, ge=1)
    """Of the greedy policy, in the evaluation of each seed."""
    level: float = Field(0.95, gt=0.0, lt=1.0)
    """Of the intervals."""
    resamples: int = Field(2000, ge=100)
    keep_checkpoints: bool = False
    """Leave the checkpoints in the folder when the stage is complete."""

    @model_validator(mode="after")
    def _fits_the_algorithm(self) -> Control:
        of_ppo = ("epochs", "minibatches", "clip", "clip_high", "value_clip", "target_kl")
        given = [key for key in of_ppo if getattr(self, key) is not None]
        if self.algorithm != "ppo" and given:
            raise ValueError(
                f"`{given[0]}` is PPO's: `{self.algorithm}` takes one step for each update; remove it, or set "
                "`algorithm: ppo`"
            )
        if self.algorithm != "reinforce" and self.baseline == "none":
            raise ValueError(f"`{self.algorithm}` learns from values: remove `baseline: none`")
        if self.algorithm == "reinforce" and self.stretch is not None:
            raise ValueError("`reinforce` takes whole episodes: remove `stretch`")
        if self.algorithm == "reinforce" and self.lam not in (None, 1.0):
            raise ValueError("`reinforce` takes whole returns, which is `lam: 1.0`: remove `lam`")
        collected = self.envs * (self.stretch or 128)
        if self.algorithm == "ppo" and (self.minibatches or 4) > collected:
            raise ValueError(
                f"`minibatches: {self.minibatches or 4}` of the {collected} steps that `envs` times `stretch` collect: "
                "one has a step at least; lower it, or raise `stretch`"
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a seed stands twice in `seeds`; name each once")
        return self
