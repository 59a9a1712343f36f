"""What a model's folder holds, looked at without loading it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from align.errors import UserError

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def model_folder(folder: Path) -> None:
    """Make sure that a folder holds a model in Hugging Face layout, whole.

    Raises:
        UserError: A file is missing, is no JSON, or a weight file is shorter than it says itself.
    """
    problems = []
    if (folder / "adapter_config.json").is_file():
        problems += _json_problems(folder / "adapter_config.json")
        weights = [folder / "adapter_model.safetensors", folder / "adapter_model.bin"]
    elif (folder / "config.json").is_file():
        problems += _json_problems(folder / "config.json")
        weights = [folder / "model.safetensors", folder / "pytorch_model.bin"]
    else:
        raise UserError(
            f"{folder}: no config.json, so it holds no model; name a folder in Hugging Face layout"
        )
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        problems += _json_problems(index)
        if not problems:
            names = json.loads(index.read_text(encoding="utf-8")).get("weight_map")
            if not isinstance(names, dict) or not names:
                raise UserError(f"{index}: no `weight_map`; fetch or save the model again")
            shards = set(map(str, names.values()))
            problems += [
                f"{folder / s}: missing, and {index.name} names it"
                for s in sorted(shards)
                if not (folder / s).is_file()
            ]
            weights = [folder / s for s in sorted(shards)]
    found = [file for file in weights if file.is_file()]
    if not found and not problems:
        problems.append(f"{folder}: no weights; expected {weights[0].name}")
    for file in found:
        problems += _weight_problems(file) if file.suffix == ".safetensors" else []
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        problems.append(f"{folder}: no tokenizer; expected {_TOKENIZERS[0]}")
    if problems:
        raise UserError(*problems)


def _json_problems(file: Path) -> list[str]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [f"{file}: cannot be read as JSON: {error}; fetch or save the model again"]
    return [] if isinstance(data, dict) else [f"{file}: no JSON object; save the model again"]


def _weight_problems(file: Path) -> list[str]:
    try:
        end = (
            8
            + (header := weights_header(file))[0]
            + max((t["data_offsets"][1] for t in header[1].values()), default=0)
        )
    except (OSError, ValueError, KeyError, TypeError):
        return [f"{file}: not a safetensors file; fetch or save the model again"]
    size = file.stat().st_size
    if size != end:
        return [f"{file}: {size} bytes, and its header says {end}; fetch or save the model again"]
    return []


def weights_header(file: Path) -> tuple[int, dict[str, Any]]:
    """Length and content of a safetensors file's header: its tensors with types, shapes and places."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > file.stat().st_size:
            raise ValueError("longer than the file")
        tensors = json.loads(stream.read(length))
    tensors.pop("__metadata__", None)
    return length, tensors
