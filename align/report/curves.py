"""Metrics of a training as curves, grouped into the panels in which they are read together."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Curve = list[tuple[float, float]]
"""Steps and values, in the order of the steps."""
Curves = dict[str, dict[str, Curve]]
"""Curves by metric, then by seed; the seed of a stage with one training is empty."""

NOT_DRAWN = re.compile(
    r"epochs?|steps?|num_tokens|seed|stopped_early|optimizer_steps|total_flos|train_loss"
    r"|(train|eval)_runtime|(train|eval)_(samples|steps)_per_second"
)
"""Metrics that only count, and those of a whole training."""
_SIDES = re.compile(r"(?P<panel>.*)/(?P<side>chosen|rejected)")
_RANGE = re.compile(r"(?P<side>min|mean|max)_(?P<panel>.*)")
_HELD_OUT = re.compile(r"eval_(?P<panel>.*)")
_FIRST = ("return", "loss", "score", "reward", "gold", "kl")
"""Metrics whose panels come first."""


@dataclass(frozen=True, slots=True)
class Panel:
    """Curves that are drawn into one picture."""

    title: str
    lines: dict[str, Curve]
    """By label; empty for a single line."""


def read_curves(file: Path) -> Curves:
    """Read ``metrics.jsonl``; values that are not finite numbers are left out."""
    curves: Curves = {}
    if not file.is_file():
        return curves
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            step, seed = float(row["step"]), str(row.get("seed", ""))
        except (ValueError, TypeError, KeyError):
            continue
        add_row(curves, step, row, seed)
    return curves


def add_row(curves: Curves, step: float, metrics: Mapping[str, object], seed: str = "") -> None:
    """Add the metrics of a step; values that are not finite numbers are left out."""
    for key, value in metrics.items():
        if (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and math.isfinite(value)
            and not NOT_DRAWN.fullmatch(key)
        ):
            curves.setdefault(key, {}).setdefault(seed, []).append((step, float(value)))


def panels(curves: Curves) -> list[Panel]:
    """Group curves: chosen with rejected, minimum with maximum, training with held-out, seeds.

    >>> curve = {"": [(1.0, 0.5)]}
    >>> [p.title for p in panels({"logps/chosen": curve, "loss": curve, "logps/rejected": curve})]
    ['loss', 'logps']
    >>> list(panels({"kl": curve, "eval_kl": curve})[0].lines)
    ['training', 'held out']
    """
    grouped: dict[str, dict[str, Curve]] = {}
    for metric, by_seed in curves.items():
        title, label = _place(metric, curves)
        for seed, curve in by_seed.items():
            name = ", ".join(part for part in (label, f"seed {seed}" if seed else "") if part)
            grouped.setdefault(title, {})[name] = curve
    ordered = sorted(grouped, key=lambda title: (_rank(title), list(grouped).index(title)))
    return [Panel(title, grouped[title]) for title in ordered]


def _place(metric: str, curves: Mapping[str, object]) -> tuple[str, str]:
    """The panel of a metric, and its label there."""
    if match := _SIDES.fullmatch(metric):
        return match["panel"], match["side"]
    if (match := _RANGE.fullmatch(metric)) and f"max_{match['panel']}" in curves:
        return match["panel"], match["side"]
    if match := _HELD_OUT.fullmatch(metric):
        return match["panel"], "held out"
    return metric, "training" if f"eval_{metric}" in curves else ""


def _rank(title: str) -> int:
    return _FIRST.index(title) if title in _FIRST else len(_FIRST) + (title == "learning_rate")


def mean_of_part(curve: Sequence[tuple[float, float]], *, last: bool) -> float:
    """Mean of the first or the last third of a curve.

    >>> mean_of_part([(1, 1.0), (2, 2.0), (3, 6.0)], last=True)
    6.0
    """
    size = max(1, len(curve) // 3)
    part = curve[-size:] if last else curve[:size]
    return sum(value for _, value in part) / size
