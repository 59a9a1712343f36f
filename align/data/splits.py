"""Splits: select the rows of each kind, and assign every prompt to a split.

Also measured is the leakage that a split by row would have.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from align.config.data import Prepare
from align.data.deduplication import first_occurrences
from align.data.row_store import RowTable, as_digests, as_numbers, describe_drops
from align.data.rows import KINDS
from align.errors import DataError

SPLITS = ("train", "test", "validation")


@dataclass(slots=True)
class TableSplit:
    """A table with three arrays, one entry per stored row."""

    table: RowTable
    take: NDArray[np.bool_]
    """Whether the row is used."""
    split: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))
    """Index of the row's split in ``SPLITS``."""
    first: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))
    """Whether the row is the first of its prompt, over all kinds."""

    @property
    def prompt_ids(self) -> NDArray[np.uint64]:
        """Prompt ids of the rows that are used."""
        return as_numbers(self.table.prompt_ids)[self.take]


@dataclass(slots=True)
class KindRows:
    """Rows of one kind, from several tables if pairs and labeled completions are demonstrated."""

    tables: list[TableSplit]
    n_read: int = 0
    """Rows read of this kind; 0 for demonstrations taken from the pairs, which are counted
    there."""
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    """The first dropped row by reason: its place, and what was found."""


def configured_splits(config: Prepare) -> list[str]:
    """The training split, and the held-out splits with a fraction above 0."""
    return [split for split in SPLITS if getattr(config, f"{split}_fraction", 1.0) > 0]


def split_of(
    prompt_id: str, *, seed: int, test_fraction: float, validation_fraction: float = 0.0
) -> str:
    """Split of a prompt, by a hash of seed and prompt id alone.

    Adding rows never moves existing prompts, all ranks agree, and increasing the validation
    fraction does not change the test split.
    """
    digest = hashlib.blake2b(f"{seed}:{prompt_id}".encode(), digest_size=8).digest()
    uniform = (int.from_bytes(digest, "big") >> 11) / 2**53  # 53 bits: exactly a float below 1
    if uniform < test_fraction:
        return "test"
    return "validation" if uniform < test_fraction + validation_fraction else "train"


def select_rows(
    preferences: Mapping[str, RowTable], demonstrations: Mapping[str, RowTable] | None
) -> dict[str, KindRows]:
    """Rows of each kind, sorted by kind.

    Demonstrations are those of the source ``demonstrations`` if it is set, else those of the main
    sources. A source without demonstrations gives its chosen and its desirable completions, each
    once.
    """
    kinds = {kind: _kept_rows(table) for kind, table in preferences.items()}
    source = preferences if demonstrations is None else demonstrations
    if "demonstrations" in source:
        kinds["demonstrations"] = _kept_rows(source["demonstrations"])
    else:
        tables = list(source.values())
        selected = _desirable_rows(tables)
        kinds["demonstrations"] = KindRows(selected)
        if demonstrations is not None:  # else the rows are counted as pairs
            kinds["demonstrations"].n_read = sum(table.n_read.total() for table in tables)
            kinds["demonstrations"].dropped = _undesirable_counts(selected)
            for table in tables:
                kinds["demonstrations"].examples |= table.drop_examples()
    return {kind: kinds[kind] for kind in sorted(kinds)}


def _kept_rows(table: RowTable) -> KindRows:
    return KindRows(
        [TableSplit(table, table.kept)],
        table.n_read.total(),
        table.count_dropped(),
        table.drop_examples(),
    )


def _desirable_rows(tables: Sequence[RowTable]) -> list[TableSplit]:
    """Rows whose completion may be demonstrated, each completion of a prompt once."""
    selected = [TableSplit(table, _is_desirable(table)) for table in tables]
    digests = [as_digests(part.table.completion_digests)[part.take] for part in selected]
    first, start = first_occurrences(np.concatenate(digests)), 0
    for part in selected:
        places = np.flatnonzero(part.take)
        part.take = part.take.copy()
        part.take[places[~first[start : start + len(places)]]] = False
        start += len(places)
    return selected


def _is_desirable(table: RowTable) -> NDArray[np.bool_]:
    """Mask of the kept rows without those labeled undesirable."""
    if table.kind != "unpaired":
        return table.kept
    return table.kept & ((as_digests(table.row_digests)[:, 1] & np.uint64(1)) == 1)


def _undesirable_counts(selected: Sequence[TableSplit]) -> Counter[str]:
    counts = sum((part.table.count_dropped() for part in selected), Counter[str]())
    for part in selected:
        desirable = int(_is_desirable(part.table).sum())
        undesirable = int(part.table.kept.sum()) - desirable
        repeated = desirable - int(part.take.sum())
        counts += Counter({"not desirable": undesirable, "exact duplicate": repeated})
    return counts


