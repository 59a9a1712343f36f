"""Checks of GGUF files before they are converted: what transformers reads, and reads right.

Only headers are read. Left out: what only the weights show, such as values that are not finite.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from align.errors import ArtifactError, UserError
from align.models import gguf_files
from align.models.chat_templates import REPAIR
from align.models.conversations import MISSING_END_REPAIR
from align.models.gguf_files import LAYOUT, TOKENS, GgufHeader
from align.models.tokenizer_files import NO_TEMPLATE

COMPLETE = f"get a complete file, or {LAYOUT}"
"""Repair of a file that lacks weights: the same download lacks them again."""
NEW_TEMPLATE = "gguf-new-metadata --chat-template-file FILE.jinja"
"""Command that copies a GGUF file with another chat template; the two files follow."""
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
_PRE = "tokenizer.ggml.pre"
_TOKEN_KEYS = tuple(
    f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "unknown", "padding")
)
"""Keys of the tokens that transformers looks up in the vocabulary."""
_EQUAL_BLOCKS = {
    *("llama", "mistral", "gemma2", "gemma3", "phi3", "qwen2", "qwen2moe", "qwen3", "qwen3moe"),
    *("gptoss", "gpt2", "falcon", "bloom", "nemotron", "stablelm", "starcoder2", "mamba"),
}
"""Architectures whose blocks all have the same tensors.

