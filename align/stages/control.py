"""Control: train one policy per seed on a Gymnasium environment, and evaluate it.

Seeds are trained one after another, and the ranks share them. The result of a seed does not depend
on the rank that trains it. Training runs on the CPU: these networks are too small for a GPU.
"""

from __future__ import annotations

import contextlib
import pickle
import shutil
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from align.config.control.base import Control
from align.control import plots, policy_files, recorded_steps, spaces
from align.control.build import build_trainer
from align.control.evaluate import evaluate
from align.control.trainer import Trainer
from align.errors import ArtifactError, UserError
from align.evaluation.intervals import Bootstrap
from align.functional.masked import single_process
from align.runtime import artifacts, checkpoints, checksums, distributed, signals
from align.runtime.progress import Logger
from align.runtime.results import ResultTable, StageResult
from align.runtime.tracking import reporting

SECONDS_BETWEEN_CHECKPOINTS = 20.0
SECONDS_BETWEEN_LINES = 0.2
SHOWN = ("return", "cost", "exploitability", "value", "change", "entropy", "kl")
"""Metrics of the progress display."""


def run(
    config: Control, inputs: Mapping[str, Path | str], output_dir: Path, logger: Logger
) -> StageResult:
    """Train and evaluate each seed that is not finished; draw the learning curves of all."""
    try:
        (environment,) = config.gym_environments
        spec = spaces.inspect_env(environment)
    except spaces.UnfitError as error:
        raise UserError(f"{error.key}: {error}") from None
    if distributed.is_main():
        policy_files.describe(output_dir, config, spec)
    folders = [Path(folder) for folder in inputs.values()]
    own_seeds = config.seeds[distributed.rank() :: distributed.world_size()]
    with _one_thread(), single_process():
        finished = True  # so far: the metrics of a seed precede those of later ones
        for seed in own_seeds:
            finished = finished and _is_finished(output_dir, seed, logger)
            if not finished:
                # Of an earlier run, if this seed is trained again.
                _remove_checkpoints(config, own_seeds[own_seeds.index(seed) + 1 :], output_dir)
                _train(config, spec, seed, folders, output_dir, logger)
    distributed.barrier()
    if not distributed.is_main():
        return StageResult({})
    results = {seed: _read_result(output_dir, seed) for seed in config.seeds}
    title = f"{config.algorithm} on {config.environment}"
    curves = {seed: result["curve"] for seed, result in results.items()}
    plots.draw_curves(curves, output_dir / plots.FILE, title=title)
    metrics = _metrics(config, results)
    return StageResult(
        metrics,
        headline={key: metrics[key] for key in ("mean_return", "steps_per_second")},
        tables=(_table(config, metrics, output_dir),),
    )


def _train(
    config: Control,
    spec: spaces.EnvSpec,
    seed: int,
    folders: Sequence[Path],
    output_dir: Path,
    logger: Logger,
) -> None:
    """Train one seed, from its last checkpoint if there is one, and evaluate it."""
    trainer = build_trainer(config, spec, seed, folders)
    steps_of_earlier_seeds = config.seeds.index(seed) * config.steps
    checkpoint = checkpoints.newest_intact(seed_checkpoints(config, seed, output_dir), logger.info)
    if checkpoint is not None:
        trainer.restore(_load_state(checkpoint / "state.pt"))
        logger.info(f"seed {seed}: resuming from step {trainer.steps:,}: {checkpoint}")
    logger.rewind(steps_of_earlier_seeds + trainer.steps)
    total = config.steps * len(config.seeds)
    saved = shown = time.monotonic()
    trackers = reporting(
        config.report_to,
        logger,
        output_dir,
        settings=config.model_dump(),
        done=steps_of_earlier_seeds + trainer.steps,
    )
    with signals.deferred() as stop, trackers:
        while not trainer.done:
            point = trainer.train_step()
            done = steps_of_earlier_seeds + min(trainer.steps, config.steps)
            logger.log(done, {"seed": seed, **point})
            now = time.monotonic()
            if now - shown > SECONDS_BETWEEN_LINES or trainer.done:
                shown = now
                line = {"seed": seed} | {k: point[k] for k in SHOWN if point.get(k) is not None}
                logger.step(done, total, line)
            if not trainer.done and (stop.requested or now - saved > SECONDS_BETWEEN_CHECKPOINTS):
                _save_checkpoint(config, trainer, output_dir)
                saved = time.monotonic()
            if stop.requested:
                raise signals.Interrupted
    trainer.close()
    _finish(config, trainer, output_dir)


def _finish(config: Control, trainer: Trainer[Any], output_dir: Path) -> None:
    """Evaluate a trained seed, write its files and remove its checkpoints."""
    seed = trainer.seed
    place: dict[str, Any] = {
        "environment": config.environment,
        "options": config.environment_options,
        "statistics": trainer.statistics,
        "seed": seed,
    }
    evaluation = evaluate(trainer.policy, episodes=config.episodes, **place)
    file = policy_files.policy_file(output_dir, seed)
    policy_files.save(file, trainer.policy, trainer.critic, trainer.statistics)
    files = [file]
    if config.n_recorded_steps:
        files.append(recorded_steps.steps_file(output_dir, seed))
        steps = recorded_steps.record(trainer.policy, steps=config.n_recorded_steps, **place)
        recorded_steps.save(files[-1], steps)
    result = {
        "seed": seed,
        "steps": trainer.steps,
        "seconds": max(round(trainer.seconds, 3), 0.001),
        "returns": evaluation.returns.tolist(),
        "curve": trainer.curve,
        "files": checksums.record_files(output_dir, files),
    }
    if not bool(evaluation.costs.isnan().any()):
        result["costs"] = evaluation.costs.tolist()
    artifacts.write_json(_result_file(output_dir, seed), checksums.seal(result))
    if not config.keep_checkpoints:
        _remove_checkpoints(config, [seed], output_dir)


