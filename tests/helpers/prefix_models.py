"""Small models and batches of rows for tests of prefix sharing, and the comparison of results."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # at 0.02, narrow models compute nearly the same for all inputs
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
GPT2 = {
    "vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
SHARED = [
    pytest.param("llama", SMALL, id="Llama, grouped queries"),
    pytest.param("qwen3", SMALL, id="Qwen3, norms of queries and keys"),
    pytest.param("gpt2", GPT2, id="GPT-2, absolute positions"),
    pytest.param("mistral", SMALL | {"sliding_window": 4}, id="Mistral, sliding window"),
    pytest.param(
        "gemma3_text",
        SMALL | {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]},
        id="Gemma 3, a window in every other layer, two rotary embeddings",
    ),
    pytest.param("gemma", SMALL, id="Gemma, one head of keys"),
]
P = [5, 6, 7, 8, 9, 10, 11]  # longer than the windows
ROWS = {
    "pairs": [[*P, 1, 2, 3], [3, 1, 2], [*P, 4, 4], [3, 1, 4, 4, 4]],
    "four completions of a prompt": [[*P, 1], [*P, 2, 2], [*P, 2, 3, 1], [*P, 4]],
    "rows equal to each other": [P, [1, 2], P, [1, 2], P],
    "a row that is a prefix of others": [P, P[:3], [*P, 2], P[:1], [*P, 2, 3]],
    "nothing shared": [[1, 2, 3, 4], [2, 1], [3, 3, 3]],
    "a batch of one": [P],
    "pad tokens inside a row": [[*P, 0, 1], [*P, 0, 0, 2], [0, 1]],
    "an empty row": [P, [], P[:2]],
}


def model(kind: str, shape: dict[str, Any], dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**shape)).to(dtype)


def batch(rows: list[list[int]], side: str, extra: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, ``extra`` columns wider than the longest row."""
    width = max(map(len, rows)) + extra
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for b, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[b, place], mask[b, place] = torch.tensor(row, dtype=torch.long), 1
    return ids, mask


def distinct(rows: list[list[int]]) -> int:
    return len({tuple(row[:k]) for row in rows for k in range(1, len(row) + 1)})


def hidden(causal_model: Any, ids: torch.Tensor, mask: torch.Tensor, **more: Any) -> torch.Tensor:
    """Hidden states of the last layer, ``[batch, time, hidden]``, with zeros for the pads."""
    outputs = causal_model.base_model(input_ids=ids, attention_mask=mask, use_cache=False, **more)
    return outputs.last_hidden_state * mask[..., None]


def gradients(causal_model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of a loss by parameter name."""
    causal_model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in causal_model.named_parameters() if p.grad is not None}


def assert_close_in_norm(
    actual: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    tolerance: float = 1e-6,
) -> None:
    assert actual.keys() == expected.keys()
    assert len(expected) > 0
    for name, gradient in expected.items():
        error = (actual[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert error < tolerance, f"{name}: {error}"


def weighted_sum(states: torch.Tensor) -> torch.Tensor:
    weights = torch.linspace(0, 99, states.numel(), dtype=states.dtype).cos().view_as(states)
    return (states.tanh() * weights).sum()


def varlen(q, k, v, cu_q, cu_k, max_q, max_k, scale, window):
    """Attention as flash attention defines it, one sequence at a time."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    outputs = []
    for (a, b), (c, d) in zip(
        itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True
    ):
        assert 0 < b - a <= max_q
        assert d - c <= max_k
        distance = torch.arange(b - a)[:, None] + (d - c) - (b - a) - torch.arange(d - c)
        visible = (distance >= 0) & (distance < (window or max_k))
        x, y, z = (t.transpose(0, 1)[None] for t in (q[a:b], k[c:d], v[c:d]))
        out = scaled_dot_product_attention(x, y, z, attn_mask=visible, scale=scale, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def without_layout(forward: Any, *args: Any, prefix_layout: Any = None, **kwargs: Any) -> Any:
    return forward(*args, **kwargs)
