"""DPO: pairs and an SFT model in, an aligned model out. TRL does the training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trl import DPOConfig, DPOTrainer

from align.config.training import DPO
from align.data import tables
from align.models import adapters, logps
from align.models.prefix_sharing import wrapper
from align.runtime.progress import Logger
from align.runtime.results import StageResult
from align.training import reference_logps, trl_trainer


def run(
    config: DPO, inputs: Mapping[str, Path | str], output_dir: Path, logger: Logger
) -> StageResult:
    """Train ``config.model`` to prefer the chosen completions of ``config.pairs``."""
    trainer = build(config, inputs, output_dir, say=logger.info)
    found: dict[str, Any] = {}
    if reference_logps.can_precompute(trainer):
        with logps.small_vocabulary_tiles():
            found["reference"] = reference_logps.add_reference_logps(
                trainer,
                model=inputs["model"],
                pairs=Path(inputs["pairs"]),
                runs=output_dir.parent,
                logger=logger,
            )
    found |= trl_trainer.train(trainer, output_dir, logger)
    return StageResult(found | {"parameters": sum(p.numel() for p in trainer.model.parameters())})


def build(
    config: DPO,
    inputs: Mapping[str, Path | str],
    folder: Path,
    say: Callable[[str], None] | None = None,
) -> DPOTrainer:
    """The trainer, with the policy and its reference: equal to the last bit before the first step."""
    source, data = inputs["model"], Path(inputs["pairs"])
    arguments = trl_trainer.trl_arguments(
        DPOConfig, folder, seed=config.seed, trainer=config.trainer, beta=config.beta
    )
    rows = tables.load_dataset(data, "pairs", "train", folder)
    held_out = tables.load_dataset(data, "pairs", "validation", folder)
    models = adapters.load_policy_and_reference(config, source)
    with trl_trainer.trl_errors_as_user_errors():
        trainer = DPOTrainer(
            model=models.policy,
            ref_model=models.reference,
            args=arguments,
            train_dataset=rows,
            eval_dataset=held_out,
            processing_class=models.tokenizer,
            peft_config=models.new_adapter,
        )
    if config.prefix_sharing:  # the trainer's own: it has put a new adapter around the policy
        wrapper.enable_prefix_sharing(trainer.model, trainer.ref_model, say=say)
    return trainer
