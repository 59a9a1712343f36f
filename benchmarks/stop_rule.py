"""The stop rule: how often it stops healthy runs by chance, and what it does to runs that decline.

    OMP_NUM_THREADS=1 python benchmarks/stop_rule.py --seeds 0 1 2

First a simulation: the win rate of a policy that never declines is given for each check, its
comparisons are drawn, and the incumbent is chosen as in training. The share of the runs that are
stopped must be at most ``ALPHA``; intervals are 95 %.

Then, for each seed, ``recipes/overoptimization/stop.yaml`` with 250 pairs, once with each judge;
finished stages are reused. The seed is that of both reward models and of both runs; all start from
one SFT model. Gold is the mean over the held-out prompts. Without seeds (``--seeds``), only the
simulation runs, in seconds.
"""

# ruff: noqa: E402 (see `quiet_libraries`)

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from align.config.recipe import load_recipe
from align.pipeline import api
from align.pipeline.runner import FinishedStage
from align.runtime.environment import quiet_libraries

quiet_libraries()  # before libraries that read the environment are imported

import torch

from align.functional.intervals import proportion_interval
from align.functional.sequential import decline_e_values

RECIPE = Path(__file__).parents[1] / "recipes" / "overoptimization" / "stop.yaml"
JUDGES = {"gold": "gold", "judge_model": "reward model"}
RUNS = {"stopped": "reward model", "healthy": "gold"}
SEEDED = ("reward", "policy", "samples", "labels", "judge_model", *RUNS)
ALPHA, CHECKS, COMPARISONS = 0.05, 10, 256
"""Those of the recipe."""
SIMULATED = 20_000
STRENGTHS = {
    "never learns": [0.0] * (CHECKS + 1),
    "learns, then stays the same": [0.3 * min(check, 4) for check in range(CHECKS + 1)],
}
"""Strength of the policy at the start and in each check; it wins with probability
``sigmoid(its strength - the incumbent's)``."""


def simulated_stops(strengths: list[float], ties: float, *, seed: int) -> torch.Tensor:
    """Whether each simulated run is stopped, as 0 or 1 ``[runs]``.

    ``ties`` is the share of comparisons without a winner.
    """
    generator = torch.Generator().manual_seed(seed)
    incumbent = torch.full((SIMULATED,), strengths[0])
    outcomes = torch.empty(SIMULATED, len(strengths) - 1, COMPARISONS)
    for check, strength in enumerate(strengths[1:]):
        chances = torch.sigmoid(strength - incumbent)[:, None]
        wins = (torch.rand(SIMULATED, COMPARISONS, generator=generator) < chances).float()
        tied = torch.rand(SIMULATED, COMPARISONS, generator=generator) < ties
        outcomes[:, check] = wins.masked_fill(tied, 0.5)
        incumbent[outcomes[:, check].mean(1) >= 0.5] = strength
    e_values = decline_e_values(outcomes, planned=len(strengths) - 1)
    return (e_values.max(1).values >= 1 / ALPHA).float()


def simulate() -> None:
    """Print the share of healthy runs that the rule stops."""
    print(f"| a policy that | ties | stopped of {SIMULATED:,} | at most |\n|---|---|---|---|")
    for name, strengths in STRENGTHS.items():
        for ties in (0.0, 0.3):
            stopped = simulated_stops(strengths, ties, seed=0)
            low, high = proportion_interval(stopped[:, None])
            rate = f"{stopped.mean():.2%} ({low:.2%} to {high:.2%})"
            print(f"| {name} | {ties:.0%} | {rate} | {ALPHA:.0%} |".replace("%", " %"))


def row(judge: str, run: str, seed: int, finished: FinishedStage) -> str:
    """A row of the table of runs."""
    lines = (finished.folder / "held_out.jsonl").read_text().splitlines()
    gold: dict[int, list[float]] = {}
    for line in lines:
        held_out = json.loads(line)
        gold.setdefault(held_out["step"], []).append(held_out["gold"])
    means = {step: math.fsum(each) / len(each) for step, each in sorted(gold.items())}
    stop, last = finished.metrics.stop, max(means)
    after = f"{last} updates" if stop.is_stopped else "not stopped"
    golds = ", ".join(f"{each:.2f}" for each in (means[0], max(means.values()), means[last]))
    saved = f"step {stop.best_step}, {means[stop.best_step]:.2f}"
    return f"| {JUDGES[judge]} | {RUNS[run]} | {seed} | {stop.e_value:.2f} | {after} | {golds} | {saved} |"  # fmt: skip


def main() -> None:
    """Simulate, run what is not finished, and print both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("overrides", nargs="*", help="of the recipe, behind `--`")
    args = parser.parse_args()
    simulate()
    rows = []
    for seed in args.seeds:
        for judge in JUDGES:
            overrides = ["pairs.max_rows=250", *(f"{stage}.seed={seed}" for stage in SEEDED)]
            overrides += [*(f"{run}.stop.judge={judge}" for run in RUNS), *args.overrides]
            finished = api.run(load_recipe(RECIPE, overrides), args.runs)
            rows += [(judge, run, seed, finished[run]) for run in RUNS]
    if rows:
        print("\n| judge | reward | seed | e-value, limit 20 | stopped after | gold: start, highest, last | saved |")  # fmt: skip
        print("|---|---|---|---|---|---|---|")
        for each in sorted(rows, key=lambda r: (list(JUDGES).index(r[0]), list(RUNS).index(r[1]), r[2])):  # fmt: skip
            print(row(*each))


if __name__ == "__main__":
    main()
