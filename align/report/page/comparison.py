"""Several runs side by side: settings that differ, results, curves of the same stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from align.functional.intervals import bootstrap_interval
from align.report.curves import Curve, Panel
from align.report.page.contents import COMPARISONS, RunContents, StageContents


@dataclass(frozen=True, slots=True)
class Result:
    """A win rate of a run."""

    run: str
    policy: str
    baseline: str
    judge: str
    win_rate: float
    low: float
    high: float
    at_equal_length: float | None
    tokens: float | None


@dataclass(frozen=True, slots=True)
class Difference:
    """The win rate of a run minus that of the first run, on the prompts that both have."""

    run: str
    first: str
    policy: str
    value: float
    low: float
    high: float
    n_prompts: int


def differing_settings(runs: Sequence[RunContents]) -> list[tuple[str, list[Any]]]:
    """Settings that are not the same in all runs, by ``stage.key``, with the value of each run.

    A run without the stage has None.
    """
    per_run = [
        {
            f"{stage.name}.{key}": value
            for stage in run.stages
            for key, value in stage.settings.items()
            if key not in stage.made_from
        }
        for run in runs
    ]
    keys = dict.fromkeys(key for settings in per_run for key in settings)
    rows = [(key, [settings.get(key) for settings in per_run]) for key in keys]
    return [(key, values) for key, values in rows if any(v != values[0] for v in values)]


def results(runs: Sequence[RunContents]) -> Iterator[Result]:
    """The win rates of all runs."""
    for run in runs:
        for stage in run.of_kind("evaluate"):
            for each in stage.artifact.metrics.get("comparisons", ()):
                low, high = each["ci"]
                yield Result(
                    run=run.name,
                    policy=each["policy"],
                    baseline=each["baseline"],
                    judge=each["judge"],
                    win_rate=each["win_rate"],
                    low=low,
                    high=high,
                    at_equal_length=each.get("length_controlled_win_rate"),
                    tokens=(each.get("mean_tokens") or {}).get("policy"),
                )


def paired_differences(runs: Sequence[RunContents]) -> Iterator[Difference]:
    """Differences of win rates against the first run, with bootstrap intervals over prompts.

    Runs are compared where a policy of the same name was judged by the same judge against a
    baseline of the same name; the baselines may be other models.
    """
    first, *others = runs
    reference = _outcomes(first)
    for run in others:
        for key, outcomes in _outcomes(run).items():
            common = sorted(reference.get(key, {}).keys() & outcomes.keys())
            if not common or key[0].endswith(" again"):
                continue
            differences = torch.tensor([outcomes[p] - reference[key][p] for p in common])
            low, high = bootstrap_interval(differences)
            value = float(differences.mean())
            yield Difference(run.name, first.name, key[0], value, low, high, len(common))


def _outcomes(run: RunContents) -> dict[tuple[str, str, str], dict[str, float]]:
    """Mean outcome of each prompt, by policy, baseline and judge."""
    import pyarrow.parquet as parquet

    sums: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for stage in run.of_kind("evaluate"):
        file = stage.folder / COMPARISONS
        for row in parquet.read_table(file).to_pylist() if file.is_file() else ():
            outcome = row["outcome"]
            if outcome is None or outcome != outcome:
                continue
            key = (row["policy"], row["baseline"], row["judge"])
            prompt = repr(row.get("messages") or row["prompt"])
            sums.setdefault(key, {}).setdefault(prompt, []).append(outcome)
    return {
        key: {prompt: sum(values) / len(values) for prompt, values in by_prompt.items()}
        for key, by_prompt in sums.items()
    }


def joined_curves(runs: Sequence[RunContents]) -> Iterator[tuple[str, list[Panel]]]:
    """Curves of stages of the same name in several runs, one line for each stage that differs."""
    names = dict.fromkeys(stage.name for run in runs for stage in run.stages)
    for name in names:
        stages: dict[Path, tuple[list[str], StageContents]] = {}
        for run in runs:
            for stage in run.stages:
                if stage.name == name:
                    stages.setdefault(stage.folder, ([], stage))[0].append(run.name)
        metrics = dict.fromkeys(key for _, stage in stages.values() for key in stage.curves)
        if len(stages) < 2 or not metrics:
            continue
        panels = []
        for metric in metrics:
            lines: dict[str, Curve] = {}
            for run_names, stage in stages.values():
                for seed, curve in stage.curves.get(metric, {}).items():
                    label = ", ".join(run_names) + (f", seed {seed}" if seed else "")
                    lines[label] = curve
            panels.append(Panel(metric, lines))
        yield name, panels
