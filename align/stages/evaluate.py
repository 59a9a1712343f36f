"""Evaluate: compare policies with a baseline on prompts that no training stage has used.

Win rates need a judge; implicit rewards need held-out pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState

from align.config.evaluate import Evaluate
from align.config.judges import by_key
from align.evaluation import tables
from align.evaluation.completions import Samples, read_completions, sample_policy
from align.evaluation.drift import DriftMeter
from align.evaluation.held_out import policies_with_data_of, read_held_out, trained_prompts
from align.evaluation.implicit_rewards import implicit_rewards, pair_logps
from align.evaluation.judge_card import agreements, judge_cards
from align.evaluation.judge_tables import judge_tables
from align.evaluation.judging import Outcomes, judge_all
from align.evaluation.panel import panel, rank
from align.evaluation.results import EvaluationMetrics
from align.evaluation.win_rates import compare_all, write_comparisons
from align.judges.build import Judge, build_judges, check_rows
from align.models.policy import load_policy
from align.runtime import distributed
from align.runtime.progress import Logger
from align.runtime.results import StageResult

if TYPE_CHECKING:
    from torch import Tensor

    from align.data.rows import Row


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
        quantization=config.quantization,
        batch_size=config.batch_size,
    )
    check_rows(
        judges,
        prompts,
        repair="choose another `judge`, or set `implicit_rewards: true` and no `judge`",
    )
    samples = read_completions(config, data, prompts) if config.judge else {}
    # 2. one model at a time: completions, and log-probabilities of them and of the pairs
    logps: dict[str, Tensor] = {}
    drift = DriftMeter(config, prompts, logger)
    for name, source in sources.items():
        policy = load_policy(
            source,
            dtype=config.dtype,
            device=PartialState().device,
            quantization=config.quantization,
        )
        if config.judge is not None:
            samples |= sample_policy(name, policy, prompts, config, logger)
            drift.add(name, policy, samples)
        if config.implicit_rewards:
            logps[name] = pair_logps(name, policy, pairs, config, logger)
        del policy  # frees its memory before the next one is loaded
    # 3. verdicts and metrics
    outcomes = judge_all(config, judges, prompts, samples, logger)
    metrics = EvaluationMetrics(
        implicit_rewards=implicit_rewards(config, pairs, logps) if config.implicit_rewards else (),
        drift=drift.metrics(samples) if config.judge else (),
        **judged_metrics(config, judges, outcomes, samples),
    )
    if config.judge is not None and distributed.is_main():
        write_comparisons(output_dir, config, prompts, samples, outcomes)
    return StageResult(
        metrics=metrics.to_metrics(),
        headline=tables.headline(metrics),
        remarks=(
            *tables.remarks(metrics, samples, judges),
            *dependent_judges(config, inputs, sources, prompts),
        ),
        tables=(*tables.all_tables(metrics, prompts, samples, outcomes), *judge_tables(metrics)),
    )


def judged_metrics(
    config: Evaluate,
    judges: Mapping[str, Judge],
    outcomes: Sequence[Outcomes],
    samples: Mapping[str, Samples],
) -> dict[str, Any]:
    """What is computed of verdicts: win rates, rankings, the judge card and agreement."""
    if not judges:
        return {}
    everyone = [*outcomes, *panel(outcomes)]
    comparisons = compare_all(config, everyone, samples)
    shown = dict.fromkeys(row.judge for row in comparisons)
    rankings = [rank(config, [each for each in everyone if each.judge == judge]) for judge in shown]
    return {
        "comparisons": comparisons,
        "temperature": config.temperature,
        "rankings": tuple(each for each in rankings if each is not None),
        "judges": judge_cards(config, judges, outcomes, samples),
        "agreement": agreements(config, outcomes),
    }


def dependent_judges(
    config: Evaluate,
    inputs: Mapping[str, Path | str],
    sources: Mapping[str, Path | str],
    prompts: Sequence[Row],
) -> Iterator[str]:
    """Warnings about reward models that learned from held-out prompts, or what policies learned."""
    for key, judge in by_key(config.judge).items():
        if key not in inputs:
            continue
        for file, n_shared, n_prompts in trained_prompts(prompts, Path(inputs[key])):
            yield (
                f"warning: judge `{judge}` was trained on {n_shared} of the {n_prompts} held-out "
                f"prompts ({file}): its win rates are no independent evidence"
            )
        if names := policies_with_data_of(Path(inputs[key]), sources):
            yield (
                f"warning: judge `{judge}` was trained on the same preferences as "
                f"{', '.join(names)}: its win rates are no independent evidence"
            )


def model_sources(config: Evaluate, inputs: Mapping[str, Path | str]) -> dict[str, Path | str]:
    """Folder or Hub id of each model by name, the baseline last."""
    named = {name: f"policies.{i}" for i, name in enumerate(config.policies)}
    named.pop(config.baseline, None)
    named[config.baseline] = "baseline"
    return {name: inputs[key] for name, key in named.items() if key in inputs}
