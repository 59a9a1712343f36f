"""The command `align import`: a configuration of TRL, LLaMA-Factory or axolotl as a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Method = Literal["sft", "dpo", "kto", "reward"]


def import_recipe(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="YAML of TRL, LLaMA-Factory or axolotl.")
    ],
    target: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="The recipe to write; a new file.")
    ] = Path("recipe.yaml"),
    method: Annotated[
        Method | None, typer.Option(help="The stage, where the file does not name a method.")
    ] = None,
) -> None:
    """Convert a configuration of TRL, LLaMA-Factory or axolotl into a recipe."""
    from align.config.other_tools import as_yaml, translate
    from align.errors import UserError

    translation = translate(file, method)
    try:
        with target.open("x", encoding="utf-8") as new:  # never replaces a file
            new.write(as_yaml(translation, file.name))
    except FileExistsError:
        raise UserError(f"{target}: exists already; name another file with --out") from None
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror}") from None
    print(f"{target}: `{translation.method}`, from a configuration of {translation.tool}")
    for key, _, reason in translation.notes:
        print(f"not carried over: {key} ({reason})")
    print(f"next: align check {target}")
