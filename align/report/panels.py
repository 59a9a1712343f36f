"""One picture of several panels in a grid, shared by every stage that draws curves.

The panels, their data and their colors belong to the caller. Left out: interactive pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, RED = "#2563a8", "#b4432f"
N_COLUMNS = 4
WIDTH = 15.0
"""Width of a picture in inches."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel: its title, and the function that draws into its axes."""

    title: str
    draw: Callable[[Axes], None]


def draw_panels(
    panels: Sequence[Panel],
    file: Path,
    *,
    title: str | None = None,
    row_height: float = 3.4,
    dpi: int = 100,
    first_places: int = 2,
) -> None:
    """Draw panels in rows of four places into a PNG file.

    The first panel takes ``first_places`` of them. ``row_height`` is in inches. A draw function may
    change whatever it likes of its axes: titles, grid and spines are set before it runs.
    """
    from matplotlib.figure import Figure  # without pyplot, which keeps figures and takes a second

    n_places = len(panels) + first_places - 1
    n_rows = -(-n_places // N_COLUMNS)
    n_columns = min(N_COLUMNS, n_places)  # fewer panels than places: no empty ones
    width = WIDTH * n_columns / N_COLUMNS
    figure = Figure(figsize=(width, n_rows * row_height), layout="constrained")
    grid = figure.add_gridspec(n_rows, n_columns)
    others = range(first_places, n_rows * n_columns)
    places = [grid[0, :first_places], *(grid[n // n_columns, n % n_columns] for n in others)]
    for place, panel in zip(places, panels, strict=False):
        axes = figure.add_subplot(place)
        axes.set_title(panel.title, fontsize=10, loc="left")
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        panel.draw(axes)
    if title is not None:
        figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    figure.savefig(file, dpi=dpi)
