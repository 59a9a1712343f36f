"""The ``align`` command: run a recipe, say what it would do, check it, talk to what came out or watch it play."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from align.errors import UserError
from align.run import Force, Overrides, RecipePath, Runs, Until, guarded, quiet_libraries

if TYPE_CHECKING:
    from rich.console import Console

    from align.settings import Prepare

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
    from align import recipe as recipes

    recipes.read(recipe, overrides or [])  # mistakes are told before anything starts
    if config is not None and not config.is_file():
        raise UserError(f"{config}: no such launch configuration; accelerate_configs/ has some")
    options = ["--runs", str(runs)]
    options += ["--force", force] if force else []
    options += ["--until", until] if until else []
    script = str(Path(__file__).with_name("run.py"))
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

    from align import checks, estimates, planning
    from align import recipe as recipes

    read = recipes.read(recipe, overrides or [])
    steps = planning.plan(read, runs, until=until)
    checks.environments(read, [step for step in steps if step.status != "reused"])
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
            "" if figures.rows is None else f"{figures.rows:,}",
            "" if figures.steps is None else f"{figures.steps:,}",
            "" if figures.tokens is None else f"≈ {_short(figures.tokens)}",
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

    from align import checks, estimates, lengths, planning
    from align import recipe as recipes

    console = Console(soft_wrap=True, highlight=False, markup=False)
    read = recipes.read(recipe, overrides or [])
    console.print(f"{recipe}: {len(read.stages)} stages: {', '.join(read.stages)}")
    steps = planning.plan(read, runs)
    checks.environments(read, steps)
    warnings = 0
    for line in lengths.examine(read, steps):
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
    from align import conversation

    quiet_libraries()
    conversation.talk(
        conversation.find(policy, runs),
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
    from align import playing

    playing.play(playing.find(policy, runs), gif=gif, episodes=episodes, seed=seed)


data = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Prepare preference data, examine it, see its tokens.",
)
app.add_typer(data, name="data")
DataSource = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="A catalogue name, a file, a folder or a Hub id; or mixture=[...] in its place.",
    ),
]
Keys = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Keys of `prepare`, such as reader=hh."),
]


def _prepare_settings(source: str, keys: list[str] | None) -> Prepare:
    from align import recipe as recipes

    told = [source, *(keys or [])]
    mixed = any(key.startswith("mixture=") for key in told)
    if not (mixed and re.match(r"\w+(\.\w+)*=", source)):
        # quoted, or `x #1.csv` would be YAML with a comment
        told[0] = f"source={json.dumps(source, ensure_ascii=False)}"
    return recipes.one_stage("prepare", told)


def _console() -> Console:
    from rich.console import Console

    return Console(soft_wrap=not sys.stdout.isatty(), highlight=False, markup=False)


@data.command("prepare")
def data_prepare(
    source: DataSource,
    keys: Keys = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the tables go.")] = Path(
        "prepared"
    ),
) -> None:
    """Check a source, split it by prompt, and write its tables and their data card."""
    settings = _prepare_settings(source, keys)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is there already; choose another folder with --out, or remove it")
    from align import doctor
    from align.stages import prepare
    from align.tracking import Silent, Track

    target = out.resolve()
    partial = target.with_name(f"{target.name}.partial")
    if partial.exists():
        raise UserError(f"{partial}: is there from a run that was cut off; remove it")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"{partial}: cannot be made: {error.strerror}; choose another --out"
        ) from None
    try:
        figures = prepare.run(settings, {}, partial, Track("prepare", partial, Silent(), main=True))
        partial.replace(target)
    except BaseException:  # Ctrl-C as well: half a table is none
        shutil.rmtree(partial, ignore_errors=True)
        raise
    doctor.show(doctor.Findings(f"{doctor.title(settings)} → {out}", figures, []), _console())


@data.command("doctor")
def data_doctor(
    source: DataSource,
    keys: Keys = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the report as a page, too.")
    ] = None,
) -> None:
    """Examine a source: counts, lengths, margins, repeats, leakage. Nothing is written but the report that is asked for."""
    settings = _prepare_settings(source, keys)
    from align import doctor

    found = doctor.examine(settings)
    doctor.show(found, _console())
    if html is not None:
        doctor.write_html(found, html)


@data.command("show")
def data_show(
    source: DataSource,
    keys: Keys = None,
    stage: Annotated[str, typer.Option(help="sft, dpo, reward, kto or ppo.")] = "dpo",
    model: Annotated[
        str, typer.Option(metavar="FOLDER_OR_HUB_ID", help="Whose tokenizer and chat template.")
    ] = "",
    n: Annotated[int, typer.Option("-n", min=1, help="Rows.")] = 3,
) -> None:
    """Show the tokens that a stage trains on, the trained ones marked."""
    from align import token_streams

    wrong = []
    if stage not in token_streams.KINDS:
        wrong.append(f"--stage {stage}: unknown; known: {', '.join(token_streams.KINDS)}")
    if not model:
        wrong.append("--model: missing; name a folder with a tokenizer, or a Hub id")
    if wrong:
        raise UserError(*wrong)
    settings = _prepare_settings(source, keys)
    quiet_libraries()
    from rich.text import Text

    console = _console()
    for stream in token_streams.streams(settings, stage, model, n):
        console.print(
            f"\n{stream.title}: {len(stream.ids)} tokens, {sum(stream.trained)} trained; {stream.remark}"
        )
        line = Text()
        for token, trained in zip(stream.tokens, stream.trained, strict=True):
            shown = token.replace("\n", "⏎\n")
            line.append(
                f"⟦{shown}⟧" if trained else shown, style="bold green" if trained else "dim"
            )
        console.print(line)


def main() -> None:
    """Run the command."""
    if not sys.stdout.isatty():
        os.environ.setdefault("COLUMNS", "100")
    guarded(app)


if __name__ == "__main__":
    main()
