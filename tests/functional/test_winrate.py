"""Win rates against values by hand, closed forms, enumeration, SciPy and scikit-learn."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, permutation_test, ttest_1samp
from torch import Tensor
from torch.testing import assert_close

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


# --- the p-value of a win rate ---


def test_where_all_prompts_are_won_the_p_value_is_that_of_the_sign_test():
    for prompts in (1, 4, 12):
        expected = binomtest(prompts, prompts).pvalue
        assert_close(win_rate_p_value(torch.ones(prompts, 2)), float64(expected))
        assert_close(win_rate_p_value(torch.zeros(prompts, 2)), float64(expected))
    assert float(win_rate_p_value(torch.ones(500))) == 1e-12  # never 0


def test_ties_alone_have_a_p_value_of_one():
    assert_close(win_rate_p_value(torch.full((30, 2), 0.5)), float64(1.0))
    assert_close(win_rate_p_value(torch.tensor([[1.0, 0.0]] * 30)), float64(1.0))


def test_swapping_the_policies_leaves_the_p_value():
    won = torch.rand(40, 2, generator=generator(0)) ** 0.8
    assert_close(win_rate_p_value(won), win_rate_p_value(1 - won), rtol=1e-5, atol=0)
    assert 0.02 < float(win_rate_p_value(won)) < 0.5


def test_with_many_prompts_the_p_value_is_that_of_the_t_test():
    won = torch.rand(400, generator=generator(1), dtype=torch.float64) * 0.97 + 0.03
    expected = ttest_1samp(won.numpy(), 0.5).pvalue
    assert 0.005 < expected < 0.2
    assert float(win_rate_p_value(won)) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(("won", "prompts"), [(11, 20), (13, 16), (30, 40), (120, 200)])
def test_of_independent_outcomes_the_p_value_is_near_that_of_the_binomial_test(won, prompts):
    """Wilson's interval is the inversion of the score test, without the discrete distribution."""
    outcomes = torch.cat([torch.ones(won), torch.zeros(prompts - won)])
    exact = binomtest(won, prompts).pvalue
    assert float(win_rate_p_value(outcomes)) == pytest.approx(exact, rel=0.6)


@pytest.mark.parametrize("seed", range(8))
def test_the_interval_excludes_one_half_where_the_p_value_is_below_its_level(seed):
    draws = np.random.default_rng(seed).binomial(4, [[0.6]] * 25, (25, 2)) / 4
    won = torch.from_numpy(draws)
    p_value = float(win_rate_p_value(won))
    for factor, excludes in ((1.02, True), (0.98, False)):
        low, high = proportion_interval(won, confidence=1 - factor * p_value)
        assert (not low <= 0.5 <= high) == excludes


def test_the_interval_and_the_p_value_agree_where_all_prompts_agree():
    # rate 0.55 in each of 20 prompts: 2 * (0.5 / 0.55)^20
    won = torch.full((20, 1), 0.55, dtype=torch.float64)
    assert float(win_rate_p_value(won)) == pytest.approx(2 * (0.5 / 0.55) ** 20)


SKEWED = {
    "one loss for five narrow wins": ([0.6, 0.0], [5 / 6, 1 / 6]),
    "one loss for ten narrower wins": ([0.55, 0.0], [10 / 11, 1 / 11]),
    "symmetric": ([0.0, 1 / 3, 2 / 3, 1.0], [0.2, 0.3, 0.3, 0.2]),
}


@pytest.mark.parametrize("case", SKEWED)
def test_of_equally_good_policies_at_most_one_p_value_in_twenty_is_below_a_twentieth(case):
    values, chances = SKEWED[case]
    by_interval = by_signs = 0
    for seed in range(300):
        drawn = np.random.default_rng([seed, 3]).choice(values, 20, p=chances)
        won = torch.from_numpy(drawn)
        low, high = proportion_interval(won)  # excludes one half where the p-value is below 0.05
        by_interval += not low <= 0.5 <= high
        if case != "symmetric":
            by_signs += paired_permutation_p_value(won - 0.5, resamples=400, seed=seed) < 0.05
    # one standard error is sqrt(0.05 * 0.95 / 300) = 1.3 %
    assert by_interval / 300 <= 0.075
    if case != "symmetric":
        assert by_signs / 300 > 0.1, "sign flips assume symmetry"
