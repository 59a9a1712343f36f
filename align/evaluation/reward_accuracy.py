"""Accuracy of a reward model on pairs: overall, by groups of pairs, calibration, upper bound.

Left out: scoring the pairs, which :mod:`align.evaluation.reward_model` does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from align.evaluation.intervals import Bootstrap, means_by_prompt
from align.evaluation.reward_results import AccuracyGroup, CalibrationBin, RewardModelReport
from align.evaluation.tables import percent, percent_interval
from align.functional import winrate
from align.functional.agreement import length_bias
from align.rewards import gold
from align.runtime.results import ResultTable

N_BINS = 10
"""Number of bins of the calibration."""
SOURCE_COLUMNS = ("source", "subset")
"""Columns that divide pairs by their origin; the first that the rows have is used."""
NAME_WIDTH = 22
"""Characters of the longest name of a group in the table."""

Rows = Sequence[Mapping[str, Any]]


class Group(NamedTuple):
    """Some of the pairs, and what they have in common."""

    name: str
    members: Tensor
    """True for each pair of the group."""


def report(
    rows: Rows, chosen: Float[Tensor, " pairs"], rejected: Float[Tensor, " pairs"], *, split: str
) -> RewardModelReport:
    """Measure a reward model by its scores of the chosen and the rejected completions of pairs.

    A difference d of scores predicts that the completion with the higher score is preferred with
    probability sigmoid(d). Rows have ``prompt``, ``chosen``, ``rejected`` and ``prompt_id``; a
    prompt with several pairs counts once.
    """
    margins = chosen.double() - rejected.double()
    outcomes = winrate.outcomes(chosen[:, None], rejected[:, None])[:, 0]
    accuracies = means_by_prompt(rows, outcomes.tolist())
    lengths = chosen_length_differences(rows)
    # In every pair the chosen completion has won, by the labels.
    by_labels, by_scores = (
        length_bias(won[:, None], lengths[:, None]) for won in (torch.ones_like(outcomes), outcomes)
    )
    labels = [row.get("margin") for row in rows]
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in labels):
        labels = []
    return RewardModelReport(
        split=split,
        pairs=len(rows),
        accuracy=accuracies.mean().item(),
        ci=Bootstrap().proportion(accuracies),
        mean_margin=margins.mean().item(),
        calibration=calibration(margins),
        expected_calibration_error=calibration_error(margins),
        log_loss=-torch.nn.functional.logsigmoid(margins).mean().item(),
        longer_is_chosen=None if by_labels is None else by_labels.value,
        longer_scores_higher=None if by_scores is None else by_scores.value,
        accuracy_by_score_difference=_accuracies(rows, outcomes, quarters(margins.abs())),
        accuracy_by_margin=_accuracies(
            rows, outcomes, quarters(torch.tensor(labels, dtype=torch.float64))
        ),
        accuracy_by_length_difference=_accuracies(rows, outcomes, length_groups(lengths)),
        accuracy_by_source=_accuracies(rows, outcomes, source_groups(rows)),
        **gold_agreement(rows, margins),
    )


def _accuracies(
    rows: Rows, outcomes: Float[Tensor, " pairs"], groups: Iterator[Group]
) -> tuple[AccuracyGroup, ...]:
    results = []
    for group in groups:
        indices = group.members.nonzero()[:, 0].tolist()
        accuracies = means_by_prompt([rows[i] for i in indices], outcomes[indices].tolist())
        results.append(
            AccuracyGroup(
                group=group.name,
                pairs=len(indices),
                accuracy=accuracies.mean().item(),
                ci=Bootstrap().proportion(accuracies),
            )
        )
    return tuple(results)


def quarters(values: Float[Tensor, " pairs"]) -> Iterator[Group]:
    """Four groups of about equal size by value; equal values share a group, so there may be fewer.

    >>> [(name, members.tolist()) for name, members in quarters(torch.tensor([1.0, 1.0, 2.0]))]
    [('1', [True, True, False]), ('2', [False, False, True])]
    """
    if not len(values):
        return
    levels = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    edges = torch.quantile(values.double(), levels).unique()
    number = torch.bucketize(values.double(), edges)
    for k in range(len(edges) + 1):
        members = number == k
        if members.any():
            low, high = values[members].min().item(), values[members].max().item()
            yield Group(f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}", members)


def chosen_length_differences(rows: Rows) -> Float[Tensor, " pairs"]:
    """Characters of the chosen completion minus those of the rejected one."""
    lengths = [
        len(row["chosen"][-1]["content"]) - len(row["rejected"][-1]["content"]) for row in rows
    ]
    return torch.tensor(lengths, dtype=torch.float64)


def length_groups(differences: Float[Tensor, " pairs"]) -> Iterator[Group]:
    """Pairs by how much longer the chosen completion is, divided at the median difference.

    The median is that of the absolute values of pairs with unequal lengths.
    """
    sizes = differences.abs()[differences != 0]
    if len(sizes):
        median = int(sizes.quantile(0.5, interpolation="lower"))
        yield from _nonempty(
            Group(f"shorter, over {median}", differences < -median),
            Group(f"shorter, up to {median}", (differences < 0) & (differences >= -median)),
        )
    yield from _nonempty(Group("equal", differences == 0))
    if len(sizes):
        yield from _nonempty(
            Group(f"longer, up to {median}", (differences > 0) & (differences <= median)),
            Group(f"longer, over {median}", differences > median),
        )


def _nonempty(*groups: Group) -> Iterator[Group]:
    yield from (group for group in groups if group.members.any())


def source_groups(rows: Rows) -> Iterator[Group]:
    """Pairs by their column ``source`` or ``subset``, in the order of appearance."""
    column = next((name for name in SOURCE_COLUMNS if rows and name in rows[0]), None)
    if column is None:
        return
    names = [str(row[column]) for row in rows]
    for name in dict.fromkeys(names):
        yield Group(name, torch.tensor([each == name for each in names]))


def calibration(margins: Tensor) -> tuple[CalibrationBin, ...]:
    """Calibration of score differences ``[pairs]``, in bins of the predicted probability.

    Empty bins are left out.
    """
    confidence = torch.sigmoid(margins.double().abs())
    correct = torch.where(margins == 0, 0.5, (margins > 0).double())  # a tie counts one half
    bin_of_pair = ((confidence - 0.5) * 2 * N_BINS).long().clamp(max=N_BINS - 1)
    return tuple(
        CalibrationBin(
            confidence=confidence[bin_of_pair == k].mean().item(),
            accuracy=correct[bin_of_pair == k].mean().item(),
            pairs=int((bin_of_pair == k).sum()),
        )
        for k in range(N_BINS)
        if (bin_of_pair == k).any()
    )


def calibration_error(margins: Tensor) -> float:
    """Expected calibration error: ``|confidence - accuracy|``, averaged over pairs.

    Source: Naeini et al. 2015, Obtaining well calibrated probabilities using Bayesian binning, eq.
    3.
    """
    return sum(
        each.pairs * abs(each.confidence - each.accuracy) for each in calibration(margins)
    ) / len(margins)


def gold_agreement(rows: Rows, margins: Tensor) -> dict[str, float]:
    """Compare score differences ``[pairs]`` with gold scores; empty for another task.

    ``accuracy_upper_bound`` is the expected accuracy of the best classifier, since the labels are
    noisy. ``agreement_with_gold`` is the share of pairs that the reward model orders as the gold
    score does; ties in the gold score are left out.
    """
    try:
        probabilities = [
            gold.preference_probability(
                row["prompt"][-1]["content"],
                row["chosen"][-1]["content"],
                row["rejected"][-1]["content"],
            )
            for row in rows
        ]
    except ValueError:
        return {}  # not prompts of the embedded task
    best = means_by_prompt(rows, [max(p, 1 - p) for p in probabilities])
    agreement: dict[str, float] = {"accuracy_upper_bound": sum(best.tolist()) / len(best)}
    gaps = torch.tensor([p - 0.5 for p in probabilities], dtype=torch.float64)
    untied = gaps != 0
    if untied.any():
        agrees = ((margins > 0) == (gaps > 0))[untied]
        agreement["agreement_with_gold"] = agrees.double().mean().item()
    return agreement


def result_table(report: RewardModelReport) -> ResultTable:
    """One row with the accuracies and the calibration error."""
    cells = {
        "accuracy": percent(report.accuracy),
        "interval": percent_interval(report.ci),
        "upper bound": percent(report.accuracy_upper_bound),
        "agrees with gold": percent(report.agreement_with_gold),
        "calibration error": f"{report.expected_calibration_error:.3f}",
    }
    title = f"reward model on {report.pairs:,} held-out pairs"
    return ResultTable(title, tuple(cells), [tuple(cells.values())])


def group_table(report: RewardModelReport) -> ResultTable:
    """One row per group of pairs: by score difference, margin, length difference and source."""
    groupings = {
        "score difference": report.accuracy_by_score_difference,
        "margin of the labels": report.accuracy_by_margin,
        "chosen, characters": report.accuracy_by_length_difference,
        "source": report.accuracy_by_source,
    }
    rows = [
        (
            grouping if k == 0 else "",
            group.group if len(group.group) <= NAME_WIDTH else group.group[: NAME_WIDTH - 1] + "…",
            f"{group.pairs:,}",
            percent(group.accuracy),
            percent_interval(group.ci),
        )
        for grouping, groups in groupings.items()
        for k, group in enumerate(groups)
    ]
    note = ""
    if report.longer_is_chosen is not None:
        note = (
            f"the longer completion is chosen in {percent(report.longer_is_chosen)} of the pairs "
            f"and scores higher in {percent(report.longer_scores_higher)}"
        )
    columns = ("accuracy by<", "<", "pairs", "accuracy", "interval")
    return ResultTable("accuracy of the reward model by groups of pairs", columns, rows, note)
