"""Choice of the next token of each row from the logits, and its log-probability."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers.generation import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)


class NotFiniteError(Exception):
    """The probabilities of the next token are not finite."""


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """The continuation of a row, up to its first stop token inclusive."""

    tokens: list[int]
    logps: list[float]
    """Log-probability of each token under the distribution that it was sampled from, in nats."""


class ChosenTokens(NamedTuple):
    """The next token of each row, and its log-probability."""

    tokens: Tensor
    logps: Tensor


class Noise(Protocol):
    """Exponential random numbers, by which the next tokens are drawn."""

    def __call__(self, rows: Sequence[int], like: Tensor) -> Tensor:
        """Numbers for the next token of ``rows`` of the first batch, in the shape of ``like``.

        A row that is named twice gets the same numbers twice.
        """
        ...


class Choice:
    """Chooses the next token of each row: the most probable one, or one at random.

    Random numbers come from torch's random state and a row's place in the first batch, or from a
    seed of each row, on which alone its tokens depend then.
    """

    def __init__(self, config: Any, n_rows: int, seeds: Sequence[int] | None = None) -> None:
        self.do_sample = config.do_sample
        self.n_rows = n_rows
        """Number of rows of the first batch."""
        self.noise: Noise = SharedNoise(n_rows) if seeds is None else RowNoise(seeds)
        self.warpers = LogitsProcessorList()
        """Temperature and ``top_p``."""
        if config.do_sample and config.temperature not in (None, 1.0):
            self.warpers.append(TemperatureLogitsWarper(float(config.temperature)))
        if config.do_sample and config.top_p not in (None, 1.0):
            self.warpers.append(TopPLogitsWarper(config.top_p))

    def scores(self, logits: Tensor) -> Tensor:
        """Logits of the distribution that is sampled from, in float32."""
        scores: Tensor = self.warpers(None, logits.float())
        return scores

    def __call__(self, logits: Tensor, rows: Sequence[int]) -> ChosenTokens:
        """The next token after each of ``logits``, which belong to ``rows`` of the first batch.

        Raises:
            NotFiniteError: A probability is not finite.
        """
        chosen = self.draw(logits, rows)
        if chosen.logps.isnan().any():
            raise NotFiniteError
        return chosen

    def draw(self, logits: Tensor, rows: Sequence[int]) -> ChosenTokens:
        """The next tokens without a check.

        As torch's ``multinomial``, it takes the largest of p / q, with q from an exponential
        distribution. The log-probability of a row is NaN if one of its probabilities is not finite.
        """
        if not self.do_sample:
            return ChosenTokens(logits.argmax(-1), logits.new_zeros(len(logits)))
        probabilities = self.scores(logits).softmax(-1)  # one NaN or infinity makes a row NaN
        # The NaN, if there is one.
        tokens = (probabilities / self.noise(rows, probabilities)).argmax(-1)
        return ChosenTokens(tokens, probabilities.gather(-1, tokens[:, None])[:, 0].log())


class LogpRecorder:
    """A logits processor of ``model.generate`` that records log-probabilities.

    Without seeds it changes nothing. With a seed of each row, it chooses the tokens itself: all
    others get the probability 0.

    ``generate`` itself would return the logits of all steps, ``[steps, batch, vocabulary]``.
    """

    def __init__(self, config: Any, seeds: Sequence[int] | None = None) -> None:
        self._choice = Choice(config, 0, seeds)
        self._chooses = seeds is not None and config.do_sample
        self._last: Tensor | None = None
        self._logps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Record the tokens that were chosen in the step before; choose those of this one.

        Raises:
            NotFiniteError: A probability is not finite.
        """
        self._record(input_ids)
        # `generate` divides by the temperature after this call.
        self._last = self._choice.scores(scores).log_softmax(-1)
        if not self._chooses:
            return scores
        tokens = self._choice(scores, range(len(scores))).tokens
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)

    def _record(self, ids: Tensor) -> None:
        if self._last is not None:
            logps = self._last.gather(-1, ids[:, -1:])
            self._logps.append(logps if self._choice.do_sample else torch.zeros_like(logps))

    def logps(self, output: Tensor, n_new: int) -> Tensor:
        """Log-probabilities of the last ``n_new`` tokens of ``output``, the result of ``generate``.

        They are NaN if a model's own ``generate`` ignores logits processors.
        """
        self._record(output)
        if len(self._logps) != n_new:
            return torch.full((len(output), n_new), torch.nan)
        return torch.cat(self._logps, -1)


@dataclass(frozen=True, slots=True)
class SharedNoise:
    """Rows of a table of ``n_rows`` rows, which torch's random state draws for each step.

    Each row has its place, so the tokens do not depend on when a row leaves the batch.
    """

    n_rows: int

    def __call__(self, rows: Sequence[int], like: Tensor) -> Tensor:
        """The ``rows`` of the next table.

        Afterwards torch's random state is as if the whole table had been drawn. The other rows are
        skipped by drawing uniform numbers, which take a quarter of the time.
        """
        width, rows = like.shape[-1], list(rows)
        table = torch.empty((self.n_rows, width), dtype=torch.float32, device=like.device)
        if like.device.type != "cpu" or not _draws_in_order():
            return table.exponential_()[rows]
        used = set(rows)
        for is_used, run in itertools.groupby(range(self.n_rows), used.__contains__):
            numbers = list(run)
            if is_used:
                table[numbers[0] : numbers[-1] + 1].exponential_()
            else:
                torch.empty(len(numbers) * width, dtype=torch.float64).uniform_()
        return table[rows]


class RowNoise:
    """Numbers of rows that each have a generator, so that a row does not depend on the others."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self._seeds = seeds
        self._generators: dict[int, torch.Generator] = {}

    def __call__(self, rows: Sequence[int], like: Tensor) -> Tensor:
        """The next numbers of each of ``rows``."""
        table = torch.empty_like(like)
        places: dict[int, int] = {}
        for place, row in enumerate(rows):
            if row in places:
                table[place] = table[places[row]]
                continue
            places[row] = place
            table[place].exponential_(generator=self._generator(row, like.device))
        return table

    def _generator(self, row: int, device: torch.device) -> torch.Generator:
        if row not in self._generators:
            generator = torch.Generator(device).manual_seed(self._seeds[row])
            self._generators[row] = generator
        return self._generators[row]


@functools.cache
def _draws_in_order() -> bool:
    """Whether a CPU draws exponential numbers one by one, from as many bits as uniform ones.

    On Intel processors, torch draws a table with MKL, which consumes one number per table.
    """
    whole, parts = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    table = torch.empty(3, 64).exponential_(generator=whole)
    torch.empty(64, dtype=torch.float64).uniform_(generator=parts)
    same_rows = torch.equal(torch.empty(2, 64).exponential_(generator=parts), table[1:])
    return same_rows and torch.equal(whole.get_state(), parts.get_state())
