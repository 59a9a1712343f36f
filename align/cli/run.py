"""The command line of ``align/run.py``, and the options that it shares with ``align run``.

The script is started by ``accelerate launch``, once per process; ``align run`` starts the launcher.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from align.runtime import signals
from align.runtime.environment import quiet_libraries
from align.runtime.exit_codes import RESUMES, guarded


def _results_folder(text: str | Path) -> Path:
    """The folder of ``--runs``, with the home directory for a ``~`` that a shell leaves there."""
    from align.config.yaml_loader import CONTROL_CHARACTER

    folder, text = Path(text), str(text)
    if not text.strip() or CONTROL_CHARACTER.search(text):
        raise typer.BadParameter(f"{text!r} names no folder; name one, such as runs")
    try:
        return folder.expanduser()
    except RuntimeError as error:  # an unknown user, or no home directory
        raise typer.BadParameter(f"{folder}: {error}") from None


RecipePath = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE", help="A file, or the name of a shipped recipe: dpo, control/cartpole_ppo."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[STAGE.KEY=VALUE]...",
        help="Overrides, such as dpo.beta=0.3 or all.seed=1.",
    ),
]
Runs = Annotated[
    Path, typer.Option(metavar="DIR", parser=_results_folder, help="The folder for results.")
]
Force = Annotated[
    str | None,
    typer.Option(metavar="STAGE|all", help="Remove the results of a stage and run it again."),
]


def _run_name(text: str) -> str:
    """A name for the folder of a run: one part of a path, unlike the folder of a stage."""
    if not re.fullmatch(r"\w[\w.=+-]*", text) or re.search(r"-[0-9a-f]{12}$", text):
        raise typer.BadParameter(
            f"{text!r} is no name of a run; use letters, digits and _ . = + -, such as seed1"
        )
    return text


Name = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        parser=_run_name,
        help="The name of the run, under which its summary and report are; default: the recipe's.",
    ),
]
Until = Annotated[
    str | None,
    typer.Option(metavar="STAGE", help="Run this stage and those whose results it needs."),
]


def run_recipe(
    recipe: RecipePath,
    overrides: Overrides = None,
    runs: Runs = Path("runs"),
    force: Force = None,
    until: Until = None,
    name: Name = None,
) -> None:
    """Run the unfinished stages of a recipe and show the results."""
    quiet_libraries()
    from align.config.recipe import read_recipe
    from align.pipeline import runner
    from align.pipeline.summary import show_summary
    from align.runtime import artifacts, distributed, progress

    loaded = replace(read_recipe(recipe, overrides or []), run_name=name)
    with progress.display() as display:
        summary = runner.run_recipe(loaded, runs, display, force=force, until=until)
    show_summary(summary, display.console, runs / loaded.name / artifacts.SUMMARY)
    if distributed.is_main():
        from align.cli.next_steps import show_next_steps

        show_next_steps(summary, runs, loaded.name, display.console)


def main() -> None:
    """Run the command line of ``align/run.py``."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(run_recipe)
    signals.end_with_launcher()
    guarded(app, interrupted=f"interrupted: {RESUMES}")
