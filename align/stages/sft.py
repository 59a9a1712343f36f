"""SFT: train a policy on demonstrations with TRL's SFTTrainer.

The rows are tokenized when the trainer is built; ``align data show --stage sft`` prints the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trl import SFTConfig

from align.config.base import NewModel
from align.config.training import SFT
from align.data import tables
from align.models import adapters, files, loading, tokenization
from align.models.adapters import PolicyAndReference
from align.models.quantization import adapters_in_float32
from align.runtime import checkpoints, distributed
from align.runtime.progress import Logger
from align.runtime.results import StageResult
from align.training import row_limits, speed, trl_trainer
from align.training.demonstration_trainer import DemonstrationTrainer, token_rows
from align.training.token_batches import use_token_batches


def run(
    config: SFT, inputs: Mapping[str, Path | str], output_dir: Path, logger: Logger
) -> StageResult:
    """Train ``config.model`` on the completions of ``config.demonstrations``."""
    trainer = build(config, inputs, output_dir)
    metrics = trl_trainer.train(trainer, output_dir, logger)  # 5. train
    metrics["parameters"] = trl_trainer.count_parameters(trainer)
    return StageResult(metrics, trl_trainer.headline(metrics))


def build(config: SFT, inputs: Mapping[str, Path | str], output_dir: Path) -> DemonstrationTrainer:
    """Build the trainer."""
    data = Path(inputs["demonstrations"])
    arguments = trl_trainer.trl_arguments(
        SFTConfig, output_dir, seed=config.seed, trainer=config.trainer
    )
    train_rows = tables.load_dataset(data, "demonstrations", "train", output_dir)  # 1. data
    held_out_rows = tables.load_dataset(data, "demonstrations", "validation", output_dir)
    model = _load(config, inputs, train_rows, output_dir)  # 2. model
    limit = row_limits.max_length(config, files.position_limit(model.policy.config))
    arguments.max_length = limit
    repair = trl_trainer.end_repair(config)
    with trl_trainer.trl_errors_as_user_errors(), adapters_in_float32(model.policy):
        trainer = DemonstrationTrainer(  # 3. trainer
            rows=tokenization.RowsForTRL(model.tokenizer, end_repair=repair),
            train_on=config.train_on,
            model=model.policy,
            args=arguments,
            train_dataset=train_rows,
            eval_dataset=held_out_rows,
            processing_class=model.tokenizer,
            peft_config=model.new_adapter,
        )
    if not arguments.packing:  # packed rows have no prompt
        row_limits.check_lost_rows(config, trainer, train_rows, limit)
    use_token_batches(trainer, config, lambda row: [each["input_ids"] for each in token_rows(row)])
    speed.speed_up(trainer, config)  # 4. speed
    return trainer


def _load(
    config: SFT, inputs: Mapping[str, Path | str], rows: Any, output_dir: Path
) -> PolicyAndReference:
    """Load the policy, or create it with random weights; SFT has no reference."""
    if isinstance(config.model, NewModel):
        tokenizer = _train_tokenizer(config.model, rows, output_dir)
        shape = config.model.model_dump(exclude={"vocab_size"})
        policy = loading.new_model(tokenizer, dtype=config.dtype, **shape)
        return PolicyAndReference(policy, None, None, tokenizer)
    source = inputs["model"]
    tokenizer = tokenization.load_tokenizer(source, revision=config.revision)
    template = config.trainer.get("chat_template_path")
    if template is not None and not template.endswith((".jinja", ".j2")):
        # TRL would ask on the terminal whether to run code from the repository of the template.
        template_tokenizer = tokenization.load_tokenizer(template)
        if config.lora is not None:
            adapters.check_no_new_tokens(tokenizer, template_tokenizer)
    policy, new_adapter = adapters.load_for_training(
        source,
        lora=config.lora_dict,
        dtype=config.dtype,
        revision=config.revision,
        quantization=config.quantization,
    )
    loading.check_vocabulary(source, policy, tokenizer)
    return PolicyAndReference(policy, None, new_adapter, tokenizer)


def _train_tokenizer(new: NewModel, rows: Iterable[Mapping[str, Any]], output_dir: Path) -> Any:
    """Train the tokenizer on the main rank; other ranks, and a resumed run, load the saved one."""
    checkpoint = checkpoints.last_checkpoint(output_dir, world_size=distributed.world_size())
    if checkpoint is not None:
        return tokenization.load_tokenizer(checkpoint)
    if distributed.is_main():
        messages = (m for row in rows for m in row["prompt"] + row["completion"])
        tokenizer = tokenization.new_tokenizer(
            (m["content"] for m in messages),
            vocab_size=new.vocab_size,
            max_length=new.max_position_embeddings,
        )
        tokenizer.save_pretrained(str(output_dir))
    distributed.barrier()
    return tokenization.load_tokenizer(output_dir)
