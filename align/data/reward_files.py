"""Files that measure a reward model: pairs, choices among several completions, scored completions.

The keys of a row decide what it is:

- choices: ``prompt``, ``chosen`` and ``rejected``, the last two as lists of texts; ``subset`` and
  ``id`` may be there. This is the layout of RewardBench 2.
- scored completions: ``prompt``, ``completions`` and ``scores``, two lists of one length.
- pairs: ``prompt``, ``chosen`` and ``rejected`` as in the data of ``prepare``.

Errors name the file, the row and the key.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from align.data import formats
from align.data.annotations import InvalidRowError, as_name, as_prompt
from align.data.file_limits import Problems
from align.data.files import read_file
from align.data.rows import DroppedError, Messages, Raw, Row
from align.errors import DataError, shown


@dataclass(frozen=True, slots=True)
class Choice:
    """A prompt with correct and wrong completions."""

    prompt: Messages
    chosen: list[Messages]
    rejected: list[Messages]
    subset: str
    """Name of the part of the file that it belongs to; empty without the key ``subset``."""
    id: str
    """Identity of the row; for ties, ``ref:N`` and ``tied:N`` are two forms of one question."""


@dataclass(frozen=True, slots=True)
class ScoredCompletions:
    """Completions of a prompt, with scores by a judge."""

    prompt: Messages
    completions: list[Messages]
    scores: list[float]


@dataclass(frozen=True, slots=True)
class RewardRows:
    """The rows of a file; all but one of the lists are empty."""

    pairs: list[Row] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    scored: list[ScoredCompletions] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    """Pairs that cannot be used, by reason, as in ``prepare``."""
    examples: dict[str, str] = field(default_factory=dict)
    """The first of these pairs by reason: its row, and what was found."""


def read_reward_file(path: Path) -> RewardRows:
    """Read a file of pairs, of choices, or of scored completions.

    Raises:
        DataError: The file is unreadable, has no usable row, rows of several kinds or a wrong
            value.
    """
    rows, problems, kinds = RewardRows(), Problems(path), dict[str, int]()
    for number, raw in enumerate(read_file(path), 1):
        try:
            kinds.setdefault(_add(rows, raw), number)
        except InvalidRowError as error:
            problems.add(f"{path}: row {number}: {error}")
        except DroppedError as error:
            rows.dropped[error.reason] += 1
            place = f"row {number}: {error.detail}" if error.detail else f"row {number}"
            rows.examples.setdefault(error.reason, place)
    problems.raise_any()
    if len(kinds) > 1:
        first, second = sorted(kinds.items(), key=lambda item: item[1])[:2]
        raise DataError(
            f"{path}: row {first[1]} has {first[0]}, row {second[1]} has {second[0]}; "
            "write each kind into a file by itself"
        )
    if not kinds:
        reasons = ", ".join(
            f"{count} × {reason} ({rows.examples[reason]})"
            for reason, count in rows.dropped.items()
        )
        raise DataError(f"{path}: has no usable row{': ' if reasons else ''}{reasons}")
    return rows


def _add(rows: RewardRows, raw: Raw) -> str:
    """Add a row to the list of its kind, and return the name of that kind."""
    if "completions" in raw or "scores" in raw:
        rows.scored.append(_scored(raw))
        return "scored completions"
    missing = [key for key in ("chosen", "rejected") if key not in raw]
    if missing:
        keys = ", ".join(f"`{key}`" for key in list(raw)[:8]) or "none"
        raise InvalidRowError(
            f"`{missing[0]}`: missing; found the keys {keys}; expected `prompt`, `chosen`, "
            "`rejected`, or `prompt`, `completions`, `scores`"
        )
    if _is_list_of_texts(raw["chosen"]) or _is_list_of_texts(raw["rejected"]):
        rows.choices.append(_choice(raw))
        return "choices"
    row = formats.pair(raw)
    kept = {key: raw[key] for key in ("source", "subset", "margin") if raw.get(key) is not None}
    rows.pairs.append(row | kept)
    return "pairs"


def _choice(raw: Raw) -> Choice:
    return Choice(
        prompt=_prompt(raw),
        chosen=_completions(raw, "chosen"),
        rejected=_completions(raw, "rejected"),
        subset=as_name(raw, "subset"),
        id=as_name(raw, "id"),
    )


def _scored(raw: Raw) -> ScoredCompletions:
    completions, scores = _completions(raw, "completions"), raw.get("scores")
    if not isinstance(scores, list) or not all(map(_is_finite, scores)):
        raise InvalidRowError(f"`scores`: expected a list of finite numbers, got {shown(scores)}")
    if len(scores) != len(completions):
        raise InvalidRowError(
            f"`scores`: expected one for each of {len(completions)} completions, got {len(scores)}"
        )
    return ScoredCompletions(_prompt(raw), completions, [float(score) for score in scores])


def _prompt(raw: Raw) -> Messages:
    prompt = as_prompt(raw, "prompt")
    if prompt[-1]["role"] not in ("user", "tool"):
        raise InvalidRowError("`prompt`: expected turns that end in a user or a tool turn")
    return prompt


def _completions(raw: Raw, key: str) -> list[Messages]:
    """The completions of a key: a text, or a list of texts; empty texts are kept."""
    value = [raw[key]] if isinstance(raw.get(key), str) else raw.get(key)
    if not _is_list_of_texts(value):
        raise InvalidRowError(f"`{key}`: expected a list of at least one text, got {shown(value)}")
    assert isinstance(value, list)
    return [[{"role": "assistant", "content": text}] for text in value]


def _is_list_of_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
