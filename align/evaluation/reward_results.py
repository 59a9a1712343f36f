"""Typed results about reward models: those of ``reward``, and those of ``align eval reward``.

Loads no heavy library, so that finished runs can be read in a moment.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from align.evaluation.results import Interval, known_fields


@dataclass(frozen=True, slots=True)
class CalibrationBin:
    """Pairs whose likelier completion has about the same predicted probability."""

    confidence: float
    """Mean predicted probability of the likelier completion."""
    accuracy: float
    """Share of the pairs in which it is the chosen one; a tie counts one half."""
    pairs: int


@dataclass(frozen=True, slots=True)
class AccuracyGroup:
    """Accuracy on the pairs that have something in common."""

    group: str
    """What the pairs have in common, such as a range of a difference, or a source."""
    pairs: int
    accuracy: float
    """Mean over prompts of the share of correctly ordered pairs; a tie counts one half."""
    ci: Interval
    """95 % confidence interval of ``accuracy`` over prompts (Wilson), never of width 0."""

    @classmethod
    def from_metrics(cls, metrics: Mapping[str, Any]) -> AccuracyGroup:
        """Read one group."""
        return cls(**known_fields(cls, metrics) | {"ci": Interval(*metrics["ci"])})


GROUPINGS = (
    "accuracy_by_score_difference",
    "accuracy_by_margin",
    "accuracy_by_length_difference",
    "accuracy_by_source",
)
"""Fields of :class:`RewardModelReport` with groups."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardModelReport:
    """Accuracy and calibration of a reward model on held-out pairs."""

    split: str
    pairs: int
    accuracy: float
    """Mean over prompts of the share of correctly ordered pairs; a tie counts one half."""
    ci: Interval
    """95 % confidence interval of ``accuracy`` over prompts (Wilson), never of width 0."""
    mean_margin: float
    """Mean score of the chosen completion minus that of the rejected one."""
    calibration: tuple[CalibrationBin, ...]
    expected_calibration_error: float
    log_loss: float | None = None
    """Mean of -log sigmoid(score of chosen - score of rejected), in nats; a coin has 0.693."""
    longer_is_chosen: float | None = None
    """Share of pairs whose chosen completion has more characters; equal lengths are left out."""
    longer_scores_higher: float | None = None
    """Share of the same pairs whose longer completion has the higher score.

    Above ``longer_is_chosen``, the reward model prefers length more than the labels do.
    """
    accuracy_by_score_difference: tuple[AccuracyGroup, ...] = ()
    """Accuracy by quarters of the absolute difference of scores."""
    accuracy_by_margin: tuple[AccuracyGroup, ...] = ()
    """Accuracy by quarters of the pairs' ``margin``; empty where the data have none."""
    accuracy_by_length_difference: tuple[AccuracyGroup, ...] = ()
    """Accuracy by how many characters the chosen completion is longer or shorter."""
    accuracy_by_source: tuple[AccuracyGroup, ...] = ()
    """Accuracy by the column ``source`` or ``subset`` of the pairs; empty without such a column."""
    accuracy_upper_bound: float | None = None
    """Accuracy of the best classifier on these noisy labels; known for the embedded task only."""
    agreement_with_gold: float | None = None
    """Share of pairs ordered as by the exact score; known for the embedded task only."""

    def to_metrics(self) -> dict[str, Any]:
        """The report as ``artifact.json`` stores it; what is unknown is absent."""
        metrics = json.loads(json.dumps(asdict(self)))
        return {
            key: value
            for key, value in metrics.items()
            if value is not None and not (key in GROUPINGS and not value)
        }

    @classmethod
    def from_metrics(cls, metrics: Mapping[str, Any]) -> RewardModelReport | None:
        """Read the metrics of a finished ``reward`` stage; None where no pair was held out."""
        held_out = metrics.get("held_out")
        if held_out is None:
            return None
        bins = tuple(CalibrationBin(**each) for each in held_out["calibration"])
        typed = {"ci": Interval(*held_out["ci"]), "calibration": bins}
        groups = {
            key: tuple(map(AccuracyGroup.from_metrics, held_out.get(key, ()))) for key in GROUPINGS
        }
        return cls(**known_fields(cls, held_out) | typed | groups)


