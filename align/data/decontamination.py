"""Decontamination: does a prompt stand in a named set of evaluation prompts?

Exactly (letter case, punctuation and white space aside), or by a run of n words that both have. A named prompt of fewer
than n words is only found whole. Completions are not searched. Costs a hash for each run of words in the named sets.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from align.data.rows import normalize_text

_WORD = re.compile(r"\w+")


class EvaluationPrompts:
    """The evaluation prompts of one set, by their runs of ``n`` words."""

    def __init__(self, name: str, texts: Iterable[str], n: int) -> None:
        self.name, self._n = name, n
        self._whole: set[int] = set()
        self._runs: set[int] = set()
        for text in texts:
            words = _words(text)
            if words:
                self._whole.add(hash(tuple(words)))
                self._runs.update(_runs(words, n))

    def finds(self, texts: Iterable[str]) -> str | None:
        """Why a prompt with these turns is contaminated; None where it is not."""
        for text in texts:
            words = _words(text)
            if hash(tuple(words)) in self._whole:
                return f"prompt is in {self.name}"
            if not self._runs.isdisjoint(_runs(words, self._n)):
                return f"prompt shares {self._n} words in a row with {self.name}"
        return None


def prompts_of(raw: dict[str, Any]) -> list[str] | None:
    """The texts of the user's turns in a raw row of an evaluation set; None where it has no prompt."""
    found = next(
        (raw[k] for k in ("prompt", "messages", "question", "instruction") if k in raw), None
    )
    if isinstance(found, str):
        return [found]
    if not isinstance(found, list) or not all(isinstance(turn, dict) for turn in found):
        return None
    said = [turn.get("content") for turn in found if turn.get("role") == "user"]
    return said if all(isinstance(text, str) for text in said) else None


def _words(text: str) -> list[str]:
    return _WORD.findall(normalize_text(text))


def _runs(words: list[str], n: int) -> Iterator[int]:
    return (hash(tuple(words[i : i + n])) for i in range(len(words) - n + 1))
