"""Which pair an annotator decides next, on which sides it is shown, and what was decided.

A shared pair is decided by every annotator, so that their agreement can be measured; each other
pair by one annotator. In between are attention checks: the completion of another prompt beside one
of the prompt's completions. Everything follows from a seed and the decisions in the file, so a page
that is started again continues where it ended.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from align.data.annotations import DECISIONS, PairKey, as_completion, as_prompt, pair_key
from align.data.rows import Raw, prompt_id
from align.errors import DataError
from align.evaluation.annotation.decision_file import DecisionFile
from align.evaluation.annotation.pairs import Pair

GUIDELINE = (
    "Which answer would you rather receive? Judge content first: is it correct, does it do what was "
    "asked? Then style. Length alone is no merit."
)
HELD_SECONDS = 600
"""How long a pair that is on the page of one annotator is not shown to another one."""
MAX_NAME, MAX_COMMENT = 60, 10_000
CHOICES = {
    "left": ("first", "second"),
    "right": ("second", "first"),
    **{name: (name, name) for name in ("tie", "both_bad", "skip")},
}
"""Choices on the page as decisions: with the first completion on the left, or on the right."""
CHECK = "check"
"""Key of the rows of attention checks, which are no annotations."""


@dataclass(frozen=True, slots=True)
class Task:
    """A pair as it is shown to an annotator."""

    pair: Pair
    first_is_left: bool
    is_check: bool
    number: int
    """Number of the annotator's earlier decisions."""

    @property
    def sides(self) -> tuple[str, str]:
        """The texts on the left and on the right."""
        texts = self.pair.first, self.pair.second
        return texts if self.first_is_left else texts[::-1]


class Progress(NamedTuple):
    """How far an annotator is, and all of them."""

    decided: int
    """Decisions of this annotator, without attention checks."""
    finished: int
    """Pairs that need no further annotator."""
    total: int
    """All pairs."""


@dataclass(slots=True)
class Annotator:
    """What one annotator has decided."""

    decisions: dict[PairKey, float]
    """Preference for the first completion of a pair; NaN where it was skipped."""
    n_rows: int = 0
    n_checks: int = 0
    n_passed: int = 0
    """Attention checks in which the completion of the prompt was preferred."""
    seconds: float = 0.0
    """Time between a pair was shown and its decision, over all of this session."""


