"""The chain: run what is not there, reuse what is.

A folder ``runs/<name>-<digest>`` with an ``artifact.json`` is that stage, done; one without is that
stage, cut off, and the same command goes on there.
"""

from __future__ import annotations

import importlib
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from align.config.recipe import Recipe
from align.errors import UserError
from align.pipeline import preflight
from align.pipeline.plan import PlannedStage, plan
from align.runtime import artifacts, checkpoints, distributed, signals
from align.runtime.locks import folder_lock
from align.runtime.progress import Display, Logger
from align.runtime.results import StageResult


def run_recipe(
    recipe: Recipe,
    runs: Path,
    display: Display,
    *,
    force: str | None = None,
    until: str | None = None,
) -> dict[str, Any]:
    """Run what is not there yet, in order, and write ``runs/<recipe>/summary.json``. Returns the
    summary.

    Raises:
        UserError: What can be known before training is known before it: all of it, at once.
    """
    steps = plan(recipe, runs, until=until, force=force)
    preflight.check_writable(runs)
    due = [step for step in steps if step.status != "reused"]
    preflight.check_before_start(recipe, due, distributed.world_size())
    started = time.monotonic()
    if due or distributed.world_size() > 1:
        distributed.init_process_group()
        preflight.check_trainer_arguments(recipe, due)
    done = []
    for step in steps:
        done.append(_run_or_reuse(step, recipe, display, forced=force in ("all", step.name)))
        if step.config.prepares_data:
            preflight.check_tables(recipe, step.folder, due)
    summary = {
        "recipe": str(recipe.path),
        "seconds": round(time.monotonic() - started, 3),
        "stages": done,
    }
    if distributed.is_main():
        artifacts.write_json(runs / recipe.name / "summary.json", summary)
    distributed.barrier()
    return summary


def _run_or_reuse(
    step: PlannedStage, recipe: Recipe, display: Display, *, forced: bool
) -> dict[str, Any]:
    made = None if forced else _read_finished(step.folder)
    status = "reused"
    # Killed between its artifact and the tidying, a stage is complete and has its lock file still.
    if made is None or distributed.broadcast_from_main((step.folder / artifacts.WORKING).exists()):
        with folder_lock(step.folder, display.info):
            if forced and distributed.is_main():
                _empty(step.folder)
            made = _read_finished(
                step.folder
            )  # another run may have finished it while this one waited
            if made is None:
                status = "ran"
                made = _execute(step, recipe, display)
            if distributed.is_main():
                _remove_working_files(step)
    display.end(step.name, status, made.seconds, made.headline or _headline(made.metrics))
    for line in made.remarks or _remarks(made.metrics):
        display.info(f"{step.name}: {line}")
    if step.config.trains_model and made.world_size != distributed.world_size():
        now = distributed.world_size()
        many = "process" if made.world_size == 1 else "processes"
        display.info(f"{step.name}: trained by {made.world_size} {many}; this run has {now}")
    if signals.requested():
        raise signals.Interrupted  # it came when the stage was about to be complete
    return {
        "name": step.name,
        "stage": step.stage,
        "digest": step.digest,
        "folder": str(step.folder),
        "status": status,
        "seconds": made.seconds,
        "metrics": made.metrics,
    }


def _read_finished(folder: Path) -> artifacts.Artifact | None:
    """The artifact of a folder, as the main process finds it: all must take the same way."""
    found = artifacts.read_artifact(folder) if distributed.is_main() else None
    return distributed.broadcast_from_main(found)


def _execute(step: PlannedStage, recipe: Recipe, display: Display) -> artifacts.Artifact:
    main = distributed.is_main()
    started = time.monotonic()
    seed = getattr(step.config, "seed", None)
    distributed.reset_process_state(seed or 0)
    display.start(
        step.name,
        step.folder,
        "going on" if checkpoints.list_checkpoints(step.folder) else "running",
    )
    logger = Logger(step.name, step.folder, display, main=main)
    result = StageResult({})
    wrong: list[str] = []
    if main or not step.config.main_process_only:
        try:
            result = stage_module(step.stage).run(step.config, step.inputs, step.folder, logger)
        except UserError as error:
            wrong = [f"{recipe.at(step.name)}: {line}" for line in error.lines]
            if not step.config.main_process_only:
                raise UserError(*wrong) from error
    if step.config.main_process_only:
        wrong = distributed.broadcast_from_main(wrong)  # else the others would wait for it for ever
        if wrong:
            raise UserError(*wrong)
    made = artifacts.Artifact(
        stage=step.stage,
        name=step.name,
        digest=step.digest,
        recipe=step.config.model_dump(exclude={"stage"}),
        inputs={
            role: {"folder": str(target), "digest": step.digests[role]}
            for role, target in step.inputs.items()
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
    if main:
        artifacts.write_artifact(step.folder, made)
    return distributed.broadcast_from_main(made)


def stage_module(name: str) -> Any:
    """The module of a stage, imported when it runs: the name is the address."""
    return importlib.import_module(f"align.stages.{name}")


def _remove_working_files(step: PlannedStage) -> None:
    """What a complete stage needs no more. After the artifact: a crash in between loses nothing."""
    shutil.rmtree(step.folder / ".cache", ignore_errors=True)
    if not getattr(step.config, "keep_checkpoints", True):
        for checkpoint in step.folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)


def _empty(folder: Path) -> None:
    """Remove what a stage wrote; cut off in between, it is an unfinished stage without a
    checkpoint."""
    (folder / artifacts.FILE).unlink(missing_ok=True)
    for mark in folder.glob(f"checkpoint-*/{checkpoints.COMPLETE_MARK}"):
        mark.unlink()
    for path in folder.iterdir():
        if path.name == artifacts.WORKING:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _headline(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a finished stage that fit on its line."""
    for comparison in metrics.get("comparisons", [])[:1]:
        return {"win_rate": comparison["win_rate"]}
    for accuracy in metrics.get("implicit_rewards", [])[:1]:
        return {"accuracy": accuracy["accuracy"]}
    if "control" in metrics:
        return {key: metrics[key] for key in ("mean_return", "steps_per_second")}
    if metrics.get("held_out"):  # of a reward model
        return {
            key: metrics["held_out"][key]
            for key in ("accuracy", "ceiling")
            if key in metrics["held_out"]
        }
    wanted = ("score", "kl", "loss", "mean_token_accuracy", "rewards/accuracies", "steps", "rows")
    return {key: metrics[key] for key in wanted if isinstance(metrics.get(key), int | float)}


def _remarks(metrics: Mapping[str, Any]) -> Iterator[str]:
    """What a person must know of prepared data: what was kept, what was dropped and why, and
    warnings."""
    for kind in ("demonstrations", "pairs"):
        splits = metrics.get(kind)
        if isinstance(splits, Mapping):
            held_out = sum(splits.values()) - splits["train"]
            yield f"{splits['train']:,} {kind}, and {held_out:,} held out"
    dropped = metrics.get("dropped")
    if dropped:
        yield "dropped " + "; ".join(f"{count} × {reason}" for reason, count in dropped.items())
    yield from (f"warning: {line}" for line in metrics.get("warnings", ()))
