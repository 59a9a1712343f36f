"""The command `align report`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from align.cli.run import Runs


def report(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="A recipe, the name of a run in --runs, or the folder of a run."
        ),
    ],
    runs: Runs = Path("runs"),
) -> None:
    """Write the report of a finished run: one HTML file that needs no network."""
    from align.errors import printable
    from align.report.page.render import write_report

    print(printable(str(write_report(find_run(run, runs)))))


def find_run(run: str, runs: Path) -> Path:
    """The folder of a run: a folder with a ``summary.json``, the name of one, or a recipe's.

    Raises:
        UserError: There is no such run.
    """
    from align.config.recipe import read_recipe
    from align.errors import ArtifactError, RecipeError, nearest

    known = [file.parent.name for file in sorted(runs.glob("*/summary.json"))]
    for folder in (Path(os.path.expanduser(run)), runs / run):
        if (folder / "summary.json").is_file():
            return folder
    try:
        name = read_recipe(run).name
    except RecipeError:
        raise ArtifactError(
            f"{run}: neither a run in {runs} nor a recipe{nearest(run, known)}"
        ) from None
    if name not in known:
        raise ArtifactError(
            f"{runs / name}: no finished run of {run}; `align run {run}` finishes it"
        )
    return runs / name
