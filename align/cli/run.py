"""Run a recipe: ``accelerate launch align/run.py RECIPE [STAGE.KEY=VALUE ...]``.

Started as a script, Python puts this file's folder first on its path, where ``align`` itself is not and where a module of
ours could shadow an installed one. So the checkout is put there instead, before anything else is imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from align.runtime.environment import quiet_libraries
from align.runtime.exit_codes import guarded

RecipePath = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="A recipe, such as recipes/dpo.yaml.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[STAGE.KEY=VALUE]...",
        help="Settings that differ, such as dpo.beta=0.3 or all.seed=1.",
    ),
]
Runs = Annotated[Path, typer.Option(metavar="DIR", help="Where results go.")]
Force = Annotated[
    str | None,
    typer.Option(metavar="STAGE|all", help="Run a stage anew: what it left is removed first."),
]
Until = Annotated[str | None, typer.Option(metavar="STAGE", help="Stop after this stage.")]


def run_recipe(
    recipe: RecipePath,
    overrides: Overrides = None,
    runs: Runs = Path("runs"),
    force: Force = None,
    until: Until = None,
) -> None:
    """Run the stages of a recipe that are not there yet, and show what came out."""
    quiet_libraries()
    from align.config.recipe import load_recipe
    from align.pipeline import runner
    from align.pipeline.summary import show_summary
    from align.runtime import progress

    read = load_recipe(recipe, overrides or [])
    with progress.display() as display:
        summary = runner.run_recipe(read, runs, display, force=force, until=until)
    show_summary(summary, display.console, runs / read.name / "summary.json")


def main() -> None:
    """Run ``align/run.py``'s command line."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(run_recipe)
    guarded(app)
