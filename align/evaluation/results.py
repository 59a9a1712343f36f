"""Typed results of ``evaluate``, as ``artifact.json`` stores them.

Loads no heavy library, so that finished runs can be read in a moment. ``from_metrics`` accepts the
dictionaries as they are stored and ignores keys that it does not know, so results of a later
version stay readable.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple


class Interval(NamedTuple):
    """A confidence interval.

    Defined here and not imported from :mod:`align.functional.intervals`, which loads torch.
    """

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class PerSide:
    """One number for the policy and one for its baseline; None where it is unknown."""

    policy: float | None
    baseline: float | None


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its confidence interval."""

    value: float
    ci: Interval

    @classmethod
    def from_metrics(cls, metrics: Mapping[str, Any] | None) -> Estimate | None:
        """Read an estimate; None where it was not measured."""
        return None if metrics is None else cls(metrics["value"], Interval(*metrics["ci"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Held-out win rate of a policy against a baseline, by one judge."""

    policy: str
    """Name of the policy. That of the control, the baseline with other seeds, ends in " again"."""
    baseline: str
    judge: str
    """Name of the judge; ``panel`` for the mean over several."""
    win_rate: float
    """Wins plus half the ties, as a fraction of all comparisons with a verdict."""
    ci: Interval
    """Confidence interval of ``win_rate`` over prompts, never of width 0."""
    ties: float
    """Share of ties."""
    n_prompts: int
    """Prompts with at least one verdict."""
    n_completions: int
    """The setting: most completions per prompt and policy."""
    n_pairs: int | None = None
    """Pairs of completions with an outcome; None in results of earlier versions."""
    length_controlled_win_rate: float | None
    """Win rate at equal lengths; None where length and quality cannot be separated."""
    p_value: float
    """Two-sided p-value of a win rate of one half, which agrees with ``ci``."""
    adjusted_p_value: float | None = None
    """The p-value adjusted for the number of policies by Holm's method; None for the control."""
    mean_tokens: PerSide
    """Mean length in tokens; None for completions that are not sampled here."""
    mean_characters: PerSide | None = None
    mean_score: PerSide | None
    """Mean scores; None for judges that compare completions."""
    score_difference: float | None
    """Mean score of the policy minus that of the baseline."""
    score_difference_ci: Interval | None
    finished: PerSide
    """Share of the completions that end in an end-of-sequence token."""
    consistency: float | None
    """Share of equal verdicts in both orders; None for judges that score single completions."""
    invalid: int
    """Comparisons without a usable verdict, left out of all rates."""
    bounds: Interval | None = None
    """Win rate if all invalid comparisons were lost, and if all were won; None without any."""
    corrected: Estimate | None = None
    """Win rate by people, estimated from their labels of some prompts and the judge's of all."""
    criteria: dict[str, Estimate] | None = None
    """Win rate by each criterion of the judge's rubric; None without a rubric."""

    @classmethod
    def from_metrics(cls, metrics: Mapping[str, Any]) -> Comparison:
        """Read one entry of ``comparisons``."""
        typed: dict[str, Any] = {"ci": Interval(*metrics["ci"])}
        for key in ("score_difference_ci", "bounds"):
            typed[key] = None if metrics.get(key) is None else Interval(*metrics[key])
        for key in ("mean_tokens", "mean_characters", "mean_score", "finished"):
            typed[key] = None if metrics.get(key) is None else PerSide(**metrics[key])
        typed["corrected"] = Estimate.from_metrics(metrics.get("corrected"))
        if criteria := metrics.get("criteria"):
            read = {name: Estimate.from_metrics(each) for name, each in criteria.items()}
            typed["criteria"] = {name: each for name, each in read.items() if each is not None}
        return cls(**known_fields(cls, metrics) | typed)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImplicitRewards:
    """How often a policy's implicit reward prefers the chosen completion of a held-out pair."""

    policy: str
    reference: str
    """Name of the baseline, whose log-probabilities the policy's are compared with."""
    accuracy: float
    """Mean over prompts of the share of correctly ordered pairs; a tie counts one half."""
    ci: Interval
    """Confidence interval of ``accuracy`` over prompts, never of width 0."""
    mean_margin: float
    """Mean difference of the log-ratios of chosen and rejected completion, in nats."""
    n_pairs: int
    n_prompts: int
    invalid: int
    """Pairs whose prompt alone fills the model's positions, left out of all rates."""

    @classmethod
    def from_metrics(cls, metrics: Mapping[str, Any]) -> ImplicitRewards:
        """Read one entry of ``implicit_rewards``."""
        return cls(**known_fields(cls, metrics) | {"ci": Interval(*metrics["ci"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftMetrics:
    """How far a policy is from the baseline, and what its sampled completions look like."""

    policy: str
    reference: str | None
    """Name of the model that ``kl`` is measured to: the baseline. None without such a model."""
    kl: float | None
    """KL(policy, reference) in nats per completion, both at the sampling temperature.

    Estimated as the mean log-ratio of the policy's own samples (k1), so it may be negative by
    chance. None where the samples are not drawn from the whole distribution (temperature 0, top_p
    below 1), where the tokens of the two models differ, and for completions from a file.
    """
    kl_ci: Interval | None
    """Confidence interval of ``kl``, by bootstrap over prompts."""
    kl_per_token: float | None
    """Sum of all log-ratios over the number of all tokens, stop tokens included."""
    entropy: float | None
    """Mean entropy of the distributions that the tokens were drawn from, in nats."""
    missing_eos: float | None
    """Share of completions without a stop token, cut off by the length limit."""
    mean_tokens: float | None
    """Mean length in tokens, without the stop token."""
    mean_words: float
    """Mean length in words, which are separated by white space."""
    distinct_1: float | None
    """Distinct words over all words of the completions (distinct-1).

    A longer text repeats more, so all policies are compared at equal numbers of words: the expected
    value for a random subset of as many as the shortest policy has. None without words.
    """
    distinct_2: float | None
    """As ``distinct_1``, for pairs of consecutive words."""
    kl_estimator: str = "k1"
    """Estimator of ``kl`` and ``kl_per_token``: the mean log-ratio of the policy's samples."""

    @classmethod
    def from_metrics(cls, metrics: Mapping[str, Any]) -> DriftMetrics:
        """Read one entry of ``drift``."""
        interval = metrics["kl_ci"]
        typed = {"kl_ci": None if interval is None else Interval(*interval)}
        return cls(**known_fields(cls, metrics) | typed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How often two judges make the same decision about a pair."""

    first: str
    second: str
    n_pairs: int
    """Pairs about which both have a verdict."""
    same: float
    """Share of the pairs with the same decision."""
    kappa: Estimate | None
    """Cohen's kappa; None where both always make one and the same decision."""

    @classmethod
    def from_metrics(cls, metrics: Mapping[str, Any]) -> Agreement:
        """Read one entry of ``agreement``."""
        kappa = Estimate.from_metrics(metrics["kappa"])
        return cls(**known_fields(cls, metrics) | {"kappa": kappa})


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeCard:
    """How far a judge can be trusted, computed on the evaluation itself."""

    judge: str
    n_pairs: int
    """Compared pairs with a verdict, without the control and without equal completions."""
    invalid: int
    """Compared pairs without a usable verdict."""
    length_bias: Estimate | None
    """Win rate of the longer completion; None where all lengths are equal."""
    position_bias: Estimate | None
    """Win rate of the completion that is read first; None for judges that do not read in order."""
    consistency: Estimate | None
    """Share of pairs with the same decision in both orders."""
    self_agreement: Estimate | None
    """Probability that two verdicts about a pair in one order are equal; None without repeats."""
    annotator_agreement: Estimate | None = None
    """The same for people: probability that two of them make the same decision about a pair."""
    detectable_difference: float
    """Smallest distance of a win rate from one half that this number of prompts detects with a
    probability of 80 %."""
    usage: dict[str, Any] | None = None
    """Requests, verdicts from the cache, tokens and cost of a judge behind an API, when it ran."""

    @classmethod
    def from_metrics(cls, metrics: Mapping[str, Any]) -> JudgeCard:
        """Read one entry of ``judges``."""
        keys = ("length_bias", "position_bias", "consistency", "self_agreement")
        estimates = {
            key: Estimate.from_metrics(metrics.get(key)) for key in (*keys, "annotator_agreement")
        }
        return cls(**known_fields(cls, metrics) | estimates)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """All policies and the baseline, compared with each other by one judge."""

    judge: str
    policies: tuple[str, ...]
    """Names in the order of the matrix, the baseline last."""
    win_rates: tuple[tuple[float | None, ...], ...]
    """Win rate of the policy of each row against that of each column; None if not compared."""
    strengths: tuple[Estimate, ...]
    """Bradley-Terry strengths: log-odds of winning against the baseline, whose strength is 0."""

    @classmethod
    def from_metrics(cls, metrics: Mapping[str, Any]) -> Ranking:
        """Read one entry of ``rankings``."""
        strengths = (Estimate.from_metrics(each) for each in metrics["strengths"])
        typed = {
            "policies": tuple(metrics["policies"]),
            "win_rates": tuple(map(tuple, metrics["win_rates"])),
            "strengths": tuple(each for each in strengths if each is not None),
        }
        return cls(**known_fields(cls, metrics) | typed)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationMetrics:
    """Metrics of an ``evaluate`` stage. A part that was not measured is empty."""

    comparisons: tuple[Comparison, ...] = ()
    """One entry per policy, and the control last."""
    temperature: float | None = None
    """Sampling temperature of the compared completions."""
    implicit_rewards: tuple[ImplicitRewards, ...] = ()
    """One entry per policy."""
    drift: tuple[DriftMetrics, ...] = ()
    """One entry per policy, and the baseline last."""
    judges: tuple[JudgeCard, ...] = ()
    """One entry per judge."""
    agreement: tuple[Agreement, ...] = ()
    """One entry for each two of several judges."""
    rankings: tuple[Ranking, ...] = ()
    """One entry per judge, if there are several policies."""

    def to_metrics(self) -> dict[str, Any]:
        """The metrics as ``artifact.json`` stores them; parts that were not measured are absent."""
        metrics = json.loads(json.dumps(asdict(self)))
        if not self.comparisons:
            del metrics["temperature"]
        return {key: value for key, value in metrics.items() if value != []}

    @classmethod
    def from_metrics(cls, metrics: Mapping[str, Any]) -> EvaluationMetrics:
        """Read the metrics of a finished stage."""
        classes: dict[str, Any] = {
            "comparisons": Comparison,
            "implicit_rewards": ImplicitRewards,
            "drift": DriftMetrics,
            "judges": JudgeCard,
            "agreement": Agreement,
            "rankings": Ranking,
        }
        parts = {
            key: tuple(map(each.from_metrics, metrics.get(key, ())))
            for key, each in classes.items()
        }
        return cls(**parts, temperature=metrics.get("temperature"))


def known_fields(cls: type[Any], metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that are fields of ``cls``."""
    names = {field.name for field in fields(cls)}
    return {key: value for key, value in metrics.items() if key in names}
