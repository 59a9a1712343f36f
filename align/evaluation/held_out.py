"""evaluation.held_out"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from align.config.evaluate import Evaluate
from align.data import tables
from align.errors import UserError
from align.runtime import artifacts

_STAGE_FOLDER = re.compile(r"-[0-9a-f]{12}$")  # a stage's folder
_TRAINING_TABLES = ("demonstrations", "pairs", "unpaired")
Row = dict[str, Any]


# Held out ------------------------------------------------------------------------------------------------------------


def read_held_out(data: Path, kind: str, config: Evaluate) -> list[Row]:
    rows = tables.read(data, kind, config.split)
    ids = dict.fromkeys(row["prompt_id"] for row in rows)
    kept = set(list(ids)[: config.n_prompts])
    return [row for row in rows if row["prompt_id"] in kept]


def refuse_trained_prompts(
    rows: Sequence[Row], targets: Mapping[str, Path | str], data: Path
) -> None:
    """Refuse prompts that a policy, or any model it comes from, was trained on."""
    held_out = {row["prompt_id"] for row in rows}
    for name, target in targets.items():
        for file in sorted(trained_on(Path(target))):
            seen = held_out & set(
                pq.read_table(file, columns=["prompt_id"])["prompt_id"].to_pylist()
            )
            if seen:
                raise UserError(
                    f"{len(seen)} of {len(held_out)} held-out prompts of {data} were trained on by "
                    f"`{name}` ({file}); evaluate on the `prepare` stage that it was trained on"
                )


def trained_on(folder: Path) -> set[Path]:
    """The files that the training stages in the lineage of a folder read."""
    found: set[Path] = set()
    made = artifacts.read_artifact(folder) if folder.is_dir() else None
    if made is None:
        return found  # a model from elsewhere: nothing says what it saw
    for role, given in made.inputs.items():
        below = Path(given["folder"])
        if not below.is_dir():
            below = folder.parent / below.name  # the runs were moved together
        if not below.is_dir() and _STAGE_FOLDER.search(below.name):
            raise UserError(
                f"{folder} was trained on {given['folder']}, which is gone: it cannot be told what was held "
                "out from it; put it back, or run the whole recipe again with `--force all`"
            )
        if not below.is_dir():
            continue
        if role not in ("prompts", "demonstrations"):
            # A policy comes from the model it began as and the rewards it earned, and labels from the policy and the judge
            # that made them.
            found |= trained_on(below)
        kinds = {"preferences": ("unpaired", "pairs")}.get(role, (role,))
        taught = (*_TRAINING_TABLES, "prompts") if made.stage == "ppo" else _TRAINING_TABLES
        files = [below / f"{kind}-train.parquet" for kind in kinds if kind in taught]
        found |= {file for file in files if file.is_file()}
    return found
