"""The time of sampling completions, from short measurements of its two phases.

Reading the prompts takes a time per token; equal prompts of a batch are read once. Each further
token takes a time per row, which grows with the tokens that the row has already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from align.pipeline.probe.timing import Seconds, Stopwatch

SHORT = 8
"""Tokens of a prompt that is cut so that it is read in no time."""
LONGEST = 1.0
"""Seconds that the reading of prompts, and the sampling of tokens, may take in a measurement."""
NEW = 16
"""Largest number of tokens that are sampled in a measurement."""

Generate = Callable[[Sequence[Sequence[int]], int], object]
"""Samples exactly so many tokens for each prompt, in one batch."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of completions before they are sampled: those of the data, and the limit."""

    expected: float
    """Mean tokens of the completions of the data, at most the limit."""
    most: int
    """The limit, ``max_new_tokens``."""


@dataclass(frozen=True, slots=True)
class SamplingSpeed:
    """Seconds of the phases of sampling a batch."""

    batch: int
    """Rows of a batch."""
    prompt: float
    """Seconds to read the prompts of a batch."""
    token: float
    """Seconds of one further token of each row of a batch with short rows."""
    context: float
    """Seconds that this takes longer per token that each row has already."""
    prompt_tokens: float
    """Tokens of a prompt."""

    def batch_seconds(self, n_tokens: float) -> float:
        """Seconds of a batch in which every row gets ``n_tokens`` tokens."""
        context = max(0.0, self.prompt_tokens + n_tokens / 2 - SHORT)
        return self.prompt + n_tokens * (self.token + self.context * context)

    def seconds(self, n_rows: float, lengths: Lengths) -> Seconds:
        """Seconds to sample ``n_rows`` completions: of the expected length, and of the longest."""
        batches = n_rows / self.batch
        return Seconds(
            batches * self.batch_seconds(lengths.expected),
            batches * self.batch_seconds(lengths.most),
        )


def measure_sampling(
    watch: Stopwatch, generate: Generate, prompts: Sequence[Sequence[int]], *, batch: int, most: int
) -> SamplingSpeed:
    """Measure batches of ``batch`` of these prompts, with completions of at most ``most`` tokens.

    A batch whose prompts take too long to read is measured with fewer rows, and in full with short
    prompts.
    """
    rows = sorted((prompts[k % len(prompts)] for k in range(batch)), key=len)
    middle = rows[len(rows) // 2]
    short = [list(row[-SHORT:]) for row in rows]
    one = watch.settled(lambda: generate([middle], 1))
    n = max(1, min(batch, int(2 * LONGEST / one)))
    some = rows[:: max(1, batch // n)][:n] if n < batch else rows
    reading, token = _phases(watch, generate, some, most)
    _, short_token = _phases(watch, generate, short[: len(some)], most)
    full_token = short_token
    if len(some) < batch:
        _, full_token = _phases(watch, generate, short, most)
    length = fmean(map(len, some))
    per_token = max(0.0, token - short_token) / len(some) / max(1.0, length - SHORT)
    scale = _read_tokens(rows) / _read_tokens(some)
    mean = fmean(map(len, rows))
    return SamplingSpeed(batch, reading * scale, full_token, per_token * batch, mean)


def _read_tokens(rows: Sequence[Sequence[int]]) -> int:
    """Tokens of the distinct rows."""
    return sum(map(len, set(map(tuple, rows))))


def _phases(
    watch: Stopwatch, generate: Generate, rows: Sequence[Sequence[int]], most: int
) -> tuple[float, float]:
    """Seconds to read the prompts of a batch, and of one further token of each row."""
    first = watch.settled(lambda: generate(rows, 1))
    if most == 1:
        return first, 0.0
    second = watch.settled(lambda: generate(rows, 2)) - first
    n = min(most - 1, NEW, max(2, int(LONGEST / max(second, 1e-3))))
    token = max(0.0, watch.settled(lambda: generate(rows, 1 + n)) - first) / n
    return max(0.0, first - token), token
