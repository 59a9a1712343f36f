"""Run the unfinished stages of a recipe, in order, and reuse the finished ones.

A folder ``runs/<name>-<digest>`` with an ``artifact.json`` is a finished stage. Without it, the
stage was interrupted, and the same command resumes it there.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from align.config.inputs import input_names
from align.config.recipe import ErrorCollector, Recipe
from align.errors import ArtifactError, UserError
from align.models import gguf_conversion
from align.pipeline import preflight
from align.pipeline.estimates import LARGEST_SOURCE
from align.pipeline.memory_advice import out_of_memory_line
from align.pipeline.model_card import write_model_card
from align.pipeline.plan import PlannedStage, plan_stages, with_invalid
from align.pipeline.quantization_checks import remarks
from align.report.advice import LiveAdvice
from align.runtime import artifacts, checkpoints, distributed, exit_codes, out_of_memory, signals
from align.runtime.locks import folder_lock
from align.runtime.progress import Display, Logger
from align.runtime.results import ResultTable, StageResult

LOGGER = logging.getLogger("align")


@dataclass(frozen=True, slots=True)
class FinishedStage:
    """A stage that was run or reused."""

    name: str
    stage: str
    """The kind of stage."""
    digest: str
    folder: Path
    status: str
    """``ran`` or ``reused``."""
    seconds: float
    """Duration of the run that finished the stage."""
    metrics: Any
    """A dictionary; in the Python API, an instance of the stage's ``metrics_class``."""
    tables: tuple[ResultTable, ...]
    """The tables for the summary at the end of the run."""


