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
from align.runtime.results import StageResult

SECONDS_BETWEEN_CHECKPOINTS = 20.0
SECONDS_BETWEEN_LINES = 0.2
SHOWN = ("return", "entropy", "kl")


def run(
    config: Control, inputs: Mapping[str, Path | str], output_dir: Path, logger: Logger
) -> StageResult:
    """Train and evaluate each seed that is not done yet; draw the curves of all."""
    try:
        world = spaces.inspect_env(
            config.environment, config.environment_options, config.distribution
        )
    except spaces.UnfitError as error:
        raise UserError(f"{error.key}: {error}") from None
    if distributed.is_main():
        policy_files.describe(
            output_dir,
            environment=config.environment,
            options=config.environment_options,
            world=world,
            hidden=config.hidden_sizes,
            activation=config.activation,
            distribution=config.distribution,
            seeds=config.seeds,
        )
    mine = config.seeds[distributed.rank() :: distributed.world_size()]
    with _one_thread(), single_process():
        for seed in mine:
            if not _curve_file(output_dir, seed).exists():
                _train(config, world, seed, output_dir, logger)
    distributed.barrier()
    if not distributed.is_main():
        return StageResult({})
    done = {seed: _read(_curve_file(output_dir, seed)) for seed in config.seeds}
    title = f"{config.algorithm} on {config.environment}"
    plots.draw_curves(
        {s: d["curve"] for s, d in done.items()}, output_dir / "curves.png", title=title
    )
    return StageResult(_metrics(config, done))


def plan(config: Control) -> Plan:
    """The recipe's settings with the algorithm's own for what it leaves out."""
    ppo, reinforce = config.algorithm == "ppo", config.algorithm == "reinforce"
    clip = (config.clip or 0.2) if ppo else math.inf
    objective = Objective(
        epochs=(config.epochs or 4) if ppo else 1,
        minibatches=(config.minibatches or 4) if ppo else 1,
        clip_low=clip,
        clip_high=config.clip_high or clip,
        value_clip=config.value_clip,
        entropy_coef=config.entropy_coef,
        max_grad_norm=config.max_grad_norm or math.inf,
        target_kl=config.target_kl,
        whiten=config.normalize_advantages,
    )
    return Plan(
        environment=config.environment,
        options=config.environment_options,
        envs=config.n_envs,
        steps=config.steps,
        stretch=None if reinforce else config.n_steps or (128 if ppo else 16),
        baseline=config.baseline,
        gamma=config.gamma,
        lam=config.gae_lambda if config.gae_lambda is not None else 1.0 if reinforce else 0.95,
        objective=objective,
        learning_rate=config.learning_rate,
        value_learning_rate=config.value_learning_rate or config.learning_rate,
        schedule=config.schedule,
        hidden=tuple(config.hidden_sizes),
        activation=config.activation,
        distribution=config.distribution,
        normalize_observations=config.normalize_observations,
        normalize_rewards=config.normalize_rewards,
    )


def _train(config: Control, world: spaces.EnvSpec, seed: int, folder: Path, logger: Logger) -> None:
    """Train one seed, from its last checkpoint on, and evaluate it."""
    learner = PolicyGradientTrainer(plan(config), world, seed)
    before = config.seeds.index(seed) * config.steps
    for checkpoint in reversed(_checkpoints(config, seed, folder)):
        learner.restore(torch.load(checkpoint / "state.pt", weights_only=False))
        logger.info(f"seed {seed}: going on from step {learner.steps:,}: {checkpoint}")
        break
    logger.rewind(before + learner.steps)
    total = config.steps * len(config.seeds)
    saved = shown = time.monotonic()
    with signals.deferred() as stop:
        while not learner.done:
            point = learner.advance()
            done = before + min(learner.steps, config.steps)
            logger.log(done, {"seed": seed, **point})
            now = time.monotonic()
            if now - shown > SECONDS_BETWEEN_LINES or learner.done:
                shown = now
                line = {"seed": seed} | {k: point[k] for k in SHOWN if point[k] is not None}
                logger.step(done, total, line)
            if not learner.done and (stop.requested or now - saved > SECONDS_BETWEEN_CHECKPOINTS):
                _checkpoint(config, learner, folder)
                saved = time.monotonic()
            if stop.requested:
                raise signals.Interrupted
    learner.environments.close()
    returns = evaluate(
        learner.policy,
        config.environment,
        config.environment_options,
        statistics=learner.statistics,
        episodes=config.episodes,
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
    for checkpoint in _checkpoints(config, seed, folder):
        if not config.keep_checkpoints:
            shutil.rmtree(checkpoint)


def _curve_file(folder: Path, seed: int) -> Path:
    """A seed's curve and evaluation: written last, so a seed that has it is done."""
    return folder / f"curve-{seed}.json"


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


# Checkpoints -----------------------------------------------------------------------------------------------------------
# Their numbers count the steps of the seeds one after another, so those of one seed lie between those of its neighbours.
# A seed's last update may take more steps than it has left: the lines of metrics.jsonl do not count those.


def _checkpoints(config: Control, seed: int, folder: Path) -> list[Path]:
    first = config.seeds.index(seed) * config.steps
    mine = range(first + 1, first + config.steps)
    return [
        c for c in checkpoints.list_checkpoints(folder) if int(c.name.rpartition("-")[2]) in mine
    ]


def _checkpoint(config: Control, learner: PolicyGradientTrainer, folder: Path) -> None:
    """Write a checkpoint whole, and then remove those before it."""
    older = _checkpoints(config, learner.seed, folder)
    number = config.seeds.index(learner.seed) * config.steps + learner.steps
    target = folder / f"checkpoint-{number}"
    target.mkdir(exist_ok=True)
    torch.save(learner.state(), target / "state.pt")
    checkpoints.mark_complete(target, world_size=distributed.world_size())
    for checkpoint in older:
        if checkpoint != target and not config.keep_checkpoints:
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


def _metrics(config: Control, done: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    rows = []
    for seed, result in done.items():
        returns = torch.tensor(result["returns"], dtype=torch.float64)
        interval = bootstrap_interval(
            returns, confidence=config.confidence, resamples=config.resamples, seed=seed
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
        "environment": config.environment,
        "algorithm": config.algorithm,
        "episodes": config.episodes,
        "control": rows,
        "mean_return": statistics.fmean(means),
        "lowest_mean_return": min(means),
        "steps_per_second": statistics.median(row["steps_per_second"] for row in rows),
    }
