"""PPO: train a policy on rewards, with a KL penalty towards its reference.

The loop is :class:`align.online_rl.trainer.PPOTrainer`; RLOO and REINFORCE are settings of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import OutOfMemoryError

from align.config.ppo import PPO
from align.errors import UserError
from align.online_rl import plots
from align.online_rl.trainer import PPOTrainer
from align.runtime.progress import Logger
from align.runtime.results import ResultTable, StageResult

COLUMNS = (
    ("score", "score", ".3f"),
    ("gold", "gold", ".3f"),
    ("kl", "KL", ".2f"),
    ("entropy", "entropy", ".3f"),
    ("tokens", "tokens", ".1f"),
    ("missing_eos", "no eos", ".3f"),
)
"""Metric, header and format of each column of the result table."""


def run(
    config: PPO, inputs: Mapping[str, Path | str], output_dir: Path, logger: Logger
) -> StageResult:
    """Train ``config.model`` on ``config.rewards``."""
    try:
        trainer = PPOTrainer(config, inputs, output_dir, logger)  # 1. models, prompts, rewards
        trainer.train()  # 2. the loop
        trainer.save_policy()  # 3. policy, tokenizer and picture
    except OutOfMemoryError as error:
        raise UserError(
            "out of memory: lower `micro_batch_size` (results stay the same) or "
            "`sample_batch_size`, or set `gradient_checkpointing: true`, `lora` or "
            f"`quantization: nf4` ({str(error).splitlines()[0]})"
        ) from error
    headline = {key: trainer.metrics[key] for key in ("score", "kl")}
    metrics = {
        "ppo": trainer.metrics | trainer.held_out_metrics,
        "steps": config.steps,
        **headline,
        "trained_parameters": sum(p.numel() for p in trainer.models.weights().values()),
    }
    return StageResult(metrics, headline, tables=(result_table(metrics, output_dir),))


def result_table(metrics: Mapping[str, Any], output_dir: Path) -> ResultTable:
    """Metrics of the last step, on the training prompts and on the held-out ones."""
    last = metrics["ppo"]
    rows = [
        (
            label,
            *(
                f"{last[prefix + key]:{form}}" if prefix + key in last else "–"
                for key, _, form in COLUMNS
            ),
        )
        for label, prefix in (("training", ""), ("held out", "eval_"))
        if f"{prefix}score" in last
    ]
    return ResultTable(
        f"after {metrics['steps']} updates; KL in nats per completion",
        ("prompts<", *(header for _, header, _ in COLUMNS)),
        rows,
        note=f"curves: {output_dir / plots.PICTURE}",
    )
