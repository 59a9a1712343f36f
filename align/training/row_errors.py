"""The place of a row in the errors of a chat template, which sees one conversation at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from align.errors import UserError

Row = TypeVar("Row")


@contextlib.contextmanager
def naming_row(
    rows: Iterable[Row], render: Callable[[Row], object], place: Callable[[Row], str]
) -> Iterator[None]:
    """Put the place of the row before an error that is raised while ``rows`` are rendered together.

    ``render`` renders one row; it is called after an error only, until it raises one itself.

    Raises:
        UserError: The error of the first row that has one, with its place in each line.
    """
    try:
        yield
    except UserError:
        for row in rows:
            try:
                render(row)
            except UserError as error:
                raise UserError(*(f"{place(row)}: {line}" for line in error.lines)) from None
        raise
