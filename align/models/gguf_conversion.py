"""Conversion of a GGUF file into a model folder in Hugging Face layout, by transformers.

The weights are stored in float32, which holds the values of every quantization exactly; a stage
loads them in its ``dtype``. Tokenizer and chat template are those of the file. Left out: the 4-bit
form itself, since a quantized model cannot be trained fully.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from align.errors import ArtifactError, UserError
from align.models import gguf_card, gguf_checks, gguf_files, tokenizer_files
from align.models.gguf_files import LAYOUT
from align.models.loading import cannot_load, check_finite, check_vocabulary
from align.models.tokenizer_files import GENERATION_CONFIG
from align.runtime import artifacts, checksums, distributed
from align.runtime.locks import folder_lock

_LINK = "model.gguf"
_UNFINISHED = ".converting"
"""Folder of the files of a conversion until all of them are written."""


def converted(file: Path, runs: Path, announce: Callable[[str], None]) -> Path:
    """The folder of the converted model; an unfinished one is converted now.

    All ranks enter together. ``announce`` is called with lines on the progress.

    Raises:
        UserError: The file cannot be converted, or the converted folder is damaged.
    """
    folder = gguf_files.converted_folder(file, runs)
    with folder_lock(folder, announce):
        error: UserError | None = None
        if distributed.is_main():
            try:
                if artifacts.read_artifact(folder) is None:
                    gguf_checks.check_convertible(file)
                    announce(f"{file}: converting into {folder}")
                    _convert(file, folder, announce)
                artifacts.check_folder(folder)
            except UserError as raised:
                error = raised
        error = distributed.broadcast_from_main(error)  # so that no process waits for ever
    if error is not None:
        raise error
    return folder


@contextmanager
def tokenizer_folder(file: Path) -> Iterator[Path]:
    """A temporary folder with the tokenizer, the chat template and the end tokens of a file.

    Errors about the folder are about the file instead.

    Raises:
        UserError: The file cannot be converted, or its tokenizer cannot be read.
    """
    gguf_checks.check_convertible(file)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_tokenizer(file, folder)
        header = gguf_files.read_header(file)
        artifacts.write_json(folder / GENERATION_CONFIG, {"eos_token_id": header.ends})
        try:
            shape = header.tensors["token_embd.weight"]
            tokenizer_files.check_vocabulary(folder, embeddings=shape[-1] if shape else 0)
            with gguf_checks.naming_files({folder: file}):
                yield folder
        except UserError as error:
            raise UserError(*(line.replace(name, str(file)) for line in error.lines)) from None


def _write_tokenizer(file: Path, folder: Path) -> Any:
    """Write the tokenizer of a GGUF file and its chat template into a folder; return it.

    Raises:
        UserError: It cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        with _alone(file) as only:
            tokenizer = AutoTokenizer.from_pretrained(str(only), gguf_file=_LINK)
    except Exception as error:  # the content of a file may break transformers at any place
        raise UserError(f"{cannot_load(file, 'tokenizer', error)}; {LAYOUT}") from None
    tokenizer.save_pretrained(str(folder))
    return tokenizer


def _convert(file: Path, folder: Path, announce: Callable[[str], None]) -> None:
    """Write the model into a folder within ``folder``, and move it out of there, its artifact last.

    What an interrupted conversion has left is known by its place, so no other file is touched.

    Raises:
        UserError: The file cannot be converted, or other files are in the way.
    """
    working = folder / _UNFINISHED
    if _read_finished(working) is None:
        if not (folder / "config.json").is_file():  # no copy that may be equal
            _check_free(file, folder, [gguf_card.FILE])
        shutil.rmtree(working, ignore_errors=True)
        working.mkdir()
        try:
            _write_model(file, working, announce)
        except BaseException:
            shutil.rmtree(working, ignore_errors=True)
            raise
    _check_free(file, folder, [path.name for path in working.iterdir()])
    for path in sorted(working.iterdir(), key=lambda path: path.name == artifacts.FILE):
        path.replace(folder / path.name)
    checksums.flush(folder)
    working.rmdir()


