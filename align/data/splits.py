"""Splitting: the rows to take of each table, the split of each, and what a split by row would have leaked."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from align.data import deduplication
from align.data.deduplication import KEPT
from align.data.row_store import RowTable
from align.errors import UserError

SPLITS = ("train", "test", "validation")


@dataclass(slots=True)
class TableSplit:
    """Of a table: which rows to take, the split of each, and which is the first of its prompt."""

    table: RowTable
    take: Any
    split: Any = None
    first: Any = None


def split_of(
    prompt_id: str, *, seed: int, test_fraction: float, validation_fraction: float = 0.0
) -> str:
    """Say in which split a prompt is: a hash of seed and prompt decides, and no other row.

    So adding rows moves nobody, every rank agrees, and a larger validation fraction leaves the test
    split as it is.
    """
    digest = hashlib.blake2b(f"{seed}:{prompt_id}".encode(), digest_size=8).digest()
    uniform = (int.from_bytes(digest, "big") >> 11) / 2**53  # 53 bits: a float below 1, exactly
    if uniform < test_fraction:
        return "test"
    return "validation" if uniform < test_fraction + validation_fraction else "train"


def streams(
    main: Mapping[str, RowTable], other: Mapping[str, RowTable] | None
) -> tuple[dict[str, list[TableSplit]], dict[str, tuple[int, Counter[str]]]]:
    """The rows of each kind, and for each kind how many were read and the others by reason."""
    streams = {kind: [TableSplit(table, table.verdict == KEPT)] for kind, table in main.items()}
    shown = {kind: (table.read.total(), table.all_dropped()) for kind, table in main.items()}
    said = main if other is None else other
    if "demonstrations" in said:
        table = said["demonstrations"]
        streams["demonstrations"] = [TableSplit(table, table.verdict == KEPT)]
        shown["demonstrations"] = (table.read.total(), table.all_dropped())
    else:
        # the chosen and the desirable completions, each once; not counted as read where the pairs are
        streams["demonstrations"] = _desirable(list(said.values()))
        if other is not None:
            dropped = sum((t.all_dropped() for t in said.values()), Counter[str]())
            for s in streams["demonstrations"]:
                wanted = _said(s.table)
                bad = int((s.table.verdict == KEPT).sum() - wanted.sum())
                repeated = int(wanted.sum() - s.take.sum())
                dropped += Counter({"not desirable": bad, "exact duplicate": repeated})
            shown["demonstrations"] = (sum(t.read.total() for t in said.values()), dropped)
    order = sorted(streams)
    return {kind: streams[kind] for kind in order}, {k: shown[k] for k in order if k in shown}


def _desirable(tables: Sequence[RowTable]) -> list[TableSplit]:
    streams = []
    for table in tables:
        streams.append(TableSplit(table, _said(table)))
    said = np.concatenate([deduplication.pairs_of(s.table.said)[s.take] for s in streams])
    first, start = deduplication.firsts(said), 0
    for stream in streams:
        places = np.flatnonzero(stream.take)
        stream.take = stream.take.copy()
        stream.take[places[~first[start : start + len(places)]]] = False
        start += len(places)
    return streams


def _said(table: RowTable) -> Any:
    """Mark the rows kept whose completion may be demonstrated: all but the undesirable ones."""
    kept = table.verdict == KEPT
    if table.kind == "unpaired":
        kept = kept & ((deduplication.pairs_of(table.keys)[:, 1] & np.uint64(1)) == 1)
    return kept


def assign_splits(
    streams: Mapping[str, list[TableSplit]],
    decides: Mapping[int, int],
    wanted: Sequence[str],
    seed: int,
    fractions: Mapping[str, float],
) -> None:
    """Give every row its split, and refuse a split that is empty though it has a fraction.

    A prompt's beginning decides, up to its first user's turn, a system turn included: in transcripts one row's prompt is
    often the beginning of another's, and a conversation must not be trained on from one and held out from another. Where
    near-duplicates are looked for, the first of them that came decides.
    """
    known: dict[int, int] = {}
    for stream in (stream for many in streams.values() for stream in many):
        openings = deduplication.numbers_of(stream.table.openings)
        distinct, inverse = np.unique(openings, return_inverse=True)
        codes = np.empty(len(distinct), dtype=np.uint8)
        for i, opening in enumerate(distinct.tolist()):
            if opening not in known:
                decider = f"{decides.get(opening, opening):016x}"
                known[opening] = SPLITS.index(split_of(decider, seed=seed, **fractions))
            codes[i] = known[opening]
        stream.split = codes[inverse]
    everywhere = [s for many in streams.values() for s in many]
    first = deduplication.firsts(
        np.concatenate([deduplication.numbers_of(s.table.prompts)[s.take] for s in everywhere])
    )
    start = 0
    for stream in everywhere:
        count = int(stream.take.sum())
        stream.first = np.zeros(len(stream.take), dtype=bool)
        stream.first[stream.take] = first[start : start + count]
        start += count
    _check_splits(streams, wanted, fractions)


def _check_splits(
    streams: Mapping[str, list[TableSplit]], wanted: Sequence[str], fractions: Mapping[str, float]
) -> None:
    wrong = []
    for split in wanted:
        code = SPLITS.index(split)
        empty = [
            kind
            for kind, many in streams.items()
            if not any((s.split[s.take] == code).any() for s in many)
        ]
        if not empty:
            continue
        ids = [deduplication.numbers_of(s.table.prompts)[s.take] for k in empty for s in streams[k]]
        count = len(np.unique(np.concatenate(ids)))
        ours = "test_fraction" if split == "train" else f"{split}_fraction"
        repair = "lower it" if split == "train" else "raise it, set it to 0"
        kinds = "" if len(empty) == len(streams) else f" with {' or '.join(empty)}"
        wrong.append(
            f"{ours}: {fractions[ours]}: none of {count} prompts{kinds} fell into `{split}`;"
            f" {repair}, add prompts or try another `split_seed`"
        )
    if wrong:
        raise UserError(*wrong)


def leakage(streams: Mapping[str, list[TableSplit]], fraction: float, seed: int) -> dict[str, int]:
    """Prompts of the test split that also train: under a split by row, as by ``train_test_split``, and under ours."""
    name = next(kind for kind in ("pairs", "unpaired", "demonstrations") if kind in streams)
    stream = streams[name][0]
    prompts = deduplication.numbers_of(stream.table.prompts)[stream.take]
    ours = stream.split[stream.take] == SPLITS.index("test")
    by_row = np.zeros(len(prompts), dtype=bool)
    shuffled = np.random.default_rng(seed).permutation(len(prompts))
    by_row[shuffled[: round(fraction * len(prompts))]] = True
    return {
        "test_prompts_by_row": len(np.unique(prompts[by_row])),
        "leaked_by_row": len(np.intersect1d(prompts[by_row], prompts[~by_row])),
        "test_prompts": len(np.unique(prompts[ours])),
        "leaked": len(np.intersect1d(prompts[ours], prompts[~ours])),
    }
