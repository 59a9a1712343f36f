"""Metrics of a training step: means over the completions and tokens of all ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from align.functional.masked import sum_over_ranks
from align.online_rl.completions import Completions
from align.online_rl.experience import Experience
from align.online_rl.scoring import Scores
from align.rl.update import Diagnostics


def compute_metrics(
    completions: Completions,
    experience: Experience,
    scores: Scores,
    diagnostics: Diagnostics | None = None,
) -> dict[str, float]:
    """Metrics of a batch, and of its update if it had one. All ranks return the same numbers.

    ``kl`` is in nats per completion, ``kl_per_token`` and ``entropy`` in nats per token. Metrics
    that do not exist, such as the critic's loss without a critic, are left out.
    """
    mask = experience.mask
    logratio = (experience.logps - experience.ref_logps).masked_fill(~mask, 0)
    lengths = torch.tensor(completions.lengths, dtype=torch.float32)
    finished = torch.tensor([float(f) for f in completions.finished])
    per_completion: dict[str, Tensor | float] = {
        "kl": logratio.sum(),
        "tokens": lengths.sum(),
        "missing_eos": len(lengths) - finished.sum(),
    }
    if completions.episodes is not None:
        per_completion |= {
            "turns": float(sum(map(len, completions.turns))),
            "ended": float(sum(episode.ended for episode in completions.episodes)),
        }
    per_completion |= {key: column.sum() for key, column in scores.columns().items()}
    counts: dict[str, Tensor | float] = {
        "n": float(len(lengths)),
        "entropy": experience.entropy.masked_fill(~mask, 0).sum(),
    }
    total = _sum_over_ranks({**per_completion, **counts}, experience.logps.device)
    n, tokens = total["n"], total["tokens"]
    metrics = {key: total[key] / n for key in per_completion}
    metrics |= {
        "kl_per_token": total["kl"] / tokens,
        "entropy": total["entropy"] / tokens,
    }
    metrics |= {f"variance_share/{name}": s for name, s in scores.variance_shares.items()}
    if diagnostics is not None:
        metrics |= update_metrics(diagnostics)
    return {key: value for key, value in metrics.items() if not math.isnan(value)}


def update_metrics(diagnostics: Diagnostics) -> dict[str, float]:
    """Metrics of an update; NaN where the update has none."""
    return {
        "policy_loss": diagnostics.policy_loss,
        "value_loss": diagnostics.value_loss,
        "kl_of_update": diagnostics.kl,
        "clip_fraction": diagnostics.clip_fraction,
        "ratio_max": diagnostics.ratio_max,
        "explained_variance": diagnostics.explained_variance,
        "grad_norm": diagnostics.grad_norm,
        "optimizer_steps": float(diagnostics.steps),
    }


def _sum_over_ranks(values: dict[str, Tensor | float], device: torch.device) -> dict[str, float]:
    where = "cpu" if device.type == "mps" else device  # MPS has no float64
    tensor = torch.tensor([float(v) for v in values.values()], dtype=torch.float64, device=where)
    return dict(zip(values, sum_over_ranks(tensor).tolist(), strict=True))
