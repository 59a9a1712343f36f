"""Decoding with compiled steps, for GPUs, where a step of a small model is bound by its launches.

A step has one shape for all of its tokens: a number of rows from a few sizes, and a cache of fixed
memory. ``torch.compile`` makes one graph of it, which a GPU replays as a CUDA graph. Prompts are
computed before, each distinct one once, without compilation. What keeps the number of shapes small:

- The rows are the next power of two; the rows that are left over are copies of the first.
- When half of the rows have ended, the others are moved to the first half of the same memory.
- The length of the cache is a multiple of :data:`LENGTH_STEP`, or of its double above four of them,
  and so on. It never shrinks, so short batches that follow long ones compile nothing.

The host reads the tokens every :data:`STEPS_BETWEEN_READS` steps only. The tokens are those of
:mod:`align.models.decoding.eager` with the same random state, up to rounding.

Left out: models that :func:`obstacle` lists; the choice of the token, which is not compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticLayer

from align.errors import UserError
from align.models.decoding.choice import Choice, ChosenTokens, NotFiniteError, SampledTokens
from align.models.decoding.eager import obstacle as eager_obstacle
from align.models.decoding.eager import remaining
from align.models.decoding.prompts import MIN_ROWS, ComputedPrompts, compute_prompts, last_logits

LENGTH_STEP = 128
"""Smallest length of a cache, in tokens, and the distance between lengths up to 512."""
STEPS_BETWEEN_READS = 8
"""Steps after which the host reads the tokens. Rows that end between are computed up to then."""
MAX_GRAPHS = 64
"""Limit of the shapes that are compiled in a process; beyond it torch would stop compiling."""

Step = Callable[[Tensor, Tensor], Tensor]
"""Logits after the tokens of the rows, ``[rows, 1]``, and the first place that is no padding."""


def obstacle(model: Any) -> str | None:
    """The property of a model for which its steps cannot be compiled; None if there is none."""
    reason = eager_obstacle(model)
    if reason is not None:
        return reason
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=model.config).layers):
        return "the model has a sliding window"
    if model.config._attn_implementation not in ("sdpa", "eager"):
        return f"the attention is `{model.config._attn_implementation}`, not `sdpa`"
    if getattr(model, "hf_quantizer", None) is not None:
        return "the model is quantized"
    return None


class CompiledDecoder:
    """Decodes batches of one model. It keeps the graphs and the memory of the cache between them.

    Raises:
        UserError: The steps of the model cannot be compiled.
    """

    def __init__(self, model: Any, backend: str) -> None:
        reason = obstacle(model)
        if reason is not None:
            raise UserError(f"compile_decoding: {reason}; remove it")
        self._model = model
        self._backend = backend
        self._memory: _Memory | None = None
        self._steps: dict[int, Step] = {}
        """Compiled steps by number of rows."""

    def decode(
        self,
        rows: Sequence[Sequence[int]],
        stops: Collection[int],
        seeds: Sequence[int] | None = None,
    ) -> list[SampledTokens]:
        """Sample one continuation of each row, as :func:`align.models.decoding.eager.decode`.

        Raises:
            NotFiniteError: The probabilities of a next token are not finite.
            UserError: The compiler fails.
        """
        config = self._model.generation_config
        with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=MAX_GRAPHS):
            prompts = compute_prompts(self._model, rows)
            n_rows = padded_rows(len(rows))
            memory = self._load(prompts, n_rows, config.max_new_tokens)
            batch = _Batch(Choice(config, len(rows), seeds), n_rows, config.max_new_tokens)
            first = (prompts.mask == 0).sum(-1)[prompts.index][batch.copies(prompts.index.device)]
            logits = prompts.logits[prompts.index][batch.copies(prompts.index.device)]
            while True:
                tokens = batch.draw(logits)
                if batch.must_read:
                    batch.read(stops)
                    if batch.is_done:
                        return batch.completions
                    if (order := batch.halve()) is not None:
                        index = torch.tensor(order, device=tokens.device)
                        memory.move(index)
                        tokens, first = tokens[index], first[index]
                logits = self._run(tokens[:, None], first)
                memory.end.add_(1)

    def _run(self, ids: Tensor, first: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        n_rows = len(ids)
        if n_rows not in self._steps:
            self._steps[n_rows] = self._compile(n_rows)
        try:
            return self._steps[n_rows](ids, first)
        except torch._dynamo.exc.TorchDynamoException as error:
            text = " ".join(str(error).split())
            raise UserError(
                f"compile_decoding: torch cannot compile {type(self._model).__name__} with "
                f"`{self._backend}`: {text[:300]}; remove it"
            ) from None

    def _load(self, prompts: ComputedPrompts, n_rows: int, n_new: int) -> _Memory:
        """Copy keys and values of the rows' prompts into the memory, which grows if it must."""
        width = prompts.mask.shape[1]
        length = padded_length(width + n_new)
        memory = self._memory
        if memory is None or memory.n_rows < n_rows or memory.length < length:
            if memory is not None:
                n_rows, length = max(n_rows, memory.n_rows), max(length, memory.length)
            self._memory, self._steps = None, {}  # free the memory before more is taken
            self._memory = memory = _Memory(prompts.cache, n_rows, length)
        memory.load(prompts, width)
        return memory

    def _compile(self, n_rows: int) -> Step:
        memory, model = self._memory, self._model
        assert memory is not None
        cache = memory.cache(n_rows)
        places = torch.arange(memory.length, device=memory.end.device)
        dtype = memory.buffers[0][0].dtype

        def step(ids: Tensor, first: Tensor) -> Tensor:
            visible = (places >= first[:, None]) & (places <= memory.end)
            bias = torch.zeros_like(visible, dtype=dtype).masked_fill(
                ~visible, torch.finfo(dtype).min
            )
            positions = (memory.end - first)[:, None]
            return last_logits(model, ids, bias[:, None, None], positions, cache)

        on_gpu = memory.end.is_cuda and self._backend == "inductor"
        return torch.compile(
            step,
            backend=self._backend,
            dynamic=False,
            fullgraph=True,
            mode="reduce-overhead" if on_gpu else None,
        )


