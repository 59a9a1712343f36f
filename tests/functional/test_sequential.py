"""The test for decline: against explicit gamblers, all sequences of a fair coin, and simulation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from align.functional import sequential
from align.functional.intervals import proportion_interval
from align.functional.sequential import BETS, decline_e_values

ALPHA = 0.05


def gamblers(checks: Sequence[Sequence[float]], planned: int) -> list[float]:
    """The mean wealth after each check, by following every gambler through every comparison."""
    wealth = {(entry, bet): 1.0 for entry in range(planned) for bet in BETS}
    means = []
    for check, outcomes in enumerate(checks):
        for entry, bet in wealth:
            if entry <= check:
                for outcome in outcomes:
                    wealth[entry, bet] *= 1 + bet * (1 - 2 * outcome)
        means.append(sum(wealth.values()) / len(wealth))
    return means


@pytest.mark.parametrize("planned", [3, 7], ids=["all planned checks made", "four left"])
def test_the_e_value_is_the_mean_wealth_of_the_gamblers(planned: int):
    checks = [[1.0, 0.5, 0.0, 1.0], [0.0, 0.25, 0.5, 0.0], [0.0, 0.0, 1.0, 0.0]]
    expected = torch.tensor(gamblers(checks, planned), dtype=torch.float64)
    assert_close(decline_e_values(torch.tensor(checks), planned=planned), expected)


def test_a_missing_outcome_changes_nothing():
    outcomes = torch.tensor([[0.0, math.nan, 1.0], [math.nan, 0.0, 0.0]])
    expected = torch.tensor(gamblers([[0.0, 1.0], [0.0, 0.0]], 2), dtype=torch.float64)
    assert_close(decline_e_values(outcomes, planned=2), expected)


def test_the_e_value_of_very_many_losses_is_large_and_finite():
    # 1.8^2000 is 10^510; after as many wins, the wealth is 0 up to rounding, and not NaN
    outcomes = torch.stack([torch.zeros(2000), torch.ones(2000), torch.zeros(2000)])
    first, second, third = decline_e_values(outcomes, planned=3).tolist()
    assert 1e100 < first < math.inf
    assert second < first
    assert 1e100 < third < math.inf


def test_under_a_fair_coin_the_expected_e_value_is_1_and_large_ones_are_rare():
    # All 2^12 sequences of three checks with four comparisons; Ville: P(max >= c) <= 1 / c
    sequences = torch.tensor(list(itertools.product([0.0, 1.0], repeat=12))).view(-1, 3, 4)
    e_values = decline_e_values(sequences, planned=3)
    assert_close(e_values.mean(0), torch.ones(3, dtype=torch.float64))
    for level in (2.0, 5.0, 20.0):
        assert 0 < (e_values.max(1).values >= level).double().mean() <= 1 / level


def simulated(rates: Tensor, *, runs: int, comparisons: int = 128, ties: float = 0.2) -> Tensor:
    """Outcomes of simulated runs ``[runs, checks, comparisons]``, for a win rate in each check."""
    generator = torch.Generator().manual_seed(0)
    shape = runs, len(rates), comparisons
    wins = (torch.rand(shape, generator=generator) < rates[None, :, None]).double()
    tied = torch.rand(shape, generator=generator) < ties
    return wins.masked_fill(tied, 0.5)


def stopped(outcomes: Tensor) -> Tensor:
    """Whether the e-value of each run ever reaches 1 / alpha, as 0 or 1."""
    e_values = decline_e_values(outcomes, planned=outcomes.shape[-2])
    return (e_values.max(-1).values >= 1 / ALPHA).double()


@pytest.mark.parametrize(
    "rates",
    [
        pytest.param(torch.full((12,), 0.5), id="never learns"),
        pytest.param(torch.linspace(0.9, 0.5, 12), id="learns ever less"),
    ],
)
def test_healthy_runs_are_stopped_at_most_as_often_as_stated(rates: Tensor):
    interval = proportion_interval(stopped(simulated(rates, runs=1000))[:, None])
    assert interval.high <= ALPHA


def test_the_simulation_finds_a_rule_that_stops_too_often():
    # A test of level ALPHA for a single look, repeated after each check
    outcomes = simulated(torch.full((12,), 0.5), runs=1000)
    means, deviations = outcomes.mean(2), outcomes.std(2) / math.sqrt(outcomes.shape[2])
    alarms = ((means - 0.5) / deviations < -1.645).any(1).double()
    assert proportion_interval(alarms[:, None]).low > ALPHA


@pytest.mark.parametrize(
    ("rates", "at_least"),
    [
        pytest.param([0.5] * 9 + [0.3] * 3, 0.95, id="a clear decline at the end"),
        pytest.param([0.8] * 6 + [0.4] * 6, 0.9, id="a slow decline after long progress"),
    ],
)
def test_declines_are_found(rates: list[float], at_least: float):
    assert float(stopped(simulated(torch.tensor(rates), runs=1000)).mean()) >= at_least


def test_an_incumbent_that_is_chosen_by_earlier_checks_keeps_the_false_alarm_rate():
    # Equal policies: the mean outcome is 1/2, whatever happened. How far outcomes spread depends on
    # who won the last check, as it does where the winner becomes the incumbent.
    generator, runs = torch.Generator().manual_seed(1), 4000
    checks, scale = [], torch.full((runs, 1), 0.5)
    for _ in range(8):
        noise = 2 * torch.rand(runs, 32, generator=generator) - 1
        checks.append(0.5 + scale * noise)
        scale = torch.where(noise.mean(1, keepdim=True) > 0, 0.5, 0.1)  # of the next check
    alarms = stopped(torch.stack(checks, dim=1))
    assert proportion_interval(alarms[:, None]).high <= ALPHA


@pytest.mark.parametrize(
    ("outcomes", "message"),
    [
        pytest.param([[0.5], [1.5]], r"in \[0, 1\]", id="no outcome"),
        pytest.param([[0.5], [0.5], [0.5]], "3 checks, more than the 2", id="too many checks"),
    ],
)
def test_wrong_arguments_are_refused(outcomes: list[list[float]], message: str):
    with pytest.raises(ValueError, match=message):
        sequential.decline_e_values(torch.tensor(outcomes), planned=2)


def test_without_checks_there_is_no_e_value():
    assert decline_e_values(torch.zeros(0, 4), planned=3).shape == (0,)
