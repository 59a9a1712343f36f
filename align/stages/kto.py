"""KTO: completions labelled desirable or undesirable and an SFT model in, an aligned model out. TRL does the training.

The batches are ours (:mod:`align.training.kto_batches`): both labels in each, a fresh order every epoch, and a KL completion that is
never of its own prompt. TRL's trainer reads its rows in sequence because it pairs KL completions ahead; here they are
paired when a batch is put together, so any order will do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from datasets import concatenate_datasets
from trl import KTOConfig, KTOTrainer
from trl.data_utils import unpair_preference_dataset

from align.config.training import KTO
from align.data import tables
from align.models import adapters
from align.models.prefix_sharing import wrapper
from align.runtime.progress import Logger
from align.runtime.results import StageResult
from align.training import trl_trainer
from align.training.kto_batches import MixedLabels, label_weights, weights_warning, with_kl_partners


def run(
    config: KTO, inputs: Mapping[str, Path | str], output_dir: Path, logger: Logger
) -> StageResult:
    """Train ``config.model`` towards desirable completions and away from undesirable ones."""
    trainer = build(config, inputs, output_dir, say=logger.info)
    weights = label_weights(config, trainer.train_dataset.labels)
    found = trl_trainer.train(trainer, output_dir, logger)
    return StageResult(
        found
        | {
            "parameters": sum(p.numel() for p in trainer.model.parameters()),
            "desirable_weight": weights.desirable,
            "undesirable_weight": weights.undesirable,
            "weight_ratio": weights.ratio,
            "warnings": [] if weights.advised else [weights_warning(weights)],
        }
    )


def build(
    config: KTO,
    inputs: Mapping[str, Path | str],
    folder: Path,
    say: Callable[[str], None] | None = None,
) -> KTOTrainer:
    """The trainer, with batches of ours, and the policy and its reference: equal to the last bit before the first step."""
    trainer = as_trl_feeds_it(config, inputs, folder, say=say)
    size = trainer.args.per_device_train_batch_size
    # Sharded over processes, each stretch of `size` rows goes to one of them as a batch.
    trainer.train_dataset = MixedLabels(trainer.train_dataset, batch_size=size, seed=config.seed)
    if trainer.eval_dataset is not None and _evaluates(trainer.args):
        size = trainer.args.per_device_eval_batch_size
        trainer.eval_dataset = MixedLabels(trainer.eval_dataset, batch_size=size, seed=config.seed)
    if trainer.calculate_KL:
        trainer.data_collator = functools.partial(with_kl_partners, trainer.data_collator)
    return trainer


def _evaluates(arguments: Any) -> bool:
    return str(arguments.eval_strategy).rpartition(".")[2].lower() != "no" or bool(
        arguments.eval_on_start
    )


def as_trl_feeds_it(
    config: KTO,
    inputs: Mapping[str, Path | str],
    folder: Path,
    say: Callable[[str], None] | None = None,
) -> KTOTrainer:
    """TRL's trainer with its own order of rows: all desirable, then all undesirable, by blocks of 1,000."""
    source, data = inputs["model"], Path(inputs["preferences"])
    rows = _labelled(data, "train", folder)
    assert rows is not None
    weights = label_weights(config, rows["label"])
    arguments = trl_trainer.trl_arguments(
        KTOConfig,
        folder,
        seed=config.seed,
        trainer=config.trainer,
        beta=config.beta,
        desirable_weight=weights.desirable,
        undesirable_weight=weights.undesirable,
    )
    models = adapters.load_policy_and_reference(config, source)
    with trl_trainer.trl_errors_as_user_errors():
        trainer = KTOTrainer(
            model=models.policy,
            ref_model=models.reference,
            args=arguments,
            train_dataset=rows,
            eval_dataset=_labelled(data, "validation", folder),
            processing_class=models.tokenizer,
            peft_config=models.new_adapter,
        )
    if config.prefix_sharing:  # the trainer's own: it has put a new adapter around the policy
        wrapper.enable_prefix_sharing(trainer.model, trainer.ref_model, say=say)
    return trainer


def _labelled(data: Path, split: str, folder: Path) -> Any:
    """The rows of a split that have labels of their own, and both sides of those that come in pairs."""
    parts: list[Any] = []
    if tables.has_table(data, "unpaired", split):
        parts.append(tables.load_dataset(data, "unpaired", split, folder))
    if tables.has_table(data, "pairs", split) or (split == "train" and not parts):
        parts.append(unpair_preference_dataset(tables.load_dataset(data, "pairs", split, folder)))
    wanted = ["prompt", "completion", "label"]
    return concatenate_datasets([part.select_columns(wanted) for part in parts]) if parts else None