Those of others differ: mixtures with dense first layers, blocks of attention and of convolution
(LFM2) or linear attention (Qwen 3.5), blocks without attention (Deci), keys that several blocks
share (Gemma 4), and blocks for several tokens at once, which a file may leave out.
"""


def check_convertible(file: Path) -> None:
    """Check all that can be known of a file before it is converted.

    Raises:
        ArtifactError: It is no GGUF file with a whole model, damaged, not supported, or the package
            is not installed.
    """
    header = gguf_files.read_header(file)
    if not gguf_files.is_installed():
        raise ArtifactError(f"{file}: {gguf_files.NOT_INSTALLED}")
    supported = _supported_architectures()
    if supported and _plain(header.architecture) not in supported:
        raise ArtifactError(
            f"{file}: transformers does not read GGUF files of the architecture "
            f"{header.architecture!r:.80}; {LAYOUT}"
        )
    _check_tokenizer(file, header)
    if scaling := _rope_scaling(header):
        raise ArtifactError(
            f"{file}: its rotary embeddings are scaled ({scaling}), which transformers does not "
            f"read from GGUF files; {LAYOUT}"
        )
    missing = [*_missing_keys(header), *missing_tensors(header)]
    if missing:
        more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        raise ArtifactError(
            f"{file}: incomplete: without {missing[0]}{more}, which its architecture "
            f"{header.architecture!r:.80} has; {COMPLETE}"
        )


def has_template(header: GgufHeader) -> bool:
    """Whether a file has a chat template."""
    return bool(header.metadata.get("tokenizer.chat_template"))


def no_template(file: Path) -> str:
    """The error about a file without a chat template, where one is needed."""
    return (
        f"{file}: no chat template (tokenizer.chat_template); write a file with one, "
        f"`{NEW_TEMPLATE} {shlex.quote(str(file))} NEW.gguf`, or train it in an `sft` stage with "
        "`trainer: {chat_template_path: FOLDER_OR_HUB_ID_OR_JINJA_FILE}`"
    )


def check_template(file: Path) -> None:
    """Check that a file has a chat template.

    Raises:
        ArtifactError: It has none, or is no GGUF file with a whole model.
    """
    if not has_template(gguf_files.read_header(file)):
        raise ArtifactError(no_template(file))


@contextmanager
def naming_files(files: Mapping[Path, Path]) -> Iterator[None]:
    """Errors about folders with the tokenizers of GGUF files name the files and a repair of them.

    ``files`` are the GGUF files by their folders. A converted folder must not be edited: its files
    have checksums, and its place is that of the content of the file.
    """
    try:
        yield
    except UserError as error:
        lines = list(error.lines)
        for folder, file in files.items():
            lines = [_about_file(line, folder, file) for line in lines]
        raise type(error)(*lines) from None


def _about_file(line: str, folder: Path, file: Path) -> str:
    """A line about the tokenizer in a folder as one about a GGUF file; other lines as they are."""
    line = line.replace(f"{folder}: ", f"{file}: ")
    if f"{file}: " not in line:
        return line
    if f"{file}: {NO_TEMPLATE}" in line:
        return no_template(file)
    copy = f"{shlex.quote(str(file))} NEW.gguf"
    repair = (
        "set another template in the `sft` stage, `trainer: {chat_template_path: FILE.jinja}`, or "
        f"write a file with a corrected one: `{NEW_TEMPLATE} {copy}`"
    )
    end_repair = (
        "set `trainer: {eos_token: TOKEN}` in the `sft` stage to the token that ends a turn, or "
        f"write a file with it: `gguf-new-metadata --special-token eos TOKEN {copy}`, or set "
        "`allow_missing_end_token: true`"
    )
    return line.replace(REPAIR, repair).replace(MISSING_END_REPAIR, end_repair)


def _check_tokenizer(file: Path, header: GgufHeader) -> None:
    """Check that a file has a tokenizer, which splits text as the converted one would.

    Raises:
        ArtifactError: It has none, an incomplete one, a special token that is not in its
            vocabulary, or its split of text into words is not known.
    """
    size = header.vocabulary
    if not size:
        raise ArtifactError(
            f"{file}: no tokenizer ({TOKENS}); convert the model again with its tokenizer, or "
            f"{LAYOUT}"
        )
    lacking = _missing_tokenizer_key(header)
    if lacking:
        raise ArtifactError(
            f"{file}: its tokenizer is incomplete: without {lacking}; convert the model again with "
            f"its tokenizer, or {LAYOUT}"
        )
    for key in _TOKEN_KEYS:
        token = header.metadata.get(key, 0)
        if not isinstance(token, int) or not 0 <= token < size:
            raise ArtifactError(
                f"{file}: its {key} is {token!r:.40}, but its vocabulary has the ids 0 to "
                f"{size - 1}; set the right one with "
                f"`gguf-set-metadata {shlex.quote(str(file))} {key} ID`"
            )
    if not _splits_text(header):
        raise ArtifactError(
            f"{file}: transformers does not know how its tokenizer splits text "
            f"(tokenizer.ggml.pre = {header.metadata[_PRE]!r:.60}), and would split it as GPT-2; "
            f"{LAYOUT}"
        )


def _missing_tokenizer_key(header: GgufHeader) -> str | None:
    """A key without which transformers reads no tokenizer, or one that splits special tokens."""
    keys = [f"tokenizer.ggml.{name}" for name in ("model", "scores", "merges", "token_type")]
    model, scores, merges, types = (header.metadata.get(key) for key in keys)
    if not model:
        return keys[0]
    if not scores and (model == "t5" or not merges):
        return keys[2] if model == "gpt2" else keys[1]
    return keys[3] if has_template(header) and not types else None


def _missing_keys(header: GgufHeader) -> list[str]:
    """Keys that llama.cpp requires too, and for which transformers would use its own defaults."""
    keys = ["context_length", "embedding_length", "block_count"]
    norms = ["attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"]
    prefix, plain = header.architecture, _plain(header.architecture)
    if plain in _EQUAL_BLOCKS:
        keys += ["attention.head_count"] if plain != "mamba" else []
        keys += (
            norms[:1] if not any(f"{prefix}.{norm}" in header.metadata for norm in norms) else []
        )
    return [f"{prefix}.{key}" for key in keys if f"{prefix}.{key}" not in header.metadata]


def missing_tensors(header: GgufHeader) -> list[str]:
    """Names of tensors without which a model of the file's architecture is incomplete.

    Where all blocks are equal, a block needs what at least half of them have. A tensor that all of
    them lack is found when the weights are read.
    """
    missing = [name for name in ("token_embd.weight",) if name not in header.tensors]
    n_blocks = header.metadata.get(f"{header.architecture}.block_count")
    if _plain(header.architecture) not in _EQUAL_BLOCKS or not isinstance(n_blocks, int):
        return missing
    blocks: defaultdict[int, set[str]] = defaultdict(set)
    for tensor in header.tensors:
        place = re.fullmatch(r"blk\.(\d{1,9})\.(.+)", tensor)
        if place and int(place[1]) < n_blocks:
            blocks[int(place[1])].add(place[2])
    counts = Counter(name for names in blocks.values() for name in names)
    needed = {name for name, count in counts.items() if 2 * count >= len(blocks)}
    absent = next((i for i in range(n_blocks) if i not in blocks), None)
    if absent is not None:
        missing.append(f"all tensors of the block blk.{absent}")
    for block in sorted(blocks):
        missing += [f"blk.{block}.{name}" for name in sorted(needed - blocks[block])]
    return missing


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