@dataclass(frozen=True, slots=True)
class RunSummary:
    """The result of a run: its stages in order."""

    recipe: str
    seconds: float
    stages: tuple[FinishedStage, ...]
    overrides: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The content of ``summary.json``."""
        keys = ("name", "stage", "digest", "folder", "status", "seconds", "metrics")
        stages = [{key: getattr(stage, key) for key in keys} for stage in self.stages]
        for stage in stages:
            stage["folder"] = str(stage["folder"])
        return {
            "recipe": self.recipe,
            "overrides": list(self.overrides),
            "seconds": self.seconds,
            "stages": stages,
        }


def run_recipe(
    recipe: Recipe,
    runs: Path,
    display: Display,
    *,
    force: str | None = None,
    until: str | None = None,
) -> RunSummary:
    """Run unfinished stages: all, or those that ``until`` needs; write ``summary.json``.

    ``force`` names a stage, or ``all``, that runs even if it is finished.

    Raises:
        UserError: Invalid input. Errors that can be detected before training are raised before it,
            all at once.
    """
    distributed.check_launch()
    started = time.monotonic()
    planned = plan_checked(recipe, runs, until=until, force=force)
    display.info(f"{recipe.path}: {_processes(distributed.world_size())}")
    for stage in planned:
        if force in ("all", stage.name):
            check_removable(stage.folder)
    pending = [stage for stage in planned if stage.status != "reused"]
    if pending or distributed.world_size() > 1:
        distributed.init_process_group()
        _raise_errors(recipe, preflight.check_before_training, pending)
        if _convert_gguf_files(pending, runs, display):
            # Now the tokens of their rows can be counted.
            planned = plan_checked(recipe, runs, until=until, force=force)
            pending = [stage for stage in planned if stage.status != "reused"]
        for line in remarks(pending):
            display.info(line)
    plan_file = _record_plan(planned, runs / recipe.name) if distributed.is_main() else None
    finished = []
    for stage in planned:
        forced = force in ("all", stage.name)
        finished.append(_run_or_reuse(stage, recipe, display, forced=forced))
        if stage.config.prepares_data:
            _raise_errors(recipe, preflight.check_prepared, stage.folder, pending)
    seconds = round(time.monotonic() - started, 3)
    summary = RunSummary(str(recipe.path), seconds, tuple(finished), recipe.overrides)
    if distributed.is_main():
        artifacts.write_json(runs / recipe.name / artifacts.SUMMARY, summary.as_json())
    if plan_file is not None:
        plan_file.unlink(missing_ok=True)
    distributed.barrier()
    return summary


def _record_plan(planned: Sequence[PlannedStage], run_folder: Path) -> Path:
    """Write the names of the folders that an unfinished run uses; return the file.

    ``align runs --prune`` keeps them. The file is removed after ``summary.json`` is written. Its
    name depends on the plan, since several runs of a recipe may be unfinished.
    """
    targets = [target for stage in planned for target in (stage.folder, *stage.inputs.values())]
    names = dict.fromkeys(target.name for target in targets if isinstance(target, Path))
    content = {"stages": [{"folder": name} for name in names]}
    file = run_folder / f"planned-{artifacts.digest(content)[:12]}.json"
    artifacts.write_json(file, content)
    return file


def plan_checked(
    recipe: Recipe, runs: Path, *, until: str | None = None, force: str | None = None
) -> list[PlannedStage]:
    """Plan a recipe, and check its unfinished stages before a training library is imported.

    ``recipe`` may have errors that were found when it was read.

    Raises:
        UserError: One line for each error of the recipe, the options, the inputs and the data.
    """
    errors = ErrorCollector(recipe)
    planned = plan_stages(errors, runs, until=until, force=force)
    damaged = frozenset[Path]()
    if distributed.is_main():  # the others wait for it, or end with it
        damaged = preflight.check_finished_stages(errors, planned)
    checked = with_invalid(errors, planned, runs, until=until)
    pending = [stage.without_inputs(damaged) for stage in checked if stage.status != "reused"]
    # A larger source is not read twice: the errors of its rows are raised when it is prepared.
    world_size = distributed.world_size()
    for _ in preflight.examine(
        errors, pending, runs, world_size=world_size, largest_source=LARGEST_SOURCE
    ):
        pass  # the lines are for `align check`
    if errors.lines:  # what a run finds after these checks is reported with them
        preflight.check_code(errors, pending)
    errors.raise_any()
    return planned


def _convert_gguf_files(pending: Sequence[PlannedStage], runs: Path, display: Display) -> bool:
    """Convert the GGUF files that unfinished stages name; whether there was one to convert."""
    files = {
        folder: file
        for stage in pending
        for folder, file in stage.gguf_files.items()
        if _read_artifact(folder) is None
    }
    for file in files.values():
        gguf_conversion.converted(file, runs, display.info)
    return bool(files)


def _raise_errors(recipe: Recipe, check: Callable[..., None], *arguments: object) -> None:
    """Make a check, and raise the errors that it collects."""
    errors = ErrorCollector(recipe)
    check(errors, *arguments)
    errors.raise_any()


def _run_or_reuse(
    stage: PlannedStage, recipe: Recipe, display: Display, *, forced: bool
) -> FinishedStage:
    artifact = None if forced else _read_artifact(stage.folder)
    status = "reused"
    # A run that was killed after it wrote the artifact has left its lock file and checkpoints.
    working = stage.folder / artifacts.WORKING
    if artifact is None or distributed.broadcast_from_main(working.exists()):
        with folder_lock(stage.folder, display.info):
            if forced and distributed.is_main():
                clear_folder(stage.folder)
            artifact = _read_artifact(stage.folder)  # another run may have finished it by now
            if artifact is None:
                status = "ran"
                artifact = _execute(stage, recipe, display)
            if distributed.is_main():
                _remove_working_files(stage)
    display.end(stage.name, status, artifact.seconds, artifact.headline)
    for line in (*artifact.remarks, *earlier_names(stage, artifact)):
        display.info(f"{stage.name}: {line}")
    if stage.config.trains_model and artifact.world_size != distributed.world_size():
        count, now = _processes(artifact.world_size), distributed.world_size()
        LOGGER.warning("%s: trained by %s; this run has %d", stage.name, count, now)
    if signals.requested():
        raise signals.Interrupted  # the signal came while the stage was being completed
    return FinishedStage(
        name=stage.name,
        stage=stage.stage,
        digest=stage.digest,
        folder=stage.folder,
        status=status,
        seconds=artifact.seconds,
        metrics=artifact.metrics,
        tables=tuple(ResultTable(**table) for table in artifact.tables),
    )


def earlier_names(stage: PlannedStage, artifact: artifacts.Artifact) -> Iterator[str]:
    """A line for each compared GGUF file that had another name when its results were written."""
    earlier = input_names(stage.config.inputs, artifact.recipe)
    for key, name in stage.config.input_names().items():
        is_compared = key != "model" and stage.inputs[key] in stage.gguf_files
        if is_compared and earlier.get(key, name) != name:
            yield f"the results name {name} as it was called then, {earlier[key]}"


def _processes(count: int) -> str:
    return f"{count} process{'es' * (count > 1)}"


def _read_artifact(folder: Path) -> artifacts.Artifact | None:
    """The artifact of a folder as read by the main process, so that all processes agree."""
    artifact = artifacts.read_artifact(folder) if distributed.is_main() else None
    return distributed.broadcast_from_main(artifact)


def _execute(stage: PlannedStage, recipe: Recipe, display: Display) -> artifacts.Artifact:
    """Run a stage and write its artifact."""
    started = time.monotonic()
    seed = getattr(stage.config, "seed", None)
    distributed.reset_process_state(seed or 0)
    if distributed.is_main():
        _remove_leftovers(stage.folder)
        checkpoints.set_aside_damaged(
            stage.folder, lambda line: display.info(f"{stage.name}: {line}")
        )
        artifacts.check_kinds(stage.folder)
    distributed.barrier()
    resumes = checkpoints.list_checkpoints(stage.folder)
    display.start(stage.name, stage.folder, "resuming" if resumes else "running")
    result = _stage_result(stage, recipe, display)
    artifact = artifacts.Artifact(
        stage=stage.stage,
        name=stage.name,
        digest=stage.digest,
        recipe=artifacts.without_credentials(stage.config.model_dump(exclude={"stage"})),
        inputs={
            key: {"folder": str(target), "digest": stage.digests[key]}
            for key, target in stage.inputs.items()
        },
        metrics=result.metrics,
        versions=artifacts.versions(),
        commit=artifacts.commit(),
        seed=seed,
        world_size=distributed.world_size(),
        seconds=round(time.monotonic() - started, 3),
        peak_memory_bytes=distributed.peak_memory_bytes(),
        headline=result.headline,
        remarks=list(result.remarks),
        tables=[asdict(table) for table in result.tables],
    )
    distributed.barrier()
    if distributed.is_main():
        if stage.config.trains_model:
            write_model_card(stage.folder, artifact)
        artifacts.write_artifact(stage.folder, artifact)
    return distributed.broadcast_from_main(artifact)


def _stage_result(stage: PlannedStage, recipe: Recipe, display: Display) -> StageResult:
    """Run a stage: on all processes, or on the main one while the others wait."""
    main, alone = distributed.is_main(), stage.config.main_process_only
    watch = LiveAdvice(stage.stage, stage.folder / "metrics.jsonl") if main else None
    logger = Logger(stage.name, stage.folder, display, main=main, watch=watch)
    result = StageResult({})
    placed_error: UserError | None = None
    if main or not alone:
        try:
            result = stage_module(stage.stage).run(stage.config, stage.inputs, stage.folder, logger)
        except UserError as error:
            lines = [recipe.line([stage.name], line) for line in error.lines]
            placed_error = type(error)(*lines)
            if not alone:
                raise placed_error from error
        except Exception as error:
            placed_error = _full_memory_or_disk(error, stage, recipe)
            if placed_error is None:
                raise
            if not alone:
                raise placed_error from error
    if alone:
        # Broadcast, so that no process waits for ever.
        placed_error = distributed.broadcast_from_main(placed_error)
        if placed_error is not None:
            raise placed_error
    return result


def _full_memory_or_disk(error: Exception, stage: PlannedStage, recipe: Recipe) -> UserError | None:
    """The user's error for a lack of memory or of room on the disk; None for other errors."""
    shortage = out_of_memory.shortage(error)
    if shortage is not None:
        return UserError(out_of_memory_line(shortage, stage, recipe))
    failed_write = exit_codes.describe_failed_write(error)
    if failed_write is not None:
        return ArtifactError(f"{stage.folder}: {failed_write}; {exit_codes.RESUMES}")
    return None


