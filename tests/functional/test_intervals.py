"""Intervals against enumeration, closed forms, SciPy and simulated evaluations."""

import itertools
import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import beta, binom, binomtest, bootstrap, multinomial, norm, t
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from align.functional import intervals
from align.functional.intervals import bootstrap_interval, proportion_interval
from align.functional.winrate import paired_permutation_p_value


def float64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_bootstrap_of_three_prompts_by_enumeration():
    # The 27 resamples of (0, 0, 1) have means 0, 1/3, 2/3, 1 in 8, 12, 6, 1 of the cases, so
    # cumulated in 29.6, 74.1, 96.3 and 100 %. With 2 degrees of freedom, the quantiles of Student's
    # t are 1.886, 1.061 and 0.289; times sqrt(3 / 2), a normal variable is below their negatives
    # in 1.05, 9.70 and 36.2 % of the cases.
    values = torch.tensor([0.0, 0.0, 1.0])
    for confidence, low, high in ((0.8, 0, 1), (0.6, 0, 2 / 3), (0.2, 1 / 3, 1 / 3)):
        interval = bootstrap_interval(values, confidence=confidence, resamples=20_000)
        assert_close(float64(interval), float64([low, high]))


def test_bootstrap_keeps_double_precision():
    # float32 has 24 bits: near 1e9 its neighbors are 64 apart
    low, high = bootstrap_interval(
        1e9 + float64([0.0, 0.0, 1.0]), confidence=0.97, resamples=20_000
    )
    assert (low - 1e9, high - 1e9) == pytest.approx((0, 1), abs=1e-6)