class Session:
    """The pairs, the decisions about them, and what is on the page of each annotator."""

    def __init__(
        self,
        pairs: Sequence[Pair],
        file: DecisionFile,
        *,
        overlap: float = 0.1,
        check_every: int = 10,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Order the pairs by ``seed``; read the decisions of ``file``.

        ``overlap`` is the share of shared pairs. One decision in ``check_every`` is an attention
        check; with 0 there is none, nor where all pairs have one prompt.
        """
        self._file, self._seed, self._clock = file, seed, clock
        self._pairs = sorted(pairs, key=lambda pair: self._draw("order", *_texts(pair)))
        self._by_key = {pair.key: pair for pair in self._pairs}
        # Spread evenly, so that agreement is known early.
        self._shared = {
            pair.key
            for i, pair in enumerate(self._pairs)
            if int((i + 1) * overlap + 1e-9) > int(i * overlap + 1e-9)
        }
        n_prompts = len({key[0] for key in self._by_key})
        self._check_every = check_every if n_prompts > 1 else 0
        self.annotators: dict[str, Annotator] = {}
        self._held: dict[str, tuple[Task, float]] = {}
        self._mutex = threading.Lock()
        for row in file.rows:
            self._count(row)

    def next_task(self, annotator: str) -> Task | None:
        """What an annotator decides next: the pair on the page, or a new one; None at the end."""
        with self._mutex:
            held = self._held.get(annotator)
            task = held[0] if held else self._choose(annotator)
            if task is not None:
                since = held[1] if held else self._clock()
                self._held[annotator] = task, since
            return task

    def decide(self, annotator: str, number: int, choice: str, comment: str = "") -> bool:
        """Write a choice about the task with this number; False if it is decided already.

        Raises:
            OSError: The row cannot be written; nothing is counted.
        """
        with self._mutex:
            task, since = self._held.get(annotator, (None, 0.0))
            if task is None or task.number != number:
                return False
            decision = CHOICES[choice][0 if task.first_is_left else 1]
            seconds = self._clock() - since
            row = self._row(task, annotator, decision, comment, seconds)
            self._file.append(row)
            self._count(row)
            del self._held[annotator]
            return True

    def progress(self, annotator: str) -> Progress:
        """How far an annotator is, and all of them."""
        with self._mutex:
            own = self.annotators.get(annotator)
            finished = sum(self._is_finished(pair) for pair in self._pairs)
            return Progress(len(own.decisions) if own else 0, finished, len(self._pairs))

    def preferences(self) -> list[list[float]]:
        """The preferences of all annotators, one list for each pair; NaN where there is none."""
        with self._mutex:
            people = list(self.annotators.values())
            nan = float("nan")
            return [[each.decisions.get(key, nan) for each in people] for key in self._by_key]

    def _choose(self, annotator: str) -> Task | None:
        own = self.annotators.get(annotator) or Annotator({})
        pair = next((pair for pair in self._pairs if self._is_open(pair, annotator, own)), None)
        if pair is None:
            return None
        if self._is_check(annotator, own.n_rows):
            # Not the next pair: one that is seen twice in a row would give the check away.
            place = self._draw("checked", annotator, str(own.n_rows)) % len(self._pairs)
            checked = self._with_wrong_completion(self._pairs[place], annotator, own.n_rows)
            return self._task(checked, annotator, own.n_rows, is_check=True)
        return self._task(pair, annotator, own.n_rows, is_check=False)

    def _task(self, pair: Pair, annotator: str, number: int, *, is_check: bool) -> Task:
        left = self._draw("side", annotator, *_texts(pair)) % 2 == 0
        return Task(pair, left, is_check, number)

    def _is_open(self, pair: Pair, annotator: str, own: Annotator) -> bool:
        if pair.key in own.decisions:
            return False
        if pair.key in self._shared:
            return True
        now = self._clock()
        held = any(
            task.pair.key == pair.key and now - since < HELD_SECONDS
            for name, (task, since) in self._held.items()
            if name != annotator
        )
        return not held and not self._is_finished(pair)

    def _is_finished(self, pair: Pair) -> bool:
        """Whether somebody decided, rather than skipped; a shared pair needs all annotators."""
        given = [p.decisions[pair.key] for p in self.annotators.values() if pair.key in p.decisions]
        if pair.key in self._shared:
            return len(given) == len(self.annotators) > 0
        return any(value == value for value in given)  # `==`: not NaN

    def _is_check(self, annotator: str, number: int) -> bool:
        """One decision of each block is a check, at a place that cannot be foreseen."""
        if not self._check_every:
            return False
        block, place = divmod(number, self._check_every)
        return self._draw("check", annotator, str(block)) % self._check_every == place

    def _with_wrong_completion(self, pair: Pair, annotator: str, number: int) -> Pair:
        start = self._draw("wrong", annotator, str(number)) % len(self._pairs)
        others = [*self._pairs[start:], *self._pairs[:start]]
        texts = {text.strip() for p in others if p.key[0] == pair.key[0] for text in p.key[1]}
        wrong = (
            p.first for p in others if p.key[0] != pair.key[0] and p.first.strip() not in texts
        )
        return Pair(pair.prompt, pair.first, next(wrong, ""))

    def _row(
        self, task: Task, annotator: str, decision: str, comment: str, seconds: float
    ) -> dict[str, Any]:
        pair = task.pair
        row = {
            "prompt": pair.prompt,
            "first": pair.first,
            "second": pair.second,
            "decision": decision,
            "annotator": annotator,
            "time": datetime.now().astimezone().isoformat(timespec="seconds"),
            "comment": comment.encode(errors="replace").decode()[:MAX_COMMENT].strip(),
            "first_policy": pair.first_policy,
            "second_policy": pair.second_policy,
            "left": "first" if task.first_is_left else "second",
            "seconds": round(seconds, 1),
        }
        return row | ({CHECK: True} if task.is_check else {})

    def _count(self, row: Raw) -> None:
        person = self.annotators.setdefault(str(row.get("annotator") or ""), Annotator({}))
        person.n_rows += 1
        seconds = row.get("seconds")
        person.seconds += seconds if isinstance(seconds, int | float) else 0.0
        if row.get(CHECK):
            person.n_checks += row["decision"] in ("first", "second", "tie")
            person.n_passed += row["decision"] == "first"
            return
        first = as_completion(row, "first")
        key = pair_key(prompt_id(as_prompt(row, "prompt")), first, as_completion(row, "second"))
        pair = self._by_key.get(key)
        if pair is not None:
            preference = DECISIONS[row["decision"]]
            same_order = pair.first.strip() == first.strip()
            person.decisions[key] = preference if same_order else 1.0 - preference

    def _draw(self, *purpose: str) -> int:
        """A random number that depends on the seed and a purpose."""
        text = "\x1f".join((str(self._seed), *purpose)).encode(errors="replace")
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def check_name(name: str) -> str:
    """The name of an annotator without spaces around it.

    Raises:
        DataError: It is empty, too long, or has characters that do not print.
    """
    name = " ".join(name.split())
    if not name:
        raise DataError("Enter your name first.")
    if len(name) > MAX_NAME or not name.isprintable():
        raise DataError(f"Enter a name of up to {MAX_NAME} printable characters.")
    return name


def _texts(pair: Pair) -> tuple[str, ...]:
    return pair.key[0], *sorted(pair.key[1])
