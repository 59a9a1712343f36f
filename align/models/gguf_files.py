"""GGUF files, inspected without loading the model: their metadata, and the folder they become.

A recipe may name a GGUF file where it names a model. :mod:`align.models.gguf_conversion` writes it
once into the runs folder, in Hugging Face layout. Only the header is read here, without torch and
transformers, so that ``align plan`` answers in a second. Whether a whole model can be converted is
checked by :mod:`align.models.gguf_checks`. Left out: files of version 1, and files with big-endian
numbers.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import mmap
import re
import shlex
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.errors import ArtifactError, not_installed
from align.runtime import artifacts, checksums

SUFFIX = ".gguf"
KIND = artifacts.CONVERTED
"""The kind of a converted folder in its ``artifact.json``, where stages have theirs."""
CODE_VERSION = 2
"""Part of the digest. It is raised when the same file becomes another model than before."""
TOKENS = "tokenizer.ggml.tokens"
"""Key of the vocabulary; a header has its size."""
DOWNLOAD = "download it again"
LAYOUT = "name the folder of the model in Hugging Face layout"
END_KEYS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
"""Keys of the tokens at which a policy stops: the ends of a text, of a turn, and of a message."""
_NUMBERS = "BbHhIif?"  # by type 0 to 7
_LONG_NUMBERS = {10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_ENDS = "it ends within its header"
_ALIGNMENT = 32  # bytes, unless the file has `general.alignment`
_NO_MODELS = {
    "adapter": "an adapter without its base; merge the two into one file with llama.cpp's "
    "`llama-export-lora`, or name the folder of the adapter in PEFT's layout",
    "mmproj": "a projector of images or sound, without the language model; name the GGUF file of "
    "the language model",
    "imatrix": "an importance matrix for quantization, without a model; name the GGUF file of the "
    "model",
}
"""Files without a model of their own by their ``general.type``, with the repair."""
_PART = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf", re.IGNORECASE)
"""Names of the parts of a model, as llama.cpp writes them."""


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
        """Tokens at which a policy stops, the end of a text first; as in llama.cpp, no others."""
        values = [self.metadata[key] for key in END_KEYS if key in self.metadata]
        known = range(self.vocabulary)
        return list(dict.fromkeys(v for v in values if isinstance(v, int) and v in known))

    @property
    def vocabulary(self) -> int:
        """Number of tokens; 0 if the file has no tokenizer."""
        value = self.metadata.get(TOKENS)
        return value if isinstance(value, int) and value > 0 else 0

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


NOT_INSTALLED = not_installed("gguf", "-e '.[gguf]'")


def check_named(target: str) -> None:
    """Check that a model which is named like a GGUF file is one, or a folder.

    Raises:
        ArtifactError: There is neither.
    """
    path = Path(target).expanduser()
    if target.lower().endswith(SUFFIX) and not path.is_dir() and not path.is_file():
        raise ArtifactError(f"{target}: no such file; name a GGUF file that exists")


def is_installed() -> bool:
    """Whether the package that reads the weights of GGUF files is installed."""
    return importlib.util.find_spec("gguf") is not None


def digest(file: Path) -> str:
    """The digest of the model that a file becomes: of its content, not of its name."""
    return artifacts.digest({"gguf": checksums.digest_once(file), "code_version": CODE_VERSION})


def converted_folder(file: Path, runs: Path) -> Path:
    """The folder in ``runs`` that contains the converted model, or will."""
    return runs / f"{KIND}-{digest(file)[:12]}"


def read_header(file: Path) -> GgufHeader:
    """The header of a GGUF file with a whole model.

    Raises:
        ArtifactError: The file cannot be read, is damaged or truncated, is no GGUF file or a part
            of one, or contains no language model.
    """
    try:
        if not file.stat().st_size:
            raise _UnfitError(f"an empty file; {DOWNLOAD}")
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as data:
            if data[:4] != b"GGUF":
                raise _UnfitError("not a GGUF file; name a GGUF file, or a model folder")
            header = _Reader(data).header()
            _check_whole_model(file, header)
            return header
    except OSError as error:
        reason = error.strerror or str(error)
        raise ArtifactError(f"{file}: cannot be read: {reason}; name another file") from None
    except _BigEndianError:
        repair = f"convert it with `gguf-convert-endian {shlex.quote(str(file))} little`"
        raise ArtifactError(f"{file}: its numbers are big-endian; {repair}") from None
    except _UnfitError as error:
        raise ArtifactError(f"{file}: {error}") from None
    except struct.error:
        raise ArtifactError(f"{file}: damaged or truncated ({_ENDS}); {DOWNLOAD}") from None
    except UnicodeDecodeError:
        reason = "a text in its header is not UTF-8"
        raise ArtifactError(f"{file}: damaged ({reason}); {DOWNLOAD}") from None
    except RecursionError:
        reason = "lists within lists in its header"
        raise ArtifactError(f"{file}: damaged ({reason}); {DOWNLOAD}") from None
    except ValueError as error:
        raise ArtifactError(f"{file}: damaged or truncated ({error}); {DOWNLOAD}") from None


class _UnfitError(ValueError):
    """What is wrong with a file, with the repair."""


class _BigEndianError(ValueError):
    """The numbers of the file are big-endian."""


def _check_whole_model(file: Path, header: GgufHeader) -> None:
    """Check that a file contains one model with all of its parts.

    Raises:
        _UnfitError: It does not.
    """
    parts, kind = header.metadata.get("split.count"), header.metadata.get("general.type", "model")
    if isinstance(parts, int) and parts > 1:
        name = _PART.fullmatch(file.name)
        first = file.with_name(f"{name[1]}-00001-of-{name[2]}.gguf") if name else "FIRST_PART"
        number = header.metadata.get("split.no")
        which = f"part {number + 1}" if isinstance(number, int) else "one part"
        raise _UnfitError(
            f"{which} of {parts} of a model; merge them with llama.cpp's `llama-gguf-split --merge "
            f"{shlex.quote(str(first))} MERGED.gguf` and name that file, or {LAYOUT}"
        )
    if kind in _NO_MODELS:
        raise _UnfitError(_NO_MODELS[kind])
    if kind != "model":
        raise _UnfitError(
            f"its general.type is {kind!r:.60}, expected 'model'; name the GGUF file of a model"
        )
    if not header.tensors:
        raise _UnfitError("no weights, only metadata; name the GGUF file of the whole model")
    if not header.architecture:
        raise _UnfitError(f"no general.architecture, so its model is unknown; {LAYOUT}")


class _Reader:
    """Reads the parts of a file in their order."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._position = 4  # behind the magic number

    def header(self) -> GgufHeader:
        version = self._number("I")
        if version in (2 << 24, 3 << 24):
            raise _BigEndianError
        if version == 1:
            raise _UnfitError(
                "of version 1 of the format, which is not read; download a newer file"
            )
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
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"its general.alignment is {alignment!r:.40}")
        expected = -(-self._position // alignment) * alignment + max(ends)
        if len(self._data) < expected:
            raise ValueError(f"{len(self._data):,} bytes, expected {expected:,}")
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
            raise ValueError(_ENDS)
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
