"""What a runs folder holds: the folders of stages, and which runs of recipes refer to them.

A run refers to the stages in its ``summary.json``, and to everything that those were made from:
their inputs, and cached reference log-probabilities. An unfinished run refers to the stages in its
``planned-<digest>.json``. Left out: folders that no stage has written.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from align.errors import ArtifactError
from align.pipeline.plan import PlannedStage
from align.pipeline.runner import clear_folder
from align.runtime import artifacts
from align.runtime.artifacts import Artifact

PLANNED = "planned-*.json"
"""Pattern of the names of the files in which unfinished runs name their stages."""
LONGEST_VALUE = 40
"""Characters of a setting in a line about what changed."""
STAGE_FOLDER = re.compile(r".+-[0-9a-f]{12}")


@dataclass(frozen=True, slots=True)
class StageFolder:
    """A stage's folder in a runs folder."""

    folder: Path
    artifact: Artifact | None
    """None if the stage is unfinished, or its record is damaged."""
    problem: str
    """What is wrong with the record; empty if nothing is."""
    bytes: int
    changed: float
    """When the stage finished, or last wrote a file, in seconds since the epoch."""
    runs: tuple[str, ...] = ()
    """Names of the runs that refer to it, sorted."""

    @property
    def name(self) -> str:
        """The name of the stage in its recipe."""
        return self.folder.name.rpartition("-")[0]

    @property
    def status(self) -> str:
        """``finished``, ``unfinished`` or ``damaged``."""
        if self.problem:
            return "damaged"
        return "unfinished" if self.artifact is None else "finished"

    @property
    def is_held(self) -> bool:
        """Whether a run is writing this folder, or may be because the lock cannot be opened."""
        lock = self.folder / artifacts.WORKING
        if not lock.is_file():
            return False
        try:
            with FileLock(lock, timeout=0):
                return False
        except OSError:  # the lock is held, or belongs to somebody else
            return True


@dataclass(frozen=True, slots=True)
class Inventory:
    """The stages in a runs folder, and the problems of unreadable summaries."""

    stages: tuple[StageFolder, ...]
    """Sorted by name, the newest first."""
    problems: tuple[str, ...] = ()

    def unreferenced(self, *, before: float) -> list[StageFolder]:
        """Stages that no run refers to, that changed before a time and that no run is writing."""
        return [
            stage
            for stage in self.stages
            if not stage.runs and stage.changed < before and not stage.is_held
        ]


def take_inventory(runs: Path) -> Inventory:
    """List the stages in a runs folder.

    Raises:
        ArtifactError: The folder does not exist.
    """
    if not runs.is_dir():
        raise ArtifactError(f"{runs}: no such folder; name another one with --runs")
    stages = {stage.folder.name: stage for stage in map(_stage_folder, _stage_folders(runs))}
    problems: list[str] = []
    referring: dict[str, set[str]] = {name: set() for name in stages}
    for file in sorted([*runs.glob(f"*/{artifacts.SUMMARY}"), *runs.glob(f"*/{PLANNED}")]):
        run = file.parent.name + ("" if file.name == artifacts.SUMMARY else " (unfinished)")
        try:
            named = _named_folders(file)
        except (OSError, ValueError, TypeError, KeyError) as error:
            reason = " ".join(str(error).split())[:80]
            problems.append(f"{file}: cannot be read ({type(error).__name__}: {reason})")
            continue
        for name in _with_origins(named, stages):
            referring[name].add(run)
    with_runs = [
        replace(stage, runs=tuple(sorted(referring[name]))) for name, stage in stages.items()
    ]
    ordered = sorted(with_runs, key=lambda stage: (stage.name, -stage.changed))
    return Inventory(tuple(ordered), tuple(problems))


def _stage_folders(runs: Path) -> Iterator[Path]:
    """Folders that a stage has written: with a record, or with the mark of an unfinished stage.

    Other folders may have such names too, as ``backup-202611271200``.
    """
    marks = (artifacts.FILE, artifacts.WORKING)
    for path in sorted(runs.iterdir()):
        if path.is_dir() and not path.is_symlink() and STAGE_FOLDER.fullmatch(path.name):
            if any(os.path.lexists(path / mark) for mark in marks):
                yield path


