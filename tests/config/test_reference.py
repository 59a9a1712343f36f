"""Generated files are up to date: the key reference, the schema, the fields of TRL."""

from __future__ import annotations

import functools
from pathlib import Path

import jsonschema
import pytest
from pydantic import BaseModel

from align.config import json_schema, reference, trl_fields
from align.config.base import Lora, NewModel
from align.config.control.algorithms import FAMILIES
from align.config.data import MixtureSource
from align.config.stages import STAGES
from align.training import trl_field_table

ROOT = Path(__file__).parents[2]
key_reference = functools.cache(reference.text)


def test_the_key_reference_is_generated():
    # After a change: python -m align.config.reference > docs/reference/configuration.md
    assert (ROOT / "docs" / "reference" / "configuration.md").read_text(
        encoding="utf-8"
    ) == key_reference()


def test_the_schema_is_generated():
    # After a change: python -m align.config.json_schema > recipes/schema.json
    text = (ROOT / "recipes" / "schema.json").read_text(encoding="utf-8")
    assert text == json_schema.text()
    jsonschema.Draft202012Validator.check_schema(json_schema.json_schema())


def test_the_fields_of_trl_are_those_of_the_installed_version():
    # After an upgrade of TRL: python -m align.training.trl_field_table
    assert trl_fields.FILE.read_text(encoding="utf-8") == trl_field_table.text()


@pytest.mark.parametrize("cls", [*STAGES.values(), *FAMILIES, NewModel, Lora, MixtureSource])
def test_every_key_has_a_description_that_is_a_sentence(cls: type[BaseModel]):
    text = key_reference()
    for name, field in cls.model_fields.items():
        description = " ".join((field.description or "").split())
        assert description.endswith((".", "``")), name
        assert description[0].isupper() or description.startswith("``"), name
        assert f"| `{name}` |" in text or name == "stage"
