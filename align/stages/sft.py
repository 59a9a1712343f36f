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
from align.runtime.results import StageResult
from align.training import trl_trainer


def run(
    config: SFT, inputs: Mapping[str, Path | str], output_dir: Path, logger: Logger
) -> StageResult:
    """Train ``config.model`` on the completions of ``config.demonstrations``."""
    data = Path(inputs["demonstrations"])
    arguments = trl_trainer.trl_arguments(
        SFTConfig, output_dir, seed=config.seed, trainer=config.trainer
    )
    rows = tables.load_dataset(data, "demonstrations", "train", output_dir)
    held_out = tables.load_dataset(data, "demonstrations", "validation", output_dir)
    adapter = None
    if isinstance(config.model, NewModel):
        tokenizer = _new_tokenizer(config.model, rows, output_dir)
        shape = config.model.model_dump(exclude={"vocab_size"})
        model = loading.new_model(tokenizer, dtype=config.dtype, **shape)
    else:
        source = inputs["model"]
        tokenizer = tokenization.load_tokenizer(source, revision=config.revision)
        model, adapter = adapters.load_for_training(
            source, lora=config.lora_dict, dtype=config.dtype, revision=config.revision
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
    if config.prefix_sharing:
        wrapper.enable_prefix_sharing(trainer.model, say=logger.info)
    metrics = trl_trainer.train(trainer, output_dir, logger)
    return StageResult(metrics | {"parameters": sum(p.numel() for p in trainer.model.parameters())})


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
