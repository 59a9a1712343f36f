"""Learning curves of several seeds in one picture: how well, and what the updates did on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Point = Mapping[str, Any]
PANELS = (
    ("policy_loss", "policy loss"),
    ("value_loss", "value loss"),
    ("explained_variance", "explained variance"),
    ("entropy", "entropy (nats)"),
    ("kl", "KL(old, new) (nats)"),
    ("clip_fraction", "clip fraction"),
)
GRID = 200  # points to which the seeds' curves are interpolated, for a mean and a spread
BLUE, RED = "#2563a8", "#b4432f"


def draw(curves: Mapping[int, Sequence[Point]], file: Path, *, title: str) -> None:
    """Draw ``curves``, by seed, into a PNG file: the mean over seeds, its spread, and each seed.

    What stays at 0 is left out: with one step an update, KL and clip fraction do, and the policy's loss if whitened.
    """
    import matplotlib

    matplotlib.use("agg", force=False)
    import matplotlib.pyplot as plt

    panels = [("return", "mean return of the last 100 episodes"), *PANELS]
    variance = "gradient_variance/without"
    if any(variance in point for curve in curves.values() for point in curve):
        panels.append((variance, "gradient variance"))
    panels = [(key, label) for key, label in panels if _moves(curves, key)]
    rows = -(-(len(panels) + 1) // 4)  # the first panel takes two places of four
    figure = plt.figure(figsize=(15, 3.4 * rows), layout="constrained")
    grid = figure.add_gridspec(rows, 4)
    places = [grid[0, :2]]
    places += [grid[n // 4, n % 4] for n in range(2, rows * 4)]
    for place, (key, label) in zip(places, panels, strict=False):
        axes = figure.add_subplot(place)
        if key == variance:
            _spread(axes, curves, variance, RED, "without baseline")
            _spread(axes, curves, "gradient_variance/with_baseline", BLUE, "with baseline")
            axes.set_yscale("log")
            axes.legend(frameon=False, fontsize=8)
        else:
            _spread(axes, curves, key, BLUE, None)
        axes.set_title(label, fontsize=10, loc="left")
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.xaxis.set_major_formatter(_short)
    seeds = f"{len(curves)} seed{'s' * (len(curves) > 1)}"
    figure.suptitle(
        f"{title}: {seeds}, against environment steps; line: mean, band: lowest to highest seed",
        fontsize=11,
        x=0.01,
        ha="left",
    )
    figure.savefig(file, dpi=100)
    plt.close(figure)


def _moves(curves: Mapping[int, Sequence[Point]], key: str) -> bool:
    return any((np.abs(_line(curve, key)[1]) > 1e-5).any() for curve in curves.values())


def _short(steps: float, place: float | None = None) -> str:
    return f"{steps / 1e6:g} M" if steps >= 1e6 else f"{steps / 1e3:g} k" if steps else "0"


def _line(curve: Sequence[Point], key: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(p["steps"], p[key]) for p in curve if p.get(key) is not None]
    return np.array([p[0] for p in points]), np.array([p[1] for p in points], dtype=float)


def _spread(
    axes: Any, curves: Mapping[int, Sequence[Point]], key: str, color: str, label: str | None
) -> None:
    lines = [line for line in (_line(curve, key) for curve in curves.values()) if line[0].size]
    if not lines:
        return
    steps = np.linspace(max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines), GRID)
    together = np.stack([np.interp(steps, *line) for line in lines])
    for line in lines:
        axes.plot(*line, color=color, linewidth=0.5, alpha=0.35)
    if len(lines) > 1:
        axes.fill_between(
            steps, together.min(0), together.max(0), color=color, alpha=0.15, linewidth=0
        )
    axes.plot(steps, together.mean(0), color=color, linewidth=1.6, label=label)
