"""CartPole-v1 solved by our PPO and by Stable-Baselines3's, seed by seed in turns in one run.

    pip install -c constraints.txt -e ".[control]" stable-baselines3
    OMP_NUM_THREADS=1 python benchmarks/control.py

Ours has the settings of ``recipes/control/cartpole_ppo.yaml``; theirs those that RL Baselines3 Zoo tuned for CartPole
(hyperparams/ppo.yml). Both are asked every 2,048 environment steps: has the greedy policy a mean return of 475 or more
over 100 episodes? The question is the same for both and its time is not counted, so seconds are those of training
alone. Steps a second are those until then. A seed that never gets there counts as infinitely slow.
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
from align.control import spaces
from align.control.environments import Environments
from align.control.trainer import PolicyGradientTrainer
from align.stages import control

CARTPOLE, SOLVED, EPISODES, EVERY = "CartPole-v1", 475.0, 100, 2048
RECIPE = Path(__file__).parents[1] / "recipes" / "control" / "cartpole_ppo.yaml"
Act = Callable[[np.ndarray], np.ndarray]


class Found(NamedTuple):
    """How a seed went: seconds and environment steps of training, and the mean return at its end."""

    seconds: float
    steps: int
    mean_return: float


def mean_return(act: Act, seed: int) -> float:
    """Of the first episode of each of 100 carts."""
    carts = Environments(CARTPOLE, {}, EPISODES)
    seen = carts.fresh(1_000_000 + seed)
    found = np.full(EPISODES, math.nan)
    while np.isnan(found).any():
        step = carts.step(act(seen))
        first = np.isnan(found) & step.ended
        found[first] = step.returns[np.isnan(found)[step.ended]]
        seen = step.observations
    carts.close()
    return float(found.mean())


def ours(seed: int) -> Found:
    """Train with the recipe's settings."""
    settings = recipe.load_recipe(RECIPE, []).stages["control"]
    world = spaces.inspect_env(CARTPOLE, {}, None)
    learner = PolicyGradientTrainer(control.plan(settings), world, seed)

    @torch.no_grad()
    def act(seen: np.ndarray) -> np.ndarray:
        outputs = learner.policy.body(torch.from_numpy(np.asarray(seen, np.float32)))
        return learner.policy.head.to_world(learner.policy.head.act(outputs, 0.0))

    seconds, best = 0.0, 0.0
    while not learner.done:
        begin = time.perf_counter()
        learner.advance()
        seconds += time.perf_counter() - begin
        best = mean_return(act, seed)
        if best >= SOLVED:
            break
    return Found(seconds, learner.steps, best)


class Asked(BaseCallback):
    """Asks between an update and the next rollout, with the clock stopped."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed, self.seconds, self.best = seed, 0.0, 0.0
        self.begin = 0.0

    def _on_rollout_start(self) -> None:
        if self.num_timesteps:
            self.seconds += time.perf_counter() - self.begin
            if self.num_timesteps % EVERY == 0:
                self.ask()
        self.begin = time.perf_counter()

    def ask(self) -> None:
        """Play 100 episodes greedily."""
        policy = self.model.policy
        self.best = mean_return(lambda seen: policy.predict(seen, deterministic=True)[0], self.seed)

    def _on_step(self) -> bool:
        return self.best < SOLVED


def theirs(seed: int) -> Found:
    """Train with the zoo's settings: 100,000 steps at most."""
    asked = Asked(seed)
    model = PPO(
        "MlpPolicy", make_vec_env(CARTPOLE, n_envs=8, seed=seed), n_steps=32, batch_size=256, gae_lambda=0.8, gamma=0.98,
        n_epochs=20, ent_coef=0.0, learning_rate=lambda left: 0.001 * left, clip_range=lambda left: 0.2 * left,
        seed=seed, device="cpu",
    )  # fmt: skip
    asked.begin = time.perf_counter()
    model.learn(100_000, callback=asked)
    if asked.best < SOLVED:
        asked.seconds += time.perf_counter() - asked.begin
        asked.ask()
    steps = model.num_timesteps - (
        8 if asked.best >= SOLVED else 0
    )  # it stops one step after it was asked
    return Found(asked.seconds, steps, asked.best)


def main() -> None:
    """Read the command line, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--json", type=Path, help="write every figure here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sides = {"Align": ours, "SB3": theirs}
    for train in sides.values():  # what is compiled or imported at the first use
        train(1234)
    found: dict[str, dict[int, Found]] = {name: {} for name in sides}
    print(f"{'seed':>6} {'':6} {'seconds':>8} {'steps':>8} {'steps/s':>9} {'return':>7}")
    for place, seed in enumerate(args.seeds):
        for name in list(sides)[:: 1 if place % 2 == 0 else -1]:
            each = found[name][seed] = sides[name](seed)
            print(f"{seed:6} {name:6} {each.seconds:8.2f} {each.steps:8,} {each.steps / each.seconds:9,.0f} {each.mean_return:7.1f}", flush=True)  # fmt: skip
    seconds = {n: median(f.seconds if f.mean_return >= SOLVED else math.inf for f in by.values()) for n, by in found.items()}  # fmt: skip
    speed = {n: median(f.steps / f.seconds for f in by.values()) for n, by in found.items()}
    for name in sides:
        print(f"median {name:6} {seconds[name]:8.2f} {'':8} {speed[name]:9,.0f}")
    print(f"Align takes {seconds['Align'] / seconds['SB3']:.2f} of SB3's seconds, at {speed['Align'] / speed['SB3']:.1f} times its steps a second")  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps({n: {s: f._asdict() for s, f in by.items()} for n, by in found.items()}, indent=1))  # fmt: skip


def median(values: Any) -> float:
    """The middle one."""
    return float(statistics.median(list(values)))


if __name__ == "__main__":
    main()
