"""The ``align`` command: run, plan and check recipes, chat with a policy, watch a control policy play."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from align import __version__
from align.cli.data import data
from align.cli.run import Force, Overrides, RecipePath, Runs, Until
from align.errors import RecipeError
from align.runtime.environment import quiet_libraries
from align.runtime.exit_codes import guarded

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
Config = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="A launch configuration, such as accelerate_configs/cpu.yaml."
    ),
]


def _show_version(requested: bool) -> None:
    if requested:
        print(f"align {__version__}")
        raise typer.Exit


@app.callback()
def _describe(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Align language models with preferences: recipes in, held-out win rates out."""


@app.command()
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    runs: Runs = Path("runs"),
    force: Force = None,
    until: Until = None,
    config: Config = None,
) -> None:
    """Run a recipe through accelerate's launcher. Exit codes: 0 success, 1 error, 2 invalid input, 130 interrupted."""
    from align.config.recipe import load_recipe

    load_recipe(recipe, overrides or [])  # reports invalid input before the launcher starts
    if config is not None and not config.is_file():
        raise RecipeError(
            f"{config}: no such launch configuration; accelerate_configs/ has examples"
        )
    options = ["--runs", str(runs)]
    options += ["--force", force] if force else []
    options += ["--until", until] if until else []
    script = str(Path(__file__).parents[1] / "run.py")
    launch = ["--config_file", str(config)] if config else []
    raise typer.Exit(_launch([*launch, script, str(recipe), *(overrides or []), *options]))


def _launch(arguments: list[str]) -> int:
    """Run ``accelerate launch`` and return the exit code of the run.

    The launcher itself exits with 1 and a traceback, whatever the run's exit code is.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # It advises to run `accelerate config`, even for one process.
    logging.getLogger("accelerate.commands.launch").setLevel(logging.ERROR)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to the run as well
    signal.signal(signal.SIGTERM, _forward)
    try:
        launch_command(launch_command_parser().parse_args(arguments))
    except subprocess.CalledProcessError as error:
        return error.returncode if error.returncode > 0 else 128 - error.returncode
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code
    except SignalException:
        return 130
    return 0


def _forward(number: int, frame: FrameType | None) -> None:
    import psutil

    for child in psutil.Process().children():
        child.send_signal(number)


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    runs: Runs = Path("runs"),
    until: Until = None,
    processes: Annotated[int, typer.Option(help="Number of processes of the run.", min=1)] = 1,
) -> None:
    """Show what would run or be reused, with steps, tokens and memory; start nothing."""
    from rich.console import Console
    from rich.table import Table

    from align.config.recipe import ErrorCollector, load_recipe
    from align.pipeline import estimates, preflight
    from align.pipeline import plan as pipeline_plan

    read = load_recipe(recipe, overrides or [])
    steps = pipeline_plan.plan(read, runs, until=until)
    pending = [step for step in steps if step.status != "reused"]
    errors = ErrorCollector(read)
    preflight.check_environments(errors, pending)
    preflight.check_batch_sizes(errors, pending, processes)
    errors.raise_any()
    estimated = estimates.estimate(steps, world_size=processes)
    table = Table(title=f"{recipe}: {len(steps)} stages", title_justify="left")
    for title in ("stage", "status", "folder"):
        table.add_column(title, overflow="fold")
    for title in ("rows", "steps", "tokens", "memory"):
        table.add_column(title, justify="right")
    for step in steps:
        figures = estimated[step.name]
        table.add_row(
            step.name,
            {"reused": "reuse", "resume": "go on", "run": "run"}[step.status],
            str(step.folder),
            "" if figures.work.rows is None else f"{figures.work.rows:,}",
            "" if figures.work.steps is None else f"{figures.work.steps:,}",
            "" if figures.work.tokens is None else f"≈ {_short(figures.work.tokens)}",
            "" if figures.memory_bytes is None else f"≥ {_short(figures.memory_bytes)}B",
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=100)
    console.print(table)
    console.print(
        "steps: the optimizer's, or the environments' of all seeds; "
        "memory: weights, gradients and Adam in a process; activations come on top",
        style="dim",
    )


def _short(number: float) -> str:
    for unit in ("", "k", "M", "G"):
        if number < 1000:
            return f"{number:.3g} {unit}" if unit else f"{number:.0f} "
        number /= 1000
    return f"{number:.3g} T"


@app.command()
def check(
    recipe: RecipePath,
    overrides: Overrides = None,
    runs: Runs = Path("runs"),
) -> None:
    """Check recipe, data, token lengths and chat template without training."""
    from rich.console import Console

    from align.config.recipe import ErrorCollector, load_recipe
    from align.pipeline import estimates, preflight, token_lengths
    from align.pipeline import plan as pipeline_plan

    console = Console(soft_wrap=True, highlight=False, markup=False)
    read = load_recipe(recipe, overrides or [])
    console.print(f"{recipe}: {len(read.stages)} stages: {', '.join(read.stages)}")
    steps = pipeline_plan.plan(read, runs)
    errors = ErrorCollector(read)
    preflight.check_environments(errors, steps)
    errors.raise_any()
    warnings = 0
    for line in token_lengths.examine(read, steps):
        console.print(line)
        warnings += "warning:" in line
    for name, figures in estimates.estimate(steps, world_size=1).items():
        if figures.memory_bytes is not None:
            memory = _short(figures.memory_bytes)
            console.print(f"{name}: memory ≥ {memory}B: weights, gradients and Adam")
    found = f"{warnings} warning{'s' * (warnings > 1)}, and " if warnings else ""
    console.print(f"{found}nothing wrong found")


@app.command()
def chat(
    policy: Annotated[
        str, typer.Argument(metavar="STAGE_OR_FOLDER", help="A stage such as dpo, or a folder.")
    ],
    runs: Runs = Path("runs"),
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy.")
    ] = 0.7,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Chat with a trained policy. An empty line starts a new conversation, Ctrl-D exits."""
    from align.cli import chat as cli_chat
    from align.pipeline import lookup

    quiet_libraries()
    cli_chat.chat(
        lookup.find_policy(policy, runs),
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )


@app.command()
def play(
    policy: Annotated[
        str,
        typer.Argument(metavar="STAGE_OR_FOLDER", help="A stage such as control, or a folder."),
    ],
    runs: Runs = Path("runs"),
    gif: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a GIF instead of opening a window.")
    ] = None,
    episodes: Annotated[int, typer.Option(min=1)] = 1,
    seed: Annotated[
        int | None, typer.Option(help="Training seed of the policy; by default the first.")
    ] = None,
) -> None:
    """Watch a policy of a `control` stage play."""
    from align.cli import play as cli_play
    from align.pipeline import lookup

    cli_play.play(lookup.find_control_policy(policy, runs), gif=gif, episodes=episodes, seed=seed)


@app.command()
def env() -> None:
    """Show versions and devices, for bug reports."""
    from align.cli.env import show_environment

    quiet_libraries()
    show_environment()


app.add_typer(data, name="data")


def main() -> None:
    """Run the ``align`` command."""
    if not sys.stdout.isatty():
        os.environ.setdefault("COLUMNS", "100")
    guarded(app)


if __name__ == "__main__":
    main()
