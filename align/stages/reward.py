"""Reward: train a Bradley-Terry reward model on preference pairs with TRL's RewardTrainer.

Rows are tokenized here and not by TRL, so that training, evaluation and PPO read the same last
token: the first eos after the prompt. ``align data show --stage reward`` prints the result. The
mean score of the demonstrations is stored as ``score_mean`` in ``reward.json`` beside the weights;
Align subtracts it from every score, so that a score of 0 is as good as a demonstration. The output
of ``from_pretrained`` alone differs by that constant, which no comparison depends on.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import RewardConfig, RewardTrainer

from align.config.training import Reward
from align.data import tables
from align.errors import DataError
from align.evaluation import reward_model as evaluation
from align.models import tokenization
from align.models.prefix_sharing import wrapper
from align.rewards.reward_model import RewardModel, new_reward_model
from align.runtime import distributed
from align.runtime.progress import Logger
from align.runtime.results import StageResult
from align.training import trl_trainer

LOGGER = logging.getLogger("align.reward")


def run(
    config: Reward, inputs: Mapping[str, Path | str], output_dir: Path, logger: Logger
) -> StageResult:
    """Train a score on ``config.pairs``, center it, and measure it on the held-out pairs."""
    trainer = build(config, inputs, output_dir)
    metrics = trl_trainer.train(trainer, output_dir, logger)  # 5. train
    metrics["parameters"] = trl_trainer.count_parameters(trainer)
    device = trainer.accelerator.device
    del trainer
    distributed.barrier()
    data = Path(inputs["pairs"])
    model = RewardModel.load(
        output_dir, dtype=config.dtype, device=device, prefix_sharing=config.prefix_sharing
    )
    # 6. center; an interrupted attempt may have left its offset in `reward.json`
    centering = evaluation.center(replace(model, offset=0.0), data, output_dir, logger)
    model = replace(model, offset=centering["score_mean"])
    report = evaluation.measure(model, data, logger)  # 7. measure
    metrics |= {"center": centering, "held_out": report}
    if report is None:
        remark = "no pair is held out, so accuracy and calibration were not measured"
        return StageResult(metrics, trl_trainer.headline(metrics), remarks=(remark,))
    headline: dict[str, float] = {
        key: report[key] for key in ("accuracy", "accuracy_upper_bound") if key in report
    }
    return StageResult(metrics, headline, tables=(evaluation.result_table(report),))


def build(config: Reward, inputs: Mapping[str, Path | str], output_dir: Path) -> RewardTrainer:
    """Build the trainer on tokenized pairs."""
    source, data = inputs["model"], Path(inputs["pairs"])
    arguments = trl_trainer.trl_arguments(
        RewardConfig, output_dir, seed=config.seed, trainer=config.trainer
    )
    tokenizer = tokenization.load_tokenizer(source, revision=config.revision)
    tokenization.set_pad_token_for_scores(tokenizer)
    train_rows, held_out_rows = (  # 1. data
        _tokenize(
            tables.load_dataset(data, "pairs", split, output_dir), tokenizer, arguments, config
        )
        for split in ("train", "validation")
    )
    model = new_reward_model(  # 2. model
        source, lora=config.lora_dict, dtype=config.dtype, revision=config.revision
    )
    with trl_trainer.trl_errors_as_user_errors():
        trainer = RewardTrainer(  # 3. trainer
            model=model,
            args=arguments,
            train_dataset=train_rows,
            eval_dataset=held_out_rows,
            processing_class=tokenizer,
        )
    if config.prefix_sharing:
        wrapper.enable_prefix_sharing(trainer.model)  # 4. speed
    return trainer


def _tokenize(
    rows: Dataset | None, tokenizer: Any, arguments: RewardConfig, config: Reward
) -> Dataset | None:
    """Compute ``chosen_ids``, ``rejected_ids`` and, with ``margin_coef``, ``margin``.

    TRL uses these columns as they are. Pairs longer than ``max_length`` are left out, and their
    number is logged.

    Raises:
        DataError: The pairs have no ``margin``, or all of them are too long.
    """
    if rows is None:
        return None
    if config.margin_coef and "margin" not in rows.column_names:
        raise DataError("margin_coef: these pairs have no `margin` column; remove `margin_coef`")

    def tokenize(batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {
            f"{side}_ids": tokenization.tokenize_for_reward(tokenizer, batch["prompt"], batch[side])
            for side in ("chosen", "rejected")
        }
        if config.margin_coef:
            columns["margin"] = [config.margin_coef * margin for margin in batch["margin"]]
        return columns

    tokenized = rows.map(tokenize, batched=True, remove_columns=rows.column_names)
    limit = arguments.max_length
    if limit is None:
        return tokenized
    fitting = tokenized.filter(
        lambda row: max(len(row["chosen_ids"]), len(row["rejected_ids"])) <= limit
    )
    if len(fitting) == 0:
        raise DataError(
            f"trainer.max_length: every pair is longer than {limit} tokens; increase it"
        )
    if len(fitting) < len(tokenized):
        LOGGER.warning(
            "%d of %d pairs are longer than `max_length` (%d tokens) and are left out",
            len(tokenized) - len(fitting),
            len(tokenized),
            limit,
        )
    return fitting
