"""Data card: the README.md of prepared data.

Its layout is the template ``data_card.md.jinja``; its numbers are those of
:mod:`align.data.statistics`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from align.config import catalog
from align.config.data import Prepare
from align.config.shipped import EMBEDDED, data_dir
from align.data.rows import KINDS
from align.data.statistics import LONG_ROW, LONGER_WARNING, how_read
from align.runtime.markdown import load_template

TABLE_KINDS = (*sorted(KINDS), "prompts")
"""Kinds of tables, in the order of the card."""
_TEMPLATE = Path(__file__).with_name("data_card.md.jinja")


def data_card(config: Prepare, report: Mapping[str, Any]) -> str:
    """Render the card.

    Its header lets ``datasets.load_dataset(folder, "pairs")`` read the tables.
    """
    sources = [config.source, *(entry.source for entry in config.mixture), config.demonstrations]
    licenses = {source: catalog.license_of(source) for source in sources if source}
    identifiers = {identifier for identifier, _ in licenses.values()}
    template = load_template(_TEMPLATE, percent=lambda share: f"{share:.1%}")
    return template.render(
        config=config.model_dump(exclude={"stage"}),
        report=report,
        kinds=[kind for kind in TABLE_KINDS if kind in report],
        license=identifiers.pop() if len(identifiers) == 1 else "",
        licenses={source: text for source, (_, text) in licenses.items()},
        columns=[name[: -len("_median")] for name in report["words"] if name.endswith("_median")],
        sentences=list(summary_sentences(report)),
        longer_warning=LONGER_WARNING,
    )


def summary_sentences(report: Mapping[str, Any]) -> Iterator[str]:
    """Sentences on margins, the bag-of-words baseline, long rows, near-duplicates and leakage."""
    for line in how_read(report):
        yield f"{line[0].upper()}{line[1:]}."
    if "margins" in report:
        margins = report["margins"]
        yield (
            f"Margins of scores: median {margins['median']:g}, 5th percentile {margins['p5']:g},"
            f" 95th percentile {margins['p95']:g}."
        )
    if "bag_of_words" in report:
        baseline = report["bag_of_words"]
        yield (
            f"A classifier that only counts words is right for {baseline['accuracy']:.1%} ±"
            f" {baseline['half_width']:.1%} of {baseline['pairs']:,} held-out pairs: the lower"
            " bound for a reward model."
        )
    for kind, longest in report["longest_rows"].items():
        yield (
            f"The longest row of the {kind} has {longest['words']:,} words"
            f" (prompt_id `{longest['prompt_id']}`); {longest['long']:,} rows have more than"
            f" {LONG_ROW:,} words."
        )
    if "near_duplicate_prompts" in report:
        action = "are dropped" if report["near_duplicates"] == "drop" else "have its split"
        yield (
            f"{report['near_duplicate_prompts']:,} prompts are near-duplicates of an earlier one;"
            f" they {action}."
        )
    leakage = report["leakage"]
    yield (
        f"A split by row would train on {leakage['leaked_by_row']:,} of its"
        f" {leakage['test_prompts_by_row']:,} test prompts; this split trains on"
        f" {leakage['leaked']:,} of {leakage['test_prompts']:,}."
    )


def displayed_path(file: Path) -> str:
    """Path of a source file in the card.

    For an embedded data set, it does not depend on where Align is installed.
    """
    is_embedded = file.parent.parent == data_dir() and file.parent.name in EMBEDDED
    return f"data/{file.parent.name}/{file.name}" if is_embedded else file.as_posix()
