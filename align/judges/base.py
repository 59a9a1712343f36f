"""What a judge is: it scores one completion at a time, or compares two.

A judge that scores is independent of the order of two completions. A judge that compares is asked
in both orders where it reads them one after the other, and may give no usable verdict.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from align.models.tokenization import Message

Messages = Sequence[Message]


@dataclass(frozen=True, slots=True)
class Pair:
    """Two completions of one prompt, in the order in which a judge reads them."""

    prompt: Messages
    first: Messages
    second: Messages
    columns: Mapping[str, Any]
    """Further columns of the prompt's row, such as a reference answer."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judge's decision about a :class:`Pair`."""

    preference: float
    """Probability that the first completion is the better one: 1, 0.5 for a tie, 0, or a value
    between them. NaN: there is no usable verdict."""
    reason: str = ""
    """Why, in the words of the judge; or why there is no usable verdict."""
    criteria: Mapping[str, float] | None = None
    """The preference by each criterion of a rubric."""
    votes: tuple[float, ...] = ()
    """The preferences of repeated verdicts, whose mean is ``preference``; empty for a single one.
    """

    @property
    def is_valid(self) -> bool:
        """Whether the verdict can be used."""
        return not math.isnan(self.preference)


@dataclass(frozen=True, slots=True)
class Usage:
    """What the verdicts of a judge behind an API took."""

    requests: int
    """Requests that were sent, with retries."""
    cached: int
    """Verdicts that were read from the cache."""
    input_tokens: int
    """Tokens of the requests that were answered; verdicts from the cache cost none."""
    output_tokens: int
    cached_input_tokens: int = 0
    """Tokens that the verdicts from the cache took when they were requested."""
    cached_output_tokens: int = 0
    cost: float | None = None
    """What ``input_tokens`` and ``output_tokens`` cost at the prices of the run that sent them;
    None where its configuration has no prices."""


@runtime_checkable
class ScoreJudge(Protocol):
    """Scores completions; a higher score is better."""

    name: str
    """What recipes and tables call the judge."""

    def check_prompts(self, prompts: Sequence[Messages], *, repair: str) -> None:
        """Raise a ``UserError``, ending in ``repair``, if the judge cannot score these prompts."""

    def score(
        self,
        prompts: Sequence[Messages],
        completions: Sequence[Messages],
        columns: Mapping[str, Sequence[Any]],
    ) -> list[float]:
        """One score per completion; NaN where there is none.

        ``columns`` are further columns of the prompts' rows, one value per completion.
        """


@runtime_checkable
class PairJudge(Protocol):
    """Compares two completions of one prompt."""

    name: str
    """What recipes and tables call the judge."""
    reads_in_order: ClassVar[bool]
    """Whether the judge reads one completion after the other, so that it is asked in both orders.
    """
    covers_all: ClassVar[bool]
    """Whether a missing verdict is a failure. People decide about some pairs only: the others are
    left out, and not counted as invalid."""

    @property
    def usage(self) -> Usage | None:
        """What all verdicts so far took; None for a judge that sends no requests."""

    def compare(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """One verdict per pair, in the given order. Failures are verdicts that are not valid."""
