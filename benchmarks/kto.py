"""KTO with TRL's order of rows and with mixed batches: the same trainer, model and pairs.

    OMP_NUM_THREADS=1 python benchmarks/kto.py --seeds 0 1 2

Model, data and settings are those of ``recipes/kto.yaml`` with ``all.seed=N``. The variants:

- ``trl``: pairs as TRL's trainer unpairs them, in blocks of 1,000 rows of one label, in the same
  order in every epoch
- ``shuffled``: the unpaired rows, shuffled once before TRL's trainer receives them
- ``align``: both labels in every batch, both sides of a pair together, another order in every
  epoch, KL partners of another prompt

Each policy, and the SFT model, completes the held-out prompts. A win is a higher gold score than
that of the SFT model. Intervals are bootstraps over prompts; "all seeds" pools the outcomes of a
prompt over the seeds.
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

quiet_libraries()  # before libraries that read the environment are imported

import pyarrow.parquet as pq
import torch
from rich.console import Console

RECIPE = Path(__file__).parents[1] / "recipes" / "kto.yaml"
VARIANTS = ("trl", "shuffled", "align")


def train(variant: str, config: KTO, inputs: dict[str, Any], folder: Path, logger: Logger) -> float:
    """Train one variant into ``folder``. Returns the seconds."""
    from align.stages import kto

    distributed.reset_process_state(config.seed)
    build = kto.build if variant == "align" else kto.build_with_trl_batches
    trainer = build(config, inputs, folder)
    if variant == "shuffled":
        # TRL assigns the KL completions again, in the new order.
        rows = trainer.train_dataset.select_columns(kto.COLUMNS).shuffle(seed=config.seed)
        tokenizer = trainer.processing_class
        with trl_trainer.construction(trainer.model, tokenizer, config):  # TRL tokenizes as we do
            trainer.train_dataset = trainer._prepare_dataset(rows, tokenizer, trainer.args, "train")
    started = time.monotonic()
    trl_trainer.train(trainer, folder, logger)
    return time.monotonic() - started


def outcomes(folder: Path, policy: str) -> torch.Tensor:
    """Outcomes against the SFT model, ``[prompts, completions]``: 1 win, 0.5 tie, 0 loss."""
    rows = [r for r in pq.read_table(folder / "comparisons.parquet").to_pylist() if r["policy"] == policy]  # fmt: skip
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    scores = {side: [[r[f"{side}_score"] for r in rows if r["prompt"] == p] for p in prompts] for side in ("policy", "baseline")}  # fmt: skip
    return winrate.outcomes(torch.tensor(scores["policy"]), torch.tensor(scores["baseline"]))


def win_rate_cell(wins: torch.Tensor) -> str:
    """A win rate with its interval."""
    low, high = winrate.proportion_interval(wins.double(), confidence=0.95, resamples=2000, seed=0)
    return (
        f"{100 * winrate.win_rate(wins.double()).item():.1f} % ({100 * low:.1f}–{100 * high:.1f})"
    )


def main() -> None:
    """Read the command line, train and evaluate all variants, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder in which SFT is reused, or trained")  # fmt: skip
    parser.add_argument("overrides", nargs="*", default=[], help="as in a recipe: kto.beta=0.2")
    args = parser.parse_intermixed_args()
    distributed.init_process_group()
    display = Display(Console(quiet=True))
    wins: dict[str, dict[int, torch.Tensor]] = {variant: {} for variant in args.variants}
    seconds: dict[str, list[float]] = {variant: [] for variant in args.variants}
    for seed in args.seeds:
        loaded = recipe.load_recipe(RECIPE, [f"all.seed={seed}", *args.overrides])
        finished = runner.run_recipe(loaded, args.runs, display, until="sft").stages
        data, sft = (stage.folder for stage in finished)
        config, evaluation = loaded.stages["kto"], loaded.stages["evaluate"]
        assert isinstance(config, KTO)
        assert isinstance(evaluation, Evaluate)
        seed_folder = args.runs / "benchmark-kto" / f"seed-{seed}"
        for variant in args.variants:
            folder = seed_folder / variant
            shutil.rmtree(folder, ignore_errors=True)  # its checkpoints would be resumed
            folder.mkdir(parents=True)
            display.start(variant, folder, "running")
            inputs = {"model": sft, "preferences": data}
            logger = Logger(variant, folder, display, main=True)
            seconds[variant].append(train(variant, config, inputs, folder, logger))
        from align.stages import evaluate

        evaluation = evaluation.model_copy(
            update={"policies": list(args.variants), "implicit_rewards": False}
        )
        targets = {
            f"policies.{i}": seed_folder / variant for i, variant in enumerate(args.variants)
        }
        logger = Logger("evaluate", seed_folder, display, main=True)
        display.start("evaluate", seed_folder, "running")
        metrics = evaluate.run(
            evaluation, {**targets, "baseline": sft, "prompts": data}, seed_folder, logger
        ).metrics
        (seed_folder / "metrics.json").write_text(json.dumps(metrics, indent=1))
        for variant in args.variants:
            wins[variant][seed] = outcomes(seed_folder, variant)
            rate = win_rate_cell(wins[variant][seed])
            print(f"seed {seed}: {variant}: {rate}, {seconds[variant][-1]:.0f} s", flush=True)

    print("\n| order of rows | " + " | ".join(f"seed {seed}" for seed in args.seeds) + " | all seeds | seconds |")  # fmt: skip
    print("|---|" + "---|" * (len(args.seeds) + 2))
    for variant in args.variants:
        cells = [win_rate_cell(rates) for rates in wins[variant].values()]
        pooled = torch.cat(list(wins[variant].values()), dim=1)
        mean = sum(seconds[variant]) / len(seconds[variant])
        print(f"| `{variant}` | {' | '.join(cells)} | {win_rate_cell(pooled)} | {mean:.0f} |")
    others = [each for each in args.variants if each != "align" and "align" in args.variants]
    for variant in others:
        both = [torch.cat(list(wins[each].values()), dim=1).double() for each in ("align", variant)]
        gain = (both[0] - both[1]).mean(dim=1)
        low, high = winrate.bootstrap_interval(gain, confidence=0.95, resamples=2000, seed=0)
        print(f"\n`align` minus `{variant}`: {100 * gain.mean().item():+.1f} points ({100 * low:+.1f} to {100 * high:+.1f}), paired by prompt")  # fmt: skip


if __name__ == "__main__":
    main()
