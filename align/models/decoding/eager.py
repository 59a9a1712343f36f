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
:mod:`align.models.generation` calls ``model.generate``; compiled steps
(:mod:`align.models.decoding.compiled`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from align.models.decoding.choice import Choice, SampledTokens
from align.models.decoding.prompts import MIN_ROWS, compute_prompts, last_logits

SETTINGS = {
    "do_sample", "temperature", "top_p", "top_k", "max_new_tokens", "eos_token_id", "pad_token_id",
    "bos_token_id", "transformers_version",
}  # fmt: skip
"""Fields of a generation config that :func:`decode` implements, or that have no effect."""


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
    model: Any,
    rows: Sequence[Sequence[int]],
    stops: Collection[int],
    seeds: Sequence[int] | None = None,
) -> list[SampledTokens]:
    """Sample one continuation of each row, up to its first stop token inclusive.

    ``model.generation_config`` has the temperature, ``top_p`` and the largest number of new tokens.
    ``seeds`` are those of the rows; by default torch's random state draws for all of them.

    Raises:
        NotFiniteError: The probabilities of a next token are not finite.
    """
    with torch.inference_mode():
        batch = _Batch(model, rows, model.generation_config.max_new_tokens)
        return batch.run(Choice(model.generation_config, len(rows), seeds), stops)


class _Batch:
    """The rows that are decoded together: cache, mask and positions of those that continue."""

    def __init__(self, model: Any, rows: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        self.model = model
        self.max_new_tokens = max_new_tokens
        self.rows = list(range(len(rows)))
        """Number of each row of the batch among the rows of the first batch."""
        self.min_rows = min(MIN_ROWS, len(rows))
        prompts = compute_prompts(model, rows)
        self.width = prompts.mask.shape[1]
        self.padded = not bool(prompts.mask.all())
        self.cache = prompts.cache
        capacity = self.width + max_new_tokens
        for number, layer in enumerate(self.cache.layers):
            layer.batch_select_indices(prompts.index)
            if type(layer) is DynamicLayer:
                self.cache.layers[number] = PreallocatedLayer(layer, capacity)
        new = prompts.mask.new_ones(len(rows), max_new_tokens)
        self.mask = torch.cat([prompts.mask[prompts.index], new], -1)
        self.positions = prompts.positions[prompts.index]
        self.logits = prompts.logits[prompts.index]

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
            mask = self.mask[:, : self.width] if self.padded else None
            self.logits = last_logits(self.model, tokens[:, None], mask, self.positions, self.cache)

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
