"""The catalog of public preference data sets: a YAML file for each in ``data/catalog``.

An entry gives the Hub id of a data set, how it is read, its license and its citation. Keys in the
recipe take precedence.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.config.shipped import EMBEDDED, data_dir

DOCUMENTATION = ("license", "citation")  # keys of an entry that no reader needs


@functools.cache
def entries() -> dict[str, dict[str, Any]]:
    """All entries by name.

    Raises:
        UserError: The folder of the catalog is missing from the installation.
    """
    import yaml

    files = sorted((data_dir() / "catalog").glob("*.yaml"))
    return {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in files}


def with_catalog_entry(values: Mapping[str, Any]) -> dict[str, Any]:
    """Add the keys of a catalog entry to those of a source, if ``source`` names one.

    An existing file or folder of that name takes precedence, except over embedded data.
    """
    name = values.get("source")
    entry = entries().get(name) if isinstance(name, str) else None
    if entry is None or (name not in EMBEDDED and Path(str(name)).exists()):
        return dict(values)
    known = {k: v for k, v in entry.items() if k not in DOCUMENTATION and v is not None}
    if values.get("reader", known.get("reader")) != known.get("reader"):
        # The options of the entry have no effect with another reader.
        known = {k: v for k, v in known.items() if k not in ("pairing", "margin", "ratio")}
    return known | dict(values) | {"source": known["source"]}


def license_of(source: str) -> tuple[str, str]:
    """The license of a source: its identifier (empty if unknown) and its description."""
    for name, entry in entries().items():
        word = rf"(?<![a-z0-9]){re.escape(name)}(?![a-z0-9])"
        # A local copy of a data set usually has its name in its path.
        is_copy = name not in EMBEDDED and re.search(word, source.lower())
        if source in (name, entry["source"]) or is_copy:
            identifier, text = entry["license"]["id"], entry["license"]["text"]
            return identifier, text if name in EMBEDDED else f"{text} ({entry['citation']})"
    return "", "unknown; see the source"
