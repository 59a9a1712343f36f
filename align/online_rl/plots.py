"""What a run of PPO shows: a table that grows as it trains, what the policy said, and one picture at the end.

The picture has score, KL, entropy, length, missing eos, clip fraction and explained variance against steps, and the
reward and gold against the square root of the KL, where over-optimisation is seen: Gao et al. 2023, arXiv:2210.10760,
figure 1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

LINES = 20  # of the table, about
SAMPLES, PICTURE = "samples.jsonl", "ppo.png"
COLUMNS = (  # key, title, format
    ("score", "score", "8.3f"),
    ("gold", "gold", "7.3f"),
    ("kl", "KL", "7.2f"),
    ("kl_per_token", "KL/token", "9.4f"),
    ("kl_coef", "coef", "7.4f"),
    ("entropy", "entropy", "8.3f"),
    ("tokens", "tokens", "7.1f"),
    ("missing_eos", "no eos", "7.3f"),
    ("clip_fraction", "clipped", "8.3f"),
    ("explained_variance", "expl.var", "9.3f"),
)
PANELS = (
    ("score", "score"),
    ("gold", "gold score"),
    ("kl", "KL(policy, reference), nats a completion"),
    ("kl_coef", "KL coefficient"),
    ("entropy", "entropy, nats a token"),
    ("tokens", "tokens a completion"),
    ("missing_eos", "share without eos"),
    ("clip_fraction", "clip fraction"),
    ("explained_variance", "explained variance"),
    ("grad_norm", "gradient norm"),
)
BLUE, RED = "#2563a8", "#b4432f"


def header(figures: Mapping[str, float]) -> str:
    """Titles of the columns that a run has."""
    cells = [f"{title:>{_width(form)}}" for key, title, form in COLUMNS if key in figures]
    return "".join([f"{'step':>6}", *cells, f"{'s/step':>8}"])


def line(step: int, figures: Mapping[str, float], columns: Collection[str]) -> str:
    """A row of the table, in the columns that its header has."""
    cells = [
        f"{figures[key]:{form}}" if key in figures else f"{'–':>{_width(form)}}"
        for key, _, form in COLUMNS
        if key in columns
    ]
    return "".join([f"{step:>6}", *cells, f"{figures['seconds']:8.2f}"])


def _width(form: str) -> int:
    return int(form.partition(".")[0])


def samples(folder: Path, step: int, told: Mapping[str, Any], *, n: int) -> None:
    """Keep the first ``n`` completions of a step, with their scores."""
    numbers = [key for key in told if key not in ("texts", "messages")]
    with (folder / SAMPLES).open("a", encoding="utf-8") as file:
        for i in range(min(n, len(told["texts"]))):
            row = {"step": step, "prompt": told["messages"][i], "completion": told["texts"][i]}
            row |= {key: round(float(told[key][i]), 6) for key in numbers}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read(folder: Path) -> list[dict[str, float]]:
    """The steps of ``metrics.jsonl``."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(each) for each in lines]


def draw(folder: Path) -> None:
    """Draw ``metrics.jsonl`` into ``ppo.png``."""
    import matplotlib

    matplotlib.use("agg", force=False)
    import matplotlib.pyplot as plt

    points = read(folder)
    steps = [p for p in points if "score" in p]
    held_out = [p for p in points if "eval_score" in p]
    panels = [(key, title) for key, title in PANELS if any(key in p for p in steps)]
    rows = math.ceil((len(panels) + 2) / 4)
    figure = plt.figure(figsize=(15, 3.2 * rows), layout="constrained")
    grid = figure.add_gridspec(rows, 4)
    axes = figure.add_subplot(grid[0, :2])
    optimisation(axes, steps)
    places = [grid[n // 4, n % 4] for n in range(2, rows * 4)]
    for place, (key, title) in zip(places, panels, strict=False):
        axes = figure.add_subplot(place)
        there = [p for p in steps if key in p]
        axes.plot([p["step"] for p in there], [p[key] for p in there], color=BLUE, linewidth=1)
        outside = [p for p in held_out if f"eval_{key}" in p]
        if outside:
            axes.plot(
                [p["step"] for p in outside],
                [p[f"eval_{key}"] for p in outside],
                color=RED,
                marker="o",
                markersize=3,
                linewidth=1,
                label="held out",
            )
            axes.legend(frameon=False, fontsize=8)
        _plain(axes, title)
    figure.savefig(folder / PICTURE, dpi=110)
    plt.close(figure)


def optimisation(axes: Any, steps: list[dict[str, float]]) -> None:
    """Reward, and gold where there is one, against the square root of the KL."""
    distance = [math.sqrt(max(0.0, p["kl"])) for p in steps]
    axes.plot(distance, [p["reward"] for p in steps], ".", color=BLUE, markersize=4, label="reward")
    axes.set_ylabel("reward", color=BLUE, fontsize=9)
    _plain(axes, "what is optimised and what is meant, against √KL(policy, reference)")
    if any("gold" in p for p in steps):
        other = axes.twinx()
        other.plot(
            distance,
            [p.get("gold", math.nan) for p in steps],
            ".",
            color=RED,
            markersize=4,
            label="gold",
        )
        other.set_ylabel("gold score", color=RED, fontsize=9)
        other.tick_params(labelsize=8)
        other.spines[["top"]].set_visible(False)


def _plain(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
