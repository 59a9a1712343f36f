"""KTO: train a policy on desirable and undesirable completions with TRL's KTOTrainer.

TRL tokenizes the rows when the trainer is built; ``align data show --stage kto`` prints the result.

Align builds the batches (:mod:`align.training.kto_batches`): each has both labels, every epoch has
another order, and the KL completion of a row belongs to another prompt. TRL reads its rows
sequentially because it pairs KL completions in advance. Here they are paired when a batch is
collated, so any order works.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets
from trl import KTOConfig, KTOTrainer
from trl.data_utils import unpair_preference_dataset

from align.config.training import KTO
from align.data import tables
from align.models import adapters, files
from align.runtime.progress import Logger
from align.runtime.results import StageResult
from align.training import row_limits, speed, trl_trainer
from align.training.kto_batches import (
    LabeledRows,
    MixedLabels,
    label_weights,
    weights_warning,
    with_kl_partners,
)
from align.training.token_batches import TokenBatchTrainer, use_token_batches

COLUMNS = ["prompt", "completion", "label"]


class LabelTrainer(TokenBatchTrainer, KTOTrainer):
    """TRL's trainer of KTO, whose batches may have a number of tokens."""


def run(
    config: KTO, inputs: Mapping[str, Path | str], output_dir: Path, logger: Logger
) -> StageResult:
    """Train ``config.model`` towards desirable completions and away from undesirable ones."""
    trainer = build(config, inputs, output_dir)
    weights = label_weights(config, trainer.train_dataset.labels)
    warnings = () if weights.is_recommended else (weights_warning(weights),)
    metrics = trl_trainer.train(trainer, output_dir, logger)  # 6. train
    metrics |= {
        "parameters": trl_trainer.count_parameters(trainer),
        "desirable_weight": weights.desirable,
        "undesirable_weight": weights.undesirable,
        "weight_ratio": weights.ratio,
        "warnings": list(warnings),
    }
    remarks = tuple(f"warning: {warning}" for warning in warnings)
    return StageResult(metrics, trl_trainer.headline(metrics), remarks)


def build(config: KTO, inputs: Mapping[str, Path | str], output_dir: Path) -> LabelTrainer:
    """Build the trainer. Before the first step, the policy equals its reference to the last bit."""
    trainer = build_with_trl_batches(config, inputs, output_dir)
    # 5. batches
    if config.tokens_per_batch is not None:
        trainer.train_dataset = rows = LabeledRows(trainer.train_dataset)
        use_token_batches(
            trainer,
            config,
            lambda row: [row["prompt_ids"] + row["completion_ids"]],
            blocks=rows.blocks(config.seed),
        )
    else:  # each rank receives `size` consecutive rows as its batch
        size = trainer.args.per_device_train_batch_size
        trainer.train_dataset = MixedLabels(
            trainer.train_dataset, batch_size=size, seed=config.seed
        )
    if trainer.eval_dataset is not None and _evaluates(trainer.args):
        size = trainer.args.per_device_eval_batch_size
        trainer.eval_dataset = MixedLabels(trainer.eval_dataset, batch_size=size, seed=config.seed)
    if trainer.calculate_KL:
        trainer.data_collator = functools.partial(with_kl_partners, trainer.data_collator)
    return trainer


def build_with_trl_batches(
    config: KTO, inputs: Mapping[str, Path | str], output_dir: Path
) -> LabelTrainer:
    """Build the trainer with TRL's order of rows.

    In each block of 1,000 rows, all desirable completions precede all others.
    """
    data = Path(inputs["preferences"])
    train_rows = labeled_rows(data, "train", output_dir)  # 1. data
    assert train_rows is not None
    weights = label_weights(config, train_rows["label"])
    arguments = trl_trainer.trl_arguments(
        KTOConfig,
        output_dir,
        seed=config.seed,
        trainer=config.trainer,
        beta=config.beta,
        desirable_weight=weights.desirable,
        undesirable_weight=weights.undesirable,
    )
    models = adapters.load_policy_and_reference(config, inputs["model"])  # 2. models
    limit = row_limits.max_length(config, files.position_limit(models.policy.config))
    arguments.max_length = limit
    with trl_trainer.construction(models.policy, models.tokenizer, config):
        trainer = LabelTrainer(  # 3. trainer
            model=models.policy,
            ref_model=models.reference,
            args=arguments,
            train_dataset=train_rows,
            eval_dataset=labeled_rows(data, "validation", output_dir),
            processing_class=models.tokenizer,
            peft_config=models.new_adapter,
        )
    if "ref" in getattr(trainer.model, "peft_config", {}):
        adapters.copy_adapter(trainer.model, "default", "ref")  # TRL leaves embeddings out
    row_limits.check_lost_rows(config, trainer, train_rows, limit)
    speed.speed_up(trainer, config)  # 4. speed
    return trainer


def _evaluates(arguments: KTOConfig) -> bool:
    strategy: Any = arguments.eval_strategy
    return str(strategy).rpartition(".")[2].lower() != "no" or bool(arguments.eval_on_start)


def labeled_rows(data: Path, split: str, output_dir: Path) -> Dataset | None:
    """Labeled completions of a split, and both completions of each pair; None without rows.

    Raises:
        UserError: The training split has neither.
    """
    parts: list[Dataset] = []
    if tables.has_table(data, "unpaired", split):
        parts.append(tables.load_dataset(data, "unpaired", split, output_dir))
    if tables.has_table(data, "pairs", split) or (split == "train" and not parts):
        pairs = tables.load_dataset(data, "pairs", split, output_dir)
        parts.append(unpair_preference_dataset(pairs))
    return concatenate_datasets([part.select_columns(COLUMNS) for part in parts]) if parts else None
