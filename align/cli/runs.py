"""The command `align runs`: what a runs folder holds, and the removal of what no run refers to."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from align.cli.run import Runs
from align.errors import UserError, counted
from align.runtime.durations import DAY, MINUTE, duration

if TYPE_CHECKING:
    from rich.console import Console

    from align.cli.inventory import StageFolder

LONGEST = 60  # characters of the settings of a stage


def runs(
    name: Annotated[
        str | None, typer.Argument(metavar="[STAGE]", help="Only stages of this name or kind.")
    ] = None,
    runs: Runs = Path("runs"),
    prune: Annotated[
        bool, typer.Option("--prune", help="Remove stages that no run refers to, after asking.")
    ] = False,
    older_than: Annotated[
        float, typer.Option(metavar="DAYS", min=0.0, help="With --prune: only stages this old.")
    ] = 1.0,
    yes: Annotated[bool, typer.Option("--yes", help="With --prune: do not ask.")] = False,
) -> None:
    """Show the stages in a runs folder: settings, result, age, size, and the runs that use them."""
    from align.cli.inventory import take_inventory
    from align.runtime.terminal import SafeConsole

    if name and prune:
        raise UserError(f"{name}: --prune looks at all stages; remove the name")
    console = SafeConsole(soft_wrap=True)
    if prune:
        _prune(console, runs, older_than=older_than, yes=yes)
        return
    inventory = take_inventory(runs)
    for problem in inventory.problems:
        console.print(f"warning: {problem}")
    shown = [s for s in inventory.stages if name is None or name in (s.name, _kind(s))]
    if name and not shown:
        raise UserError(f"{name}: no stage of this name in {runs}; `align runs` shows all")
    _print_stages(console, shown)
    free = sum(stage.bytes for stage in shown if not stage.runs)
    total = sum(stage.bytes for stage in shown)
    console.print(
        f"{counted(len(shown), 'stage')}, {_size(total)}; no run refers to {_size(free)} of them"
    )


def _removable(runs: Path, older_than: float) -> list[StageFolder]:
    """Stages that no run refers to and that are at least ``older_than`` days old."""
    from align.cli.inventory import take_inventory

    inventory = take_inventory(runs)
    if inventory.problems:
        raise UserError(
            *(f"{line}; --prune needs it: repair it or move it away" for line in inventory.problems)
        )
    return inventory.unreferenced(before=time.time() - older_than * DAY)


def _prune(console: Console, runs: Path, *, older_than: float, yes: bool) -> None:
    """Show what no run refers to, ask, and remove it."""
    from align.cli.inventory import remove

    stages = _removable(runs, older_than)
    if not stages:
        console.print("nothing to remove: runs refer to all stages, or the others are too new")
        return
    _print_stages(console, stages)
    total = _size(sum(stage.bytes for stage in stages))
    question = f"Remove {counted(len(stages), 'stage')}, {total}? This cannot be undone."
    if not yes and not _can_ask():
        raise UserError(f"--prune would remove {counted(len(stages), 'stage')}; confirm with --yes")
    if not (yes or typer.confirm(question)):
        console.print("nothing was removed")
        return
    # A run may have begun to use some of them since they were listed.
    still = {stage.folder for stage in _removable(runs, older_than)}
    removed = [stage for stage in stages if stage.folder in still]
    for stage in removed:
        remove(stage)
    total = _size(sum(stage.bytes for stage in removed))
    console.print(f"removed {counted(len(removed), 'stage')}, {total}")


def _can_ask() -> bool:
    return sys.stdin.isatty()


def _print_stages(console: Console, stages: Sequence[StageFolder]) -> None:
    """A line for each stage, then its result, its settings and its runs."""
    width = max((len(stage.folder.name) for stage in stages), default=0)
    for stage in stages:
        seconds = time.time() - stage.changed
        age = "now" if seconds < MINUTE else duration(seconds)
        line = f"{stage.folder.name:<{width}}  {age:>7}  {_size(stage.bytes):>8}"
        console.print(f"{line}  {', '.join(stage.runs) or '(no run)'}")
        for detail in _details(stage, stages):
            console.print(f"    {detail}", style="dim")


def _details(stage: StageFolder, stages: Sequence[StageFolder]) -> Iterator[str]:
    from align.runtime.progress import numbers

    if stage.artifact is None:
        state = "in use by a run, or locked" if stage.is_held else stage.status
        yield f"{state}: {stage.problem}" if stage.problem else state
        return
    if stage.artifact.headline:
        yield numbers(stage.artifact.headline)
    settings = _distinctive_settings(stage, stages)
    if settings:
        yield settings


def _distinctive_settings(stage: StageFolder, stages: Sequence[StageFolder]) -> str:
    """The settings in which stages of one name and kind differ from each other."""
    from align.cli.inventory import flat

    assert stage.artifact is not None
    alike = [
        flat(other.artifact.recipe)
        for other in stages
        if other.artifact is not None
        and (other.name, other.artifact.stage) == (stage.name, stage.artifact.stage)
    ]
    mine = flat(stage.artifact.recipe)
    keys = [key for key in mine if any(other.get(key) != mine[key] for other in alike)]
    text = " ".join(f"{key}={mine[key]}" for key in keys)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _kind(stage: StageFolder) -> str:
    return stage.artifact.stage if stage.artifact else ""


def _size(count: float) -> str:
    from align.runtime.terminal import with_unit

    return f"{with_unit(count)}B"
