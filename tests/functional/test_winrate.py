"""Win rates against values by hand, closed forms, enumeration, SciPy and scikit-learn."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import binomtest, bootstrap, permutation_test, ttest_1samp
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from align.functional.intervals import bootstrap_interval, proportion_interval
from align.functional.length_control import length_controlled_win_rate
from align.functional.winrate import (
    missing_bounds,
    outcomes,
    paired_permutation_p_value,
    win_rate,
    win_rate_p_value,
)


def float64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- outcomes and win rate ---


def test_outcomes_by_hand():
    policy = torch.tensor([[2.0, 1.0, 0.0], [-1.0, 5.0, 5.0]])
    baseline = torch.tensor([[1.0, 1.0, 1.0], [-2.0, 5.0, 6.0]])
    compared = outcomes(policy, baseline)
    assert_close(compared, float64([[1.0, 0.5, 0.0], [1.0, 0.5, 0.0]]))
    # (1 + 1/2 + 0 + 1 + 1/2 + 0) / 6 = 3 / 6; without the ties, 2 / 6
    assert_close(win_rate(compared), float64(0.5))
    # the first prompt's first two columns: (1 + 1/2) / 2
    assert_close(win_rate(compared[:1, :2]), float64(0.75))


def test_swapping_policy_and_baseline_gives_one_minus_the_win_rate():
    a = torch.randint(4, (50, 3), generator=generator(0)).float()  # few levels: many ties
    b = torch.randint(5, (50, 3), generator=generator(1)).float()
    forward, backward = win_rate(outcomes(a, b)), win_rate(outcomes(b, a))
    assert_close(forward, 1 - backward)
    assert forward < 0.45  # b is higher on average: so the order of the arguments matters


def test_a_policy_against_itself_wins_half():
    scores = torch.randn(20, 3, generator=generator(0))
    assert_close(win_rate(outcomes(scores, scores)), float64(0.5))


def test_infinite_scores_are_compared():
    policy = torch.tensor([[math.inf, -math.inf, -math.inf]])
    baseline = torch.tensor([[0.0, 0.0, -math.inf]])
    assert_close(outcomes(policy, baseline), float64([[1.0, 0.0, 0.5]]))


def test_a_nan_score_gives_a_missing_outcome_which_statistics_leave_out():
    policy = torch.tensor([[1.0], [math.nan], [0.0], [0.0], [2.0]])
    compared = outcomes(policy, torch.tensor([[0.0], [0.0], [math.nan], [1.0], [2.0]]))
    assert compared.isnan().flatten().tolist() == [False, True, True, False, False]
    valid = float64([[1.0], [0.0], [0.5]])
    assert_close(win_rate(compared), float64(0.5))
    statistics = (bootstrap_interval, proportion_interval, paired_permutation_p_value)
    for statistic in (*statistics, win_rate_p_value):
        assert statistic(compared) == statistic(valid)
        with pytest.raises(ValueError, match="all 5 are NaN"):
            statistic(torch.full((5, 1), math.nan))
        with pytest.raises(ValueError, match="1 of 5 are infinite"):
            statistic(torch.tensor([0.0, 1.0, 1.0, 0.0, math.inf]))
    differences = float64([[3.0], [math.nan], [1.0], [-4.0], [2.0]])
    assert_close(
        length_controlled_win_rate(compared, differences),
        length_controlled_win_rate(valid, differences[[0, 3, 4]]),
    )


def test_missing_verdicts_are_all_lost_or_all_won_at_the_bounds():
    # 1 + 1/2 of 4 comparisons, one of them missing: 1.5 / 4 and 2.5 / 4; of the others 1.5 / 3
    won = torch.tensor([[1.0, 0.5], [0.0, math.nan]])
    assert missing_bounds(won) == pytest.approx((0.375, 0.625))
    assert_close(win_rate(won), float64(0.5))
    assert missing_bounds(won.nan_to_num(0.0)) == pytest.approx((0.375, 0.375))


def test_outcomes_of_reduced_precision_are_averaged_in_double():
    # bfloat16 has 8 significant bits: a running sum of ones would stop at 256
    won = torch.ones(10_001, 1, dtype=torch.bfloat16)
    won[0] = 0
    assert_close(win_rate(won), float64(10_000 / 10_001), rtol=0, atol=1e-15)


# --- the bootstrap ---


def test_bootstrap_of_three_prompts_by_enumeration():
    # The 27 resamples of (0, 0, 1) have means 0, 1/3, 2/3, 1 in 8, 12, 6, 1 of the cases, so
    # cumulated in 29.6, 74.1, 96.3 and 100 %. Quantiles: 1.5 %, 10 % and 20 % are 0, 40 % and 60 %
    # are 1/3, 80 % and 90 % are 2/3, 98.5 % is 1.
    values = torch.tensor([0.0, 0.0, 1.0])
    for confidence, low, high in (
        (0.97, 0, 1),
        (0.8, 0, 2 / 3),
        (0.6, 0, 2 / 3),
        (0.2, 1 / 3, 1 / 3),
    ):
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
        confidence_level=0.9,
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
    easy = rng.choice([-0.25, 0.25], (100, 1))
    first, second = (rng.random((100, 2)) < rate + easy for rate in (0.75, 0.55))
    return torch.from_numpy(first.astype(float) - second)


COVERAGE = [
    pytest.param(binary(100, 1, 0.5, 0.0), 0.5, id="100 prompts, even"),
    pytest.param(binary(100, 4, 0.8, 0.5), 0.8, id="100 prompts of 4 completions, 80 %"),
    pytest.param(binary(200, 4, 0.9, 0.3), 0.9, id="200 prompts of 4 completions, 90 %"),
    pytest.param(paired, 0.2, id="100 paired differences"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("evaluation", "truth"), COVERAGE)
def test_the_interval_contains_the_true_rate_in_93_to_97_of_100_evaluations(evaluation, truth):
    covered = 0
    for seed in range(2000):
        low, high = bootstrap_interval(evaluation(seed), resamples=500, seed=seed)
        covered += low - 1e-12 <= truth <= high + 1e-12
    # one standard error of the coverage itself is sqrt(0.95 * 0.05 / 2000) = 0.5 %
    assert 0.93 <= covered / 2000 <= 0.97


@pytest.mark.slow
def test_an_interval_that_ignores_clusters_contains_the_true_rate_too_rarely():
    evaluation = binary(100, 8, 0.7, 0.5)
    covered = 0
    for seed in range(300):
        low, high = bootstrap_interval(evaluation(seed).reshape(-1), resamples=200, seed=seed)
        covered += low <= 0.7 <= high
    # a mean of 8 with correlation 0.5 has (1 + 7 * 0.5) = 4.5 times the variance assumed: |z| <
    # 1.96 / 2.12 in 64 %
    assert covered / 300 == pytest.approx(0.64, abs=0.09)


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize(
    "statistic", [bootstrap_interval, paired_permutation_p_value, win_rate_p_value]
)
def test_memory_does_not_grow_with_the_resamples(statistic):
    values = torch.randn(10_000, generator=generator(0))
    with Largest() as largest:
        statistic(values, resamples=1000)
    assert 10_000 <= largest.elements <= 2**20  # all at once would be 10 million


# --- length control ---


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def two_lengths(p_longer: float, p_shorter: float, shorter: int = 1) -> tuple[Tensor, Tensor]:
    """Win rates and lengths: ten cases 30 tokens longer, ``10 * shorter`` 30 tokens shorter."""
    won = [p_longer] * 10 + [p_shorter] * 10 * shorter
    return float64(won), float64([30.0] * 10 + [-30.0] * 10 * shorter)


def test_length_control_by_hand():
    # Two lengths, two parameters: the fit is exact, quality + bias * t = logit(0.8) = log 4 and
    # quality - bias * t = logit(0.5) = 0, so quality = log(4) / 2 = log 2 and sigmoid(log 2) = 2/3.
    # Raw: 0.65.
    won, differences = two_lengths(0.8, 0.5)
    assert_close(win_rate(won), float64(0.65))
    assert_close(length_controlled_win_rate(won, differences, ridge=1e-9), float64(2 / 3))


def test_length_control_does_not_depend_on_how_often_each_length_occurs():
    # Three times as many shorter completions: the raw rate moves to (8 + 15) / 40, the exact fit
    # does not.
    won, differences = two_lengths(0.8, 0.5, shorter=3)
    assert_close(win_rate(won), float64(0.575))
    # |t| is the same for both lengths: 30 / std
    assert_close(length_controlled_win_rate(won, differences, ridge=1e-9), float64(2 / 3))


def test_length_control_recovers_the_quality_from_the_model_it_assumes():
    lengths = np.random.default_rng(0).normal(40, 100, 50).round()
    regressor = np.tanh(lengths / np.std(lengths, ddof=1))
    won = 1 / (1 + np.exp(-(logit(0.6) + 1.7 * regressor)))
    controlled = length_controlled_win_rate(float64(won), float64(lengths), ridge=1e-9)
    assert_close(controlled, float64(0.6))
    assert win_rate(float64(won)) > 0.68


@pytest.mark.parametrize("ridge", [0.01, 3.0, 300.0])
def test_length_control_agrees_with_scikit_learn(ridge):
    rng = np.random.default_rng(1)
    lengths = rng.normal(20, 80, (60, 2))
    lengths[:5] = 0
    won = rng.choice([0.0, 0.25, 0.5, 1.0], (60, 2)) * (rng.random((60, 2)) < 0.4 + 0.002 * lengths)
    regressor = np.tanh(lengths / lengths.std(ddof=1)).reshape(-1, 1)
    design = np.hstack([np.ones_like(regressor), regressor])
    # a fractional outcome is a win with its weight and a loss with the rest
    model = LogisticRegression(C=1 / ridge, fit_intercept=False, tol=1e-12, max_iter=10_000)
    model.fit(
        np.vstack([design, design]),
        np.repeat([1, 0], won.size),
        sample_weight=np.concatenate([won.reshape(-1), 1 - won.reshape(-1)]),
    )
    expected = model.predict_proba([[1.0, 0.0]])[0, 1]
    controlled = length_controlled_win_rate(float64(won), float64(lengths), ridge=ridge)
    assert_close(controlled, float64(expected), rtol=0, atol=1e-6)


def test_a_win_rate_due_to_length_alone_becomes_one_half():
    rng = np.random.default_rng(2)
    lengths = rng.normal(60, 50, 4000)
    judged = rng.random(4000) < 1 / (1 + np.exp(-2.0 * np.tanh(lengths / lengths.std())))
    won, differences = float64(judged.astype(float)), float64(lengths)
    assert win_rate(won) > 0.7
    assert float(length_controlled_win_rate(won, differences)) == pytest.approx(0.5, abs=0.05)


def test_swapping_the_policies_gives_one_minus_the_length_controlled_win_rate():
    rng = np.random.default_rng(3)
    won = float64(rng.choice([0.0, 0.5, 1.0], (40, 3), p=[0.2, 0.2, 0.6]))
    differences = float64(rng.normal(10, 30, (40, 3)))
    forward = length_controlled_win_rate(won, differences)
    assert_close(forward, 1 - length_controlled_win_rate(1 - won, -differences))
    assert forward > 0.55


def test_without_length_differences_the_win_rate_does_not_change():
    won = torch.tensor([[1.0, 1.0], [1.0, 0.5]])
    assert_close(length_controlled_win_rate(won, torch.zeros(2, 2)), float64(0.875), rtol=0, atol=0)
    assert_close(length_controlled_win_rate(torch.ones(3), torch.zeros(3)), float64(1.0))


def test_length_control_does_not_depend_on_the_unit_of_length():
    won = torch.rand(30, generator=generator(0))
    differences = torch.randn(30, generator=generator(1))
    assert_close(
        length_controlled_win_rate(won, differences),
        length_controlled_win_rate(won, 4 * differences),
    )


def test_a_policy_that_always_wins_stays_slightly_below_one():
    # The lengths are symmetric, so the bias is 0 and quality q solves
    # 100 * sigmoid(-q) = ridge * q.
    differences = torch.tensor([-5.0, 5.0]).repeat(50)
    quality = brentq(lambda q: 100 / (1 + math.exp(q)) - 0.01 * q, 0, 50)
    controlled = length_controlled_win_rate(torch.ones(100), differences, ridge=0.01)
    assert_close(controlled, float64(1 / (1 + math.exp(-quality))))
    assert 0.999 < controlled < 1


@pytest.mark.parametrize("ridge", [1.0, 1e-2, 1e-8])
def test_length_control_converges_where_length_separates_wins_from_losses(ridge):
    differences = torch.linspace(-50, 50, 100)
    controlled = length_controlled_win_rate((differences > 0).float(), differences, ridge=ridge)
    assert_close(controlled, float64(0.5))


@pytest.mark.parametrize("lengths", [[7.0, 7.0], [7.0], [1000.0, 1000.0, 1000.001]])
def test_lengths_that_all_differ_by_the_same_amount_are_refused(lengths):
    with pytest.raises(ValueError, match=r"cannot separate length from quality, found (7|1000) to"):
        length_controlled_win_rate(torch.ones(len(lengths)), float64(lengths))


@pytest.mark.parametrize("won", [[12.0, 0.0], [1.0, -3.0]])
def test_outcomes_outside_0_to_1_are_refused(won):
    with pytest.raises(ValueError, match=r"expected 0 to 1, found (0 to 12|-3 to 1)"):
        length_controlled_win_rate(torch.tensor(won), torch.tensor([1.0, 0.0]))


# --- the permutation test ---


def test_a_p_value_by_hand():
    # All five differences are positive: of 2^5 = 32 flips only the observed one and its mirror are
    # as extreme.
    p_value = paired_permutation_p_value(torch.tensor([0.1, 0.4, 0.2, 1.0, 0.3]))
    assert_close(p_value, float64(2 / 32))
    # prompts without a difference change nothing: still exact with 25 prompts
    padded = torch.cat([torch.tensor([0.1, 0.4, 0.2, 1.0, 0.3]), torch.zeros(20)])
    assert_close(paired_permutation_p_value(padded), float64(2 / 32))


def test_a_p_value_by_enumeration_treats_sums_that_differ_by_round_off_as_equal():
    # thirds: 1/3 + 1/3 - 2/3 and the like differ from 0 by round-off only; zeros stay in the brute
    # force
    thirds = [1, 1, -2, 3, 0, 2, 0, 2, 1]
    flips = [
        abs(sum(sign * third for sign, third in zip(signs, thirds, strict=True)))
        for signs in itertools.product([1, -1], repeat=len(thirds))
    ]
    expected = sum(flip >= abs(sum(thirds)) for flip in flips) / len(flips)
    assert_close(paired_permutation_p_value(float64(thirds) / 3), float64(expected))
    assert_close(paired_permutation_p_value(-float64(thirds) / 3), float64(expected))


@pytest.mark.parametrize("prompts", [6, 14])
def test_an_exact_p_value_agrees_with_scipy(prompts):
    differences = np.random.default_rng(5).normal(0.3, 1, prompts)
    expected = permutation_test(
        (differences,),
        lambda x, axis: np.abs(np.sum(x, axis=axis)),
        permutation_type="samples",
        alternative="greater",
        n_resamples=np.inf,
        vectorized=True,
    ).pvalue
    assert_close(paired_permutation_p_value(float64(differences)), float64(expected))


def test_a_sampled_p_value_agrees_with_the_binomial_one():
    # Differences of +1 and -1 only: the sign test. 22 against 10 of 32.
    differences = torch.tensor([1.0] * 22 + [-1.0] * 10)
    expected = binomtest(22, 32).pvalue
    noise = math.sqrt(expected * (1 - expected) / 2**14)
    assert float(paired_permutation_p_value(differences)) == pytest.approx(expected, abs=4 * noise)


def test_completions_of_one_prompt_flip_together():
    # Means 1, 1, 2, 3: the observed flip and its mirror out of 2^4. If completions flipped
    # independently: 2 out of 2^8.
    differences = torch.tensor([[0.5, 1.5], [1.0, 1.0], [2.0, 2.0], [1.0, 5.0]])
    assert_close(paired_permutation_p_value(differences), float64(2 / 16))


def test_exact_and_sampled_p_values_agree_at_the_switch():
    differences = torch.randn(14, generator=generator(6)) + 0.4
    exact = float(paired_permutation_p_value(differences, resamples=2**14))
    drawn = float(paired_permutation_p_value(differences, resamples=2**14 - 1))
    assert exact * 2**14 == pytest.approx(round(exact * 2**14), abs=1e-9)
    assert drawn != exact
    assert drawn == pytest.approx(exact, abs=4 * math.sqrt(exact / 2**14))


def test_equal_policies_have_a_p_value_of_one():
    assert_close(paired_permutation_p_value(torch.zeros(30)), float64(1.0))


def test_a_sampled_p_value_is_never_zero():
    # all of 50 positive: 2 of 2^50 flips are as extreme, none is drawn, and the observed one
    # counts: 1 / (999 + 1)
    assert_close(paired_permutation_p_value(torch.ones(50), resamples=999), float64(1 / 1000))


def test_a_p_value_depends_on_its_seed_alone():
    differences = torch.randn(30, generator=generator(0))
    state = torch.random.get_rng_state()
    first = paired_permutation_p_value(differences, seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    assert paired_permutation_p_value(differences, seed=1) == first
    assert paired_permutation_p_value(differences, seed=2) != first


# --- intervals of proportions ---


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


def test_where_enough_prompts_differ_the_interval_is_the_bootstrap():
    for values in (torch.tensor([1.0] * 50 + [0.0] * 5), torch.tensor([1.0, 0.0, 0.5, 1.0] * 3)):
        assert proportion_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    one_win = torch.tensor([0.5] * 19 + [1.0])
    wide, narrow = proportion_interval(one_win), bootstrap_interval(one_win)
    assert narrow == pytest.approx((0.5, 0.575), abs=0.001)
    # 0.525 * 0.8316, and as far below 1 as 0.475 * 0.8316
    assert wide == pytest.approx((0.4366, 0.6050), abs=1e-4)


def ties(prompts: int) -> Callable[[int], Tensor]:
    """Evaluations of one completion with 6 % wins, 4 % losses and 90 % ties: a rate of 51 %."""

    def evaluation(seed: int) -> Tensor:
        rng = np.random.default_rng([seed, 2])
        return torch.from_numpy(rng.choice([1.0, 0.5, 0.0], (prompts, 1), p=[0.06, 0.9, 0.04]))

    return evaluation


@pytest.mark.parametrize("prompts", [20, 50])
def test_among_many_ties_the_interval_contains_the_true_rate(prompts):
    evaluation, covered = ties(prompts), {bootstrap_interval: 0, proportion_interval: 0}
    for seed in range(300):
        for interval in covered:
            low, high = interval(evaluation(seed), resamples=200, seed=seed)
            covered[interval] += low - 1e-12 <= 0.51 <= high + 1e-12
    # one standard error is sqrt(0.95 * 0.05 / 300) = 1.3 %
    assert covered[proportion_interval] / 300 >= 0.93
    if prompts == 20:
        assert covered[bootstrap_interval] / 300 <= 0.85


# --- the p-value of a win rate ---


def test_where_all_prompts_are_won_the_p_value_is_that_of_the_sign_test():
    for prompts in (1, 4, 12):
        expected = binomtest(prompts, prompts).pvalue
        assert_close(win_rate_p_value(torch.ones(prompts, 2)), float64(expected))
        assert_close(win_rate_p_value(torch.zeros(prompts, 2)), float64(expected))
    assert float(win_rate_p_value(torch.ones(500), resamples=999)) == 2 / 1000  # never 0


def test_ties_alone_have_a_p_value_of_one():
    assert_close(win_rate_p_value(torch.full((30, 2), 0.5)), float64(1.0))
    assert_close(win_rate_p_value(torch.tensor([[1.0, 0.0]] * 30)), float64(1.0))


def test_swapping_the_policies_leaves_the_p_value_about_equal():
    won = torch.rand(40, 2, generator=generator(0)) ** 0.8
    forward, backward = float(win_rate_p_value(won)), float(win_rate_p_value(1 - won))
    assert forward == pytest.approx(backward, abs=0.02)
    assert 0.02 < forward < 0.5


def test_with_many_prompts_the_p_value_is_that_of_the_t_test():
    won = torch.rand(400, generator=generator(1), dtype=torch.float64) + 0.03
    expected = ttest_1samp(won.numpy(), 0.5).pvalue
    assert 0.005 < expected < 0.2
    assert float(win_rate_p_value(won)) == pytest.approx(expected, abs=0.01)


def test_the_interval_and_the_p_value_agree_where_nearly_all_prompts_agree():
    # rate 0.55 in each of 20 prompts: 2 * (0.5 / 0.55)^20; the interval excludes 0.5 at that level
    won = torch.full((20, 1), 0.55, dtype=torch.float64)
    p_value = float(win_rate_p_value(won))
    assert p_value == pytest.approx(2 * (0.5 / 0.55) ** 20)
    for factor, excludes in ((1.02, True), (0.98, False)):
        low, _ = proportion_interval(won, confidence=1 - factor * p_value)
        assert (low > 0.5) == excludes


SKEWED = {
    "one loss for five narrow wins": ([0.6, 0.0], [5 / 6, 1 / 6]),
    "one loss for ten narrower wins": ([0.55, 0.0], [10 / 11, 1 / 11]),
    "symmetric": ([0.0, 1 / 3, 2 / 3, 1.0], [0.2, 0.3, 0.3, 0.2]),
}


@pytest.mark.parametrize("case", SKEWED)
def test_of_equally_good_policies_at_most_one_p_value_in_twenty_is_below_a_twentieth(case):
    values, chances = SKEWED[case]
    low = {win_rate_p_value: 0, paired_permutation_p_value: 0}
    for seed in range(300):
        drawn = np.random.default_rng([seed, 3]).choice(values, 20, p=chances)
        won = torch.from_numpy(drawn)
        low[win_rate_p_value] += win_rate_p_value(won, resamples=400, seed=seed) < 0.05
        low[paired_permutation_p_value] += (
            paired_permutation_p_value(won - 0.5, resamples=400, seed=seed) < 0.05
        )
    # one standard error is sqrt(0.05 * 0.95 / 300) = 1.3 %
    assert low[win_rate_p_value] / 300 <= 0.075
    if case != "symmetric":
        assert low[paired_permutation_p_value] / 300 > 0.1, "sign flips assume symmetry"
