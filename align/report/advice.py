"""Warnings that an experienced reader of curves would give, each with one thing to try.

A rule looks at the curves of one training. Thresholds are rules of thumb, not tests: each is stated
in the docstring of its rule. Left out: whether a result is significant, which intervals show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.config.stages import ONLINE_RL
from align.report.curves import Curve, Curves, add_row, mean_of_part, read_curves

LEAST_POINTS = 3
"""Logged steps below which a curve says nothing about a trend."""
LEAST_LIVE = 9
"""Logged steps before the first warning of an unfinished training."""


@dataclass(frozen=True, slots=True)
class Advice:
    """A warning about a stage, and what to try."""

    stage: str
    finding: str
    repair: str

    def __str__(self) -> str:
        return f"{self.stage}: {self.finding}; {self.repair}"


class LiveAdvice:
    """Warnings while a stage trains, each given once; a resumed stage continues its curves."""

    def __init__(self, kind: str, metrics: Path) -> None:
        self.kind = kind
        self.curves = read_curves(metrics)
        self.given: set[str] = set()

    def __call__(self, step: int, metrics: Mapping[str, Any]) -> Iterator[str]:
        """Add the metrics of a step; the warnings that have become true."""
        add_row(self.curves, step, metrics)
        for kinds, metric, rule in _RULES:
            curve = self.curves.get(metric, {}).get("", [])
            if self.kind not in kinds or len(curve) < LEAST_LIVE or metric in self.given:
                continue
            found = rule(curve)
            if found is not None:
                self.given.add(metric)
                yield f"{found[0]}; {found[1]}"


def about_training(stage: str, kind: str, curves: Curves) -> Iterator[Advice]:
    """Warnings about the curves of one stage."""
    for kinds, metric, rule in _RULES:
        curve = curves.get(metric, {}).get("", [])
        if kind in kinds and len(curve) >= LEAST_POINTS:
            found = rule(curve)
            if found is not None:
                yield Advice(stage, *found)


def about_reward_model(stage: str, metrics: Mapping[str, Any]) -> Iterator[Advice]:
    """Accuracy above what the noise of the labels allows: held-out pairs have leaked.

    The lower end of the interval has to exceed the bound.
    """
    held_out = metrics.get("held_out") or {}
    bound = held_out.get("accuracy_upper_bound")
    if bound is not None and held_out["ci"][0] > bound:
        yield Advice(
            stage,
            f"its accuracy on held-out pairs, {held_out['accuracy']:.3f}, is above "
            f"{bound:.3f}, the best that is possible with these labels",
            "look for held-out pairs in the training data (`align data doctor`)",
        )


def about_margins(
    stage: str, curves: Curves, comparisons: Sequence[Mapping[str, Any]]
) -> Iterator[Advice]:
    """Margins of DPO that grew while the policy does not win more than half of the comparisons.

    The margin of the last third is at least twice that of the first, and no interval of a win rate
    of the policy lies above one half.
    """
    curve = curves.get("rewards/margins", {}).get("", [])
    own = [each for each in comparisons if each["policy"] == stage]
    if len(curve) < LEAST_POINTS or not own or any(each["ci"][0] > 0.5 for each in own):
        return
    first, last = mean_of_part(curve, last=False), mean_of_part(curve, last=True)
    if last > max(2 * first, 0.05):
        rate = max(each["win_rate"] for each in own)
        yield Advice(
            stage,
            f"the margins between chosen and rejected grew from {first:.3g} to {last:.3g}, but "
            f"the win rate is {rate:.1%}",
            "raise `beta`, train for fewer steps, or look whether the judge prefers what the "
            "pairs prefer",
        )


Finding = tuple[str, str]


def _falling_chosen(curve: Curve) -> Finding | None:
    """The log-probability of chosen completions falls by more than a tenth and by 2 nats."""
    first, last = mean_of_part(curve, last=False), mean_of_part(curve, last=True)
    if last < first - max(2.0, 0.1 * abs(first)):
        return (
            f"the log-probability of the chosen completions fell from {first:.1f} to {last:.1f} "
            "nats",
            "lower the learning rate, raise `beta`, or add the loss `sft` to `loss_type`",
        )
    return None


def _growing_kl(curve: Curve) -> Finding | None:
    """The KL of the last third exceeds 20 nats and three times that of the middle."""
    size = max(1, len(curve) // 3)
    middle, last = mean_of_part(curve[: 2 * size], last=True), mean_of_part(curve, last=True)
    if last > max(20.0, 3 * middle):
        return (
            f"KL to the reference rose from {middle:.1f} to {last:.1f} nats per completion",
            "raise `kl_coef`, set `kl_target`, or lower the learning rate",
        )
    return None


def _growing_length(curve: Curve) -> Finding | None:
    """Completions of the last third are longer by a third than those of the first."""
    first, last = mean_of_part(curve, last=False), mean_of_part(curve, last=True)
    if last > 4 / 3 * first:
        return (
            f"completions grew from {first:.0f} to {last:.0f} tokens",
            "look at the win rate at equal length, and whether the reward prefers length",
        )
    return None


def _missing_eos(curve: Curve) -> Finding | None:
    """A fifth of the completions in the last third have no end token."""
    last = mean_of_part(curve, last=True)
    if last > 0.2:
        return (
            f"{last:.0%} of the completions are cut off at `max_new_tokens`",
            "raise `max_new_tokens`, or set `missing_eos_penalty`",
        )
    return None


def _collapsed_entropy(curve: Curve) -> Finding | None:
    """The entropy of the last third is below a quarter of that of the first."""
    first, last = mean_of_part(curve, last=False), mean_of_part(curve, last=True)
    if first > 0 and last < first / 4:
        return (
            f"the entropy of the policy fell from {first:.3g} to {last:.3g} nats per token",
            "raise `kl_coef` or `entropy_coef`, or lower the learning rate",
        )
    return None


def _useless_critic(curve: Curve) -> Finding | None:
    """The critic of the last third explains less variance than a constant."""
    last = mean_of_part(curve, last=True)
    if last < 0:
        return (
            f"the explained variance of the critic is {last:.2f}: a constant would predict better",
            "raise `critic_learning_rate`, or set `critic_warmup_steps`",
        )
    return None


_RULES: tuple[tuple[tuple[str, ...], str, Callable[[Curve], Finding | None]], ...] = (
    (("dpo",), "logps/chosen", _falling_chosen),
    (ONLINE_RL, "kl", _growing_kl),
    (ONLINE_RL, "tokens", _growing_length),
    (ONLINE_RL, "missing_eos", _missing_eos),
    (ONLINE_RL, "entropy", _collapsed_entropy),
    (("ppo",), "explained_variance", _useless_critic),
)
"""Kinds of stages, the metric, and the rule about its curve."""
