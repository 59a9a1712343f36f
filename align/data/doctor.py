"""Doctor: what is in a source and what is wrong with it, in the terminal and as one page of HTML; nothing else is written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from align.config.data import Prepare
from align.data.data_card import summary_sentences
from align.data.prepare import prepare
from align.data.statistics import BagOfWordsBaseline, DatasetStatistics, statistics_of
from align.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console


BARS = 24


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts between edges: there is one more edge than counts."""

    title: str
    edges: list[float]
    counts: list[int]


@dataclass(frozen=True, slots=True)
class Findings:
    """What was found in a source."""

    title: str
    figures: dict[str, Any]
    histograms: list[Histogram]


def examine(config: Prepare) -> Findings:
    """Read, check and split a source as ``prepare`` would, and count; only temporary files are written."""
    ready = prepare(**config.model_dump(exclude={"stage"}))
    tally, floor = (
        DatasetStatistics([*ready.streams, "prompts"], ready.splits),
        BagOfWordsBaseline(),
    )
    for placed in ready.rows():
        tally.add(placed)
        if placed.kind == "pairs":
            floor.add(placed.row)
    histograms = [
        _histogram(f"words of {column}", list(counts), list(counts.values()))
        for column, counts in tally.lengths().items()
    ]
    if len(ready.margins):
        histograms.append(_histogram("margins of scores", ready.margins, None))
    return Findings(title(config), statistics_of(ready, tally, floor), histograms)


def title(config: Prepare) -> str:
    """The source, or the sources of a mixture."""
    return config.source or " + ".join(entry.source for entry in config.mixture)


def show(found: Findings, console: Console) -> None:
    """Print the findings."""
    from rich.table import Table

    figures = found.figures
    table = Table(title=found.title, title_justify="left")
    for name in ("kind", "read", "kept", *figures["prompts"]):
        table.add_column(name, justify="left" if name == "kind" else "right")
    for row in _rows(figures):
        table.add_row(*row)
    console.print(table)
    console.print("dropped:" if figures["dropped"] else "dropped: nothing")
    for reason, count in figures["dropped"].items():
        console.print(f"  {count:,} × {reason}")
    for name, counts in _sources(figures):
        console.print(f"  of {name}: {counts}")
    for histogram in found.histograms:
        console.print(f"{histogram.title:<22} {_spark(histogram)}  {_range(histogram)}")
    for line in sentences(figures):
        console.print(line)


def sentences(figures: Mapping[str, Any]) -> Iterator[str]:
    """Warnings, then what else was found, a sentence each."""
    yield from (f"warning: {warning}" for warning in figures["warnings"])
    if "prefer_longer_accuracy" in figures:
        yield (
            f"The chosen completion is longer in {figures['chosen_longer_share']:.1%} of the pairs; always preferring the"
            f" longer is right for {figures['prefer_longer_accuracy']:.1%}."
        )
    yield from summary_sentences(figures)


def write_html(found: Findings, path: Path) -> None:
    """Write the findings as one file that needs no other."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(_PAGE).render(
        title=found.title,
        splits=list(found.figures["prompts"]),
        rows=list(_rows(found.figures)),
        dropped=found.figures["dropped"],
        sources=list(_sources(found.figures)),
        sentences=list(sentences(found.figures)),
        histograms=[(h, max(h.counts), _range(h)) for h in found.histograms],
    )
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}; name another file") from None


def _rows(figures: Mapping[str, Any]) -> Iterator[list[str]]:
    for kind in ("demonstrations", "pairs", "unpaired", "prompts"):
        if kind in figures:
            counts = figures[kind]
            read = figures["rows"].get(kind)
            numbers = [sum(counts.values()), *counts.values()]
            yield [kind, "" if read is None else f"{read:,}", *(f"{n:,}" for n in numbers)]


def _sources(figures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if len(figures["sources"]) > 1:
        for name, kinds in figures["sources"].items():
            for kind, counts in kinds.items():
                yield name, f"{counts['read']:,} {kind} read, {counts['kept']:,} kept"


def _histogram(title: str, values: Sequence[float], weights: Sequence[int] | None) -> Histogram:
    low, high = float(np.min(values)), float(np.max(values))
    if weights is None:
        counts, edges = np.histogram(
            values, bins=BARS, range=(low, high if high > low else low + 1)
        )
        return Histogram(title, edges.tolist(), counts.tolist())
    # whole numbers: every bar holds as many of them, or bars would be high and low by turns (the last may hold fewer)
    width = math.ceil((high - low + 1) / BARS)
    bins = ((np.asarray(values) - low) // width).astype(int)
    counts = np.bincount(bins, weights)
    edges = low + width * np.arange(len(counts))
    return Histogram(title, [*edges.tolist(), high], counts.astype(int).tolist())


def _spark(histogram: Histogram) -> str:
    top = max(histogram.counts)
    # a bar that is not empty is never drawn as nothing: outliers are what one looks for
    heights = [0 if not n else max(1, round(8 * n / top)) for n in histogram.counts]
    return "".join(" ▁▂▃▄▅▆▇█"[height] for height in heights)


def _range(histogram: Histogram) -> str:
    return f"{histogram.edges[0]:g} to {histogram.edges[-1]:g}"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ccc }
td:first-child, th:first-child { text-align: left } figure { display: inline-block; margin: 0 1.5rem 1.5rem 0 } rect { fill: #47c }
</style></head><body>
<h1>{{ title }}</h1>
<table><tr><th>kind</th><th>read</th><th>kept</th>{% for split in splits %}<th>{{ split }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
<h2>Dropped</h2>
{% if dropped %}<table>{% for reason, count in dropped.items() %}<tr><td>{{ reason }}</td><td>{{ count }}</td></tr>
{% endfor %}</table>{% else %}<p>Nothing.</p>{% endif %}
{% if sources %}<h2>Sources</h2><table>{% for name, counts in sources %}<tr><td>{{ name }}</td><td>{{ counts }}</td></tr>
{% endfor %}</table>{% endif %}
<h2>Found</h2>
{% for line in sentences %}<p>{{ line }}</p>
{% endfor %}
<h2>Histograms</h2>
{% for histogram, top, range in histograms %}<figure>
<svg width="288" height="104" role="img" aria-label="{{ histogram.title }}">
{% for count in histogram.counts %}{% set height = 100 * count / top %}
<rect x="{{ loop.index0 * 288 / histogram.counts|length }}" y="{{ 102 - [height, 1 if count else 0]|max }}"
 width="{{ 288 / histogram.counts|length - 1 }}" height="{{ [height, 1 if count else 0]|max }}"><title>{{ count }}</title></rect>
{% endfor %}</svg><figcaption>{{ histogram.title }}: {{ range }}</figcaption></figure>
{% endfor %}
</body></html>
"""
