"""Time to solve CartPole-v1: PPO of Align against PPO of Stable-Baselines3, alternating by seed.

    pip install -c constraints.txt -e ".[control]" stable-baselines3
    OMP_NUM_THREADS=1 python benchmarks/control.py

Align uses the settings of ``recipes/control/cartpole_ppo.yaml``, Stable-Baselines3 those that RL
Baselines3 Zoo tuned for CartPole (hyperparams/ppo.yml). After each update of Align, and every
2,048 environment steps of SB3, the greedy policy plays 100 episodes; a seed is solved at a mean
return of 475. The time of this evaluation, the same for both, is not counted. Steps per second are
those until then. A seed that is never solved counts as infinitely slow.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

from align.config import recipe
from align.config.base import GymEnvironment
from align.control import spaces
from align.control.environments import Environments
from align.control.policy_gradient import PolicyGradientTrainer

CARTPOLE, SOLVED_RETURN, EPISODES, EVERY = "CartPole-v1", 475.0, 100, 2048
RECIPE = Path(__file__).parents[1] / "recipes" / "control" / "cartpole_ppo.yaml"
Act = Callable[[np.ndarray], np.ndarray]


class Result(NamedTuple):
    """Seconds and environment steps of training, and the mean return at its end."""

    seconds: float
    steps: int
    mean_return: float


def mean_return(act: Act, seed: int) -> float:
    """Mean return of the first episode of each of 100 environments."""
    environments = Environments(CARTPOLE, {}, EPISODES)
    observations = environments.reset(1_000_000 + seed)
    returns = np.full(EPISODES, math.nan)
    while np.isnan(returns).any():
        step = environments.step(act(observations))
        first = np.isnan(returns) & step.ended
        returns[first] = step.returns[np.isnan(returns)[step.ended]]
        observations = step.observations
    environments.close()
    return float(returns.mean())


def train_align(seed: int) -> Result:
    """Train with the settings of the recipe."""
    config = recipe.load_recipe(RECIPE, []).stages["control"]
    trainer = PolicyGradientTrainer(config, spaces.inspect_env(GymEnvironment(CARTPOLE, {})), seed)

    @torch.no_grad()
    def act(observations: np.ndarray) -> np.ndarray:
        outputs = trainer.policy.body(torch.from_numpy(np.asarray(observations, np.float32)))
        return trainer.policy.head.env_actions(trainer.policy.head.act(outputs, 0.0))

    seconds, best = 0.0, 0.0
    while not trainer.done:
        started = time.perf_counter()
        trainer.train_step()
        seconds += time.perf_counter() - started
        best = mean_return(act, seed)
        if best >= SOLVED_RETURN:
            break
    return Result(seconds, trainer.steps, best)


class EvaluationCallback(BaseCallback):
    """Evaluates between an update and the next rollout, with the clock stopped."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed, self.seconds, self.best = seed, 0.0, 0.0
        self.started = 0.0

    def _on_rollout_start(self) -> None:
        if self.num_timesteps:
            self.seconds += time.perf_counter() - self.started
            if self.num_timesteps % EVERY == 0:
                self.evaluate()
        self.started = time.perf_counter()

    def evaluate(self) -> None:
        """Play 100 episodes greedily."""
        policy = self.model.policy
        self.best = mean_return(lambda x: policy.predict(x, deterministic=True)[0], self.seed)

    def _on_step(self) -> bool:
        return self.best < SOLVED_RETURN


def train_sb3(seed: int) -> Result:
    """Train with the settings of the zoo, for at most 100,000 steps."""
    callback = EvaluationCallback(seed)
    model = PPO(
        "MlpPolicy",
        make_vec_env(CARTPOLE, n_envs=8, seed=seed),
        n_steps=32,
        batch_size=256,
        gae_lambda=0.8,
        gamma=0.98,
        n_epochs=20,
        ent_coef=0.0,
        learning_rate=lambda left: 0.001 * left,
        clip_range=lambda left: 0.2 * left,
        seed=seed,
        device="cpu",
    )
    callback.started = time.perf_counter()
    model.learn(100_000, callback=callback)
    if callback.best < SOLVED_RETURN:
        callback.seconds += time.perf_counter() - callback.started
        callback.evaluate()
    # Training stops one step of all environments after the evaluation.
    steps = model.num_timesteps - (8 if callback.best >= SOLVED_RETURN else 0)
    return Result(callback.seconds, steps, callback.best)


def main() -> None:
    """Read the command line, measure, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--json", type=Path, help="write all results to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sides = {"Align": train_align, "SB3": train_sb3}
    for train in sides.values():  # imports and compiles everything outside the measurement
        train(1234)
    results: dict[str, dict[int, Result]] = {name: {} for name in sides}
    print(f"{'seed':>6} {'':6} {'seconds':>8} {'steps':>8} {'steps/s':>9} {'return':>7}")
    for place, seed in enumerate(args.seeds):
        for name in list(sides)[:: 1 if place % 2 == 0 else -1]:
            each = results[name][seed] = sides[name](seed)
            print(
                f"{seed:6} {name:6} {each.seconds:8.2f} {each.steps:8,}"
                f" {each.steps / each.seconds:9,.0f} {each.mean_return:7.1f}",
                flush=True,
            )
    seconds = {
        n: median(f.seconds if f.mean_return >= SOLVED_RETURN else math.inf for f in by.values())
        for n, by in results.items()
    }
    speed = {n: median(f.steps / f.seconds for f in by.values()) for n, by in results.items()}
    for name in sides:
        print(f"median {name:6} {seconds[name]:8.2f} {'':8} {speed[name]:9,.0f}")
    print(
        f"Align takes {seconds['Align'] / seconds['SB3']:.2f} of the seconds of SB3,"
        f" at {speed['Align'] / speed['SB3']:.1f} times its steps per second"
    )
    if args.json:
        args.json.write_text(
            json.dumps(
                {n: {s: f._asdict() for s, f in by.items()} for n, by in results.items()}, indent=1
            )
        )


def median(values: Any) -> float:
    """Median as a float."""
    return float(statistics.median(list(values)))


if __name__ == "__main__":
    main()
