"""The plan of a recipe: the digest and the folder of each stage, and whether it is finished.

A digest covers the settings of a stage, the digests of its inputs, the content of the files that it
names, and the code version of the stage. It does not cover the number of processes: that is stored
in the artifact, and logged if an artifact of another number is reused.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from align.config.base import Stage
from align.config.recipe import ErrorCollector, Recipe
from align.config.stages import accepted_kinds, stage_kind
from align.data.sources import source_files
from align.errors import ArtifactError, nearest
from align.models import gguf_files
from align.models.files import check_model_folder
from align.models.tokenizer_files import check_vocabulary
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
    """``reused``, ``resume`` or ``run``; ``invalid`` for a stage of :func:`with_invalid`."""
    rows_digest: str = ""
    """The digest without the keys that change only the tables of prompts."""
    gguf_files: Mapping[Path, Path] = field(default_factory=dict)
    """The GGUF files among the inputs, by the folder that each is converted into."""
    is_partial: bool = False
    """Whether it lacks values that are wrong in the recipe, or inputs that cannot be read."""

    @property
    def stage(self) -> str:
        """The kind of stage."""
        return stage_kind(self.config)

    def without_inputs(self, folders: Container[Path]) -> PlannedStage:
        """The stage without the inputs in ``folders``, which cannot be read."""
        known = {key: each for key, each in self.inputs.items() if each not in folders}
        if len(known) == len(self.inputs):
            return self
        return replace(self, inputs=known, is_partial=True)


def plan(
    recipe: Recipe, runs: Path, *, until: str | None = None, force: str | None = None
) -> list[PlannedStage]:
    """Plan the stages of a recipe, or those that ``until`` needs. Nothing is started or written.

    ``force`` names a stage, or ``all``, that runs even if it is finished.

    Raises:
        UserError: An option names no stage, or an input from outside the recipe is missing or
            unfinished.
    """
    errors = ErrorCollector(recipe)
    stages = plan_stages(errors, runs, until=until, force=force)
    errors.raise_any()
    return stages


def plan_stages(
    errors: ErrorCollector, runs: Path, *, until: str | None = None, force: str | None = None
) -> list[PlannedStage]:
    """Plan a recipe as :func:`plan` does, and collect the errors.

    Stages with errors, and those that depend on them, are left out.
    """
    recipe = errors.recipe
    _check_options(errors, until, force)
    needed = _needed_stages(recipe, until)
    planned: dict[str, PlannedStage] = {}
    for name, config in recipe.stages.items():
        if name not in needed:
            continue
        n_errors = len(errors.lines)
        depends_on = set(config.input_names().values()) & recipe.stages.keys()
        if depends_on <= planned.keys():
            with errors.at(name):
                stage = _planned_stage(name, config, runs, planned, errors, force)
                if len(errors.lines) == n_errors:
                    planned[name] = stage
    return list(planned.values())


def with_invalid(
    errors: ErrorCollector, planned: Sequence[PlannedStage], runs: Path, *, until: str | None = None
) -> list[PlannedStage]:
    """The planned stages and, so that their other errors are found too, those with errors.

    The latter have the status ``invalid``, no digest, and those of their inputs that are known.
    """
    recipe = errors.recipe
    needed = _needed_stages(recipe, until) if until in recipe.stages else set(recipe.names)
    known = {stage.name: stage for stage in planned}
    for name in recipe.names:
        has_config = name in recipe.stages or name in recipe.invalid
        if name not in known and name in needed and has_config:
            known[name] = _invalid_stage(name, runs, known, errors)
    return [known[name] for name in recipe.names if name in known]


def _invalid_stage(
    name: str, runs: Path, known: Mapping[str, PlannedStage], errors: ErrorCollector
) -> PlannedStage:
    """A stage with errors; further ones of its inputs and its files are collected."""
    recipe = errors.recipe
    invalid = recipe.invalid.get(name)
    config = recipe.stages[name] if invalid is None else invalid.config
    inputs: dict[str, Path | str] = {}
    for key, target in config.input_names().items():
        keys = tuple(key.split("."))
        if target in known:
            inputs[key] = known[target].folder
        elif target not in recipe.names and not (invalid and invalid.lacks_input(keys)):
            with errors.at(name, *keys):
                inputs[key], _ = _outside_input(key, target, config, runs)
    _file_digests(name, config, errors)
    named = _gguf_names(config, inputs, known)
    files = {Path(inputs[key]): Path(target).expanduser() for key, target in named.items()}
    partial = invalid is not None and bool(invalid.wrong)
    folder = runs / name
    return PlannedStage(
        name, config, "", folder, inputs, {}, "invalid", gguf_files=files, is_partial=partial
    )


def _needed_stages(recipe: Recipe, until: str | None) -> set[str]:
    """The stage ``until`` and those whose results it needs; all of them if it names none."""
    if until is None or until not in recipe.stages:
        return set(recipe.stages)
    needed: set[str] = set()
    unseen: set[str] = {until}
    while unseen:
        name = unseen.pop()
        needed.add(name)
        inputs = set(recipe.stages[name].input_names().values())
        unseen |= (inputs & recipe.stages.keys()) - needed
    return needed


def _check_options(errors: ErrorCollector, until: str | None, force: str | None) -> None:
    """Check that ``--until`` and ``--force`` name stages, and that the forced stage is needed."""
    names = list(errors.recipe.names)
    for option, value, others in (("--until", until, []), ("--force", force, ["all"])):
        if value is not None and value not in [*names, *others]:
            hint = nearest(value, [*names, *others])
            errors.lines.append(f"{option} {value}: no such stage{hint}")
    if until in names and force in names and force not in _needed_stages(errors.recipe, until):
        errors.lines.append(
            f"--force {force}: `--until {until}` does not need this stage; remove one of the two"
        )


def _planned_stage(
    name: str,
    config: Stage,
    runs: Path,
    planned: Mapping[str, PlannedStage],
    errors: ErrorCollector,
    force: str | None,
) -> PlannedStage:
    """Resolve the inputs of a stage; its digest, its folder and its status."""
    inputs, digests = _resolve_inputs(name, config, runs, planned, errors)
    digests |= _file_digests(name, config, errors)
    named = _gguf_names(config, inputs, planned)
    gguf_names = list(dict.fromkeys(named.values()))
    digest = stage_digest(config, digests, gguf_names=gguf_names)
    folder = runs / f"{name}-{digest[:12]}"
    status = "run" if force in ("all", name) else _status(folder, stage_kind(config), digest)
    defaults = {key: type(config).model_fields[key].get_default() for key in config.prompt_keys}
    rows_digest = stage_digest(config.model_copy(update=defaults), digests, gguf_names=gguf_names)
    files = {Path(inputs[key]): Path(target).expanduser() for key, target in named.items()}
    return PlannedStage(name, config, digest, folder, inputs, digests, status, rows_digest, files)


def _gguf_names(
    config: Stage, inputs: Mapping[str, Path | str], stages: Container[str]
) -> dict[str, str]:
    """The GGUF files that keys with a known input name, by key; ``stages`` are no files."""
    return {
        key: target
        for key, target in config.input_names().items()
        if key in inputs and target not in stages and gguf_files.is_gguf(target)
    }


def stage_digest(
    config: Stage, inputs: Mapping[str, str], *, gguf_names: Sequence[str] = ()
) -> str:
    """The digest of a stage from its settings and the digests of its inputs.

    The names of the inputs of a training stage are not part of it. Those of ``sample``, ``label``
    and ``evaluate`` are, because their results are labeled with them. ``gguf_names`` are those of
    GGUF files, each once; of them only counts which inputs are the same.
    """
    settings = config.digest_settings()
    places = {name: f"{gguf_files.KIND}:{i}" for i, name in enumerate(gguf_names)}
    for key in settings.keys() & config.inputs.keys():
        value = settings[key]
        if isinstance(value, str):
            settings[key] = places.get(value, value)
        elif isinstance(value, list):
            settings[key] = [places.get(v, v) if isinstance(v, str) else v for v in value]
    return artifacts.digest(
        {
            "stage": stage_kind(config),
            "code_version": config.code_version,
            "settings": settings,
            "inputs": dict(inputs),
        }
    )


def _status(folder: Path, kind: str, digest: str) -> str:
    """``reused``, ``resume`` or ``run``.

    Raises:
        ArtifactError: The stage is finished, but a file is damaged or belongs to another stage.
    """
    artifact = artifacts.read_artifact(folder)
    if artifact is not None:
        artifacts.check_identity(folder, artifact, kind, digest)
        artifacts.check_sizes(folder, artifact)
        return "reused"
    return "resume" if checkpoints.list_checkpoints(folder) else "run"


def _resolve_inputs(
    name: str,
    config: Stage,
    runs: Path,
    planned: Mapping[str, PlannedStage],
    errors: ErrorCollector,
) -> tuple[dict[str, Path | str], dict[str, str]]:
    """The folder or Hub id of each input, and its digest."""
    inputs: dict[str, Path | str] = {}
    digests: dict[str, str] = {}
    for key, target in config.input_names().items():
        if target in planned:
            inputs[key] = planned[target].folder
            kinds = {table.kind for table in config.reads if table.input == key}
            only_rows = kinds and "prompts" not in kinds
            digests[key] = planned[target].rows_digest if only_rows else planned[target].digest
            continue
        with errors.at(name, *key.split(".")):
            inputs[key], digests[key] = _outside_input(key, target, config, runs)
    return inputs, digests


def _outside_input(key: str, target: str, config: Stage, runs: Path) -> tuple[Path | str, str]:
    """The folder or Hub id of an input that is not a stage of the recipe, and its digest."""
    if gguf_files.is_gguf(target):
        return _gguf_input(Path(target).expanduser(), runs)
    return _external_input(key, target, config)


def _gguf_input(file: Path, runs: Path) -> tuple[Path, str]:
    """The folder that a GGUF file is converted into; an unconverted file must be a complete one."""
    try:
        folder = gguf_files.converted_folder(file, runs)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ArtifactError(f"{file}: cannot be read: {reason}; name another file") from None
    artifact = artifacts.read_artifact(folder)
    if artifact is None:
        gguf_files.read_header(file)
    else:
        artifacts.check_sizes(folder, artifact)
    return folder, gguf_files.digest(file)


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
        accepted += (gguf_files.KIND,) * (expected.models and expected.policies)
        if artifact.stage not in accepted:
            kinds = " or ".join(accepted)
            raise ArtifactError(
                f"{folder} is a finished `{artifact.stage}` stage; expected {kinds}"
            )
        artifacts.check_sizes(folder, artifact)
    elif not expected.models or (folder / artifacts.WORKING).exists():
        raise ArtifactError(
            f"{folder}: no {artifacts.FILE}, so its stage is not finished; run its recipe again"
        )
    else:
        check_model_folder(folder, "policy" if expected.policies else "reward model")
        check_vocabulary(folder)
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
        with errors.at(name, *key.split(".")):
            digest = _path_digest(value)
            if digest is not None:
                digests[key] = digest
    addresses = [function.address for function in config.reward_functions.values()]
    for address in (*addresses, *config.environments.values()):
        digest = functions.source_digest(address)
        if digest is not None:
            digests[address] = digest
    return digests


def _path_digest(value: str) -> str | None:
    """The digest of a file or a folder; None if there is none of this name."""
    path = Path(value)
    try:
        if path.is_file():
            return artifacts.digest_files([path])
        return artifacts.digest_folder(path) if path.is_dir() else None
    except OSError as error:
        reason = error.strerror or str(error)
        raise ArtifactError(f"{value:.80}: cannot be read: {reason}; name another file") from None
