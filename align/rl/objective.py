"""The objective of an update: the loss of the policy and the critic, and the number of steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """The objective of an update, and its number of steps. By default one policy-gradient step."""

    epochs: int = 1
    """Passes over the rollout."""
    minibatches: int = 1
    """Optimizer steps per epoch."""
    micro_batches: int = 1
    """Forward passes per minibatch. More of them save memory and leave the gradient as it is."""
    clip_low: float = math.inf
    """How far below 1 the probability ratio of an action may fall before its gradient is 0."""
    clip_high: float = math.inf
    """How far above 1 the probability ratio of an action may rise before its gradient is 0."""
    loss: Literal["clip", "cispo", "sapo", "vespo"] = "clip"
    """The surrogate of PPO; log-probabilities, weighted by the ratio clipped above; a surrogate
    with a soft bound on the ratio; or log-probabilities, weighted by a function of the product of
    the ratios of their row, on which ``ratio`` has no effect. The last two do not clip."""
    ratio: Literal["token", "sequence"] = "token"
    """Probability ratio of an action, or the geometric mean of those of its row."""
    aggregate: Literal["token", "sequence", "constant"] = "token"
    """What the sum of the losses of a minibatch is divided by: its actions; for each row, the
    actions of the row, and then the number of rows; or the number of rows times ``longest``."""
    longest: int = 1
    """Greatest number of actions of a row, for ``aggregate="constant"``."""
    dual_clip: float | None = None
    """Bound of the loss of an action with negative advantage, in multiples of it; above 1."""
    value_coef: float = 0.5
    """Weight of the value loss."""
    value_clip: float | None = None
    """Bound of the critic's change, in units of the returns."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    kl_coef: float = 0.0
    """Weight of the KL term of the loss, for a rollout with ``ref_logps``."""
    kl_credit: Literal["completion", "token"] = "completion"
    """What a token pays for in that term: the KL from there to the end of its row, which has the
    gradient of the divergence of rows; or its own KL only."""
    max_grad_norm: float = math.inf
    """Norm to which gradients are clipped, of all parameters together."""
    target_kl: float | None = None
    """KL(old, new), in nats per token, above which a minibatch ends the update before its step."""
    whiten: bool | Literal["minibatch"] = False
    """Normalize advantages to mean 0 and variance 1 over the whole rollout and all ranks, or over
    each ``minibatch`` and all ranks.

    Within minibatches, the weight of an action depends on the shuffle and on the number of ranks.
    """
