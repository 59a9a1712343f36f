"""Win rates of files of annotations: people's decisions, or those of a judge that were published.

A comparison is a policy against a baseline in one file. Each prompt is one observation, however
many decisions it has. Lengths are counted in characters, as AlpacaEval does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from align.data.annotation_files import annotation_files, read_rows
from align.data.annotations import Annotation
from align.errors import DataError, counted, nearest
from align.evaluation.results import Interval, PerSide
from align.evaluation.scores import length_controlled_rates
from align.functional.intervals import proportion_interval

UNNAMED = "first completion"
"""Name of a baseline where a file names no policies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnotatedWinRate:
    """Win rate of a policy against a baseline, by the decisions in a file."""

    policy: str
    baseline: str
    judge: str
    """Names of the annotators, separated by commas; empty if they are unknown."""
    file: str
    win_rate: float
    """Mean preference for the policy over all decisions; a tie counts one half."""
    ci: Interval
    """95 % confidence interval of ``win_rate``; prompts are independent, their decisions are not.
    """
    ties: float
    """Share of ties."""
    length_controlled_win_rate: float | None
    """Win rate at equal lengths; None where length and quality cannot be separated."""
    n_jointly: int
    """Comparisons over the same prompts, this one included, from which the difficulty of the
    prompts is estimated. With 1, difficulty is left out."""
    n_prompts: int
    """Prompts with a decision."""
    n_decisions: int
    invalid: int
    """Rows without a decision, left out of all rates."""
    bounds: Interval | None
    """``win_rate`` if all rows without a decision were lost, and if all were won; None without any.
    """
    mean_characters: PerSide
    """Mean length of the completions with a decision."""


class _Decision(NamedTuple):
    """A decision about a completion of the policy and one of the baseline."""

    outcome: float
    """Preference for the policy."""
    characters: int
    baseline_characters: int


@dataclass(slots=True)
class _Comparison:
    """The decisions about a policy and a baseline in one file."""

    policy: str
    baseline: str
    file: Path
    annotators: set[str] = field(default_factory=set)
    invalid: int = 0
    by_prompt: dict[str, list[_Decision]] = field(default_factory=dict)

    def add(self, annotation: Annotation) -> None:
        """Add an annotation whose first completion is that of the baseline."""
        self.annotators |= {annotation.annotator} - {""}
        if math.isnan(annotation.preference):
            self.invalid += 1
            return
        outcome = 1.0 - annotation.preference
        row = _Decision(outcome, len(annotation.second), len(annotation.first))
        self.by_prompt.setdefault(annotation.prompt_id, []).append(row)

    @property
    def decisions(self) -> list[_Decision]:
        """All decisions."""
        return [decision for rows in self.by_prompt.values() for decision in rows]


def annotated_win_rates(
    sources: Sequence[Path | str], *, baseline: str | None = None
) -> list[AnnotatedWinRate]:
    """Win rates of all files and folders of annotations, the highest first.

    The files are in the layout of AlpacaEval, Align, Label Studio or Argilla. The policy behind the
    first completion of a row is its baseline, unless one is named.

    Raises:
        DataError: A file is invalid, has no decision, or does not compare with the baseline.
    """
    files: dict[Path, Path] = {}  # once each, however its path is written
    for source in sources:
        for file in annotation_files(Path(source).expanduser()):
            files.setdefault(file.resolve(), file)
    comparisons: list[_Comparison] = []
    problems: list[str] = []
    for file in files.values():
        try:
            comparisons += _read(file, baseline)
        except DataError as error:
            problems += error.lines
    problems += [
        f"{each.file}: no decision about `{each.policy}`; all {counted(each.invalid, 'row')} have "
        "none; leave the file out"
        for each in comparisons
        if not each.by_prompt
    ]
    if problems:
        raise DataError(*problems)
    controlled = _length_control(comparisons)
    results = [_result(each, *rate) for each, rate in zip(comparisons, controlled, strict=True)]
    return sorted(results, key=lambda result: -result.win_rate)


