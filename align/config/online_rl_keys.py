"""Keys that all online-RL stages have, in groups, such as rewards, sampling and memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from align.config.base import FUNCTION, Config, between_keys, duplicates
from align.config.functions import Reward, ScoreFunction, as_function
from align.config.stopping import Stop
from align.errors import did_you_mean


class RewardKeys(Config):
    """What the policy is trained on."""

    rewards: list[Reward] = Field([])
    """Sources of the score: ``reward`` stages, folders, Hub ids; Python functions, written
    ``module:function``, or the name of a built-in one, such as ``math``; or a mapping with
    ``function``."""
    weights: list[float] | None = None
    """Weights of the rewards in the sum, in their order. Default: 1 each."""
    judge: Literal["gold"] | None = None
    """Score that is logged beside the reward and not trained on: ``gold`` is the exact score of the
    embedded task."""
    missing_eos_penalty: float | None = Field(None, ge=0.0)
    """Subtracted from the score of a completion without an end-of-sequence token."""
    overlong_buffer: int | None = Field(None, ge=1)
    """Tokens before ``max_new_tokens`` in which a penalty on the length of a completion rises from
    0 to ``overlong_penalty``. Default: no penalty."""
    overlong_penalty: float = Field(1.0, gt=0.0)
    """Subtracted from the score of a completion of ``max_new_tokens`` tokens."""
    normalize_scores: Literal["none", "group", "batch"] = "none"
    """Set each reward to mean 0 and variance 1 before it is weighted: among the completions of a
    prompt (``group``), or in the batch."""
    normalize_rewards: bool = False
    """Scale rewards to variance 1 in each update; their mean is unchanged."""

    @between_keys
    def _check_rewards(self) -> Iterator[str]:
        repeated = duplicates(self.reward_names)
        if repeated:
            yield (
                f"`rewards` contains {repeated[0]!r} more than once; list it once, with a weight, "
                "or give a mapping another `name`"
            )
        if self.weights is not None and len(self.weights) != len(self.rewards):
            yield (
                f"`weights` must have one entry for each of `rewards` ({len(self.rewards)}), "
                f"got {len(self.weights)}"
            )

    @property
    def reward_names(self) -> list[str]:
        """The names of the rewards in logs, in the order of the recipe."""
        return [each if isinstance(each, str) else each.label for each in self.rewards]

    @property
    def score_functions(self) -> dict[str, ScoreFunction]:
        """The rewards that are Python functions, by name."""
        functions = zip(self.reward_names, map(as_function, self.rewards), strict=True)
        return {name: function for name, function in functions if function is not None}


ENVIRONMENTS = {"arithmetic": "align.rewards.arithmetic:Arithmetic"}
"""Classes of the environments that Align contains, by their names in a recipe."""


class EnvironmentKeys(Config):
    """Episodes of several turns."""

    environment: str | None = None
    """Environment that answers the turns of the policy: a Python class, written ``module:Class``,
    or ``arithmetic``, the embedded one. The rewards of an episode are added to those of
    ``rewards``. Default: none; a completion is one turn."""
    max_turns: int = Field(8, ge=1)
    """Turns of the policy in an episode."""
    max_episode_tokens: int | None = Field(None, ge=1)
    """Longest episode in tokens, with its prompt. It ends before a turn for which fewer than
    ``max_new_tokens`` are left. Default: the positions of the model."""

    @between_keys
    def _check_environment(self) -> Iterator[str]:
        name = self.environment
        if name is None:
            for key in ("max_turns", "max_episode_tokens"):
                if key in self.model_fields_set:
                    yield f"`{key}` has no effect without `environment`; remove it"
        elif name not in ENVIRONMENTS and not FUNCTION.match(name):
            yield (
                f"`environment` is {name!r}{did_you_mean(name, ENVIRONMENTS)}; name a class, "
                f"`module:Class`, or an embedded environment: {', '.join(ENVIRONMENTS)}"
            )


class SamplingKeys(Config):
    """How completions are sampled."""

    n_completions: int = Field(1, ge=1)
    """Completions per prompt."""
    temperature: float = Field(1.0, gt=0.0)
    """Sampling temperature. The log-probabilities of policy and reference are computed at the same
    temperature, over the whole vocabulary that is sampled from."""
    max_new_tokens: int = Field(256, ge=1)
    """Longest completion in tokens."""
    sample_batch_size: int = Field(64, ge=1)
    """Completions sampled at once on each process."""


class KLKeys(Config):
    """The KL penalty towards the reference."""

    kl_coef: float = Field(0.05, ge=0.0)
    """Coefficient of the KL penalty towards the reference."""
    kl_placement: Literal["reward", "loss", "token_loss"] = "reward"
    """Where the KL penalty is: in the ``reward`` of each token, as the log-ratio (``k1``), or a
    term of the ``loss``, from the low-variance ``k3``, which normalization of advantages and
    rewards does not scale. With ``token_loss`` a token pays for its own ``k3`` and not for the
    later ones, as in TRL."""
    kl_target: float | None = Field(None, gt=0.0)
    """KL divergence, in nats per completion, that ``kl_coef`` is adapted to. Default: ``kl_coef``
    is constant."""
    kl_horizon: int = Field(10_000, ge=1)
    """Completions in which ``kl_coef`` changes by at most 20 %."""


CISPO_CLIP = 4.0
"""Default of ``clip_high`` for CISPO: as in ScaleRL (arXiv:2510.13786), a ratio of at most 5."""
UNUSED_BY_LOSS = {
    "clip": (),
    "cispo": ("clip", "dual_clip"),
    "sapo": ("clip", "clip_high", "dual_clip"),
    "vespo": ("clip", "clip_high", "dual_clip", "ratio"),
}
"""Keys without an effect, by the loss."""
UNCLIPPED = ("sapo", "vespo")
"""Losses that bound the probability ratio softly."""


class LossKeys(Config):
    """The loss of the policy."""

    normalize_advantages: bool = True
    """Normalize advantages to mean 0 and variance 1 in each update."""
    loss: Literal["clip", "cispo", "sapo", "vespo"] = "clip"
    """``clip``: the surrogate of PPO, without a gradient beyond the clipping range; ``cispo``:
    log-probabilities, weighted by the ratio clipped above; ``sapo``: a surrogate whose gradient
    fades the further the ratio is from 1; ``vespo``, in ``grpo`` and ``rloo``: log-probabilities,
    weighted by a function of the product of the ratios of the completion."""
    aggregate: Literal["token", "sequence", "constant"] = "token"
    """What the losses of the tokens are divided by: the tokens of the minibatch (``token``); the
    tokens of their completion, then the completions (``sequence``); or ``max_new_tokens`` times
    the completions (``constant``). An episode of several turns may have ``max_turns`` times as many
    tokens, at most ``max_episode_tokens``."""
    clip: float = Field(0.2, gt=0.0)
    """Clipping range of the probability ratio."""
    clip_high: float | None = Field(None, gt=0.0)
    """Clipping range above 1. Default: ``clip``; 4 with ``loss: cispo``."""
    dual_clip: float | None = Field(None, gt=1.0)
    """Upper bound on the loss ratio for negative advantages. Default: none."""
    entropy_coef: float = Field(0.0, ge=0.0)
    """Weight of the entropy bonus."""

    @between_keys
    def _check_loss(self) -> Iterator[str]:
        for key in UNUSED_BY_LOSS[self.loss]:
            if key in self.model_fields_set:
                yield f"`{key}` has no effect with `loss: {self.loss}`; remove it"
        if self.loss == "vespo" and not isinstance(self, GroupKeys):
            yield (
                "`loss: vespo` needs one advantage for all tokens of a completion; use a `grpo` or "
                "`rloo` stage, or set another `loss`"
            )

    @property
    def clip_range(self) -> tuple[float, float]:
        """How far below and above 1 the probability ratio is clipped; infinite if it is not."""
        if self.loss in UNCLIPPED:
            return math.inf, math.inf
        if self.loss == "cispo":
            return math.inf, self.clip_high or CISPO_CLIP
        return self.clip, self.clip_high or self.clip


class GroupKeys(Config):
    """Keys of the estimators that compare the completions of a prompt: one advantage for each."""

    ratio: Literal["token", "sequence"] = "token"
    """Probability ratio that is clipped: of each ``token``, or the geometric mean of those of the
    completion (``sequence``)."""
    filter: Literal["mixed_groups"] | None = None
    """Which completions an update is made of. With ``mixed_groups``, prompts whose completions have
    equal scores, which teach nothing, are replaced by others. Default: all."""
    max_draws: int = Field(4, ge=2)
    """Draws of an update with ``filter``, the first included; then prompts whose completions have
    equal scores fill the batch."""

    @between_keys
    def _check_filter(self) -> Iterator[str]:
        if self.filter is None and "max_draws" in self.model_fields_set:
            yield "`max_draws` has no effect without `filter`; remove it"


class StepKeys(Config):
    """Updates, optimizer steps and forward passes."""

    steps: int = Field(ge=1)
    """Number of updates; each samples new completions."""
    batch_size: int = Field(ge=1)
    """Completions per update, on all processes together."""
    learning_rate: float = Field(1e-5, gt=0.0)
    """Learning rate of the policy."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Schedule of the learning rates after warm-up; ``linear`` and ``cosine`` decay to 0."""
    warmup_steps: int = Field(0, ge=0)
    """Updates in which the learning rates rise from 0."""
    epochs: int = Field(4, ge=1)
    """Passes over the completions of an update."""
    minibatches: int = Field(1, ge=1)
    """Optimizer steps per pass."""
    max_grad_norm: float = Field(1.0, gt=0.0)
    """Gradients with a larger norm are scaled down to it."""
    target_kl: float | None = Field(None, gt=0.0)
    """KL divergence from the policy at sampling, per token, at which an update stops early.
    Default: none."""


