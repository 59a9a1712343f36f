"""The figure of the frontier: reward against KL of policies that several methods trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from align.report.panels import Panel, draw_panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#2563a8", "#b4432f", "#3f8f5f", "#d39a2d", "#7b4fa0", "#555555")


@dataclass(frozen=True, slots=True)
class FrontierPoint:
    """A policy: how far it is from the initial one, and how much reward it gained."""

    method: str
    """Points of one method are joined, in the order of their KL."""
    kl: float
    """KL divergence from the initial policy, in nats per completion."""
    kl_interval: tuple[float, float]
    gain: float
    """Mean reward above that of the initial policy."""
    gain_interval: tuple[float, float]


def draw(points: Sequence[FrontierPoint], file: Path, *, reward: str) -> None:
    """Draw all points with their intervals into a PNG file; ``reward`` names the axis."""
    title = f"{reward} gained against KL(policy, initial policy), nats per completion"
    draw_panels([Panel(title, partial(_draw_points, points=points))], file, row_height=4.5)


def _draw_points(axes: Axes, *, points: Sequence[FrontierPoint]) -> None:
    for color, method in zip(COLORS, dict.fromkeys(p.method for p in points), strict=False):
        own = sorted((p for p in points if p.method == method), key=lambda p: p.kl)
        axes.errorbar(
            [p.kl for p in own],
            [p.gain for p in own],
            xerr=_distances([p.kl for p in own], [p.kl_interval for p in own]),
            yerr=_distances([p.gain for p in own], [p.gain_interval for p in own]),
            color=color,
            marker="o",
            markersize=4,
            linewidth=1,
            elinewidth=0.7,
            label=method,
        )
    axes.set_xlim(left=0)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def _distances(
    values: Sequence[float], intervals: Sequence[tuple[float, float]]
) -> tuple[list[float], list[float]]:
    """How far the ends of the intervals are below and above the values."""
    pairs = list(zip(values, intervals, strict=True))
    return (
        [max(0.0, value - low) for value, (low, _) in pairs],
        [max(0.0, high - value) for value, (_, high) in pairs],
    )
