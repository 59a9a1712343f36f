"""Sampled completions with their scores in ``samples.jsonl``, for reading."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from align.data.rows import Row
from align.online_rl.scoring import Scores

FILE = "samples.jsonl"
N_PER_STEP = 4
N_STEPS = 20
"""About so many steps of a run are written."""


def is_sampled(step: int, steps: int) -> bool:
    """Whether the samples after ``step`` of ``steps`` steps are written: first, last, and some."""
    return step == 1 or step == steps or step % max(1, steps // N_STEPS) == 0


def append(output_dir: Path, step: int, rows: Sequence[Row], scores: Scores) -> None:
    """Append the first completions of a step, with their prompts and scores."""
    columns = scores.columns()
    with (output_dir / FILE).open("a", encoding="utf-8") as file:
        for i, text in enumerate(scores.texts[:N_PER_STEP]):
            sample = {"step": step, "prompt": rows[i]["prompt"], "completion": text}
            sample |= {key: round(float(column[i]), 6) for key, column in columns.items()}
            file.write(json.dumps(sample, ensure_ascii=False) + "\n")
