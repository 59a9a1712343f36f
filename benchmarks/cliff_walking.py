"""Q-learning and SARSA on CliffWalking-v1 while they explore: figure 6.4 of Sutton and Barto 2018.

    python benchmarks/cliff_walking.py docs/theme/cliff-walking.png

The settings are those of ``recipes/control/cliffwalking.yaml``, but the learning rate of SARSA is
constant, as in the book. The figure has the return of each episode, with exploring actions, as the
mean over the seeds of the recipe and over ten consecutive episodes. The table has the mean of the
last hundred episodes and the range of that mean over the seeds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from align.config.control.tabular import Tabular
from align.config.recipe import load_recipe
from align.control import spaces
from align.control.value_based.tabular import TabularTrainer
from align.report.panels import BLUE, RED

RECIPE = Path(__file__).parents[1] / "recipes" / "control" / "cliffwalking.yaml"
EPISODES, SMOOTHED, LAST = 500, 10, 100
LOWEST = -100.0
"""Lower end of the axis: the first episodes return less."""
COLORS = {"sarsa": BLUE, "q_learning": RED}


def episode_returns(config: Tabular) -> NDArray[np.float64]:
    """Returns ``[seeds, episodes]`` of the episodes from which a table is learned."""
    spec = spaces.inspect_env(*config.gym_environments)
    rows = []
    for seed in config.seeds:
        trainer = TabularTrainer(config, spec, seed)
        row = []
        for trainer.episodes in range(EPISODES):
            row.append(trainer.run_episode())
        trainer.close()
        rows.append(row)
    return np.array(rows)


def draw(axes: Axes, returns: NDArray[np.float64], label: str, color: str) -> None:
    """Draw the mean over the seeds, smoothed over consecutive episodes."""
    mean = returns.mean(0).reshape(-1, SMOOTHED).mean(1)
    axes.plot(SMOOTHED * (np.arange(len(mean)) + 0.5), mean, color=color, label=label)


def main() -> None:
    """Train, print the table and write the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="the PNG file to write")
    file = parser.parse_args().file
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot()
    for name, stage in load_recipe(RECIPE).stages.items():
        assert isinstance(stage, Tabular)
        config = stage.model_copy(update={"schedule": "constant"})
        returns = episode_returns(config)
        last = returns[:, -LAST:].mean(1)
        print(
            f"| {name} | {last.mean():.1f} | {last.min():.1f} to {last.max():.1f} |",
            flush=True,
        )
        draw(axes, returns, name, COLORS[config.algorithm])
    axes.set(xlabel="episode", ylabel="return while exploring", ylim=(LOWEST, 0), xlim=(0, None))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=100)


if __name__ == "__main__":
    main()
