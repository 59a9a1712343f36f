"""The catalogue of public preference sets: one small file a set under ``data/catalogue``, found by its name.

A name stands for a Hub id, how to read it, its licence and citation. What a recipe says itself wins.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "data" / "catalog"
ABOUT = ("licence", "citation")  # what no reader needs


@functools.cache
def entries() -> dict[str, dict[str, Any]]:
    """Every entry by its name."""
    import yaml

    files = sorted(FOLDER.glob("*.yaml"))
    return {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in files}


def with_catalog_entry(told: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of a source with those of the catalogue, where ``source`` names an entry.

    A file or folder of that name wins, as any path does; ``embedded`` is always the embedded set.
    """
    name = told.get("source")
    entry = entries().get(name) if isinstance(name, str) else None
    if entry is None or (name != "embedded" and Path(str(name)).exists()):
        return dict(told)
    known = {k: v for k, v in entry.items() if k not in ABOUT and v is not None}
    reader = told.get("reader", known.get("reader"))
    if reader != known.get("reader"):  # its options mean nothing to another reader
        known = {k: v for k, v in known.items() if k not in ("pairing", "margin", "ratio")}
    return known | dict(told) | {"source": known["source"]}


def license_of(source: str) -> tuple[str, str]:
    """The licence's identifier (empty where there is none) and its words, with the citation."""
    for name, entry in entries().items():
        word = rf"(?<![a-z0-9]){re.escape(name)}(?![a-z0-9])"  # a local copy, named after the set
        copy = name != "embedded" and re.search(word, source.lower())
        if source in (name, entry["source"]) or copy:
            identifier, text = entry["licence"]["id"], entry["licence"]["text"]
            return identifier, text if name == "embedded" else f"{text} ({entry['citation']})"
    return "", "not known here; see the source"
