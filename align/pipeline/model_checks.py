"""Checks of the models that a recipe starts from, on disk or in the cache, without loading one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from align.config.base import Input, Keys, NewModel
from align.config.recipe import ErrorCollector
from align.errors import UserError
from align.models import files, gguf_checks
from align.pipeline.plan import PlannedStage
from align.runtime import artifacts, hub

NEW_LAYER = (
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
)
"""Names of the modules in a layer of a new model that an adapter can have."""


def check_hub_models(errors: ErrorCollector, pending: Sequence[PlannedStage]) -> None:
    """Check that models on the Hub are cached or reachable, and the configs of cached ones.

    Loading a model that is not reachable retries for a minute.
    """
    reachable: dict[tuple[str, str | None], bool] = {}
    for stage, key, model, revision in _hub_models(pending):
        known = (model, revision)
        if known not in reachable:
            reachable[known] = hub.model_is_reachable(model, revision=revision)
        keys = (stage.name, *key.split("."))
        if not reachable[known]:
            errors.add(keys, f"{model}: {hub.NOT_REACHABLE}")
            continue
        folder = hub.cached_folder(model, revision=revision)
        if folder is not None:
            declared: Input = stage.config.inputs[key.split(".")[0]]
            with errors.at(*keys):
                files.check_config(folder, "policy" if declared.policies else "reward model")


def check_gguf_files(errors: ErrorCollector, pending: Sequence[PlannedStage]) -> None:
    """Check that the GGUF files that are not converted yet can be."""
    for stage in pending:
        for key, target in stage.inputs.items():
            folder = Path(target)
            file = stage.gguf_files.get(folder)
            if file is not None and not (folder / artifacts.FILE).is_file():
                with errors.at(stage.name, *key.split(".")):
                    gguf_checks.check_convertible(file)


def check_revisions(errors: ErrorCollector, pending: Sequence[PlannedStage]) -> None:
    """Check that a ``revision`` belongs to a model on the Hub: no other model has one."""
    for stage in pending:
        revision = getattr(stage.config, "revision", None)
        if revision is None or "model" not in type(stage.config).inputs:
            continue  # that of a data set
        is_known = "model" in stage.inputs or isinstance(
            getattr(stage.config, "model", None), NewModel
        )
        if is_known and not isinstance(stage.inputs.get("model"), str):
            errors.add(
                (stage.name, "revision"),
                "`model` is not on the Hub, so it has no revision; remove this key (an adapter "
                "stores the revision of its base)",
            )


def check_target_modules(errors: ErrorCollector, pending: Sequence[PlannedStage]) -> None:
    """Check that ``lora.target_modules`` names parts of the model that a stage starts from."""
    stages = {stage.folder: stage for stage in pending}
    for stage in pending:
        lora = getattr(stage.config, "lora", None)
        if lora is None or lora.target_modules == "all-linear":
            continue
        keys = (stage.name, "lora", "target_modules")
        if isinstance(lora.target_modules, str):
            try:
                re.compile(lora.target_modules)
            except re.error as error:
                errors.add(keys, f"no regular expression: {lora.target_modules} ({error})")
            else:
                _check_pattern(errors, keys, lora.target_modules, _module_names(stage, stages))
            continue
        if not lora.target_modules:
            errors.add(keys, "an empty list; name layers, or remove it to adapt all linear layers")
            continue
        names = _module_names(stage, stages)
        unmatched = [t for t in lora.target_modules if not files.matches_module(t, names)]
        if names and unmatched:
            parts = sorted({name.rpartition(".")[2] for name in names})
            errors.add(
                keys,
                f"the model has no {', '.join(unmatched)}; its parts are {', '.join(parts)}",
            )


def _check_pattern(errors: ErrorCollector, keys: Keys, pattern: str, names: set[str]) -> None:
    """Check that a regular expression matches the whole name of a module.

    A checkpoint may leave out the first part of the names, which is therefore optional here.
    """
    if pattern in {name.rpartition(".")[2] for name in names}:
        message = f"a text is matched to the whole name of a module; write a list: [{pattern}]"
        errors.add(keys, message)
    elif names and not any(
        re.fullmatch(pattern, each)
        for name in names
        for each in (name, f"model.{name}", name.partition(".")[2])
    ):
        example = next((name for name in sorted(names) if name.endswith("q_proj")), min(names))
        errors.add(keys, f"{pattern} matches the whole name of no module, such as {example}")


def _hub_models(
    pending: Sequence[PlannedStage],
) -> Iterator[tuple[PlannedStage, str, str, str | None]]:
    """Stages, keys, Hub ids and revisions of their inputs, and of the bases of given adapters."""
    for stage in pending:
        for key, target in stage.inputs.items():
            if isinstance(target, str):
                revision = getattr(stage.config, "revision", None) if key == "model" else None
                yield stage, key, target, revision
            elif (target / files.ADAPTER_CONFIG).is_file():
                base = _adapter_base(target)
                if base is not None and not Path(base.source).is_dir():
                    yield stage, key, base.source, base.hub_revision


def _adapter_base(folder: Path) -> files.AdapterBase | None:
    """The base of an adapter; None if its config is malformed, which loading reports."""
    try:
        return files.read_adapter_base(folder / files.ADAPTER_CONFIG, folder)
    except UserError:
        return None


def _module_names(stage: PlannedStage, stages: Mapping[Path, PlannedStage]) -> set[str]:
    """Modules of the model that a stage starts from; empty if they are not known yet."""
    model = stage.inputs.get("model")
    shape = getattr(stage.config, "model", None)
    if isinstance(shape, NewModel):
        layers = range(shape.num_hidden_layers)
        in_layers = {f"model.layers.{i}.{name}" for i in layers for name in NEW_LAYER}
        return in_layers | {"model.embed_tokens", "lm_head"}
    if isinstance(model, Path):
        if model in stages:
            return _module_names(stages[model], stages)
        base = _adapter_base(model) if (model / files.ADAPTER_CONFIG).is_file() else None
        if base is None:
            return files.module_names(model)
        model, revision = base.source, base.hub_revision
        if Path(model).is_dir():
            return files.module_names(Path(model))
    else:
        revision = getattr(stage.config, "revision", None)
    folder = hub.cached_folder(model, revision=revision) if model else None
    return files.module_names(folder) if folder is not None else set()
