"""SFT: demonstrations and a model in, a policy out. TRL does the training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl import SFTConfig, SFTTrainer

from align.config.base import NewModel
from align.config.training import SFT
from align.data import tables
from align.models import adapters, loading, tokenization
from align.models.prefix_sharing import wrapper
from align.runtime import checkpoints, distributed
from align.runtime.progress import Logger
from align.training import trl_trainer


def run(
    settings: SFT, inputs: Mapping[str, Path | str], folder: Path, track: Logger
) -> dict[str, Any]:
    """Train ``settings.model`` on the completions of ``settings.demonstrations``."""
    data = Path(inputs["demonstrations"])
    arguments = trl_trainer.trl_arguments(
        SFTConfig, folder, seed=settings.seed, trainer=settings.trainer
    )
    rows = tables.load_dataset(data, "demonstrations", "train", folder)
    held_out = tables.load_dataset(data, "demonstrations", "validation", folder)
    adapter = None
    if isinstance(settings.model, NewModel):
        tokenizer = _new_tokenizer(settings.model, rows, folder)
        shape = settings.model.model_dump(exclude={"vocab_size"})
        model = loading.new_model(tokenizer, dtype=settings.dtype, **shape)
    else:
        source = inputs["model"]
        tokenizer = tokenization.load_tokenizer(source, revision=settings.revision)
        lora = settings.lora.model_dump() if settings.lora else None
        model, adapter = adapters.load_for_training(
            source, lora=lora, dtype=settings.dtype, revision=settings.revision
        )
    with trl_trainer.trl_errors_as_user_errors():
        trainer = SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            eval_dataset=held_out,
            processing_class=tokenizer,
            peft_config=adapter,
        )
    if settings.prefix_sharing:
        wrapper.enable_prefix_sharing(trainer.model, say=track.say)
    metrics = trl_trainer.train(trainer, folder, track)
    return metrics | {"parameters": sum(p.numel() for p in trainer.model.parameters())}


def _new_tokenizer(new: NewModel, rows: Any, folder: Path) -> Any:
    """Train the tokenizer once: other processes, and a resumed run, read what the first one wrote."""
    checkpoint = checkpoints.last_checkpoint(folder, world_size=distributed.world_size())
    if checkpoint is not None:
        return tokenization.load_tokenizer(checkpoint)
    if distributed.is_main():
        messages = (m for row in rows for m in row["prompt"] + row["completion"])
        tokenizer = tokenization.new_tokenizer(
            (m["content"] for m in messages),
            vocab_size=new.vocab_size,
            max_length=new.max_position_embeddings,
        )
        tokenizer.save_pretrained(str(folder))
    distributed.barrier()
    return tokenization.load_tokenizer(folder)