def test_bootstrap_agrees_with_scipy():
    values = torch.rand(60, 4, generator=generator(3)) ** 3  # skewed: the two tails differ
    interval = bootstrap_interval(values, confidence=0.9, resamples=20_000)
    expected = bootstrap(
        (values.double().mean(dim=1).numpy(),),
        np.mean,
        confidence_level=2 * norm.cdf(math.sqrt(60 / 59) * t(59).ppf(0.95)) - 1,
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    # a quantile at 5 % of 20,000 draws has an error of sqrt(0.05 * 0.95 / 20000) / 0.103 = 1.5 % of
    # a standard error; four times that, for the difference of two
    tolerance = 4 * 0.015 * math.sqrt(2) * float(values.mean(dim=1).std()) / math.sqrt(60)
    assert interval.low == pytest.approx(expected.low, abs=tolerance)
    assert interval.high == pytest.approx(expected.high, abs=tolerance)


def test_bootstrap_width_matches_the_analytic_standard_error_of_prompt_means():
    quality = torch.randn(400, 1, generator=generator(0))
    values = quality + torch.randn(400, 5, generator=generator(1))
    low, high = bootstrap_interval(values, resamples=20_000)
    standard_error = float(values.mean(dim=1).std(correction=0)) / math.sqrt(400)
    # the width has an error of sqrt(2) * sqrt(0.025 * 0.975 / 20000) / 0.0584 / 3.92 = 0.7 %; three
    # times that
    assert high - low == pytest.approx(2 * 1.96 * standard_error, rel=0.02)
    assert (low + high) / 2 == pytest.approx(float(values.mean()), abs=0.1 * standard_error)


def test_copies_of_a_completion_add_no_information():
    won = torch.bernoulli(torch.full((80, 1), 0.7), generator=generator(0))
    copied = won.expand(80, 8)
    assert bootstrap_interval(copied) == bootstrap_interval(won)
    # without clusters the data seem 8 times as many: narrower by sqrt(8) = 2.83
    clustered, naive = bootstrap_interval(copied), bootstrap_interval(copied.reshape(-1))
    ratio = (clustered.high - clustered.low) / (naive.high - naive.low)
    assert ratio == pytest.approx(math.sqrt(8), rel=0.1)


def test_the_bootstrap_depends_on_its_seed_alone():
    values = torch.rand(30, 2, generator=generator(0))
    state = torch.random.get_rng_state()
    first = bootstrap_interval(values, seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.rand(1)
    assert bootstrap_interval(values, seed=1) == first
    assert bootstrap_interval(values, seed=2) != first


def test_a_higher_confidence_level_gives_a_wider_interval():
    values = torch.rand(50, generator=generator(0))
    narrow, wide = (
        bootstrap_interval(values, confidence=0.5),
        bootstrap_interval(values, confidence=0.99),
    )
    assert wide.low < narrow.low < narrow.high < wide.high


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_a_confidence_level_outside_0_to_1_is_refused(confidence):
    with pytest.raises(ValueError, match="between 0 and 1"):
        bootstrap_interval(torch.rand(5), confidence=confidence)


def test_no_prompts_are_refused():
    with pytest.raises(ValueError, match=r"shape \(0, 4\)"):
        bootstrap_interval(torch.empty(0, 4))


def binary(
    prompts: int, completions: int, rate: float, correlation: float
) -> Callable[[int], Tensor]:
    """Evaluations whose prompts have win rates from a Beta distribution around ``rate``."""

    def evaluation(seed: int) -> Tensor:
        rng = np.random.default_rng([seed, 0])
        size = 1 / correlation - 1 if correlation else math.inf
        rates = rng.beta(rate * size, (1 - rate) * size, (prompts, 1)) if correlation else rate
        return torch.from_numpy((rng.random((prompts, completions)) < rates).astype(float))

    return evaluation


def paired(seed: int) -> Tensor:
    """Differences of policies that win 0.75 and 0.55, on prompts hard or easy for both."""
    rng = np.random.default_rng([seed, 1])
    easy = rng.choice([-0.25, 0.25], (50, 1))
    first, second = (rng.random((50, 2)) < rate + easy for rate in (0.75, 0.55))
    return torch.from_numpy(first.astype(float) - second)


def skewed(prompts: int) -> Callable[[int], Tensor]:
    """Score differences with mean 1, of prompts whose spread differs: skewness 1.2."""

    def evaluation(seed: int) -> Tensor:
        rng = np.random.default_rng([seed, 4])
        spread = rng.gamma(3.0, 1 / 3, (prompts, 1))
        return torch.from_numpy(spread + 0.5 * rng.standard_normal((prompts, 2)))

    return evaluation


@pytest.fixture
def _cached_quantiles(monkeypatch):
    """Compute each quantile once: all evaluations have equally many prompts."""
    monkeypatch.setattr(intervals, "t_quantile", cache(intervals.t_quantile))


def contained(interval: Callable[..., Any], evaluation: Any, truth: float, count: int) -> float:
    """Share of ``count`` synthetic evaluations whose interval contains the truth."""
    covered = 0
    for seed in range(count):
        low, high = interval(evaluation(seed))
        covered += low - 1e-12 <= truth <= high + 1e-12
    return covered / count


DIFFERENCES = [
    pytest.param(paired, 0.2, id="50 paired differences"),
    pytest.param(skewed(20), 1.0, id="20 skewed prompts"),
]


@pytest.mark.slow
@pytest.mark.usefixtures("_cached_quantiles")
@pytest.mark.parametrize(("evaluation", "truth"), DIFFERENCES)
def test_the_bootstrap_contains_the_true_mean_in_93_to_97_of_100_evaluations(evaluation, truth):
    interval = partial(bootstrap_interval, resamples=300)
    # one standard error of the coverage itself is sqrt(0.95 * 0.05 / 2000) = 0.5 %
    assert 0.93 <= contained(interval, evaluation, truth, 2000) <= 0.97


@pytest.mark.slow
def test_an_interval_that_ignores_clusters_contains_the_true_rate_too_rarely():
    evaluation = binary(100, 8, 0.7, 0.5)
    covered = contained(lambda won: proportion_interval(won.reshape(-1)), evaluation, 0.7, 300)
    # a mean of 8 with correlation 0.5 has (1 + 7 * 0.5) = 4.5 times the variance assumed: |z| <
    # 1.96 / 2.12 in 64 %
    assert covered == pytest.approx(0.64, abs=0.09)


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("statistic", [bootstrap_interval, paired_permutation_p_value])
def test_memory_does_not_grow_with_the_resamples(statistic):
    values = torch.randn(10_000, generator=generator(0))
    with Largest() as largest:
        statistic(values, resamples=1000)
    assert 10_000 <= largest.elements <= 2**20  # all at once would be 10 million


@pytest.mark.parametrize("outcome", [0.0, 1.0])
@pytest.mark.parametrize("prompts", [1, 7, 55])
def test_where_all_prompts_agree_the_interval_is_the_exact_one_of_clopper_and_pearson(
    outcome, prompts
):
    interval = proportion_interval(torch.full((prompts, 3), outcome), confidence=0.9)
    exact = binomtest(int(outcome * prompts), prompts).proportion_ci(0.9, method="exact")
    assert interval == pytest.approx((exact.low, exact.high))


@pytest.mark.parametrize("outcome", [0.5, 0.3])
def test_where_all_prompts_have_one_value_the_interval_allows_for_others(outcome):
    # At most a share q of prompts with another outcome: (1 - q)^20 = 0.025, so 1 - q = 0.8316
    low, high = proportion_interval(torch.full((20, 3), outcome, dtype=torch.float64))
    assert low == pytest.approx(outcome * 0.025 ** (1 / 20))
    assert 1 - high == pytest.approx((1 - outcome) * 0.025 ** (1 / 20))


def reference_interval(means: np.ndarray) -> tuple[float, float]:
    """The interval by SciPy: roots of the score test, and of a Beta distribution near the ends."""
    n, rate = len(means), means.mean()
    variance, fourth = means.var(ddof=1), ((means - rate) ** 4).mean()
    degrees = min(n - 1, 2 * n / max(fourth / means.var() ** 2 - 1, 1e-12))
    size = n / (variance / (rate * (1 - rate))) ** (degrees / (degrees + 1))
    quantile = t(n - 1).ppf(0.975)

    def score(true: float) -> float:
        return (rate - true) ** 2 * size - quantile**2 * true * (1 - true)

    low, high = brentq(score, 0, rate), brentq(score, rate, 1)
    limit = beta(size, 1).ppf(0.025)  # its CDF is x ** size
    if high > limit:
        one_sided = beta(rate * size + 0.5, (1 - rate) * size + 0.5).ppf(0.95)
        high = min(high, max(one_sided, limit))
    if low < 1 - limit:
        one_sided = beta(rate * size + 0.5, (1 - rate) * size + 0.5).ppf(0.05)
        low = max(low, min(one_sided, 1 - limit))
    return low, high


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5, 0.8, 0.97])
def test_the_interval_agrees_with_roots_by_scipy(rate):
    for seed in range(5):
        won = binary(30, 3, rate, 0.3)(seed)
        if len(won.mean(dim=1).unique()) > 1:
            expected = reference_interval(won.mean(dim=1).numpy())
            assert proportion_interval(won) == pytest.approx(expected, abs=1e-9)


