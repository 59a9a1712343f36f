"""The law of over-optimization over reward-model sizes and numbers of pairs, with one figure.

    OMP_NUM_THREADS=1 python benchmarks/overoptimization.py --seeds 0 1 2

Runs ``recipes/overoptimization/small.yaml`` and ``large.yaml`` with several numbers of pairs and
seeds; finished stages are reused. ``SEED`` is that of the reward model and of the policy's run; all
start from one SFT model. The gold score of the embedded task is measured on held-out prompts,
and R(d) = d (alpha - beta log d) with d = sqrt(KL) is fitted to its gain. Intervals are those of
:func:`align.functional.overoptimization.fit_overoptimization`.

Prints a table, and writes ``overoptimization.json`` into the runs folder and the figure to
``--figure``, by default beside it.
"""

# ruff: noqa: E402 (see `quiet_libraries`)

from __future__ import annotations

import argparse
import json
from pathlib import Path

from align.config.recipe import load_recipe
from align.pipeline import api
from align.runtime.environment import quiet_libraries

quiet_libraries()  # before libraries that read the environment are imported

import torch
from torch import Tensor

from align.functional.overoptimization import OveroptimizationFit, fit_overoptimization
from align.report import overoptimization as figure

RECIPES = Path(__file__).parents[1] / "recipes" / "overoptimization"
SIZES = ("small", "large")
PAIRS = (250, 1000, 4000)


def measure(size: str, pairs: int, seed: int, runs: Path) -> tuple[Tensor, Tensor, Tensor]:
    """KL, gain of gold and gain of reward of a run, each ``[prompts, points]``."""
    overrides = [f"pairs.max_rows={pairs}", f"reward.seed={seed}", f"policy.seed={seed}"]
    finished = api.run(load_recipe(RECIPES / f"{size}.yaml", overrides), runs)
    lines = (finished["policy"].folder / "held_out.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    steps = sorted({row["step"] for row in rows})
    kl, gold, reward = (
        torch.tensor([[r[key] for r in rows if r["step"] == step] for step in steps]).T
        for key in ("kl", "gold", "reward")
    )
    return kl, gold - gold[:, :1], reward - reward[:, :1]


def curve(
    size: str, pairs: int, kl: Tensor, gains: Tensor, fit: OveroptimizationFit
) -> figure.Curve:
    """What the figure shows of one reward model: the points of its runs and the fitted law."""
    distances = kl.mean(1).clamp(min=0).sqrt()
    grid = torch.linspace(0.02, 1.0, 50) * float(distances.max())
    bands = [fit.gain_interval(d) for d in grid.tolist()]
    return figure.Curve(
        panel=f"reward model: {size}",
        label=f"{pairs:,} pairs",
        points=list(
            zip(distances.flatten().tolist(), gains.mean(1).flatten().tolist(), strict=True)
        ),
        grid=grid.tolist(),
        law=[fit.gain(d) for d in grid.tolist()],
        low=[band.low for band in bands],
        high=[band.high for band in bands],
    )


def cells(fit: OveroptimizationFit) -> str:
    """The cells of a row of the table: each estimate with its interval."""
    return " | ".join(
        f"{each.value:.2f} ({each.interval.low:.2f} to {each.interval.high:.2f})"
        for each in (fit.alpha, fit.beta, fit.peak, fit.peak_gain)
    )


def main() -> None:
    """Run what is not finished, fit, print and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--pairs", type=int, nargs="+", default=list(PAIRS))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--figure", type=Path, help="the PNG file to write")
    args = parser.parse_args()
    conditions = [(size, pairs) for size in args.sizes for pairs in args.pairs]
    measured = {
        (size, pairs, seed): measure(size, pairs, seed, args.runs)
        for seed in args.seeds
        for size, pairs in conditions
    }
    curves, results = [], []
    print(
        "| reward model | pairs | alpha | beta | peak at √KL | gain at the peak | gold after | R² |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for size, pairs in conditions:
        runs = [measured[size, pairs, seed] for seed in args.seeds]
        kl, gold, _ = (torch.stack(each) for each in zip(*runs, strict=True))
        fit = fit_overoptimization(kl, gold)
        curves.append(curve(size, pairs, kl, gold, fit))
        last = float(gold[..., -1].mean())
        print(f"| {size} | {pairs:,} | {cells(fit)} | {last:+.2f} | {fit.r_squared:.2f} |")
        results.append({"size": size, "pairs": pairs, "seeds": args.seeds, "last_gain": last}
                       | {key: getattr(fit, key) for key in ("alpha", "beta", "peak", "peak_gain", "r_squared")})  # fmt: skip
    figure.draw(curves, args.figure or args.runs / "overoptimization.png")
    (args.runs / "overoptimization.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
