"""The commands `align plan` and `align check`, which start no stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from align.cli.run import Overrides, RecipePath, Runs, Until
from align.errors import UserError, counted

if TYPE_CHECKING:
    from rich.table import Table

    from align.config.memory_bill import Sharding
    from align.config.recipe import ErrorCollector
    from align.pipeline.estimates import Estimate
    from align.pipeline.plan import PlannedStage

STATUS = {"reused": "reuse", "resume": "resume", "run": "run"}
ONE_PROCESS = (
    "--probe measures one, without the exchange between several; remove --probe, or add "
    "--processes 1"
)
LEGEND = (
    "steps: optimizer steps, or environment steps of all seeds; "
    "tokens: 1.35 a word of the texts, without the chat template; "
    "memory: weights, gradients and Adam of one process, without activations"
)


def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    runs: Runs = Path("runs"),
    until: Until = None,
    processes: Annotated[
        int | None,
        typer.Option(help="Number of processes; by default that of --config, else 1.", min=1),
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Measure a small part of each stage: expected time.")
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Launch configuration: memory of each device."),
    ] = None,
    gpu_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Memory of a device, as 24GB: does each stage fit."),
    ] = None,
) -> None:
    """Show what would run, resume or be reused, with steps, tokens and memory; start nothing."""
    from align.config.memory_bill import parse_bytes
    from align.config.recipe import ErrorCollector, read_recipe
    from align.pipeline import estimates, preflight, token_lengths
    from align.pipeline.plan import plan_stages
    from align.runtime.terminal import SafeConsole

    sharding = _sharding(config, processes)
    if probe and sharding.processes > 1:
        option = f"--config {config}" if processes is None else "--processes"
        raise UserError(f"{option}: {sharding.processes} processes, but {ONE_PROCESS}")
    limit = None if gpu_memory is None else parse_bytes(gpu_memory)
    processes = sharding.processes
    errors = ErrorCollector(read_recipe(recipe, overrides or []))
    stages = plan_stages(errors, runs, until=until)
    pending = [stage for stage in stages if stage.status != "reused"]
    missing = list(_missing_packages(errors, pending, config, sharding))
    preflight.check_batch_sizes(errors, pending, processes)
    errors.raise_any()
    console = SafeConsole()
    title = f"{recipe}: {counted(len(stages), 'stage')}; folders in {runs}"
    prepared = estimates.prepare_small(stages)
    lost = token_lengths.lost_rows(stages, prepared)
    counts = {name: rows.count for name, rows in lost.items()}
    table = estimates.estimate(stages, world_size=processes, prepared=prepared, lost=counts)
    console.print(_plan_table(title, stages, table))
    console.print(LEGEND, style="dim", width=min(console.width, 80))
    warnings = (f"{name}: warning: {rows.reason}" for name, rows in lost.items())
    requests = estimates.count_requests(stages, table)
    for line in (*_reasons_to_run(stages, runs), *requests, *warnings, *missing):
        console.print(line, markup=False, highlight=False)
    if config is not None or limit is not None:
        from align.cli.plan_memory import print_bills

        print_bills(console, pending, table, sharding, limit)
    if probe and pending:
        from align.cli.plan_times import print_times

        print_times(console, stages, prepared, runs)


def _missing_packages(
    errors: ErrorCollector, stages: Sequence[PlannedStage], config: Path | None, sharding: Sharding
) -> Iterator[str]:
    """A line for each package that a run needs and that is not installed.

    The errors of environments whose packages are installed are collected.
    """
    from align.cli import launcher
    from align.pipeline import packages

    yield from packages.missing(stages)
    for stage, problem in packages.environment_problems(stages):
        from align.control.spaces import NotInstalledError  # only where there is a problem

        if isinstance(problem, NotInstalledError):
            yield f"{stage.name}.{problem.key}: {problem}"
        else:
            errors.add((stage.name, problem.key), str(problem))
    if sharding.needs_deepspeed and not launcher.deepspeed_is_installed():
        yield f"{config}: {launcher.NO_DEEPSPEED}"


def _sharding(config: Path | None, processes: int | None) -> Sharding:
    """That of a launch configuration; ``processes`` replace its own, as the launcher's option."""
    from align.config.memory_bill import Sharding, read_sharding

    sharding = Sharding() if config is None else read_sharding(config)
    return sharding if processes is None else replace(sharding, processes=processes)


def _reasons_to_run(stages: Sequence[PlannedStage], runs: Path) -> Iterator[str]:
    """Why stages would run although stages of their names are finished."""
    from align.cli.inventory import explain_new, finished_stages

    new = [stage for stage in stages if stage.status == "run" and not stage.folder.exists()]
    if not new or not runs.is_dir():
        return
    finished = list(finished_stages(runs, {stage.name for stage in new}))
    for stage in new:
        change = explain_new(stage, finished)
        if change is not None:
            yield f"{stage.name}: new run: {change}"


def _plan_table(
    title: str, stages: Sequence[PlannedStage], estimates: Mapping[str, Estimate]
) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from align.runtime.terminal import with_unit

    # Without borders, and with the name of a stage only in that of its folder: 80 columns suffice.
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("folder", no_wrap=True, overflow="ignore")
    table.add_column("status", no_wrap=True)
    for column in ("rows", "steps", "tokens", "memory"):
        table.add_column(column, justify="right")
    for stage in stages:
        work, memory = estimates[stage.name].work, estimates[stage.name].memory_bytes
        table.add_row(
            stage.folder.name,
            STATUS[stage.status],
            "" if work.rows is None else f"{work.rows:,}",
            "" if work.steps is None else f"{work.steps:,}",
            "" if work.tokens is None else f"≈ {with_unit(work.tokens).rstrip()}",
            "" if memory is None else f"≥ {with_unit(memory)}B",
        )
    return table


def check(recipe: RecipePath, overrides: Overrides = None, runs: Runs = Path("runs")) -> None:
    """Check recipe, data, token lengths and chat template without training."""
    from align.config.recipe import ErrorCollector, read_recipe
    from align.pipeline import estimates, preflight, reward_checks
    from align.pipeline.plan import plan_stages, with_invalid
    from align.runtime.environment import quiet_libraries
    from align.runtime.terminal import SafeConsole

    quiet_libraries()
    console = SafeConsole(soft_wrap=True)
    loaded = read_recipe(recipe, overrides or [])
    console.print(f"{recipe}: {counted(len(loaded.names), 'stage')}: {', '.join(loaded.names)}")
    errors = ErrorCollector(loaded)
    stages = with_invalid(errors, plan_stages(errors, runs), runs)
    warnings = 0
    reward_checks.import_functions(errors, stages)
    further = reward_checks.examine
    for line in preflight.examine(errors, stages, runs, world_size=1, further=further):
        console.print(line)
        warnings += "warning:" in line
    preflight.check_unusual_trainers(errors, stages)
    errors.raise_any()
    # Memory does not depend on the data, which are therefore not prepared again.
    for name, estimate in estimates.estimate(stages, world_size=1, prepared={}).items():
        if estimate.memory_bytes is not None:
            from align.runtime.terminal import with_unit

            memory = with_unit(estimate.memory_bytes)
            console.print(f"{name}: memory ≥ {memory}B for weights, gradients and Adam")
    console.print(f"no errors, {counted(warnings, 'warning')}" if warnings else "no errors")
