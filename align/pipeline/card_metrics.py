"""The metrics of a model card, with intervals where the stage stored a value per held-out prompt.

A reward model stores the interval of its accuracy itself. That of TRL's accuracy on validation
pairs follows from the number of their prompts. The values of an online-RL stage are in its
``held_out.jsonl``. Left out: intervals of other metrics, of which only the mean is stored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from align.config.stages import ONLINE_RL
from align.errors import counted
from align.runtime import artifacts
from align.runtime.artifacts import Artifact

METRICS = {
    "loss": "training loss",
    "mean_token_accuracy": "training: share of tokens that are the most likely one",
    "rewards/accuracies": "training: share of pairs ordered correctly",
    "rewards/margins": "training: margin of the implicit rewards, chosen minus rejected",
    "eval_loss": "held out: loss",
    "eval_mean_token_accuracy": "held out: share of tokens that are the most likely one",
    "eval_rewards/accuracies": "held out: share of pairs ordered correctly",
    "held_out.accuracy": "held out: share of pairs ordered correctly",
    "held_out.accuracy_upper_bound": "the best possible share on these noisy labels",
    "held_out.expected_calibration_error": "held out: expected calibration error",
    "center.score_mean": "mean output on demonstrations, which Align subtracts from every score",
    "online_rl.score": "training: mean score",
    "online_rl.kl": "training: KL to the reference, nats per completion",
    "online_rl.tokens": "training: tokens per completion",
    "online_rl.missing_eos": "training: share of completions without an end",
    "online_rl.eval_score": "held out: mean score",
    "online_rl.eval_kl": "held out: KL to the reference, nats per completion",
    "online_rl.eval_missing_eos": "held out: share of completions without an end",
}
"""Metrics of the card by their address in ``artifact.json``, in order.

``online_rl`` is the kind of an online-RL stage, under which its metrics are stored.
"""
ACCURACY = "eval_rewards/accuracies"
_BY_PROMPT = {"online_rl.eval_score": "score", "online_rl.eval_kl": "kl"}
"""Metrics whose values of each prompt are in ``held_out.jsonl``, with their keys there."""


def rows(folder: Path, artifact: Artifact) -> Iterator[tuple[str, str, str]]:
    """Name, value and 95 % interval of each metric; the interval is empty where there is none.

    ``folder`` is that of the stage.
    """
    metrics = artifact.metrics
    held_out = _held_out(folder, artifact) if artifact.stage in ONLINE_RL else []
    for address, name in METRICS.items():
        group, _, key = address.rpartition(".")
        group = artifact.stage if group == "online_rl" else group
        values = metrics.get(group) if group else metrics
        value = values.get(key) if isinstance(values, dict) else None
        if not isinstance(value, int | float):
            continue
        interval: Sequence[float] | None = None
        if key == "accuracy" and isinstance(values, dict):
            interval = values.get("ci")
        elif address in _BY_PROMPT:
            interval = _interval([line[_BY_PROMPT[address]] for line in held_out])
        elif address == ACCURACY:
            interval = _share_interval(value, metrics.get("eval_prompts", 0))
        if address.startswith("eval_") and "eval_rows" in metrics:
            name = f"{name}, {counted(metrics['eval_rows'], 'row')}"
        yield name, f"{value:.4g}", "{:.4g} to {:.4g}".format(*interval) if interval else ""


def _held_out(folder: Path, artifact: Artifact) -> list[dict[str, Any]]:
    """Measurements of the saved policy, one per held-out prompt; empty if there are none."""
    file = folder / artifacts.HELD_OUT
    if not file.is_file():
        return []
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    stop = artifact.metrics.get("stop")
    last = stop["best_step"] if stop else max((line["step"] for line in lines), default=0)
    return [line for line in lines if line["step"] == last]


def _share_interval(rate: float, n_prompts: int) -> Sequence[float] | None:
    """Interval of a share of pairs, each prompt of which counts as one pair; None without prompts.

    TRL averages the shares of batches, so the share times the number of pairs is no whole number.
    Pairs of one prompt agree in part, so the interval is at least as wide as that of their means.
    """
    if not n_prompts:
        return None
    import torch

    from align.functional.intervals import share_interval

    n_correct = round(rate * n_prompts)
    outcomes = torch.tensor(
        [1.0] * n_correct + [0.0] * (n_prompts - n_correct), dtype=torch.float64
    )
    return share_interval(rate, outcomes - outcomes.mean(), confidence=0.95)


def _interval(values: list[float]) -> tuple[float, float] | None:
    """Bootstrap interval of the mean; None where all prompts agree, for which it has no width."""
    if len(set(values)) < 2:
        return None
    import torch

    from align.functional.intervals import bootstrap_interval

    return bootstrap_interval(torch.tensor(values, dtype=torch.float64))
