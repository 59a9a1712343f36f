"""Control: an environment in, a policy for each seed and its learning curve out.

Seeds are trained one after another; where a launch has several processes, they share them. Each seed's result is the
same whichever process trains it. It runs on the CPU: these networks are too small for a GPU to gain anything.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from align.config.control import Control
from align.control import plots, policy_files, spaces
from align.control.trainer import Plan, PolicyGradientTrainer, evaluate
from align.errors import UserError
from align.functional.masked import single_process
from align.functional.winrate import bootstrap_interval
from align.rl.update import Objective
from align.runtime import artifacts, checkpoints, distributed, signals
from align.runtime.progress import Logger

SECONDS_BETWEEN_CHECKPOINTS = 20.0
SECONDS_BETWEEN_LINES = 0.2
SHOWN = ("return", "entropy", "kl")


def run(
    settings: Control, inputs: Mapping[str, Path | str], folder: Path, track: Logger
) -> dict[str, Any]:
    """Train and evaluate each seed that is not done yet; draw the curves of all."""
    try:
        world = spaces.inspect_env(
            settings.environment, settings.environment_options, settings.distribution
        )
    except spaces.UnfitError as error:
        raise UserError(f"{error.key}: {error}") from None
    if distributed.is_main():
        policy_files.describe(
            folder,
            environment=settings.environment,
            options=settings.environment_options,
            world=world,
            hidden=settings.hidden,
            activation=settings.activation,
            distribution=settings.distribution,
            seeds=settings.seeds,
        )
    mine = settings.seeds[distributed.rank() :: distributed.world_size()]
    with _one_thread(), single_process():
        for seed in mine:
            if not _curve_file(folder, seed).exists():
                _train(settings, world, seed, folder, track)
    distributed.barrier()
    if not distributed.is_main():
        return {}
    done = {seed: _read(_curve_file(folder, seed)) for seed in settings.seeds}
    title = f"{settings.algorithm} on {settings.environment}"
    plots.draw({s: d["curve"] for s, d in done.items()}, folder / "curves.png", title=title)
    return _metrics(settings, done)


def plan(settings: Control) -> Plan:
    """The recipe's settings with the algorithm's own for what it leaves out."""
    ppo, reinforce = settings.algorithm == "ppo", settings.algorithm == "reinforce"
    clip = (settings.clip or 0.2) if ppo else math.inf
    objective = Objective(
        epochs=(settings.epochs or 4) if ppo else 1,
        minibatches=(settings.minibatches or 4) if ppo else 1,
        clip_low=clip,
        clip_high=settings.clip_high or clip,
        value_clip=settings.value_clip,
        entropy_coef=settings.entropy_coef,
        max_grad_norm=settings.max_grad_norm or math.inf,
        target_kl=settings.target_kl,
        whiten=settings.whiten,
    )
    return Plan(
        environment=settings.environment,
        options=settings.environment_options,
        envs=settings.envs,
        steps=settings.steps,
        stretch=None if reinforce else settings.stretch or (128 if ppo else 16),
        baseline=settings.baseline,
        gamma=settings.gamma,
        lam=settings.lam if settings.lam is not None else 1.0 if reinforce else 0.95,
        objective=objective,
        learning_rate=settings.learning_rate,
        value_learning_rate=settings.value_learning_rate or settings.learning_rate,
        schedule=settings.schedule,
        hidden=tuple(settings.hidden),
        activation=settings.activation,
        distribution=settings.distribution,
        normalize_observations=settings.normalize_observations,
        normalize_rewards=settings.normalize_rewards,
    )


def _train(
    settings: Control, world: spaces.EnvSpec, seed: int, folder: Path, track: Logger
) -> None:
    """Train one seed, from its last checkpoint on, and evaluate it."""
    learner = PolicyGradientTrainer(plan(settings), world, seed)
    before = settings.seeds.index(seed) * settings.steps
    for checkpoint in reversed(_checkpoints(settings, seed, folder)):
        learner.restore(torch.load(checkpoint / "state.pt", weights_only=False))
        track.say(f"seed {seed}: going on from step {learner.steps:,}: {checkpoint}")
        break
    track.rewind(before + learner.steps)
    total = settings.steps * len(settings.seeds)
    saved = shown = time.monotonic()
    with signals.deferred() as stop:
        while not learner.done:
            point = learner.advance()
            done = before + min(learner.steps, settings.steps)
            track.log(done, {"seed": seed, **point})
            now = time.monotonic()
            if now - shown > SECONDS_BETWEEN_LINES or learner.done:
                shown = now
                line = {"seed": seed} | {k: point[k] for k in SHOWN if point[k] is not None}
                track.step(done, total, line)
            if not learner.done and (stop.requested or now - saved > SECONDS_BETWEEN_CHECKPOINTS):
                _checkpoint(settings, learner, folder)
                saved = time.monotonic()
            if stop.requested:
                raise signals.Interrupted
    learner.environments.close()
    returns = evaluate(
        learner.policy,
        settings.environment,
        settings.environment_options,
        statistics=learner.statistics,
        episodes=settings.episodes,
        seed=seed,
    )
    policy_files.save(
        folder / f"policy-{seed}.safetensors", learner.policy, learner.critic, learner.statistics
    )
    found = {
        "seed": seed,
        "steps": learner.steps,
        "seconds": round(learner.seconds, 3),
        "returns": returns.tolist(),
        "curve": learner.curve,
    }
    artifacts.write_json(_curve_file(folder, seed), found)
    for checkpoint in _checkpoints(settings, seed, folder):
        if not settings.keep_checkpoints:
            shutil.rmtree(checkpoint)


def _curve_file(folder: Path, seed: int) -> Path:
    """A seed's curve and evaluation: written last, so a seed that has it is done."""
    return folder / f"curve-{seed}.json"


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


