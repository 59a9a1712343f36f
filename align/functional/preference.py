"""Preference losses: Bradley-Terry (reward models), DPO and KTO.

A score is a scalar per completion. A log-ratio is ``log pi(y|x) - log pi_ref(y|x)``, summed over
the tokens of a completion, in nats. Losses are unreduced: the caller weights pairs, micro-batches
and ranks. The stages train with TRL's trainers, whose losses are the means of these. Left out:
TRL's other variants (label smoothing, length normalization, IPO and others).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid


def bradley_terry_loss(
    chosen_scores: Float[Tensor, " batch"], rejected_scores: Float[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """Negative log-likelihood of the preferences, one value per pair.

    The Bradley-Terry model prefers the chosen completion with probability
    ``sigmoid(chosen - rejected)``. A constant added to both scores changes nothing.

    >>> bradley_terry_loss(torch.tensor([2.0, 0.0]), torch.tensor([2.0, 0.0]))  # log 2
    tensor([0.6931, 0.6931])

    Source: Bradley and Terry 1952, Biometrika 39; for reward models Ouyang et al. 2022,
    arXiv:2203.02155, eq. 1.
    """
    return -logsigmoid(chosen_scores - rejected_scores)


def dpo_loss(
    chosen_logratios: Float[Tensor, " batch"],
    rejected_logratios: Float[Tensor, " batch"],
    *,
    beta: float,
) -> Float[Tensor, " batch"]:
    """Direct preference optimization loss, one value per pair.

    ``beta`` times the log-ratio is the implicit reward, so this is :func:`bradley_terry_loss` on
    implicit rewards.

    >>> dpo_loss(torch.tensor([1.0]), torch.tensor([-1.0]), beta=0.5)  # log(1 + e^-1)
    tensor([0.3133])

    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7.
    """
    return bradley_terry_loss(beta * chosen_logratios, beta * rejected_logratios)


def kto_loss(
    logratios: Float[Tensor, " batch"],
    desirable: Bool[Tensor, " batch"],
    kl: Float[Tensor, ""],
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Tensor, " batch"]:
    """Kahneman-Tversky optimization loss, one value per completion.

    With ``gain = beta * (logratio - kl)``, the loss is ``weight * (1 - sigmoid(gain))`` for a
    desirable completion and ``weight * (1 - sigmoid(-gain))`` for an undesirable one. ``kl`` is the
    reference point: an estimate of KL(policy, reference), at least 0, that carries no gradient. In
    practice it is the mean log-ratio of completions paired with the prompts of other rows, clamped
    at 0.

    >>> kto_loss(torch.tensor([3.0, 3.0]), torch.tensor([True, False]), torch.tensor(1.0), beta=0.5)
    tensor([0.2689, 0.7311])

    Source: Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8.
    """
    gains = beta * (logratios - kl.detach())
    values = torch.where(desirable, gains, -gains).sigmoid()
    weights = torch.where(desirable, desirable_weight, undesirable_weight)
    return weights * (1 - values)
