"""Evaluate: compare policies with a baseline on prompts that no training stage has used.

Win rates need a judge; implicit rewards need held-out pairs. Left out: judges that compare two
completions.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import PartialState

from align.config.evaluate import Evaluate
from align.evaluation import tables
from align.evaluation.held_out import read_held_out
from align.evaluation.implicit_rewards import implicit_rewards, pair_logps
from align.evaluation.results import EvaluationMetrics
from align.evaluation.win_rates import Samples, compare_all, sample_policy, write_comparisons
from align.judges.scores import build_judge
from align.models.policy import load_policy
from align.runtime import distributed
from align.runtime.progress import Logger
from align.runtime.results import StageResult

if TYPE_CHECKING:
    from torch import Tensor


def run(
    config: Evaluate, inputs: Mapping[str, Path | str], output_dir: Path, logger: Logger
) -> StageResult:
    """Compute ``comparisons`` and ``implicit_rewards``, each with one entry per policy."""
    data = Path(inputs["prompts"])
    sources = {config.baseline: inputs["baseline"]}
    sources |= {name: inputs[f"policies.{i}"] for i, name in enumerate(config.policies)}
    # 1. held-out rows, which no model was trained on, and the judge
    prompts = read_held_out(data, "prompts", config, sources) if config.judge else []
    pairs = read_held_out(data, "pairs", config, sources) if config.implicit_rewards else []
    if config.judge is not None:
        judge = build_judge(config.judge, None, dtype=config.dtype, batch_size=config.batch_size)
        judge.check_prompts(
            [row["prompt"] for row in prompts], repair="set `implicit_rewards: true` and no `judge`"
        )
    # 2. one model at a time: completions with scores, and log-probabilities of the pairs
    samples: dict[str, Samples] = {}
    logps: dict[str, Tensor] = {}
    for name, source in sources.items():
        policy = load_policy(source, dtype=config.dtype, device=PartialState().device)
        if config.judge is not None:
            samples |= sample_policy(name, policy, prompts, judge, config, logger)
        if config.implicit_rewards:
            logps[name] = pair_logps(name, policy, pairs, config, logger)
        del policy  # frees its memory before the next one is loaded
    # 3. metrics
    metrics = EvaluationMetrics(
        comparisons=compare_all(config, samples) if config.judge else (),
        implicit_rewards=implicit_rewards(config, pairs, logps) if config.implicit_rewards else (),
        temperature=config.temperature if config.judge else None,
    )
    if config.judge is not None and distributed.is_main():
        write_comparisons(output_dir, config, prompts, samples)
    return StageResult(
        metrics=metrics.to_metrics(),
        headline=tables.headline(metrics),
        tables=tables.all_tables(metrics, prompts, samples),
    )
