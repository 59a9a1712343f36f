"""The base class of all configurations, and errors between keys that are each valid."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, model_validator

T = TypeVar("T")
_MARK = "_is_between_keys"


def between_keys(check: Callable[[T], Iterator[str]]) -> Callable[[T], Iterator[str]]:
    """Mark a method of a configuration that yields the errors between keys that are each valid."""
    setattr(check, _MARK, True)
    return check


@functools.cache
def _checks(cls: type) -> tuple[str, ...]:
    """The names of the marked methods of a class."""
    members: dict[str, Any] = {}
    for each in reversed(cls.__mro__):
        members |= vars(each)
    return tuple(name for name, member in members.items() if getattr(member, _MARK, False))


class Config(BaseModel):
    """Strict and frozen: an unknown key is an error, and text is not converted to a number."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    def conflicts(self) -> Iterator[str]:
        """The errors of all methods that :func:`between_keys` marks; base classes come first."""
        for name in _checks(type(self)):
            yield from getattr(self, name)()

    @model_validator(mode="after")
    def _check_conflicts(self) -> Self:
        """Raise all errors between keys at once, each in a line."""
        conflicts = list(self.conflicts())
        if conflicts:
            raise ValueError("\n".join(conflicts))
        return self
