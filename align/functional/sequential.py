"""A sequential test for the decline of a policy, valid at every look.

During training, the policy is compared with an incumbent, the best policy so far, in a number of
checks. The test multiplies evidence over the checks, and may be read after each of them: no
correction for repeated looks is needed. All computations are in float64 on the CPU.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

BETS = (0.05, 0.1, 0.2, 0.4, 0.8)
"""Stakes, as shares of the wealth. The best one for a win rate w without ties is ``1 - 2 w``."""

LARGEST_WEALTH = 1e150
"""Bound of a gambler's wealth, so that it stays finite in float64. It keeps the error rate."""


def decline_e_values(
    outcomes: Float[Tensor, "*runs checks comparisons"], *, planned: int
) -> Float[Tensor, "*runs checks"]:
    """E-value against "the policy has not declined" after each check.

    An outcome is 1 where the policy beats the incumbent, 0.5 for a tie, 0 for a loss, or a value
    between them; NaN is left out. The null hypothesis is that in every check the expected outcome,
    given all earlier checks, is at least 1/2. Incumbents may change between checks, by any rule
    that reads earlier checks only.

    A gambler who stakes the share ``bet`` of the wealth against the policy multiplies it by
    ``1 + bet * (1 - 2 * outcome)`` in each comparison. Under the null hypothesis this factor is at
    least 0 and its expectation at most 1. One gambler enters at every planned check with every bet;
    whoever waits keeps 1. The e-value is their mean wealth, a nonnegative supermartingale that
    starts at 1, so the probability that it ever reaches ``1 / alpha`` is at most ``alpha``. A
    decline that begins late is found by those who enter late, whatever the policy gained before.

    >>> lost = torch.zeros(2, 3)  # two checks with three lost comparisons each
    >>> decline_e_values(lost, planned=2)  # ((1.05**3 + … + 1.8**3) / 5 + 1) / 2 first
    tensor([1.7793, 6.0432], dtype=torch.float64)

    Source: Ville 1939, Étude critique de la notion de collectif; bets: Waudby-Smith and Ramdas
    2024, Journal of the Royal Statistical Society B 86, 1 to 27, arXiv:2010.09686; entries at
    every check: Shin, Ramdas and Rinaldo 2023, arXiv:2203.03532.
    """
    values = outcomes.detach().to("cpu", torch.float64)
    checks = values.shape[-2]
    if checks > planned:
        raise ValueError(f"{checks} checks, more than the {planned} planned ones")
    if bool(((values < 0) | (values > 1)).any()):
        raise ValueError("expected outcomes in [0, 1], or NaN where there is none")
    bets = torch.tensor(BETS, dtype=torch.float64)
    gains = (1 - 2 * values).nan_to_num(0.0)
    growth = (1 + bets * gains[..., None]).log().sum(-2)  # [*runs, checks, bets], logarithmic
    growth = growth.clamp(max=math.log(LARGEST_WEALTH)).exp()
    wealth = torch.zeros_like(bets)
    e_values = torch.ones(*values.shape[:-1], dtype=torch.float64)
    for check in range(checks):
        # Of all who have entered, by their bet.
        wealth = ((wealth + 1) * growth[..., check, :]).clamp(max=LARGEST_WEALTH)
        e_values[..., check] = (wealth.mean(-1) + planned - check - 1) / planned
    return e_values
