"""The optional packages that the stages of a recipe need, and which of them are not installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from align.config.recipe import ErrorCollector
from align.errors import UserError, not_installed
from align.models import gguf_files
from align.pipeline import trackers
from align.pipeline.plan import PlannedStage
from align.rewards import functions
from align.runtime import artifacts

if TYPE_CHECKING:
    from align.control.spaces import UnfitError


def is_missing(package: tuple[str, str] | None) -> bool:
    """Whether a package, given by its module and its requirement, is not installed."""
    return package is not None and importlib.util.find_spec(package[0]) is None


def check_packages(errors: ErrorCollector, pending: Sequence[PlannedStage]) -> None:
    """Check that the optional dependencies that settings require are installed."""
    for stage in pending:
        for key, message in _missing_requirements(stage):
            errors.add((stage.name, *key.split(".")), message)


def _missing_requirements(stage: PlannedStage) -> Iterator[tuple[str, str]]:
    """The keys of a stage that require a missing package, each with the error."""
    for key, package in stage.config.required_packages.items():
        if is_missing(package):
            yield key, not_installed(*package)


def environment_problems(
    pending: Sequence[PlannedStage],
) -> Iterator[tuple[PlannedStage, UnfitError]]:
    """The stages whose Gymnasium environment cannot be used, with the reason."""
    for stage in pending:
        for environment in stage.config.gym_environments:
            from align.control import spaces

            try:
                spaces.inspect_env(environment)
            except spaces.UnfitError as error:
                yield stage, error


def missing(stages: Sequence[PlannedStage]) -> Iterator[str]:
    """A line for each package that the stages need and that is not installed, with their keys.

    Packages of environments are left out; :func:`environment_problems` has them.
    """
    places: dict[str, list[str]] = {}
    for stage in stages:
        for key, message in _messages(stage):
            places.setdefault(message, []).append(f"{stage.name}.{key}")
    for message, keys in places.items():
        yield f"{', '.join(keys)}: {message}"


def _messages(stage: PlannedStage) -> Iterator[tuple[str, str]]:
    """The keys of a stage that need a missing package, each with what is missing."""
    yield from _missing_requirements(stage)
    for keys, function in stage.config.reward_functions.items():
        try:
            functions.check_package(function)
        except UserError as error:
            yield ".".join(map(str, keys)), error.lines[0].partition(": ")[2]
    for tracker in stage.config.trackers:
        key = "trainer.report_to" if stage.config.trainer_config else "report_to"
        if problem := trackers.problem(tracker):
            yield key, problem
    for key, target in stage.inputs.items():
        is_converted = (Path(target) / artifacts.FILE).is_file()
        if target in stage.gguf_files and not is_converted and not gguf_files.is_installed():
            yield key, gguf_files.NOT_INSTALLED
