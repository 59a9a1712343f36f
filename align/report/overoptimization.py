"""The figure of over-optimization: gold score gained against the distance from the initial policy.

One panel per size of the reward model, one color per number of pairs; dots are measurements of
runs, lines the fitted law, bands its interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from align.report.panels import Panel, draw_panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#b4432f", "#d39a2d", "#2563a8", "#3f8f5f", "#7b4fa0")


@dataclass(frozen=True, slots=True)
class Curve:
    """Measurements with one reward model, and the law that is fitted to them."""

    panel: str
    """Title of the panel that shows the curve."""
    label: str
    points: Sequence[tuple[float, float]]
    """Distance and gain of each measurement."""
    grid: Sequence[float]
    """Distances at which the law is drawn."""
    law: Sequence[float]
    low: Sequence[float]
    """Lower ends of the interval of the law."""
    high: Sequence[float]


def draw(curves: Sequence[Curve], file: Path) -> None:
    """Draw all curves into a PNG file, in panels by their titles."""
    panels = [
        Panel(
            f"gold score gained against √KL(policy, initial policy); {title}",
            partial(_draw_curves, curves=[each for each in curves if each.panel == title]),
        )
        for title in dict.fromkeys(each.panel for each in curves)
    ]
    draw_panels(panels, file, row_height=4.5)


def _draw_curves(axes: Axes, *, curves: Sequence[Curve]) -> None:
    for color, curve in zip(COLORS, curves, strict=False):
        x, y = zip(*curve.points, strict=True)
        axes.plot(x, y, ".", color=color, markersize=4, alpha=0.6)
        axes.plot(curve.grid, curve.law, color=color, linewidth=1.5, label=curve.label)
        axes.fill_between(curve.grid, curve.low, curve.high, color=color, alpha=0.12, linewidth=0)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.legend(frameon=False, fontsize=8)
