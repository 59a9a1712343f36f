"""Quantiles against SciPy."""

import pytest
from scipy.stats import beta, norm, t

from align.functional.distributions import (
    beta_cdf,
    beta_quantile,
    normal_cdf,
    normal_quantile,
    t_quantile,
)

PROBABILITIES = [1e-6, 0.025, 0.4, 0.5, 0.5000001, 0.975, 1 - 1e-6]


@pytest.mark.parametrize("probability", PROBABILITIES)
def test_normal_quantiles(probability):
    assert normal_quantile(probability) == pytest.approx(norm.ppf(probability), abs=1e-12)
    assert normal_cdf(normal_quantile(probability)) == pytest.approx(probability, rel=1e-9)


@pytest.mark.parametrize("degrees", [1.0, 2.0, 3.0, 19.0, 49.5, 199.0, 1e6])
@pytest.mark.parametrize("probability", PROBABILITIES)
def test_t_quantiles(probability, degrees):
    expected = t(degrees).ppf(probability)
    assert t_quantile(probability, degrees) == pytest.approx(expected, rel=1e-7, abs=1e-12)


@pytest.mark.parametrize("a", [0.5, 1.0, 7.5, 300.0])
@pytest.mark.parametrize("b", [0.5, 2.0, 40.5])
def test_beta_quantiles(a, b):
    for probability in PROBABILITIES:
        x = beta_quantile(probability, a, b)
        assert x == pytest.approx(beta(a, b).ppf(probability), rel=1e-8)
        assert beta_cdf(x, a, b) == pytest.approx(beta(a, b).cdf(x), rel=1e-8)
    assert (beta_cdf(0.0, a, b), beta_cdf(1.0, a, b)) == (0.0, 1.0)


@pytest.mark.parametrize("a", [0.7, 8.3, 25.1, 60.0])
def test_the_distribution_is_computed_on_both_sides_of_the_switch(a):
    """With equal parameters the switch lies at one half, where both sides round to it."""
    for x in (0.5 - 2**-53, 0.5, 0.5 + 2**-53, 0.5 + 2**-52):
        assert beta_cdf(x, a, a) == pytest.approx(0.5, abs=1e-9)
        assert beta_cdf(x, a, a + 1e-15) == pytest.approx(0.5, abs=1e-9)
