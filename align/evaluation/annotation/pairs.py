"""The pairs of completions that people compare, from files, prepared data and evaluations.

A file has rows with ``prompt``, ``chosen`` and ``rejected``, rows in Align's layout of annotations
(:mod:`align.data.annotations`) with or without a decision, or the rows of an evaluation's
``comparisons.parquet``. Pairs with equal completions are left out: they are ties.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from align.data import formats
from align.data.annotations import (
    InvalidRowError,
    PairKey,
    as_completion,
    as_name,
    as_prompt,
    pair_key,
)
from align.data.file_limits import Problems
from align.data.files import read_file
from align.data.rows import DroppedError, Messages, Raw, prompt_id, turn_text
from align.errors import DataError, did_you_mean

OF_EVALUATION = ("messages", "baseline_completion", "policy_completion", "baseline", "policy")
OF_ANNOTATIONS = ("prompt", "first", "second", "first_policy", "second_policy")
"""Columns of pairs: prompt, two completions, and the optional names of their policies."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two different completions of one prompt."""

    prompt: Messages
    first: str
    second: str
    first_policy: str = ""
    """Name of the policy behind the first completion; empty if it is unknown."""
    second_policy: str = ""

    @property
    def key(self) -> PairKey:
        """Identity of the pair: the prompt and both texts, in any order."""
        return pair_key(prompt_id(self.prompt), self.first, self.second)


@dataclass(slots=True)
class Pairs:
    """Different pairs, in the order of their sources, and how many rows were left out."""

    pairs: dict[PairKey, Pair] = field(default_factory=dict)
    n_equal: int = 0
    """Rows whose completions are equal."""
    n_repeated: int = 0
    """Rows whose pair occurs before."""

    def add(self, pair: Pair) -> None:
        """Add a pair, unless its completions are equal or it is there already."""
        if pair.first.strip() == pair.second.strip():
            self.n_equal += 1
        elif pair.key in self.pairs:
            self.n_repeated += 1
        else:
            self.pairs[pair.key] = pair


def read_pairs(files: Iterable[Path]) -> Pairs:
    """The different pairs of all files.

    Raises:
        DataError: A file is unreadable, has other columns or wrong values, or there is no pair.
    """
    pairs, names = Pairs(), []
    for file in files:
        names.append(str(file))
        convert: Callable[[Raw], Pair] | None = None
        problems = Problems(file)
        for number, row in enumerate(read_file(file), 1):
            convert = convert or _layout(file, row)
            try:
                pairs.add(convert(row))
            except InvalidRowError as error:
                problems.add(f"{file}: row {number}: {error}")
            except DroppedError as error:
                if error.reason == formats.EQUAL:
                    pairs.n_equal += 1
                    continue
                detail = f" ({error.detail})" if error.detail else ""
                problems.add(f"{file}: row {number}: {error.reason}{detail}")
        problems.raise_any()
    if not pairs.pairs:
        equal = f"; the completions of all {pairs.n_equal} pairs are equal" * bool(pairs.n_equal)
        raise DataError(f"{', '.join(names)}: no pair of different completions{equal}")
    return pairs


def _layout(file: Path, row: Raw) -> Callable[[Raw], Pair]:
    """How the rows of a file are read; the keys of the first row decide."""
    for columns in (OF_EVALUATION, OF_ANNOTATIONS):
        if {*columns[:3]} <= row.keys():
            return functools.partial(_of_columns, columns=columns)
    if {"chosen", "rejected"} <= row.keys():
        return _of_preferences
    names = ", ".join(f"`{name}`" for name in list(row)[:8]) or "none"
    hint = did_you_mean("chosen", row) or did_you_mean("first", row)
    raise DataError(
        f"{file}: no pairs of completions in the columns {names}{hint}; expected `prompt`, "
        "`chosen`, `rejected`, or `prompt`, `first`, `second`; `align data prepare` converts others"
    )


def _of_columns(row: Raw, columns: Sequence[str]) -> Pair:
    """The pair in columns with prompt, both completions and the names of both policies."""
    prompt, first, second, first_policy, second_policy = columns
    return Pair(
        prompt=as_prompt(row, prompt),
        first=as_completion(row, first),
        second=as_completion(row, second),
        first_policy=as_name(row, first_policy),
        second_policy=as_name(row, second_policy),
    )


def _of_preferences(row: Raw) -> Pair:
    converted = formats.pair(row)
    first, second = (turn_text(converted[side][0]) for side in ("chosen", "rejected"))
    return Pair(converted["prompt"], first, second)


def draw(pairs: Sequence[Pair], n_pairs: int | None, seed: int) -> list[Pair]:
    """Some of the pairs, drawn without replacement, in their order; all of them with None."""
    if n_pairs is None or n_pairs >= len(pairs):
        return list(pairs)
    places = random.Random(seed).sample(range(len(pairs)), n_pairs)
    return [pairs[place] for place in sorted(places)]
