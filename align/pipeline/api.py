"""Plan and run recipes from Python, with typed results.

The functions do what ``align plan`` and ``align/run.py`` do, in this process. Left out: several
processes; use ``accelerate launch align/run.py`` for those.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from align.config.recipe import Recipe, read_recipe
from align.pipeline import runner
from align.pipeline.plan import PlannedStage
from align.pipeline.plan import plan as plan_recipe
from align.pipeline.runner import FinishedStage
from align.runtime import progress
from align.runtime.environment import quiet_libraries

RecipeOrPath = Recipe | Mapping[str, Any] | Path | str


class Run(Mapping[str, FinishedStage]):
    """The finished stages of a recipe by name, in order.

    The ``metrics`` of ``evaluate``, ``reward`` and ``ppo`` are frozen dataclasses, see
    :mod:`align.evaluation.results` and :mod:`align.online_rl.results`; those of other stages are
    dictionaries.
    """

    def __init__(self, stages: Mapping[str, FinishedStage], seconds: float) -> None:
        self._stages = dict(stages)
        self.seconds = seconds
        """Duration of this run."""

    def __getitem__(self, name: str) -> FinishedStage:
        return self._stages[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stages)

    def __len__(self) -> int:
        return len(self._stages)

    def __repr__(self) -> str:
        stages = ", ".join(f"{stage.name}: {stage.status}" for stage in self.values())
        return f"Run({stages})"


def plan(
    recipe: RecipeOrPath,
    runs: Path | str = "runs",
    *,
    until: str | None = None,
    force: str | None = None,
) -> list[PlannedStage]:
    """Plan the stages of a recipe, or those that ``until`` needs. Nothing is started or written.

    Raises:
        UserError: The recipe, an option or an input is invalid.
    """
    return plan_recipe(_loaded(recipe), Path(runs).expanduser(), until=until, force=force)


def run(
    recipe: RecipeOrPath,
    runs: Path | str = "runs",
    *,
    until: str | None = None,
    force: str | None = None,
) -> Run:
    """Run the unfinished stages of a recipe, in its order, and reuse the finished ones.

    ``until`` names a stage: it and the stages whose results it needs are run. ``force`` names a
    stage, or ``all``, that runs even if it is finished.

    Raises:
        UserError: One line for each error in the recipe, the data or the models.
    """
    quiet_libraries()
    loaded = _loaded(recipe)
    with progress.display() as display:
        folder = Path(runs).expanduser()
        summary = runner.run_recipe(loaded, folder, display, until=until, force=force)
    stages = {
        stage.name: replace(
            stage, metrics=_typed(stage.metrics, loaded.stages[stage.name].metrics_class)
        )
        for stage in summary.stages
    }
    return Run(stages, summary.seconds)


def _loaded(recipe: RecipeOrPath) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else read_recipe(recipe)


def _typed(metrics: dict[str, Any], metrics_class: str | None) -> Any:
    """Metrics as an instance of ``module:Class``; unchanged without a class."""
    if metrics_class is None:
        return metrics
    module, _, name = metrics_class.partition(":")
    return getattr(importlib.import_module(module), name).from_metrics(metrics)
