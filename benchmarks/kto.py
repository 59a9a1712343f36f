"""KTO head to head: the same trainer of TRL, model, pairs and settings; only the order of the rows differs.

    OMP_NUM_THREADS=1 python benchmarks/kto.py --seeds 0 1 2

Model, data and settings are those of ``recipes/kto.yaml`` with ``all.seed=N``. The sides:

- ``trl``: pairs as TRL's trainer takes them itself: blocks of 1,000 of one label, the same order every epoch
- ``shuffled``: the unpaired rows shuffled once by the seed before TRL's trainer sees them, what a careful user does
- ``align``: both labels in every batch, both sides of a pair together, a fresh order every epoch, KL partners of another prompt

Each policy, and SFT, answers the held-out prompts; a win is a higher gold score than SFT's answer. Intervals are bootstraps
over prompts; "all seeds" pools the seeds' outcomes of a prompt.
"""

# ruff: noqa: E402 (see `quiet_libraries`)

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

from align.config import recipe
from align.config.evaluate import Evaluate
from align.config.training import KTO
from align.functional import winrate
from align.pipeline import runner
from align.runtime import distributed
from align.runtime.environment import quiet_libraries
from align.runtime.progress import Display, Logger
from align.training import trl_trainer

quiet_libraries()  # before what reads the environment is imported

import pyarrow.parquet as pq
import torch
from rich.console import Console

RECIPE = Path(__file__).parents[1] / "recipes" / "kto.yaml"
SIDES = ("trl", "shuffled", "align")


def trained(
    side: str, settings: KTO, inputs: dict[str, Any], folder: Path, logger: Logger
) -> float:
    """Train one side into ``folder``, and return the seconds that took."""
    from align.stages import kto

    distributed.reset_process_state(settings.seed)
    trainer = (kto.build if side == "align" else kto.as_trl_feeds_it)(settings, inputs, folder)
    if side == "shuffled":
        # The KL completions are TRL's, made anew in the new order by TRL's own code.
        plain = ["prompt", "completion", "label"]
        rows = trainer.train_dataset.select_columns(plain).shuffle(seed=settings.seed)
        tokenizer = trainer.processing_class
        trainer.train_dataset = trainer._prepare_dataset(rows, tokenizer, trainer.args, "train")
    started = time.monotonic()
    trl_trainer.train(trainer, folder, logger)
    return time.monotonic() - started


def outcomes(folder: Path, policy: str) -> torch.Tensor:
    """``[prompts, completions]``: 1 where the policy's answer scores higher than SFT's, 0.5 where both score the same."""
    rows = [r for r in pq.read_table(folder / "comparisons.parquet").to_pylist() if r["policy"] == policy]  # fmt: skip
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    scores = {side: [[r[f"{side}_score"] for r in rows if r["prompt"] == p] for p in prompts] for side in ("policy", "baseline")}  # fmt: skip
    return winrate.outcomes(torch.tensor(scores["policy"]), torch.tensor(scores["baseline"]))


def shown(found: torch.Tensor) -> str:
    """A win rate with its interval."""
    low, high = winrate.proportion_interval(found.double(), level=0.95, resamples=2000, seed=0)
    return (
        f"{100 * winrate.win_rate(found.double()).item():.1f} % ({100 * low:.1f}–{100 * high:.1f})"
    )


def main() -> None:
    """Read the command line, train and evaluate all sides, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--sides", nargs="*", choices=SIDES, default=list(SIDES))
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where SFT is reused, or trained")  # fmt: skip
    parser.add_argument("overrides", nargs="*", default=[], help="as in a recipe: kto.beta=0.2")
    args = parser.parse_intermixed_args()
    distributed.init_process_group()
    display = Display(Console(quiet=True))
    wins: dict[str, dict[int, torch.Tensor]] = {side: {} for side in args.sides}
    seconds: dict[str, list[float]] = {side: [] for side in args.sides}
    for seed in args.seeds:
        read = recipe.load_recipe(RECIPE, [f"all.seed={seed}", *args.overrides])
        done = runner.run_recipe(read, args.runs, display, until="sft").stages
        data, sft = (stage.folder for stage in done)
        settings, asked = read.stages["kto"], read.stages["evaluate"]
        assert isinstance(settings, KTO)
        assert isinstance(asked, Evaluate)
        place = args.runs / "benchmark-kto" / f"seed-{seed}"
        for side in args.sides:
            folder = place / side
            shutil.rmtree(folder, ignore_errors=True)  # its checkpoints would be gone on from
            folder.mkdir(parents=True)
            display.start(side, folder, "running")
            inputs = {"model": sft, "preferences": data}
            logger = Logger(side, folder, display, main=True)
            seconds[side].append(trained(side, settings, inputs, folder, logger))
        from align.stages import evaluate

        asked = asked.model_copy(update={"policies": list(args.sides), "implicit_rewards": False})
        targets = {f"policies.{i}": place / side for i, side in enumerate(args.sides)}
        logger = Logger("evaluate", place, display, main=True)
        display.start("evaluate", place, "running")
        metrics = evaluate.run(
            asked, {**targets, "baseline": sft, "prompts": data}, place, logger
        ).metrics
        (place / "metrics.json").write_text(json.dumps(metrics, indent=1))
        for side in args.sides:
            wins[side][seed] = outcomes(place, side)
            print(f"seed {seed}: {side}: {shown(wins[side][seed])}, {seconds[side][-1]:.0f} s", flush=True)  # fmt: skip

    print("\n| order of rows | " + " | ".join(f"seed {seed}" for seed in args.seeds) + " | all seeds | seconds |")  # fmt: skip
    print("|---|" + "---|" * (len(args.seeds) + 2))
    for side in args.sides:
        cells = [shown(found) for found in wins[side].values()]
        pooled = torch.cat(list(wins[side].values()), dim=1)
        mean = sum(seconds[side]) / len(seconds[side])
        print(f"| `{side}` | {' | '.join(cells)} | {shown(pooled)} | {mean:.0f} |")
    for side in [side for side in args.sides if side != "align" and "align" in args.sides]:
        both = [torch.cat(list(wins[each].values()), dim=1).double() for each in ("align", side)]
        gain = (both[0] - both[1]).mean(dim=1)
        low, high = winrate.bootstrap_interval(gain, level=0.95, resamples=2000, seed=0)
        print(f"\n`align` minus `{side}`: {100 * gain.mean().item():+.1f} points ({100 * low:+.1f} to {100 * high:+.1f}), paired by prompt")  # fmt: skip


if __name__ == "__main__":
    main()