def _result_file(folder: Path, seed: int) -> Path:
    """Curve and evaluation of a seed. It is written last: a seed that has it is finished."""
    return folder / f"curve-{seed}.json"


def _is_finished(folder: Path, seed: int, logger: Logger) -> bool:
    """Whether an interrupted run has finished a seed; a damaged file is logged."""
    try:
        problems = checksums.content_problems(folder, _read_result(folder, seed)["files"])
    except FileNotFoundError:
        return False
    except ArtifactError as error:
        problems = list(error.lines)
    for line in problems:
        logger.info(f"{line}; trained again from seed {seed} on")
    return not problems


def _read_result(folder: Path, seed: int) -> dict[str, Any]:
    return checksums.read_sealed(_result_file(folder, seed))


def _load_state(file: Path) -> Any:
    """The state of a trainer: tensors and numbers, never code."""
    try:
        return torch.load(file, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError):
        raise ArtifactError(
            f"{file}: not the state of a trainer (code in it is not run); remove this checkpoint"
        ) from None


# Checkpoints --------------------------------------------------------------------------------------
# Their numbers count the steps of all seeds, one after another. The last update of a seed may take
# more steps than remain; the lines of metrics.jsonl do not count those.


def seed_checkpoints(config: Control, seed: int, folder: Path) -> list[Path]:
    """Complete checkpoints of a seed, oldest first."""
    first = config.seeds.index(seed) * config.steps
    own_numbers = range(first + 1, first + config.steps)
    return [
        checkpoint
        for checkpoint in checkpoints.list_checkpoints(folder)
        if int(checkpoint.name.rpartition("-")[2]) in own_numbers
    ]


def _remove_checkpoints(config: Control, seeds: Iterable[int], folder: Path) -> None:
    """Remove the checkpoints of some seeds."""
    for seed in seeds:
        for checkpoint in seed_checkpoints(config, seed, folder):
            shutil.rmtree(checkpoint)


def _save_checkpoint(config: Control, trainer: Trainer[Any], folder: Path) -> None:
    """Write a complete checkpoint, then remove the older ones."""
    older = seed_checkpoints(config, trainer.seed, folder)
    number = config.seeds.index(trainer.seed) * config.steps + trainer.steps
    target = folder / f"checkpoint-{number}"
    target.mkdir(exist_ok=True)
    torch.save(trainer.state(), target / "state.pt")
    checkpoints.mark_complete(target, world_size=distributed.world_size())
    for checkpoint in older:
        if checkpoint != target and not config.keep_checkpoints:
            shutil.rmtree(checkpoint)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread: on layers this small, others would only busy-wait."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


# Results ------------------------------------------------------------------------------------------


def _metrics(config: Control, results: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Metrics of each seed, and their means over seeds."""
    rows = []
    for seed, result in results.items():
        returns = torch.tensor(result["returns"], dtype=torch.float64)
        bootstrap = Bootstrap(config.confidence, config.resamples, seed)
        costs: dict[str, Any] = {}
        if "costs" in result:
            of_episodes = torch.tensor(result["costs"], dtype=torch.float64)
            costs["mean_cost"] = float(of_episodes.mean())
            costs["cost_ci"] = list(bootstrap.mean(of_episodes))
        rows.append(
            {
                "seed": seed,
                "mean_return": float(returns.mean()),
                "ci": list(bootstrap.mean(returns)),
                "lowest": float(returns.min()),
                **costs,
                "steps": result["steps"],
                "seconds": result["seconds"],
                "steps_per_second": round(result["steps"] / result["seconds"], 1),
            }
        )
    means = [row["mean_return"] for row in rows]
    return {
        "environment": config.environment,
        "algorithm": config.algorithm,
        "episodes": config.episodes,
        "control": rows,
        "mean_return": statistics.fmean(means),
        "lowest_mean_return": min(means),
        "steps_per_second": statistics.median(row["steps_per_second"] for row in rows),
    }


def _table(config: Control, metrics: Mapping[str, Any], output_dir: Path) -> ResultTable:
    """One row per seed."""
    rows = metrics["control"]
    digits = 1 if any(abs(row["mean_return"]) >= 10 for row in rows) else 3
    has_costs = "mean_cost" in rows[0]

    return ResultTable(
        title=f"{config.algorithm} on {config.environment}, greedy policy; "
        f"mean return of {config.episodes} episodes",
        columns=(
            *("seed", "return", "interval", "lowest"),
            *(("cost",) if has_costs else ()),
            *("steps", "seconds", "steps/s"),
        ),
        rows=[
            (
                str(row["seed"]),
                f"{row['mean_return']:.{digits}f}",
                " to ".join(dict.fromkeys(f"{end:.{digits}f}" for end in row["ci"])),
                f"{row['lowest']:.{digits}f}",
                *((f"{row['mean_cost']:.{digits}f}",) if has_costs else ()),
                f"{row['steps']:,}",
                f"{row['seconds']:.2f}",
                f"{row['steps_per_second']:,.0f}",
            )
            for row in rows
        ],
        note=f"curves: {output_dir / plots.FILE}",
    )
