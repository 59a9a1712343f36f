"""Several judges and several policies: the mean over judges, rankings, correction by people.

People decide about some pairs only. They are no part of the panel; where they labeled some prompts,
the win rate of every other judge is corrected by their labels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from align.config.evaluate import Evaluate
from align.config.judges import PANEL
from align.evaluation.completions import Samples, control_name, length_differences
from align.evaluation.judging import Outcomes
from align.evaluation.results import Comparison, Estimate, Interval, Ranking
from align.evaluation.scores import length_controlled_rates
from align.functional import bradley_terry, winrate
from align.functional.distributions import normal_quantile
from align.functional.prediction_powered import prediction_powered_mean
from align.judges.preferences import panel_mean


def panel(outcomes: Sequence[Outcomes]) -> list[Outcomes]:
    """The mean over all judges but people, where every judge has a verdict."""
    judges = list(dict.fromkeys(each.judge for each in outcomes if each.covers_all))
    if len(judges) < 2:
        return []
    results = []
    for policy in dict.fromkeys(each.policy for each in outcomes):
        members = [each for each in outcomes if each.policy == policy and each.covers_all]
        results.append(
            Outcomes(
                judge=PANEL,
                policy=policy,
                baseline=members[0].baseline,
                outcomes=panel_mean([each.outcomes for each in members]),
                is_missing=torch.stack([each.is_missing for each in members]).any(dim=0),
                is_compared=members[0].is_compared,
                is_equal=members[0].is_equal,
            )
        )
    return results


def adjust_for_several(
    config: Evaluate,
    comparisons: Sequence[Comparison],
    outcomes: Sequence[Outcomes],
    samples: Mapping[str, Samples],
) -> list[Comparison]:
    """The comparisons of one judge with joint length control and Holm's p-values.

    With several policies, the difficulty of each completion of the baseline is estimated jointly.
    The control takes no part.
    """
    is_policy = [row.policy != control_name(config) for row in comparisons]
    policies = [row for row, each in zip(comparisons, is_policy, strict=True) if each]
    if not policies:
        return list(comparisons)
    adjusted = iter(bradley_terry.holm_adjusted([row.p_value for row in policies]))
    controlled = iter(
        _joint_length_control(
            config, [each for each, ok in zip(outcomes, is_policy, strict=True) if ok], samples
        )
        if len(policies) > 1
        else [policies[0].length_controlled_win_rate]
    )
    return [
        dataclasses.replace(
            row, adjusted_p_value=next(adjusted), length_controlled_win_rate=next(controlled)
        )
        if each
        else row
        for row, each in zip(comparisons, is_policy, strict=True)
    ]


def _joint_length_control(
    config: Evaluate, outcomes: Sequence[Outcomes], samples: Mapping[str, Samples]
) -> list[float | None]:
    won = torch.stack([each.outcomes.flatten() for each in outcomes])
    differences = torch.stack(
        [
            length_differences(
                samples[each.policy], samples[each.baseline], config.n_completions
            ).flatten()
            for each in outcomes
        ]
    )
    return length_controlled_rates(won, differences)


def rank(config: Evaluate, outcomes: Sequence[Outcomes]) -> Ranking | None:
    """The ranking of several policies by one judge; None for one, or if some are not connected.

    A judge that scores compares all policies with each other, a judge that compares only with the
    baseline.
    """
    compared = [each for each in outcomes if each.policy != control_name(config)]
    if len(compared) < 2:
        return None
    n = len(compared)
    table = torch.full((n + 1, n + 1, *compared[0].outcomes.shape), math.nan, dtype=torch.float64)
    for i, each in enumerate(compared):
        table[i, n], table[n, i] = each.outcomes, 1 - each.outcomes
        for j, other in enumerate(compared):
            if i != j and each.scores is not None and other.scores is not None:
                table[i, j] = winrate.outcomes(each.scores, other.scores)
    try:
        strengths = bradley_terry.bradley_terry_strengths(
            table,
            baseline=n,
            confidence=config.confidence,
        )
    except ValueError:
        return None  # people compared only some of the policies
    matrix = bradley_terry.win_matrix(table).tolist()
    return Ranking(
        judge=compared[0].judge,
        policies=(*(each.policy for each in compared), config.baseline),
        win_rates=tuple(
            tuple(None if math.isnan(rate) else rate for rate in row) for row in matrix
        ),
        strengths=tuple(
            Estimate(value, Interval(*interval))
            for value, interval in zip(strengths.values, strengths.intervals, strict=True)
        ),
    )


def pooled(people: Sequence[Outcomes]) -> dict[str, Outcomes]:
    """The mean decisions of all people, from several files, about each policy."""
    results = {}
    for policy in dict.fromkeys(each.policy for each in people):
        files = [each for each in people if each.policy == policy]
        mean = torch.stack([each.outcomes for each in files]).nanmean(dim=0)
        results[policy] = dataclasses.replace(files[0], outcomes=mean)
    return results


def correct(config: Evaluate, judged: Outcomes, people: Outcomes) -> Estimate | None:
    """The win rate by people, from their labels of some prompts and the judge's outcomes of all.

    People label a random sample of the prompts with different completions. Prompts whose
    completions are all equal are ties, and join in afterwards with their share of all prompts.
    None where people labeled fewer than two prompts, or all of them.
    """
    n_equal = judged.is_equal.sum(dim=1)
    n_different = judged.is_compared.sum(dim=1) - n_equal

    def by_prompt(decided: Tensor) -> Tensor:  # equal completions of a prompt count as ties
        return (0.5 * n_equal + decided.nanmean(dim=1) * n_different) / (n_equal + n_different)

    both = ~(people.decided.isnan() | judged.decided.isnan())
    labels = by_prompt(people.decided.masked_fill(~both, math.nan))
    labeled_by_judge = by_prompt(judged.decided.masked_fill(~both, math.nan))
    by_judge = by_prompt(judged.decided)
    labeled = ~labels.isnan()
    others = ~labeled & ~by_judge.isnan()
    if int(labeled.sum()) < 2 or not bool(others.any()):
        return None
    corrected = prediction_powered_mean(
        labels[labeled], labeled_by_judge[labeled], by_judge[others], confidence=config.confidence
    )
    n_ties = int(((n_equal > 0) & (n_different == 0)).sum())
    n_prompts = n_ties + int((n_different > 0).sum())
    return add_ties(
        Estimate(corrected.value, Interval(*corrected.interval)),
        share=n_ties / n_prompts,
        n_prompts=n_prompts,
        confidence=config.confidence,
    )


def add_ties(different: Estimate, *, share: float, n_prompts: int, confidence: float) -> Estimate:
    """The win rate with a ``share`` of ties, from that of all other comparisons.

    The share of ties among ``n_prompts`` prompts is an estimate too. Its deviation and each half of
    the interval are independent, and add in squares.

    Source: Zou and Donner 2008, Statistics in Medicine 27, 1693 to 1702.
    """
    value = 0.5 + (1 - share) * (different.value - 0.5)
    error = abs(different.value - 0.5) * math.sqrt(share * (1 - share) / n_prompts)
    error *= normal_quantile((1 + confidence) / 2)
    below, above = (
        math.hypot((1 - share) * (end - different.value), error) for end in different.ci
    )
    return Estimate(value, Interval(max(0.0, value - below), min(1.0, value + above)))
