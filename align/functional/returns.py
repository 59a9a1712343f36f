"""Returns and advantages along time, for auto-resetting environments and padded completions.

A row is a sequence of steps that may contain several episodes, one after another.

- ``terminated[t]``: the episode ends at step t; no state follows.
- ``cut[t]``: step t + 1 of the row is not the successor of step t (an episode's end, a time limit,
  the last token before padding). The last column is always cut.
- ``next_values[t]``: the value of the state that step t led to, read unless terminated; inside an
  episode it is ``values[t + 1]``.

Nothing after a cut influences what comes before it, so padding changes no result, not even NaN in
it. Left out: normalization of advantages (:func:`align.functional.masked.masked_whiten`).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def discounted_returns(
    rewards: Float[Tensor, "batch time"],
    next_values: Float[Tensor, "batch time"],
    terminated: Bool[Tensor, "batch time"],
    cut: Bool[Tensor, "batch time"],
    *,
    gamma: float,
) -> Float[Tensor, "batch time"]:
    """Discounted sum of rewards up to the episode's end, or up to a cut and the next value there.

    ``R_t = r_t + gamma * R_{t+1}``; at a cut ``r_t + gamma * next_value_t``; where terminated
    ``r_t``. Equal to ``gae(..., lam=1) + values`` of :func:`gae`.

    >>> rewards, nexts = torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 8.0]])
    >>> never, last = torch.zeros(1, 2).bool(), torch.tensor([[False, True]])
    >>> discounted_returns(rewards, nexts, never, never, gamma=0.5)  # 2 + 4, then 1 + 3
    tensor([[4., 6.]])
    >>> discounted_returns(rewards, nexts, last, never, gamma=0.5)
    tensor([[2., 2.]])

    Source: Sutton and Barto 2018, Reinforcement Learning, eq. 3.9; a time limit is no end: Pardo et
    al. 2018, arXiv:1712.00378.
    """
    stopped = _stopped(terminated, cut)
    bootstrap = next_values.masked_fill(terminated | ~stopped, 0)
    return _backward_sum(rewards + gamma * bootstrap, gamma * (~stopped).to(rewards.dtype), stopped)


def gae(
    rewards: Float[Tensor, "batch time"],
    values: Float[Tensor, "batch time"],
    next_values: Float[Tensor, "batch time"],
    terminated: Bool[Tensor, "batch time"],
    cut: Bool[Tensor, "batch time"],
    *,
    gamma: float,
    lam: float,
) -> Float[Tensor, "batch time"]:
    """Generalized advantage estimation; ``advantages + values`` are the critic's targets.

    ``delta_t = r_t + gamma * next_value_t - value_t`` (without the next value where terminated),
    and ``A_t = delta_t + gamma * lam * A_{t+1}``, which stops where terminated and at a cut.

    Reward 1, values 0.5, next values 0.5, gamma = lam = 1. An episode that terminates at its second
    step has deltas 1 and 0.5; cut there instead, it has 1 and 1, because the next value counts.

    >>> ones, halves = torch.ones(1, 3), torch.full((1, 3), 0.5)
    >>> never, second = torch.zeros(1, 3).bool(), torch.tensor([[False, True, False]])
    >>> gae(ones, halves, halves, second, never, gamma=1.0, lam=1.0)
    tensor([[1.5000, 0.5000, 1.0000]])
    >>> gae(ones, halves, halves, never, second, gamma=1.0, lam=1.0)
    tensor([[2., 1., 1.]])
    >>> gae(ones, halves, halves, never, never, gamma=1.0, lam=1.0)
    tensor([[3., 2., 1.]])

    Source: Schulman et al. 2016, arXiv:1506.02438, eq. 16; episodes inside a row: Schulman et al.
    2017, arXiv:1707.06347, eq. 11 and 12.
    """
    stopped = _stopped(terminated, cut)
    deltas = rewards + gamma * next_values.masked_fill(terminated, 0) - values
    return _backward_sum(deltas, gamma * lam * (~stopped).to(rewards.dtype), stopped)


def _stopped(terminated: Tensor, cut: Tensor) -> Tensor:
    """Where the recursion stops: where terminated, at a cut, and in the last column."""
    stopped = terminated | cut
    stopped[:, -1:] = True
    return stopped


def _backward_sum(terms: Tensor, decays: Tensor, stopped: Tensor) -> Tensor:
    """``S_t = terms_t + decays_t * S_{t+1}``, from the last column; only terms_t where stopped."""
    columns = terms.T.contiguous()  # time-major: each column is contiguous in memory
    running = torch.zeros_like(terms[:, 0])
    sums = []
    for term, decay, stop in zip(columns.flip(0), decays.T.flip(0), stopped.T.flip(0), strict=True):
        # A decay of 0 would not do: 0 times NaN is NaN.
        running = torch.addcmul(term, decay, running.masked_fill(stop, 0))
        sums.append(running)
    return torch.stack(sums[::-1], dim=1)
