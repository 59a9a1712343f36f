"""Batched sampling of completions.

Prompts of similar length share a batch and are padded on the left. A completion ends at its first
stop token, which may equal the pad token. Left out: the loop over tokens
(:mod:`align.models.decoding`), tokenization (:mod:`align.models.tokenization`) and
log-probabilities (:mod:`align.models.logps`).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from align.errors import UserError
from align.models.files import position_limit
from align.models.tokenization import (
    decode_completion,
    end_tokens,
    pad_rows,
    tokenize_prompts,
    until_stop,
)
from align.models.tokenizer_files import token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from align.models.decoding.choice import SampledTokens
    from align.models.decoding.compiled import CompiledDecoder
    from align.models.tokenization import Message

Batch = tuple[int, list[int]]
"""Number of a batch, and the indices of its prompts."""
Results = list[list[list["SampledTokens"]]]
"""Of each batch, the completions of each prompt."""
MapBatches = Callable[[Sequence[Batch], Callable[[list[Batch]], Results]], Results]
"""Applies a function to lists of batches and returns the results of all batches in order."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A sampled text."""

    text: str
    n_tokens: int
    """Number of tokens, without the stop token."""
    finished: bool
    """Whether the completion ends in a stop token; False where the length limit cut it off."""
    tokens: tuple[int, ...] = ()
    """The sampled tokens, stop token included; empty where only the text is known."""


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]],
    *,
    n_completions: int,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    compile_decoding: str | None = None,
    map_batches: MapBatches | None = None,
) -> list[list[Completion]]:
    """Sample ``n_completions`` texts for each prompt, in the order of the prompts.

    A batch holds at most ``batch_size`` completions and has a seed derived from ``seed`` and its
    number, so the result does not depend on which process samples which batch.
    ``compile_decoding`` names a backend of ``torch.compile``. ``map_batches`` distributes the
    batches, such as ``runtime.distributed.map_rows``; by default this process
    samples all of them.

    Raises:
        UserError: A prompt with ``max_new_tokens`` exceeds the model's positions.
    """
    tokens = tokenize_prompts(tokenizer, prompts)
    check_positions(model.config, tokens, max_new_tokens)
    stops = set_sampling(
        model, tokenizer, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens
    )
    model.eval()
    completions = generate(
        model,
        tokens,
        stops,
        n_completions=n_completions,
        batch_size=max(1, batch_size // n_completions),
        batch_seed=lambda number: seed * 1_000_003 + number,
        decoder=compiled_decoder(model, compile_decoding),
        map_batches=map_batches,
    )
    return [[_completion(row, stops, tokenizer) for row in rows] for rows in completions]


def check_positions(config: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Check that tokenized prompts and their completions fit into the positions of a model.

    Raises:
        UserError: Some do not.
    """
    limit = position_limit(config)
    if limit is None:
        return
    n_long = sum(len(ids) + max_new_tokens > limit for ids in prompts)
    if n_long:
        raise UserError(
            f"max_new_tokens: {n_long:,} of {len(prompts):,} prompts plus {max_new_tokens} new "
            f"tokens exceed the model's {limit} positions; lower `max_new_tokens`, or drop long "
            "prompts in `prepare`"
        )


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    stops: Collection[int],
    *,
    n_completions: int = 1,
    batch_size: int,
    batch_seed: Callable[[int], int],
    seeds: Sequence[int] | None = None,
    decoder: CompiledDecoder | None = None,
    map_batches: MapBatches | None = None,
) -> list[list[SampledTokens]]:
    """Sample ``n_completions`` completions of each tokenized prompt by ``model.generation_config``.

    Prompts are sorted by length and sampled ``batch_size`` prompts at a time. Before batch k,
    torch's random state is seeded with ``batch_seed(k)``. A completion includes its stop token if
    it has one. With ``seeds``, one of each prompt with its single completion, a completion depends
    on its prompt and its seed, and on its batch through rounding only.
    """
    import torch

    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def run(numbered: list[Batch]) -> Results:
        results = []
        for number, batch in numbered:
            torch.manual_seed(batch_seed(number))
            copies = [prompts[i] for i in batch for _ in range(n_completions)]
            own = None if seeds is None else [seeds[i] for i in batch]
            rows = generate_tokens(model, copies, stops, decoder, own)
            results.append(
                [rows[k : k + n_completions] for k in range(0, len(rows), n_completions)]
            )
        return results

    numbered = list(enumerate(batches))
    sampled = run(numbered) if map_batches is None else map_batches(numbered, run)
    completions: list[list[SampledTokens]] = [[] for _ in prompts]
    for batch, results in zip(batches, sampled, strict=True):
        for i, rows in zip(batch, results, strict=True):
            completions[i] = rows
    return completions


def compiled_decoder(model: Any, backend: str | None) -> CompiledDecoder | None:
    """The decoder with compiled steps for a model, if a backend is named.

    Raises:
        UserError: The steps of the model cannot be compiled.
    """
    if backend is None:
        return None
    from align.models.decoding.compiled import CompiledDecoder

    return CompiledDecoder(model, backend)


def generate_tokens(
    model: Any,
    rows: Sequence[Sequence[int]],
    stops: Collection[int],
    decoder: CompiledDecoder | None = None,
    seeds: Sequence[int] | None = None,
) -> list[SampledTokens]:
    """Sample one continuation of each row in a single batch, up to its first stop token inclusive.

    ``seeds`` are those of the rows; by default torch's random state draws for all of them.

    Models and settings that :mod:`align.models.decoding.eager` cannot decode are sampled by their
    own ``generate``, and the reason is logged once.

    Raises:
        UserError: The probabilities of a next token are not finite.
    """
    from align.models.decoding import eager
    from align.models.decoding.choice import NotFiniteError

    try:
        if decoder is not None:
            return decoder.decode(rows, stops, seeds)
        obstacle = eager.obstacle(model)
        if obstacle is None:
            return eager.decode(model, rows, stops, seeds)
        _log_obstacle(obstacle)
        return generate_with_transformers(model, rows, stops, seeds)
    except NotFiniteError:
        raise UserError(
            f"{model.name_or_path}: the probabilities of the next token are not finite, although "
            "the weights are; check its config.json, such as `rope_theta`"
        ) from None


def generate_with_transformers(
    model: Any,
    rows: Sequence[Sequence[int]],
    stops: Collection[int],
    seeds: Sequence[int] | None = None,
) -> list[SampledTokens]:
    """Sample with ``model.generate``, and remove its padding behind the stop tokens.

    A model whose own ``generate`` ignores logits processors ignores ``seeds``.
    """
    import torch
    from transformers import LogitsProcessorList

    from align.models.decoding.choice import LogpRecorder, NotFiniteError, SampledTokens

    pad = model.generation_config.pad_token_id
    ids, mask = pad_rows(rows, pad=pad, side="left", device=model.device)
    recorder = LogpRecorder(model.generation_config, seeds)
    try:
        with torch.inference_mode():
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                logits_processor=LogitsProcessorList([recorder]),
            )
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise NotFiniteError from None
    new = output[:, ids.shape[1] :]
    completions = [until_stop(row, stops) for row in new.tolist()]
    logps = recorder.logps(output, new.shape[1]).tolist()
    pairs = zip(completions, logps, strict=True)
    return [SampledTokens(tokens, row[: len(tokens)]) for tokens, row in pairs]


@functools.cache
def _log_obstacle(reason: str) -> None:
    logging.getLogger("align.sampling").info("sampling with `model.generate`: %s", reason)


def set_sampling(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
) -> set[int]:
    """Make ``model.generate`` sample from the model's distribution, and return the stop tokens.

    The model's own generation config is replaced, because ``generate`` merges it into any config
    that it is called with: it may contain more than the recipe, such as Qwen2.5's
    ``repetition_penalty: 1.1``. Its stop tokens are kept.
    """
    from transformers import GenerationConfig

    stops = {*token_ids(model.generation_config.eos_token_id), *end_tokens(tokenizer)}
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        if temperature > 0
        else {"do_sample": False}
    )
    model.generation_config = GenerationConfig(
        eos_token_id=sorted(stops) or None,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=max_new_tokens,
        **sampling,
    )
    return stops


def _completion(
    row: SampledTokens, stops: set[int], tokenizer: PreTrainedTokenizerBase
) -> Completion:
    tokens = row.tokens
    finished = tokens[-1] in stops
    text = decode_completion(tokenizer, tokens, finished=finished)
    return Completion(text, len(tokens) - finished, finished, tuple(tokens))
