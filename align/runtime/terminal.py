"""The terminal: a console that prints text from data without control characters or markup."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from align.errors import printable


class SafeConsole(Console):
    """A console on which data cannot move the cursor, set colors or change the window's title.

    Brackets are printed as they are, unless ``markup=True`` is given.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "highlight": False, **options})

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Render as the base class does, with :func:`align.errors.printable` text."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def with_unit(number: float) -> str:
    """A count or a size with three digits and a decimal prefix; a unit may follow.

    >>> [with_unit(number) + "B" for number in (0, 999, 19_600_000, 999_600)]
    ['0 B', '999 B', '19.6 MB', '1 MB']
    """
    for prefix in ("", "k", "M", "G"):
        if number < 999.5:
            return f"{number:.3g} {prefix}"
        number /= 1000
    return f"{number:.3g} T"
