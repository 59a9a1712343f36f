"""The points of ``align run RECIPE --sweep KEY=VALUE,VALUE``: overrides and names of runs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from align.errors import RecipeError

MOST_POINTS = 100
_NOT_IN_NAMES = re.compile(r"[^\w.=+-]+")


@dataclass(frozen=True, slots=True)
class Point:
    """One run of a sweep."""

    overrides: tuple[str, ...]

    def run_name(self, recipe: str) -> str:
        """The name of the run: that of the recipe, and what distinguishes the point."""
        return "-".join([recipe, *(_NOT_IN_NAMES.sub("_", each) for each in self.overrides)])


def points(sweeps: Sequence[str]) -> list[Point]:
    """All combinations of the values of several sweeps, in the order in which they are written.

    >>> [point.overrides for point in points(["dpo.beta=0.1,0.3", "all.seed=0"])]
    [('dpo.beta=0.1', 'all.seed=0'), ('dpo.beta=0.3', 'all.seed=0')]

    Raises:
        RecipeError: A sweep has no key or no values, repeats one, or there are too many points.
    """
    choices: list[list[str]] = []
    for sweep in sweeps:
        key, equals, text = sweep.partition("=")
        values = [value.strip() for value in _split(text)]
        if not key or not equals or not all(values):
            raise RecipeError(
                f"--sweep {sweep}: expected KEY=VALUE,VALUE, such as dpo.beta=0.1,0.3"
            )
        if len(set(values)) < len(values):
            raise RecipeError(f"--sweep {sweep}: has a value twice; list each once")
        choices.append([f"{key}={value}" for value in values])
    found = [Point(each) for each in itertools.product(*choices)]
    if len(found) > MOST_POINTS:
        raise RecipeError(f"--sweep: {len(found)} runs, more than {MOST_POINTS}; split the sweep")
    return found


def _split(text: str) -> list[str]:
    """Split at commas outside of brackets and quotes."""
    parts, depth, start = [], 0, 0
    quote = ""
    for place, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "[{(":
            depth += 1
        elif character in "]})":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[start:place])
            start = place + 1
    return [*parts, text[start:]]
