"""Measurements of each held-out prompt in ``held_out.jsonl``, for intervals and fits.

``metrics.jsonl`` has their means.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from align.online_rl.experience import Experience
from align.online_rl.scoring import Scores
from align.runtime import artifacts, distributed

FILE = artifacts.HELD_OUT

Measurement = Mapping[str, float]
"""Scores and log-ratio of the completion of one prompt."""


def measurements(scores: Scores, experience: Experience) -> list[Measurement]:
    """Scores of each completion, and ``kl``: its log-ratio between policy and reference."""
    logratios = (experience.logps - experience.ref_logps).masked_fill(~experience.mask, 0).sum(1)
    columns = {"kl": logratios.cpu()} | scores.columns()
    return [
        {key: round(float(column[i]), 6) for key, column in columns.items()}
        for i in range(len(scores.texts))
    ]


def append(output_dir: Path, step: int, own: Sequence[Measurement], n_prompts: int) -> None:
    """Append a line per prompt: ``step``, ``prompt`` (its place in the split), and measurements.

    ``own`` belongs to every ``world_size``-th of the ``n_prompts`` prompts. A collective call.
    """
    every = distributed.map_rows(range(n_prompts), lambda _: own, size=None)
    if distributed.is_main():
        with (output_dir / FILE).open("a", encoding="utf-8") as file:
            for i, measurement in enumerate(every):
                file.write(json.dumps({"step": step, "prompt": i, **measurement}) + "\n")
