"""Write a trained model with full weights into a new folder, for programs that read no adapters.

An adapter is merged into its base. The folder has everything that a stage's folder of a full model
has, except for the record of the stage, so it may be edited and uploaded. Left out: the upload
itself, which ``hf upload`` does, and quantized formats.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from align.config.stages import STAGES
from align.errors import ArtifactError, UserError, printable
from align.models import gguf_checks, gguf_conversion, gguf_files
from align.models.model_config import Role
from align.pipeline import lookup
from align.pipeline.model_card import write_model_card
from align.runtime import artifacts


def check_target(target: Path) -> None:
    """Check that a folder can be written here.

    Raises:
        ArtifactError: It exists, or it is inside the folder of a finished stage.
    """
    if target.exists() or target.is_symlink():
        raise ArtifactError(f"{target}: exists already; name a new folder")
    for parent in target.resolve().parents:
        if (parent / artifacts.FILE).is_file():
            raise ArtifactError(
                f"{target}: inside {parent}, whose files have checksums; name a folder outside of "
                "it"
            )


@contextmanager
def model_folder(model: str, runs: Path, target: Path) -> Iterator[tuple[Path, Role, str]]:
    """The folder of a policy or a reward model, which of them it is, and its name in messages.

    A GGUF file that no run has converted is converted into a temporary folder beside ``target``.

    Raises:
        UserError: There is no such model, it is damaged, or a GGUF file cannot be converted.
    """
    if not gguf_files.is_gguf(model):
        folder, role = lookup.find_model(model, runs)
        yield folder, role, str(folder)
        return
    file = Path(model).expanduser()
    gguf_checks.check_convertible(file)
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.absolute().parent, prefix=".align-") as name:
        folder = gguf_files.converted_folder(file, runs)
        is_finished = artifacts.read_artifact(folder) is not None
        runs = runs if is_finished else Path(name)
        temporary = str(gguf_files.converted_folder(file, Path(name)))

        def announce(line: str) -> None:
            _announce(line.replace(temporary, str(target)))  # where its files are in the end

        yield gguf_conversion.converted(file, runs, announce), "policy", str(file)


def export(source: Path, role: Role, target: Path, *, dtype: str | None, name: str) -> None:
    """Write the model of a stage or a folder with full weights into the new folder ``target``.

    Messages call it ``name``.

    The weights are merged in float32 and then rounded to ``dtype``, by default that of the
    training. Rounding to bfloat16 changes the logits; the difference is printed. Of a folder that
    was converted from a GGUF file, float32 gives a copy with its model card.

    Raises:
        UserError: The model cannot be loaded, merged or written.
    """
    artifact = artifacts.read_artifact(source)
    dtype = dtype or (artifact.recipe.get("dtype") if artifact else None) or "float32"
    temporary = target.with_name(f".{target.name}.exporting")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        if artifact is not None and artifact.recipe.get("quantization"):
            _announce(
                f"{name}: trained on a base in 4 bits and merged into its full weights, so the "
                "logits differ from those in the training"
            )
        if artifact is not None and artifact.stage == artifacts.CONVERTED and dtype == "float32":
            _copy(source, artifact.files, temporary)
        else:
            _write_model(source, role, temporary, dtype, name)
        if artifact is not None and artifact.stage in STAGES:
            write_model_card(temporary, artifact, stage=source)
        artifacts.make_readable(temporary)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _announce(f"{name}: written to {target} in {dtype}")


def _copy(source: Path, names: Iterable[str], folder: Path) -> None:
    """Copy files of a folder, by their paths relative to it."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)


def _write_model(source: Path, role: Role, folder: Path, dtype: str, name: str) -> None:
    """Write weights, tokenizer, end tokens and, of a reward model, the mean of its scores."""
    import torch

    from align.models import merging, tokenization
    from align.models.loading import load_merged
    from align.rewards import reward_model

    tokenizer = tokenization.load_tokenizer(source)
    is_policy = role == "policy"
    load = load_merged if is_policy else reward_model.load_merged_reward_model
    model: Any = load(source, dtype="float32")
    if is_policy:
        _set_end_tokens(model, source)
    else:
        # A classifier of transformers reads the last token that is not this one.
        model.config.pad_token_id = tokenizer.pad_token_id
        reward_model.set_label(model.config)
    if dtype != "float32":
        before = merging.probe(model)
        model = model.to(getattr(torch, dtype))
        after = merging.probe(model)
        difference = float((after - before).norm() / before.norm())
        _announce(f"{name}: rounding to {dtype} changes the logits by {difference:.2%}")
    try:
        model.save_pretrained(str(folder))
    except ValueError as error:  # of a generation config that contradicts itself
        raise UserError(f"{name}: cannot be written: {' '.join(str(error).split())}") from None
    tokenizer.save_pretrained(str(folder))
    if not is_policy:
        tokenization.save_end_tokens(tokenizer, folder)
        if (source / reward_model.FILE).is_file():
            shutil.copy(source / reward_model.FILE, folder)


def _set_end_tokens(model: Any, source: Path) -> None:
    """Give a merged policy the generation config of its adapter, which has its end tokens."""
    from transformers import GenerationConfig

    from align.models.tokenizer_files import GENERATION_CONFIG

    if (source / GENERATION_CONFIG).is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(source))


def _announce(line: str) -> None:
    print(printable(line), file=sys.stderr)
