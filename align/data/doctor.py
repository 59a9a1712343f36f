"""Doctor: examine a source as ``prepare`` reads it; report in the terminal and as an HTML page.

Only the page is written; the prepared rows stay in temporary files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from align.config.data import Prepare
from align.data import statistics
from align.data.data_card import TABLE_KINDS, summary_sentences
from align.data.prepare import prepare
from align.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console


N_BARS = 24
_TEMPLATE = Path(__file__).with_name("doctor.html.jinja")


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts between edges; there is one more edge than counts."""

    title: str
    edges: list[float]
    counts: list[int]


@dataclass(frozen=True, slots=True)
class DataReport:
    """Statistics of a source, as returned by ``DatasetStatistics.report``, and its histograms."""

    title: str
    statistics: dict[str, Any]
    histograms: list[Histogram]


def examine(config: Prepare) -> DataReport:
    """Read, check and split the sources of ``config``, and count.

    Raises:
        UserError: One line for each problem with the sources.
    """
    prepared = prepare(config)
    counted = statistics.collect(prepared, baseline=statistics.BagOfWordsBaseline())
    histograms = [
        length_histogram(f"words of {column}", counts)
        for column, counts in counted.lengths().items()
    ]
    if len(prepared.margins):
        histograms.append(margin_histogram("margins of scores", prepared.margins))
    return DataReport(title(config), counted.report(), histograms)


def title(config: Prepare) -> str:
    """Name of the source, or of the sources of a mixture."""
    return config.source or " + ".join(entry.source for entry in config.mixture)


def show(report: DataReport, console: Console) -> None:
    """Print a report."""
    from rich.table import Table

    numbers = report.statistics
    table = Table(title=report.title, title_justify="left")
    for name in ("kind", "read", "kept", *numbers["prompts"]):
        table.add_column(name, justify="left" if name == "kind" else "right")
    for row in _count_rows(numbers):
        table.add_row(*row)
    console.print(table)
    console.print("dropped:" if numbers["dropped"] else "dropped: nothing")
    for line in statistics.dropped_lines(numbers):
        console.print(f"  {line}")
    for name, counts in _source_counts(numbers):
        console.print(f"  {name}: {counts}")
    for histogram in report.histograms:
        console.print(f"{histogram.title:<22} {_bars(histogram)}  {_bounds(histogram)}")
    for sentence in sentences(numbers):
        console.print(sentence)


def sentences(numbers: Mapping[str, Any]) -> Iterator[str]:
    """The warnings, then one sentence for each other finding."""
    yield from (f"warning: {warning}" for warning in numbers["warnings"])
    if "prefer_longer_accuracy" in numbers:
        yield (
            f"The chosen completion is longer in {numbers['chosen_longer_share']:.1%} of the pairs;"
            " always preferring the longer one is right for"
            f" {numbers['prefer_longer_accuracy']:.1%}."
        )
    yield from summary_sentences(numbers)


def write_html(report: DataReport, path: Path) -> None:
    """Write a report as one self-contained HTML file.

    Raises:
        UserError: The file cannot be written.
    """
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        title=report.title,
        splits=list(report.statistics["prompts"]),
        rows=list(_count_rows(report.statistics)),
        dropped=report.statistics["dropped"],
        examples=report.statistics["dropped_examples"],
        sources=list(_source_counts(report.statistics)),
        findings=list(sentences(report.statistics)),
        histograms=[(h, max(h.counts), _bounds(h)) for h in report.histograms],
    )
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written: {error.strerror}; choose another file with --html"
        ) from None


def _count_rows(numbers: Mapping[str, Any]) -> Iterator[list[str]]:
    for kind in TABLE_KINDS:
        if kind in numbers:
            counts = numbers[kind]
            n_read = numbers["rows"].get(kind)
            cells = [sum(counts.values()), *counts.values()]
            yield [kind, "" if n_read is None else f"{n_read:,}", *(f"{n:,}" for n in cells)]


def _source_counts(numbers: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if len(numbers["sources"]) > 1:
        for name, kinds in numbers["sources"].items():
            for kind, counts in kinds.items():
                yield name, f"{counts['read']:,} {kind} read, {counts['kept']:,} kept"


def margin_histogram(title: str, margins: NDArray[np.float64]) -> Histogram:
    """Histogram with 24 bars of equal width."""
    low, high = float(np.min(margins)), float(np.max(margins))
    bounds = (low, high if high > low else low + 1)
    counts, edges = np.histogram(margins, bins=N_BARS, range=bounds)
    return Histogram(title, edges.tolist(), counts.tolist())


def length_histogram(title: str, counts: Mapping[int, int]) -> Histogram:
    """Histogram of integers with up to 24 bars.

    Every bar covers the same number of integers (the last one may cover fewer); otherwise uniform
    counts would give bars of alternating height.
    """
    values: Sequence[int] = list(counts)
    low, high = float(min(values)), float(max(values))
    width = math.ceil((high - low + 1) / N_BARS)
    bars = ((np.asarray(values) - low) // width).astype(int)
    heights = np.bincount(bars, list(counts.values()))
    edges = low + width * np.arange(len(heights))
    return Histogram(title, [*edges.tolist(), high], heights.astype(int).tolist())


def _bars(histogram: Histogram) -> str:
    top = max(histogram.counts)
    # A bar with any count is at least one step high: outliers must be visible.
    heights = [0 if not n else max(1, round(8 * n / top)) for n in histogram.counts]
    return "".join(" ▁▂▃▄▅▆▇█"[height] for height in heights)


def _bounds(histogram: Histogram) -> str:
    return f"{histogram.edges[0]:g} to {histogram.edges[-1]:g}"
