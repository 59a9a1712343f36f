"""Decisions of people about pairs of completions, read from files of annotations.

An annotation belongs to a pair with the same prompt and the same two completions, in any order. The
decisions of several people about one pair are averaged. Pairs without a decision are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from align.data.annotation_files import read_annotations
from align.data.rows import prompt_id
from align.judges.base import Messages, Pair, Usage, Verdict

Key = tuple[str, str, str]


class People:
    """People who decided about some pairs. It is a ``PairJudge``."""

    reads_in_order: ClassVar[bool] = False
    covers_all: ClassVar[bool] = False

    def __init__(self, name: str, source: Path) -> None:
        """Read the annotations of a file or a folder; ``name`` is what tables call them.

        Raises:
            DataError: The source is missing or malformed.
        """
        self.name = name
        self._decisions: dict[Key, list[float]] = {}
        for annotation in read_annotations(source):
            if not math.isnan(annotation.preference):
                for each in (annotation, annotation.swapped()):
                    key = _key(each.prompt_id, each.first, each.second)
                    self._decisions.setdefault(key, []).append(each.preference)

    @property
    def usage(self) -> Usage | None:
        """None: people answer no requests."""
        return None

    def compare(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """The mean decision about each pair, with the single ones as its votes."""
        return [self._verdict(pair) for pair in pairs]

    def _verdict(self, pair: Pair) -> Verdict:
        texts = _last(pair.first), _last(pair.second)
        votes = self._decisions.get(_key(prompt_id(_turns(pair.prompt)), *texts))
        if votes is None:
            return Verdict(math.nan, "no annotation")
        return Verdict(sum(votes) / len(votes), votes=tuple(votes))


def _key(prompt: str, first: str, second: str) -> Key:
    return prompt, first.strip(), second.strip()


def _last(completion: Messages) -> str:
    return completion[-1]["content"]


def _turns(messages: Messages) -> list[dict[str, str]]:
    return [{**message} for message in messages]
