"""Folders of finished stages and runs, written without running anything."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from align.runtime import checksums


def stage(runs: Path, name: str, kind: str | None = None, **fields) -> Path:
    """The folder of a finished stage; its name ends with the digest, by default a fixed one."""
    digest = fields.get("digest", f"{len(name):064x}")
    folder = runs / f"{name}-{digest[-12:]}"
    folder.mkdir(parents=True)
    record = {
        "stage": kind or name,
        "name": name,
        "digest": digest,
        "recipe": {},
        "inputs": {},
        "metrics": {},
        "versions": {"python": "3.11", "align": "0.2"},
        "commit": None,
        "seed": 0,
        "world_size": 1,
        "seconds": 75.0,
        "peak_memory_bytes": 2_500_000_000,
    }
    (folder / "artifact.json").write_text(
        json.dumps(
            checksums.seal(
                {**record, "headline": {}, "remarks": [], "tables": [], "files": {}, **fields}
            )
        )
    )
    return folder


def comparison(policy: str, **fields) -> dict:
    return {
        "policy": policy,
        "baseline": "sft",
        "judge": "gold",
        "win_rate": 0.62,
        "ci": [0.54, 0.69],
        "length_controlled_win_rate": 0.555,
        **fields,
    }


def write_summary(
    runs: Path,
    name: str,
    *folders: Path,
    overrides: Collection[str] = (),
    reused: Collection[Path] = (),
) -> Path:
    """The folder of a run of these stages."""
    folder = runs / name
    folder.mkdir(parents=True)
    entries = [
        {
            "name": each.name.rpartition("-")[0],
            "folder": str(each),
            "status": "reused" if each in reused else "ran",
        }
        for each in folders
    ]
    summary = {
        "recipe": "recipe.yaml",
        "overrides": list(overrides),
        "seconds": 6220.0,
        "stages": entries,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder
