"""The figures of the frontier and of over-optimization: what is drawn, read back from the axes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from align.report import frontier, overoptimization
from align.report.frontier import FrontierPoint


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The axes of each panel, which are drawn in memory."""
    from matplotlib.figure import Figure

    axes: list[Any] = []

    def draw(panels: Any, file: Path, **_: Any) -> None:
        for panel in panels:
            axes.append(Figure().add_subplot())
            panel.draw(axes[-1])

    for module in (frontier, overoptimization):
        monkeypatch.setattr(module, "draw_panels", draw)
    return axes


def test_points_of_a_method_are_joined_in_the_order_of_their_kl(drawn: list[Any]):
    points = [
        FrontierPoint("dpo", 3.0, (2.5, 4.0), 0.5, (0.4, 0.7)),
        FrontierPoint("ppo", 2.0, (1.0, 3.0), 0.2, (0.1, 0.3)),
        FrontierPoint("dpo", 1.0, (0.5, 1.5), 0.3, (0.2, 0.4)),
    ]
    frontier.draw(points, Path("frontier.png"), reward="sentiment")
    dpo, ppo = drawn[0].containers
    assert dpo.lines[0].get_xydata().tolist() == [[1.0, 0.3], [3.0, 0.5]]
    assert ppo.lines[0].get_xydata().tolist() == [[2.0, 0.2]]
    horizontal, vertical = (bars.get_segments() for bars in dpo.lines[2])
    assert horizontal[1].tolist() == [[2.5, 0.5], [4.0, 0.5]]
    assert vertical[1].ravel().tolist() == pytest.approx([3.0, 0.4, 3.0, 0.7])
    assert [text.get_text() for text in drawn[0].get_legend().get_texts()] == ["dpo", "ppo"]


def test_each_size_has_a_panel_with_points_law_and_band(drawn: list[Any]):
    def curve(panel: str, label: str) -> overoptimization.Curve:
        points, grid = [(1.0, 0.1), (2.0, 0.0)], [0.5, 1.0]
        law, low, high = [0.05, 0.1], [0.0, 0.05], [0.1, 0.2]
        return overoptimization.Curve(panel, label, points, grid, law, low, high)

    curves = [curve("small", "250 pairs"), curve("small", "1,000 pairs"), curve("large", "250")]
    overoptimization.draw(curves, Path("law.png"))
    small, large = drawn
    labels = [text.get_text() for text in small.get_legend().get_texts()]
    assert labels == ["250 pairs", "1,000 pairs"]
    dots, law = small.lines[:2]
    assert dots.get_xydata().tolist() == [[1.0, 0.1], [2.0, 0.0]]
    assert law.get_xydata().tolist() == [[0.5, 0.05], [1.0, 0.1]]
    band = small.collections[0].get_paths()[0].vertices
    assert {tuple(v) for v in band.tolist()} == {(0.5, 0.0), (1.0, 0.05), (0.5, 0.1), (1.0, 0.2)}
    assert len(large.collections) == 1
    assert (small.get_xlim(), small.get_ylim()) == (large.get_xlim(), large.get_ylim())
