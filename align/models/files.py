"""Inspection of a model folder without loading the model: missing, truncated and malformed files.

Loads neither torch nor transformers, so that ``align plan`` answers in a second.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.errors import ArtifactError
from align.models.model_config import (
    Role,
    adapter_problem,
    config_problems,
    other_head,
)
from align.runtime import artifacts, checksums

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
FINGERPRINT = "sha256:"
"""Prefix of the ``revision`` of an adapter whose base is a folder: a digest of the base."""


@dataclass(frozen=True, slots=True)
class AdapterBase:
    """The model that an adapter was trained on."""

    source: str
    """A folder or a Hub id."""
    revision: str | None
    """Commit on the Hub, or the fingerprint of a folder; None if the adapter does not store it."""

    @property
    def hub_revision(self) -> str | None:
        """The commit on the Hub to load the base at; None for a folder."""
        return None if self.revision and self.revision.startswith(FINGERPRINT) else self.revision

    def check_unchanged(self, adapter: Path | str) -> None:
        """Check that the base is still the one that the adapter was trained on.

        Raises:
            ArtifactError: The files of the base have changed.
        """
        if self.revision is None or not self.revision.startswith(FINGERPRINT):
            return
        if Path(self.source).is_dir() and fingerprint(Path(self.source)) != self.revision:
            raise ArtifactError(
                f"{adapter}: its base model {self.source} has changed since the adapter was "
                "trained; restore the base, or train the adapter again"
            )


def read_adapter_base(file: Path, adapter: Path | str) -> AdapterBase:
    """The base in an ``adapter_config.json`` that belongs to the folder or Hub id ``adapter``.

    A folder of runs may have been moved, so a missing base is also searched beside the adapter.

    Raises:
        ArtifactError: The file is malformed, or names no base, a missing one or an adapter.
    """
    problems = _json_problems(file)
    if problems:
        raise ArtifactError(*problems)
    config = _read_json(file)
    key = "`base_model_name_or_path`"
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if base is None or base == "":
        raise ArtifactError(f"{file}: no {key}, so the base model is unknown; add it")
    if not isinstance(base, str) or not isinstance(revision, str | None):
        wrong = key if not isinstance(base, str) else "`revision`"
        raise ArtifactError(f"{file}: {wrong} must be text; set it to that of the base model")
    folder = Path(base)
    if folder.is_absolute() and not folder.is_dir():
        folder = Path(adapter).resolve().parent / folder.name
        if not folder.is_dir():
            is_gguf = folder.name.rpartition("-")[0] == artifacts.CONVERTED
            command = f"align export FILE.gguf {shlex.quote(str(folder))}"
            again = f"write it again from its GGUF file, `{command}`, or " if is_gguf else ""
            raise ArtifactError(
                f"{file}: the base model {base} does not exist; {again}set {key} to its folder"
            )
        base = str(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        raise ArtifactError(
            f"{file}: the base model {base} is an adapter itself; set {key} to a model with full "
            "weights"
        )
    return AdapterBase(base, revision)


def fingerprint(folder: Path) -> str:
    """Digest of the config and weights of a model folder, with the prefix ``sha256:``."""
    digest = hashlib.sha256()
    for file in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        if file.is_file():
            digest.update(f"{file.name}\n{checksums.digest_once(file)}\n".encode())
    return FINGERPRINT + digest.hexdigest()


def check_model_folder(folder: Path, role: Role = "policy") -> None:
    """Check that a folder contains a complete model in Hugging Face layout that fits its role.

    Raises:
        ArtifactError: A file is missing, malformed or truncated; one line per file.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        base = read_adapter_base(folder / ADAPTER_CONFIG, folder)
        base.check_unchanged(folder)
        other = adapter_problem(_read_json(folder / ADAPTER_CONFIG), role)
        problems = [f"{folder}: {other}"] if other else []
        weights = [folder / ADAPTER_WEIGHTS]
    elif (folder / "config.json").is_file():
        config = folder / "config.json"
        problems = _json_problems(config)
        problems = problems or config_problems(config, _read_json(config), role)
        weights = [folder / "model.safetensors"]
    else:
        raise ArtifactError(f"{folder}: {_no_model(folder)}")
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
        pickles = sorted(file.name for file in folder.glob("*.bin"))
        problems.append(
            f"{folder}: its weights are a pickle, {pickles[0]}, which may contain code and is not "
            "read; load it where you trust it, and save it with `save_pretrained`"
            if pickles
            else f"{folder}: no weights; expected {weights[0].name}{_gguf_file(folder, ', or ')}"
        )
    for file in existing:
        problems += _weight_problems(file)
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        problems.append(f"{folder}: no tokenizer; expected {_TOKENIZERS[0]}")
    if problems:
        raise ArtifactError(*problems)


