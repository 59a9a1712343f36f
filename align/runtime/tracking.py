"""Metrics of a stage to experiment trackers: TensorBoard, W&B, MLflow, trackio.

The trackers are those of accelerate. Each process of a run logs through the main one, and every
metric has the name of its stage in front, such as ``ppo/score``. Stages with a TRL trainer report
through transformers instead: ``trainer: {report_to: ...}``.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from align.errors import UserError
from align.runtime.progress import Logger

TENSORBOARD_FOLDER = "runs"
"""Folder of TensorBoard's files, within that of the stage."""
LOGGER = logging.getLogger("align")


@contextlib.contextmanager
def reporting(
    names: Sequence[str],
    logger: Logger,
    folder: Path,
    *,
    settings: Mapping[str, Any],
    done: int,
) -> Iterator[None]:
    """Inside this block, what ``logger`` logs is sent to the trackers ``names`` as well.

    ``settings`` are stored with the run, and ``done`` is the number of steps that it continues
    after. A tracker that fails in the block is left out with a warning: it is no reason to lose the
    training.

    Raises:
        UserError: A tracker cannot be started.
    """
    trackers = {
        name: tracker
        for name in dict.fromkeys(names)
        for tracker in _started(name, folder, settings=settings, done=done)
    }

    def send(step: int, metrics: Mapping[str, Any]) -> None:
        values = {f"{logger.name}/{key}": value for key, value in metrics.items()}
        for name, tracker in list(trackers.items()):
            try:
                tracker.log(values, step=step)
            except Exception as error:
                del trackers[name]
                _warn(name, error)

    with logger.forwarded(send) if trackers else contextlib.nullcontext():
        try:
            yield
        finally:
            for name, tracker in trackers.items():
                try:
                    tracker.finish()
                except Exception as error:
                    _warn(name, error)


def _started(name: str, folder: Path, *, settings: Mapping[str, Any], done: int) -> list[Any]:
    """A tracker of accelerate that has begun a run."""
    from accelerate import Accelerator

    run = folder.name
    project, options = {
        "tensorboard": (TENSORBOARD_FOLDER, {"purge_step": done + 1} if done else {}),
        "wandb": (os.environ.get("WANDB_PROJECT", "huggingface"), {"name": run}),
        "mlflow": ("Default", {"run_name": run}),
        "trackio": (os.environ.get("TRACKIO_PROJECT", "huggingface"), {"name": run}),
    }[name]
    # TensorBoard would store settings as a run beside the metrics.
    stored = None if name == "tensorboard" else _plain(settings)
    try:
        accelerator = Accelerator(log_with=name, project_dir=str(folder))
        accelerator.init_trackers(project, config=stored, init_kwargs={name: options})
    except Exception as error:
        raise UserError(
            f"report_to: {name} cannot be started: {' '.join(str(error).split())}; remove it, or "
            "repair its settings"
        ) from error
    trackers: list[Any] = accelerator.trackers
    return trackers


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as the trackers accept them: nested ones as text."""
    return {
        key: value if isinstance(value, bool | int | float | str) else str(value)
        for key, value in settings.items()
    }


def _warn(name: str, error: Exception) -> None:
    reason = " ".join(str(error).split())
    LOGGER.warning("report_to: %s failed and gets no more metrics: %s", name, reason)
