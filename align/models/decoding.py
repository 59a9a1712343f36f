"""Decoding: sample a continuation of each row of a batch, token by token, with a key/value cache.

On a CPU, the result is that of ``model.generate`` with the same random state, at a fraction of its
time. On a GPU the last bits of a row may depend on the size of its batch, so completions may
differ; random numbers are drawn for all rows there. What saves time:

- Rows that are equal, such as the ``n`` completions of a prompt, are computed once up to their end.
- The cache is allocated once. ``generate`` copies all of it for every token.
- A row that has ended leaves the batch, down to :data:`MIN_ROWS`: the last row takes its place in
  the cache.
- Random numbers of rows that have ended are skipped, not computed.

Left out: models and generation settings that :func:`obstacle` lists, for which
:mod:`align.models.generation` calls ``model.generate``; compiled decoding.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from align.models.tokenization import pad_rows

MIN_ROWS = 4
"""Rows that stay in a batch, ended ones among them. On a CPU, libraries multiply matrices of up to
three rows by another kernel, whose last bits differ; with four or more, a row does not depend on
the others. This is not so on a GPU."""
SETTINGS = {
    "do_sample", "temperature", "top_p", "top_k", "max_new_tokens", "eos_token_id", "pad_token_id",
    "bos_token_id", "transformers_version",
}  # fmt: skip
"""Fields of a generation config that :func:`decode` implements, or that have no effect."""


class NotFiniteError(Exception):
    """The probabilities of the next token are not finite."""


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """The continuation of a row, up to its first stop token inclusive."""

    tokens: list[int]
    logps: list[float]
    """Log-probability of each token under the distribution that it was sampled from, in nats."""


def obstacle(model: Any) -> str | None:
    """The property of a model for which only ``model.generate`` can decode; None if there is none.

    Examples: a state-space layer, whose state is no cache of keys and values; inputs that the model
    prepares itself; sharded weights, for which all processes must run the same number of steps.
    """
    config = model.generation_config
    unknown = sorted(config.to_diff_dict().keys() - SETTINGS)
    layers = DynamicCache(config=model.config).layers
    other = {type(layer) for layer in layers} - {DynamicLayer, DynamicSlidingWindowLayer}
    if unknown or (config.do_sample and config.top_k):
        return f"the generation config has `{unknown[0] if unknown else 'top_k'}`"
    if model.config.is_encoder_decoder:
        return "the model has an encoder"
    if type(model).generate is not GenerationMixin.generate or (
        type(model).prepare_inputs_for_generation
        is not GenerationMixin.prepare_inputs_for_generation
    ):
        return "the model prepares the inputs of its generation itself"
    if other or not layers:
        names = ", ".join(sorted(kind.__name__ for kind in other))
        return f"the model has a cache of the kind {names or 'None'}"
    if _is_sharded(model):
        return "the weights are sharded over processes"
    return None


def _is_sharded(model: Any) -> bool:
    from transformers.integrations import is_deepspeed_zero3_enabled
    from transformers.integrations.fsdp import is_fsdp_managed_module

    initialized = torch.distributed.is_available() and torch.distributed.is_initialized()
    several = initialized and torch.distributed.get_world_size() > 1
    return several and (is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model))


def decode(
    model: Any, rows: Sequence[Sequence[int]], stops: Collection[int]
) -> list[SampledTokens]:
    """Sample one continuation of each row, up to its first stop token inclusive.

    ``model.generation_config`` has the temperature, ``top_p`` and the largest number of new tokens.

    Raises:
        NotFiniteError: The probabilities of a next token are not finite.
    """
    with torch.inference_mode():
        batch = _Batch(model, rows, model.generation_config.max_new_tokens)
        return batch.run(Choice(model.generation_config, len(rows)), stops)


class ChosenTokens(NamedTuple):
    """The next token of each row, and its log-probability."""

    tokens: Tensor
    logps: Tensor


class Choice:
    """Chooses the next token of each row: the most probable one, or one at random."""

    def __init__(self, config: Any, n_rows: int) -> None:
        self.do_sample = config.do_sample
        self.n_rows = n_rows
        """Number of rows of the first batch."""
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

    def __call__(self, logits: Tensor, rows: list[int]) -> ChosenTokens:
        """The next token after each of ``logits``, which belong to ``rows`` of the first batch.

        Torch's ``multinomial`` draws the largest of p / q, with q from an exponential distribution.
        Each row has its place in the noise q of the first batch, so the tokens do not depend on
        when a row leaves the batch.

        Raises:
            NotFiniteError: A probability is not finite.
        """
        if not self.do_sample:
            return ChosenTokens(logits.argmax(-1), logits.new_zeros(len(logits)))
        probabilities = self.scores(logits).softmax(-1)
        if probabilities[:, 0].isnan().any():  # one NaN or infinity makes all of its row NaN
            raise NotFiniteError
        noise = exponential_rows(rows, self.n_rows, probabilities)
        tokens = (probabilities / noise).argmax(-1)
        return ChosenTokens(tokens, probabilities.gather(-1, tokens[:, None])[:, 0].log())


class LogpRecorder:
    """A logits processor of ``model.generate`` that records log-probabilities and changes nothing.

    ``generate`` itself would return the logits of all steps, ``[steps, batch, vocabulary]``.
    """

    def __init__(self, config: Any) -> None:
        self._choice = Choice(config, 0)
        self._last: Tensor | None = None
        self._logps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Record the tokens that were chosen in the step before."""
        self._record(input_ids)
        # `generate` divides by the temperature after this call.
        self._last = self._choice.scores(scores).log_softmax(-1)
        return scores

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


