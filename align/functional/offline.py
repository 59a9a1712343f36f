"""Losses of learning from recorded steps: the expectile regression and the weights of IQL."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def expectile_loss(errors: Float[Tensor, "*shape"], *, expectile: float) -> Float[Tensor, "*shape"]:
    """Squared errors of an expectile regression, one per target; an error is target minus estimate.

    Targets above the estimate weigh ``expectile``, those below it ``1 - expectile``. At 0.5 the
    best estimate is the mean of the targets; toward 1 it approaches their maximum.

    >>> expectile_loss(torch.tensor([2.0, -2.0]), expectile=0.75)
    tensor([3., 1.])

    Source: Kostrikov, Nair and Levine 2022, arXiv:2110.06169, eq. 4.
    """
    weights = torch.where(errors > 0, expectile, 1 - expectile)
    return weights * errors.square()


def advantage_weights(
    advantages: Float[Tensor, "*shape"], *, temperature: float, bound: float = 100.0
) -> Float[Tensor, "*shape"]:
    """Weights ``exp(temperature * advantage)`` of the log-probabilities of recorded actions.

    A larger ``temperature`` imitates the better actions more exclusively; at 0 all weights are 1.
    Weights above ``bound`` are lowered to it.

    >>> advantage_weights(torch.tensor([0.0, 1.0, 90.0]), temperature=1.0)
    tensor([  1.0000,   2.7183, 100.0000])

    Source: Peng et al. 2019, arXiv:1910.00177, eq. 8; Kostrikov, Nair and Levine 2022,
    arXiv:2110.06169, eq. 7.
    """
    return (temperature * advantages).exp().clamp(max=bound)
