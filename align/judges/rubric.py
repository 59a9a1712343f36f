"""Rubrics: criteria that a judge decides one by one, and their weights.

criteria:
  - {name: correct, question: Which completion has fewer errors of fact?, weight: 2}
  - {name: brief, question: Which completion says the same in fewer words?}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field, ValidationError, field_validator

from align.config.base import Config, duplicates
from align.config.yaml_loader import read_yaml
from align.errors import UserError, did_you_mean, shown
from align.judges.base import Verdict
from align.judges.verdicts import no_verdict


class Criterion(Config):
    """One question about two completions."""

    name: str = Field(min_length=1, max_length=64)
    """Name in tables and results."""
    question: str = Field(min_length=1)
    """What the judge decides, such as "Which completion has fewer errors of fact?"."""
    weight: float = Field(1.0, gt=0.0)
    """Weight of the criterion in the verdict."""


class Rubric(Config):
    """Criteria that are decided one by one."""

    criteria: list[Criterion]
    """The criteria, each with its own name."""

    @field_validator("criteria")
    @classmethod
    def _check_criteria(cls, criteria: list[Criterion]) -> list[Criterion]:
        if not criteria:
            raise ValueError("expected at least one criterion, got an empty list")
        for name in duplicates([criterion.name for criterion in criteria]):
            raise ValueError(f"`{name}` is the name of several criteria; give each its own")
        return criteria

    def combine(self, verdicts: Mapping[str, Verdict]) -> Verdict:
        """The weighted mean of the verdicts by criterion; none if one is missing."""
        preferences = {name: verdict.preference for name, verdict in verdicts.items()}
        for name, verdict in verdicts.items():
            if not verdict.is_valid:
                missing = no_verdict(f"{name}: {verdict.reason}")
                return Verdict(missing.preference, missing.reason, preferences)
        total = math.fsum(criterion.weight for criterion in self.criteria)
        weighted = math.fsum(each.weight * preferences[each.name] for each in self.criteria)
        reasons = (f"{name}: {verdict.reason}" for name, verdict in verdicts.items())
        return Verdict(weighted / total, "\n".join(reasons), preferences)


def read_rubric(path: Path) -> Rubric:
    """Read a rubric from a YAML file.

    Raises:
        UserError: One line for each error, with its line in the file.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; name a YAML file with `criteria:`")
    document = read_yaml(path)
    if document.problems:
        raise UserError(*document.problems)
    if not isinstance(document.data, dict):
        raise UserError(
            f"{path}:1: expected a mapping with `criteria:`, got {shown(document.data)}"
        )
    try:
        return Rubric.model_validate(document.data)
    except ValidationError as error:
        lines = []
        for detail in error.errors(include_url=False):
            address = detail["loc"]
            message = detail["msg"].removeprefix("Value error, ")
            if detail["type"] == "extra_forbidden":
                known = (Rubric if len(address) == 1 else Criterion).model_fields
                message = (
                    f"unknown key{did_you_mean(str(address[-1]), known)}; known: {', '.join(known)}"
                )
            where = ".".join(map(str, address))
            lines.append(f"{document.place(address)}: {where}: {message}")
        raise UserError(*lines) from None
