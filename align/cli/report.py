"""The command `align report`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from align.cli.run import Runs


def report(
    run: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...", help="Recipes, names of runs in --runs, or folders of runs."
        ),
    ],
    runs: Runs = Path("runs"),
    compare: Annotated[
        bool, typer.Option("--compare", help="Write one page that compares the runs.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --compare: the page to write.")
    ] = None,
) -> None:
    """Write the report of finished runs, or their comparison: HTML that needs no network."""
    from align.errors import UserError, printable
    from align.report.page.render import write_comparison, write_report

    folders = list(dict.fromkeys(find_run(each, runs) for each in run))
    if not compare and out is not None:
        raise UserError("--out names the page of --compare; a report is written beside its run")
    if not compare:
        for folder in folders:
            print(printable(str(write_report(folder))))
        return
    if len(folders) < 2:
        raise UserError("--compare: expected at least two runs; `align runs` lists them")
    print(printable(str(write_comparison(folders, out or runs / "comparison.html"))))


def find_run(run: str, runs: Path) -> Path:
    """The folder of a run: a folder with a ``summary.json``, the name of one, or a recipe's.

    Raises:
        UserError: There is no such run.
    """
    from align.config.recipe import read_recipe
    from align.errors import ArtifactError, RecipeError, nearest
    from align.runtime.artifacts import SUMMARY

    known = [file.parent.name for file in sorted(runs.glob(f"*/{SUMMARY}"))]
    for folder in (Path(os.path.expanduser(run)), runs / run):
        if (folder / SUMMARY).is_file():
            return folder
    try:
        name = read_recipe(run).name
    except RecipeError:
        raise ArtifactError(
            f"{run}: neither a run in {runs} nor a recipe"
            + (nearest(run, known) if known else "; no run is finished there")
        ) from None
    if name not in known:
        raise ArtifactError(
            f"{runs / name}: no finished run of {run}; `align run {run}` finishes it"
        )
    return runs / name
