"""The command `align init`: a commented recipe for the user's data."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

TEMPLATES = Path(__file__).with_name("templates")
Template = Literal["pairs", "demonstrations", "thumbs"]


def init(
    template: Annotated[
        Template,
        typer.Argument(
            help="The data: pairs of completions, demonstrations, or thumbs up and down."
        ),
    ] = "pairs",
    folder: Annotated[
        Path, typer.Option("--folder", metavar="DIR", help="Where to write recipe.yaml.")
    ] = Path(),
) -> None:
    """Write recipe.yaml, a commented recipe for your own data."""
    from align.errors import UserError

    file = folder / "recipe.yaml"
    text = (TEMPLATES / f"{template}.yaml").read_text(encoding="utf-8")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with file.open("x", encoding="utf-8") as target:  # never replaces a file
            target.write(text)
    except FileExistsError:
        if not folder.is_dir():
            raise UserError(f"{folder}: not a folder; name another one with --folder") from None
        raise UserError(
            f"{file}: exists already; move it away, or name another folder with --folder"
        ) from None
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror}") from None
    print(f"{file}: put your data into {template}.jsonl, or name another file under `source`")
    print(f"next: align check {shlex.quote(str(file))}")