class MemoryKeys(Config):
    """Memory and time of an update; the result is the same, up to rounding."""

    micro_batch_size: int = Field(16, ge=1)
    """Completions per forward pass on each process. Smaller values save memory and do not change
    the result."""
    tokens_per_batch: int | None = Field(None, ge=1)
    """Tokens per forward pass on each process, in place of ``micro_batch_size``: distinct ones with
    ``prefix_sharing``, otherwise those of the padded batch. The result does not change. A longer
    completion forms a batch alone."""
    optimizer: Literal["adamw", "paged_adamw_8bit"] = "adamw"
    """Optimizer; ``paged_adamw_8bit`` of bitsandbytes stores the moments of large weights in 8
    bits, and moves them to the memory of the CPU where that of a GPU is full."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    mixed_precision: Literal["bfloat16"] | None = None
    """Data type of the layers' matrix products, and of the logits in sampling; weights,
    log-probabilities and values stay in float32. Default: the type of the weights, ``dtype``."""


class HeldOutKeys(Config):
    """Evaluation on held-out prompts during training, and checkpoints."""

    eval_steps: int | None = Field(None, ge=1)
    """Updates between evaluations on held-out prompts. Default: no evaluation."""
    eval_split: Literal["test", "validation"] = "validation"
    """Split of the held-out prompts."""
    n_eval_prompts: int = Field(128, ge=1)
    """Number of held-out prompts."""
    stop: Stop | None = None
    """Stop the run when a judge finds, in the evaluations, that the policy declines; the best
    policy is saved. Default: all ``steps`` are run, and the last policy is saved."""
    save_steps: int | None = Field(None, ge=1)
    """Updates between checkpoints. Default: ten checkpoints in all."""
