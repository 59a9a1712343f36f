"""Inspection of a model folder without loading the model: missing, truncated and malformed files.

Loads neither torch nor transformers, so that ``align plan`` answers in a second.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from align.errors import ArtifactError

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_INDEX = "model.safetensors.index.json"


def check_model_folder(folder: Path) -> None:
    """Check that a folder contains a complete model in Hugging Face layout.

    Raises:
        ArtifactError: A file is missing, malformed or truncated; one line per file.
    """
    if (folder / "adapter_config.json").is_file():
        problems = _json_problems(folder / "adapter_config.json")
        weights = [folder / "adapter_model.safetensors", folder / "adapter_model.bin"]
    elif (folder / "config.json").is_file():
        problems = _json_problems(folder / "config.json")
        weights = [folder / "model.safetensors", folder / "pytorch_model.bin"]
    else:
        raise ArtifactError(
            f"{folder}: no config.json, so it contains no model; set a folder in Hugging Face "
            "layout"
        )
    if (folder / _INDEX).is_file():
        problems += _json_problems(folder / _INDEX)
        if not problems:
            weights = _shards(folder / _INDEX)
            problems += [
                f"{shard}: missing, although {_INDEX} lists it; download or save the model again"
                for shard in weights
                if not shard.is_file()
            ]
    existing = [file for file in weights if file.is_file()]
    if not existing and not problems:
        problems.append(f"{folder}: no weights; expected {weights[0].name}")
    for file in existing:
        problems += _weight_problems(file) if file.suffix == ".safetensors" else []
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        problems.append(f"{folder}: no tokenizer; expected {_TOKENIZERS[0]}")
    if problems:
        raise ArtifactError(*problems)


def count_parameters(file: Path) -> int:
    """Number of values in a safetensors file, from its header.

    Raises:
        SafetensorError: The file is malformed or truncated.
    """
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as tensors:
        names = list(tensors.keys())
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in names)


def _shards(index: Path) -> list[Path]:
    """The weight files that an index lists, sorted."""
    weight_map = json.loads(index.read_text(encoding="utf-8")).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ArtifactError(f"{index}: no `weight_map`; download or save the model again")
    return [index.parent / name for name in sorted(set(map(str, weight_map.values())))]


def _json_problems(file: Path) -> list[str]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [f"{file}: cannot be read as JSON: {error}; download or save the model again"]
    return [] if isinstance(data, dict) else [f"{file}: not a JSON object; save the model again"]


def _weight_problems(file: Path) -> list[str]:
    from safetensors import SafetensorError

    try:
        count_parameters(file)
    except (OSError, SafetensorError) as error:
        return [f"{file}: malformed or truncated: {error}; download or save the model again"]
    return []
