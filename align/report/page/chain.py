"""The chain of a run as a picture: a box for each stage, and lines from what it was made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from align.report.page.contents import StageContents
from align.runtime.durations import duration

WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 150, 46, 46, 16, 4  # in pixels
LONGEST_NAME = 18


def chain(stages: Sequence[StageContents]) -> str:
    """An SVG of the stages in columns: a stage is right of everything that it was made from."""
    depths = _depths(stages)
    rows: dict[str, int] = {}
    used: dict[int, int] = {}
    for stage in stages:
        column = depths[stage.name]
        rows[stage.name] = used.get(column, 0)
        used[column] = rows[stage.name] + 1
    places = {
        name: (
            MARGIN + depths[name] * (WIDTH + GAP_X),
            MARGIN + row * (HEIGHT + GAP_Y),
        )
        for name, row in rows.items()
    }
    width = max((x for x, _ in places.values()), default=0) + WIDTH + MARGIN
    height = max((y for _, y in places.values()), default=0) + HEIGHT + MARGIN
    parts = [
        f'<svg role="img" aria-label="Chain of the stages" viewBox="0 0 {width} {height}" '
        f'style="max-width:{width}px" class="chain">'
    ]
    for stage in stages:
        for source in dict.fromkeys(stage.made_from.values()):
            if source in places:
                parts.append(_line(places[source], places[stage.name]))
    parts += [_box(stage, places[stage.name]) for stage in stages]
    return "".join([*parts, "</svg>"])


def _depths(stages: Sequence[StageContents]) -> Mapping[str, int]:
    """The column of each stage; stages come after those that they were made from."""
    depths: dict[str, int] = {}
    for stage in stages:
        sources = [depths[name] for name in stage.made_from.values() if name in depths]
        depths[stage.name] = max(sources, default=-1) + 1
    return depths


def _line(source: tuple[int, int], target: tuple[int, int]) -> str:
    x1, y1 = source[0] + WIDTH, source[1] + HEIGHT // 2
    x2, y2 = target[0], target[1] + HEIGHT // 2
    bend = (x2 - x1) // 2
    return f'<path d="M{x1} {y1} C{x1 + bend} {y1} {x2 - bend} {y2} {x2} {y2}" class="edge"/>'


def _box(stage: StageContents, place: tuple[int, int]) -> str:
    x, y = place
    name = stage.name if len(stage.name) <= LONGEST_NAME else f"{stage.name[: LONGEST_NAME - 1]}…"
    seconds = duration(stage.artifact.seconds)
    state = f"reused ({seconds})" if stage.status == "reused" else seconds
    kind = "" if stage.kind == stage.name else f"{stage.kind} · "
    return (
        f'<a href="#stage-{escape(stage.name)}"><rect x="{x}" y="{y}" width="{WIDTH}" '
        f'height="{HEIGHT}" rx="6" class="box {escape(stage.status)}"/>'
        f'<text x="{x + 10}" y="{y + 19}" class="name">{escape(name)}</text>'
        f'<text x="{x + 10}" y="{y + 36}" class="state">{escape(kind + state)}</text></a>'
    )
