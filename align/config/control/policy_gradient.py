"""Keys of the policy-gradient algorithms: REINFORCE, A2C and PPO."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from align.config.base import GymEnvironment, between_keys
from align.config.control.base import Control, PolicyShape

BATCHED = ("CartPole-v1", "Pendulum-v1")
"""Environments that can be stepped in one tensor."""
CONSTRAINT_KEYS = ("cost_limit", "multiplier_learning_rate", "multiplier_damping")
PPO_KEYS = (
    *("epochs", "minibatches", "clip", "clip_high", "value_clip", "target_kl"),
    *CONSTRAINT_KEYS,
)


class PolicyGradient(Control):
    """REINFORCE, A2C or PPO on a Gymnasium environment, with the update of language models."""

    code_version: ClassVar[int] = 3
    later_keys: ClassVar = {
        **dict.fromkeys(("initial_log_std", "record_steps", *CONSTRAINT_KEYS)),
        "vectorization": "gymnasium",
        "initialization": "orthogonal",
    }

    algorithm: Literal["reinforce", "a2c", "ppo"] = "ppo"
    """Algorithm."""
    baseline: Literal["value", "none"] = "value"
    """Baseline of ``reinforce``: a learned value function, or none."""
    n_envs: int = Field(16, ge=1)
    """Number of environments that are stepped in parallel."""
    vectorization: Literal["gymnasium", "async", "batched"] = "gymnasium"
    """Environments of training: those of Gymnasium, stepped in the training process or in one
    process each, for slow ones (``async``); or all in one tensor, for thousands of them
    (``batched``: ``CartPole-v1`` and ``Pendulum-v1``). The evaluation uses Gymnasium's."""
    n_steps: int | None = Field(None, ge=1)
    """Steps of each environment between updates. Default: 128 for PPO, 16 for A2C. REINFORCE
    collects whole episodes."""
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
    cost_limit: float | None = Field(None, ge=0.0)
    """PPO: limit of the mean cost of an episode, the sum of the environment's ``info["cost"]`` over
    its steps. A Lagrangian multiplier weighs costs against rewards. Default: none."""
    multiplier_learning_rate: float | None = Field(None, gt=0.0)
    """``cost_limit``: change of the multiplier in each update, per unit by which the mean cost of
    the ended episodes exceeds the limit. Default: 0.01."""
    multiplier_damping: float | None = Field(None, gt=0.0)
    """``cost_limit``: further change of the multiplier, for the present update alone, per unit of
    cost above the limit (Stooke et al. 2020, arXiv:2007.03964). It damps costs that circle around
    the limit. Default: 0."""
    entropy_coef: float = Field(0.0, ge=0.0)
    """Weight of the entropy bonus."""
    max_grad_norm: float | None = Field(None, gt=0.0)
    """Gradients of policy and critic with a larger joint norm are scaled down to it. Default: no
    clipping."""
    normalize_advantages: Literal[True, False, "minibatch"] = True
    """Normalize advantages to mean 0 and variance 1 in each update, or in each ``minibatch`` of
    PPO, as Stable-Baselines3 does."""
    hidden_sizes: list[Annotated[int, Field(ge=1)]] = Field([64, 64])
    """Widths of the hidden layers of the policy, and of the separate critic."""
    activation: Literal["tanh", "relu"] = "tanh"
    """Activation function of the hidden layers."""
    distribution: Literal["categorical", "gaussian", "squashed"] | None = None
    """Distribution of the actions. Default: categorical or gaussian, by the action space of the
    environment."""
    initial_log_std: float | None = None
    """Logarithm of the initial standard deviation of continuous actions. Default: 0."""
    initialization: Literal["orthogonal", "uniform"] = "orthogonal"
    """Initial weights: orthogonal, with a small last layer of the policy, or uniform as torch's
    linear layers have them."""
    normalize_observations: bool = False
    """Normalize observations by their running mean and deviation, which are saved with the policy.
    """
    normalize_rewards: bool = False
    """Scale rewards by the running deviation of the discounted returns, in training only."""

    record_steps: int | None = Field(None, ge=1)
    """Environment steps of the trained policy of each seed, with sampled actions, that are written
    to ``steps-<seed>.safetensors`` for ``iql`` and ``behavior_cloning``. Default: none."""

    @between_keys
    def _check_algorithm(self) -> Iterator[str]:
        for key in PPO_KEYS if self.algorithm != "ppo" else ():
            if getattr(self, key) is not None:
                yield (
                    f"`{key}` has no effect with `algorithm: {self.algorithm}`; remove it, or set "
                    "`algorithm: ppo`"
                )
        for key in CONSTRAINT_KEYS[1:]:
            if getattr(self, key) is not None and self.cost_limit is None:
                yield f"`{key}` has no effect without `cost_limit`; set it, or remove the key"
        if self.algorithm != "ppo" and self.normalize_advantages == "minibatch":
            yield (
                f"`algorithm: {self.algorithm}` has no minibatches; set `normalize_advantages: "
                "true`, or `algorithm: ppo`"
            )
        if self.algorithm != "reinforce" and self.baseline == "none":
            yield f"`algorithm: {self.algorithm}` requires values; remove `baseline: none`"
        if self.algorithm == "reinforce" and self.n_steps is not None:
            yield "`algorithm: reinforce` collects whole episodes; remove `n_steps`"
        if self.algorithm == "reinforce" and self.gae_lambda not in (None, 1.0):
            yield (
                "`algorithm: reinforce` uses whole returns (`gae_lambda: 1.0`); remove `gae_lambda`"
            )

    @between_keys
    def _check_vectorization(self) -> Iterator[str]:
        if self.vectorization == "batched" and self.environment not in BATCHED:
            yield (
                f"`vectorization: batched` does not support `environment: "
                f"{self.environment}`; expected {' or '.join(BATCHED)}, or remove the key"
            )
        others = [option for option in self.environment_options if option != "max_episode_steps"]
        for option in others if self.vectorization == "batched" else ():
            yield (
                f"`environment_options.{option}` has no effect with `vectorization: batched`, "
                "which only accepts `max_episode_steps`; remove one of them"
            )

    @between_keys
    def _check_batch_sizes(self) -> Iterator[str]:
        collected = self.n_envs * (self.rollout_steps or 1)
        if self.update_minibatches > collected:
            yield (
                f"`minibatches` ({self.update_minibatches}) must not exceed `n_envs` times "
                f"`n_steps` ({collected}); lower it, or raise `n_steps`"
            )

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
    def multiplier_step(self) -> float:
        """Learning rate of the multiplier of a cost limit."""
        return self.multiplier_learning_rate or 0.01

    @property
    def damping(self) -> float:
        """Change of the multiplier for one update, per unit of cost above the limit."""
        return self.multiplier_damping or 0.0

    @property
    def update_epochs(self) -> int:
        """Passes over the steps of an update: 1 unless the algorithm is PPO."""
        return (self.epochs or 4) if self.algorithm == "ppo" else 1

    @property
    def update_minibatches(self) -> int:
        """Optimizer steps per pass: 1 unless the algorithm is PPO."""
        return (self.minibatches or 4) if self.algorithm == "ppo" else 1

    @property
    def n_recorded_steps(self) -> int:
        """Environment steps of each trained policy that are recorded."""
        return self.record_steps or 0

    @property
    def policy_shape(self) -> PolicyShape:
        """A perceptron with the distribution that the recipe names."""
        return PolicyShape(self.hidden_sizes, self.activation, self.distribution)

    @property
    def gym_environments(self) -> tuple[GymEnvironment, ...]:
        """The one environment of the stage."""
        conditions = {
            "continuous actions": self.initial_log_std is not None,
            "a cost": self.cost_limit is not None,
        }
        needs = tuple(need for need, applies in conditions.items() if applies)
        return (
            GymEnvironment(self.environment, self.environment_options, self.distribution, needs),
        )
