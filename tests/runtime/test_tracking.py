"""Metrics of online-RL and `control` stages in experiment trackers."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
from helpers import tiny_models

from align.config.control.policy_gradient import PolicyGradient
from align.errors import UserError
from align.runtime import tracking
from align.runtime.progress import Logger
from align.stages import control

METRICS = ({"score": 1.5, "rewards/short": 2.0}, {"score": 2.5, "rewards/short": 3.0})


@pytest.fixture
def logger(tmp_path: Path) -> Logger:
    return tiny_models.logger("grpo", tmp_path)


def report(names: list[str], logger: Logger, folder: Path, *, done: int = 0) -> None:
    """Log two steps after ``done`` inside the block, and one after it."""
    settings = {"steps": 2, "rewards": ["a"], "lora": None}
    with tracking.reporting(names, logger, folder, settings=settings, done=done):
        for step, metrics in enumerate(METRICS, start=done + 1):
            logger.log(step, metrics)
    logger.log(9, {"score": 0.0})


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of each tag in TensorBoard's files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / tracking.TENSORBOARD_FOLDER)).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_has_every_metric_with_the_stage_in_front(logger: Logger, tmp_path: Path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    report(["tensorboard"], logger, tmp_path)
    expected = {"grpo/score": [(1, 1.5), (2, 2.5)], "grpo/rewards/short": [(1, 2.0), (2, 3.0)]}
    assert scalars(tmp_path) == expected
    # A run that is resumed after step 1 writes step 2 again; it counts once.
    report(["tensorboard"], logger, tmp_path, done=1)
    assert scalars(tmp_path)["grpo/score"] == [(1, 1.5), (2, 1.5), (3, 2.5)]


def test_the_seeds_of_control_follow_one_another_on_the_axis_of_steps(tmp_path: Path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    config = PolicyGradient(
        environment="CartPole-v1", steps=128, n_envs=4, n_steps=16, seeds=[0, 1], episodes=2,
        report_to=["tensorboard"],
    )  # fmt: skip
    tiny_models.stage(control, config, {}, tmp_path / "control")
    reported = scalars(tmp_path / "control")
    assert [step for step, _ in reported["control/seed"]] == [64, 128, 192, 256]
    assert [seed for _, seed in reported["control/seed"]] == [0, 0, 1, 1]
    assert {"control/return", "control/entropy"} <= reported.keys()
    assert "report_to" not in config.digest_settings()


@pytest.mark.filterwarnings("ignore")  # of the packages that it imports
def test_wandb_without_a_network_stores_the_run(
    logger: Logger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("wandb", reason="W&B is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    report(["wandb"], logger, tmp_path)
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = file.read_bytes()
    for word in (b"grpo/score", b"grpo/rewards/short", tmp_path.name.encode()):
        assert word in content


@pytest.mark.filterwarnings("ignore")  # of the packages that it imports
def test_mlflow_stores_the_run_in_a_local_database(
    logger: Logger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    report(["mlflow"], logger, tmp_path)
    (run,) = mlflow.search_runs(output_format="list")
    assert run.info.run_name == tmp_path.name
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "grpo/score")
    assert [(point.step, point.value) for point in history] == [(1, 1.5), (2, 2.5)]
    assert run.data.params["steps"] == "2"


# With a tracker of accelerate's interface, for machines without any of them ----------------------


@pytest.fixture
def trackers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The runs that stand-ins of the trackers have recorded, by the tracker."""
    runs: dict[str, Any] = {}

    class StandIn:
        def __init__(self, log_with: str, project_dir: str) -> None:
            self.name = log_with
            self.trackers: list[Any] = []

        def init_trackers(self, project: str, config: Any, init_kwargs: Any) -> None:
            if project == "broken":
                raise ValueError("no\nserver")
            run = {"project": project, "config": config, "logged": [], "finished": 0}
            run["options"] = init_kwargs[self.name]
            runs[self.name] = run

            def log(values: dict[str, Any], step: int) -> None:
                if run.get("full"):
                    raise OSError("disk full")
                run["logged"].append((step, values))

            def finish() -> None:
                run["finished"] += 1

            self.trackers.append(SimpleNamespace(log=log, finish=finish))

    monkeypatch.setattr(accelerate, "Accelerator", StandIn)
    return runs


def test_each_tracker_gets_the_metrics_and_the_settings_of_the_run(
    logger: Logger, tmp_path: Path, trackers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WANDB_PROJECT", "tuning")
    report(["tensorboard", "wandb", "mlflow", "trackio"], logger, tmp_path, done=3)
    expected = [
        (step, {f"grpo/{key}": value for key, value in metrics.items()})
        for step, metrics in zip((4, 5), METRICS, strict=True)
    ]
    for run in trackers.values():
        assert run["logged"] == expected
        assert run["finished"] == 1
    assert trackers["wandb"]["project"] == "tuning"
    assert trackers["wandb"]["options"] == {"name": tmp_path.name}
    assert trackers["wandb"]["config"] == {"steps": 2, "rewards": "['a']", "lora": "None"}
    assert trackers["tensorboard"]["options"] == {"purge_step": 4}
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3  # as without trackers


def test_a_tracker_that_cannot_start_is_one_line_with_the_repair(
    logger: Logger, tmp_path: Path, trackers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WANDB_PROJECT", "broken")
    with pytest.raises(UserError, match="report_to: wandb cannot be started: no server; remove it"):
        report(["wandb"], logger, tmp_path)


def test_a_tracker_that_fails_during_the_run_does_not_end_it(
    logger: Logger, tmp_path: Path, trackers: dict[str, Any], caplog: pytest.LogCaptureFixture
):
    settings: dict[str, Any] = {}
    names = ["wandb", "trackio"]
    with (
        caplog.at_level(logging.WARNING, logger="align"),
        tracking.reporting(names, logger, tmp_path, settings=settings, done=0),
    ):
        logger.log(1, METRICS[0])
        trackers["wandb"]["full"] = True
        logger.log(2, METRICS[1])
        logger.log(3, METRICS[1])
    assert [step for step, _ in trackers["wandb"]["logged"]] == [1]
    assert [step for step, _ in trackers["trackio"]["logged"]] == [1, 2, 3]
    assert caplog.messages == ["report_to: wandb failed and gets no more metrics: disk full"]
