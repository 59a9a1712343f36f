"""The judge card: bias, consistency and agreement of each judge, on the evaluation itself.

All figures are computed from the comparisons of the policies with the baseline. Left out are the
control, which compares equal policies, and equal completions, about which no judge decides.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch
from jaxtyping import Float
from torch import Tensor

from align.config.evaluate import Evaluate
from align.evaluation.completions import Samples, control_name, length_differences
from align.evaluation.judging import Outcomes
from align.evaluation.results import Agreement, Estimate, Interval, JudgeCard
from align.functional import agreement, intervals
from align.judges.base import PairJudge
from align.judges.build import Judge


def judge_cards(
    config: Evaluate,
    judges: Mapping[str, Judge],
    outcomes: Sequence[Outcomes],
    samples: Mapping[str, Samples],
) -> tuple[JudgeCard, ...]:
    """The card of every judge with a verdict, in the order of the recipe."""
    cards = []
    for name, judge in judges.items():
        of_judge = [
            each
            for each in _without_control(config, outcomes)
            if each.judge == name and not bool(each.decided.isnan().all())
        ]
        if of_judge:
            cards.append(judge_card(config, judge, of_judge, samples))
    return tuple(cards)


def judge_card(
    config: Evaluate, judge: Judge, outcomes: Sequence[Outcomes], samples: Mapping[str, Samples]
) -> JudgeCard:
    """The card of one judge from its outcomes."""
    compared = outcomes
    won = _side_by_side([each.decided for each in compared])
    lengths = _side_by_side(
        [
            length_differences(samples[e.policy], samples[e.baseline], config.n_completions)
            for e in compared
        ]
    )
    level = config.confidence
    position_bias = consistency = None
    if compared[0].first is not None:
        first = _side_by_side([each.first for each in compared if each.first is not None])
        second = _side_by_side([each.second for each in compared if each.second is not None])
        position_bias = agreement.position_bias(first, second, confidence=level)
        consistency = agreement.consistency(first, second, confidence=level)
    repeats = _agreement_of_votes(compared, level)
    covers_all = compared[0].covers_all
    usage = judge.usage if isinstance(judge, PairJudge) else None
    return JudgeCard(
        judge=compared[0].judge,
        n_pairs=int((~won.isnan()).sum()),
        invalid=sum(int(each.is_missing.sum()) for each in compared),
        length_bias=estimate(agreement.length_bias(won, lengths, confidence=level)),
        position_bias=estimate(position_bias),
        consistency=estimate(consistency),
        self_agreement=repeats if covers_all else None,
        annotator_agreement=None if covers_all else repeats,
        detectable_difference=max(_detectable_difference(each, level) for each in compared),
        usage=None if usage is None else asdict(usage),
    )


def _agreement_of_votes(compared: Sequence[Outcomes], confidence: float) -> Estimate | None:
    """Agreement of several verdicts about one pair in one order; None without any."""
    votes = [each.votes for each in compared if each.votes is not None]
    if not votes:
        return None
    most = max(each.shape[-1] for each in votes)
    padded = [
        torch.nn.functional.pad(each, (0, most - each.shape[-1]), value=math.nan) for each in votes
    ]
    return estimate(agreement.self_agreement(torch.cat(padded, dim=1), confidence=confidence))


def _detectable_difference(outcomes: Outcomes, confidence: float) -> float:
    """What the evaluation detects with the deviation of the outcomes of one policy."""
    means = intervals.prompt_means(outcomes.outcomes).means
    deviation = float(means.std()) if len(means) > 1 else 0.5
    return agreement.detectable_difference(len(means), deviation=deviation, confidence=confidence)


def agreements(config: Evaluate, outcomes: Sequence[Outcomes]) -> tuple[Agreement, ...]:
    """Agreement of each two judges about the same pairs."""
    by_judge: dict[str, list[Outcomes]] = {}
    for each in outcomes:
        by_judge.setdefault(each.judge, []).append(each)
    stacked = {
        name: _side_by_side([each.decided for each in _without_control(config, of_judge)])
        for name, of_judge in by_judge.items()
    }
    results = []
    for (name, first), (other, second) in itertools.combinations(stacked.items(), 2):
        both = ~first.isnan() & ~second.isnan()
        if not bool(both.any()):
            continue
        same = agreement.decisions(first[both]) == agreement.decisions(second[both])
        kappa = agreement.cohen_kappa(
            first,
            second,
            confidence=config.confidence,
        )
        results.append(
            Agreement(
                first=name,
                second=other,
                n_pairs=int(both.sum()),
                same=same.double().mean().item(),
                kappa=None if math.isnan(kappa.value) else estimate(kappa),
            )
        )
    return tuple(results)


def estimate(value: intervals.Estimate | None) -> Estimate | None:
    """An estimate as results store it."""
    return None if value is None else Estimate(value.value, Interval(*value.interval))


def _without_control(config: Evaluate, outcomes: Sequence[Outcomes]) -> list[Outcomes]:
    """The comparisons of policies; only the control, if nothing else is compared."""
    policies = [each for each in outcomes if each.policy != control_name(config)]
    return policies or list(outcomes)


def _side_by_side(
    values: Sequence[Float[Tensor, "prompts columns"]],
) -> Float[Tensor, "prompts columns"]:
    """The comparisons of several policies in one row per prompt, which is one cluster."""
    return torch.cat(list(values), dim=1)
