"""Preference pairs from annotations: the completion that most annotators of a pair prefer.

Any layout of :mod:`align.data.annotation_files` is read. The rows of a pair may be anywhere in the
source, so all of them are held in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from align.data.annotation_files import InvalidRow, annotations_of
from align.data.annotations import Annotation, PairKey, pair_key
from align.data.pairing import PairingOptions, PairsOrDrops, raw_pair
from align.data.rows import DroppedError, Raw

VOTES = "votes"
"""Key of the annotations of a pair in the rows of :func:`grouped`."""


def grouped(rows: Iterator[Raw], source: str) -> Iterator[Raw]:
    """One row for each pair of completions, in the order of their first annotations.

    A row that is no annotation becomes a row with a reason, so that it is counted.

    Raises:
        DataError: There are no rows, or they belong to no layout.
    """
    pairs: dict[PairKey, list[Annotation]] = {}
    problems = []
    for each in annotations_of(rows, source):
        if isinstance(each, InvalidRow):
            place = f"row {each.number}"
            problems.append(DroppedError("invalid annotation", each.message, place=place))
        else:
            key = pair_key(each.prompt_id, each.first, each.second)
            pairs.setdefault(key, []).append(each)
    yield from ({VOTES: votes} for votes in pairs.values())
    yield from ({VOTES: problem} for problem in problems)


def majority(raw: Raw, options: PairingOptions) -> PairsOrDrops:
    """The pair of a row of :func:`grouped`, or the reason why it has none.

    A completion is chosen if the mean preference for it is above one half; ties count one half, and
    skipped decisions do not count.
    """
    votes = raw[VOTES]
    if isinstance(votes, DroppedError):
        yield votes
        return
    first = votes[0]
    same_order = (v if v.first.strip() == first.first.strip() else v.swapped() for v in votes)
    preferences = [v.preference for v in same_order if not math.isnan(v.preference)]
    if not preferences:
        yield DroppedError("no decision")
        return
    mean = math.fsum(preferences) / len(preferences)
    if math.isclose(mean, 0.5, abs_tol=1e-9):
        yield DroppedError("tie")
        return
    sides = (first.first, first.second) if mean > 0.5 else (first.second, first.first)
    yield raw_pair(first.prompt, *sides, None)
