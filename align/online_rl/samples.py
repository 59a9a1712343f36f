"""Sampled completions with their scores: in ``samples.jsonl``, and those of a failed update."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from align.data.rows import Row
from align.errors import UserError
from align.online_rl.groups import Batch
from align.online_rl.optimization import NotFiniteError
from align.online_rl.scoring import Scores
from align.rl.rollout import Rollout
from align.runtime import stopped_batch

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


@contextmanager
def saved_if_not_finite(
    output_dir: Path, step: int, batch: Batch, rollout: Rollout
) -> Iterator[None]:
    """Write the batch of an update, if that raises :class:`NotFiniteError`, and name the file.

    Each completion has its prompt, tokens and scores, and for each of its tokens the advantage and
    the log-probability before the update.
    """
    try:
        yield
    except NotFiniteError as error:
        columns = batch.scores.columns()
        rows = [
            {
                "prompt": row["prompt"],
                "completion": text,
                "prompt_tokens": batch.completions.prompts[i],
                "completion_tokens": batch.completions.completions[i],
                **{key: float(column[i]) for key, column in columns.items()},
                "advantages": rollout.advantages[i][rollout.mask[i]].tolist(),
                "logps": rollout.logps[i][rollout.mask[i]].tolist(),
            }
            for i, (row, text) in enumerate(zip(batch.rows, batch.scores.texts, strict=True))
        ]
        content = {"error": str(error), "step": step + 1, "rows": rows}
        file = stopped_batch.save(output_dir, content)
        end = f"{file} has the batch{stopped_batch.beside()}"
        raise UserError(f"step {step + 1}: {error}; {end}") from None
