"""cli.data"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from align.errors import UserError
from align.runtime.environment import quiet_libraries

if TYPE_CHECKING:
    from rich.console import Console

    from align.config.data import Prepare


data = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Prepare preference data, examine it, see its tokens.",
)
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


def prepare_config(source: str, keys: list[str] | None) -> Prepare:
    from align.config import recipe

    told = [source, *(keys or [])]
    mixed = any(key.startswith("mixture=") for key in told)
    if not (mixed and re.match(r"\w+(\.\w+)*=", source)):
        # quoted, or `x #1.csv` would be YAML with a comment
        told[0] = f"source={json.dumps(source, ensure_ascii=False)}"
    return recipe.load_stage("prepare", told)


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
    config = prepare_config(source, keys)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is there already; choose another folder with --out, or remove it")
    from align.data import doctor
    from align.runtime.progress import Logger, NullDisplay
    from align.stages import prepare

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
        figures = prepare.run(
            config, {}, partial, Logger("prepare", partial, NullDisplay(), main=True)
        ).metrics
        partial.replace(target)
    except BaseException:  # Ctrl-C as well: half a table is none
        shutil.rmtree(partial, ignore_errors=True)
        raise
    doctor.show(doctor.Findings(f"{doctor.title(config)} → {out}", figures, []), _console())


@data.command("doctor")
def data_doctor(
    source: DataSource,
    keys: Keys = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the report as a page, too.")
    ] = None,
) -> None:
    """Examine a source: counts, lengths, margins, repeats, leakage. Nothing is written but the report that is asked for."""
    config = prepare_config(source, keys)
    from align.data import doctor

    found = doctor.examine(config)
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
    from align.training import token_view

    wrong = []
    if stage not in token_view.KINDS:
        wrong.append(f"--stage {stage}: unknown; known: {', '.join(token_view.KINDS)}")
    if not model:
        wrong.append("--model: missing; name a folder with a tokenizer, or a Hub id")
    if wrong:
        raise UserError(*wrong)
    config = prepare_config(source, keys)
    quiet_libraries()
    from rich.text import Text

    console = _console()
    for stream in token_view.tokenized_rows(config, stage, model, n):
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