def _no_model(folder: Path) -> str:
    """What a folder without a ``config.json`` is, with the repair."""
    if gguf := _gguf_file(folder, "; "):
        return f"no config.json, but GGUF files{gguf}"
    if folder.suffix.lower() == ".gguf":
        return "a folder, in which there is no model; name a GGUF file, or another folder"
    return "no config.json, so it contains no model; set a folder in Hugging Face layout"


def _gguf_file(folder: Path, before: str) -> str:
    """The repair to name the largest GGUF file in a folder; empty if there is none."""
    files = [file for file in sorted(folder.glob("*.[gG][gG][uU][fF]")) if file.is_file()]
    return f"{before}name {max(files, key=lambda f: f.stat().st_size)}" if files else ""


def role(folder: Path) -> Role:
    """Whether a model folder has a reward model or a policy, by its config; a policy if unknown."""
    for name, check in ((ADAPTER_CONFIG, adapter_problem), ("config.json", _head_problem)):
        if (folder / name).is_file() and not _json_problems(folder / name):
            config = _read_json(folder / name)
            return "reward model" if check(config, "reward model") is None else "policy"
    return "policy"


def _head_problem(config: dict[str, Any], role: Role) -> str | None:
    return other_head(config.get("architectures"), role)


def check_config(folder: Path, role: Role) -> None:
    """Check the config of a model whose weights may be elsewhere; it fits its role.

    Raises:
        ArtifactError: A value is wrong, or the model has another head than its role requires.
    """
    file = folder / "config.json"
    if file.is_file():
        problems = _json_problems(file) or config_problems(file, _read_json(file), role)
        if problems:
            raise ArtifactError(*problems)


def stored_type(folder: Path) -> str | None:
    """The type in which a folder stores quantized weights: ``nf4``, ``gptq``; None for others."""
    file = folder / "config.json"
    if not file.is_file() or _json_problems(file):
        return None
    config = _read_json(file).get("quantization_config")
    if not isinstance(config, dict):
        return None
    in_4_bits = config.get("bnb_4bit_quant_type") if config.get("load_in_4bit") else None
    return str(in_4_bits or config.get("quant_method") or "quantized")


def matches_module(target: str, names: Iterable[str]) -> bool:
    """Whether an entry of ``target_modules`` is one of these modules, or the end of its name."""
    return any(name == target or name.endswith(f".{target}") for name in names)


def module_names(folder: Path) -> set[str]:
    """Names of the modules with weights in a model folder, from the headers of its weights."""
    from safetensors import SafetensorError, safe_open

    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with contextlib.suppress(OSError, SafetensorError), safe_open(file, "numpy") as tensors:
            names |= {name.rpartition(".")[0] for name in tensors.keys()}  # noqa: SIM118
    return names


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


def _read_json(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


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


def position_limit(config: Any) -> int | None:
    """The number of positions of a loaded model, from its configuration; None without a limit."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def read_position_limit(folder: Path) -> int | None:
    """The number of positions of the model in a folder, or of the base of the adapter in it."""
    if (folder / ADAPTER_CONFIG).is_file():
        base = Path(read_adapter_base(folder / ADAPTER_CONFIG, folder).source)
        return read_position_limit(base) if base.is_dir() else None
    return read_limits(folder).positions


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits in the ``config.json`` of a model with full weights."""

    vocabulary: int = 0
    """Tokens of the vocabulary; 0 is unknown."""
    positions: int | None = None
    """Longest sequence in tokens; None is unknown."""


def read_limits(folder: Path) -> Limits:
    """The limits of the model in a folder; unknown where the config is damaged."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config |= config.get("text_config") or {}
    except (OSError, ValueError, TypeError):
        return Limits()  # the check of the folder reports it
    positions = config.get("max_position_embeddings", config.get("n_positions"))
    vocabulary, limit = _positive(config.get("vocab_size")), _positive(positions)
    return Limits(vocabulary or 0, limit)


def _positive(value: Any) -> int | None:
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return value if is_number and value > 0 else None
