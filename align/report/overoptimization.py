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
    """Draw all curves into a PNG file, in panels by their titles and with the same axes."""
    points = [point for curve in curves for point in curve.points]
    gains = [gain for _, gain in points] + [gain for curve in curves for gain in curve.law]
    farthest = max(distance for distance, _ in points)
    margin = 0.05 * (max(gains) - min(gains))
    panels = [
        Panel(
            title,
            partial(
                _draw_curves,
                curves=[each for each in curves if each.panel == title],
                x_limits=(0, 1.02 * farthest),
                y_limits=(min(gains) - margin, max(gains) + margin),
            ),
        )
        for title in dict.fromkeys(each.panel for each in curves)
    ]
    draw_panels(panels, file, row_height=4, dpi=120, first_places=1)


def _draw_curves(
    axes: Axes,
    *,
    curves: Sequence[Curve],
    x_limits: tuple[float, float],
    y_limits: tuple[float, float],
) -> None:
    for color, curve in zip(COLORS, curves, strict=False):
        x, y = zip(*curve.points, strict=True)
        axes.plot(x, y, ".", color=color, markersize=4, alpha=0.6)
        axes.plot(curve.grid, curve.law, color=color, linewidth=1.5, label=curve.label)
        axes.fill_between(curve.grid, curve.low, curve.high, color=color, alpha=0.12, linewidth=0)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set(
        xlim=x_limits,
        ylim=y_limits,
        xlabel="√KL(policy, initial policy)",
        ylabel="gold score gained",
    )
    axes.legend(frameon=False, fontsize=8)
