"""Typed metrics of the online-RL stages, as ``artifact.json`` stores them.

Loads no heavy library, so that finished runs can be read quickly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from align.config.stages import ONLINE_RL


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchMetrics:
    """Means over a batch of completions."""

    score: float
    """Score that the policy is trained on: the reward minus the penalty without eos."""
    reward: float
    """Weighted sum of the rewards."""
    kl: float
    """KL between policy and reference, in nats per completion."""
    tokens: float
    """Tokens per completion."""
    missing_eos: float
    """Share of the completions that do not end with eos."""
    rewards: Mapping[str, float]
    """Each reward by its name in the recipe, without its weight."""
    entropy: float | None = None
    """Entropy of the policy, in nats per token; of training batches only."""
    gold: float | None = None
    """Exact score of the embedded task; None if the recipe does not log it."""

    @classmethod
    def from_metrics(cls, metrics: Mapping[str, Any], prefix: str = "") -> BatchMetrics:
        """Read the metrics whose keys start with ``prefix``."""
        names = [name for name in cls.__dataclass_fields__ if prefix + name in metrics]
        return cls(
            rewards=rewards_of(metrics, prefix), **{name: metrics[prefix + name] for name in names}
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StopMetrics:
    """Result of the stop rule."""

    judge: str
    alpha: float
    """The stated false-alarm rate."""
    is_stopped: bool
    """Whether the rule ended the run before its last step."""
    best_step: int
    """Updates of the policy that is saved."""
    checks: int
    """Checks in which the judge compared policies."""
    e_value: float
    """Evidence of a decline after the last check; the run stops at ``1 / alpha``."""
    missing: int
    """Comparisons for which the judge gave no usable verdict."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineRLMetrics:
    """Metrics of an online-RL stage."""

    steps: int
    """Updates."""
    trained_parameters: int
    """Trainable parameters of policy and critic."""
    training: BatchMetrics
    """Metrics of the last step; of the saved policy if a stop rule chose it."""
    held_out: BatchMetrics | None
    """Metrics of the last held-out evaluation, or of that of the saved policy; None if the recipe
    has none."""
    stop: StopMetrics | None = None
    """Result of the stop rule; None if the recipe has none."""

    @classmethod
    def from_metrics(cls, metrics: Mapping[str, Any]) -> OnlineRLMetrics:
        """Read the metrics of a finished stage."""
        last = next(metrics[kind] for kind in ONLINE_RL if kind in metrics)
        has_held_out = "eval_score" in last
        return cls(
            steps=metrics["steps"],
            trained_parameters=metrics["trained_parameters"],
            training=BatchMetrics.from_metrics(last),
            held_out=BatchMetrics.from_metrics(last, "eval_") if has_held_out else None,
            stop=StopMetrics(**metrics["stop"]) if "stop" in metrics else None,
        )


def rewards_of(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Each reward among the metrics whose keys start with ``prefix``, by its name in the recipe."""
    each = f"{prefix}rewards/"
    return {k.removeprefix(each): v for k, v in metrics.items() if k.startswith(each)}


def reward_parts(rewards: Mapping[str, float]) -> dict[str, float]:
    """Each of several rewards by a short name, which is that of its function or its folder.

    Of a single reward there is nothing to show beside the score.

    >>> reward_parts({"rewards:short": 0.5, "runs/reward-1a2b": 2.0})
    {'short': 0.5, 'reward-1a2b': 2.0}
    >>> reward_parts({"rewards:short": 0.5})
    {}
    """
    short = {re.split("[/:]", name.rstrip("/"))[-1]: value for name, value in rewards.items()}
    if len(rewards) < 2:
        return {}
    return short if len(short) == len(rewards) else dict(rewards)
