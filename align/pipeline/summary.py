"""The tables on the console at the end of a run: those of its stages, and one last line."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from align.pipeline.runner import RunSummary
from align.runtime.results import ResultTable

LEFT = "<"  # at the end of the header of a left-aligned column


def show_summary(summary: RunSummary, console: Console, file: Path) -> None:
    """Print the tables of all stages, and the location of ``summary.json``."""
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
        header = Text(column.removesuffix(LEFT))
        grid.add_column(header, justify="left" if left else "right", no_wrap=not left)
    for row in table.rows:
        grid.add_row(*map(Text, row))  # not markup: a completion may contain brackets
    parts: list[RenderableType] = [Text(f"{stage}: {table.title}", style="bold"), grid]
    if table.note:
        parts.append(Text(table.note, style="dim"))
    return Group(*parts)
