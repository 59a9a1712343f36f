"""The run of every online-RL stage: build the trainer, train, save, and report.

The kinds of stages differ in their configuration only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from align.config.online_rl import OnlineRL
from align.config.stages import stage_kind
from align.errors import counted
from align.online_rl import plots
from align.online_rl.results import BatchMetrics, OnlineRLMetrics, StopMetrics, reward_parts
from align.online_rl.trainer import OnlineRLTrainer
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
    config: OnlineRL, inputs: Mapping[str, Path | str], output_dir: Path, logger: Logger
) -> StageResult:
    """Train ``config.model`` on ``config.rewards``."""
    trainer = OnlineRLTrainer(config, inputs, output_dir, logger)  # 1. models, prompts, rewards
    trainer.train()  # 2. the loop
    trainer.save_policy()  # 3. policy, tokenizer and picture
    headline = {key: trainer.metrics[key] for key in ("score", "kl")}
    metrics = {
        stage_kind(config): trainer.metrics | trainer.held_out_metrics,
        "steps": trainer.done,
        **headline,
        "trained_parameters": sum(p.numel() for p in trainer.models.weights().values()),
    }
    remarks: tuple[str, ...] = ()
    if trainer.stop_rule is not None:
        stopped = trainer.stop_rule.result(trainer.done, config.steps)
        metrics["stop"] = asdict(stopped)
        remarks = (stop_remark(stopped, trainer.done, config.steps),)
    table = result_table(OnlineRLMetrics.from_metrics(metrics), output_dir)
    return StageResult(metrics, headline, remarks, tables=(table,))


def stop_remark(stop: StopMetrics, done: int, steps: int) -> str:
    """What the stop rule found, and which policy is saved."""
    saved = f"the policy of step {stop.best_step} is saved"
    evidence = f"e-value {stop.e_value:.3g} in {stop.checks} checks"
    missing = f"; {stop.missing:,} comparisons without a verdict" if stop.missing else ""
    limit = 1 / stop.alpha
    # The last check of a run that has made all of its updates may find a decline, too.
    declines = stop.e_value >= limit
    result = (
        f"by {stop.judge} the policy declines" if declines else f"{stop.judge} found no decline"
    )
    end = f"stopped after {done} of {steps} updates: " if stop.is_stopped else ""
    return f"{end}{result} ({evidence}, limit {limit:.3g}); {saved}{missing}"


def result_table(metrics: OnlineRLMetrics, output_dir: Path) -> ResultTable:
    """Metrics of the saved policy, on a training batch and on held-out prompts if it was evaluated.

    Several rewards have a column each. A metric without a value, such as the gold score without a
    judge, has none.
    """
    batches = {"training": metrics.training, "held out": metrics.held_out}
    parts = reward_parts(metrics.training.rewards)
    measured = [batch for batch in batches.values() if batch is not None]
    columns = [each for each in COLUMNS if any(getattr(b, each[0]) is not None for b in measured)]
    updates = metrics.steps if metrics.stop is None else metrics.stop.best_step

    def row(name: str, batch: BatchMetrics) -> tuple[str, ...]:
        cells = [_format(getattr(batch, key), form) for key, _, form in columns]
        own = reward_parts(batch.rewards)
        return (name, *cells, *(_format(own.get(part), ".3f") for part in parts))

    return ResultTable(
        f"after {counted(updates, 'update')}; KL in nats per completion",
        ("prompts<", *(header for _, header, _ in columns), *parts),
        [row(name, batch) for name, batch in batches.items() if batch is not None],
        note=f"curves: {output_dir / plots.PICTURE}",
    )


def _format(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"
