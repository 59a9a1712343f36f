"""Outcomes: the decisions of a judge about the completions of a policy and of the baseline.

A judge that scores is called once for each completion. A judge that compares reads every pair in
both orders; the outcome is the mean of the two verdicts, so a flip is half a win. A pair without a
usable verdict in each order has no outcome: it is missing, not lost. Equal completions are a tie
that no judge decides: they count in win rates, and are no evidence about a judge.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from align.config.evaluate import Evaluate
from align.evaluation.completions import Samples, compared_names, matches
from align.functional import winrate
from align.judges.base import Pair, PairJudge, ScoreJudge
from align.judges.build import Judge
from align.judges.orders import decide
from align.judges.scores import score_rows
from align.models import tokenization
from align.runtime.progress import Logger

if TYPE_CHECKING:
    from align.data.rows import Row


@dataclass(frozen=True, slots=True)
class Outcomes:
    """Outcomes of a policy against the baseline by one judge; NaN where there is none."""

    judge: str
    policy: str
    baseline: str
    outcomes: Float[Tensor, "prompts completions"]
    """1 for a win of the policy, 0.5 for a tie, 0 for a loss, or a value between them."""
    is_missing: Bool[Tensor, "prompts completions"]
    """Whether the judge failed to give a usable verdict."""
    is_compared: Bool[Tensor, "prompts completions"]
    """Whether there is a pair; some sides have fewer completions."""
    is_equal: Bool[Tensor, "prompts completions"]
    """Whether both completions are equal: a tie by all judges that decide about all pairs."""
    scores: Float[Tensor, "prompts completions"] | None = None
    """Scores of the policy's completions, for a judge that scores."""
    baseline_scores: Float[Tensor, "prompts completions"] | None = None
    first: Float[Tensor, "prompts completions"] | None = None
    """Preference for the policy where its completion is read first, for a judge that compares."""
    second: Float[Tensor, "prompts completions"] | None = None
    """Preference for the policy where its completion is read second."""
    votes: Float[Tensor, "prompts completions orders votes"] | None = None
    """Repeated verdicts, in favor of the policy."""
    criteria: Mapping[str, Float[Tensor, "prompts completions"]] | None = None
    """Preference for the policy by each criterion of a rubric."""
    covers_all: bool = True
    """Whether the judge decides about all pairs; False for people, who label some."""
    reasons: Mapping[tuple[int, int], str] | None = None
    """Reasons of the judge by prompt and column."""

    @property
    def decided(self) -> Float[Tensor, "prompts completions"]:
        """The outcomes of pairs with different completions; NaN for all others."""
        return self.outcomes.masked_fill(self.is_equal, math.nan)


def judge_all(
    config: Evaluate,
    judges: Mapping[str, Judge],
    prompts: Sequence[Row],
    samples: Mapping[str, Samples],
    logger: Logger,
) -> list[Outcomes]:
    """Outcomes of every judge about every policy, the control last."""
    results = []
    for name, judge in judges.items():
        if isinstance(judge, ScoreJudge):
            scores = {
                policy: _score(judge, prompts, each, config, logger)
                for policy, each in samples.items()
            }
            for policy in compared_names(config):
                results.append(_from_scores(name, policy, config, samples, scores))
        else:
            for policy in compared_names(config):
                results.append(_compare(name, judge, policy, config, prompts, samples, logger))
    return results


Scores = list[list[float]]
"""Scores of the completions of each prompt."""


def _score(
    judge: ScoreJudge, prompts: Sequence[Row], samples: Samples, config: Evaluate, logger: Logger
) -> Scores:
    rows = [
        {**prompt, "completion": tokenization.assistant_turn(completion.text)}
        for prompt, sampled in zip(prompts, samples.completions, strict=True)
        for completion in sampled
    ]
    scores = iter(score_rows(judge, rows, batch_size=config.batch_size, logger=logger))
    return [[next(scores) for _ in sampled] for sampled in samples.completions]