def exponential_rows(rows: list[int], n_rows: int, like: Tensor) -> Tensor:
    """The ``rows`` of a table of exponential random numbers with ``n_rows`` rows.

    Afterwards torch's random state is as if the whole table had been drawn. The other rows are
    skipped by drawing uniform numbers, which take a quarter of the time.
    """
    width = like.shape[-1]
    table = torch.empty((n_rows, width), dtype=torch.float32, device=like.device)
    if like.device.type != "cpu" or not _draws_in_order():
        return table.exponential_()[rows]
    used = set(rows)
    for is_used, run in itertools.groupby(range(n_rows), used.__contains__):
        numbers = list(run)
        if is_used:
            table[numbers[0] : numbers[-1] + 1].exponential_()
        else:
            torch.empty(len(numbers) * width, dtype=torch.float64).uniform_()
    return table[rows]


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


class _Batch:
    """The rows that are decoded together: cache, mask and positions of those that continue."""

    def __init__(self, model: Any, rows: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        self.model = model
        self.max_new_tokens = max_new_tokens
        self.rows = list(range(len(rows)))
        """Number of each row of the batch among the rows of the first batch."""
        self.min_rows = min(MIN_ROWS, len(rows))
        parameters = inspect.signature(model.forward).parameters
        self.accepts_positions = "position_ids" in parameters
        self.last_only = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        distinct = list(dict.fromkeys(map(tuple, rows)))
        places = {row: k for k, row in enumerate(distinct)}
        distinct += distinct[:1] * (self.min_rows - len(distinct))
        ids, mask = pad_rows(
            distinct, pad=model.generation_config.pad_token_id, side="left", device=model.device
        )
        self.width = ids.shape[1]
        self.padded = not bool(mask.all())
        self.mask, self.positions = mask, mask.long().cumsum(-1).sub(1).clamp(min=0)
        self.cache = DynamicCache(config=model.config)
        self.logits = self._forward(ids)
        self._expand(torch.tensor([places[tuple(row)] for row in rows], device=model.device))

    def run(self, choose: Choice, stops: Collection[int]) -> list[SampledTokens]:
        """Decode until every row has ended, and return the new tokens of each row."""
        completions: list[list[int]] = [[] for _ in self.rows]
        ended = [False for _ in self.rows]
        numbers: list[int] = []  # the rows of `logps`, of ended ones too
        logps: list[Tensor] = []  # tensors: each conversion would wait for the GPU
        while True:
            tokens, logp = choose(self.logits, self.rows)
            numbers += self.rows
            logps.append(logp)
            for row, token in zip(self.rows, tokens.tolist(), strict=True):
                if not ended[row]:
                    completions[row].append(token)
                    ended[row] = token in stops or len(completions[row]) == self.max_new_tokens
            order = remaining([not ended[row] for row in self.rows], self.min_rows)
            if all(ended):
                return _with_logps(completions, numbers, torch.cat(logps).tolist())
            if len(order) < len(self.rows):
                tokens = self._select(order, tokens)
            self.width += 1
            self.positions = self.positions[:, -1:] + 1
            self.logits = self._forward(tokens[:, None])

    def _forward(self, ids: Tensor) -> Tensor:
        """Logits after the last of the new tokens ``ids``, whose keys and values are cached."""
        arguments: dict[str, Any] = dict(self.last_only)
        if self.accepts_positions:
            arguments["position_ids"] = self.positions
        output = self.model(
            input_ids=ids,
            attention_mask=self.mask[:, : self.width] if self.padded else None,
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
            **arguments,
        )
        return output.logits[:, -1]

    def _expand(self, index: Tensor) -> None:
        """Let the batch consist of the rows ``index``, with space for their new tokens."""
        capacity = self.width + self.max_new_tokens
        for number, layer in enumerate(self.cache.layers):
            layer.batch_select_indices(index)
            if type(layer) is DynamicLayer:
                self.cache.layers[number] = PreallocatedLayer(layer, capacity)
        new = self.mask.new_ones(len(index), self.max_new_tokens)
        self.mask = torch.cat([self.mask[index], new], -1)
        self.positions = self.positions[index]
        self.logits = self.logits[index]

    def _select(self, order: list[int], tokens: Tensor) -> Tensor:
        """Keep the rows ``order`` of the batch and of ``tokens``, which are returned."""
        index = torch.tensor(order, device=tokens.device)
        self.rows = [self.rows[place] for place in order]
        for layer in self.cache.layers:
            layer.batch_select_indices(index)
        self.mask, self.positions = self.mask[index], self.positions[index]
        return tokens[index]


def _with_logps(
    completions: list[list[int]], numbers: list[int], logps: list[float]
) -> list[SampledTokens]:
    """Completions with those of ``logps`` that belong to their tokens, by the numbers of rows."""
    by_row: list[list[float]] = [[] for _ in completions]
    for row, logp in zip(numbers, logps, strict=True):
        if len(by_row[row]) < len(completions[row]):
            by_row[row].append(logp)
    return [SampledTokens(*row) for row in zip(completions, by_row, strict=True)]


def remaining(continues: Sequence[bool], n_min: int) -> list[int]:
    """Which rows stay in a batch, as few as possible but at least ``n_min``.

    Place k of the result holds row k, or, where row k has ended, a row from behind the new end.

    >>> remaining([True, False, True, False, True], 1)
    [0, 4, 2]
    """
    n = max(sum(continues), n_min)
    behind = iter([k for k in range(n, len(continues)) if continues[k]])
    return [k if continues[k] else next(behind, k) for k in range(n)]


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer in memory that is allocated once for all tokens of a batch."""

    def __init__(self, layer: DynamicLayer, capacity: int) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self._buffers = [
            self._allocate(layer.keys, capacity),
            self._allocate(layer.values, capacity),
        ]
        self.keys, self.values = layer.keys, layer.values
        self._view(*layer.keys.shape[:-1:2])

    @staticmethod
    def _allocate(states: Tensor, capacity: int) -> Tensor:
        *batch_and_heads, length, size = states.shape
        buffer = states.new_empty(*batch_and_heads, capacity, size)
        buffer[:, :, :length] = states
        return buffer

    def _view(self, n_rows: int, length: int) -> None:
        self.keys, self.values = (buffer[:n_rows, :, :length] for buffer in self._buffers)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the states of new tokens; returns those of all tokens."""
        start, n_rows = self.keys.shape[-2], len(key_states)
        end = start + key_states.shape[-2]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:n_rows, :, start:end] = states
        self._view(n_rows, end)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep rows of the batch; only rows that change their place are copied."""
        n_rows, length = len(indices), self.keys.shape[-2]
        places = torch.arange(n_rows, device=indices.device)
        moved = (indices != places).nonzero()[:, 0]
        for buffer in self._buffers:
            buffer[moved, :, :length] = buffer[indices[moved], :, :length]
        self._view(n_rows, length)
