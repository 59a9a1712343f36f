"""The table of `align plan --probe`: the expected time of each stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from align.runtime.durations import duration

if TYPE_CHECKING:
    from rich.table import Table

    from align.data.prepare import PreparedData
    from align.pipeline.plan import PlannedStage
    from align.pipeline.probe.timing import Seconds, StageTime
    from align.runtime.terminal import SafeConsole

LEGEND = (
    "times: of one process on this machine, from a few rows of each stage with its real models; "
    "a range is that of the length of sampled completions, from that of the data to the limit"
)
UNKNOWN = "not known"


def print_times(
    console: SafeConsole,
    stages: Sequence[PlannedStage],
    prepared: Mapping[Path, PreparedData],
    runs: Path,
) -> None:
    """Measure the unfinished stages and print their expected times."""
    import time

    from align.runtime.environment import quiet_libraries

    quiet_libraries()
    started = time.monotonic()
    console.print("probe: loading the libraries", style="dim")
    from align.pipeline.probe.probe import measure

    start_up = time.monotonic() - started
    times = measure(
        stages,
        prepared,
        runs,
        announce=lambda line: console.print(f"probe: {line}", style="dim", markup=False),
    )
    console.print(times_table(times, start_up))
    console.print(LEGEND, style="dim")
    for name, stage in times.items():
        if stage.remark:
            console.print(f"{name}: {stage.remark}", markup=False, highlight=False)
    console.print(f"the probe took {time.monotonic() - started:.0f} s", style="dim")


def times_table(times: Mapping[str, StageTime], start_up: float) -> Table:
    """One row per stage with its largest parts, and the sum of all."""
    from rich import box
    from rich.table import Table

    from align.pipeline.probe.timing import Seconds

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("stage", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("of which")
    table.add_column("measured on")
    total = Seconds.exactly(start_up)
    table.add_row("start", duration_range(total), "libraries", "")
    for name, stage in times.items():
        total += stage.total
        if stage.known:
            table.add_row(name, duration_range(stage.total), _largest(stage), stage.measured)
        else:
            table.add_row(name, UNKNOWN, "", "")
    known = all(stage.known for stage in times.values())
    table.add_section()
    table.add_row("all", f"{'' if known else '≥ '}{duration_range(total)}", "", "")
    return table


def _largest(stage: StageTime) -> str:
    """The parts of at least a tenth of a stage's time, the longest first."""
    whole = stage.total.most
    parts = sorted(stage.parts.items(), key=lambda part: -part[1].most)
    return ", ".join(
        f"{name} {100 * seconds.most / whole:.0f} %"
        for name, seconds in parts
        if whole and seconds.most >= 0.1 * whole
    )


def duration_range(seconds: Seconds) -> str:
    """A time, or a range if its ends differ by more than a tenth: ``12 to 15 min``."""
    least, most = duration(seconds.least), duration(seconds.most)
    if seconds.most < 1.1 * seconds.least or least == most:
        return duration((seconds.least + seconds.most) / 2)
    number, _, unit = least.partition(" ")
    return f"{number if most.endswith(f' {unit}') else least} to {most}"
