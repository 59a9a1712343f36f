"""The plan of a recipe: the digest and the folder of each stage, and whether it is finished.

A digest covers the settings of a stage, the digests of its inputs, the content of the files that it
names, and the code version of the stage. It does not cover the number of processes: that is stored
in the artifact, and logged if an artifact of another number is reused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from align.config.base import Stage
from align.config.recipe import ErrorCollector, Recipe
from align.config.stages import accepted_kinds, stage_kind
from align.data.sources import source_files
from align.errors import ArtifactError, RecipeError, nearest
from align.models.files import check_model_folder
from align.rewards import functions
from align.runtime import artifacts, checkpoints


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """A stage with its configuration, its inputs and its folder."""

    name: str
    config: Stage
    digest: str
    folder: Path
    inputs: dict[str, Path | str]
    """The folder or Hub id of each input, by its key."""
    digests: dict[str, str]
    """The digests of the inputs, and of the files that the settings name, by their keys."""
    status: str
    """``reused``, ``resume`` or ``run``."""

    @property
    def stage(self) -> str:
        """The kind of stage."""
        return stage_kind(self.config)


def plan(
    recipe: Recipe, runs: Path, *, until: str | None = None, force: str | None = None
) -> list[PlannedStage]:
    """Plan the stages of a recipe, in order and up to ``until``. Nothing is started or written.

    ``force`` names a stage, or ``all``, that runs even if it is finished.

    Raises:
        UserError: An option names no stage, or an input from outside the recipe is missing or
            unfinished.
    """
    for option, value, others in (("--until", until, []), ("--force", force, ["all"])):
        if value is not None and value not in [*recipe.stages, *others]:
            hint = nearest(value, [*recipe.stages, *others])
            raise RecipeError(f"{option} {value}: no such stage{hint}")
    planned: dict[str, PlannedStage] = {}
    errors = ErrorCollector(recipe)
    for name, config in recipe.stages.items():
        inputs, digests = _resolve_inputs(name, config, planned, errors)
        digests |= _file_digests(name, config, errors)
        digest = stage_digest(config, digests)
        folder = runs / f"{name}-{digest[:12]}"
        status = "run" if force in ("all", name) else _status(folder)
        planned[name] = PlannedStage(name, config, digest, folder, inputs, digests, status)
        if name == until:
            break
    errors.raise_any()
    return list(planned.values())


def stage_digest(config: Stage, inputs: Mapping[str, str]) -> str:
    """The digest of a stage from its settings and the digests of its inputs.

    The names of the inputs of a training stage are not part of it. Those of ``sample``, ``label``
    and ``evaluate`` are, because their results are labeled with them.
    """
    return artifacts.digest(
        {
            "stage": stage_kind(config),
            "code_version": config.code_version,
            "settings": config.digest_settings(),
            "inputs": dict(inputs),
        }
    )


def _status(folder: Path) -> str:
    if artifacts.read_artifact(folder) is not None:
        return "reused"
    return "resume" if checkpoints.list_checkpoints(folder) else "run"


def _resolve_inputs(
    name: str, config: Stage, planned: Mapping[str, PlannedStage], errors: ErrorCollector
) -> tuple[dict[str, Path | str], dict[str, str]]:
    """The folder or Hub id of each input, and its digest."""
    inputs: dict[str, Path | str] = {}
    digests: dict[str, str] = {}
    for key, target in config.input_names().items():
        if target in planned:
            inputs[key], digests[key] = planned[target].folder, planned[target].digest
            continue
        with errors.at(name, *key.split(".")):
            inputs[key], digests[key] = _external_input(key, target, config)
    return inputs, digests


def _external_input(key: str, target: str, config: Stage) -> tuple[Path | str, str]:
    """An input that is not a stage of the recipe: a finished folder, a model folder or a Hub id."""
    folder = Path(target).expanduser()
    if not folder.is_dir():
        revision = getattr(config, "revision", None) if key == "model" else None
        return target, f"hub:{target}@{revision or 'main'}"
    artifact = artifacts.read_artifact(folder)
    expected = config.inputs[key.split(".")[0]]
    if artifact is not None:
        accepted = accepted_kinds(expected)
        if artifact.stage not in accepted:
            kinds = " or ".join(accepted)
            raise ArtifactError(
                f"{folder} is a finished `{artifact.stage}` stage; expected {kinds}"
            )
    elif not expected.models or (folder / artifacts.WORKING).exists():
        raise ArtifactError(
            f"{folder}: no {artifacts.FILE}, so its stage is not finished; run its recipe again"
        )
    else:
        check_model_folder(folder)
    return folder, artifacts.digest_folder(folder)


def _file_digests(name: str, config: Stage, errors: ErrorCollector) -> dict[str, str]:
    """Digests of external data (of a Hub id, its revision) and of files in the settings."""
    digests: dict[str, str] = {}
    for source in config.external_sources():
        with errors.at(name, source.key.partition(".")[0]):
            files = source_files(source.name, split=source.split)
            hub = f"hub:{source.name}@{source.revision or 'main'}"
            digests[source.key] = artifacts.digest_files(files) if files else hub
    for key, value in config.named_paths().items():
        path = Path(value)
        if path.is_file():
            digests[key] = artifacts.digest_files([path])
        elif path.is_dir():
            digests[key] = artifacts.digest_folder(path)
    for function in config.reward_functions.values():
        digest = functions.source_digest(function)
        if digest is not None:
            digests[function] = digest
    return digests
