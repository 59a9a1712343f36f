"""What the stages of a recipe are: their digests, their folders, and whether they are there already.

A digest covers a stage's config, the digests of its inputs and the stage's code version. How many processes share the
work is not in it: it is in the artifact, and told where one is reused that another number made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from align.config.base import Stage
from align.config.data import Prepare
from align.config.ppo import PPO
from align.config.recipe import Recipe, kind
from align.config.training import TrainingStage, TRLStage
from align.config.validation import FUNCTION, stage_inputs
from align.data.sources import source_files
from align.errors import UserError, nearest
from align.models.files import model_folder
from align.rewards import functions
from align.runtime import artifacts, checkpoints


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """A stage with its place on disk. ``status`` is ``reused``, ``resume`` or ``run``; ``inputs`` go by role.

    ``digests`` are those of the inputs, and of the files that the settings name.
    """

    name: str
    config: Stage
    digest: str
    folder: Path
    inputs: dict[str, Path | str]
    digests: dict[str, str]
    status: str

    @property
    def stage(self) -> str:
        """The kind of stage."""
        return kind(self.config)


def plan(
    recipe: Recipe, runs: Path, *, until: str | None = None, force: str | None = None
) -> list[PlannedStage]:
    """What each stage is and whether it is there already. Starts nothing and writes nothing.

    ``force`` names a stage, or ``all``, that is to run whatever is there.

    Raises:
        UserError: An input outside of the recipe is missing or unfinished.
    """
    for option, name, others in (("--until", until, []), ("--force", force, ["all"])):
        if name is not None and name not in [*recipe.stages, *others]:
            hint = nearest(name, [*recipe.stages, *others])
            raise UserError(f"{option} {name}: no such stage{hint}")
    steps: dict[str, PlannedStage] = {}
    problems: list[str] = []
    for name, config in recipe.stages.items():
        inputs: dict[str, Path | str] = {}
        digests: dict[str, str] = {}
        for role, target in stage_inputs(config).items():
            try:
                inputs[role], digests[role] = _input(role, target, config, steps)
            except UserError as error:
                where = recipe.at(name, *role.split("."))
                problems += [f"{where}: {line}" for line in error.lines]
        if isinstance(config, Prepare):
            sources, wrong = _sources(config)
            digests |= sources
            problems += [f"{recipe.at(name, key)}: {line}" for key, line in wrong]
        digests |= _named_files(config)
        digest = stage_digest(config, digests)
        folder = runs / f"{name}-{digest[:12]}"
        status = "run" if force in ("all", name) else _status(folder)
        steps[name] = PlannedStage(name, config, digest, folder, inputs, digests, status)
        if name == until:
            break
    if problems:
        raise UserError(*problems)
    return list(steps.values())


def _status(folder: Path) -> str:
    if artifacts.read_artifact(folder) is not None:
        return "reused"
    return "resume" if checkpoints.list_checkpoints(folder) else "run"


def _input(
    role: str, target: str, config: Stage, steps: Mapping[str, PlannedStage]
) -> tuple[Path | str, str]:
    """Where an input is, and its digest."""
    if target in steps:
        return steps[target].folder, steps[target].digest
    folder = Path(target).expanduser()
    if not folder.is_dir():
        revision = getattr(config, "revision", None) if role == "model" else None
        return target, f"hub:{target}@{revision or 'main'}"
    made = artifacts.read_artifact(folder)
    wanted = config.inputs[role.split(".")[0]]
    if made is not None:
        if made.stage not in wanted.stages:
            raise UserError(
                f"{folder} is a finished `{made.stage}` stage; expected {' or '.join(wanted.stages)}"
            )
    elif not wanted.models or (folder / artifacts.WORKING).exists():
        raise UserError(
            f"{folder}: no {artifacts.FILE}, so its stage did not finish there; run its recipe again"
        )
    else:
        model_folder(folder)
    return folder, artifacts.digest_folder(folder)


def _sources(config: Prepare) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """The digests of what a ``prepare`` stage reads, by key, and what is wrong with it.

    A Hub id stands for itself, with its revision.
    """
    named: dict[str, tuple[str | None, str, str | None]] = {
        "source": (config.source, config.data_split, config.revision)
    }
    named["demonstrations"] = (config.demonstrations, config.data_split, config.revision)
    for i, entry in enumerate(config.mixture):
        named[f"mixture.{i}"] = (entry.source, entry.data_split, entry.revision)
    for i, name in enumerate(config.decontaminate):
        named[f"decontaminate.{i}"] = (name, "", None)  # every file of a folder
    digests: dict[str, str] = {}
    wrong: list[tuple[str, str]] = []
    for key, (source, split, revision) in named.items():
        if source is None:
            continue
        try:
            files = source_files(source, split=split)
        except UserError as error:
            wrong += [(key.partition(".")[0], line) for line in error.lines]
            continue
        hub = f"hub:{source}@{revision or 'main'}"
        digests[key] = artifacts.digest_files(files) if files else hub
    return digests, wrong


def _named_files(config: Stage) -> dict[str, str]:
    """Digests of what settings name on this disk, a chat template or a reward function's file: the content counts."""
    found = {}
    for word, value in config.trainer.items() if isinstance(config, TRLStage) else ():
        path = Path(value) if isinstance(value, str) and value else None
        if path is not None and path.is_file():
            found[f"trainer.{word}"] = artifacts.digest_files([path])
        elif path is not None and path.is_dir():
            found[f"trainer.{word}"] = artifacts.digest_folder(path)
    for name in config.rewards if isinstance(config, PPO) else ():
        file = functions.function_file(name) if FUNCTION.match(name) else None
        if file is not None and file.is_file():
            found[name] = artifacts.digest_files([file])
    return found


def stage_digest(config: Stage, inputs: Mapping[str, str]) -> str:
    """The digest of a stage.

    What training and preparing read counts by content, whatever it is called. The names in an evaluation label its
    results, so there they count too.
    """
    own = config.model_dump(exclude={"stage"})
    if isinstance(config, TrainingStage):
        named = stage_inputs(config)
        for key in config.inputs:
            if isinstance(own[key], str):
                del own[key]
            elif isinstance(
                own[key], list
            ):  # what is an input counts by its digest, what is not by its name
                items = enumerate(own[key])
                own[key] = [None if f"{key}.{i}" in named else item for i, item in items]
    if isinstance(config, Prepare):
        for key in ("source", "demonstrations", "decontaminate"):
            own[key] = None  # by content, in `inputs`
        for entry in own["mixture"]:
            entry["source"] = None
    return artifacts.digest(
        {
            "stage": kind(config),
            "code_version": config.code_version,
            "settings": own,
            "inputs": dict(inputs),
        }
    )
