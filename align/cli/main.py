"""The ``align`` command: run a recipe, say what it would do, check it, talk to what came out or watch it play."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from align.cli.data import data
from align.cli.run import Force, Overrides, RecipePath, Runs, Until
from align.errors import UserError
from align.runtime.environment import quiet_libraries
from align.runtime.exit_codes import guarded

if TYPE_CHECKING:
    pass


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


@app.callback()
def _describe() -> None:
    """Align a language model with preferences: recipes in, a held-out win rate out."""


@app.command()
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    runs: Runs = Path("runs"),
    force: Force = None,
    until: Until = None,
    config: Config = None,
) -> None:
    """Run a recipe, launched by accelerate; the exit code is the run's own."""
    from align.config.recipe import load_recipe

    load_recipe(recipe, overrides or [])  # mistakes are told before anything starts
    if config is not None and not config.is_file():
        raise UserError(f"{config}: no such launch configuration; accelerate_configs/ has some")
    options = ["--runs", str(runs)]
    options += ["--force", force] if force else []
    options += ["--until", until] if until else []
    script = str(Path(__file__).parents[1] / "run.py")
    launch = ["--config_file", str(config)] if config else []
    raise typer.Exit(_launch([*launch, script, str(recipe), *(overrides or []), *options]))


def _launch(arguments: list[str]) -> int:
    """``accelerate launch``, which itself ends in 1 and a traceback whatever a run ended in. Returns the run's code."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # Its advice to run `accelerate config` is not needed for one process.
    logging.getLogger("accelerate.commands.launch").setLevel(logging.ERROR)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the run as well
    signal.signal(signal.SIGTERM, _pass_on)
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


def _pass_on(number: int, frame: FrameType | None) -> None:
    import psutil

    for child in psutil.Process().children():
        child.send_signal(number)


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    runs: Runs = Path("runs"),
    until: Until = None,
    processes: Annotated[
        int, typer.Option(help="Processes that will share the batches.", min=1)
    ] = 1,
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
    """Find everything that can be known wrong without training: recipe, data, lengths, template."""
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
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.7,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Talk to a trained policy; an empty line forgets the conversation, Ctrl-D ends."""
    from align.cli.chat import talk
    from align.pipeline import lookup

    quiet_libraries()
    talk(
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
        Path | None, typer.Option(metavar="FILE", help="Write a GIF; without it, open a window.")
    ] = None,
    episodes: Annotated[int, typer.Option(min=1)] = 1,
    seed: Annotated[
        int | None, typer.Option(help="Of training: which policy; without it, the first.")
    ] = None,
) -> None:
    """Watch a policy that `control` trained take its likeliest actions."""
    from align.cli import play as cli_play
    from align.pipeline import lookup

    cli_play.play(lookup.find_control_policy(policy, runs), gif=gif, episodes=episodes, seed=seed)


app.add_typer(data, name="data")


def main() -> None:
    """Run the command."""
    if not sys.stdout.isatty():
        os.environ.setdefault("COLUMNS", "100")
    guarded(app)


if __name__ == "__main__":
    main()
