"""Masked statistics in one process; tests/rl/test_update.py compares two processes with one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from align.functional.masked import (
    masked_scale,
    masked_var,
    masked_whiten,
    max_over_ranks,
    ranks,
    sum_over_ranks,
)

VALUES = torch.tensor([[1.0, 2.0, torch.nan], [6.0, torch.inf, torch.nan]])
MASK = torch.tensor([[True, True, False], [True, False, False]])


def test_variance_by_hand_and_padding_is_never_read():
    # the mean is (1 + 2 + 6) / 3 = 3
    assert_close(masked_var(VALUES, MASK), torch.tensor(14 / 3))  # (4 + 1 + 9) / 3


def test_whitening_by_hand():
    # (-2, -1, 3) / sqrt(14 / 3); 0 where the mask is False
    deviation = (14 / 3) ** 0.5
    whitened = torch.tensor([[-2, -1, 0], [3, 0, 0]]) / deviation
    assert_close(masked_whiten(VALUES, MASK), whitened)
    # the same around the mean, 3
    assert_close(masked_scale(VALUES, MASK), (whitened + 3) * MASK)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.floats(-100, 100), st.floats(0.1, 100))
def test_whitened_entries_have_mean_0_and_variance_1_and_scaled_ones_keep_their_mean(
    seed, mean, deviation
):
    draw = torch.Generator().manual_seed(seed)
    values = mean + deviation * torch.randn(5, 7, generator=draw, dtype=torch.float64)
    mask = torch.rand(5, 7, generator=draw) < 0.7
    mask[0, :2] = True
    valid = values[mask].numpy()
    assert_close(float(masked_var(values, mask)), np.var(valid))

    whitened = masked_whiten(values, mask, eps=0.0)
    assert abs(np.mean(whitened[mask].numpy())) < 1e-12
    assert_close(float(np.var(whitened[mask].numpy())), 1.0)
    scaled = masked_scale(values, mask, eps=0.0)
    assert_close(np.mean(scaled[mask].numpy()), np.mean(valid))
    assert_close(float(np.var(scaled[mask].numpy())), 1.0)
    assert not whitened[~mask].any()
    assert not scaled[~mask].any()


def test_equal_entries_become_0_when_whitened_and_stay_when_scaled():
    values, mask = torch.full((2, 2), 0.7), torch.ones(2, 2).bool()
    assert_close(masked_whiten(values, mask), torch.zeros(2, 2))
    assert_close(masked_scale(values, mask), values)


def test_eps_is_added_to_the_variance():
    values, mask = torch.tensor([1.0, -1.0]), torch.ones(2).bool()
    # variance 1, so 1 / sqrt(1 + 3) = 0.5
    assert_close(masked_whiten(values, mask, eps=3.0), values / 2)
    assert_close(masked_scale(values, mask, eps=3.0), values / 2)


def test_a_large_mean_does_not_cancel_the_variance():
    # Mean of squares minus squared mean would fail: 1e8 + 1 and 1e8 are the same float32.
    values = torch.tensor([1e4 - 1, 1e4 + 1])
    assert masked_var(values, torch.ones(2).bool()) == 1.0


def test_reduced_precision_is_summed_in_float32():
    # In bfloat16, the sum 1 + 1 + ... stops at 256.
    values, mask = torch.ones(1000, dtype=torch.bfloat16), torch.ones(1000).bool()
    assert masked_var(values, mask).dtype == torch.float32
    assert masked_var(values, mask) == 0.0
    assert masked_whiten(values, mask).dtype == torch.bfloat16
    assert masked_scale(values, mask).dtype == torch.bfloat16
    # Around 1, neighbors in bfloat16 are 1/128 apart: the mean 1 + 1/256 must not be rounded
    # before it is subtracted.
    pair = torch.tensor([1.0, 1.0078125], dtype=torch.bfloat16)
    whitened = masked_whiten(pair, torch.ones(2).bool(), eps=0.0)
    assert_close(whitened, torch.tensor([-1.0, 1.0], dtype=torch.bfloat16))
    scaled = masked_scale(pair, torch.ones(2).bool(), eps=0.0)
    assert_close(scaled, torch.tensor([1 / 256, 2.0], dtype=torch.bfloat16))


def test_without_a_valid_entry_statistics_are_nan_and_results_0():
    assert masked_var(VALUES, torch.zeros_like(MASK)).isnan()
    assert masked_whiten(VALUES, torch.zeros_like(MASK)).eq(0).all()


def test_reductions_of_one_process_copy_their_argument_without_gradient():
    values = torch.tensor([1.0, 2.0], requires_grad=True)
    assert ranks() == 1
    for function in (sum_over_ranks, max_over_ranks):
        reduced = function(values)
        assert_close(reduced, values.detach())
        assert not reduced.requires_grad
        reduced += 1
    assert values.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("function", [masked_var, masked_whiten])
def test_shapes_must_agree(function):
    with pytest.raises(Exception, match="shape"):
        function(torch.zeros(2, 3), torch.ones(3).bool())
