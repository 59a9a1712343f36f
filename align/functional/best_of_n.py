"""Best-of-n: the completion with the highest score among n samples, averaged over all subsets.

N samples of a prompt give estimates for every n up to N: each is the mean over all subsets of n
samples, in closed form. All computations are in float64 on the CPU.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def best_of_n_values(
    scores: Float[Tensor, " samples"], values: Float[Tensor, " samples"]
) -> Float[Tensor, " samples"]:
    """Expected value of the sample with the highest score among n; entry k is for n = k + 1.

    With the scores of a reward model and the values of a gold score, this is the gold score of
    best-of-n sampling. Equal scores are picked with equal probability. Sorted by score, the m-th of
    N samples is the best of ``C(m - 1, n - 1)`` of the ``C(N, n)`` subsets.

    >>> scores, values = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0.0, 0.0, 3.0])
    >>> best_of_n_values(scores, values)  # (0 + 0 + 3) / 3, then 1/3 * 3, then the first sample
    tensor([1., 1., 0.], dtype=torch.float64)

    Source: Nakano et al. 2021, arXiv:2112.09332, appendix I, which Gao et al. 2022,
    arXiv:2210.10760, use for their curves.
    """
    scores, values = _float64(scores), _float64(values)
    distinct, group, counts = scores.unique(return_inverse=True, return_counts=True)
    means = torch.zeros(len(distinct), dtype=torch.float64).index_add_(0, group, values) / counts
    highest = counts.cumsum(0)
    picked = _share_of_subsets(highest, len(scores)) - _share_of_subsets(
        highest - counts, len(scores)
    )
    return picked @ means


def best_of_n_accuracy(
    scores: Float[Tensor, " samples"], values: Float[Tensor, " samples"]
) -> Float[Tensor, " samples"]:
    """Probability that the sample with the highest score among n has the highest value among them.

    Entry k is for n = k + 1, so the first is 1. Equal scores are picked with equal probability; of
    equal values each counts as the highest. If m samples have a lower score than a sample, a others
    have its score, and none of these has a higher value, ``C(m + a + 1, n) - C(m, n)`` subsets
    contain a sample with its score and no better one; it is picked in one of ``a + 1`` of them.

    >>> best_of_n_accuracy(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0.0, 0.0, 3.0]))
    tensor([1.0000, 0.6667, 0.0000], dtype=torch.float64)
    """
    scores, values = _float64(scores), _float64(values)
    not_better = values[None, :] <= values[:, None]
    lower = ((scores[None, :] < scores[:, None]) & not_better).sum(1)
    equal = ((scores[None, :] == scores[:, None]) & not_better).sum(1)  # itself included
    n = len(scores)
    picked = _share_of_subsets(lower + equal, n) - _share_of_subsets(lower, n)
    return (picked / equal).sum(1)


def best_of_n_kl(n: int) -> float:
    """KL divergence in nats of best-of-n sampling from the policy that is sampled.

    ``log n - (n - 1) / n``. Exact if no two completions have equal scores; otherwise, as for texts
    that are sampled repeatedly, an upper bound.

    Source: Stiennon et al. 2020, arXiv:2009.01325, appendix G.3; upper bound: Beirami et al. 2024,
    arXiv:2401.01879.
    """
    return math.log(n) - (n - 1) / n


def _share_of_subsets(sizes: Tensor, total: int) -> Float[Tensor, "n sizes"]:
    """Share of the subsets of n of ``total`` samples that lie within a set of each size.

    ``C(size, n) / C(total, n)``, for n from 1 to ``total``.
    """
    n = torch.arange(1, total + 1, dtype=torch.float64)[:, None]
    sizes = sizes.double()[None]
    every = torch.tensor(float(total), dtype=torch.float64)
    inside = torch.lgamma(sizes + 1) - torch.lgamma((sizes - n).clamp(min=0) + 1)
    outside = torch.lgamma(every + 1) - torch.lgamma(every - n + 1)
    return torch.where(n <= sizes, (inside - outside).exp(), 0.0)


def _float64(values: Tensor) -> Tensor:
    """Values as float64 on the CPU.

    Raises:
        ValueError: There are none, or some are not finite.
    """
    if values.numel() == 0 or not bool(values.isfinite().all()):
        raise ValueError(f"expected finite values, got {values.tolist()}")
    return values.detach().to("cpu", torch.float64)
