"""Reward: pairs and an SFT model in, a Bradley-Terry reward model out. TRL does the training.

Rows are tokenised here, so that training, evaluation and PPO read the same tail: the first eos after the prompt. The mean
score of SFT's demonstrations is stored beside the weights, in ``reward.json``, and taken off wherever we score: 0 is as
good as a demonstration. What ``from_pretrained`` alone gives differs by that constant, which no comparison sees.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from trl import RewardConfig, RewardTrainer

from align.config.training import Reward
from align.data import tables
from align.errors import UserError
from align.evaluation.reward_model import center, measure
from align.models import tokenization
from align.models.prefix_sharing import wrapper
from align.rewards import reward_model
from align.rewards.reward_model import RewardModel
from align.runtime import distributed
from align.runtime.progress import Logger
from align.runtime.results import StageResult
from align.training import trl_trainer


def run(
    config: Reward, inputs: Mapping[str, Path | str], output_dir: Path, logger: Logger
) -> StageResult:
    """Train a score on the pairs of ``config.pairs``, centre it, and measure it on those that are held out."""
    trainer = build(config, inputs, output_dir, logger=logger)
    metrics = trl_trainer.train(trainer, output_dir, logger)
    metrics["parameters"] = sum(p.numel() for p in trainer.model.parameters())
    device = trainer.accelerator.device
    del trainer
    distributed.barrier()
    model = RewardModel.load(
        output_dir, dtype=config.dtype, device=device, prefix_sharing=config.prefix_sharing
    )
    data = Path(inputs["pairs"])
    model = replace(model, offset=0.0)  # an interrupted attempt may have written a `reward.json`
    metrics["centre"] = center(model, data, output_dir, logger)
    model = replace(model, offset=metrics["centre"]["score_mean"])
    metrics["held_out"] = measure(model, data, output_dir, logger)
    return StageResult(metrics)


def build(
    config: Reward, inputs: Mapping[str, Path | str], folder: Path, *, logger: Logger
) -> RewardTrainer:
    """The trainer, on rows that end where a policy's completions do."""
    source, data = inputs["model"], Path(inputs["pairs"])
    arguments = trl_trainer.trl_arguments(
        RewardConfig, folder, seed=config.seed, trainer=config.trainer
    )
    tokenizer = tokenization.load_tokenizer(source, revision=config.revision)
    tokenization.set_pad_token_for_scores(tokenizer)
    rows, held_out = (
        _tokenized(
            tables.load_dataset(data, "pairs", split, folder), tokenizer, arguments, config, logger
        )
        for split in ("train", "validation")
    )
    model = reward_model.new_reward_model(
        source, lora=config.lora_dict, dtype=config.dtype, revision=config.revision
    )
    with trl_trainer.trl_errors_as_user_errors():
        trainer = RewardTrainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            eval_dataset=held_out,
            processing_class=tokenizer,
        )
    if config.prefix_sharing:
        wrapper.enable_prefix_sharing(trainer.model, say=logger.info)
    return trainer


def _tokenized(rows: Any, tokenizer: Any, arguments: Any, config: Reward, logger: Logger) -> Any:
    """``chosen_ids`` and ``rejected_ids``, which TRL's trainer takes as they are, and a ``margin`` where it is asked for."""
    if rows is None:
        return None
    if config.margin_coef and "margin" not in rows.column_names:
        raise UserError("margin_coef: these pairs have no `margin`; remove it")

    def tokens(batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {
            f"{side}_ids": tokenization.tokenize_for_reward(tokenizer, batch["prompt"], batch[side])
            for side in ("chosen", "rejected")
        }
        if config.margin_coef:
            found["margin"] = [config.margin_coef * margin for margin in batch["margin"]]
        return found

    found = rows.map(tokens, batched=True, remove_columns=rows.column_names)
    limit = arguments.max_length
    if limit is not None:
        short = found.filter(
            lambda row: max(len(row["chosen_ids"]), len(row["rejected_ids"])) <= limit
        )
        if len(short) == 0:
            raise UserError(f"trainer.max_length: no pair is of {limit} tokens or fewer; raise it")
        if len(short) < len(found):
            cut = len(found) - len(short)
            logger.info(f"{cut:,} of {len(found):,} pairs are longer than {limit} tokens: left out")
        found = short
    return found
