"""Environment steps per second of CartPole-v1 and Pendulum-v1, with many environments at once.

    pip install -c constraints.txt -e ".[control,off-policy]"
    OMP_NUM_THREADS=1 python benchmarks/environments.py --n-envs 64 4096

Random actions, drawn before the measurement. Three ways alternate: one tensor
(``align/control/vector/batched.py``), Gymnasium's vector environments (in one array where Gymnasium
has that, otherwise one by one), and ``DummyVecEnv`` of Stable-Baselines3. The best of three rounds
counts, in processor seconds, so that other programs on the machine matter less. ``--device cuda``
steps the tensor on a GPU, without copying anything to the CPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import gymnasium
import numpy as np
import torch
from stable_baselines3.common.env_util import make_vec_env

from align.control.environments import make_vector_env
from align.control.vector.batched import BATCHED

ROUNDS, SECONDS = 3, 0.5


def ways(name: str, n_envs: int, device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """A function that takes one step of all environments, for each way."""
    space = gymnasium.vector.utils.batch_space(gymnasium.make(name).action_space, n_envs)
    space.seed(0)
    actions = space.sample()
    batched = BATCHED[name](n_envs, device=device)
    batched.reset(seed=0)
    tensor = torch.from_numpy(np.asarray(actions)).to(device)
    yield "one tensor", lambda: batched.advance(tensor)
    vector = make_vector_env(name, {}, n_envs)
    vector.reset(seed=0)
    yield "Gymnasium", lambda: vector.step(actions)
    sb3 = make_vec_env(name, n_envs=n_envs, seed=0)
    sb3.reset()
    yield "SB3", lambda: sb3.step(actions)


def measure(step: Callable[[], object], device: str) -> float:
    """Calls per second."""
    step()
    clock = time.process_time if device == "cpu" else time.perf_counter
    started, calls = clock(), 0
    while clock() - started < SECONDS:
        step()
        calls += 1
    if device != "cpu":
        torch.cuda.synchronize()
    return calls / (clock() - started)


def main() -> None:
    """Read the command line, measure, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n-envs", type=int, nargs="*", default=[64, 512, 4096])
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'environment':14} {'n_envs':>7} {'way':12} {'steps/s':>12}")
    for name in BATCHED:
        for n_envs in args.n_envs:
            steps = dict(ways(name, n_envs, args.device))
            rates = dict.fromkeys(steps, 0.0)
            for _ in range(ROUNDS):
                for way, step in steps.items():
                    device = args.device if way == "one tensor" else "cpu"
                    rates[way] = max(rates[way], measure(step, device) * n_envs)
            for way, rate in rates.items():
                print(f"{name:14} {n_envs:7,} {way:12} {rate:12,.0f}", flush=True)


if __name__ == "__main__":
    main()
