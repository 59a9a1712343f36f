"""Learning curves of several seeds in one picture: returns, losses, diagnostics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from align.report.panels import BLUE, RED, Panel, draw_panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Point = Mapping[str, Any]
Curves = Mapping[int, Sequence[Point]]
"""The points of each seed's learning curve, by seed."""

PANELS = (
    ("return", "mean return of the last 100 episodes"),
    ("cost", "mean cost of the last 100 episodes"),
    ("multiplier", "multiplier of the cost"),
    ("exploitability", "exploitability"),
    ("success", "success rate of the last 100 episodes"),
    ("value", "value of the first state"),
    ("change", "largest change of a value"),
    ("policy_loss", "policy loss"),
    ("value_loss", "value loss"),
    ("explained_variance", "explained variance"),
    ("entropy", "entropy (nats)"),
    ("kl", "KL(old, new) (nats)"),
    ("clip_fraction", "clip fraction"),
)
VARIANCE = "gradient_variance/without"
VARIANCE_WITH_BASELINE = "gradient_variance/with_baseline"
FILE = "curves.png"
N_GRID = 200
"""Points to which the seeds' curves are interpolated, for their mean and their range."""


def draw_curves(curves: Curves, file: Path, *, title: str) -> None:
    """Draw the mean over seeds, the range from the lowest to the highest seed, and each seed.

    Metrics that stay at 0 are left out: KL and clip fraction where an update takes one step, and
    the policy loss where advantages are normalized.
    """
    panels = [
        Panel(label, partial(_draw_metric, curves=curves, key=key))
        for key, label in PANELS
        if _is_nonzero(curves, key)
    ]
    if _is_nonzero(curves, VARIANCE):
        panels.append(Panel("gradient variance", partial(_draw_variances, curves=curves)))
    seeds = f"{len(curves)} seed{'s' * (len(curves) > 1)}"
    draw_panels(
        panels,
        file,
        title=f"{title}: {seeds}, against environment steps; "
        "line: mean, band: lowest to highest seed",
    )


def _draw_metric(axes: Axes, *, curves: Curves, key: str) -> None:
    _draw_seeds(axes, curves, key, color=BLUE)
    axes.xaxis.set_major_formatter(_short)


def _draw_variances(axes: Axes, *, curves: Curves) -> None:
    _draw_seeds(axes, curves, VARIANCE, color=RED, label="without baseline")
    _draw_seeds(axes, curves, VARIANCE_WITH_BASELINE, color=BLUE, label="with baseline")
    axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=8)
    axes.xaxis.set_major_formatter(_short)


def _draw_seeds(
    axes: Axes, curves: Curves, key: str, *, color: str, label: str | None = None
) -> None:
    lines = [line for line in (_line(curve, key) for curve in curves.values()) if line[0].size]
    if not lines:
        return
    steps = np.linspace(max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines), N_GRID)
    interpolated = np.stack([np.interp(steps, *line) for line in lines])
    for line in lines:
        axes.plot(*line, color=color, linewidth=0.5, alpha=0.35)
    if len(lines) > 1:
        axes.fill_between(
            steps, interpolated.min(0), interpolated.max(0), color=color, alpha=0.15, linewidth=0
        )
    axes.plot(steps, interpolated.mean(0), color=color, linewidth=1.6, label=label)


def _is_nonzero(curves: Curves, key: str) -> bool:
    return any((np.abs(_line(curve, key)[1]) > 1e-5).any() for curve in curves.values())


def _line(curve: Sequence[Point], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the points that have the metric."""
    points = [(p["steps"], p[key]) for p in curve if p.get(key) is not None]
    return np.array([p[0] for p in points]), np.array([p[1] for p in points], dtype=float)


def _short(steps: float, place: float | None = None) -> str:
    """Axis label of a number of steps: ``200 k``, ``1.5 M``."""
    return f"{steps / 1e6:g} M" if steps >= 1e6 else f"{steps / 1e3:g} k" if steps else "0"
