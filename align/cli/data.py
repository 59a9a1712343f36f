"""Commands ``align data prepare | doctor | show``.

A source and its keys are read as in a recipe. Preparing, examining and tokenizing are done by
:mod:`align.stages.prepare`, :mod:`align.data.doctor` and :mod:`align.training.token_view`.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from align.errors import Problems, RecipeError, UserError
from align.models import gguf_files
from align.runtime import hub
from align.runtime.environment import quiet_libraries

if TYPE_CHECKING:
    from rich.console import Console

    from align.config.data import Prepare


data = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Prepare preference data, examine it, show its tokens.",
)
DataSource = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="A name in the catalog, a file, a folder or a Hub id; or mixture=[...] instead.",
    ),
]
Keys = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Keys of `prepare`, such as reader=hh."),
]


def prepare_config(source: str, keys: list[str] | None) -> Prepare:
    """Configuration of a ``prepare`` stage, from arguments of the command line.

    Raises:
        UserError: One line for each invalid key.
    """
    from align.config import recipe
    from align.config.yaml_loader import CONTROL_CHARACTER

    if CONTROL_CHARACTER.search(source):
        raise RecipeError(f"{source!r}: a line break or control character in the name; rename it")
    arguments = [source, *(keys or [])]
    has_mixture = any(argument.startswith("mixture=") for argument in arguments)
    if not (has_mixture and re.match(r"\w+(\.\w+)*=", source)):
        # Quoted, because YAML would read `x #1.csv` as `x` and a comment.
        arguments[0] = f"source={json.dumps(source, ensure_ascii=False)}"
    return recipe.load_stage("prepare", arguments)


def _tokenizer(model: str) -> AbstractContextManager[Path | str]:
    """The folder or Hub id of a model; of a GGUF file, a temporary folder with its tokenizer."""
    if not gguf_files.is_gguf(model):
        return nullcontext(model)
    from align.models import gguf_conversion

    return gguf_conversion.tokenizer_folder(Path(model).expanduser())


def _console() -> Console:
    from align.runtime.terminal import SafeConsole

    return SafeConsole(soft_wrap=not sys.stdout.isatty())


@data.command("prepare")
def data_prepare(
    source: DataSource,
    keys: Keys = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the tables.")] = Path(
        "prepared"
    ),
) -> None:
    """Check a source, split it by prompt, and write its tables and their data card."""
    problems = Problems()
    with problems.collected():
        config = prepare_config(source, keys)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        problems.add(f"{out}: already exists; choose another folder with --out, or remove it")
    problems.raise_any()
    from align.data import doctor
    from align.runtime.progress import Logger, NullDisplay
    from align.stages import prepare

    target = out.resolve()
    partial = target.with_name(f"{target.name}.partial")
    if partial.exists():
        raise UserError(f"{partial}: already exists, from an interrupted run; remove it")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"{partial}: cannot be created: {error.strerror}; choose another folder with --out"
        ) from None
    logger = Logger("prepare", partial, NullDisplay(), main=True)
    try:
        statistics = prepare.run(config, {}, partial, logger).metrics
        partial.replace(target)
    except BaseException:  # also Ctrl-C: incomplete tables are useless
        shutil.rmtree(partial, ignore_errors=True)
        raise
    doctor.show(doctor.DataReport(f"{doctor.title(config)} → {out}", statistics, []), _console())


@data.command("doctor")
def data_doctor(
    source: DataSource,
    keys: Keys = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the report as an HTML page.")
    ] = None,
) -> None:
    """Examine a source: counts, lengths, margins, duplicates, leakage.

    Nothing is written unless --html is given.
    """
    config = prepare_config(source, keys)
    from align.data import doctor

    report = doctor.examine(config)
    doctor.show(report, _console())
    if html is not None:
        doctor.write_html(report, html)


@data.command("show")
def data_show(
    source: DataSource,
    keys: Keys = None,
    stage: Annotated[str, typer.Option(help="sft, dpo, reward, kto or ppo.")] = "dpo",
    model: Annotated[
        str,
        typer.Option(
            metavar="FOLDER_OR_HUB_ID_OR_GGUF",
            help="Model whose tokenizer and chat template are used.",
        ),
    ] = "",
    n: Annotated[int, typer.Option("-n", min=1, help="Number of rows.")] = 3,
    train_on: Annotated[str, typer.Option(help="Of sft: all turns, or the last.")] = "all",
) -> None:
    """Show the tokens that a stage trains on, with the trained ones marked."""
    from align.training import token_view

    problems = Problems()
    if stage not in token_view.SUPPORTED_STAGES:
        known = ", ".join(token_view.SUPPORTED_STAGES)
        problems.add(f"--stage {stage}: unknown; known: {known}")
    if train_on not in ("all", "last"):
        problems.add(f"--train-on {train_on}: unknown; known: all, last")
    if not model:
        problems.add("--model: missing; name a folder with a tokenizer, a GGUF file or a Hub id")
    with problems.collected():
        config = prepare_config(source, keys)
    if model and not (Path(model).expanduser().is_dir() or gguf_files.is_gguf(model)):
        with problems.collected():
            gguf_files.check_named(model)
            hub.check_model(model)
    problems.raise_any()
    quiet_libraries()
    from rich.text import Text

    console = _console()
    typer.echo(f"reading the tokenizer of {model} and the rows of {source}", err=True)
    with _tokenizer(model) as folder:
        rows = token_view.tokenized_rows(config, stage, str(folder), n, train_on=train_on)
    for row in rows:
        console.print(
            f"\n{row.title}: {len(row.ids)} tokens, {sum(row.trained)} trained; {row.remark}"
        )
        line = Text()
        for token, trained in zip(row.tokens, row.trained, strict=True):
            text = token.replace("\n", "⏎\n")
            line.append(f"⟦{text}⟧" if trained else text, style="bold green" if trained else "dim")
        console.print(line)
    if stage in ("sft", "dpo", "kto"):
        console.print(f"\n{model}: {token_view.trained_tokens(rows)}")