class _Memory:
    """Keys and values of all layers, ``[rows, heads, length, size]``, at addresses that stay."""

    def __init__(self, like: DynamicCache, n_rows: int, length: int) -> None:
        self.n_rows, self.length = n_rows, length
        self.buffers = [
            tuple(
                states.new_zeros(n_rows, states.shape[1], length, states.shape[3])
                for states in (layer.keys, layer.values)
            )
            for layer in like.layers
        ]
        self.end = torch.zeros((), dtype=torch.long, device=self.buffers[0][0].device)
        """Number of tokens in the cache, padding included: the place of the next token."""
        torch._dynamo.mark_static_address(self.end)

    def load(self, prompts: ComputedPrompts, width: int) -> None:
        """Fill the first rows with the prompts of a batch; the others keep finite numbers."""
        for buffers, layer in zip(self.buffers, prompts.cache.layers, strict=True):
            for buffer, states in zip(buffers, (layer.keys, layer.values), strict=True):
                buffer[: len(prompts.index), :, :width] = states[prompts.index]
        self.end.fill_(width)

    def move(self, index: Tensor) -> None:
        """Let the first rows be the rows ``index``, which all lie at or behind their new place."""
        for buffers in self.buffers:
            for buffer in buffers:
                buffer[: len(index)] = buffer[index]

    def cache(self, n_rows: int) -> Cache:
        """A cache of transformers over the first rows."""
        return Cache(
            layers=[
                _FixedLayer(keys[:n_rows], values[:n_rows], self.end)
                for keys, values in self.buffers
            ]
        )


