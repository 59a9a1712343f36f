"""Layouts of public data sets and of annotations, recognized in a row, and the readers for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from align.config.readers import REQUIRED_COLUMNS
from align.data.annotation_files import is_annotation
from align.data.rows import Raw
from align.data.transcripts import ANSWER, begins_transcript

_MESSAGE = ("message_id", "parent_id", "text", "role")
"""Columns of a flat message of OpenAssistant."""


def _has(row: Raw, reader: str) -> bool:
    return all(row.get(name) is not None for name in REQUIRED_COLUMNS[reader])


def is_transcript(row: Raw) -> bool:
    """Whether a pair consists of transcripts, as in HH-RLHF, or begins with one in its prompt."""
    prompt, chosen = row.get("prompt"), row.get("chosen")
    if chosen is None or not begins_transcript(prompt or chosen):
        return False
    return any(isinstance(text, str) and ANSWER in text for text in (prompt, chosen))


def _is_tree(row: Raw) -> bool:
    root = row.get("prompt")
    return all(name in row for name in _MESSAGE) or (isinstance(root, dict) and "replies" in root)


def _is_gsm8k(row: Raw) -> bool:
    return _has(row, "gsm8k") and "####" in str(row["answer"])


def _has_solutions(row: Raw) -> bool:
    values = [value for value in row.values() if isinstance(value, dict)]
    return _has(row, "gsm8k_solutions") and any("solution" in value for value in values)


_TESTS: Mapping[str, tuple[str, Callable[[Raw], bool]]] = {
    "hh": ("transcripts", is_transcript),
    "ultrafeedback": ("UltraFeedback's", lambda row: _has(row, "ultrafeedback")),
    "shp": ("those of Stanford Human Preferences", lambda row: _has(row, "shp")),
    "tldr": ("TL;DR comparisons", lambda row: _has(row, "tldr")),
    "oasst": ("OpenAssistant's", _is_tree),
    "gsm8k_solutions": ("labeled solutions of GSM8K", _has_solutions),
    "gsm8k": ("GSM8K's", _is_gsm8k),
    "annotations": ("annotations", is_annotation),
}
"""What the rows of each reader are, and whether a row is one of them."""


def reader_of(row: Raw) -> str:
    """The reader of the public data set whose layout a row has; empty if it has none."""
    return next((reader for reader, (_, is_one) in _TESTS.items() if is_one(row)), "")


def advice(rows: Iterable[Raw], reader: str) -> str:
    """What the rows at the head of a source are, with their reader, if it is not ``reader``.

    Empty if no row has the layout of a public data set, or if any has that of ``reader``.
    """
    readers = list(dict.fromkeys(filter(None, map(reader_of, rows))))
    if not readers or reader in readers:
        return ""
    return f"the rows are {_TESTS[readers[0]][0]}; read them with `reader: {readers[0]}`"
