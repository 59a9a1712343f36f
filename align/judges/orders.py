"""Pairs that a judge reads in both orders, and the decisions that follow.

A flip, where the judge prefers the completion in the same place in both orders, is half a win. A
pair without a usable verdict in each order has no decision: it is missing, not lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from align.errors import UserError
from align.judges.base import Pair, PairJudge, Verdict
from align.runtime import distributed
from align.runtime.progress import Logger

PAIRS_PER_CALL = 256
"""Pairs that a judge compares in one call, after which progress is shown."""


@dataclass(frozen=True, slots=True)
class Decision:
    """The verdicts about a pair, in one order or in both."""

    forward: Verdict
    """The verdict where the first completion is read first."""
    backward: Verdict | None
    """The verdict where the second completion is read first, about that order; None for a judge
    that does not read in order."""

    @property
    def preferences(self) -> tuple[float, float]:
        """Preference for the first completion where it is read first, and where it is second."""
        forward = self.forward.preference
        return forward, forward if self.backward is None else 1 - self.backward.preference

    @property
    def preference(self) -> float:
        """Preference for the first completion: the mean of both orders; NaN if one is missing."""
        return sum(self.preferences) / 2

    @property
    def criteria(self) -> dict[str, float]:
        """Preference for the first completion by each criterion of a rubric, in both orders."""
        forward = self.forward.criteria
        backward = None if self.backward is None else self.backward.criteria
        if forward is None or backward is None:
            return {}
        return {name: (value + 1 - backward[name]) / 2 for name, value in forward.items()}

    @property
    def reason(self) -> str:
        """The reasons of the judge."""
        verdicts = [self.forward] if self.backward is None else [self.forward, self.backward]
        return " | ".join(dict.fromkeys(each.reason for each in verdicts if each.reason))

    @property
    def votes(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Repeated verdicts for the first completion, in both orders."""
        backward = () if self.backward is None else self.backward.votes
        return self.forward.votes, tuple(1 - vote for vote in backward)


def decide(judge: PairJudge, pairs: Sequence[Pair], *, unit: str, logger: Logger) -> list[Decision]:
    """Decisions about pairs, computed by the main process, on every rank.

    Raises:
        UserError: The judge cannot be used, such as a server that refuses the key.
    """
    if not judge.reads_in_order:
        verdicts = _collect(judge, pairs, unit=unit, logger=logger)
        return [Decision(verdict, None) for verdict in verdicts]
    swapped = [replace(pair, first=pair.second, second=pair.first) for pair in pairs]
    # Both orders of a pair follow each other, so that a part of the pairs is complete.
    both = [each for pair in zip(pairs, swapped, strict=True) for each in pair]
    verdicts = _collect(judge, both, unit=unit, logger=logger)
    return [Decision(*each) for each in zip(verdicts[::2], verdicts[1::2], strict=True)]


def _collect(
    judge: PairJudge, pairs: Sequence[Pair], *, unit: str, logger: Logger
) -> list[Verdict]:
    verdicts: list[Verdict] = []
    error: UserError | None = None
    if distributed.is_main():
        try:
            for start in range(0, len(pairs), PAIRS_PER_CALL):
                verdicts += judge.compare(pairs[start : start + PAIRS_PER_CALL])
                logger.step(len(verdicts), len(pairs), unit=unit)
        except UserError as raised:
            error = raised
    error = distributed.broadcast_from_main(error)
    if error is not None:
        raise error
    return distributed.broadcast_from_main(verdicts)
