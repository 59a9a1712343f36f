"""Statistics of prepared data: numbers of rows, lengths in words, and a bag-of-words baseline.

All are computed from one pass over the rows.
"""

from __future__ import annotations

import math
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from random import Random
from statistics import median
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from align.data.prepare import PreparedData, SplitRow
from align.data.row_store import DROP_REASONS, SUBSAMPLED
from align.data.rows import EXTRA_FIELDS, KINDS, Row, conversation_id, turn_text, used_fields

LONGER_WARNING = 0.6  # accuracy of preferring the longer completion above which a warning is given
LONG_ROW = 1_000  # words
MOST = 0.5  # share of dropped rows above which a warning is given
MAX_NOT_READ = 20  # columns and fields that are listed as not read
SPECIAL_TOKENS = re.compile(
    r"<\|[A-Za-z][\w-]*\|>|<｜[^｜<>\s]+｜>|<(?:start|end)_of_turn>|</?s>|<(?:bos|eos|pad)>|\[/?INST\]"
)
"""Special tokens of common tokenizers; ``align check`` uses those of the models."""
N_BUCKETS, MAX_PAIRS, MIN_PAIRS, N_FOLDS, N_STEPS = 2**15, 10_000, 50, 5, 60


def collect(
    prepared: PreparedData,
    *,
    sink: Callable[[SplitRow], None] | None = None,
    baseline: BagOfWordsBaseline | None = None,
) -> DatasetStatistics:
    """Count all rows of prepared data, and pass each to ``sink``, such as a table writer.

    ``baseline`` collects the pairs too. It takes half of the time and is only part of a report.
    """
    statistics = DatasetStatistics(prepared, baseline)
    for row in prepared.rows():
        if sink is not None:
            sink(row)
        statistics.add(row)
    return statistics


class DatasetStatistics:
    """Counts of rows, and histograms of lengths. Memory does not grow with the number of rows."""

    def __init__(self, prepared: PreparedData, baseline: BagOfWordsBaseline | None = None) -> None:
        self._prepared = prepared
        self._rows = {kind: dict.fromkeys(prepared.splits, 0) for kind in prepared.table_kinds}
        self._words: dict[str, Counter[int]] = {}
        self._longer_side: Counter[str] = Counter()
        self._longest: dict[str, dict[str, Any]] = {}
        self._longest_prompts = dict.fromkeys(prepared.splits, 0)
        self._special_tokens: Counter[str] = Counter()
        self._turn_fields: Counter[str] = Counter()
        self._baseline = baseline

    def add(self, split_row: SplitRow) -> None:
        """Count one row."""
        kind, row = split_row.kind, split_row.row
        self._rows[kind][split_row.split] += 1
        lengths: dict[str, int] = {
            name: sum(len(turn_text(turn).split()) for turn in row[name])
            for name in ("prompt", "completion", "chosen", "rejected")
            if name in row
        }
        if kind == "prompts":
            split, words = split_row.split, lengths["prompt"]
            self._longest_prompts[split] = max(words, self._longest_prompts[split])
            return
        self._add_longest(kind, row, lengths)
        if kind == next(kind for kind in KINDS if kind in self._rows):  # others repeat its rows
            texts = "\n".join(turn_text(turn) for name in lengths for turn in row[name])
            match = SPECIAL_TOKENS.search(texts)
            self._special_tokens.update([match.group()] if match else [])
            self._turn_fields.update({f for name in lengths for f in used_fields(row[name])})
        if kind in ("demonstrations", "pairs"):
            for name, length in lengths.items():
                self._words.setdefault(f"{kind}.{name}", Counter())[length] += 1
        if kind == "pairs":
            chosen, rejected = lengths["chosen"], lengths["rejected"]
            self._longer_side[
                "chosen" if chosen > rejected else "rejected" if chosen < rejected else "neither"
            ] += 1
            if self._baseline is not None:
                self._baseline.add(row)

    def _add_longest(self, kind: str, row: Row, lengths: Mapping[str, int]) -> None:
        """Length of a row: the prompt and its longer completion, which is truncated first."""
        longest = self._longest.setdefault(kind, {"words": 0, "prompt_id": "", "long": 0})
        words = lengths["prompt"] + max(n for name, n in lengths.items() if name != "prompt")
        if words > longest["words"]:
            longest |= {"words": words, "prompt_id": row["prompt_id"]}
        longest["long"] += words > LONG_ROW

    def lengths(self) -> dict[str, Counter[int]]:
        """Histograms of lengths in words, by column of the pairs and of the demonstrations."""
        kind = "pairs" if "pairs" in self._rows else "demonstrations"
        columns = [f"{kind}.{name}" for name in ("prompt", "chosen", "rejected")]
        columns.append("demonstrations.completion")
        return {
            name.partition(".")[2]: self._words[name] for name in columns if name in self._words
        }

    def summary(self) -> dict[str, Any]:
        """Counts of rows by kind and split, lengths, shares and warnings, as plain JSON."""
        prepared = self._prepared
        summary: dict[str, Any] = {"rows": prepared.read, "dropped": prepared.dropped}
        summary["dropped_examples"] = prepared.dropped_examples
        summary |= self._rows
        summary["words"] = {
            f"{column}_{name}": value
            for column, counts in self.lengths().items()
            for name, value in (("median", _median(counts)), ("p95", percentile(counts, 95)))
        }
        summary["longest_rows"] = self._longest
        summary["longest_prompts"] = self._longest_prompts
        if self._turn_fields:
            summary["turn_fields"] = dict(sorted(self._turn_fields.items()))
        summary["warnings"] = [*self._drop_warnings(), *self._special_token_warnings()]
        n_pairs = self._longer_side.total()
        if n_pairs:
            longer = self._longer_side["chosen"] / n_pairs
            equal = self._longer_side["neither"] / n_pairs
            accuracy = longer + equal / 2  # at equal length, a random choice
            summary |= {
                "chosen_longer_share": longer,
                "equal_length_share": equal,
                "prefer_longer_accuracy": accuracy,
            }
            if accuracy > LONGER_WARNING:
                summary["warnings"].append(
                    f"always preferring the longer completion is right for {accuracy:.1%} of"
                    " the pairs; a model can learn length instead of quality"
                )
        return summary

    def _drop_warnings(self) -> Iterator[str]:
        """A warning for each kind of which most rows are dropped, by other reasons than weights."""
        for kind, rows in self._prepared.kinds.items():
            count = rows.dropped.total() - rows.dropped[DROP_REASONS[SUBSAMPLED]]
            if rows.n_read and count / rows.n_read > MOST:
                yield f"{count:,} of {rows.n_read:,} {kind} are dropped; see the reasons"

    def _special_token_warnings(self) -> Iterator[str]:
        if self._special_tokens:
            ((example, _),) = self._special_tokens.most_common(1)
            yield (
                f"{self._special_tokens.total():,} rows have special tokens in their text, such as "
                f"{example}; models read them as text"
            )

    def report(self) -> dict[str, Any]:
        """The summary, counts by source, near-duplicates, leakage, margins, and any baseline."""
        report = self.summary() | {"sources": self._prepared.sources} | self._prepared.findings
        if len(self._prepared.margins):
            low, median, high = np.percentile(self._prepared.margins, [5, 50, 95]).tolist()
            report["margins"] = {"p5": low, "median": median, "p95": high}
        baseline = self._baseline.accuracy() if self._baseline is not None else None
        if baseline is not None:
            report["bag_of_words"] = baseline
        return report


