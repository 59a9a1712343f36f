"""Shares of the parts in the variance of their sum."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from align.functional.variance_shares import variance_shares


def test_variance_shares_by_hand():
    # Sum 0 + 1, 2 + 0, 5 + 1, 7 + 0 = 1, 2, 6, 7. Centered by prompt: (-.5, .5, -.5, .5), with
    # parts (-1, 1, -1, 1) and (.5, -.5, .5, -.5): covariances 2 and -1, variance of the sum 1.
    parts = torch.tensor([[0.0, 2.0, 5.0, 7.0], [1.0, 0.0, 1.0, 0.0]])
    assert_close(variance_shares(parts, n=2), torch.tensor([2.0, -1.0], dtype=torch.float64))


def test_variance_shares_are_covariances_with_the_sum():
    parts = torch.randn(3, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts[1] *= 3
    covariance = torch.cov(torch.cat([parts, parts.sum(0, keepdim=True)]))
    shares = variance_shares(parts, n=1)
    assert_close(shares, covariance[:3, 3] / covariance[3, 3])
    assert_close(shares.sum(), torch.tensor(1.0, dtype=torch.float64))
    # Within prompts: covariances of each prompt, added up; the offset of a prompt does not count.
    offset = parts + torch.randn(1, 8, 1).expand(3, 8, 5).flatten(1) * 10
    grouped = sum(
        torch.cov(torch.cat([p, p.sum(0, keepdim=True)])) for p in parts.view(3, 8, 5).unbind(1)
    )
    assert isinstance(grouped, torch.Tensor)
    expected = grouped[:3, 3] / grouped[3, 3]
    assert_close(variance_shares(parts, n=5), expected)
    assert_close(variance_shares(offset, n=5), expected)


def test_a_sum_without_variance_has_no_shares():
    assert variance_shares(torch.ones(2, 4), n=2).isnan().all()
    assert variance_shares(torch.ones(2, 4), n=1).isnan().all()
