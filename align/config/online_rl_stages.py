"""The online-RL stages: one kind for each estimator of the advantages, with its own defaults."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from align.config.online_rl import OnlineRL
from align.config.online_rl_keys import GroupKeys


class PPO(OnlineRL):
    """Proximal policy optimization: the advantages are those of a critic, by GAE.

    Source: Schulman et al. 2017, arXiv:1707.06347; for language models Ziegler et al. 2019,
    arXiv:1909.08593.
    """

    code_version: ClassVar[int] = 3
    has_critic: ClassVar[bool] = True

    gamma: float = Field(1.0, ge=0.0, le=1.0)
    """Discount per token."""
    gae_lambda: float = Field(0.95, ge=0.0, le=1.0)
    """Lambda of generalized advantage estimation."""
    critic_learning_rate: float | None = Field(None, gt=0.0)
    """Learning rate of the critic. Default: that of the policy."""
    critic_warmup_steps: int = Field(0, ge=0)
    """Updates at the start in which only the critic is trained."""
    value_clip: float | None = Field(0.2, gt=0.0)
    """Clipping range of the values around those at sampling; null: none."""
    value_coef: float = Field(0.1, ge=0.0)
    """Weight of the critic's loss."""

    @property
    def steps_without_policy(self) -> int:
        """The warm-up of the critic."""
        return self.critic_warmup_steps

    def digest_settings(self) -> dict[str, Any]:
        """As of other stages; the estimator has been a key."""
        return super().digest_settings() | {"advantages": "gae"}


class GRPO(GroupKeys, OnlineRL):
    """Group-relative policy optimization: rewards are compared with those of the same prompt.

    The advantage of a completion is its reward minus the mean reward of the completions of its
    prompt, divided by their standard deviation. There is no critic.

    Source: Shao et al. 2024, arXiv:2402.03300.
    """

    least_completions: ClassVar[int] = 2

    n_completions: int = Field(8, ge=1)
    """Completions per prompt."""
    scale_advantages: Literal["group", "batch", "none"] = "group"
    """Standard deviation that advantages are divided by: of the rewards of the ``group``, the
    completions of a prompt; of all rewards of the ``batch``; or ``none`` (Dr. GRPO)."""
    normalize_advantages: bool = False
    """Normalize advantages to mean 0 and variance 1 in each update."""
    kl_coef: float = Field(0.04, ge=0.0)
    """Coefficient of the KL penalty towards the reference."""
    aggregate: Literal["token", "sequence", "constant"] = "sequence"
    """What the losses of the tokens are divided by: the tokens of the minibatch (``token``, as in
    DAPO); the tokens of their completion, then the completions (``sequence``); or
    ``max_new_tokens`` times the completions (``constant``, as in Dr. GRPO). An episode of several
    turns may have ``max_turns`` times as many tokens, at most ``max_episode_tokens``."""
    kl_placement: Literal["reward", "loss", "token_loss"] = "loss"
    """Where the KL penalty is: in the ``reward`` of each token, as the log-ratio (``k1``), or a
    term of the ``loss``, from the low-variance ``k3``, which normalization of advantages and
    rewards does not scale. With ``token_loss`` a token pays for its own ``k3`` and not for the
    later ones, as in TRL."""
    epochs: int = Field(1, ge=1)
    """Passes over the completions of an update."""


class RLOO(GroupKeys, OnlineRL):
    """REINFORCE leave-one-out: rewards are compared with those of the others of the prompt.

    The advantage of a completion is its reward minus the mean reward of the other completions of
    its prompt. There is no critic.

    Source: Ahmadian et al. 2024, arXiv:2402.14740.
    """

    least_completions: ClassVar[int] = 2

    n_completions: int = Field(4, ge=1)
    """Completions per prompt."""
    normalize_advantages: bool = False
    """Normalize advantages to mean 0 and variance 1 in each update."""
    epochs: int = Field(1, ge=1)
    """Passes over the completions of an update."""


class Reinforce(OnlineRL):
    """REINFORCE: the advantages are the returns, normalized over the batch. There is no critic.

    Source: Williams 1992; normalized over the batch as in REINFORCE++, Hu et al. 2025,
    arXiv:2501.03262.
    """

    gamma: float = Field(1.0, ge=0.0, le=1.0)
    """Discount per token."""
    epochs: int = Field(1, ge=1)
    """Passes over the completions of an update."""
