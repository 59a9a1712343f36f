"""Figures of prepared rows, gathered one row at a time: counts, lengths in words, who is longer, what words foretell."""

from __future__ import annotations

import math
import random
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any
from zlib import crc32

import numpy as np

from align.data.prepare import Prepared, PreparedData, SplitRow
from align.data.rows import Row, conversation_id

LONGER_WARNING = 0.6
LONG_ROW = 1_000  # words
BUCKETS, SAMPLE, FOLDS, ROUNDS = 2**15, 10_000, 5, 60


class DatasetStatistics:
    """Counts of rows and histograms of lengths; memory does not grow with the rows."""

    def __init__(self, kinds: Iterable[str], splits: Iterable[str]) -> None:
        splits = list(splits)
        self.rows = {kind: dict.fromkeys(splits, 0) for kind in kinds}
        self.words: dict[str, Counter[int]] = {}
        self.sides: Counter[str] = Counter()
        self.longest: dict[str, dict[str, Any]] = {}

    def add(self, placed: SplitRow) -> None:
        """Count one row."""
        self.rows[placed.kind][placed.split] += 1
        if placed.kind == "prompts":
            return
        counts: dict[str, int] = {
            name: sum(len(turn["content"].split()) for turn in placed.row[name])
            for name in ("prompt", "completion", "chosen", "rejected")
            if name in placed.row
        }
        self._measure(placed, counts)
        if placed.kind in ("demonstrations", "pairs"):
            for name, count in counts.items():
                self.words.setdefault(f"{placed.kind}.{name}", Counter())[count] += 1
            if placed.kind == "pairs":
                chosen, rejected = counts["chosen"], counts["rejected"]
                self.sides[
                    "longer" if chosen > rejected else "equal" if chosen == rejected else "shorter"
                ] += 1

    def _measure(self, placed: SplitRow, counts: Mapping[str, int]) -> None:
        """Of a pair the longer side counts, as it is the one that is cut first."""
        told = {"words": 0, "prompt_id": "", "long": 0}
        found = self.longest.setdefault(placed.kind, told)
        words = counts["prompt"] + max(n for name, n in counts.items() if name != "prompt")
        if words > found["words"]:
            found |= {"words": words, "prompt_id": placed.row["prompt_id"]}
        found["long"] += words > LONG_ROW

    def lengths(self) -> dict[str, Counter[int]]:
        """Histograms of lengths by column: of the pairs, and of what is demonstrated."""
        kind = "pairs" if "pairs" in self.rows else "demonstrations"
        columns = [f"{kind}.{name}" for name in ("prompt", "chosen", "rejected")]
        found = [*columns, "demonstrations.completion"]
        return {n.partition(".")[2]: self.words[n] for n in found if n in self.words}

    def figures(self) -> dict[str, Any]:
        """Plain JSON: rows by kind and split, lengths, shares, warnings."""
        found: dict[str, Any] = dict(self.rows)
        found["words"] = {
            f"{column}_{name}": value
            for column, counts in self.lengths().items()
            for name, value in (("median", _median(counts)), ("p95", percentile(counts, 95)))
        }
        found["longest_rows"] = self.longest
        found["warnings"] = []
        total = self.sides.total()
        if total:
            longer, equal = self.sides["longer"] / total, self.sides["equal"] / total
            accuracy = longer + equal / 2  # a coin decides where both are as long
            found |= {
                "chosen_longer_share": longer,
                "equal_length_share": equal,
                "prefer_longer_accuracy": accuracy,
            }
            if accuracy > LONGER_WARNING:
                found["warnings"].append(
                    f"always preferring the longer completion is right for {accuracy:.1%} of the pairs:"
                    " a model can learn length in place of quality"
                )
        return found


def describe(prepared: Prepared) -> dict[str, Any]:
    """Figures of a set prepared in memory."""
    kinds = list(prepared.tables)
    tally = DatasetStatistics(kinds, prepared.tables[kinds[0]])
    for kind, splits in prepared.tables.items():
        for split, rows in splits.items():
            for row in rows:
                tally.add(SplitRow(kind, split, row))
    return {"rows": prepared.read, "dropped": prepared.dropped} | tally.figures()


