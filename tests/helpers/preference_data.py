"""Preference data for tests: turns, files of pairs, and prepared data."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.config.data import Prepare
from align.data.prepare import PreparedData, prepare
from align.runtime.progress import Logger, NullDisplay
from align.stages import prepare as prepare_stage

CHECKOUT = Path(__file__).parents[2]
HH_FILE = CHECKOUT.parent / "shared" / "data" / "hh-rlhf" / "harmless-base-test.jsonl.gz"

WORDS = [
    "amber",
    "birch",
    "cedar",
    "delta",
    "ember",
    "frost",
    "grove",
    "heath",
    "ivory",
    "jade",
    "kelp",
    "lotus",
    "maple",
    "north",
    "ocean",
]
PAIR = {"prompt": "Say a word.", "chosen": "Hello.", "rejected": "No."}


def system(text: str) -> dict[str, str]:
    """A system turn."""
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, str]:
    """A user turn."""
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    """An assistant turn."""
    return {"role": "assistant", "content": text}


def write_jsonl(path: Path, rows: Sequence[Any]) -> str:
    """Write rows as JSONL, and return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def random_pairs(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Pairs with distinct prompts of 14 words; those of another seed are all different."""
    draw = random.Random(seed)
    return [
        {
            "prompt": f"Item {seed}.{k}: " + " ".join(draw.choices(WORDS, k=12)),
            "chosen": f"yes {k} " + draw.choice(WORDS),
            "rejected": f"no {k}",
        }
        for k in range(n)
    ]


def prepared(source: Path | str, **keys: Any) -> PreparedData:
    """Prepare a source with the keys of a recipe."""
    return prepare(Prepare.model_validate({"source": str(source), **keys}))


def prepared_whole(source: Path | str, **keys: Any) -> PreparedData:
    """Prepare a source without a held-out split, so that a file of one row is enough."""
    return prepared(source, **{"test_fraction": 0.0, **keys})


def training_rows(data: PreparedData, kind: str = "pairs") -> list[dict[str, Any]]:
    """Rows of the training split."""
    return data.tables()[kind]["train"]


def split_by_prompt(data: PreparedData, kind: str = "pairs") -> dict[str, str]:
    """The split of each prompt, by its first turn."""
    return {r.row["prompt"][0]["content"]: r.split for r in data.rows() if r.kind == kind}


def run_prepare(config: Prepare, output_dir: Path) -> dict[str, Any]:
    """Run the stage ``prepare``, and return its metrics."""
    logger = Logger("prepare", output_dir, NullDisplay(), main=True)
    return prepare_stage.run(config, {}, output_dir, logger).metrics