def _stage_folder(folder: Path) -> StageFolder:
    problem = ""
    try:
        artifact = artifacts.read_artifact(folder)
    except ArtifactError as error:
        artifact, problem = None, str(error)
    size, changed = 0, folder.stat().st_mtime
    for parent, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(OSError):  # a run may remove its temporary files meanwhile
                status = os.lstat(os.path.join(parent, file))
                if stat.S_ISREG(status.st_mode):
                    size, changed = size + status.st_size, max(changed, status.st_mtime)
    if artifact is not None:
        changed = (folder / artifacts.FILE).stat().st_mtime
    return StageFolder(folder, artifact, problem, size, changed)


def _named_folders(summary: Path) -> list[str]:
    """Names of the folders of the stages in a ``summary.json`` or ``planned-<digest>.json``."""
    stages = json.loads(summary.read_text(encoding="utf-8"))["stages"]
    return [Path(stage["folder"]).name for stage in stages]


def _with_origins(names: Collection[str], stages: Mapping[str, StageFolder]) -> set[str]:
    """The named folders, and those that they were made from, as far as they are in the folder."""
    found: set[str] = set()
    unseen = set(names)
    while unseen:
        name = unseen.pop()
        if name in found or name not in stages:
            continue
        found.add(name)
        artifact = stages[name].artifact
        if artifact is not None:
            unseen |= {Path(entry["folder"]).name for entry in artifact.inputs.values()}
            unseen |= set(artifact.metrics.get("reference", {}).get("folders", ()))
    return found


@dataclass(frozen=True, slots=True)
class Change:
    """Why a planned stage is not the finished one of its name that resembles it most."""

    folder: Path
    """Folder of the finished stage."""
    settings: dict[str, tuple[Any, Any]]
    """Values of the dotted keys that differ, there and in the plan; None where a key is absent."""
    inputs: tuple[str, ...]
    """Keys of the inputs with another content."""

    def __str__(self) -> str:
        changes = [f"{key} {_short(a)} → {_short(b)}" for key, (a, b) in self.settings.items()]
        changes += [f"new input {key}" for key in self.inputs]
        return (
            f"{', '.join(changes) or 'new code, data or files'} (compared with {self.folder.name})"
        )


def _short(value: object) -> str:
    """A setting on one line, of at most as many characters as a line of text has room for."""
    text = " ".join(str(value).split())
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 1]}…"


def finished_stages(runs: Path, names: Collection[str]) -> Iterator[tuple[Path, Artifact]]:
    """The finished stages of these names with their folders; no other file of them is read."""
    for folder in _stage_folders(runs):
        if folder.name.rpartition("-")[0] in names:
            with contextlib.suppress(ArtifactError, OSError):  # `align runs` shows damaged ones
                artifact = artifacts.read_artifact(folder)
                if artifact is not None:
                    yield folder, artifact


def explain_new(stage: PlannedStage, finished: Iterable[tuple[Path, Artifact]]) -> Change | None:
    """Compare a stage that would run with the finished one that differs least; None without one."""
    settings = flat(artifacts.without_credentials(stage.config.model_dump(exclude={"stage"})))
    changes = [
        _change(stage, settings, folder, artifact)
        for folder, artifact in finished
        if folder != stage.folder and (artifact.name, artifact.stage) == (stage.name, stage.stage)
    ]
    return min(changes, key=lambda change: len(change.settings) + len(change.inputs), default=None)


def _change(
    stage: PlannedStage, settings: Mapping[str, Any], folder: Path, artifact: Artifact
) -> Change:
    recorded = flat(artifact.recipe)
    changed = {
        key: (recorded.get(key), settings.get(key))
        for key in {**settings, **recorded}
        if settings.get(key) != recorded.get(key)
        and key.partition(".")[0] not in stage.config.inputs  # their content counts
    }
    inputs = tuple(
        key
        for key in stage.inputs
        if stage.digests[key] != artifact.inputs.get(key, {}).get("digest")
    )
    return Change(folder, changed, inputs)


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted keys: the values of nested mappings one by one."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def remove(stage: StageFolder) -> None:
    """Remove the folder of a stage, first the files that mark it as finished or resumable.

    Raises:
        ArtifactError: A run has begun to write it.
    """
    lock = stage.folder / artifacts.WORKING
    try:
        with FileLock(lock, timeout=0):
            clear_folder(stage.folder)
            lock.unlink(missing_ok=True)
            stage.folder.rmdir()
    except Timeout:
        raise ArtifactError(
            f"{stage.folder}: a run has begun to write it, so it was not removed; wait for the run"
        ) from None
