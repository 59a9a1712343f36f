"""Reward models: how they are read.

A reward model reads prompt and completion as :func:`align.generation.judged_ids` writes them, at the last real token, and
its score is what the head says there less ``score_mean``, the mean over SFT completions that its stage stored in
``reward.json``. Lengths decide which token is the last; a pad token is never looked for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align import generation, models, prefix_sharing

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

Message = dict[str, str]
FILE, MEAN = "reward.json", "score_mean"


class RewardModel:
    """A sequence classifier that scores texts, or tokens where its tokenizer is the policy's own."""

    def __init__(self, source: Path | str, *, dtype: str, device: Any, share: bool) -> None:
        self.tokenizer = models.load_tokenizer(source)
        self.model: Any = models.load_scorer(source, dtype=dtype).to(device)
        self.mean = score_mean(source)
        if share:
            prefix_sharing.share(self.model)

    def score_ids(
        self, rows: Sequence[Sequence[int]], *, batch_size: int
    ) -> Float[Tensor, " rows"]:
        """Scores of rows of tokens, each read at its last one."""
        return (
            score_ids(
                self.model.base_model,
                models.score_head(self.model),
                rows,
                batch_size=batch_size,
            )
            - self.mean
        )

    def score(
        self,
        prompts: Sequence[Sequence[Message]],
        completions: Sequence[Sequence[Message]],
        *,
        batch_size: int,
    ) -> Float[Tensor, " rows"]:
        """Scores of completions, as finished turns of the assistant."""
        rows = generation.judged_ids(self.tokenizer, prompts, completions)
        return self.score_ids(rows, batch_size=batch_size)


def score_mean(source: Path | str) -> float:
    """What is taken off a reward model's scores; 0 for one that is not of our making."""
    file = Path(source) / FILE
    return float(json.loads(file.read_text())[MEAN]) if file.is_file() else 0.0


def score_ids(
    backbone: Any, head: Any, rows: Sequence[Sequence[int]], *, batch_size: int
) -> Float[Tensor, " rows"]:
    """What a head says at the last token of each row, in float32. Rows that begin alike go together."""
    import torch

    result = torch.empty(len(rows), dtype=torch.float32)
    order = sorted(range(len(rows)), key=lambda i: tuple(rows[i]))
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        ids, mask = generation.padded(
            [rows[i] for i in batch], pad=0, side="right", device=backbone.device
        )
        with torch.inference_mode():
            hidden = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            last = mask.sum(1) - 1
            states = hidden[torch.arange(len(batch), device=ids.device), last]
            # In float32 whatever the layers are in: near 4 neighbouring bfloat16 numbers are 1/64 apart.
            scores = states.float() @ models.head_weight(head)[0].float()
        result[torch.tensor(batch)] = scores.cpu()
    return result
