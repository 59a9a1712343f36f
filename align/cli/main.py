"""The ``align`` command: run, plan and check recipes, chat with or watch a policy."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from align import __version__
from align.cli.annotate import annotate
from align.cli.data import data
from align.cli.eval import evaluation
from align.cli.import_recipe import import_recipe
from align.cli.init import init
from align.cli.launcher import check_launch_configuration, launch
from align.cli.plan import check, plan
from align.cli.quantization import Quantization, announce_mismatches, check_quantization
from align.cli.report import report
from align.cli.run import Force, Name, Overrides, RecipePath, Runs, Until
from align.cli.runs import runs as list_runs
from align.errors import Problems
from align.runtime.environment import quiet_libraries
from align.runtime.exit_codes import guarded

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
Dtype = Literal["float32", "bfloat16"]
Program = Literal["verl", "openrlhf"]
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
    name: Name = None,
    config: Config = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STAGE.KEY=VALUE,VALUE", help="Run once for each value, and compare the runs."
        ),
    ] = None,
) -> None:
    """Run a recipe through accelerate's launcher.

    Exit codes: 0 success, 1 error, 2 invalid input, 130 interrupted.
    """
    from align.cli.sweep import points
    from align.config.recipe import read_recipe
    from align.pipeline.runner import plan_checked

    # Invalid input is reported before the launcher starts, which takes many seconds.
    quiet_libraries()
    given = overrides or []
    loaded = read_recipe(recipe, given)
    recipes = {name or loaded.name: loaded}
    if sweep:
        recipes = {
            point.run_name(name or loaded.name): read_recipe(recipe, [*given, *point.overrides])
            for point in points(sweep)
        }
    problems = Problems()
    for each in recipes.values():
        with problems.collected():
            plan_checked(each, runs, until=until, force=force)
    if config is not None:
        with problems.collected():
            check_launch_configuration(config)
    problems.raise_any()
    options = ["--runs", str(runs)]
    options += ["--force", force] if force else []
    options += ["--until", until] if until else []
    script = str(Path(__file__).parents[1] / "run.py")
    launcher_options = ["--config_file", str(config)] if config else []
    for run_name, each in recipes.items():
        own = [*options, "--name", run_name] if name or sweep else options
        code = launch([*launcher_options, script, str(recipe), *each.overrides, *own])
        if code or not sweep:
            raise typer.Exit(code)
    from align.report.page.render import write_comparison

    file = runs / f"{name or loaded.name}-comparison.html"
    print(f"comparison: {write_comparison([runs / run_name for run_name in recipes], file)}")


app.command()(init)
app.command("import")(import_recipe)
app.command()(plan)
app.command()(check)
app.command("runs")(list_runs)
app.command()(report)
app.command()(annotate)


@app.command()
def chat(
    policy: Annotated[
        str, typer.Argument(metavar="STAGE_OR_FOLDER", help="A stage such as dpo, or a folder.")
    ],
    runs: Runs = Path("runs"),
    compare: Annotated[
        str | None,
        typer.Option(metavar="STAGE_OR_FOLDER", help="A second policy, which answers as well."),
    ] = None,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The system turn of each conversation.")
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy.")
    ] = 0.7,
    top_p: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Sample from the likeliest tokens of this sum.")
    ] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    quantization: Quantization = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Chat with a trained policy. An empty line starts a new conversation, Ctrl-D exits."""
    from align.cli import chat as cli_chat
    from align.pipeline import lookup

    quiet_libraries()
    names = [policy] if compare is None or compare == policy else [policy, compare]
    problems, sources = Problems(), dict[str, Path | str]()
    with problems.collected():
        check_quantization(quantization)
    for name in names:
        with problems.collected():
            sources[name] = lookup.find_policy(name, runs)
    problems.raise_any()
    announce_mismatches(quantization, sources.values())
    cli_chat.chat(
        sources,
        cli_chat.Sampling(temperature, top_p, max_new_tokens, seed),
        system=system,
        quantization=quantization,
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
def export(
    model: Annotated[
        str,
        typer.Argument(metavar="STAGE_OR_FOLDER", help="Or a GGUF file; with --for a recipe."),
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; a new one.")],
    overrides: Overrides = None,
    runs: Runs = Path("runs"),
    program: Annotated[
        Program | None,
        typer.Option("--for", help="Write the configuration of this trainer for a cluster."),
    ] = None,
    stage: Annotated[
        str | None, typer.Option(metavar="STAGE", help="With --for: the stage of the recipe.")
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Type of the weights; by default that of the training.")
    ] = None,
    gguf: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also convert it, by llama.cpp's converter.")
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Also upload it to this repository.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="With --push-to-hub: create a private repository.")
    ] = False,
) -> None:
    """Write a model with full weights, or with --for a stage of online RL for another trainer."""
    from align.cli import export as cli_export
    from align.cli import publish
    from align.errors import UserError, printable

    if program is not None:
        if dtype or gguf or push_to_hub or private:
            raise UserError(f"--for {program}: writes no model; remove the options for models")
        from align.cli.clusters.export import export_for

        quiet_libraries()
        export_for(model, target, program, overrides or [], stage=stage, runs=runs)
        return
    if overrides or stage is not None:
        raise UserError("overrides and --stage have an effect with --for only; remove them")
    # Everything that can be known wrong is reported before the model is merged.
    converter = publish.check_places(target, gguf, push_to_hub)
    with cli_export.model_folder(model, runs, target) as (folder, role, name):
        quiet_libraries()
        cli_export.export(folder, role, target, dtype=dtype, name=name)
    if gguf is not None:
        publish.write_gguf(converter, target, gguf)
        print(printable(str(gguf)))
    if push_to_hub is not None:
        print(publish.push(target, push_to_hub, private=private))


@app.command()
def env() -> None:
    """Show versions and devices, for bug reports."""
    from align.cli.env import show_environment

    quiet_libraries()
    show_environment()


app.add_typer(data, name="data")
app.add_typer(evaluation, name="eval")


def main() -> None:
    """Run the ``align`` command."""
    if not sys.stdout.isatty():
        os.environ.setdefault("COLUMNS", "100")
    guarded(app)


if __name__ == "__main__":
    main()
