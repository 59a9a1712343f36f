"""Memory of weights, gradients and optimizer states, from the shapes of a model.

Left out: activations, which depend on the batch, and frozen copies of adapters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from align.config.base import Lora, NewModel

BYTES_PER_PARAMETER = {"float32": 4, "bfloat16": 2}
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)
"""Bytes per weight in 4 bits: the code, and its share of the scales.

A block of 64 weights has a scale of one byte, and 256 blocks have a scale of four bytes.
"""


@dataclass(frozen=True, slots=True)
class ModelSize:
    """The number of parameters of a model, and the shapes of those that can be quantized."""

    parameters: int
    linear: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Outputs and inputs of each linear layer but the output layer, by name."""
    vocabulary: int = 0
    """Tokens of the vocabulary; 0 is unknown."""
    positions: int | None = None
    """Longest sequence in tokens; None is unknown."""

    @property
    def width(self) -> int:
        """Width of the hidden states; 0 if the layers are unknown."""
        return min((inputs for _, inputs in self.linear.values()), default=0)

    @property
    def embeddings(self) -> int:
        """Matrices of the size of the vocabulary: 2 if input and output layer differ."""
        others = self.parameters - sum(a * b for a, b in self.linear.values())
        return 2 if others >= 2 * self.vocabulary * self.width else 1

    def weight_bytes(self, dtype: str, quantization: str | None) -> int:
        """Memory of the frozen weights: in 4 bits, embeddings and norms keep their type."""
        in_blocks = sum(a * b for a, b in self.linear.values()) if quantization else 0
        others = (self.parameters - in_blocks) * BYTES_PER_PARAMETER[dtype]
        return others + round(in_blocks * NF4_BYTES)

    def adapter_parameters(self, lora: Lora) -> int:
        """Parameters of an adapter: two matrices of its rank for each layer that it adapts."""
        return sum(lora.r * (outputs + inputs) for outputs, inputs in self._adapted(lora))

    def adapted_parameters(self, lora: Lora) -> int:
        """Parameters of the matrices that an adapter adapts."""
        return sum(outputs * inputs for outputs, inputs in self._adapted(lora))

    def _adapted(self, lora: Lora) -> list[tuple[int, int]]:
        return [
            shape for name, shape in self.linear.items() if _is_adapted(name, lora.target_modules)
        ]


def new_model_size(new: NewModel) -> ModelSize:
    """The size of a new model, whose layers have the names and shapes of a Llama."""
    width, inner = new.hidden_size, new.intermediate_size
    heads = new.num_key_value_heads or new.num_attention_heads
    key_value = width // new.num_attention_heads * heads
    layer = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (key_value, width),
        "self_attn.v_proj": (key_value, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    layers = range(new.num_hidden_layers)
    linear = {f"model.layers.{i}.{name}": shape for i in layers for name, shape in layer.items()}
    return ModelSize(new.count_parameters(), linear, new.vocab_size, new.max_position_embeddings)


def training_bytes(optimizer: str) -> int:
    """Memory per trained parameter: the weight, its gradient and the two moments of Adam.

    >>> training_bytes("adamw_torch"), training_bytes("paged_adamw_8bit")
    (16, 10)
    """
    return 4 + 4 + (2 if "8bit" in optimizer else 8)


def _is_adapted(name: str, targets: str | list[str]) -> bool:
    """Whether peft adapts a linear layer; a text that is not ``all-linear`` is a pattern."""
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)
