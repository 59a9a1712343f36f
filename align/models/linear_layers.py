"""Shapes of the linear layers of a model on disk, from the headers of its files, without torch.

The output layer is left out, and so are the experts of a mixture: transformers keeps both in full
precision where it quantizes a model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from align.models.gguf_files import GgufHeader

_GGUF_NAMES = {
    **{f"attn_{letter}": f"self_attn.{letter}_proj" for letter in "qkv"},
    "attn_output": "self_attn.o_proj",
    **{f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}


def of_folder(folder: Path) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of each linear layer of a model folder, by name."""
    return _linear(_shapes(folder))


def of_gguf(header: GgufHeader) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of each linear layer of a GGUF file, by the name it is converted to."""
    layers = _linear((name, shape[::-1]) for name, shape in header.tensors.items())
    return {
        ".".join(_GGUF_NAMES.get(part, part) for part in name.split(".")): shape
        for name, shape in layers.items()
    }


def _shapes(folder: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The name and the shape of every weight of the files that are not damaged."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with contextlib.suppress(OSError, SafetensorError), safe_open(file, "numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                yield name, tuple(tensors.get_slice(name).get_shape())


def _linear(weights: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, tuple[int, int]]:
    """Those of the weights that are matrices in a numbered layer."""
    layers = {}
    for name, shape in weights:
        module, _, kind = name.rpartition(".")
        parts = module.split(".")
        in_layer = any(part.isdigit() for part in parts)
        if kind == "weight" and len(shape) == 2 and in_layer and "experts" not in parts:
            layers[module] = (shape[0], shape[1])
    return layers
