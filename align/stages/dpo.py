"""DPO: pairs and an SFT model in, an aligned model out. TRL does the training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trl import DPOConfig, DPOTrainer

from align import models, prefix_sharing, references, training
from align.settings import DPO
from align.tracking import Track


def run(
    settings: DPO, inputs: Mapping[str, Path | str], folder: Path, track: Track
) -> dict[str, Any]:
    """Train ``settings.model`` to prefer the chosen completions of ``settings.pairs``."""
    trainer = build(settings, inputs, folder, say=track.say)
    found: dict[str, Any] = {}
    if references.stands(trainer):
        with training.small_tiles():
            found["reference"] = references.attach(
                trainer,
                model=inputs["model"],
                pairs=Path(inputs["pairs"]),
                runs=folder.parent,
                track=track,
            )
    found |= training.fit(trainer, folder, track)
    return found | {"parameters": sum(p.numel() for p in trainer.model.parameters())}


def build(
    settings: DPO,
    inputs: Mapping[str, Path | str],
    folder: Path,
    say: Callable[[str], None] | None = None,
) -> DPOTrainer:
    """The trainer, with the policy and its reference: equal to the last bit before the first step."""
    source, data = inputs["model"], Path(inputs["pairs"])
    arguments = training.arguments(
        DPOConfig, folder, seed=settings.seed, trainer=settings.trainer, beta=settings.beta
    )
    rows = training.dataset(data, "pairs", "train", folder)
    held_out = training.dataset(data, "pairs", "validation", folder)
    tokenizer = models.load_tokenizer(source, revision=settings.revision)
    lora = settings.lora.model_dump() if settings.lora else None
    model, adapter = models.to_train(
        source, lora=lora, dtype=settings.dtype, revision=settings.revision
    )
    reference = models.reference(
        source, lora=lora, dtype=settings.dtype, revision=settings.revision
    )
    with training.refusals():
        trainer = DPOTrainer(
            model=model,
            ref_model=reference,
            args=arguments,
            train_dataset=rows,
            eval_dataset=held_out,
            processing_class=tokenizer,
            peft_config=adapter,
        )
    if settings.prefix_sharing:  # the trainer's own: it has put a new adapter around the policy
        prefix_sharing.share(trainer.model, trainer.ref_model, say=say)
    return trainer