def _from_scores(
    judge: str,
    policy: str,
    config: Evaluate,
    samples: Mapping[str, Samples],
    scores: Mapping[str, Scores],
) -> Outcomes:
    """Outcomes of a judge that scores: the higher score wins."""
    own, baseline = (_empty(samples[policy], config) for _ in range(2))
    for i, column, j, k in matches(samples[policy], samples[config.baseline], config.n_completions):
        own[i, column] = scores[policy][i][j]
        baseline[i, column] = scores[config.baseline][i][k]
    is_compared, is_equal = _compared_pairs(samples[policy], samples[config.baseline], config)
    outcomes = winrate.outcomes(own, baseline).masked_fill(is_equal, 0.5)
    return Outcomes(
        judge=judge,
        policy=policy,
        baseline=config.baseline,
        outcomes=outcomes,
        is_missing=outcomes.isnan() & is_compared,
        is_compared=is_compared,
        is_equal=is_equal,
        scores=own,
        baseline_scores=baseline,
    )


def _compare(
    name: str,
    judge: PairJudge,
    policy: str,
    config: Evaluate,
    prompts: Sequence[Row],
    samples: Mapping[str, Samples],
    logger: Logger,
) -> Outcomes:
    """Outcomes of a judge that compares, which reads each pair in both orders."""
    places, pairs = [], []
    first, second = (_empty(samples[policy], config) for _ in range(2))
    is_compared, is_equal = _compared_pairs(samples[policy], samples[config.baseline], config)
    for i, column, j, k in matches(samples[policy], samples[config.baseline], config.n_completions):
        own = samples[policy].completions[i][j].text
        baseline = samples[config.baseline].completions[i][k].text
        if not is_equal[i, column]:
            places.append((i, column))
            pairs.append(pair_of(prompts[i], own, baseline))
    decisions = decide(judge, pairs, unit=f"{name}, {policy}: compared pair", logger=logger)
    is_missing = torch.zeros_like(first, dtype=torch.bool)
    n_votes = max((len(decision.forward.votes) for decision in decisions), default=0)
    votes = torch.full((*first.shape, 2, n_votes), torch.nan, dtype=torch.float64)
    criteria: dict[str, Tensor] = {}
    for place, decision in zip(places, decisions, strict=True):
        first[place], second[place] = decision.preferences
        is_missing[place] = judge.covers_all and math.isnan(decision.preference)
        for criterion, preference in decision.criteria.items():
            ties = _empty(samples[policy], config).masked_fill(is_equal, 0.5)
            by_criterion = criteria.setdefault(criterion, ties)
            by_criterion[place] = preference
        for order, repeated in enumerate(decision.votes):
            votes[*place, order, : len(repeated)] = torch.tensor(repeated, dtype=torch.float64)
    outcomes = (first + second) / 2
    if judge.covers_all:
        outcomes = outcomes.masked_fill(is_equal, 0.5)
    return Outcomes(
        judge=name,
        policy=policy,
        baseline=config.baseline,
        outcomes=outcomes,
        is_missing=is_missing,
        is_compared=is_compared,
        is_equal=is_equal,
        first=first if judge.reads_in_order else None,
        second=second if judge.reads_in_order else None,
        votes=votes if n_votes > 1 else None,
        criteria=criteria or None,
        covers_all=judge.covers_all,
        reasons={place: decision.reason for place, decision in zip(places, decisions, strict=True)},
    )


def pair_of(row: Row, own: str, baseline: str) -> Pair:
    """Two completions of the prompt of a row."""
    columns = {key: value for key, value in row.items() if key != "prompt"}
    turns = tokenization.assistant_turn(own), tokenization.assistant_turn(baseline)
    return Pair(row["prompt"], turns[0], turns[1], columns)


def _compared_pairs(
    own: Samples, baseline: Samples, config: Evaluate
) -> tuple[Bool[Tensor, "prompts completions"], Bool[Tensor, "prompts completions"]]:
    """Whether there is a pair, and whether its completions are equal."""
    shape = len(own.completions), config.n_completions
    is_compared, is_equal = (torch.zeros(shape, dtype=torch.bool) for _ in range(2))
    for i, column, j, k in matches(own, baseline, config.n_completions):
        is_compared[i, column] = True
        is_equal[i, column] = own.completions[i][j].text == baseline.completions[i][k].text
    return is_compared, is_equal


def _empty(samples: Samples, config: Evaluate) -> Tensor:
    shape = len(samples.completions), config.n_completions
    return torch.full(shape, torch.nan, dtype=torch.float64)
