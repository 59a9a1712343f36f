"""Held-out win rates: the statistics of the outcomes of each policy against the baseline.

Every evaluation with a baseline that is a model includes a control, the baseline against itself in
another random stream, whose interval must contain one half.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from align.config.evaluate import Evaluate
from align.errors import DataError
from align.evaluation.completions import Samples, length_differences, matches
from align.evaluation.intervals import Bootstrap
from align.evaluation.judging import Outcomes
from align.evaluation.panel import add_ties, adjust_for_several, correct, pooled
from align.evaluation.results import Comparison, Estimate, Interval, PerSide
from align.evaluation.scores import outcome_rate
from align.functional import agreement
from align.functional.winrate import missing_bounds

if TYPE_CHECKING:
    from align.data.rows import Row

COMPARISONS = "comparisons.parquet"


def compare_all(
    config: Evaluate, outcomes: Sequence[Outcomes], samples: Mapping[str, Samples]
) -> tuple[Comparison, ...]:
    """Statistics of every policy by every judge, the control of each judge last.

    Raises:
        DataError: A judge gave no usable verdict about a policy.
    """
    labels = pooled([each for each in outcomes if not each.covers_all])
    results: list[Comparison] = []
    for judge in dict.fromkeys(each.judge for each in outcomes):
        of_judge = [each for each in outcomes if each.judge == judge]
        if not of_judge[0].covers_all:  # people may have compared only some policies
            of_judge = [each for each in of_judge if not bool(each.outcomes.isnan().all())]
        rows = []
        for each in of_judge:
            row = compare(config, each, samples)
            if not each.covers_all:
                row = _with_equal_completions(config, each, row)
            elif each.policy in labels:
                row = replace(row, corrected=correct(config, each, labels[each.policy]))
            rows.append(row)
        results += adjust_for_several(config, rows, of_judge, samples)
    if not results:
        raise DataError(
            f"judge {outcomes[0].judge}: no annotation is about a compared pair of completions; "
            "name annotations of the completions in `comparisons.parquet`, or add another judge"
        )
    return tuple(results)


def compare(config: Evaluate, outcomes: Outcomes, samples: Mapping[str, Samples]) -> Comparison:
    """Statistics of the outcomes of one policy by one judge.

    Raises:
        DataError: The judge gave no usable verdict.
    """
    own, baseline = samples[outcomes.policy], samples[outcomes.baseline]
    won = outcomes.outcomes
    invalid = int(outcomes.is_missing.sum())
    if bool(won.isnan().all()):
        raise DataError(
            f"judge {outcomes.judge}: no usable verdict about `{outcomes.policy}` and "
            f"`{outcomes.baseline}`{_first_reason(outcomes)}"
        )
    result = outcome_rate(
        won,
        length_differences(own, baseline, config.n_completions),
        confidence=config.confidence,
    )
    valid = ~won.isnan()
    return Comparison(
        policy=outcomes.policy,
        baseline=outcomes.baseline,
        judge=outcomes.judge,
        win_rate=result.rate,
        ci=result.interval,
        ties=(won[valid] == 0.5).double().mean().item(),
        n_prompts=result.n_prompts,
        n_completions=config.n_completions,
        n_pairs=int(valid.sum()),
        length_controlled_win_rate=result.length_controlled,
        p_value=result.p_value,
        mean_tokens=PerSide(own.mean_tokens, baseline.mean_tokens),
        mean_characters=PerSide(own.mean_characters, baseline.mean_characters),
        finished=PerSide(own.finished, baseline.finished),
        consistency=_consistency(outcomes),
        invalid=invalid,
        bounds=Interval(*missing_bounds(won[outcomes.is_compared])) if invalid else None,
        criteria=_criteria(config, outcomes),
        **_scores(config, outcomes),
    )


def _with_equal_completions(config: Evaluate, outcomes: Outcomes, row: Comparison) -> Comparison:
    """The rates by people, who label some of the different completions; equal ones are ties."""
    share = int(outcomes.is_equal.sum()) / int(outcomes.is_compared.sum())
    rate = add_ties(
        Estimate(row.win_rate, row.ci),
        share=share,
        n_prompts=int(outcomes.is_compared.any(dim=1).sum()),
        confidence=config.confidence,
    )
    controlled = row.length_controlled_win_rate
    return replace(
        row,
        win_rate=rate.value,
        ci=rate.ci,
        ties=share + (1 - share) * row.ties,
        length_controlled_win_rate=controlled and 0.5 + (1 - share) * (controlled - 0.5),
    )


def _first_reason(outcomes: Outcomes) -> str:
    if not bool(outcomes.is_missing.any()):
        return ": no held-out prompt has a completion of both; complete the same prompts"
    reasons = [reason for reason in (outcomes.reasons or {}).values() if reason]
    return f": {reasons[0]}" if reasons else ""


def _scores(config: Evaluate, outcomes: Outcomes) -> dict[str, Any]:
    """Mean scores and their difference, for a judge that scores."""
    if outcomes.scores is None or outcomes.baseline_scores is None:
        return dict.fromkeys(("mean_score", "score_difference", "score_difference_ci"))
    own, baseline = outcomes.scores, outcomes.baseline_scores
    differences = (own - baseline).nanmean(dim=1)
    differences = differences[~differences.isnan()]
    bootstrap = Bootstrap(config.confidence, config.resamples, config.seed)
    return {
        "mean_score": PerSide(own.nanmean().item(), baseline.nanmean().item()),
        "score_difference": differences.mean().item(),
        "score_difference_ci": bootstrap.mean(differences),
    }


def _criteria(config: Evaluate, outcomes: Outcomes) -> dict[str, Estimate] | None:
    """Win rate by each criterion of a rubric."""
    if outcomes.criteria is None:
        return None
    bootstrap = Bootstrap(config.confidence, config.resamples, config.seed)
    return {
        name: Estimate(preferences.nanmean().item(), bootstrap.proportion(preferences))
        for name, preferences in outcomes.criteria.items()
        if not bool(preferences.isnan().all())
    }


def _consistency(outcomes: Outcomes) -> float | None:
    """Share of pairs with the same decision in both orders."""
    if outcomes.first is None or outcomes.second is None:
        return None
    if bool((outcomes.first.isnan() | outcomes.second.isnan()).all()):
        return None  # all completions are equal
    return agreement.consistency(outcomes.first, outcomes.second).value


def write_comparisons(
    output_dir: Path,
    config: Evaluate,
    prompts: Sequence[Row],
    samples: Mapping[str, Samples],
    outcomes: Sequence[Outcomes],
) -> None:
    """Write every compared pair of completions, with the outcome of each judge, to Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for each in outcomes:
        own, baseline = samples[each.policy], samples[each.baseline]
        for i, column, j, k in matches(own, baseline, config.n_completions):
            sides = own.completions[i][j], baseline.completions[i][k]
            rows.append(
                {
                    "prompt": prompts[i]["prompt"][-1]["content"],
                    "messages": prompts[i]["prompt"],
                    "judge": each.judge,
                    "policy": each.policy,
                    "baseline": each.baseline,
                    "policy_completion": sides[0].text,
                    "baseline_completion": sides[1].text,
                    "outcome": _value(each.outcomes, i, column),
                    "outcome_first": _value(each.first, i, column),
                    "outcome_second": _value(each.second, i, column),
                    "reason": (each.reasons or {}).get((i, column), ""),
                    "policy_score": _value(each.scores, i, column),
                    "baseline_score": _value(each.baseline_scores, i, column),
                    "policy_tokens": sides[0].n_tokens if own.is_sampled else None,
                    "baseline_tokens": sides[1].n_tokens if baseline.is_sampled else None,
                }
            )
    pq.write_table(pa.Table.from_pylist(rows), output_dir / COMPARISONS)


def _value(values: Tensor | None, i: int, column: int) -> float | None:
    if values is None or bool(values[i, column].isnan()):
        return None
    return float(values[i, column])