def assign_splits(
    kinds: Mapping[str, KindRows], representatives: Mapping[int, int], config: Prepare
) -> None:
    """Set the split of every row, and mark the first row of each prompt.

    The beginning of a prompt decides, up to and including its first user turn: in transcripts, one
    row's prompt is often the beginning of another's, and a conversation must not be in two splits.
    Near-duplicates have the split of their representative.

    Raises:
        DataError: A split with a fraction above 0 is empty.
    """
    parts = [part for kind in kinds.values() for part in kind.tables]
    codes: dict[int, int] = {}
    for part in parts:
        conversations = as_numbers(part.table.conversation_ids)
        distinct, inverse = np.unique(conversations, return_inverse=True)
        distinct_codes = np.empty(len(distinct), dtype=np.uint8)
        for i, conversation in enumerate(distinct.tolist()):
            if conversation not in codes:
                codes[conversation] = _split_code(
                    representatives.get(conversation, conversation), config
                )
            distinct_codes[i] = codes[conversation]
        part.split = distinct_codes[inverse]
    _mark_first_rows(parts)
    _check_not_empty(kinds, config)


def _split_code(conversation: int, config: Prepare) -> int:
    split = split_of(
        f"{conversation:016x}",
        seed=config.split_seed,
        test_fraction=config.test_fraction,
        validation_fraction=config.validation_fraction,
    )
    return SPLITS.index(split)


def _mark_first_rows(parts: Iterable[TableSplit]) -> None:
    parts = list(parts)
    first, start = first_occurrences(np.concatenate([part.prompt_ids for part in parts])), 0
    for part in parts:
        count = int(part.take.sum())
        part.first = np.zeros(len(part.take), dtype=bool)
        part.first[part.take] = first[start : start + count]
        start += count


def _check_not_empty(kinds: Mapping[str, KindRows], config: Prepare) -> None:
    problems = []
    for split in configured_splits(config):
        code = SPLITS.index(split)
        empty = [
            kind
            for kind, rows in kinds.items()
            if not any((part.split[part.take] == code).any() for part in rows.tables)
        ]
        if not empty:
            continue
        prompt_ids = [part.prompt_ids for kind in empty for part in kinds[kind].tables]
        count = len(np.unique(np.concatenate(prompt_ids)))
        key = "test_fraction" if split == "train" else f"{split}_fraction"
        repair = "lower it" if split == "train" else "raise it, set it to 0"
        drops = _drops(kinds)
        repair = f"fix these rows, {repair}" if drops else repair
        openings = [
            as_numbers(part.table.conversation_ids)[part.take]
            for kind in empty
            for part in kinds[kind].tables
        ]
        n_openings = len(np.unique(np.concatenate(openings)))
        because = (
            f", because they have {n_openings} different first turn{'s' * (n_openings != 1)}, and"
            " prompts with the same first turn share a split"
            if n_openings < count
            else ""
        )
        of_kinds = "" if len(empty) == len(kinds) else f" with {' or '.join(empty)}"
        problems.append(
            f"{key}: {getattr(config, key)}: {drops}none of {count} prompts{of_kinds} is in"
            f" split `{split}`{because}; {repair}, add prompts or change `split_seed`"
        )
    if problems:
        raise DataError(*problems)


def _drops(kinds: Mapping[str, KindRows]) -> str:
    """The dropped rows of each kind, as the reason why few prompts are left; empty without any."""
    clauses = [
        f"{rows.dropped.total():,} of {rows.n_read:,} {kind} are dropped:"
        f" {describe_drops(rows.dropped, rows.examples)}; of the rest, "
        for kind, rows in kinds.items()
        if rows.dropped.total()
    ]
    return "".join(clauses)


def leakage(kinds: Mapping[str, KindRows], fraction: float, seed: int) -> dict[str, int]:
    """Count test prompts that are also trained on.

    Once with a split by row, as ``train_test_split`` makes it, and once with this split.
    """
    kind = next(kind for kind in KINDS if kind in kinds)
    part = kinds[kind].tables[0]
    prompt_ids = part.prompt_ids
    by_prompt = part.split[part.take] == SPLITS.index("test")
    by_row = np.zeros(len(prompt_ids), dtype=bool)
    shuffled = np.random.default_rng(seed).permutation(len(prompt_ids))
    by_row[shuffled[: round(fraction * len(prompt_ids))]] = True
    return {
        "test_prompts_by_row": len(np.unique(prompt_ids[by_row])),
        "leaked_by_row": len(np.intersect1d(prompt_ids[by_row], prompt_ids[~by_row])),
        "test_prompts": len(np.unique(prompt_ids[by_prompt])),
        "leaked": len(np.intersect1d(prompt_ids[by_prompt], prompt_ids[~by_prompt])),
    }
