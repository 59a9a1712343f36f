"""Reward: train a Bradley-Terry reward model on preference pairs with TRL's RewardTrainer.

Rows are tokenized here and not by TRL, so that training, evaluation and PPO read the same last
token: the end of the completion, at which a policy stops. ``align data show --stage reward`` prints
the result. The mean score of the demonstrations is stored as ``score_mean`` in ``reward.json``
beside the weights; Align subtracts it from every score, so that a score of 0 is as good as a
demonstration. The output of ``from_pretrained`` alone differs by that constant, which no comparison
depends on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from trl import RewardConfig, RewardTrainer

from align.config.training import Reward
from align.data import tables
from align.evaluation import reward_accuracy
from align.evaluation import reward_model as evaluation
from align.models import files, tokenization
from align.models.loading import check_vocabulary
from align.models.quantization import adapters_in_float32
from align.rewards.reward_model import RewardModel, new_reward_model
from align.runtime import distributed
from align.runtime.progress import Logger
from align.runtime.results import StageResult
from align.training import row_limits, speed, trl_trainer
from align.training.reward_rows import tokenize_pairs
from align.training.token_batches import TokenBatchTrainer, use_token_batches


class PairTrainer(TokenBatchTrainer, RewardTrainer):
    """TRL's trainer of reward models, whose batches may have a number of tokens."""


def run(
    config: Reward, inputs: Mapping[str, Path | str], output_dir: Path, logger: Logger
) -> StageResult:
    """Train a score on ``config.pairs``, center it, and measure it on the held-out pairs."""
    trainer = build(config, inputs, output_dir)
    metrics = trl_trainer.train(trainer, output_dir, logger)  # 5. train
    metrics["parameters"] = trl_trainer.count_parameters(trainer)
    if distributed.is_main():
        tokenization.save_end_tokens(trainer.processing_class, output_dir)
    device = trainer.accelerator.device
    del trainer
    distributed.barrier()
    data = Path(inputs["pairs"])
    model = RewardModel.load(
        output_dir,
        dtype=config.dtype,
        device=device,
        quantization=config.quantization,
        prefix_sharing=config.prefix_sharing,
    )
    # 6. center; an interrupted attempt may have left its offset in `reward.json`
    centering = evaluation.center(replace(model, offset=0.0), data, output_dir, logger)
    model = replace(model, offset=centering["score_mean"])
    report = evaluation.measure(model, data, logger)  # 7. measure
    metrics |= {"center": centering, "held_out": None if report is None else report.to_metrics()}
    if report is None:
        remark = "no pair is held out, so accuracy and calibration were not measured"
        return StageResult(metrics, trl_trainer.headline(metrics), remarks=(remark,))
    headline = {"accuracy": report.accuracy}
    if report.accuracy_upper_bound is not None:
        headline["accuracy_upper_bound"] = report.accuracy_upper_bound
    shown = (reward_accuracy.result_table(report), reward_accuracy.group_table(report))
    return StageResult(metrics, headline, tables=shown)


def build(config: Reward, inputs: Mapping[str, Path | str], output_dir: Path) -> RewardTrainer:
    """Build the trainer on tokenized pairs."""
    source, data = inputs["model"], Path(inputs["pairs"])
    arguments = trl_trainer.trl_arguments(
        RewardConfig, output_dir, seed=config.seed, trainer=config.trainer
    )
    tokenizer = tokenization.load_tokenizer(source, revision=config.revision)
    tokenization.set_pad_token_for_scores(tokenizer)
    model = new_reward_model(  # 1. model
        source,
        lora=config.lora_dict,
        dtype=config.dtype,
        revision=config.revision,
        quantization=config.quantization,
    )
    check_vocabulary(source, model, tokenizer)
    limit = row_limits.max_length(config, files.position_limit(model.config))
    arguments.max_length = limit  # TRL leaves longer pairs out
    train_rows, held_out_rows = (  # 2. data
        tokenize_pairs(tables.load_dataset(data, "pairs", split, output_dir), tokenizer, config)
        for split in ("train", "validation")
    )
    with trl_trainer.trl_errors_as_user_errors(), adapters_in_float32(model):
        trainer = PairTrainer(  # 3. trainer
            model=model,
            args=arguments,
            train_dataset=train_rows,
            eval_dataset=held_out_rows,
            processing_class=tokenizer,
        )
    row_limits.check_lost_rows(config, trainer, train_rows, limit)
    use_token_batches(trainer, config, lambda row: [row["chosen_ids"], row["rejected_ids"]])
    speed.speed_up(trainer, config)  # 4. speed
    return trainer
