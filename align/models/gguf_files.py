"""GGUF files, inspected without loading the model: their metadata, and the folder they become.

A recipe may name a GGUF file where it names a model. :mod:`align.models.gguf_conversion` writes it
once into the runs folder, in Hugging Face layout. Only the header is read here, without torch and
transformers, so that ``align plan`` answers in a second. Left out: files of version 1, and files
with big-endian numbers.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.errors import ArtifactError
from align.runtime import artifacts, checksums

SUFFIX = ".gguf"
KIND = "gguf"
"""The kind of a converted folder in its ``artifact.json``, where stages have theirs."""
CODE_VERSION = 2
"""Part of the digest. It is raised when the same file becomes another model than before."""
DOWNLOAD = "download it again"
END_KEYS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
"""Keys of the tokens at which a policy stops: the ends of a text, of a turn, and of a message."""
_GPT2_SPLITS = {
    *("gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone4", "trillion", "granite-docling"),
    *("gigachat", "a.x-4.0", "mellum", "modern-bert", "roberta-bpe", "jina-es", "jina-de"),
    *("jina-v1-en", "jina-v2-es", "jina-v2-de", "jina-v2-code"),
}
"""Values of ``tokenizer.ggml.pre`` for which llama.cpp splits text as GPT-2 does."""
_DIGIT_SPLITS = {
    *("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
}
"""Values for which it takes single digits out first: no token of such models has two digits.

Only several spaces before a digit are split otherwise than in the original.
"""
_NUMBERS = "BbHhIif?"  # by type 0 to 7
_LONG_NUMBERS = {10: "Q", 11: "q", 12: "d"}
_PRE = "tokenizer.ggml.pre"
_TEXT, _ARRAY = 8, 9
_ALIGNMENT = 32  # bytes, unless the file has `general.alignment`


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What the header of a GGUF file contains."""

    metadata: Mapping[str, Any]
    """Numbers and texts by key; of an array, its length."""
    tensors: Mapping[str, tuple[int, ...]]
    """The shape of each tensor by its name."""

    @property
    def architecture(self) -> str:
        """The architecture as llama.cpp calls it."""
        return str(self.metadata.get("general.architecture", ""))

    @property
    def ends(self) -> list[int]:
        """Tokens at which a policy stops, the end of a text first."""
        values = [self.metadata[key] for key in END_KEYS if key in self.metadata]
        return list(dict.fromkeys(value for value in values if isinstance(value, int)))

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(map(math.prod, self.tensors.values()))

    @property
    def positions(self) -> int | None:
        """Longest sequence in tokens; None if the file does not contain it."""
        value = self.metadata.get(f"{self.architecture}.context_length")
        return value if isinstance(value, int) and value > 0 else None


def is_gguf(target: Path | str) -> bool:
    """Whether the value of a key names a GGUF file that exists."""
    return str(target).lower().endswith(SUFFIX) and Path(target).expanduser().is_file()


def is_installed() -> bool:
    """Whether the package that reads the weights of GGUF files is installed."""
    return importlib.util.find_spec("gguf") is not None


def digest(file: Path) -> str:
    """The digest of the model that a file becomes: of its content, not of its name."""
    return artifacts.digest({"gguf": checksums.digest_once(file), "code_version": CODE_VERSION})


def converted_folder(file: Path, runs: Path) -> Path:
    """The folder in ``runs`` that contains the converted model, or will."""
    return runs / f"{KIND}-{digest(file)[:12]}"


def check_convertible(file: Path) -> None:
    """Check all that can be known of a file before it is converted.

    Raises:
        ArtifactError: It is no GGUF file, damaged, not supported, or the package is not installed.
    """
    header = read_header(file)
    if not is_installed():
        raise ArtifactError(
            f"{file}: the package gguf, which reads it, is not installed: "
            "pip install 'align-llm[gguf]'"
        )
    supported = _supported_architectures()
    if supported and _plain(header.architecture) not in supported:
        raise ArtifactError(
            f"{file}: transformers does not read GGUF files of the architecture "
            f"{header.architecture!r:.80}; name the folder of the model in Hugging Face layout"
        )
    if not _splits_text(header):
        raise ArtifactError(
            f"{file}: transformers does not know how its tokenizer splits text "
            f"(tokenizer.ggml.pre = {header.metadata[_PRE]!r:.60}), and would split it as GPT-2; "
            "name the folder of the model in Hugging Face layout"
        )
    if scaling := _rope_scaling(header):
        raise ArtifactError(
            f"{file}: its rotary embeddings are scaled ({scaling}), which transformers does not "
            "read from GGUF files; name the folder of the model in Hugging Face layout"
        )


