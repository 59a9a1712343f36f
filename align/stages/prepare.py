"""Prepare: a source of preferences in; checked Parquet, split by prompt, and a data card out.

``demonstrations-train.parquet``, ``pairs-test.parquet`` and so on, for the kinds that the source
has and the splits that have a fraction; ``prompts-*.parquet`` always. Same source and config,
same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.data.data_card import data_card, shown_path
from align.data.prepare import prepare
from align.data.statistics import BagOfWordsBaseline, DatasetStatistics, statistics_of
from align.data.tables import TableWriter
from align.runtime import artifacts

if TYPE_CHECKING:
    from align.config.data import Prepare
    from align.runtime.progress import Logger
from align.runtime.results import StageResult


def run(
    config: Prepare, inputs: Mapping[str, Any], output_dir: Path, logger: Logger
) -> StageResult:
    """Write the tables and the data card of ``config.source`` into ``output_dir``."""
    told = config.model_dump(exclude={"stage"})
    ready = prepare(**told)
    output_dir.mkdir(parents=True, exist_ok=True)
    tally, floor = (
        DatasetStatistics([*ready.streams, "prompts"], ready.splits),
        BagOfWordsBaseline(),
    )
    writers: dict[str, TableWriter] = {}
    for placed in ready.rows():
        name = f"{placed.kind}-{placed.split}"
        if name not in writers:
            writers[name] = TableWriter(output_dir / f"{name}.parquet")
        writers[name].add(placed.row)
        tally.add(placed)
        if placed.kind == "pairs":
            floor.add(placed.row)
    for writer in writers.values():
        writer.close()
    digests = {shown_path(file): artifacts.digest_file(file) for file in ready.files}
    figures = statistics_of(ready, tally, floor) | {"files": digests}
    (output_dir / "README.md").write_text(data_card(told, figures), encoding="utf-8")
    return StageResult(figures)
