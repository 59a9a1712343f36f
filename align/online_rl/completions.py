"""Sampled completions as tokens, before any model has scored them.

Completions are lists of tokens without padding: their lengths decide which tokens are real, so the
pad token may equal eos.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from align.models import tokenization

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
    """Log-probability of each token according to the sampler, in nats; None if unknown."""

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
