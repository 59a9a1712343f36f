"""Evaluate: compare policies with a baseline on prompts that no training stage has used.

Win rates need a judge; implicit rewards need held-out pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import PartialState

from align.config.evaluate import Evaluate
from align.evaluation import tables
from align.evaluation.completions import read_completions, sample_policy
from align.evaluation.drift import DriftMeter
from align.evaluation.held_out import read_held_out
from align.evaluation.implicit_rewards import implicit_rewards, pair_logps
from align.evaluation.judging import judge_all
from align.evaluation.results import EvaluationMetrics
from align.evaluation.win_rates import compare, write_comparisons
from align.judges.build import build_judges, check_prompts
from align.models.policy import load_policy
from align.runtime import distributed
from align.runtime.progress import Logger
from align.runtime.results import StageResult

if TYPE_CHECKING:
    from torch import Tensor


def run(
    config: Evaluate, inputs: Mapping[str, Path | str], output_dir: Path, logger: Logger
) -> StageResult:
    """Compute ``comparisons``, ``implicit_rewards`` and the other metrics of the policies."""
    data = Path(inputs["prompts"])
    sources = model_sources(config, inputs)
    # 1. held-out rows, which no model was trained on; judges, and completions that are not sampled
    prompts = read_held_out(data, "prompts", config, sources) if config.judge else []
    pairs = read_held_out(data, "pairs", config, sources) if config.implicit_rewards else []
    judges = build_judges(
        config.judge,
        inputs,
        runs=output_dir.parent,
        dtype=config.dtype,
        batch_size=config.batch_size,
    )
    check_prompts(
        judges,
        [row["prompt"] for row in prompts],
        repair="choose another `judge`, or set `implicit_rewards: true` and no `judge`",
    )
    samples = read_completions(config, data, prompts) if config.judge else {}
    # 2. one model at a time: completions, and log-probabilities of them and of the pairs
    logps: dict[str, Tensor] = {}
    drift = DriftMeter(config, prompts, logger)
    for name, source in sources.items():
        policy = load_policy(source, dtype=config.dtype, device=PartialState().device)
        if config.judge is not None:
            samples |= sample_policy(name, policy, prompts, config, logger)
            drift.add(name, policy, samples)
        if config.implicit_rewards:
            logps[name] = pair_logps(name, policy, pairs, config, logger)
        del policy  # frees its memory before the next one is loaded
    # 3. verdicts and metrics
    outcomes = judge_all(config, judges, prompts, samples, logger)
    metrics = EvaluationMetrics(
        comparisons=tuple(compare(config, each, samples) for each in outcomes),
        implicit_rewards=implicit_rewards(config, pairs, logps) if config.implicit_rewards else (),
        drift=drift.metrics(samples) if config.judge else (),
        temperature=config.temperature if config.judge else None,
    )
    if config.judge is not None and distributed.is_main():
        write_comparisons(output_dir, config, prompts, samples, outcomes)
    return StageResult(
        metrics=metrics.to_metrics(),
        headline=tables.headline(metrics),
        remarks=tables.remarks(metrics, samples),
        tables=tables.all_tables(metrics, prompts, samples, outcomes),
    )


def model_sources(config: Evaluate, inputs: Mapping[str, Path | str]) -> dict[str, Path | str]:
    """Folder or Hub id of each model by name, the baseline last."""
    named = {name: f"policies.{i}" for i, name in enumerate(config.policies)}
    named.pop(config.baseline, None)
    named[config.baseline] = "baseline"
    return {name: inputs[key] for name, key in named.items() if key in inputs}
