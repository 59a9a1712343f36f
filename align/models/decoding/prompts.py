"""The prompts of a batch, computed: each distinct one once, padded on the left."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from align.models.tokenization import pad_rows

MIN_ROWS = 4
"""Rows that stay in a batch, ended ones among them. On a CPU, libraries multiply matrices of up to
three rows by another kernel, whose last bits differ; with four or more, a row does not depend on
the others. This is not so on a GPU."""


@dataclass(frozen=True, slots=True)
class ComputedPrompts:
    """Keys, values and last logits of the distinct prompts of a batch."""

    cache: DynamicCache
    logits: Float[Tensor, "prompts vocabulary"]
    mask: Int[Tensor, "prompts width"]
    """0 for padding."""
    positions: Int[Tensor, "prompts width"]
    index: Int[Tensor, " rows"]
    """The prompt of each row of the batch."""


def compute_prompts(model: Any, rows: Sequence[Sequence[int]]) -> ComputedPrompts:
    """Compute each distinct row once, or one of them more often, so that the batch is not tiny."""
    distinct = list(dict.fromkeys(map(tuple, rows)))
    places = {row: k for k, row in enumerate(distinct)}
    distinct += distinct[:1] * (min(MIN_ROWS, len(rows)) - len(distinct))
    ids, mask = pad_rows(
        distinct, pad=model.generation_config.pad_token_id, side="left", device=model.device
    )
    positions = mask.long().cumsum(-1).sub(1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    logits = last_logits(model, ids, None if bool(mask.all()) else mask, positions, cache)
    index = torch.tensor([places[tuple(row)] for row in rows], device=model.device)
    return ComputedPrompts(cache, logits, mask, positions, index)


def last_logits(
    model: Any, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: Any
) -> Float[Tensor, "rows vocabulary"]:
    """Logits after the last of the new tokens ``ids``, whose keys and values are cached."""
    parameters = inspect.signature(model.forward).parameters
    arguments: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
    if "position_ids" in parameters:
        arguments["position_ids"] = positions
    output = model(
        input_ids=ids,
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
        return_dict=True,
        **arguments,
    )
    logits: Tensor = output.logits[:, -1]
    return logits
