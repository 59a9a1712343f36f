"""Quantiles of the normal, Student's t and the Beta distribution, as plain numbers."""

from __future__ import annotations

import math

import torch


def normal_quantile(probability: float) -> float:
    """Value below which a standard normal variable lies with this probability."""
    return float(torch.special.ndtri(torch.tensor(probability, dtype=torch.float64)))


def normal_cdf(value: float) -> float:
    """Probability that a standard normal variable is at most ``value``."""
    return math.erfc(-value / math.sqrt(2)) / 2


def t_quantile(probability: float, degrees: float) -> float:
    """Value below which a variable of Student's t distribution lies with this probability.

    ``t**2 / (degrees + t**2)`` is a Beta variable with parameters 1/2 and ``degrees / 2``.

    Source: Abramowitz and Stegun 1964, Handbook of Mathematical Functions, eq. 26.7.1.
    """
    if probability <= 0.5:
        return 0.0 if probability == 0.5 else -t_quantile(1 - probability, degrees)
    x = beta_quantile(2 * probability - 1, 0.5, degrees / 2)
    if x < 0.5:
        return math.sqrt(degrees * x / (1 - x))
    rest = beta_quantile(2 * (1 - probability), degrees / 2, 0.5)  # 1 - x, without cancellation
    return math.sqrt(degrees * (1 - rest) / rest)


def beta_quantile(probability: float, a: float, b: float) -> float:
    """Value below which a Beta(a, b) variable lies with this probability.

    Newton's method, with a bisection where it would leave the interval that contains the value.
    """
    low, high, x = 0.0, 1.0, a / (a + b)
    log_scale = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    for _ in range(200):
        error = beta_cdf(x, a, b) - probability
        low, high = (low, x) if error > 0 else (x, high)
        density = math.exp(log_scale + (a - 1) * math.log(x) + (b - 1) * math.log1p(-x))
        step = x - error / density if density > 0 else -1.0
        following = step if low < step < high else (low + high) / 2
        if not low < following < high or abs(following - x) <= 1e-13 * x:
            break
        x = following
    return x


def beta_cdf(x: float, a: float, b: float) -> float:
    """Probability that a Beta(a, b) variable is at most x: the regularized incomplete beta.

    Source: the continued fraction of Abramowitz and Stegun 1964, eq. 26.5.8. It converges quickly
    for ``x < (a + 1) / (a + b + 2)``; elsewhere the symmetry ``1 - beta_cdf(1 - x, b, a)`` applies.
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - _continued_fraction(1 - x, b, a)
    return _continued_fraction(x, a, b)


def _continued_fraction(x: float, a: float, b: float) -> float:
    """The regularized incomplete beta function by Lentz's method."""
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
        if abs(c * d - 1) < 1e-15:
            break
    return math.exp(log_front) * fraction / a
