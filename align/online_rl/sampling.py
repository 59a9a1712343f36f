"""Sampling of completions from the policy: in this process, or by a vLLM server.

Both samplers have one method, ``generate(prompts, seed=...)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from align.config.online_rl import OnlineRL
from align.models import generation
from align.models.adapters import active_adapter
from align.online_rl.completions import Completions
from align.online_rl.models import ModelView, PPOModels
from align.runtime.seeds import derive_seed


class Sampler(Protocol):
    """Samples one completion per prompt from the current policy."""

    def generate(self, prompts: Sequence[Sequence[int]], *, seed: int) -> Completions:
        """One completion per prompt, in the prompts' order. Equal seeds give equal completions."""
        ...


@dataclass(frozen=True, slots=True)
class LocalSampler:
    """Samples with transformers, ``batch_size`` completions at a time."""

    policy: ModelView
    stops: set[int]
    """Tokens that end a completion."""
    batch_size: int

    def generate(self, prompts: Sequence[Sequence[int]], *, seed: int) -> Completions:
        """One completion per prompt; prompts of similar length are batched together."""
        with active_adapter(self.policy.model, self.policy.adapter):
            sampled = generation.generate(
                self.policy.model,
                prompts,
                self.stops,
                batch_size=self.batch_size,
                batch_seed=lambda number: derive_seed(seed, number * self.batch_size),
            )
        completions = [rows[0] for rows in sampled]
        finished = [row[-1] in self.stops for row in completions]
        return Completions([list(p) for p in prompts], completions, finished)


def build_sampler(config: OnlineRL, models: PPOModels) -> Sampler:
    """The sampler that ``config.sampler`` names. It sets the policy's ``generation_config``.

    Raises:
        UserError: The vLLM server cannot be reached.
    """
    stops = generation.set_sampling(
        models.policy.model,
        models.tokenizer,
        temperature=config.temperature,
        top_p=1.0,
        max_new_tokens=config.max_new_tokens,
    )
    if config.sampler == "transformers":
        return LocalSampler(models.policy, stops, config.sample_batch_size)
    from align.online_rl import vllm

    client = vllm.connect(config.vllm_url, models.device)
    vllm.check_mergeable(models.policy.model)
    return vllm.VLLMSampler(client, models.policy, stops, config)
