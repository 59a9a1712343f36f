"""Q-learning and SARSA on CliffWalking-v1 while they explore: figure 6.4 of Sutton and Barto 2018.

    python benchmarks/cliff_walking.py docs/theme/cliff-walking.png

The settings are those of ``recipes/control/cliffwalking.yaml``, but the learning rate of SARSA is
constant, as in the book. The figure has the return of each episode, with exploring actions, as the
mean over the seeds of the recipe and over ten consecutive episodes. The table has the mean of the
last hundred episodes and the range of that mean over the seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from align.config.control.tabular import Tabular
from align.config.recipe import load_recipe
from align.control import spaces
from align.control.value_based.tabular import TabularTrainer
from align.report.panels import BLUE, RED, Panel, draw_panels

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


def draw(axes: Axes, returns: Mapping[str, tuple[NDArray[np.float64], str]]) -> None:
    """Draw the means over the seeds, smoothed over consecutive episodes, in their colors."""
    for name, (of_seeds, color) in returns.items():
        mean = of_seeds.mean(0).reshape(-1, SMOOTHED).mean(1)
        axes.plot(SMOOTHED * (np.arange(len(mean)) + 0.5), mean, color=color, label=name)
    axes.set(xlabel="episode", ylim=(LOWEST, 0), xlim=(0, None))
    axes.legend(frameon=False)


def main() -> None:
    """Train, print the table and write the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="the PNG file to write")
    file = parser.parse_args().file
    curves = {}
    for name, stage in load_recipe(RECIPE).stages.items():
        assert isinstance(stage, Tabular)
        config = stage.model_copy(update={"schedule": "constant"})
        returns = episode_returns(config)
        last = returns[:, -LAST:].mean(1)
        print(
            f"| {name} | {last.mean():.1f} | {last.min():.1f} to {last.max():.1f} |",
            flush=True,
        )
        curves[name] = returns, COLORS[config.algorithm]
    draw_panels([Panel("return while exploring", partial(draw, returns=curves))], file)


if __name__ == "__main__":
    main()
