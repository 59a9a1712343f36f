"""Jinja2 templates of Markdown files: the cards of models and of data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jinja2


def load_template(file: Path, **filters: Callable[..., str]) -> jinja2.Template:
    """The template in a file. Its filter ``cell`` escapes a value for a cell of a table."""
    import jinja2

    environment = jinja2.Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"cell": lambda value: str(value).replace("|", "\\|"), **filters}
    return environment.from_string(file.read_text(encoding="utf-8"))
