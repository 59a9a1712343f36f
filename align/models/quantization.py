"""Models in 4 bits: how they are loaded, what a CPU can compute, and adapters on top of them.

The linear layers are quantized by bitsandbytes while the weights are loaded; embeddings, the output
layer, norms and score heads keep their type. A folder never contains quantized weights: a stage
writes the adapter alone, and the key ``quantization`` of a later stage decides how its base is
loaded.

Source: Dettmers et al. 2023, arXiv:2305.14314 (QLoRA).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from align.errors import UserError

BLOCK = 64
"""Weights that share a scale. On a CPU, the width of a layer must be a multiple of it."""


def loading_options(quantization: str | None, *, dtype: str) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that quantize the linear layers."""
    if quantization is None:
        return {}
    import torch
    from transformers import BitsAndBytesConfig

    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
    }


def prepare_layers(source: Path | str, model: Any) -> None:
    """Check the layers that were quantized, and choose kernels that compute the same everywhere.

    On a CPU with bfloat16 instructions, bitsandbytes would repack a layer in its first inference.
    It would then round to bfloat16, and pass no gradient on.

    Raises:
        UserError: bitsandbytes cannot compute a layer on a CPU.
    """
    layers = {name: m for name, m in model.named_modules() if type(m).__name__ == "Linear4bit"}
    for layer in layers.values():
        layer.support_avx512bf16_for_cpu = False
    on_cpu = {n: (m.out_features, m.in_features) for n, m in layers.items() if _is_on_cpu(m)}
    if (problem := width_problem(on_cpu)) is not None:
        raise UserError(f"{source}: {problem}")


def width_problem(layers: Mapping[str, tuple[int, int]]) -> str | None:
    """The first layer that bitsandbytes cannot compute on a CPU, as an error; None without one.

    ``layers`` has outputs and inputs by name.
    """
    for name, (_, inputs) in layers.items():
        if inputs % BLOCK:
            return (
                f"its layer {name} has {inputs} inputs; on a CPU, 4-bit quantization requires "
                f"multiples of {BLOCK}; remove `quantization`"
            )
    return None


def _is_on_cpu(layer: Any) -> bool:
    return bool(layer.weight.device.type == "cpu")


@contextlib.contextmanager
def adapters_in_float32(model: Any) -> Iterator[None]:
    """Inside this block, TRL builds a trainer; adapters on quantized layers stay as they are.

    TRL casts them to bfloat16, in which small updates round to zero: it has 8 bits of precision.
    """
    # The parameters are kept as well: a new one could otherwise get the id of one that is replaced.
    before = {id(p): (p, p.data) for p in model.parameters() if p.requires_grad}
    yield
    if getattr(model, "is_quantized", False):
        for parameter in model.parameters():
            if parameter.requires_grad:
                kept = before.get(id(parameter))
                parameter.data = parameter.data.float() if kept is None else kept[1]


def count_parameters(model: Any) -> int:
    """The number of parameters of a model; two in 4 bits are stored in one byte."""
    return sum(
        p.numel() if (state := getattr(p, "quant_state", None)) is None else state.shape.numel()
        for p in model.parameters()
    )