def stage_module(kind: str) -> Any:
    """The module of a kind of stage, ``align.stages.<kind>``, imported only when it runs."""
    return importlib.import_module(f"align.stages.{kind}")


def _remove_working_files(stage: PlannedStage) -> None:
    """Remove what only an unfinished stage needs. Called after the artifact has been written."""
    _remove_leftovers(stage.folder)
    if not getattr(stage.config, "keep_checkpoints", True):
        for checkpoint in stage.folder.glob("checkpoint-*"):
            _remove(checkpoint)


def check_removable(folder: Path) -> None:
    """Check that ``--force`` removes nothing outside the runs folder.

    Raises:
        ArtifactError: The stage's folder is a symbolic link.
    """
    if folder.is_symlink():
        raise ArtifactError(
            f"{folder}: a symbolic link to {os.readlink(folder)}, which --force does not empty; "
            "remove the link"
        )


def _remove_leftovers(folder: Path) -> None:
    """Remove caches and temporary files that an interrupted run may have left in a stage."""
    for path in (folder / ".cache", *folder.glob(artifacts.TEMPORARY), *folder.glob("*.tmp")):
        with contextlib.suppress(OSError):  # it may be missing
            _remove(path)


def clear_folder(folder: Path) -> None:
    """Remove the files of a stage, first those that mark it as finished or resumable."""
    marks = [folder / artifacts.FILE]
    for checkpoint in folder.glob("checkpoint-*"):
        if checkpoint.is_dir() and not checkpoint.is_symlink():
            marks.append(checkpoint / checkpoints.COMPLETE_MARK)
    for mark in filter(os.path.lexists, marks):
        _remove(mark)
    for path in folder.iterdir():
        if path.name != artifacts.WORKING:
            _remove(path)


def _remove(path: Path) -> None:
    """Remove a file, a folder, or a symbolic link without what it points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
