"""The chain: run what is not there, reuse what is.

A folder ``runs/<name>-<digest>`` with an ``artifact.json`` is that stage, done; one without is that stage, cut off, and the
same command goes on there.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from align import artifact, checks, interrupts, processes
from align.errors import UserError
from align.planning import Step, plan
from align.recipe import Recipe
from align.settings import Prepare, Trained
from align.tracking import Display, Track


def run(
    recipe: Recipe,
    runs: Path,
    display: Display,
    *,
    force: str | None = None,
    until: str | None = None,
) -> dict[str, Any]:
    """Run what is not there yet, in order, and write ``runs/<recipe>/summary.json``. Returns the summary.

    Raises:
        UserError: What can be known before training is known before it: all of it, at once.
    """
    steps = plan(recipe, runs, until=until, force=force)
    checks.writable(runs)
    due = [step for step in steps if step.status != "reused"]
    checks.hub_models(recipe, due)
    checks.environments(recipe, due)
    checks.functions(recipe, due)
    checks.samplers(recipe, due)
    started = time.monotonic()
    if due or processes.world_size() > 1:
        processes.join()
        checks.trainer_arguments(recipe, due)
    done = []
    for step in steps:
        done.append(_run_or_reuse(step, recipe, display, forced=force in ("all", step.name)))
        if isinstance(step.settings, Prepare):
            checks.prepared(recipe, step.folder, due)
    summary = {
        "recipe": str(recipe.path),
        "seconds": round(time.monotonic() - started, 3),
        "stages": done,
    }
    if processes.is_main():
        artifact.write_json(runs / recipe.name / "summary.json", summary)
    processes.wait()
    return summary


def _run_or_reuse(step: Step, recipe: Recipe, display: Display, *, forced: bool) -> dict[str, Any]:
    made = None if forced else _finished(step.folder)
    status = "reused"
    # Killed between its artifact and the tidying, a stage is complete and has its lock file still.
    if made is None or processes.from_main((step.folder / artifact.WORKING).exists()):
        with _lock(step.folder, display):
            if forced and processes.is_main():
                _empty(step.folder)
            made = _finished(step.folder)  # another run may have finished it while this one waited
            if made is None:
                status = "ran"
                made = _execute(step, recipe, display)
            if processes.is_main():
                _tidy(step)
    display.end(step.name, status, made.seconds, _headline(made.metrics))
    for line in _remarks(made.metrics):
        display.say(f"{step.name}: {line}")
    if isinstance(step.settings, Trained) and made.world_size != processes.world_size():
        now = processes.world_size()
        many = "process" if made.world_size == 1 else "processes"
        display.say(f"{step.name}: trained by {made.world_size} {many}; this run has {now}")
    if interrupts.requested():
        raise interrupts.Interrupted  # it came when the stage was about to be complete
    return {
        "name": step.name,
        "stage": step.stage,
        "digest": step.digest,
        "folder": str(step.folder),
        "status": status,
        "seconds": made.seconds,
        "metrics": made.metrics,
    }


def _finished(folder: Path) -> artifact.Artifact | None:
    """The artifact of a folder, as the main process finds it: all must take the same way."""
    found = artifact.read(folder) if processes.is_main() else None
    return processes.from_main(found)


def _execute(step: Step, recipe: Recipe, display: Display) -> artifact.Artifact:
    main = processes.is_main()
    started = time.monotonic()
    seed = getattr(step.settings, "seed", None)
    processes.clean_state(seed or 0)
    display.start(
        step.name, step.folder, "going on" if artifact.checkpoints(step.folder) else "running"
    )
    track = Track(step.name, step.folder, display, main=main)
    metrics: dict[str, Any] = {}
    wrong: list[str] = []
    if main or not step.settings.main_process_only:
        try:
            metrics = _stage(step.stage).run(step.settings, step.inputs, step.folder, track)
        except UserError as error:
            wrong = [f"{recipe.at(step.name)}: {line}" for line in error.lines]
            if not step.settings.main_process_only:
                raise UserError(*wrong) from error
    if step.settings.main_process_only:
        wrong = processes.from_main(wrong)  # else the others would wait for it for ever
        if wrong:
            raise UserError(*wrong)
    made = artifact.Artifact(
        stage=step.stage,
        name=step.name,
        digest=step.digest,
        recipe=step.settings.model_dump(exclude={"stage"}),
        inputs={
            role: {"folder": str(target), "digest": step.digests[role]}
            for role, target in step.inputs.items()
        },
        metrics=metrics,
        versions=artifact.versions(),
        commit=artifact.commit(),
        seed=seed,
        world_size=processes.world_size(),
        seconds=round(time.monotonic() - started, 3),
        peak_memory_bytes=processes.peak_memory_bytes(),
    )
    processes.wait()
    if main:
        artifact.write(step.folder, made)
    return processes.from_main(made)


def _stage(name: str) -> Any:
    """The module of a stage, imported when it runs: the name is the address."""
    return importlib.import_module(f"align.stages.{name}")


def _tidy(step: Step) -> None:
    """What a complete stage needs no more. After the artifact: a crash in between loses nothing."""
    shutil.rmtree(step.folder / ".cache", ignore_errors=True)
    if not getattr(step.settings, "keep_checkpoints", True):
        for checkpoint in step.folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)


def _empty(folder: Path) -> None:
    """Remove what a stage wrote; cut off in between, it is an unfinished stage without a checkpoint."""
    (folder / artifact.FILE).unlink(missing_ok=True)
    for mark in folder.glob(f"checkpoint-*/{artifact.CHECKPOINT_COMPLETE}"):
        mark.unlink()
    for path in folder.iterdir():
        if path.name == artifact.WORKING:
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
    """What a person must know of prepared data: what was kept, what was dropped and why, and warnings."""
    for kind in ("demonstrations", "pairs"):
        splits = metrics.get(kind)
        if isinstance(splits, Mapping):
            held_out = sum(splits.values()) - splits["train"]
            yield f"{splits['train']:,} {kind}, and {held_out:,} held out"
    dropped = metrics.get("dropped")
    if dropped:
        yield "dropped " + "; ".join(f"{count} × {reason}" for reason, count in dropped.items())
    yield from (f"warning: {line}" for line in metrics.get("warnings", ()))


@contextmanager
def _lock(folder: Path, display: Display) -> Iterator[None]:
    """One run a stage: a second one says who holds it, and waits. The system frees the lock of a killed one."""
    if not processes.is_main():
        processes.wait()
        yield
        return
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be a folder ({error.strerror}); move it away") from None
    holder = folder / artifact.WORKING
    lock = FileLock(holder)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        display.say(f"{folder}: held by {_holder(holder)}; waiting for it to finish")
        lock.acquire()
    try:
        since = datetime.now().isoformat(timespec="seconds")
        who = {"pid": os.getpid(), "host": os.uname().nodename, "since": since}
        # Written through another name would replace the locked file: its content is changed in place.
        holder.write_text(json.dumps(who), encoding="utf-8")
        processes.wait()
        yield
        if artifact.read(folder) is not None:
            holder.unlink(missing_ok=True)
    finally:
        lock.release()


def _holder(path: Path) -> str:
    try:
        who = json.loads(path.read_text(encoding="utf-8"))
        return f"process {who['pid']} on {who['host']} since {who['since']}"
    except (OSError, ValueError, KeyError):
        return "another run"
