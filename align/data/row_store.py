"""Row store: checked rows on disk, and a few numbers per row in memory.

Rows are written to a spool, a temporary file, until duplicates and contradictions among all rows
are known. In memory each row takes 58 bytes, whatever the length of its text: digests of the row
and of its completion (16 bytes each), the ids of its prompt and of its conversation (8 each), its
margin (8) and the number of its source (2). Sorting these arrays takes about as much again. Where
the number of a row does not follow that of the row before, it takes 16 bytes more.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import pickle
import tempfile
import weakref
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from align.data.rows import DroppedError, Row, conversation_id, turn_text, used_fields
from align.errors import DataError

BATCH = 500  # rows written to the spool at once

KEPT, DUPLICATE, CONTRADICTION, NEAR_DUPLICATE, SUBSAMPLED = range(5)
DROP_REASONS = {
    DUPLICATE: "exact duplicate",
    CONTRADICTION: "contradiction",
    NEAR_DUPLICATE: "near-duplicate prompt",
    SUBSAMPLED: "left out by weight",
}


class Spool:
    """Objects in a temporary file, read back in the order in which they were added."""

    def __init__(self) -> None:
        with _writing_to_disk():
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 (closed when it is collected)
        weakref.finalize(self, self._file.close)
        self._batch: list[Any] = []

    def add(self, row: Any) -> None:
        """Append an object."""
        self._batch.append(row)
        if len(self._batch) == BATCH:
            self._flush()

    def __iter__(self) -> Iterator[Any]:
        self._flush()
        self._file.seek(0)
        while True:
            try:
                batch = pickle.load(self._file)
            except EOFError:
                return
            yield from batch

    def _flush(self) -> None:
        if self._batch:
            with _writing_to_disk():
                self._file.seek(0, 2)
                pickle.dump(self._batch, self._file, pickle.HIGHEST_PROTOCOL)
                self._file.flush()
            self._batch = []


@contextlib.contextmanager
def _writing_to_disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{tempfile.tempdir or 'the folder of temporary files'}: cannot be written"
            f" ({error.strerror}); free space there, or set TMPDIR to another folder"
        ) from None


class Places:
    """Places of stored rows in their sources, such as ``row 7``; stored where a count is broken."""

    def __init__(self) -> None:
        self._starts, self._numbers = array("q"), array("q")
        self._n_rows = self._next = 0
        self._texts: list[tuple[int, str]] = []

    def append(self, text: str, number: int) -> None:
        """Add the place of the next row: ``text``, which names file and unit, and its number."""
        if not self._texts or self._texts[-1][1] != text:
            self._texts.append((self._n_rows, text))
        if number != self._next:
            self._starts.append(self._n_rows)
            self._numbers.append(number)
        self._n_rows, self._next = self._n_rows + 1, number + 1

    def __getitem__(self, index: int) -> str:
        run = bisect.bisect_right(self._starts, index) - 1
        number = index if run < 0 else self._numbers[run] + index - self._starts[run]
        text = self._texts[bisect.bisect_right(self._texts, index, key=lambda t: t[0]) - 1][1]
        return f"{text} {number}"


def _ids() -> array[int]:
    return array("Q")


@dataclass
class RowTable:
    """Rows of one kind. Parallel arrays have one entry per row, digests two."""

    kind: str
    n_read: Counter[int] = field(default_factory=Counter)
    """Rows read, by the number of their source."""
    n_invalid: Counter[tuple[int, str]] = field(default_factory=Counter)
    """Rows that failed a check, by the number of their source and the reason; they are not
    stored."""
    examples: dict[str, str] = field(default_factory=dict)
    """The first row that failed each check: its place, and what was found."""
    spool: Spool = field(default_factory=Spool)
    """The rows, each with the columns that ``keep_columns`` copies."""
    row_digests: array[int] = field(default_factory=_ids)
    """128 bits per row; the last bit is the direction of the preference."""
    completion_digests: array[int] = field(default_factory=_ids)
    """128 bits per row: the prompt and its chosen (or only) completion."""
    prompt_ids: array[int] = field(default_factory=_ids)
    conversation_ids: array[int] = field(default_factory=_ids)
    margins: array[float] = field(default_factory=lambda: array("d"))
    """Difference of scores of a pair; NaN if its source has no scores."""
    source_numbers: array[int] = field(default_factory=lambda: array("H"))
    places: Places = field(default_factory=Places)
    extra_fields: set[str] = field(default_factory=set)
    """Names of the fields beside role and content that any turn has."""
    status: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))
    """``KEPT``, or the reason why a row is dropped; set by deduplication, once all rows are
    stored."""

    def add_invalid(self, error: DroppedError, source: int, place: str) -> None:
        """Count a row that failed a check."""
        self.n_invalid[source, error.reason] += 1
        if error.reason not in self.examples:
            example = f"{place}: {error.detail}" if error.detail else place
            self.examples[error.reason] = " ".join(example.split())

    def add(
        self,
        row: Row,
        source: int,
        kept: Mapping[str, Any],
        margin: float | None,
        *,
        place: str,
        number: int,
    ) -> None:
        """Store a checked row of source number ``source``, with the columns that are copied.

        ``place`` and ``number`` are those of :meth:`Places.append`.
        """
        self.places.append(place, number)
        prompt_id = row["prompt_id"]
        if "chosen" in row:
            sides = turn_text(row["chosen"][0]), turn_text(row["rejected"][0])
            completion, direction = sides[0], sides[0] > sides[1]
            high, low = digest_words(prompt_id, *sorted(sides))
        else:
            completion, direction = turn_text(row["completion"][0]), bool(row.get("label", False))
            high, low = digest_words(prompt_id, completion)
        self.row_digests.extend((high, low - low % 2 + direction))
        self.completion_digests.extend(digest_words(prompt_id, completion))
        self.prompt_ids.append(int(prompt_id, 16))
        self.conversation_ids.append(int(conversation_id(row), 16))
        self.margins.append(float("nan") if margin is None else margin)
        self.source_numbers.append(source)
        for name in ("prompt", "completion", "chosen", "rejected"):
            self.extra_fields.update(used_fields(row.get(name, ())))
        self.spool.add((row, dict(kept)))

    def __len__(self) -> int:
        return len(self.prompt_ids)

    @property
    def kept(self) -> NDArray[np.bool_]:
        """Mask of the rows that are kept."""
        return self.status == KEPT

    def drop(self, mask: NDArray[np.bool_], status: int) -> None:
        """Set the status of the kept rows that ``mask`` selects."""
        self.status[mask & self.kept] = status

    def count_dropped(self, source: int | None = None) -> Counter[str]:
        """Number of dropped rows by reason, of one source or of all."""
        counts: Counter[str] = Counter()
        for (number, reason), count in self.n_invalid.items():
            if source in (None, number):
                counts[reason] += count
        numbers = as_numbers(self.source_numbers, np.uint16)
        for status, reason in DROP_REASONS.items():
            mask = self.status == status
            count = int((mask if source is None else mask & (numbers == source)).sum())
            if count:
                counts[reason] += count
        return counts

    def drop_examples(self) -> dict[str, str]:
        """The first dropped row by reason: its place, and what was found or the row it equals."""
        examples = dict(self.examples)
        for status in (DUPLICATE, CONTRADICTION, NEAR_DUPLICATE):
            indices = np.flatnonzero(self.status == status)
            if len(indices):
                examples[DROP_REASONS[status]] = self._example(int(indices[0]))
        return examples

    def _example(self, index: int) -> str:
        """The place of a dropped row, and of the row that it equals or contradicts."""
        place, status = self.places[index], self.status[index]
        if status == NEAR_DUPLICATE:
            return place
        other = self.places[self._counterpart(index)]
        if place == other:  # of several pairs in one row
            return f"{place}, twice"
        return f"{place}, {'like' if status == DUPLICATE else 'against'} {other}"

    def _counterpart(self, index: int) -> int:
        """The row that a duplicate repeats, or that a contradiction contradicts."""
        digests = as_digests(self.row_digests)
        high, low = digests[index]
        same = np.flatnonzero(digests[:, 0] == high)
        wanted = low if self.status[index] == DUPLICATE else low ^ np.uint64(1)
        return int(same[digests[same, 1] == wanted][0])


def describe_drops(counts: Counter[str], examples: Mapping[str, str]) -> str:
    """Reasons with their counts and examples, the most frequent first.

    >>> describe_drops(Counter({"no label": 2}), {"no label": "row 7"})
    '2 no label (row 7)'
    """
    return ", ".join(
        f"{count:,} {reason}" + (f" ({examples[reason]})" if reason in examples else "")
        for reason, count in counts.most_common()
    )


def as_numbers(values: array[Any], dtype: type[np.generic] = np.uint64) -> NDArray[Any]:
    """View of an array, one number per row."""
    return np.frombuffer(values, dtype=dtype) if values else np.zeros(0, dtype)


def as_digests(values: array[int]) -> NDArray[np.uint64]:
    """View of an array of digests, with shape (rows, 2)."""
    return as_numbers(values).reshape(-1, 2)


def digest_words(*parts: str) -> tuple[int, int]:
    """128-bit digest of texts, as two 64-bit numbers."""
    digest = hashlib.blake2b("\x1f".join(parts).encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")
