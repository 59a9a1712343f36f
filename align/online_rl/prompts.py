"""Prompts of online training: their rows, their tokens, and which of them a step uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import randperm

from align.config.online_rl import OnlineRL
from align.data.rows import Row
from align.models import generation, tokenization
from align.online_rl.models import OnlineRLModels
from align.runtime import distributed
from align.runtime.seeds import generator


@dataclass(frozen=True, slots=True)
class Prompts:
    """Rows of a table of prompts, and the tokens of each prompt up to the assistant's turn."""

    rows: Sequence[Row]
    tokens: Sequence[list[int]]

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, indices: Sequence[int]) -> Prompts:
        """The prompts at ``indices``, in their order."""
        return Prompts([self.rows[i] for i in indices], [self.tokens[i] for i in indices])

    def shard(self) -> Prompts:
        """Every ``world_size``-th prompt, starting with this rank's."""
        return self.select(own_places(len(self)))


def tokenize(rows: Sequence[Row], models: OnlineRLModels, config: OnlineRL) -> Prompts:
    """Tokenize prompts for the policy.

    Raises:
        UserError: A prompt and ``max_new_tokens`` exceed the model's positions.
    """
    tokens = tokenization.tokenize_prompts(models.tokenizer, [row["prompt"] for row in rows])
    generation.check_positions(models.policy.model.config, tokens, config.max_new_tokens)
    return Prompts(rows, tokens)


def prompt_indices(step: int, n_prompts: int, config: OnlineRL) -> list[int]:
    """Indices of the prompts of a step on this rank, each repeated ``n_completions`` times.

    Every epoch visits each prompt once, in a fresh order. Ranks take turns, so the ranks together
    use the same prompts as one process.
    """
    per_step = config.batch_size // config.n_completions
    indices: list[int] = []
    orders: dict[int, list[int]] = {}
    for place in own_places(per_step):
        epoch, position = divmod(step * per_step + place, n_prompts)
        if epoch not in orders:
            shuffle = generator(config.seed, "prompts", epoch)
            orders[epoch] = randperm(n_prompts, generator=shuffle).tolist()
        indices += [orders[epoch][position]] * config.n_completions
    return indices


def completion_places(config: OnlineRL) -> list[int]:
    """Places of this rank's completions among those of a step; see :func:`prompt_indices`."""
    n = config.n_completions
    return [place * n + k for place in own_places(config.batch_size // n) for k in range(n)]


def own_places(n: int) -> range:
    """Places of this rank's rows among ``n``: every ``world_size``-th, starting with its rank."""
    return range(distributed.rank(), n, distributed.world_size())
