"""Sampled completions as tokens, before any model has scored them.

Completions are lists of tokens without padding: their lengths decide which tokens are real, so the
pad token may equal eos. A completion may be an episode: turns of the policy with tokens of an
environment between them. The policy is trained on its own tokens only, as it has sampled them.
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
class Episode:
    """The turns of a completion, and the judgment of the environment."""

    turns: tuple[slice, ...]
    """The completion's tokens of each turn of the policy; the last one ends the completion."""
    reward: float
    """Sum of the rewards of all turns."""
    ended: bool
    """Whether the environment ended the episode; otherwise a limit did."""


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
    episodes: list[Episode] | None = None
    """The episode of each completion; None without an environment, where a completion is a turn."""

    @property
    def turns(self) -> list[tuple[slice, ...]]:
        """The tokens of each completion that the policy sampled, as slices."""
        if self.episodes is None:
            return [(slice(0, len(completion)),) for completion in self.completions]
        return [episode.turns for episode in self.episodes]

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each completion that the policy sampled."""
        return [sum(turn.stop - turn.start for turn in turns) for turns in self.turns]

    @property
    def rows(self) -> list[list[int]]:
        """Tokens of prompt and completion."""
        return [p + c for p, c in zip(self.prompts, self.completions, strict=True)]

    def tensors(self, pad: int, device: Any) -> dict[str, Tensor]:
        """``ids``, ``mask`` and ``labels``, each ``[batch, time]``, padded on the right.

        ``labels`` are the completion's tokens that the policy sampled, and -100 elsewhere.
        """
        ids, mask = tokenization.pad_rows(self.rows, pad=pad, side="right", device=device)
        starts = torch.tensor([len(p) for p in self.prompts], device=device)
        positions = torch.arange(ids.shape[1], device=device)
        sampled = mask.bool() & (positions >= starts[:, None])
        if self.episodes is not None:
            turns = torch.zeros_like(sampled)
            for row, (prompt, places) in enumerate(zip(self.prompts, self.turns, strict=True)):
                for turn in places:
                    turns[row, len(prompt) + turn.start : len(prompt) + turn.stop] = True
            sampled &= turns
        return {"ids": ids, "mask": mask, "labels": ids.masked_fill(~sampled, IGNORED)}

    def texts(self, tokenizer: Any) -> list[str]:
        """Texts of the last turns, without the stop token and surrounding white space."""
        return [
            tokenization.decode_completion(tokenizer, completion[turns[-1]], finished=finished)
            for completion, turns, finished in zip(
                self.completions, self.turns, self.finished, strict=True
            )
        ]
