"""The tables on the console: the plan of a recipe, and the results of its stages after a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from align.pipeline.estimates import Estimate
from align.pipeline.plan import PlannedStage
from align.pipeline.runner import RunSummary
from align.runtime.results import ResultTable

WIDTH = 100  # of an output that is not a terminal
PLAN_LEGEND = (
    "steps: optimizer steps, or environment steps of all seeds; memory per process: weights, "
    "gradients, optimizer states; activations not included"
)
_STATUS = {"reused": "reuse", "resume": "resume", "run": "run"}
LEFT = "<"  # at the end of the header of a left-aligned column


def show_summary(summary: RunSummary, console: Console, file: Path) -> None:
    """Print the tables of all stages, and the location of ``summary.json``."""
    if not console.is_terminal:
        console = Console(file=console.file, width=WIDTH, quiet=console.quiet)
    for stage in summary.stages:
        for table in stage.tables:
            console.print(render_table(table, stage.name))
    reused = sum(stage.status == "reused" for stage in summary.stages)
    count = f"{len(summary.stages)} stage{'s' * (len(summary.stages) != 1)}"
    line = f"{count}, {reused} reused, {summary.seconds:.1f} s → {file}"
    console.print(Text(line, style="dim"))


def render_table(table: ResultTable, stage: str) -> Group:
    """A table of a stage with its title and its note."""
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for number, column in enumerate(table.columns):
        left = number == 0 or column.endswith(LEFT)
        grid.add_column(
            column.removesuffix(LEFT), justify="left" if left else "right", no_wrap=not left
        )
    for row in table.rows:
        grid.add_row(*row)
    parts: list[RenderableType] = [Text(f"{stage}: {table.title}", style="bold"), grid]
    if table.note:
        parts.append(Text(table.note, style="dim"))
    return Group(*parts)


def plan_table(
    recipe: str, planned: Sequence[PlannedStage], estimates: Mapping[str, Estimate]
) -> Table:
    """The stages of a plan with their folders and estimates; an unknown number is left empty."""
    table = Table(title=f"{recipe}: {len(planned)} stages", title_justify="left")
    for title in ("stage", "status", "folder"):
        table.add_column(title, overflow="fold")
    for title in ("rows", "steps", "tokens", "memory"):
        table.add_column(title, justify="right")
    for stage in planned:
        estimate = estimates[stage.name]
        work, memory = estimate.work, estimate.memory_bytes
        table.add_row(
            stage.name,
            _STATUS[stage.status],
            str(stage.folder),
            "" if work.rows is None else f"{work.rows:,}",
            "" if work.steps is None else f"{work.steps:,}",
            "" if work.tokens is None else f"≈ {short_number(work.tokens)}",
            "" if memory is None else f"≥ {short_number(memory)}B",
        )
    return table


def short_number(number: float) -> str:
    """Three significant digits and a unit: ``4.1 M``."""
    for unit in ("", "k", "M", "G"):
        if number < 1000:
            return f"{number:.3g} {unit}" if unit else f"{number:.0f} "
        number /= 1000
    return f"{number:.3g} T"
