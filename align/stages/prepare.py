"""Prepare: write preference data as checked Parquet tables, split by prompt, with a data card.

The tables are ``demonstrations-train.parquet``, ``pairs-test.parquet`` and so on, for the kinds of
rows that the source contains and the splits with a fraction above 0; ``prompts-*.parquet`` always.
The same source and configuration give the same bytes. :mod:`align.data.prepare` does the work.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.data import statistics
from align.data.data_card import data_card, displayed_path
from align.data.prepare import SplitRow, prepare
from align.data.tables import TableWriter, table_file
from align.runtime import checksums
from align.runtime.results import StageResult

if TYPE_CHECKING:
    from align.config.data import Prepare
    from align.runtime.progress import Logger


def run(
    config: Prepare, inputs: Mapping[str, Any], output_dir: Path, logger: Logger
) -> StageResult:
    """Write the tables and the data card of the sources of ``config``."""
    prepared = prepare(config)
    output_dir.mkdir(parents=True, exist_ok=True)
    writers: dict[tuple[str, str], TableWriter] = {}

    def write(row: SplitRow) -> None:
        table = (row.kind, row.split)
        if table not in writers:
            writers[table] = TableWriter(table_file(output_dir, *table), prepared.extra_fields)
        writers[table].add(row.row)

    report = statistics.collect(
        prepared, sink=write, baseline=statistics.BagOfWordsBaseline()
    ).report()
    for writer in writers.values():
        writer.close()
    files = {displayed_path(file): checksums.digest_file(file) for file in prepared.files}
    report["files"] = files
    (output_dir / "README.md").write_text(data_card(config, report), encoding="utf-8")
    return StageResult(report, remarks=tuple(statistics.remarks(report)))