class _FixedLayer(StaticLayer):
    """A layer of a cache over given memory, into which the state of one token is written."""

    def __init__(self, keys: Tensor, values: Tensor, end: Tensor) -> None:
        super().__init__(max_cache_len=keys.shape[2])
        for buffer in (keys, values):
            torch._dynamo.mark_static_address(buffer)
        self.keys, self.values, self.cumulative_length = keys, values, end
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the states of one token of each row; returns those of all places."""
        place = self.cumulative_length.reshape(1)
        self.keys.index_copy_(2, place, key_states)
        self.values.index_copy_(2, place, value_states)
        return self.keys, self.values


class _Batch:
    """The new tokens of a batch, and which of its rows continue."""

    def __init__(self, choice: Choice, n_rows: int, max_new_tokens: int) -> None:
        self._choice = choice
        self._max_new_tokens = max_new_tokens
        self._rows = [k if k < choice.n_rows else 0 for k in range(n_rows)]
        """The row of the first batch at each place; the last ones may be copies of the first."""
        self._drawn: list[ChosenTokens] = []
        """Of the steps since the last read."""
        self._n_steps = 0
        self._ended = [False] * choice.n_rows
        self.completions = [SampledTokens([], []) for _ in self._ended]

    def copies(self, device: torch.device) -> Int[Tensor, " places"]:
        """The row at each place."""
        return torch.tensor(self._rows, device=device)

    def draw(self, logits: Tensor) -> Tensor:
        """Draw the next tokens of all places."""
        self._drawn.append(self._choice.draw(logits, self._rows))
        self._n_steps += 1
        return self._drawn[-1].tokens

    @property
    def must_read(self) -> bool:
        """Whether the tokens are to be read after the present step."""
        return self._n_steps == self._max_new_tokens or len(self._drawn) == STEPS_BETWEEN_READS

    def read(self, stops: Collection[int]) -> None:
        """Append the tokens since the last read to the completions of rows that continue.

        Raises:
            NotFiniteError: A probability is not finite.
        """
        tokens = torch.stack([step.tokens for step in self._drawn], -1).tolist()
        logps = torch.stack([step.logps for step in self._drawn], -1).tolist()
        self._drawn = []
        seen = set()
        for row, *new in zip(self._rows, tokens, logps, strict=True):
            if row in seen or self._ended[row]:
                continue
            seen.add(row)
            completion = self.completions[row]
            for token, logp in zip(*new, strict=True):
                if logp != logp:
                    raise NotFiniteError
                completion.tokens.append(token)
                completion.logps.append(logp)
                if token in stops:
                    self._ended[row] = True
                    break
        if self._n_steps == self._max_new_tokens:
            self._ended = [True] * len(self._ended)

    @property
    def is_done(self) -> bool:
        """Whether all rows have ended."""
        return all(self._ended)

    def halve(self) -> list[int] | None:
        """The places that stay, if those that continue fit into half of the rows or less."""
        seen: set[int] = set()
        continues = []
        for row in self._rows:  # a copy of a row has ended
            continues.append(not self._ended[row] and row not in seen)
            seen.add(row)
        n_rows = padded_rows(sum(continues))
        if n_rows >= len(self._rows):
            return None
        order = remaining(continues, n_rows)
        self._rows = [self._rows[place] for place in order]
        return order


def padded_rows(n: int) -> int:
    """The next power of two, at least :data:`~align.models.decoding.prompts.MIN_ROWS`.

    >>> [padded_rows(n) for n in (1, 5, 64, 65)]
    [4, 8, 64, 128]
    """
    return max(MIN_ROWS, 1 << (n - 1).bit_length())


def padded_length(n: int) -> int:
    """The next length of a cache; less than 128 tokens or a third of it are unused.

    >>> [padded_length(n) for n in (1, 129, 512, 513, 769, 1025)]
    [128, 256, 512, 768, 1024, 1536]
    """
    step = LENGTH_STEP
    while n > 4 * step:
        step *= 2
    return -(-n // step) * step
