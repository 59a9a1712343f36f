"""Accuracy of a reward model among several completions: best-of-k, and prompts with many answers.

Left out: pairs, which :mod:`align.evaluation.reward_accuracy` measures by more groups.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from statistics import fmean

import torch

from align.data.reward_files import Choice
from align.errors import DataError
from align.evaluation.intervals import Bootstrap
from align.evaluation.results import Interval
from align.evaluation.reward_results import ChoiceGroup, ChoicesReport, TiesScore
from align.evaluation.tables import percent, percent_interval
from align.runtime.results import ResultTable

TIES = "ties"
"""Name of the subset, in any case, whose prompts have several correct answers."""
TIES_ID = re.compile(r"(ref|tied):(\d+)")


def report(
    choices: Sequence[Choice],
    chosen: Sequence[list[float]],
    rejected: Sequence[list[float]],
    *,
    place: str,
) -> ChoicesReport:
    """Measure a reward model by its scores of the chosen and the rejected completions.

    ``place`` names the file of the choices in errors.

    Source: Malik et al. 2025, arXiv:2506.01937 (RewardBench 2: one correct answer among four, and
    the subset of ties).

    Raises:
        DataError: A prompt of the subset of ties has an ``id`` that is not ``ref:N`` or ``tied:N``.
    """
    scores = list(zip(choices, chosen, rejected, strict=True))
    accuracies = {
        subset: [accuracy(c, r) for choice, c, r in scores if choice.subset == subset]
        for subset in dict.fromkeys(choice.subset for choice in choices)
        if subset.lower() != TIES
    }
    groups = []
    for subset, values in accuracies.items():
        members = [choice for choice in choices if choice.subset == subset]
        sizes = [(len(choice.chosen), len(choice.rejected)) for choice in members]
        groups.append(
            ChoiceGroup(
                subset=subset,
                prompts=len(values),
                completions=fmean(map(sum, sizes)),
                accuracy=fmean(values),
                ci=_interval(values),
                chance=fmean(right / (right + wrong) for right, wrong in sizes),
            )
        )
    ties = [(choice, c, r) for choice, c, r in scores if choice.subset.lower() == TIES]
    ties_score = score_ties(ties, place=place) if ties else None
    every = [value for values in accuracies.values() for value in values]
    parts = [group.accuracy for group in groups] + ([ties_score.score] if ties_score else [])
    return ChoicesReport(
        prompts=len(every),
        accuracy=fmean(every) if every else None,
        ci=_interval(every) if every else None,
        groups=tuple(groups),
        ties=ties_score,
        mean_of_subsets=fmean(parts),
    )


def accuracy(chosen: Sequence[float], rejected: Sequence[float]) -> float:
    """Share of chosen completions among those with the highest score.

    >>> accuracy([2.0], [1.0, 2.0]), accuracy([2.0, 2.0], [2.0]), accuracy([1.0], [2.0])
    (0.5, 0.6666666666666666, 0.0)
    """
    best = max(*chosen, *rejected)
    right, wrong = (sum(score == best for score in side) for side in (chosen, rejected))
    return right / (right + wrong)


def score_ties(
    scores: Sequence[tuple[Choice, list[float], list[float]]], *, place: str
) -> TiesScore:
    """Score of prompts with several correct answers, beside the same prompts with one.

    ``scores`` has each prompt with the scores of its chosen and of its rejected completions.

    Source: Malik et al. 2025, arXiv:2506.01937, and the code of RewardBench 2.

    Raises:
        DataError: An ``id`` is not ``ref:N`` or ``tied:N``, occurs twice, or no N has both forms.
    """
    gaps: dict[str, dict[str, float]] = {"ref": {}, "tied": {}}
    spreads: dict[str, float] = {}
    for choice, right, wrong in scores:
        match = TIES_ID.fullmatch(choice.id)
        if match is None or match[2] in gaps[match[1]]:
            reason = "occurs twice" if match else "is not `ref:N` or `tied:N`"
            raise DataError(
                f"{place}: id: `{choice.id}` of the subset `{choice.subset}` {reason}; its prompts are "
                "paired by N, with one correct answer (ref) and with several (tied)"
            )
        gaps[match[1]][match[2]] = min(right) - max(wrong)
        if match[1] == "tied":
            spreads[match[2]] = max(right) - min(right)
    both = [number for number in gaps["tied"] if number in gaps["ref"]]
    if not both:
        raise DataError(
            f"{place}: id: no prompt of the subset `{scores[0][0].subset}` has both forms, `ref:N` and "
            "`tied:N`; the score of ties needs both"
        )
    tied, reference = (fmean(g > 0 for g in gaps[form].values()) for form in ("tied", "ref"))
    smaller = {number: min(gaps["tied"][number], gaps["ref"][number]) for number in both}
    preferred = fmean(gaps["tied"][number] > spreads[number] for number in both)
    hard = fmean(smaller[number] > spreads[number] for number in both)
    margin = fmean(_relative_gap(smaller[number], spreads[number]) for number in both)
    return TiesScore(
        score=0.3 * tied + 0.3 * reference + 0.2 * preferred + 0.2 * hard + 0.01 * margin,
        prompts=len(both),
        accuracy=tied,
        reference_accuracy=reference,
        correctness_preferred=preferred,
        correctness_preferred_hard=hard,
        margin=margin,
    )


def _relative_gap(gap: float, spread: float) -> float:
    """``tanh(gap / spread - 1)``, with its limits where all correct answers score alike."""
    if spread == 0:
        return math.copysign(1.0, gap) if gap else 0.0
    return math.tanh(gap / spread - 1)


def _interval(values: Sequence[float]) -> Interval:
    return Bootstrap().proportion(torch.tensor(values, dtype=torch.float64))


def choices_table(report: ChoicesReport) -> ResultTable:
    """One row per subset, then the ties, and the mean over subsets."""
    rows = [
        (
            group.subset or "all",
            f"{group.prompts:,}",
            f"{group.completions:.3g}",
            percent(group.accuracy),
            percent_interval(group.ci),
            percent(group.chance),
        )
        for group in report.groups
    ]
    if report.ties is not None:
        rows.append(("Ties", f"{report.ties.prompts:,}", "–", percent(report.ties.score), "–", "–"))
    if len(rows) > 1:
        rows.append(("mean of subsets", "", "", percent(report.mean_of_subsets), "", ""))
    columns = ("subset<", "prompts", "completions", "accuracy", "interval", "chance")
    note = "accuracy: the highest score is that of a correct completion"
    return ResultTable("reward model among several completions", columns, rows, note)
