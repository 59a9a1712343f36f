"""DPO: train a policy on preference pairs with TRL's DPOTrainer.

TRL tokenizes the rows when the trainer is built; ``align data show --stage dpo`` prints the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl import DPOConfig

from align.config.training import DPO
from align.data import tables
from align.models import adapters, files, logps
from align.runtime.progress import Logger
from align.runtime.results import StageResult
from align.training import reference_logps, row_limits, speed, trl_trainer
from align.training.dpo_trainer import TokenWeightedDPOTrainer
from align.training.token_batches import use_token_batches


def run(
    config: DPO, inputs: Mapping[str, Path | str], output_dir: Path, logger: Logger
) -> StageResult:
    """Train ``config.model`` to prefer the chosen completions of ``config.pairs``."""
    trainer = build(config, inputs, output_dir)
    metrics: dict[str, Any] = {}
    if reference_logps.can_precompute(trainer):  # 5. reference log-probabilities
        with logps.small_vocabulary_tiles():
            metrics["reference"] = reference_logps.add_reference_logps(
                trainer,
                inputs={"model": inputs["model"], "pairs": Path(inputs["pairs"])},
                runs=output_dir.parent,
                logger=logger,
            )
    metrics |= trl_trainer.train(trainer, output_dir, logger)  # 6. train
    metrics["parameters"] = trl_trainer.count_parameters(trainer)
    return StageResult(metrics, trl_trainer.headline(metrics))


def build(
    config: DPO, inputs: Mapping[str, Path | str], output_dir: Path
) -> TokenWeightedDPOTrainer:
    """Build the trainer. Before the first step, the policy equals its reference to the last bit."""
    data = Path(inputs["pairs"])
    arguments = trl_trainer.trl_arguments(
        DPOConfig, output_dir, seed=config.seed, trainer=config.trainer, beta=config.beta
    )
    train_rows = tables.load_dataset(data, "pairs", "train", output_dir)  # 1. data
    held_out_rows = tables.load_dataset(data, "pairs", "validation", output_dir)
    models = adapters.load_policy_and_reference(config, inputs["model"])  # 2. models
    limit = row_limits.max_length(config, files.position_limit(models.policy.config))
    arguments.max_length = limit
    with trl_trainer.construction(models.policy, models.tokenizer, config):
        trainer = TokenWeightedDPOTrainer(  # 3. trainer
            model=models.policy,
            ref_model=models.reference,
            args=arguments,
            train_dataset=train_rows,
            eval_dataset=held_out_rows,
            processing_class=models.tokenizer,
            peft_config=models.new_adapter,
        )
    if "ref" in getattr(trainer.model, "peft_config", {}):
        adapters.copy_adapter(trainer.model, "default", "ref")  # TRL leaves embeddings out
    row_limits.check_lost_rows(config, trainer, train_rows, limit)
    use_token_batches(
        trainer,
        config,
        lambda row: [row["prompt_ids"] + row[side] for side in ("chosen_ids", "rejected_ids")],
    )
    speed.speed_up(trainer, config)  # 4. speed
    return trainer
