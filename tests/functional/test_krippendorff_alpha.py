"""Krippendorff's alpha against published values, the coincidence matrix, and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from align.functional.agreement import krippendorff_alpha

NONE = math.nan
PUBLISHED = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, NONE, NONE, NONE],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NONE, 3],
    [NONE, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NONE],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NONE],
]
"""Krippendorff 2011, section C: four observers of twelve units, with missing values."""


def by_coincidences(units: list[list[float]]) -> float:
    """Section D of the same text: weighted disagreement in the matrix of coincidences."""
    kinds = sorted({v for unit in units for v in unit if v == v})
    coincidences = np.zeros((len(kinds), len(kinds)))
    for unit in units:
        given = [v for v in unit if v == v]
        for a, b in itertools.permutations(range(len(given)), 2):
            place = kinds.index(given[a]), kinds.index(given[b])
            coincidences[place] += 1 / (len(given) - 1)
    totals = coincidences.sum(0)
    n = totals.sum()
    distances = np.subtract.outer(kinds, kinds) ** 2
    expected = np.outer(totals, totals) - np.diag(totals)
    return 1 - (n - 1) * (coincidences * distances).sum() / (expected * distances).sum()


def rated(n: int, agreement: float, rng: np.random.Generator) -> torch.Tensor:
    """Three annotators who copy a true value or draw one; a fifth of the values is missing."""
    true = rng.choice([0.0, 0.5, 1.0], (n, 1), p=[0.4, 0.2, 0.4])
    drawn = rng.choice([0.0, 0.5, 1.0], (n, 3), p=[0.4, 0.2, 0.4])
    values = np.where(rng.random((n, 3)) < agreement, true, drawn)
    values[rng.random((n, 3)) < 0.2] = np.nan
    return torch.from_numpy(values)


def test_the_published_value_of_interval_data():
    alpha = krippendorff_alpha(torch.tensor(PUBLISHED, dtype=torch.float64).T)
    assert alpha.value == pytest.approx(0.849, abs=5e-4)
    assert alpha.interval.low < 0.849 < alpha.interval.high <= 1


@pytest.mark.parametrize("seed", range(5))
def test_the_value_is_that_of_the_matrix_of_coincidences(seed: int):
    values = rated(30, 0.3 * (seed % 4), np.random.default_rng(seed))
    assert krippendorff_alpha(values).value == pytest.approx(by_coincidences(values.tolist()))


def test_values_without_a_partner_or_without_a_difference():
    unpaired = torch.tensor([[0.0, NONE], [1.0, NONE], [NONE, NONE]]).double()
    assert math.isnan(krippendorff_alpha(unpaired).value)
    assert math.isnan(krippendorff_alpha(torch.ones(5, 2).double()).value)
    both = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]).double()
    assert krippendorff_alpha(both).value == pytest.approx(1.0)
    assert krippendorff_alpha(torch.cat([both, unpaired])).value == pytest.approx(1.0)
    against = torch.tensor([[0.0, 1.0]] * 4).double()
    assert krippendorff_alpha(against).value == pytest.approx(1 - 7 / 4)  # (n - 1) * D / E


@pytest.mark.parametrize(("n", "agreement"), [(40, 0.4), (40, 0.8), (150, 0.6)])
def test_the_interval_contains_the_value_of_the_population(n: int, agreement: float):
    population = krippendorff_alpha(rated(50_000, agreement, np.random.default_rng(9))).value
    assert population == pytest.approx(agreement**2, abs=0.01)
    rng = np.random.default_rng(0)
    intervals = [krippendorff_alpha(rated(n, agreement, rng)).interval for _ in range(300)]
    share = np.mean([low <= population <= high for low, high in intervals])
    assert 0.92 <= share <= 0.985
