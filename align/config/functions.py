"""Configuration of functions that score completions: as rewards of a policy, and as judges.

This is the one place where the short name of a built-in function gets its meaning.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from align.config.base import FUNCTION, Config, between_keys

BUILT_IN = ("number", "math", "regex", "contains", "length", "json_schema", "sentiment")
"""Short names of the functions in :mod:`align.rewards.verifiers`."""
PACKAGES = {
    "math": ("math_verify", "-e '.[math]'"),
    "json_schema": ("jsonschema", "jsonschema"),
    "sentiment": ("vaderSentiment", "-e '.[sentiment]'"),
}
"""The module that a built-in function imports, and the argument of ``pip install``."""


class ScoreFunction(Config):
    """Scores of a Python function."""

    function: str
    """The function, written ``module:function``; or a built-in one: ``number``, ``math``,
    ``regex``, ``contains``, ``length``, ``json_schema`` or ``sentiment``."""
    answer_column: str | None = Field(None, min_length=1)
    """Column of the prompts that is the parameter ``answer`` of the function. Default: the column
    ``answer``."""
    answer: Any = None
    """Value of the parameter ``answer`` for all prompts, such as the pattern of ``regex``, in place
    of a column."""
    name: str | None = Field(None, min_length=1)
    """Name in logs and tables. Default: the function."""
    timeout_seconds: float = Field(600.0, gt=0.0)
    """Longest time of one call, after which the run ends with an error."""

    @between_keys
    def _check_function(self) -> Iterator[str]:
        if self.function not in BUILT_IN and not FUNCTION.match(self.function):
            yield (
                f"`function` must be written module:function, or be {', '.join(BUILT_IN)}; got "
                f"{self.function!r}"
            )
        if self.answer is not None and self.answer_column is not None:
            yield "`answer` and `answer_column` both set the answer of a row; remove one of them"

    @property
    def label(self) -> str:
        """The name of the scores in logs and tables."""
        return self.name or self.function

    @property
    def address(self) -> str:
        """The function as ``module:function``."""
        built_in = self.function in BUILT_IN
        return f"align.rewards.verifiers:{self.function}" if built_in else self.function

    @property
    def package(self) -> tuple[str, str] | None:
        """The optional dependency of a built-in function, and the argument of ``pip install``."""
        return PACKAGES.get(self.function)

    def digest_settings(self) -> dict[str, Any]:
        """The settings that can change a score or the name of one."""
        return self.model_dump(exclude={"timeout_seconds"}, exclude_defaults=True)

    def missing_columns(self, required: Collection[str], columns: Collection[str]) -> Iterator[str]:
        """The columns that the function lacks.

        ``required`` are its parameters without a default, ``columns`` those of the prompts.
        """
        if self.answer_column is not None and self.answer_column not in columns:
            yield self.answer_column
        available = {*columns, "prompts", "completions"}
        if self.answer is not None or self.answer_column is not None:
            available.add("answer")
        yield from (each for each in required if each not in available)

    def columns(self, columns: Mapping[str, Sequence[Any]], n: int) -> dict[str, Sequence[Any]]:
        """The columns of ``n`` rows, with the parameter ``answer`` that the recipe sets."""
        if self.answer is not None:
            return {**columns, "answer": [self.answer] * n}
        if self.answer_column is not None:
            return {**columns, "answer": columns[self.answer_column]}
        return dict(columns)


Reward = Annotated[
    Annotated[str, Tag("«text»")] | Annotated[ScoreFunction, Tag("«function»")],
    Discriminator(
        lambda value: "«text»" if isinstance(value, str) else "«function»",
    ),
]
"""A reward of a recipe: a reward model or a function by its name, or a mapping."""


def as_function(reward: str | ScoreFunction) -> ScoreFunction | None:
    """The function that a reward names; None if it names a reward model."""
    if isinstance(reward, ScoreFunction):
        return reward
    is_function = reward in BUILT_IN or FUNCTION.match(reward)
    return ScoreFunction.model_validate({"function": reward}) if is_function else None
