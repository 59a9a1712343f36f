"""KTO: completions labelled desirable or undesirable and an SFT model in, an aligned model out. TRL does the training.

The batches are ours (:mod:`align.unpaired`): both labels in each, a fresh order every epoch, and a KL completion that is
never of its own prompt. TRL's trainer reads its rows in sequence because it pairs KL completions ahead; here they are
paired when a batch is put together, so any order will do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import concatenate_datasets
from trl import KTOConfig, KTOTrainer
from trl.data_utils import unpair_preference_dataset

from align import models, prefix_sharing, training, unpaired
from align.settings import KTO
from align.tracking import Track

COLUMNS = ("prompt_ids", "completion_ids", "label")  # that a batch is made of


def run(
    settings: KTO, inputs: Mapping[str, Path | str], folder: Path, track: Track
) -> dict[str, Any]:
    """Train ``settings.model`` towards desirable completions and away from undesirable ones."""
    trainer = build(settings, inputs, folder, say=track.say)
    weights = _weights(settings, trainer.train_dataset.labels)
    found = training.fit(trainer, folder, track)
    return found | {
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "desirable_weight": weights.desirable,
        "undesirable_weight": weights.undesirable,
        "weight_ratio": weights.ratio,
        "warnings": [] if weights.advised else [_unadvised(weights)],
    }


def build(
    settings: KTO,
    inputs: Mapping[str, Path | str],
    folder: Path,
    say: Callable[[str], None] | None = None,
) -> KTOTrainer:
    """The trainer, with batches of ours, and the policy and its reference: equal to the last bit before the first step."""
    trainer = as_trl_feeds_it(settings, inputs, folder, say=say)
    size = trainer.args.per_device_train_batch_size
    # Sharded over processes, each stretch of `size` rows goes to one of them as a batch.
    trainer.train_dataset = Mixed(trainer.train_dataset, batch_size=size, seed=settings.seed)
    if trainer.eval_dataset is not None and _evaluates(trainer.args):
        size = trainer.args.per_device_eval_batch_size
        trainer.eval_dataset = Mixed(trainer.eval_dataset, batch_size=size, seed=settings.seed)
    if trainer.calculate_KL:
        trainer.data_collator = functools.partial(_with_partners, trainer.data_collator)
    return trainer


def _evaluates(arguments: Any) -> bool:
    return str(arguments.eval_strategy).rpartition(".")[2].lower() != "no" or bool(
        arguments.eval_on_start
    )


def as_trl_feeds_it(
    settings: KTO,
    inputs: Mapping[str, Path | str],
    folder: Path,
    say: Callable[[str], None] | None = None,
) -> KTOTrainer:
    """TRL's trainer with its own order of rows: all desirable, then all undesirable, by blocks of 1,000."""
    source, data = inputs["model"], Path(inputs["preferences"])
    rows = _labelled(data, "train", folder)
    assert rows is not None
    weights = _weights(settings, rows["label"])
    arguments = training.arguments(
        KTOConfig,
        folder,
        seed=settings.seed,
        trainer=settings.trainer,
        beta=settings.beta,
        desirable_weight=weights.desirable,
        undesirable_weight=weights.undesirable,
    )
    lora = settings.lora.model_dump() if settings.lora else None
    model, adapter = models.to_train(
        source, lora=lora, dtype=settings.dtype, revision=settings.revision
    )
    reference = models.reference(
        source, lora=lora, dtype=settings.dtype, revision=settings.revision
    )
    with training.refusals():
        trainer = KTOTrainer(
            model=model,
            ref_model=reference,
            args=arguments,
            train_dataset=rows,
            eval_dataset=_labelled(data, "validation", folder),
            processing_class=models.load_tokenizer(source, revision=settings.revision),
            peft_config=adapter,
        )
    if settings.prefix_sharing:  # the trainer's own: it has put a new adapter around the policy
        prefix_sharing.share(trainer.model, trainer.ref_model, say=say)
    return trainer


def _labelled(data: Path, split: str, folder: Path) -> Any:
    """The rows of a split that have labels of their own, and both sides of those that come in pairs."""
    parts: list[Any] = []
    if (data / f"unpaired-{split}.parquet").is_file():
        parts.append(training.dataset(data, "unpaired", split, folder))
    if (data / f"pairs-{split}.parquet").is_file() or (split == "train" and not parts):
        parts.append(unpair_preference_dataset(training.dataset(data, "pairs", split, folder)))
    wanted = ["prompt", "completion", "label"]
    return concatenate_datasets([part.select_columns(wanted) for part in parts]) if parts else None


def _weights(settings: KTO, labels: Any) -> unpaired.Weights:
    desirable = sum(labels)
    unpaired.check(desirable, len(labels) - desirable, batch_size=len(labels))  # both are there
    return unpaired.weights(
        desirable,
        len(labels) - desirable,
        desirable=settings.desirable_weight,
        undesirable=settings.undesirable_weight,
    )


def _unadvised(weights: unpaired.Weights) -> str:
    return (
        f"the desirable side weighs {weights.ratio:.2f} times the undesirable one, and the KTO paper advises 1 to 1.33; "
        "without `desirable_weight` and `undesirable_weight` they are set so"
    )


class Mixed(torch.utils.data.Dataset[dict[str, Any]]):
    """Labelled rows in an order of each epoch's own. accelerate's loader calls ``set_epoch`` before it begins one."""

    def __init__(self, rows: Any, *, batch_size: int, seed: int) -> None:
        self.rows = rows.select_columns(list(COLUMNS))
        self.labels: list[bool] = self.rows["label"][:]
        prompts = [hash(tuple(ids)) for ids in self.rows["prompt_ids"]]  # a tenth of the memory
        self._order = functools.partial(
            unpaired.interleaved, self.labels, prompts, batch_size=batch_size, seed=seed
        )
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Take the order of an epoch."""
        self.order = self._order(epoch=epoch)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return self.rows[self.order[place]]


def _with_partners(
    collate: Callable[[list[dict[str, Any]]], Any], rows: list[dict[str, Any]]
) -> Any:
    """A batch of TRL's, in which the KL completion of each row is another prompt's."""
    partners = unpaired.mismatched([tuple(row["prompt_ids"]) for row in rows])
    return collate(
        [
            row | {"KL_completion_ids": rows[partner]["completion_ids"]}
            for row, partner in zip(rows, partners, strict=True)
        ]
    )