def read_header(file: Path) -> GgufHeader:
    """The header of a GGUF file.

    Raises:
        ArtifactError: The file cannot be read, is no GGUF file, or is damaged or truncated.
    """
    try:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as data:
            if data[:4] == b"GGUF":
                return _Reader(data).header()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ArtifactError(f"{file}: cannot be read: {reason}; name another file") from None
    except (ValueError, struct.error, RecursionError) as error:
        reason = "" if isinstance(error, struct.error) else f" ({error})"
        raise ArtifactError(f"{file}: damaged or truncated{reason}; {DOWNLOAD}") from None
    raise ArtifactError(f"{file}: not a GGUF file; name a GGUF file, or a model folder")


class _Reader:
    """Reads the parts of a file in their order."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._position = 4  # behind the magic number

    def header(self) -> GgufHeader:
        version = self._number("I")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}, expected 2 or 3")
        n_tensors, n_values = self._number("Q"), self._number("Q")
        metadata = {self._text(): self._value(self._number("I")) for _ in range(n_values)}
        tensors, ends = {}, [0]
        for _ in range(n_tensors):
            name = self._text()
            shape = tuple(self._number("Q") for _ in range(self._number("I")))
            kind, offset = self._number("I"), self._number("Q")
            tensors[name] = shape
            ends.append(offset + _tensor_bytes(kind, math.prod(shape)))
        alignment = int(metadata.get("general.alignment", _ALIGNMENT)) or _ALIGNMENT
        expected = -(-self._position // alignment) * alignment + max(ends)
        if len(self._data) < expected:
            raise ValueError(f"{len(self._data):,} bytes, expected {expected:,}")
        if not tensors or not metadata.get("general.architecture"):
            raise ValueError("it contains no model")
        return GgufHeader(metadata, tensors)

    def _number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self._data, self._position)
        self._position += struct.calcsize(f"<{code}")
        return value

    def _text(self) -> str:
        return self._bytes(self._number("Q")).decode()

    def _bytes(self, size: int) -> bytes:
        start = self._position
        if size > len(self._data) - start:
            raise ValueError("it ends within its header")
        self._position += size
        return self._data[start : self._position]

    def _value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self._text()
        if kind != _ARRAY:
            return self._number(_number_code(kind))
        kind, count = self._number("I"), self._number("Q")
        if kind in (_TEXT, _ARRAY):
            for _ in range(count):
                self._bytes(self._number("Q")) if kind == _TEXT else self._value(kind)
        else:
            self._bytes(count * struct.calcsize(f"<{_number_code(kind)}"))
        return count


def _number_code(kind: int) -> str:
    code = _NUMBERS[kind] if kind < len(_NUMBERS) else _LONG_NUMBERS.get(kind)
    if code is None:
        raise ValueError(f"unknown type {kind}")
    return code


def _tensor_bytes(kind: int, values: int) -> int:
    """The size of a tensor; 1 for a type that the installed package does not know."""
    per_block, size = _block_sizes().get(kind, (values, 1))
    return values // per_block * size if values else 0


@functools.cache
def _block_sizes() -> dict[int, tuple[int, int]]:
    """Values and bytes of a block by the type of a tensor; empty without the package."""
    if not is_installed():
        return {}
    import gguf

    return {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}


def _supported_architectures() -> set[str]:
    """The architectures that transformers reads; empty if they are not listed where expected."""
    try:
        from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
    except ImportError:
        return set()
    try:
        from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
    except ImportError:
        return {_plain(name) for name in GGUF_CONFIG_MAPPING}
    return {_plain(name) for name in (*GGUF_CONFIG_MAPPING, *GGUF_CONFIG_ARCHS)}


def _splits_text(header: GgufHeader) -> bool:
    """Whether the converted tokenizer splits text into words as the one of the file.

    llama.cpp reads the name of the split for byte-level vocabularies (``gpt2``) only. Without a
    name, or with ``default``, the file does not contain how its text was split.
    """
    split = str(header.metadata.get(_PRE, "default"))
    if header.metadata.get("tokenizer.ggml.model") != "gpt2" or split == "default":
        return True
    if split in _GPT2_SPLITS | _DIGIT_SPLITS:
        return True
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:  # not listed where expected
        return True
    return split in GGUF_PRE_TOKENIZER_SPLITS


def _plain(architecture: str) -> str:
    """The name of an architecture, spelled as llama.cpp and transformers both would."""
    return architecture.lower().replace("-", "").replace("_", "")


def _rope_scaling(header: GgufHeader) -> str:
    """Tensor or key that scales rotary embeddings, for which transformers has no place; or none."""
    tensor = next((name for name in header.tensors if name.startswith("rope_f")), "")
    key = f"{header.architecture}.rope.scaling.type"
    reads_keys = _plain(header.architecture) == "gptoss"
    if tensor or reads_keys or header.metadata.get(key, "none") == "none":
        return tensor
    return f"{key} = {header.metadata[key]}"
