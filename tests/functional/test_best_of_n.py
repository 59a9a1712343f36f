"""Best-of-n estimates against the enumeration of all subsets, with and without ties."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from align.functional import best_of_n

CASES = [
    pytest.param([0.3, -1.0, 2.0, 0.9, 1.5, 0.0], [1.0, 5.0, 2.0, 4.0, 3.0, 0.0], id="distinct"),
    pytest.param([1.0, 1.0, 0.0, 1.0, 0.0, 2.0], [3.0, 1.0, 4.0, 1.0, 5.0, 2.0], id="equal scores"),
    pytest.param(
        [0.3, -1.0, 2.0, 0.9, 1.5, 0.0], [1.0, 0.0, 1.0, 1.0, 0.0, 0.0], id="equal values"
    ),
    pytest.param([1.0, 1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 1.0, 1.0, 2.0], id="both"),
    pytest.param([2.0], [3.0], id="one sample"),
]


@pytest.mark.parametrize(("scores", "values"), CASES)
def test_estimates_are_means_over_all_subsets(scores: list[float], values: list[float]):
    mean_values, accuracies = [], []
    for n in range(1, len(scores) + 1):
        picked_values, correct = [], []
        for subset in itertools.combinations(range(len(scores)), n):
            highest = max(scores[i] for i in subset)
            picks = [values[i] for i in subset if scores[i] == highest]
            picked_values.append(sum(picks) / len(picks))
            best = max(values[i] for i in subset)
            correct.append(sum(pick == best for pick in picks) / len(picks))
        mean_values.append(sum(picked_values) / len(picked_values))
        accuracies.append(sum(correct) / len(correct))
    tensors = torch.tensor(scores), torch.tensor(values)
    expected = torch.tensor([mean_values, accuracies], dtype=torch.float64)
    assert_close(best_of_n.best_of_n_values(*tensors), expected[0])
    assert_close(best_of_n.best_of_n_accuracy(*tensors), expected[1])


def test_the_estimate_is_unbiased_over_draws_of_the_samples():
    # 8 samples from 5 equally likely completions: the mean estimate for n = 3 is the exact
    # expectation over all 125 draws of three
    scores, values = (
        torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]),
        torch.tensor([1.0, 0.0, 5.0, 2.0, 3.0]),
    )
    exact = [values[max(draw)].item() for draw in itertools.product(range(5), repeat=3)]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(5, (2000, 8), generator=generator)
    estimates = torch.stack([best_of_n.best_of_n_values(scores[d], values[d])[2] for d in drawn])
    error = estimates.std().item() / math.sqrt(len(drawn))
    assert abs(estimates.mean().item() - sum(exact) / 125) < 4 * error < 0.1


def test_a_score_that_is_the_value_has_the_curve_of_the_maximum():
    # the expected maximum of n of N numbers 1 to N is n (N + 1) / (n + 1)
    values = torch.arange(1.0, 1201.0)
    n = torch.arange(1, 1201).double()
    assert_close(best_of_n.best_of_n_values(values, values), n * 1201 / (n + 1))
    assert_close(best_of_n.best_of_n_accuracy(values, values), torch.ones(1200).double())


def test_kl_of_best_of_n_by_enumeration():
    # of 1000 equally likely completions without ties, the k-th is the best of n with probability
    # (k^n - (k - 1)^n) / 1000^n
    for n in (1, 2, 4, 16):
        p = [(k**n - (k - 1) ** n) / 1000**n for k in range(1, 1001)]
        kl = sum(each * math.log(1000 * each) for each in p if each)
        assert best_of_n.best_of_n_kl(n) == pytest.approx(kl, abs=0.02)
    assert best_of_n.best_of_n_kl(1) == 0.0


@pytest.mark.parametrize("scores", [[], [1.0, math.nan]])
def test_missing_scores_are_refused(scores: list[float]):
    with pytest.raises(ValueError, match="expected finite values"):
        best_of_n.best_of_n_values(torch.tensor(scores), torch.ones(len(scores)))
