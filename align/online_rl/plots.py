"""The picture of an online-RL run, ``curves.png``, drawn from ``metrics.jsonl``.

It shows score, each of several rewards, KL, entropy, length, missing eos, clip fraction and
explained variance against steps, and reward and gold score against the square root of the KL, where
over-optimization is visible (Gao et al. 2022, arXiv:2210.10760, figure 1).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from align.online_rl.results import reward_parts, rewards_of
from align.report.panels import BLUE, RED, Panel, draw_panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Point = dict[str, float]
"""The metrics of a step."""

PICTURE = "curves.png"
OVER_OPTIMIZATION = "reward and gold score against √KL(policy, reference)"
REWARDS = "each reward, without its weight"
PANELS = (
    ("score", "score"),
    ("gold", "gold score"),
    ("kl", "KL(policy, reference), nats per completion"),
    ("kl_coef", "KL coefficient"),
    ("entropy", "entropy, nats per token"),
    ("tokens", "tokens per completion"),
    ("missing_eos", "share without eos"),
    ("clip_fraction", "clip fraction"),
    ("explained_variance", "explained variance"),
    ("grad_norm", "gradient norm"),
)
"""Metric and title of each panel."""


def draw(output_dir: Path) -> None:
    """Draw ``metrics.jsonl`` into ``curves.png``."""
    text = (output_dir / "metrics.jsonl").read_text(encoding="utf-8")
    points: list[Point] = [
        {k: v for k, v in json.loads(line).items() if isinstance(v, int | float)}
        for line in text.splitlines()
    ]
    steps = [p for p in points if p.keys() >= {"step", "score", "kl", "reward"}]
    held_out = [p for p in points if "eval_score" in p]
    panels = [Panel(OVER_OPTIMIZATION, partial(draw_over_optimization, steps=steps))]
    if parts := reward_parts(rewards_of(steps[0])) if steps else {}:
        panels.append(Panel(REWARDS, partial(_draw_rewards, names=list(parts), steps=steps)))
    panels += [
        Panel(title, partial(_draw_metric, key=key, steps=steps, held_out=held_out))
        for key, title in PANELS
        if any(key in p for p in steps)
    ]
    draw_panels(panels, output_dir / PICTURE, row_height=3.2, dpi=110)


def _draw_metric(
    axes: Axes, *, key: str, steps: Sequence[Point], held_out: Sequence[Point]
) -> None:
    points = [p for p in steps if key in p]
    axes.plot([p["step"] for p in points], [p[key] for p in points], color=BLUE, linewidth=1)
    points = [p for p in held_out if f"eval_{key}" in p]
    if points:
        axes.plot(
            [p["step"] for p in points],
            [p[f"eval_{key}"] for p in points],
            color=RED,
            marker="o",
            markersize=3,
            linewidth=1,
            label="held out",
        )
        axes.legend(frameon=False, fontsize=8)


def _draw_rewards(axes: Axes, *, names: Sequence[str], steps: Sequence[Point]) -> None:
    parts = [reward_parts(rewards_of(p)) for p in steps]
    for name in names:
        values = [part.get(name, math.nan) for part in parts]
        axes.plot([p["step"] for p in steps], values, linewidth=1, label=name)
    axes.legend(frameon=False, fontsize=8)


def draw_over_optimization(axes: Axes, *, steps: Sequence[Point]) -> None:
    """Reward, and the gold score if it exists, against the square root of the KL."""
    distance = [math.sqrt(max(0.0, p["kl"])) for p in steps]
    axes.plot(distance, [p["reward"] for p in steps], ".", color=BLUE, markersize=4, label="reward")
    axes.set_ylabel("reward", color=BLUE, fontsize=9)
    if any("gold" in p for p in steps):
        right = axes.twinx()
        gold = [p.get("gold", math.nan) for p in steps]
        right.plot(distance, gold, ".", color=RED, markersize=4, label="gold")
        right.set_ylabel("gold score", color=RED, fontsize=9)
        right.tick_params(labelsize=8)
        right.spines[["top"]].set_visible(False)
