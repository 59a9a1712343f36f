"""Rewards and advantages of tokens from the score of their completion.

Rows are completions; columns are the tokens of prompt and completion. ``mask`` is True on the
completion's real tokens, eos included. All other entries are padding, which may have any value, NaN
included; they are 0 in every result.

A row may also be an episode of several turns, with tokens of an environment between those of the
policy. ``mask`` is True on the policy's tokens. The state after the last token of a turn is the one
before the first token of the next turn: what the environment writes is part of its transition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from align.functional.masked import masked_var, sum_over_ranks
from align.functional.returns import discounted_returns, gae

DEVIATION_EPS = 1e-4
"""Added to the standard deviations that advantages are divided by."""


def last_tokens(mask: Bool[Tensor, "batch time"]) -> Bool[Tensor, "batch time"]:
    """Mark the last real token of each row: its eos, or the token at which it was cut off.

    An empty row has none.

    >>> last_tokens(torch.tensor([[False, True, True, False], [True, False, False, True]])).int()
    tensor([[0, 0, 1, 0],
            [0, 0, 0, 1]], dtype=torch.int32)
    """
    following = mask.int().flip(1).cumsum(1).flip(1)
    return mask & (following == 1)


def token_rewards(
    scores: Float[Tensor, " batch"],
    kl: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    kl_coef: float,
) -> Float[Tensor, "batch time"]:
    """Rewards per token: the KL penalty on every token, and the score on the last real one.

    A row sums to ``score - kl_coef * KL``, where KL is the sum over its real tokens.

    >>> kl, mask = torch.tensor([[9.0, 1.0, 2.0, 9.0]]), torch.tensor([[False, True, True, False]])
    >>> token_rewards(torch.tensor([5.0]), kl, mask, kl_coef=0.5)
    tensor([[ 0.0000, -0.5000,  4.0000,  0.0000]])

    Source: Ziegler et al. 2019, arXiv:1909.08593, eq. 2, per token as in its published code; the
    score on the last real token and not on the pad token after it: Huang et al. 2024,
    arXiv:2403.17031, section 4.
    """
    penalties = -kl_coef * kl.masked_fill(~mask, 0)
    return penalties + scores[:, None].where(last_tokens(mask), 0)


def completion_gae(
    rewards: Float[Tensor, "batch time"],
    values: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    gamma: float,
    lam: float,
) -> Float[Tensor, "batch time"]:
    """Advantages by :func:`align.functional.returns.gae`, terminated at the last real token.

    A completion that was cut off by its length limit terminates there too: it was scored as it is.

    In an episode with a token of the environment between two of the policy, and gamma = lam = 1,
    each advantage is the sum of the later rewards minus the value:

    >>> mask = torch.tensor([[True, False, True]])
    >>> rewards, values = torch.tensor([[1.0, 9.0, 2.0]]), torch.tensor([[0.5, 9.0, 1.5]])
    >>> completion_gae(rewards, values, mask, gamma=1.0, lam=1.0)
    tensor([[2.5000, 0.0000, 0.5000]])
    """

    def advantages(rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        next_values = torch.nn.functional.pad(values[:, 1:], (0, 1))
        return gae(rewards, values, next_values, last_tokens(mask), ~mask, gamma=gamma, lam=lam)

    return _over_real_tokens(advantages, rewards, values, mask=mask)


def leave_one_out(returns: Float[Tensor, " batch"], *, n: int) -> Float[Tensor, " batch"]:
    """Return of each completion minus the mean return of the others of its prompt.

    ``n`` consecutive completions share a prompt.

    >>> leave_one_out(torch.tensor([1.0, 3.0, 5.0]), n=3)  # 1 - 4, 3 - 3, 5 - 2
    tensor([-3.,  0.,  3.])

    Source: Kool et al. 2019, Buy 4 REINFORCE samples, get a baseline for free; for language models
    Ahmadian et al. 2024 (RLOO), arXiv:2402.14740, eq. 8.
    """
    groups = returns.view(-1, n)
    others = (groups.sum(1, keepdim=True) - groups) / (n - 1)
    return (groups - others).flatten()


def group_relative(
    returns: Float[Tensor, " batch"],
    *,
    n: int,
    scale: Literal["group", "batch", "none"],
) -> Float[Tensor, " batch"]:
    """Return of each completion minus the mean of its prompt, divided by a standard deviation.

    ``n`` consecutive completions share a prompt. The deviation (with n - 1) is that of the returns
    of the prompt, or of all returns on all ranks; with ``none``, nothing is divided.
    :data:`DEVIATION_EPS` is added to it, so that equal returns have the advantage 0.

    >>> group_relative(torch.tensor([1.0, 3.0, 5.0]), n=3, scale="none")
    tensor([-2.,  0.,  2.])

    Source: Shao et al. 2024 (GRPO), arXiv:2402.03300, section 4.1.2; without the division: Liu et
    al. 2025 (Dr. GRPO), arXiv:2503.20783.
    """
    groups = returns.view(-1, n)
    centered = groups - groups.mean(1, keepdim=True)
    if scale == "group":
        centered = centered / (groups.std(1, keepdim=True) + DEVIATION_EPS)
    elif scale == "batch":
        everything = torch.ones_like(returns, dtype=torch.bool)
        count = sum_over_ranks(everything.sum())
        variance = masked_var(returns, everything) * count / (count - 1)
        centered = centered / (variance.sqrt() + DEVIATION_EPS)
    return centered.flatten()


def overlong_share(
    lengths: Float[Tensor, " batch"], *, longest: int, buffer: int
) -> Float[Tensor, " batch"]:
    """Share of the penalty for length: 0 up to ``longest - buffer`` tokens, 1 from ``longest`` on.

    >>> overlong_share(torch.tensor([80.0, 90.0, 100.0]), longest=100, buffer=20)
    tensor([0.0000, 0.5000, 1.0000])

    Source: Yu et al. 2025 (DAPO), arXiv:2503.14476, eq. 13, with the opposite sign.
    """
    return ((lengths - (longest - buffer)) / buffer).clamp(0, 1)


def rewards_to_go(
    rewards: Float[Tensor, "batch time"], mask: Bool[Tensor, "batch time"], *, gamma: float
) -> Float[Tensor, "batch time"]:
    """Discounted sum of the rewards from each token to the end of its completion.

    Rewards before an action do not depend on it and are left out: the return of REINFORCE.

    >>> rewards, mask = torch.tensor([[9.0, 1.0, 2.0]]), torch.tensor([[False, True, True]])
    >>> rewards_to_go(rewards, mask, gamma=0.5)
    tensor([[0., 2., 2.]])

    Source: Williams 1992, Machine Learning 8.
    """

    def returns(rewards: Tensor, mask: Tensor) -> Tensor:
        zeros = torch.zeros_like(rewards)
        return discounted_returns(rewards, zeros, last_tokens(mask), ~mask, gamma=gamma)

    return _over_real_tokens(returns, rewards, mask=mask)


def _over_real_tokens(
    function: Callable[..., Tensor], *columns: Float[Tensor, "batch time"], mask: Tensor
) -> Float[Tensor, "batch time"]:
    """Apply a function of ``columns`` and ``mask`` to rows whose real tokens are adjacent.

    The tokens of a row move to its left, and the result back to their places; it is 0 elsewhere.
    """
    order = (~mask).int().argsort(dim=1, stable=True)
    adjacent = [column.masked_fill(~mask, 0).gather(1, order) for column in columns]
    result = function(*adjacent, mask.gather(1, order))
    return torch.zeros_like(result).scatter(1, order, result).masked_fill(~mask, 0)
