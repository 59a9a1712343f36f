"""The JSON schema of recipes, for completion and checks in editors.

After a change of the configuration, write it again: ``python -m align.config.json_schema >
recipes/schema.json``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import models_json_schema

from align.config import trl_fields
from align.config.base import Stage
from align.config.stages import STAGES, stage_classes


def json_schema() -> dict[str, Any]:
    """The schema of recipes, as far as JSON Schema can express it."""
    _, schema = models_json_schema(
        [(cls, "validation") for kind in STAGES for cls in stage_classes(kind)],
        title="Align recipe",
    )
    definitions = schema["$defs"]
    for cls in STAGES.values():
        if cls.trainer_config:
            definitions[cls.__name__]["properties"]["trainer"] = _trainer_schema(cls.trainer_config)
    by_kind = {kind: _any_of(stage_classes(kind)) for kind in STAGES}
    renamed = [  # a stage under another name than that of its kind
        {"allOf": [ref, {"required": ["stage"], "properties": {"stage": {"const": kind}}}]}
        for kind, ref in by_kind.items()
    ]
    _join_lines(definitions)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Align recipe",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "needs": {"type": "array", "items": {"type": "string"}},
            "stages": {
                "type": "object",
                "properties": by_kind,
                "additionalProperties": {"anyOf": renamed},
            },
        },
        "$defs": definitions,
    }


def _any_of(classes: Sequence[type[Stage]]) -> dict[str, Any]:
    references = [{"$ref": f"#/$defs/{cls.__name__}"} for cls in classes]
    return references[0] if len(references) == 1 else {"anyOf": references}


def _join_lines(schema: Any) -> None:
    """Write each description in a schema on one line."""
    for part in schema.values() if isinstance(schema, dict) else schema:
        if isinstance(part, dict | list):
            _join_lines(part)
    if isinstance(schema, dict) and isinstance(schema.get("description"), str):
        schema["description"] = " ".join(schema["description"].split())


def text() -> str:
    """The content of ``recipes/schema.json``."""
    return json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n"


def _trainer_schema(config: str) -> dict[str, Any]:
    fields = trl_fields.trl_fields(config).items()
    return {
        "type": "object",
        "description": f"Fields of TRL's {config}, passed on unchanged.",
        "additionalProperties": False,
        "properties": {
            name: _field_schema(field)
            for name, field in sorted(fields)
            if not trl_fields.reserved(config, name)
        },
    }


def _field_schema(field: trl_fields.TRLField) -> dict[str, Any]:
    """The declared type with its choices. A list of text may also be written as one item."""
    item: dict[str, Any] = {"type": "string"}
    if field.choices:
        item["enum"] = list(field.choices)
    if field.annotation == "list[str]":
        return {"anyOf": [{"type": "array", "items": item}, item]}
    if field.annotation == "str":
        return item
    return TypeAdapter(trl_fields.python_type(field.annotation)).json_schema()


if __name__ == "__main__":
    print(text(), end="")
