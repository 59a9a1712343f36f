"""Prepared preference data as a ``datasets.DatasetDict``, for the Python API."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from align.config.recipe import load_stage
from align.data.prepare import prepare as prepare_data
from align.data.rows import KINDS
from align.data.tables import TOOLS, without_tools
from align.errors import DataError

if TYPE_CHECKING:
    from datasets import DatasetDict


def prepare(source: str, kind: str | None = None, **keys: Any) -> DatasetDict:
    """Read, check, deduplicate and split preference data by prompt, in memory.

    ``source`` is a name of the catalog such as ``hh-rlhf``, a file, a folder or a Hub id; ``keys``
    are the other keys of a ``prepare`` stage, such as ``test_fraction=0.1``. The splits have the
    rows of one table: ``kind`` is ``pairs``, ``unpaired``, ``demonstrations`` or ``prompts``; by
    default the first of these that the source has.

    Raises:
        UserError: A key or the source is invalid, or the source has no rows of this kind.
    """
    from datasets import Dataset, DatasetDict

    prepared = prepare_data(load_stage("prepare", values={"source": source, **keys}))
    tables = prepared.tables()
    if kind is None:
        kind = next(name for name in KINDS if name in tables)
    if kind not in tables:
        raise DataError(f"{source}: no {kind}; found {', '.join(tables)}")
    splits = tables[kind]
    if TOOLS in prepared.extra_fields:
        splits = {split: [without_tools(row) for row in rows] for split, rows in splits.items()}
    return DatasetDict({split: Dataset.from_list(rows) for split, rows in splits.items()})
