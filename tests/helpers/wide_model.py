"""A random model whose layers are wide enough for 4 bits: their inputs are multiples of 64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from align.models import tokenization
from helpers import tiny_models

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": tiny_models.POSITIONS,
    "initializer_range": 0.2,
}
LAYERS = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
"""Weights of the linear layers: two square projections, two of half the width, and the MLP."""


def save(world: tiny_models.World, folder: Path, *, tie_word_embeddings: bool = True) -> Path:
    """Save the model with the tokenizer of ``world``, and return its folder."""
    tokenizer = tokenization.load_tokenizer(world.sft)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            **SHAPE,
            tie_word_embeddings=tie_word_embeddings,
            vocab_size=len(tokenizer),
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
