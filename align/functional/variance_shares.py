"""How much of the variance of a sum each of its parts carries."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from align.functional.masked import sum_over_ranks


def variance_shares(parts: Float[Tensor, "parts batch"], *, n: int) -> Float[Tensor, " parts"]:
    """Share of each part in the variance of the sum of all parts, **on all ranks together**.

    The share of a part is its covariance with the sum, divided by the variance of the sum. Shares
    add up to 1; that of a part that opposes the sum is negative. If the sum does not vary, all are
    NaN. ``n`` consecutive completions share a prompt: with more than one, the variance is that
    within prompts, which is all that advantages relative to a prompt contain.

    >>> variance_shares(torch.tensor([[0.0, 2.0, 5.0, 7.0], [1.0, 0.0, 1.0, 0.0]]), n=2)
    tensor([ 2., -1.], dtype=torch.float64)
    """
    values = parts.double()
    if n > 1:
        groups = values.view(len(values), -1, n)
        centered = (groups - groups.mean(2, keepdim=True)).flatten(1)
    else:
        sums = torch.cat([values.sum(1), values.new_tensor([values.shape[1]])])
        *totals, count = sum_over_ranks(sums)
        centered = values - torch.stack(totals)[:, None] / count
    covariances = sum_over_ranks((centered * centered.sum(0)).sum(1))
    return covariances / covariances.sum()
