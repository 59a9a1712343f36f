"""The readers of ``prepare``: their names, the columns that they require, and their options."""

from __future__ import annotations

from typing import Literal

Reader = Literal[
    "columns",
    "hh",
    "ultrafeedback",
    "shp",
    "tldr",
    "oasst",
    "gsm8k",
    "gsm8k_solutions",
    "annotations",
]
ALIGN_COLUMNS = (
    *("prompt", "completion", "chosen", "rejected", "messages", "label"),
    *("system", "input", "history", "tools"),
)
REQUIRED_COLUMNS: dict[str, tuple[str, ...]] = {
    "ultrafeedback": ("instruction", "completions"),
    "shp": ("history", "human_ref_A", "human_ref_B", "labels", "score_A", "score_B"),
    "tldr": ("info", "summaries", "choice"),
    "oasst": (),
    "gsm8k": ("question", "answer"),
    "gsm8k_solutions": ("question", "ground_truth"),
    "annotations": (),
}
"""Columns without which a reader of another layout than Align's cannot work."""
COLUMNS = (
    *ALIGN_COLUMNS,
    *dict.fromkeys(n for names in REQUIRED_COLUMNS.values() for n in names),
)  # of any reader
WRITTEN_COLUMNS: dict[str, tuple[str, ...]] = {"gsm8k_solutions": ("answer",)}
"""Columns that a reader adds to those of the source, for ``keep_columns``."""
FORMATS = (("prompt", "chosen", "rejected"), ("prompt", "completion"), ("messages",))
READER_OPTIONS = {
    "pairing": ("ultrafeedback", "oasst", "gsm8k_solutions"),
    "margin": ("ultrafeedback", "oasst"),
    "ratio": ("shp",),
    "languages": ("oasst",),
}


def columns_read(reader: str) -> tuple[str, ...]:
    """The column names that ``columns`` may map for a reader."""
    return REQUIRED_COLUMNS[reader] or ("prompt",) if reader in REQUIRED_COLUMNS else ALIGN_COLUMNS