def statistics_of(
    ready: PreparedData, tally: DatasetStatistics, floor: BagOfWordsBaseline
) -> dict[str, Any]:
    """Figures of sources that were read, once all rows have been counted."""
    found: dict[str, Any] = {"rows": ready.read, "dropped": ready.dropped} | tally.figures()
    found["sources"] = ready.sources
    found |= ready.findings
    if len(ready.margins):
        low, middle, high = np.percentile(ready.margins, [5, 50, 95]).tolist()
        found["margins"] = {"p5": low, "median": middle, "p95": high}
    accuracy = floor.accuracy()
    if accuracy is not None:
        found["bag_of_words"] = accuracy
    return found


def percentile(counts: Mapping[int, int], percent: int) -> int:
    """The value at or below which ``percent`` per cent lie."""
    return _at(counts, math.ceil(sum(counts.values()) * percent / 100) - 1)


def _median(counts: Mapping[int, int]) -> float:
    total = sum(counts.values())
    low, high = _at(counts, (total - 1) // 2), _at(counts, total // 2)
    return (low + high) / 2


def _at(counts: Mapping[int, int], place: int) -> int:
    for value in sorted(counts):
        place -= counts[value]
        if place < 0:
            return value
    raise IndexError(place)


class BagOfWordsBaseline:
    """How many labels a classifier predicts that only counts words: what a reward model must beat.

    Logistic regression on differences of log word counts, hashed to 32,768 buckets, of at most 10,000 pairs drawn by
    seed. Five folds by opening: a pair is predicted by a model that never saw its conversation.
    """

    def __init__(self) -> None:
        self._random, self._seen = random.Random(0), 0
        self._pairs: list[tuple[int, array[int], array[float]]] = []

    def add(self, row: Row) -> None:
        """Take a pair, or let it go: each has the same chance to stay."""
        self._seen += 1
        place = len(self._pairs) if self._seen <= SAMPLE else self._random.randrange(self._seen)
        if place >= SAMPLE:
            return
        difference: Counter[int] = Counter()
        for side, sign in (("chosen", 1.0), ("rejected", -1.0)):
            words = Counter(row[side][0]["content"].lower().split())
            for word, count in words.items():
                difference[crc32(word.encode()) % BUCKETS] += sign * math.log1p(count)  # type: ignore[assignment]
        told = {bucket: value for bucket, value in difference.items() if value}
        pair = (
            int(conversation_id(row["prompt"]), 16),
            array("I", told),
            array("d", told.values()),
        )
        self._pairs[place : place + 1] = [pair]

    def accuracy(self) -> dict[str, float] | None:
        """``accuracy`` with its 95 % half-width, and the number of ``pairs``; None below 50 of them."""
        if len(self._pairs) < 50:
            return None
        folds = np.array([opening % FOLDS for opening, _, _ in self._pairs])
        rows = np.repeat(np.arange(len(self._pairs)), [len(b) for _, b, _ in self._pairs])
        buckets = np.concatenate([np.array(b, dtype=np.int64) for _, b, _ in self._pairs])
        values = np.concatenate([np.array(v) for _, _, v in self._pairs])
        right = 0.0
        for fold in range(FOLDS):
            score = _fitted(rows, buckets, values, folds != fold)
            held_out = score[folds == fold]
            right += float((held_out > 0).sum() + (held_out == 0).sum() / 2)
        count = len(self._pairs)
        share = right / count
        return {"accuracy": share, "half_width": wilson_half_width(share, count), "pairs": count}


def wilson_half_width(share: float, count: int) -> float:
    """Half of Wilson's 95 % interval of a share, which is no zero where all or none of ``count`` are right."""
    z = 1.96
    inside = share * (1 - share) / count + z**2 / (4 * count**2)
    return z * math.sqrt(inside) / (1 + z**2 / count)


def _fitted(rows: Any, buckets: Any, values: Any, train: Any) -> Any:
    """Scores of all pairs under weights fitted on ``train``: Adam on the whole of it, with an L2 penalty."""
    weights, first, second = np.zeros(BUCKETS), np.zeros(BUCKETS), np.zeros(BUCKETS)
    inside = train[rows]
    r, b, v, count = rows[inside], buckets[inside], values[inside], int(train.sum())
    for step in range(1, ROUNDS + 1):
        score = np.bincount(r, v * weights[b], len(train))
        slope = -1 / (1 + np.exp(np.clip(score, -30, 30)))
        gradient = np.bincount(b, v * slope[r], BUCKETS) / max(count, 1) + 1e-3 * weights
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        moved = first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        weights -= 0.02 * moved
    return np.bincount(rows, values * weights[buckets], len(train))