def _read(file: Path, baseline: str | None) -> list[_Comparison]:
    """The comparisons of a file."""
    comparisons: dict[tuple[str, str], _Comparison] = {}
    names: set[str] = set()
    for annotation in read_rows(file):
        names |= {annotation.first_policy, annotation.second_policy}
        if baseline is not None and annotation.first_policy != baseline:
            annotation = annotation.swapped()
            if annotation.first_policy != baseline:
                continue
        key = (annotation.second_policy or file.stem, annotation.first_policy or UNNAMED)
        comparisons.setdefault(key, _Comparison(*key, file)).add(annotation)
    names -= {""}
    if baseline is not None and names and not comparisons:
        raise DataError(f"{file}: compares no policy with `{baseline}`{nearest(baseline, names)}")
    if not comparisons:
        raise DataError(f"{file}: names no policies, so none is `{baseline}`")
    for policy, other in comparisons:
        if policy != other and (other, policy) in comparisons:
            raise DataError(
                f"{file}: `{policy}` and `{other}` are each first in some rows; name the one that "
                "is the baseline with --reference"
            )
    return list(comparisons.values())


def _length_control(comparisons: Sequence[_Comparison]) -> list[tuple[float | None, int]]:
    """Length-controlled win rate of each comparison, and the number estimated jointly with it."""
    results: dict[int, tuple[float | None, int]] = {}
    for group in _groups_over_same_prompts(comparisons):
        prompts = dict.fromkeys(prompt for n in group for prompt in comparisons[n].by_prompt)
        means = [[_prompt_mean(comparisons[n], prompt) for prompt in prompts] for n in group]
        outcomes, differences = torch.tensor(means, dtype=torch.float64).unbind(dim=-1)
        rates = length_controlled_rates(outcomes, differences)
        for number, rate in zip(group, rates, strict=True):
            results[number] = rate, len(group)
    return [results[number] for number in range(len(comparisons))]


def _prompt_mean(comparison: _Comparison, prompt: str) -> tuple[float, float]:
    """Mean outcome and length difference of a prompt; NaN and 0 without a decision."""
    decisions = comparison.by_prompt.get(prompt)
    if not decisions:
        return math.nan, 0.0
    return (
        _mean(each.outcome for each in decisions),
        _mean(each.characters - each.baseline_characters for each in decisions),
    )


def _groups_over_same_prompts(comparisons: Sequence[_Comparison]) -> list[list[int]]:
    """Numbers of the comparisons with the same baseline that share most of their prompts."""
    groups: list[list[int]] = []
    for number, comparison in enumerate(comparisons):
        prompts = comparison.by_prompt.keys()
        for group in groups:
            first = comparisons[group[0]]
            n_shared = len(first.by_prompt.keys() & prompts)
            most = 2 * n_shared > len(first.by_prompt.keys() | prompts)
            if first.baseline == comparison.baseline and most:
                group.append(number)
                break
        else:
            groups.append([number])
    return groups


def _result(
    comparison: _Comparison, length_controlled: float | None, n_jointly: int
) -> AnnotatedWinRate:
    decisions, invalid = comparison.decisions, comparison.invalid
    won, n_rows = math.fsum(each.outcome for each in decisions), len(decisions) + invalid
    width = max(map(len, comparison.by_prompt.values()))
    outcomes = [
        [each.outcome for each in rows] + [math.nan] * (width - len(rows))
        for rows in comparison.by_prompt.values()
    ]
    interval = proportion_interval(torch.tensor(outcomes, dtype=torch.float64))
    return AnnotatedWinRate(
        policy=comparison.policy,
        baseline=comparison.baseline,
        judge=", ".join(sorted(comparison.annotators)),
        file=str(comparison.file),
        win_rate=won / len(decisions),
        ci=Interval(*interval),
        ties=_mean(each.outcome == 0.5 for each in decisions),
        length_controlled_win_rate=length_controlled,
        n_jointly=n_jointly,
        n_prompts=len(comparison.by_prompt),
        n_decisions=len(decisions),
        invalid=invalid,
        bounds=Interval(won / n_rows, (won + invalid) / n_rows) if invalid else None,
        mean_characters=PerSide(
            _mean(each.characters for each in decisions),
            _mean(each.baseline_characters for each in decisions),
        ),
    )


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return math.fsum(numbers) / len(numbers)