@dataclass(frozen=True, slots=True)
class ChoiceGroup:
    """How often a reward model scores a chosen completion highest, on one subset."""

    subset: str
    prompts: int
    completions: float
    """Mean number of completions per prompt."""
    accuracy: float
    """Share of prompts whose highest score belongs to a chosen completion.

    Where several completions share the highest score, the share of chosen ones among them.
    """
    ci: Interval
    """95 % confidence interval of ``accuracy``."""
    chance: float
    """Accuracy of a random choice."""


@dataclass(frozen=True, slots=True)
class TiesScore:
    """Score of the subset ``Ties`` of RewardBench 2, whose prompts have several correct answers.

    Each prompt exists twice: with one correct answer (``ref:N``), and with several (``tied:N``).
    """

    score: float
    """``0.3 * accuracy + 0.3 * reference_accuracy + 0.2 * correctness_preferred + 0.2 *
    correctness_preferred_hard + 0.01 * margin``."""
    prompts: int
    """Number of prompts that exist in both forms."""
    accuracy: float
    """Share of prompts with several correct answers that all score above every wrong one."""
    reference_accuracy: float
    """The same with one correct answer."""
    correctness_preferred: float
    """Share of prompts where the gap between the worst correct and the best wrong answer is wider
    than the spread of the correct ones."""
    correctness_preferred_hard: float
    """The same for the smaller of the gaps with several and with one correct answer."""
    margin: float
    """Mean of tanh(smaller gap / spread - 1)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoicesReport:
    """Accuracy of a reward model among several completions, as in RewardBench 2."""

    prompts: int
    """Prompts of all groups."""
    accuracy: float | None
    """Mean over these prompts; None if all prompts are in the subset of ties."""
    ci: Interval | None
    """95 % confidence interval of ``accuracy``."""
    groups: tuple[ChoiceGroup, ...]
    """One entry per subset; the subset ``Ties`` is in ``ties``."""
    ties: TiesScore | None
    mean_of_subsets: float
    """Mean over the accuracies of the subsets and the score of the ties, each with equal weight."""


@dataclass(frozen=True, slots=True)
class BestOfN:
    """Best-of-n sampling with a reward model, judged by other scores."""

    n: int
    kl: float
    """KL divergence from the sampled policy in nats, ``log n - (n - 1) / n``, an upper bound."""
    score: float
    """Mean score by the reward model of the completion that it picks."""
    gold: float
    """Mean score by the judge of that completion."""
    gold_ci: Interval
    """95 % confidence interval of ``gold``, by bootstrap over prompts."""
    best_gold: float
    """Mean score by the judge of the best of n completions, the upper bound of ``gold``."""
    accuracy: float
    """Share of picks that are the best of the n completions by the judge."""
    accuracy_ci: Interval
    """95 % confidence interval of ``accuracy``, which is 1 by definition for n = 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BestOfNReport:
    """The curve of best-of-n over n. Each value is the mean over all subsets of n completions."""

    judge: str
    """Name of the judge whose scores are called gold."""
    prompts: int
    completions: int
    """Largest n: at least 9 of 10 prompts have as many completions."""
    left_out: int
    """Prompts with fewer completions."""
    curve: tuple[BestOfN, ...]
    """One entry for 1, 2, 4, 8, … and the largest n."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardEvaluation:
    """What ``align eval reward`` measured; a part that the data do not allow is None."""

    model: str
    pairs: RewardModelReport | None = None
    choices: ChoicesReport | None = None
    best_of_n: BestOfNReport | None = None

    def to_metrics(self) -> dict[str, Any]:
        """The results as JSON types; parts that were not measured are absent."""
        parts: dict[str, Any] = {"model": self.model}
        if self.pairs is not None:
            parts["pairs"] = self.pairs.to_metrics()
        for key, part in (("choices", self.choices), ("best_of_n", self.best_of_n)):
            if part is not None:
                parts[key] = json.loads(json.dumps(asdict(part)))
        return parts
