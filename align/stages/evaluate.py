"""Evaluate: policies against a baseline on prompts that no training stage saw. Figures with their intervals.

Left out: judges that read both completions (their orders, verdicts and retries); only the exact gold score judges here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.config.evaluate import Evaluate
from align.evaluation.held_out import read_held_out, refuse_trained_prompts
from align.evaluation.implicit_rewards import implicit_rewards
from align.evaluation.win_rates import win_rates
from align.runtime.progress import Logger
from align.runtime.results import StageResult


def run(
    config: Evaluate, inputs: Mapping[str, Path | str], output_dir: Path, logger: Logger
) -> StageResult:
    """Sample, judge and compare. ``comparisons`` and ``implicit_rewards`` hold one entry a policy."""
    data = Path(inputs["prompts"])
    targets = {name: inputs[f"policies.{i}"] for i, name in enumerate(config.policies)}
    targets = {config.baseline: inputs["baseline"]} | targets
    metrics: dict[str, Any] = {}
    if config.judge is not None:
        rows = read_held_out(data, "prompts", config)
        refuse_trained_prompts(rows, targets, data)
        metrics |= win_rates(config, rows, targets, output_dir, logger)
    if config.implicit_rewards:
        rows = read_held_out(data, "pairs", config)
        refuse_trained_prompts(rows, targets, data)
        metrics |= implicit_rewards(config, rows, targets, logger)
    return StageResult(metrics)
