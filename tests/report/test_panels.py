"""The panel grid: one axes per panel in reading order, the first twice as wide."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from align.report.panels import Panel, draw_panels


@pytest.mark.parametrize(
    ("n_panels", "n_rows", "width"),
    [(1, 1, 7.5), (2, 1, 11.25), (3, 1, 15), (4, 2, 15), (7, 2, 15), (8, 3, 15)],
)
def test_rows_of_four_places_of_which_the_first_panel_takes_two(n_panels, n_rows, width, tmp_path):
    drawn: list[Any] = []
    panels = [Panel(f"panel {k}", drawn.append) for k in range(n_panels)]
    draw_panels(panels, tmp_path / "picture.png", row_height=2.0, dpi=50)
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size == (int(width * 50), 2 * n_rows * 50)
    assert [axes.get_title(loc="left") for axes in drawn] == [p.title for p in panels]
    spec = [axes.get_subplotspec() for axes in drawn]
    assert list(spec[0].colspan) == [0, 1]
    places = [(s.rowspan.start, s.colspan.start) for s in spec[1:]]
    assert places == [(n // 4, n % 4) for n in range(2, n_panels + 1)]


def test_two_panels_of_equal_width(tmp_path):
    drawn: list[Any] = []
    panels = [Panel(f"panel {k}", drawn.append) for k in range(2)]
    draw_panels(panels, tmp_path / "picture.png", row_height=2.0, dpi=50, first_places=1)
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size == (375, 100)
    assert [list(axes.get_subplotspec().colspan) for axes in drawn] == [[0], [1]]


def test_no_picture_is_written_when_a_panel_raises(tmp_path):
    def fail(axes: Any) -> None:
        raise ValueError("no data")

    with pytest.raises(ValueError, match="no data"):
        draw_panels([Panel("panel", fail)], tmp_path / "picture.png")
    assert not (tmp_path / "picture.png").exists()