def percentile(counts: Mapping[int, int], percent: int) -> int:
    """The smallest value of a histogram at or below which ``percent`` % of the counts lie."""
    return _value_at(counts, math.ceil(sum(counts.values()) * percent / 100) - 1)


def _median(counts: Mapping[int, int]) -> float:
    total = sum(counts.values())
    low, high = _value_at(counts, (total - 1) // 2), _value_at(counts, total // 2)
    return (low + high) / 2


def _value_at(counts: Mapping[int, int], position: int) -> int:
    for value in sorted(counts):
        position -= counts[value]
        if position < 0:
            return value
    raise IndexError(position)


class BagOfWordsBaseline:
    """Accuracy of a classifier that only counts words: the lower bound for a reward model.

    Logistic regression on differences of log word counts, hashed to 32,768 buckets, on at most
    10,000 pairs sampled with a fixed seed. Five-fold cross-validation by conversation: each pair is
    predicted by a model that was fitted without its conversation.
    """

    def __init__(self) -> None:
        self._random, self._n_seen = Random(0), 0
        self._pairs: list[tuple[int, array[int], array[float]]] = []

    def add(self, row: Row) -> None:
        """Add a pair; beyond 10,000, all are equally likely to be kept (reservoir sampling)."""
        self._n_seen += 1
        place = (
            len(self._pairs) if self._n_seen <= MAX_PAIRS else self._random.randrange(self._n_seen)
        )
        if place >= MAX_PAIRS:
            return
        difference: dict[int, float] = {}
        for side, sign in (("chosen", 1.0), ("rejected", -1.0)):
            words = Counter(turn_text(row[side][0]).lower().split())
            for word, count in words.items():
                bucket = crc32(word.encode()) % N_BUCKETS
                difference[bucket] = difference.get(bucket, 0) + sign * math.log1p(count)
        nonzero = {bucket: value for bucket, value in difference.items() if value}
        conversation = int(conversation_id(row), 16)
        pair = (conversation, array("I", nonzero), array("d", nonzero.values()))
        self._pairs[place : place + 1] = [pair]

    def accuracy(self) -> dict[str, float] | None:
        """Accuracy, half-width of its 95 % interval, and number of pairs; None below 50 pairs."""
        if len(self._pairs) < MIN_PAIRS:
            return None
        folds = np.array([conversation % N_FOLDS for conversation, _, _ in self._pairs])
        rows = np.repeat(np.arange(len(self._pairs)), [len(b) for _, b, _ in self._pairs])
        buckets = np.concatenate([np.array(b, dtype=np.int64) for _, b, _ in self._pairs])
        values = np.concatenate([np.array(v) for _, _, v in self._pairs])
        n_correct = 0.0
        for fold in range(N_FOLDS):
            scores = _fit_and_score(rows, buckets, values, folds != fold)[folds == fold]
            n_correct += float((scores > 0).sum() + (scores == 0).sum() / 2)
        count = len(self._pairs)
        share = n_correct / count
        return {"accuracy": share, "half_width": wilson_half_width(share, count), "pairs": count}


def wilson_half_width(share: float, count: int) -> float:
    """Half-width of the 95 % Wilson score interval of a share.

    Unlike the normal approximation, it is above 0 for a share of 0 or 1. It is defined here,
    because ``data`` starts without torch and therefore does not import :mod:`align.functional`.
    """
    z = 1.96
    variance = share * (1 - share) / count + z**2 / (4 * count**2)
    return z * math.sqrt(variance) / (1 + z**2 / count)


def _fit_and_score(
    rows: NDArray[np.int64],
    buckets: NDArray[np.int64],
    values: NDArray[np.float64],
    train: NDArray[np.bool_],
) -> NDArray[np.float64]:
    """Scores of all pairs, with weights fitted to the pairs ``train``.

    The fit is full-batch Adam with an L2 penalty.

    ``rows``, ``buckets`` and ``values`` are the entries of a sparse matrix of shape (pairs,
    buckets).
    """
    weights, first, second = np.zeros(N_BUCKETS), np.zeros(N_BUCKETS), np.zeros(N_BUCKETS)
    entries = train[rows]
    r, b, v, count = rows[entries], buckets[entries], values[entries], int(train.sum())
    for step in range(1, N_STEPS + 1):
        score = np.bincount(r, v * weights[b], len(train))
        slope = -1 / (1 + np.exp(np.clip(score, -30, 30)))
        gradient = np.bincount(b, v * slope[r], N_BUCKETS) / max(count, 1) + 1e-3 * weights
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        step_size = first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        weights -= 0.02 * step_size
    return np.bincount(rows, values * weights[buckets], len(train)).astype(np.float64, copy=False)


def median_words(rows: Sequence[Row], columns: Sequence[str]) -> dict[str, float]:
    """Median number of words in each column of messages, named ``<column>_median``."""
    return {
        f"{column}_median": median(
            sum(len(turn_text(turn).split()) for turn in row[column]) for row in rows
        )
        for column in columns
    }


def how_read(findings: Mapping[str, Any]) -> Iterator[str]:
    """Lines on layouts that are recognized, on tools and reasoning, and on what is not read.

    What is unusual in rows, but no reason to drop them, is among these.
    """
    for source, layout in findings.get("recognized", {}).items():
        yield f"recognized: {source} as {layout}"
    if fields := findings.get("turn_fields"):
        counted = (f"`{n}` in {fields[n]:,}" for n in EXTRA_FIELDS if n in fields)
        yield f"rows with more than text: {', '.join(counted)}"
    for name, found in findings.get("unusual", {}).items():
        rows = f"{found['rows']:,} row{'s' * (found['rows'] != 1)}"
        yield f"unusual in {rows}: {name} (first: {found['first']})"
    counts = findings.get("not_read", {})
    names = [f"{name} ({count:,} row{'s' * (count != 1)})" for name, count in counts.items()]
    if names:
        yield f"not read: {', '.join(names[:MAX_NOT_READ])}" + (
            f" and {len(names) - MAX_NOT_READ} others" if len(names) > MAX_NOT_READ else ""
        )


def dropped_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """A line for each reason why rows are dropped: their number, and the first of them."""
    examples = report.get("dropped_examples", {})
    for reason, count in report["dropped"].items():
        yield f"{count:,} × {reason}" + (f" ({examples[reason]})" if reason in examples else "")


def remarks(report: Mapping[str, Any]) -> Iterator[str]:
    """Rows for training and held out, dropped rows by reason, and warnings, as sentences."""
    for kind in sorted(KINDS):
        if kind in report:
            counts = report[kind]
            n_held_out = sum(counts.values()) - counts["train"]
            yield f"{counts['train']:,} {kind} for training, {n_held_out:,} held out"
    yield from (f"dropped {line}" for line in dropped_lines(report))
    yield from how_read(report)
    yield from (f"warning: {warning}" for warning in report.get("warnings", ()))
