"""The stage of online RL that is written for another trainer, with the folders that it reads."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from pydantic import ValidationError

from align.config.online_rl import OnlineRL
from align.config.recipe import ErrorCollector, Recipe, read_recipe
from align.config.stages import ONLINE_RL, STAGES
from align.errors import ArtifactError, RecipeError, nearest
from align.models.files import ADAPTER_CONFIG
from align.pipeline.plan import PlannedStage, plan_stages
from align.runtime import artifacts

HUB = "hub:"
"""Start of the digest of a model on the Hub."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A stage of online RL, and what it reads."""

    name: str
    """Name of the stage."""
    config: OnlineRL
    origin: str
    """The recipe or the folder that the stage was read from."""
    model: Path | str
    """The folder of the initial policy, with full weights, or its Hub id."""
    prompts: Path
    """The folder of the prompts."""
    at: Callable[[str], str]
    """The place of a key, for error messages."""


def find_job(source: str, overrides: Sequence[str], stage: str | None, runs: Path) -> Job:
    """The stage of a recipe, or of the folder of a finished stage.

    ``stage`` chooses among the stages of a recipe; ``overrides`` are ``stage.key=value``.

    Raises:
        UserError: The recipe has errors or no such stage, or an input is not finished or unusable.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        job = _from_recipe(read_recipe(source, overrides), stage, runs)
    elif overrides or stage is not None:
        given = f"--stage {stage}" if stage is not None else overrides[0]
        raise RecipeError(f"{given}: no effect on a finished stage; name its recipe in its place")
    else:
        job = _from_folder(folder)
    if isinstance(job.model, Path) and (job.model / ADAPTER_CONFIG).is_file():
        raise ArtifactError(
            f"{job.at('model')}: {job.model} is an adapter; merge it with `align export "
            f"{job.model} FOLDER`, and set `{job.name}.model=FOLDER`"
        )
    return job


def _from_recipe(recipe: Recipe, stage: str | None, runs: Path) -> Job:
    errors = ErrorCollector(recipe)
    errors.raise_any()
    names = [name for name, config in recipe.stages.items() if isinstance(config, OnlineRL)]
    if stage is not None and stage not in names:
        raise RecipeError(f"--stage {stage}: no stage of online RL{nearest(stage, names)}")
    if not names:
        raise RecipeError(f"{recipe.path}: no stage of kind {', '.join(ONLINE_RL)}")
    if stage is None and len(names) > 1:
        raise RecipeError(f"{recipe.path}: choose a stage with --stage: {', '.join(names)}")
    name = stage or names[0]
    planned = {each.name: each for each in plan_stages(errors, runs, until=name)}
    errors.raise_any()
    config = cast(OnlineRL, recipe.stages[name])
    for key in ("model", "prompts"):
        _check_finished(errors, name, key, planned)
    errors.raise_any()
    inputs = planned[name].inputs
    model = inputs["model"]
    return Job(
        name=name,
        config=config,
        origin=str(recipe.path),
        model=model.resolve() if isinstance(model, Path) else model,
        prompts=Path(inputs["prompts"]),
        at=lambda key: recipe.at(name, *key.split(".")),
    )


def _check_finished(
    errors: ErrorCollector, name: str, key: str, planned: dict[str, PlannedStage]
) -> None:
    """Check that an input of the stage exists."""
    stage, target = planned[name], planned[name].config.input_names()[key]
    if target in planned and planned[target].status != "reused":
        repair = f"align run {errors.recipe.path} --until {target}"
        errors.add((name, key), f"`{target}` is not finished; run it with `{repair}`")
    elif isinstance(stage.inputs[key], Path) and stage.inputs[key] in stage.gguf_files:
        command = f"align export {shlex.quote(target)} FOLDER"
        errors.add((name, key), f"{target} is a GGUF file; `{command}` writes its model, name that")


def _from_folder(folder: Path) -> Job:
    artifact = artifacts.read_artifact(folder)
    if artifact is None or artifact.stage not in ONLINE_RL:
        kind = "no finished stage" if artifact is None else f"a `{artifact.stage}` stage"
        raise ArtifactError(
            f"{folder}: {kind}; name a recipe, or the folder of a stage of kind "
            f"{', '.join(ONLINE_RL)}"
        )
    artifacts.check_folder(folder)
    cls = STAGES[artifact.stage]
    changed = {
        key: value
        for key, value in artifact.recipe.items()
        if key in cls.model_fields and value != cls.model_fields[key].get_default()
    }
    try:
        config = cast(OnlineRL, cls.model_validate(changed))
    except ValidationError as error:
        raise ArtifactError(
            f"{folder}: written by another version of Align: {error.errors()[0]['msg']}; name its "
            "recipe in its place"
        ) from None
    model = _input_folder(folder, artifact.inputs["model"])
    prompts = _input_folder(folder, artifact.inputs["prompts"])
    for key, target in (("model", model), ("prompts", prompts)):
        if isinstance(target, Path) and not target.is_dir():
            raise ArtifactError(f"{folder}: {key}: its folder {target} no longer exists")
    return Job(
        name=artifact.name,
        config=config,
        origin=str(folder),
        model=model,
        prompts=Path(prompts),
        at=lambda key: f"{folder}: {artifact.name}.{key}",
    )


def _input_folder(stage: Path, entry: dict[str, str]) -> Path | str:
    """The folder of an input, or its Hub id. A folder of runs may have been moved."""
    if entry["digest"].startswith(HUB):
        return entry["folder"]
    folder = Path(entry["folder"])
    beside = stage.resolve().parent / folder.name
    return beside if not folder.is_dir() and beside.is_dir() else folder.resolve()
