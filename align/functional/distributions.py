"""Quantiles of the normal, Student's t and the Beta distribution, as plain numbers."""

from __future__ import annotations

import math

import torch


def normal_quantile(probability: float) -> float:
    """Value below which a standard normal variable lies with this probability."""
    return float(torch.special.ndtri(torch.tensor(probability, dtype=torch.float64)))


def t_quantile(probability: float, degrees: float) -> float:
    """Value below which a variable of Student's t distribution lies with this probability.

    For ``t > 0``, the chance of a value above t is half that of a Beta variable with parameters
    ``degrees / 2`` and 1/2 below ``degrees / (degrees + t**2)``.

    Source: Abramowitz and Stegun 1964, Handbook of Mathematical Functions, eq. 26.7.1.
    """
    if probability == 0.5:
        return 0.0
    if probability < 0.5:
        return -t_quantile(1 - probability, degrees)
    x = beta_quantile(2 * (1 - probability), degrees / 2, 0.5)
    return math.sqrt(degrees * (1 - x) / x)


def beta_quantile(probability: float, a: float, b: float) -> float:
    """Value below which a Beta(a, b) variable lies with this probability, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        if beta_cdf(middle, a, b) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def beta_cdf(x: float, a: float, b: float) -> float:
    """Probability that a Beta(a, b) variable is at most x: the regularized incomplete beta.

    Source: the continued fraction of Abramowitz and Stegun 1964, eq. 26.5.8, evaluated by Lentz's
    method; it converges quickly for ``x < (a + 1) / (a + b + 2)``, elsewhere the symmetry
    ``1 - beta_cdf(1 - x, b, a)`` applies.
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - beta_cdf(1 - x, b, a)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    log_front += a * math.log(x) + b * math.log1p(-x)
    tiny = 1e-300
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1) or tiny)
    fraction = d
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 / (1 + term * d or tiny)
            c = 1 + term / c or tiny
            fraction *= c * d
        if abs(c * d - 1) < 1e-16:
            break
    return math.exp(log_front) * fraction / a
