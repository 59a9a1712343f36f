"""The losses of a policy's actions, by the settings of an objective.

Left out: how the losses of the actions are aggregated, which is part of the update.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from align.functional.policy_gradient import (
    cispo_loss,
    clipped_surrogate_loss,
    importance_ratio,
    kl_k3,
    kl_loss,
    sapo_loss,
    vespo_loss,
)
from align.rl.objective import Objective
from align.rl.rollout import Rollout


def policy_losses(
    logps: Float[Tensor, "batch time"],
    compared: Float[Tensor, "batch time"],
    piece: Rollout,
    objective: Objective,
) -> Float[Tensor, "batch time"]:
    """The losses of the actions, with their KL terms where the rollout has a reference.

    ``compared`` are the log-probabilities whose ratio to those of the rollout is bounded, by token
    or by :func:`align.functional.policy_gradient.sequence_logps`. Where another engine sampled, the
    losses are multiplied by the weights of the rollout. In VESPO, the weight of a row is a function
    of its ratio to the sampler, so it contains them.
    """
    kl_terms = _kl_terms(logps, compared, piece, objective)
    if objective.loss == "vespo":
        sampler_logps = piece.logps if piece.weights is None else piece.logps - piece.weights.log()
        losses = vespo_loss(logps, sampler_logps, piece.advantages, piece.mask)
        return losses if kl_terms is None else losses + _weighted(kl_terms, piece)
    losses = _surrogates(logps, compared, piece, objective)
    return _weighted(losses if kl_terms is None else losses + kl_terms, piece)


def _surrogates(logps: Tensor, compared: Tensor, piece: Rollout, objective: Objective) -> Tensor:
    """The losses that depend on nothing but an action and its ratio."""
    if objective.loss == "cispo":
        ratio = importance_ratio(compared, piece.logps)
        return cispo_loss(logps, ratio, piece.advantages, clip_high=objective.clip_high)
    if objective.loss == "sapo":
        return sapo_loss(compared, piece.logps, piece.advantages)
    return clipped_surrogate_loss(
        compared,
        piece.logps,
        piece.advantages,
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
        dual_clip=objective.dual_clip,
    )


def _kl_terms(
    logps: Tensor, compared: Tensor, piece: Rollout, objective: Objective
) -> Tensor | None:
    """The KL terms of the actions; None without a reference."""
    if piece.ref_logps is None:
        return None
    if objective.kl_credit == "completion":
        terms = kl_loss(logps, piece.logps, piece.ref_logps, piece.mask)
    else:
        terms = importance_ratio(compared, piece.logps) * kl_k3(logps, piece.ref_logps)
    return objective.kl_coef * terms


def _weighted(losses: Tensor, piece: Rollout) -> Tensor:
    return losses if piece.weights is None else losses * piece.weights
