"""Finished stages by their names, for the commands that use a trained policy."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from align.config.base import Input
from align.config.stages import accepted_kinds
from align.errors import ArtifactError, nearest, printable
from align.models import files, gguf_checks, gguf_conversion, gguf_files, tokenizer_files
from align.models.model_config import Role
from align.runtime import artifacts, hub

CONTROL_RECIPE = "recipes/control/cartpole_ppo.yaml"
POLICY_RECIPE = "recipes/sft.yaml"


def find_policy(policy: str, runs: Path) -> Path | str:
    """The folder of a policy: a folder, or the newest finished stage of that name; else a Hub id.

    A GGUF file is converted into ``runs``, once, if it has a chat template.

    Raises:
        UserError: The folder has no model or a damaged one, no finished stage in ``runs`` has this
            name, the model is not cached and the Hub cannot be reached, or a GGUF file is
            missing, has no chat template or cannot be converted.
    """
    folder = Path(policy).expanduser()
    if folder.is_dir():
        artifacts.check_folder(folder)
        files.check_model_folder(folder)
        tokenizer_files.check_vocabulary(folder)
        return folder
    if gguf_files.is_gguf(folder):
        gguf_checks.check_template(folder)
        return gguf_conversion.converted(folder, runs, _announce)
    gguf_files.check_named(policy)
    if "/" in policy:
        hub.check_model(policy)
        return policy
    return newest_run(policy, runs, accepted_kinds(Input(policies=True)), recipe=POLICY_RECIPE)


def find_model(model: str, runs: Path) -> tuple[Path, Role]:
    """The folder of a policy or a reward model, and which of them it is.

    ``model`` is a folder, or the name of the newest finished stage that trains a model.

    Raises:
        UserError: As :func:`find_policy`.
    """
    folder = Path(model).expanduser()
    gguf_files.check_named(model)
    if not folder.is_dir():
        kinds = (*accepted_kinds(Input(policies=True)), *accepted_kinds(Input(("reward",))))
        folder = newest_run(model, runs, kinds, recipe=POLICY_RECIPE)
    artifacts.check_folder(folder)
    role = files.role(folder)
    files.check_model_folder(folder, role)
    tokenizer_files.check_vocabulary(folder)
    return folder, role


def find_control_policy(policy: str, runs: Path) -> Path:
    """The folder of the policies of a ``control`` stage, or of the newest of that name.

    Raises:
        UserError: The folder has no policy, or no finished stage in ``runs`` has this name.
    """
    folder = Path(policy).expanduser()
    if not folder.is_dir():
        return newest_run(policy, runs, ("control",), recipe=CONTROL_RECIPE)
    if not (folder / "policy.json").is_file():
        raise ArtifactError(f"{folder}: no policy.json; name a `control` stage, or its folder")
    artifacts.check_folder(folder)
    return folder


def newest_run(name: str, runs: Path, kinds: Sequence[str], *, recipe: str) -> Path:
    """The folder of the newest finished stage called ``name``, of one of these kinds.

    ``recipe`` is suggested if there is no finished stage at all.

    Raises:
        ArtifactError: No finished stage has this name, or its newest folder is damaged.
    """
    names: set[str] = set()
    matching: list[tuple[tuple[float, float], Path]] = []
    unfinished, other_kind = False, ""
    for folder in runs.glob("*-????????????"):
        is_called_so = folder.name.rpartition("-")[0] == name
        try:
            artifact = artifacts.read_artifact(folder)
        except ArtifactError:
            # It counts as the newest of its name, so that an older one is not used instead.
            matching += [((math.inf, 0.0), folder)] * is_called_so
            continue
        unfinished |= artifact is None and is_called_so
        if artifact is not None and artifact.stage in kinds:
            names.add(artifact.name)
            if artifact.name == name:
                matching.append((artifacts.finish_order(folder, artifact), folder))
        elif artifact is not None and artifact.name == name:
            other_kind = f"; the stage `{name}` is of kind `{artifact.stage}`"
    if matching:
        _, newest = max(matching)
        artifacts.check_folder(newest)
        return newest
    hint = nearest(name, sorted(names)) if names else f"; run a recipe first, such as {recipe}"
    raise ArtifactError(
        f"{runs}: no finished policy `{name}`{' (it is not finished yet)' if unfinished else ''}"
        f"{other_kind}{hint}"
    )


def _announce(line: str) -> None:
    print(printable(line), file=sys.stderr)
