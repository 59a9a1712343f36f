"""The policies that theory names, as tables of log-probabilities ``[prompt, completion]``.

Nothing here reads the code under test: closed forms come from the papers, and where a loss has no
closed form, its expectation over the data is minimized over all tables in float64.

``r`` is the reward of a completion, ``h`` the log-ratio of a policy to the reference, and ``w`` the
probability that a completion is preferred to one drawn from the reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from benchmarks.proofs.world import LENGTHS, World, outcome_chances

SMOOTHING = 0.1
"""Share of reversed labels that EXO assumes."""
TAU = 0.05
"""Temperature of DiscoPOP's mixture."""


# Closed forms ------------------------------------------------------------------------------------


def tilted(reference: Tensor, gains: Tensor) -> Tensor:
    """The policy proportional to ``reference * exp(gains)``."""
    return (reference + gains).log_softmax(1)


def reward_and_kl(world: World, beta: float) -> Tensor:
    """The maximum of E[r] - beta KL(policy, reference): ``h = r / beta``, up to a constant.

    Source: Ziegler et al. 2019, arXiv:1909.08593; Rafailov et al. 2023, arXiv:2305.18290, eq. 4.
    """
    return tilted(world.reference, world.rewards / beta)


def win_probabilities(world: World) -> Tensor:
    """``w``: the probability that a completion is preferred to one drawn from the reference."""
    return (world.preferences * world.reference.exp()[:, None, :]).sum(2)


def best_of_two(world: World) -> Tensor:
    """The distribution of the chosen completions: ``reference * 2 w``."""
    return tilted(world.reference, (2 * win_probabilities(world)).log())


def length_scaled(world: World, gains: Tensor) -> Tensor:
    """``h = length * (gains + a)``, where ``a`` normalizes the policy.

    A loss of mean log-ratios per token fixes ``h / length`` up to a constant.
    """
    reference = world.reference

    def total(a: Tensor) -> Tensor:
        return (reference + LENGTHS * (gains + a)).logsumexp(1, keepdim=True)

    low = torch.full((len(reference), 1), -100.0, dtype=torch.float64)
    a = bisect(total, low, -low)
    return (reference + LENGTHS * (gains + a)).log_softmax(1)


def water_filling(world: World) -> Tensor:
    """The maximum of the sum of ``ref (2 w - 1) sigmoid(h)``, a concave function of the policy.

    ``sigmoid(h)`` is ``pi / (pi + ref)``. Completions that lose more often than they win have
    probability 0; the others have ``ref * max(0, sqrt((2 w - 1) / lambda) - 1)``.
    """
    reference = world.reference.exp()
    gains = (2 * win_probabilities(world) - 1).clamp(min=0)

    def policy(scale: Tensor) -> Tensor:
        return reference * (gains.sqrt() * scale - 1).clamp(min=0)

    low = torch.zeros(len(reference), 1, dtype=torch.float64)
    scale = bisect(lambda s: policy(s).sum(1, keepdim=True) - 1, low, low + 1e6)
    return policy(scale).log()


def bisect(rising: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """The root of a rising function, elementwise."""
    for _ in range(80):
        middle = (low + high) / 2
        above = rising(middle) > 0
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (low + high) / 2


# Losses on pairs ---------------------------------------------------------------------------------

PairLoss = Callable[[Tensor, Tensor, float], Tensor]
"""Loss of a pair from the log-ratios of its sides and beta."""


def _discopop(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    logits = beta * (chosen - rejected)
    share = torch.sigmoid(logits / TAU)
    return -logsigmoid(logits) * (1 - share) + torch.exp(-logits) * share


def _exo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    logits = beta * (chosen - rejected)
    q = torch.sigmoid(logits)
    return q * (logsigmoid(logits) - math.log(1 - SMOOTHING)) + (1 - q) * (
        logsigmoid(-logits) - math.log(SMOOTHING)
    )


PAIR_LOSSES: dict[str, PairLoss] = {
    "sigmoid": lambda c, r, beta: -logsigmoid(beta * (c - r)),
    "hinge": lambda c, r, beta: torch.relu(1 - beta * (c - r)),
    "exo_pair": _exo,
    "nca_pair": lambda c, r, beta: (
        -logsigmoid(beta * c) - 0.5 * logsigmoid(-beta * c) - 0.5 * logsigmoid(-beta * r)
    ),
    "bco_pair": lambda c, r, beta: -logsigmoid(beta * c) - logsigmoid(-beta * r),
    "sppo_hard": lambda c, r, beta: (c - 0.5 / beta).square() + (r + 0.5 / beta).square(),
    "apo_zero": lambda c, r, beta: 1 - torch.sigmoid(beta * c) + torch.sigmoid(beta * r),
    "apo_down": lambda c, r, beta: torch.sigmoid(beta * c) + torch.sigmoid(-beta * (c - r)),
    "discopop": _discopop,
}
"""Losses that the papers define on the log-ratios of whole completions."""


def expected_loss(world: World, policy: Tensor, loss: str, beta: float) -> Tensor:
    """The loss of every outcome weighted by its probability, ``[prompt]``."""
    return _weighted_loss(world.reference, outcome_chances(world), policy, loss, beta)


def _weighted_loss(
    reference: Tensor, chances: Tensor, policy: Tensor, loss: str, beta: float
) -> Tensor:
    h = policy - reference
    return (chances * PAIR_LOSSES[loss](h[:, :, None], h[:, None, :], beta)).sum((1, 2))


def minimizer(world: World, loss: str, beta: float, *, starts: int = 1) -> Tensor:
    """The policy that minimizes the expected loss, over all tables of probabilities.

    The search begins at the reference. A loss that is not convex needs more ``starts``, which lie
    around it at random: the lowest minimum of each prompt counts.
    """
    reference, chances = world.reference, outcome_chances(world)
    generator = torch.Generator().manual_seed(0)
    lowest = torch.full((len(reference),), math.inf, dtype=torch.float64)
    policy = reference
    for number in range(starts):
        noise = torch.randn(reference.shape, generator=generator, dtype=torch.float64)
        found = _descend(reference, chances, loss, beta, reference + (number > 0) * 2 * noise)
        values = _weighted_loss(reference, chances, found, loss, beta)
        policy = torch.where((values < lowest)[:, None], found, policy)
        lowest = torch.minimum(values, lowest)
    return policy


def _descend(
    reference: Tensor, chances: Tensor, loss: str, beta: float, start: Tensor, steps: int = 2000
) -> Tensor:
    """The minimum that L-BFGS finds from a table of logits."""
    logits = start.clone().requires_grad_()
    solver = torch.optim.LBFGS(
        [logits],
        max_iter=steps,
        tolerance_grad=1e-12,
        tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        solver.zero_grad()
        value = _weighted_loss(reference, chances, logits.log_softmax(1), loss, beta).sum()
        value.backward()
        return value

    solver.step(closure)
    return logits.detach().log_softmax(1)
