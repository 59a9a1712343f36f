"""Pictures of the report as SVG for the page: text stays text, and dark pages get light text."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.report.curves import Panel
from align.report.page.contents import StageContents, read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"
"""Color of text and axes while drawing; replaced by the color of the page's text."""
COLORS = ("#3b82c4", "#d9643a", "#3a9d6e", "#9a6fc4", "#b8912b", "#6b7f93", "#c45b8a", "#4fa3a3")
BINS = 5
"""Groups of equal size in the picture of length against win rate."""


def learning_curve(panel: Panel, stage: str) -> str:
    """One metric of a stage over its steps, with a line for each seed, side or split."""

    def draw(figure: Figure) -> None:
        axes = figure.add_axes((0.19, 0.13, 0.78, 0.68))
        figure.text(0.02, 0.92, panel.title, fontsize=9)  # above the power of ten of the axis
        for color, (label, curve) in enumerate(panel.lines.items()):
            steps, values = zip(*curve, strict=True)
            axes.plot(
                steps,
                values,
                color=COLORS[color % len(COLORS)],
                label=label,
                linewidth=1.3,
                marker="o" if len(curve) == 1 else None,
            )
        if 1 < len(panel.lines) <= len(COLORS):
            axes.legend(fontsize=7, frameon=False, labelcolor=INK)

    return _svg(draw, (3.2, 2.1), f"{panel.title} of {stage}, by step")


def win_rates(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """Win rates with intervals, and those at equal length, against one half."""
    height = 0.9 + 0.38 * len(comparisons)

    def draw(figure: Figure) -> None:
        names = [f"{c['policy']} : {c['baseline']} ({c['judge']})" for c in comparisons]
        left = min(0.6, 0.03 + 0.0085 * max(map(len, names)))
        axes = figure.add_axes((left, 0.45 / height, 0.96 - left, 1 - 0.6 / height))
        for place, each in enumerate(comparisons):
            low, high = each["ci"]
            axes.plot([low, high], [place, place], color=COLORS[0], linewidth=2)
            axes.plot(each["win_rate"], place, "o", color=COLORS[0], label="win rate (95 %)")
            controlled = each.get("length_controlled_win_rate")
            if controlled is not None:
                axes.plot(controlled, place, "D", color=COLORS[1], fillstyle="none",
                          label="at equal length")  # fmt: skip
        axes.axvline(0.5, color=INK, linewidth=0.8, linestyle=":")
        axes.set_xlim(0, 1)
        axes.set_ylim(len(comparisons) - 0.5, -0.5)
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel("share of held-out comparisons won", fontsize=8)
        handles = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
        axes.legend(handles.values(), handles.keys(), fontsize=7, frameon=False, labelcolor=INK)

    return _svg(draw, (9.0, height), "Win rates with 95 % intervals")


def length_and_outcome(file: Path) -> str:
    """Win rate by how much longer the policy's completion is; empty where lengths are equal."""
    by_policy: dict[str, list[tuple[float, float]]] = {}
    for row in read_rows(file):
        difference = len(row["policy_completion"] or "") - len(row["baseline_completion"] or "")
        if row["outcome"] is not None and row["outcome"] == row["outcome"]:
            by_policy.setdefault(row["policy"], []).append((difference, row["outcome"]))
    drawn = {k: sorted(v) for k, v in by_policy.items() if len({d for d, _ in v}) >= BINS}
    if not drawn:
        return ""

    def draw(figure: Figure) -> None:
        axes = figure.add_axes((0.1, 0.17, 0.88, 0.8))
        for color, (policy, points) in enumerate(drawn.items()):
            size = len(points) / BINS
            groups = [points[round(k * size) : round((k + 1) * size)] for k in range(BINS)]
            xs = [sum(d for d, _ in g) / len(g) for g in groups if g]
            ys = [sum(o for _, o in g) / len(g) for g in groups if g]
            axes.plot(xs, ys, "o-", color=COLORS[color % len(COLORS)], label=policy)
        axes.axhline(0.5, color=INK, linewidth=0.8, linestyle=":")
        axes.set_ylim(0, 1)
        axes.set_xlabel("characters of the policy's completion minus the baseline's", fontsize=8)
        axes.set_ylabel("win rate", fontsize=8)
        axes.legend(fontsize=7, frameon=False, labelcolor=INK)

    return _svg(draw, (6.0, 2.8), "Win rate by difference in length, in five groups of equal size")


def kl_and_score(stage: StageContents) -> str:
    """Scores of the training against KL to the reference; empty without common steps."""
    at = dict(stage.curves.get("kl", {}).get("", ()))
    points = {
        name: [(at[step], value) for step, value in stage.curves[name].get("", ()) if step in at]
        for name in ("score", "gold")
        if name in stage.curves
    }
    drawn = {name: each for name, each in points.items() if each}
    if not drawn:
        return ""

    def draw(figure: Figure) -> None:
        axes = figure.add_axes((0.1, 0.17, 0.88, 0.8))
        for color, (name, each) in enumerate(drawn.items()):
            axes.plot(*zip(*each, strict=True), "o", markersize=3, color=COLORS[color], label=name)
        axes.set_xlabel("KL to the reference, nats per completion", fontsize=8)
        axes.legend(fontsize=7, frameon=False, labelcolor=INK)

    return _svg(draw, (6.0, 2.8), f"Score against KL of {stage.name}")


def calibration(bins: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy of a reward model against its own confidence."""

    def draw(figure: Figure) -> None:
        axes = figure.add_axes((0.1, 0.17, 0.88, 0.8))
        axes.plot([0.5, 1], [0.5, 1], color=INK, linewidth=0.8, linestyle=":")
        drawn = [each for each in bins if each["pairs"]]
        axes.plot(
            [each["confidence"] for each in drawn],
            [each["accuracy"] for each in drawn],
            "o-",
            color=COLORS[0],
        )
        axes.set_xlabel("predicted probability of the likelier completion", fontsize=8)
        axes.set_ylabel("share in which it is the chosen one", fontsize=8)

    return _svg(draw, (4.2, 3.2), "Calibration of the reward model")


def _svg(draw: Callable[[Figure], None], size: tuple[float, float], label: str) -> str:
    """Draw a figure and return it as an SVG element with a label for screen readers."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as NewFigure

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": label,  # ids that differ between pictures and not between runs
        "font.family": "sans-serif",
        "font.size": 8,
        "text.parse_math": False,  # a name may have dollar signs
        "text.color": INK,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "grid.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(style), warnings.catch_warnings():
        # The page's text is drawn by the browser, which has other fonts.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = NewFigure(figsize=size)
        FigureCanvasSVG(figure)
        draw(figure)
        for axes in figure.axes:
            _tidy(axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()[file.getvalue().index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    escaped = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    width = f"{size[0] * 96:.0f}px"
    return svg.replace(
        "<svg ", f'<svg role="img" aria-label="{escaped}" style="max-width:{width}" ', 1
    )


def _tidy(axes: Axes) -> None:
    axes.tick_params(labelsize=7)
    axes.set_axisbelow(True)
