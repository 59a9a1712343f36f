"""A JSON schema of recipes, for completion and checks in editors: ``python -m align.config.json_schema > recipes/schema.json``."""

from __future__ import annotations

import json
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import models_json_schema

from align.config import trl_fields
from align.config.stages import STAGES


def json_schema() -> dict[str, Any]:
    """What :func:`align.config.recipe.load_recipe` takes, as far as a schema can say it."""
    _, schema = models_json_schema(
        [(cls, "validation") for cls in STAGES.values()], title="Align recipe"
    )
    definitions = schema["$defs"]
    for cls in STAGES.values():
        if cls.trainer_config:
            definitions[cls.__name__]["properties"]["trainer"] = _trainer_schema(cls.trainer_config)
    named = {key: {"$ref": f"#/$defs/{cls.__name__}"} for key, cls in STAGES.items()}
    own = [
        {"allOf": [ref, {"required": ["stage"], "properties": {"stage": {"const": key}}}]}
        for key, ref in named.items()
    ]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Align recipe",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "needs": {"type": "array", "items": {"type": "string"}},
            "stages": {
                "type": "object",
                "properties": named,
                "additionalProperties": {"anyOf": own},
            },
        },
        "$defs": definitions,
    }


def text() -> str:
    """The schema as it lies in ``recipes/schema.json``."""
    return json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n"


def _trainer_schema(config: str) -> dict[str, Any]:
    properties = {}
    for word, key in sorted(trl_fields.trl_fields(config).items()):
        if word not in trl_fields.OWNED:
            properties[word] = _key_schema(key)
    return {
        "type": "object",
        "description": f"Fields of TRL's {config}, verbatim.",
        "additionalProperties": False,
        "properties": properties,
    }


def _key_schema(key: trl_fields.TRLField) -> dict[str, Any]:
    """The type that a field declares, its choices, and one item alone where a list of text is declared."""
    item: dict[str, Any] = {"type": "string"}
    if key.choices:
        item["enum"] = list(key.choices)
    if key.annotation == "list[str]":
        return {"anyOf": [{"type": "array", "items": item}, item]}
    if key.annotation == "str":
        return item
    return TypeAdapter(trl_fields.python_type(key.annotation)).json_schema()


if __name__ == "__main__":
    print(text(), end="")
