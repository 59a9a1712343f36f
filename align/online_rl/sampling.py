"""Sampling of completions from the policy: with transformers, or by vLLM.

All samplers have one method, ``generate(prompts, seeds=...)``. Each completion has its own seed, so
it does not depend on the process or the batch that samples it, except for rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from align.config.online_rl import OnlineRL
from align.errors import UserError
from align.models import generation
from align.models.adapters import active_adapter
from align.online_rl.completions import Completions
from align.online_rl.draws import training_draw
from align.online_rl.models import ModelView, OnlineRLModels
from align.runtime.seeds import derive_seed

if TYPE_CHECKING:
    from align.models.decoding.compiled import CompiledDecoder
    from align.online_rl.vllm.ahead import RequestsAhead


class Sampler(Protocol):
    """Samples one completion per prompt from the current policy."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        seeds: Sequence[int],
        max_new_tokens: int | None = None,
    ) -> Completions:
        """One completion per prompt, in the prompts' order, each with its seed.

        ``max_new_tokens`` replaces the length limit of the recipe.
        """
        ...


@dataclass(frozen=True, slots=True)
class LocalSampler:
    """Samples with transformers, ``batch_size`` completions at a time."""

    policy: ModelView
    stops: set[int]
    """Tokens that end a completion."""
    batch_size: int
    decoder: CompiledDecoder | None = None
    activate: Callable[[Any, str | None], AbstractContextManager[None]] = active_adapter
    """Lets the model compute with the policy's adapter: as it is, or merged into the weights."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        seeds: Sequence[int],
        max_new_tokens: int | None = None,
    ) -> Completions:
        """One completion per prompt; prompts of similar length are batched together."""
        model = self.policy.model
        with self.activate(model, self.policy.adapter), _length_limit(model, max_new_tokens):
            sampled = generation.generate(
                model,
                prompts,
                self.stops,
                batch_size=self.batch_size,
                batch_seed=lambda number: derive_seed(seeds[0], number),
                seeds=seeds,
                decoder=self.decoder,
            )
        completions = [rows[0].tokens for rows in sampled]
        return Completions(
            [list(p) for p in prompts],
            completions,
            [row[-1] in self.stops for row in completions],
            [rows[0].logps for rows in sampled],
        )


@contextlib.contextmanager
def _length_limit(model: Any, max_new_tokens: int | None) -> Iterator[None]:
    """Inside this block, a model samples at most so many tokens, if the number is given."""
    config = model.generation_config
    before = config.max_new_tokens
    config.max_new_tokens = max_new_tokens or before
    try:
        yield
    finally:
        config.max_new_tokens = before


def build_sampler(config: OnlineRL, models: OnlineRLModels) -> Sampler:
    """The sampler that ``config.sampler`` names. It sets the policy's ``generation_config``.

    Raises:
        UserError: vLLM cannot be reached or started, the model's steps cannot be compiled, or its
            adapter cannot be merged.
    """
    stops = generation.set_sampling(
        models.policy.model,
        models.tokenizer,
        temperature=config.temperature,
        top_p=1.0,
        max_new_tokens=config.max_new_tokens,
    )
    if config.sampler == "transformers":
        decoder = generation.compiled_decoder(models.policy.model, config.compile_decoding)
        activate = _merged_adapter(models) if config.merge_adapter else active_adapter
        return LocalSampler(models.policy, stops, config.sample_batch_size, decoder, activate)
    if config.colocates:
        from align.online_rl.vllm import engine

        return engine.start(config, models.policy, stops, models.device)
    from align.online_rl.vllm import server

    return server.connect(config, models.policy, stops, models.device)


def sample_ahead(
    config: OnlineRL,
    sampler: Sampler,
    prompts: Callable[[int], Sequence[Sequence[int]]],
) -> RequestsAhead | None:
    """Requests for the completions of later steps; None if each update waits for its own.

    ``prompts`` are those of a step.
    """
    if config.max_staleness == 0:
        return None
    from align.online_rl.vllm.ahead import RequestsAhead
    from align.online_rl.vllm.server import ServerSampler

    assert isinstance(sampler, ServerSampler)
    return RequestsAhead(
        sampler,
        prompts,
        lambda step: training_draw(config, step).seeds,
        steps=config.steps,
        max_staleness=config.max_staleness,
    )


def _merged_adapter(
    models: OnlineRLModels,
) -> Callable[[Any, str | None], AbstractContextManager[None]]:
    from align.models.decoding import merged

    assert models.policy.adapter is not None, "`merge_adapter` requires `lora`"
    reason = merged.obstacle(models.policy.model, models.policy.adapter)
    if reason is not None:
        raise UserError(f"merge_adapter: the adapter is not merged: {reason}; remove it")
    return merged.merged_adapter
