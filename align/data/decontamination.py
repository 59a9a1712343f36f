"""Decontamination: find prompts that occur in a set of evaluation prompts.

A prompt is contaminated if it has the same words as an evaluation prompt (letter case, punctuation
and white space are ignored), or if both contain the same run of n words. Evaluation prompts of
fewer than n words are only matched as a whole. Completions are not searched. Memory is one hash per
run of words in the evaluation prompts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from align.data import layouts
from align.data.rows import Raw, normalize_text

_WORD = re.compile(r"\w+")
PROMPT_COLUMNS = ("prompt", "messages", "conversations", "question", "instruction")


class EvaluationPrompts:
    """A set of evaluation prompts, as hashes of their runs of ``n`` words."""

    def __init__(self, name: str, texts: Iterable[str], n: int) -> None:
        self.name, self._n = name, n
        self._whole: set[int] = set()
        self._runs: set[int] = set()
        for text in texts:
            words = _words(text)
            if words:
                self._whole.add(hash(tuple(words)))
                self._runs.update(_runs(words, n))

    def contamination(self, texts: Iterable[str]) -> str | None:
        """Reason why a prompt with these user turns is contaminated; None if it is not."""
        for text in texts:
            words = _words(text)
            if hash(tuple(words)) in self._whole:
                return f"prompt is in {self.name}"
            if not self._runs.isdisjoint(_runs(words, self._n)):
                return f"prompt shares {self._n} words in a row with {self.name}"
        return None


def user_texts(raw: Raw) -> list[str] | None:
    """Texts of the user turns in a raw row of an evaluation set; None if the row has no prompt."""
    prompt = next((raw[name] for name in PROMPT_COLUMNS if raw.get(name) is not None), None)
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not all(isinstance(turn, dict) for turn in prompt):
        return None
    texts = [turn.get("content", turn.get("value")) for turn in prompt if _role(turn) == "user"]
    return texts if all(isinstance(text, str) for text in texts) else None


def _role(turn: Mapping[str, object]) -> object:
    return turn.get("role") or layouts.ROLES.get(str(turn.get("from")).lower())


def _words(text: str) -> list[str]:
    return _WORD.findall(normalize_text(text))


def _runs(words: list[str], n: int) -> Iterator[int]:
    return (hash(tuple(words[i : i + n])) for i in range(len(words) - n + 1))