# Checkpoints -----------------------------------------------------------------------------------------------------------
# Their numbers count the steps of the seeds one after another, so those of one seed lie between those of its neighbours.
# A seed's last update may take more steps than it has left: the lines of metrics.jsonl do not count those.


def _checkpoints(settings: Control, seed: int, folder: Path) -> list[Path]:
    first = settings.seeds.index(seed) * settings.steps
    mine = range(first + 1, first + settings.steps)
    return [
        c for c in checkpoints.list_checkpoints(folder) if int(c.name.rpartition("-")[2]) in mine
    ]


def _checkpoint(settings: Control, learner: PolicyGradientTrainer, folder: Path) -> None:
    """Write a checkpoint whole, and then remove those before it."""
    older = _checkpoints(settings, learner.seed, folder)
    number = settings.seeds.index(learner.seed) * settings.steps + learner.steps
    target = folder / f"checkpoint-{number}"
    target.mkdir(exist_ok=True)
    torch.save(learner.state(), target / "state.pt")
    checkpoints.mark_complete(target, world_size=distributed.world_size())
    for checkpoint in older:
        if checkpoint != target and not settings.keep_checkpoints:
            shutil.rmtree(checkpoint)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """A second thread gains nothing on layers this small, and waits by spinning."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# Figures ---------------------------------------------------------------------------------------------------------------


def _metrics(settings: Control, done: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    rows = []
    for seed, result in done.items():
        returns = torch.tensor(result["returns"], dtype=torch.float64)
        interval = bootstrap_interval(
            returns, level=settings.level, resamples=settings.resamples, seed=seed
        )
        rows.append(
            {
                "seed": seed,
                "mean_return": float(returns.mean()),
                "ci": list(interval),
                "lowest": float(returns.min()),
                "steps": result["steps"],
                "seconds": result["seconds"],
                "steps_per_second": round(result["steps"] / result["seconds"], 1),
            }
        )
    means = [row["mean_return"] for row in rows]
    return {
        "environment": settings.environment,
        "algorithm": settings.algorithm,
        "episodes": settings.episodes,
        "control": rows,
        "mean_return": statistics.fmean(means),
        "lowest_mean_return": min(means),
        "steps_per_second": statistics.median(row["steps_per_second"] for row in rows),
    }
