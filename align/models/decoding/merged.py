"""Sampling with an adapter added to the weights of its base, which are restored bit for bit.

An adapter adds two small matrix products to each layer that it adapts, for every sampled token. The
sum of weights and adapter needs none. Inside :func:`merged_adapter` the weights of the base are
that sum, and all adapters are off.

Subtracting the adapter again, as peft does, would leave rounding errors, which grow with every
step. So the original weights are kept, and copied back: that is memory for the adapted matrices
once more, as long as sampling takes. The sum is written into the memory of the weights, because
compiled steps expect them at their addresses.

Left out: models that :func:`obstacle` lists.

Source: Hu et al. 2021, arXiv:2106.09685 (LoRA), section 4.1: ``W + B A · alpha / r``.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from align.models.adapters import active_adapter, adapter_layers


def obstacle(model: Any, adapter: str) -> str | None:
    """The property of a model for which an adapter is not merged; None if there is none.

    The sum must compute what the layer and its adapter compute, up to rounding in float32: a sum in
    bfloat16 loses most of a small adapter, and one in 4 bits nearly all of it.
    """
    from peft.tuners.lora import Linear

    names = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for layer in _adapted_layers(model, adapter):
        kind = type(layer)
        if kind is not Linear:
            return f"it has a layer of the kind {kind.__module__}.{kind.__name__}"
        if adapter in layer.lora_variant or layer.lora_bias[adapter]:
            return "it is more than LoRA"
        weight = layer.get_base_layer().weight
        factors = (layer.lora_A[adapter].weight, layer.lora_B[adapter].weight)
        if any(each.dtype != torch.float32 for each in (weight, *factors)):
            return f"its weights are in {str(weight.dtype).removeprefix('torch.')}, not in float32"
        if names[id(weight)] > 1:
            return "it adapts weights that another layer has too"
    return None


@contextlib.contextmanager
def merged_adapter(model: Any, adapter: str | None) -> Iterator[None]:
    """Inside this block, a model computes with one adapter at the cost of none.

    Afterwards its weights have the bits they had before, also if the block raises an error. Without
    an adapter all of them are off. :func:`obstacle` must be None.
    """
    originals: list[tuple[Tensor, Tensor]] = []
    layers = [] if adapter is None else _adapted_layers(model, adapter)
    try:
        with torch.no_grad():
            for layer in layers:
                weight = layer.get_base_layer().weight.data
                originals.append((weight, weight.clone()))
                # GPT-2 stores the transpose of its weights.
                sum_of_both = weight.T if layer.fan_in_fan_out else weight
                sum_of_both.addmm_(
                    layer.lora_B[adapter].weight.data,
                    layer.lora_A[adapter].weight.data,
                    alpha=layer.scaling[adapter],
                )
        with active_adapter(model, None):
            yield
    finally:
        with torch.no_grad():
            for weight, original in originals:
                weight.copy_(original)


def _adapted_layers(model: Any, adapter: str) -> list[Any]:
    """The layers of a model that an adapter changes or replaces."""
    return [
        layer
        for layer in adapter_layers(model)
        if any(adapter in getattr(layer, name, {}) for name in layer.adapter_layer_names)
    ]