@pytest.mark.usefixtures("_cached_quantiles")
@pytest.mark.parametrize("prompts", [20, 50])
def test_every_number_of_wins_has_the_interval_of_scipy(prompts):
    for wins in range(1, prompts):
        won = np.array([1.0] * wins + [0.0] * (prompts - wins))
        found = proportion_interval(torch.from_numpy(won))
        assert found == pytest.approx(reference_interval(won), abs=1e-9)


def test_a_prompt_counts_as_often_as_it_has_values():
    # 1, missing; 0, 0; 1, 1; 1, 0: 4 of 7, while the mean of the prompts' means is 2.5 / 4
    won = torch.tensor([[1.0, math.nan], [0.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    assert intervals.prompt_means(won).mean == pytest.approx(4 / 7)
    # Influences are the sums of the distances from 4/7, times 4 / 7 prompts per value.
    sums = np.array([3 / 7, -8 / 7, 6 / 7, -1 / 7]) * 4 / 7
    expected = intervals.share_interval(4 / 7, torch.from_numpy(sums), confidence=0.95)
    assert proportion_interval(won) == pytest.approx(expected)


def test_for_independent_outcomes_the_interval_is_that_of_wilson():
    # 60 of 100 won, in one completion each: the variance of the prompt means is 100 / 99 times 0.24
    # with 99 degrees of freedom: (100 / 99) ** 0.99; Student's quantile is 1.9842
    low, high = proportion_interval(torch.tensor([1.0] * 60 + [0.0] * 40))
    size = 100 / (100 / 99) ** 0.99
    expected = binomtest(60, 100).proportion_ci(2 * norm.cdf(1.984217) - 1, method="wilson")
    assert size == pytest.approx(99, abs=0.02)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-3)


def test_swapping_policy_and_baseline_mirrors_the_interval():
    for won in (binary(20, 3, 0.97, 0.3)(1), binary(20, 3, 0.6, 0.3)(1), torch.ones(9, 2)):
        low, high = proportion_interval(won)
        assert proportion_interval(1 - won) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_values_outside_0_to_1_have_no_proportion():
    with pytest.raises(ValueError, match=r"in \[0, 1\], found -1 to 2"):
        proportion_interval(torch.tensor([-1.0, 2.0]))


# --- coverage ---


def binomial_coverage(prompts: int, rate: float) -> float:
    """Exact coverage with one completion per prompt and without ties."""
    covered = 0.0
    for wins in range(prompts + 1):
        low, high = proportion_interval(torch.tensor([1.0] * wins + [0.0] * (prompts - wins)))
        covered += binom(prompts, rate).pmf(wins) * (low <= rate <= high)
    return covered


@pytest.mark.usefixtures("_cached_quantiles")
@pytest.mark.parametrize("rate", [0.5, 0.8, 0.97])
@pytest.mark.parametrize("prompts", [20, 50])
def test_with_one_completion_per_prompt_the_coverage_is_93_to_97_where_that_is_possible(
    prompts, rate
):
    covered = binomial_coverage(prompts, rate)
    if (prompts, rate) == (20, 0.97):
        assert 0.97 < covered < 0.985
    else:
        assert 0.93 <= covered <= 0.97


def test_of_20_independent_outcomes_at_97_percent_no_interval_has_a_coverage_of_93_to_97():
    # An interval contains the rate for some numbers of wins and not for others; its coverage is the
    # sum of their chances. 20, 19, ... wins: 54.4, 33.6, 9.9, 1.8, 0.2 %. The 2^6 sums of those
    # with more than 2e-5 (the others add up to less) leave a gap: 90.2 and 97.9 %.
    chances = [binom(20, 0.97).pmf(20 - k) for k in range(6)]
    assert binom(20, 0.97).cdf(14) < 2e-5
    sums = [sum(part) for n in range(7) for part in itertools.combinations(chances, n)]
    assert not any(0.93 - 2e-5 <= total <= 0.97 for total in sums)


def ties_coverage(prompts: int, win: float, loss: float) -> float:
    """Exact coverage with one completion per prompt, which is mostly a tie."""
    covered, truth = 0.0, win + (1 - win - loss) / 2
    for wins, losses in itertools.product(range(prompts + 1), repeat=2):
        tied = prompts - wins - losses
        if tied >= 0:
            low, high = proportion_interval(
                torch.tensor([1.0] * wins + [0.0] * losses + [0.5] * tied)
            )
            chance = multinomial(prompts, [win, loss, 1 - win - loss]).pmf([wins, losses, tied])
            covered += chance * (low - 1e-12 <= truth <= high + 1e-12)
    return covered


@pytest.mark.usefixtures("_cached_quantiles")
def test_among_many_ties_the_interval_contains_the_true_rate():
    # 90 % ties: two of 20 prompts determine the variance, so the interval is wide; the bootstrap
    # contains the rate in fewer than 85 of 100 evaluations
    assert ties_coverage(20, win=0.06, loss=0.04) >= 0.93


@pytest.mark.usefixtures("_cached_quantiles")
@pytest.mark.parametrize("rate", [0.5, 0.97])
def test_a_few_simulated_evaluations_contain_the_rate(rate):
    # one standard error is sqrt(0.95 * 0.05 / 200) = 1.5 %
    assert contained(proportion_interval, binary(20, 4, rate, 0.3), rate, 200) >= 0.9


@pytest.mark.slow
@pytest.mark.usefixtures("_cached_quantiles")
@pytest.mark.parametrize("rate", [0.5, 0.8, 0.97])
@pytest.mark.parametrize("prompts", [20, 50, 200])
def test_clustered_evaluations_contain_the_rate_in_93_to_97_of_100(prompts, rate):
    # 4 completions per prompt, whose win rates have an intraclass correlation of 0.3
    covered = contained(proportion_interval, binary(prompts, 4, rate, 0.3), rate, 2000)
    assert 0.93 <= covered <= 0.97
