"""Keys of a stage that name what it reads: earlier stages, folders, models and functions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*\Z")  # module:function


@dataclass(frozen=True, slots=True)
class Input:
    """A key that names what a stage reads: an earlier stage of ``stages``, or its folder.

    With ``policies``, it may be any stage that writes a policy. With ``models``, the value may also
    name a model: a folder in Hugging Face layout or a Hub id. With ``functions``, it may be a
    Python function, written ``module:function``. The values in ``words`` have a fixed meaning and
    name no input.
    """

    stages: tuple[str, ...] = ()
    policies: bool = False
    models: bool = False
    functions: bool = False
    words: tuple[str, ...] = ()
    suffix: str = ""
    """Suffix of files that the key may name beside inputs; empty: it names no file."""
    field: str = ""
    """The key below this one whose value is the name; empty: the value of this key is."""

    def names_no_input(self, value: str) -> bool:
        """Whether ``value`` is a fixed word, a function or a file: no stage, folder or model."""
        is_function = self.functions and FUNCTION.match(value) is not None
        return value in self.words or is_function or self.names_file(value)

    def names_file(self, value: str) -> bool:
        """Whether ``value`` is a file."""
        return bool(self.suffix) and value.endswith(self.suffix)


def input_names(inputs: Mapping[str, Input], values: Mapping[str, Any]) -> dict[str, str]:
    """The named inputs by key, such as ``{"model": "sft", "policies.0": "dpo"}``.

    ``values`` has the value of each key in ``inputs``, raw or validated.
    """
    candidates: dict[str, Any] = {}
    for key, declared in inputs.items():
        value = values.get(key)
        if declared.field:
            raw = value if isinstance(value, Mapping) else {}
            candidates[f"{key}.{declared.field}"] = getattr(
                value, declared.field, raw.get(declared.field)
            )
            continue
        items = enumerate(value) if isinstance(value, list) else ()
        candidates |= {key: value} | {f"{key}.{i}": item for i, item in items}
    return {
        key: value
        for key, value in candidates.items()
        if isinstance(value, str) and not inputs[key.split(".")[0]].names_no_input(value)
    }