def _read_finished(working: Path) -> artifacts.Artifact | None:
    """The artifact of a whole model that was not moved to its place yet; None without one."""
    try:
        return artifacts.read_artifact(working)
    except ArtifactError:
        return None


def _check_free(file: Path, folder: Path, names: Iterable[str]) -> None:
    """Check that ``folder`` has no files of these names, and none that would be loaded.

    Those with the content that the conversion has written count as its own: `align export` may have
    written them before.

    Raises:
        ArtifactError: One line for each other file.
    """
    finished = _read_finished(folder / _UNFINISHED)
    written = finished.files if finished is not None else {}
    found = {folder / name for name in names if os.path.lexists(folder / name)}
    found.update(artifacts.added_files(folder, ()))
    blocking = []
    for path in sorted(found):
        record = written.get(path.relative_to(folder).as_posix())
        if record is None or not path.is_file() or checksums.digest_once(path) != record["sha256"]:
            blocking.append(
                f"{path}: in the way of the conversion of {file}, which did not write it; move it "
                "away, or delete it"
            )
    if blocking:
        raise ArtifactError(*blocking)


def _write_model(file: Path, folder: Path, announce: Callable[[str], None]) -> None:
    """Write the model folder with its card, its artifact last."""
    started = time.monotonic()
    tokenizer = _write_tokenizer(file, folder)
    announce(f"{file}: tokenizer and chat template read; reading the weights")
    model = _load(file)
    announce(f"{file}: {model.num_parameters():,} parameters read; writing")
    check_finite(file, model)
    check_vocabulary(file, model, tokenizer)
    header = gguf_files.read_header(file)
    if header.ends and header.ends != [header.metadata.get(gguf_files.END_KEYS[0])]:
        # transformers reads the first key alone
        model.generation_config.eos_token_id = header.ends
    model.save_pretrained(str(folder))
    artifacts.make_readable(folder)
    digest = gguf_files.digest(file)
    artifact = artifacts.Artifact(
        stage=gguf_files.KIND,
        name=file.stem,
        digest=digest,
        recipe={
            "file": file.name,
            "license": header.metadata.get("general.license"),
            "sha256": checksums.digest_once(file),
        },
        inputs={},
        metrics={"parameters": model.num_parameters()},
        versions=artifacts.versions(),
        commit=artifacts.commit(),
        seed=None,
        world_size=1,
        seconds=round(time.monotonic() - started, 3),
        peak_memory_bytes=distributed.peak_memory_bytes(),
    )
    card = gguf_card.gguf_card(file, header, artifact, model, tokenizer)
    (folder / gguf_card.FILE).write_text(card, encoding="utf-8")
    artifacts.write_artifact(folder, artifact, runs=folder.absolute().parent.parent)


def _load(file: Path) -> Any:
    """The model of a GGUF file with dense weights.

    Raises:
        UserError: transformers cannot read it, or it lacks weights.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import GgufConfig

    try:
        with _alone(file) as only:
            model, report = AutoModelForCausalLM.from_pretrained(
                str(only),
                gguf_file=_LINK,
                quantization_config=GgufConfig(dequantize=True),  # others cannot be saved
                dtype=torch.float32,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except Exception as error:  # the content of a file may break transformers at any place
        line = cannot_load(file, "model", error)
        if "ignore_mismatched_sizes" in line:
            shapes = "its tensors have other shapes than its metadata"
            raise ArtifactError(f"{file}: {shapes}; {gguf_checks.COMPLETE}") from None
        raise UserError(f"{line}; {LAYOUT}") from None
    missing = sorted(report["missing_keys"])
    if missing:  # transformers initializes missing weights randomly and only logs it
        raise ArtifactError(
            f"{file}: {len(missing)} weights are missing, such as {missing[0]}; "
            f"{gguf_checks.COMPLETE}"
        )
    return model


@contextmanager
def _alone(file: Path) -> Iterator[Path]:
    """A folder with the file alone: transformers would read other files beside it."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / _LINK).symlink_to(file.resolve())
        yield Path(folder)
