"""Sampling of completions from the policy: in this process, or by a vLLM server.

Both samplers have one method, ``generate(prompts, seed=...)``. Completions are lists of tokens
without padding: their lengths decide which tokens are real, so the pad token may equal eos.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from align.config.ppo import PPO
from align.models import generation, tokenization
from align.models.adapters import active_adapter
from align.online_rl.models import ModelView, PPOModels
from align.online_rl.seeds import derive_seed

IGNORED = -100
"""The label of tokens that belong to no completion."""


@dataclass(frozen=True, slots=True)
class Completions:
    """Sampled completions with their prompts, as tokens."""

    prompts: list[list[int]]
    completions: list[list[int]]
    """Tokens of each completion, including the stop token of a finished one."""
    finished: list[bool]
    """Whether the completion ends with a stop token; otherwise the length limit cut it off."""
    sampler_logps: list[list[float]] | None = None
    """Log-probability of each token according to the sampler. None if the policy sampled."""

    @property
    def rows(self) -> list[list[int]]:
        """Tokens of prompt and completion."""
        return [p + c for p, c in zip(self.prompts, self.completions, strict=True)]

    def tensors(self, pad: int, device: Any) -> dict[str, Tensor]:
        """``ids``, ``mask`` and ``labels``, each ``[batch, time]``, padded on the right.

        ``labels`` are the completion's tokens, and -100 elsewhere.
        """
        ids, mask = tokenization.pad_rows(self.rows, pad=pad, side="right", device=device)
        starts = torch.tensor([len(p) for p in self.prompts], device=device)
        positions = torch.arange(ids.shape[1], device=device)
        in_completion = mask.bool() & (positions >= starts[:, None])
        return {"ids": ids, "mask": mask, "labels": ids.masked_fill(~in_completion, IGNORED)}

    def texts(self, tokenizer: Any) -> list[str]:
        """Texts of the completions, without the stop token and surrounding white space."""
        return [
            tokenization.decode_completion(tokenizer, completion, finished=finished)
            for completion, finished in zip(self.completions, self.finished, strict=True)
        ]


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


def build_sampler(config: PPO, models: PPOModels) -> Sampler:
    """The sampler that ``config.sampler`` names. It sets the policy's ``generation_config``.

    Raises:
        UserError: The vLLM server cannot be reached.
    """
    stops = generation.set_sampling(
        models.policy.model,
        models.tokenizer,
        temperature=config.temperature,
        top_p=config.top_p,
        max_new_tokens=config.max_new_tokens,
    )
    if config.sampler == "transformers":
        return LocalSampler(models.policy, stops, config.sample_batch_size)
    from align.online_rl import vllm

    client = vllm.connect(config.vllm_url, models.device)
    return vllm.VLLMSampler(client, models.policy, stops, config)
