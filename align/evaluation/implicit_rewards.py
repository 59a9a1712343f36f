"""evaluation.implicit_rewards"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from align.config.evaluate import Evaluate
from align.errors import UserError
from align.evaluation.intervals import interval
from align.functional import winrate
from align.models import loading, tokenization
from align.models.logps import completion_logps
from align.models.prefix_sharing import wrapper
from align.runtime import distributed
from align.runtime.progress import Logger

if TYPE_CHECKING:
    from align.evaluation.held_out import Row


# Implicit rewards ----------------------------------------------------------------------------------------------------


def implicit_rewards(
    config: Evaluate, rows: Sequence[Row], targets: Mapping[str, Path | str], logger: Logger
) -> dict[str, Any]:
    """How often ``log pi(y|x) - log pi_ref(y|x)`` is higher for the chosen completion; the baseline is the reference.

    A tie counts one half. The interval resamples prompts; each prompt counts once, however many pairs it has. Pairs whose
    prompt alone fills the model's length are ``invalid``: they are counted, and left out.
    """
    sides = [(row["prompt"], row[side]) for side in ("chosen", "rejected") for row in rows]
    logps = {}
    for done, (name, target) in enumerate(targets.items()):
        logps[name] = _logps(config, target, sides, logger, (done, len(targets)))
    found = []
    for name in config.policies:
        if name == config.baseline:
            continue
        chosen, rejected = (logps[name] - logps[config.baseline]).chunk(2)
        right = winrate.outcomes(chosen[:, None], rejected[:, None])[:, 0].tolist()
        by_prompt: dict[str, list[float]] = {}
        for row, value in zip(rows, right, strict=True):
            if not math.isnan(value):
                by_prompt.setdefault(row["prompt_id"], []).append(value)
        if not by_prompt:
            raise UserError(
                "every held-out prompt is longer than the model's length; nothing to measure"
            )
        values = torch.tensor([sum(v) / len(v) for v in by_prompt.values()], dtype=torch.float64)
        found.append(
            {
                "policy": name,
                "reference": config.baseline,
                "accuracy": values.mean().item(),
                "ci": interval(winrate.proportion_interval, values, config),
                "mean_margin": (chosen - rejected).nanmean().item(),
                "n_pairs": sum(map(len, by_prompt.values())),
                "n_prompts": len(values),
                "invalid": sum(map(math.isnan, right)),
            }
        )
    return {"implicit_rewards": found}


def _logps(
    config: Evaluate,
    target: Path | str,
    sides: Sequence[tuple[Any, Any]],
    logger: Logger,
    part: tuple[int, int],
) -> torch.Tensor:
    from accelerate import PartialState

    done, parts = part
    tokenizer = tokenization.load_tokenizer(target)
    model = loading.load_for_inference(target, dtype=config.dtype).to(PartialState().device)
    if config.prefix_sharing:
        wrapper.enable_prefix_sharing(model, say=logger.info)
    logps = distributed.map_rows(
        sides,
        lambda part: completion_logps(
            model,
            tokenizer,
            part,
            batch_size=config.batch_size,
            max_length=getattr(model.config, "max_position_embeddings", None),
            progress=lambda at, of: logger.step(
                done * of + at, parts * of, what="scored completion"
            ),
        ).tolist(),
        size=None,
    )
    return torch.tensor(logps, dtype=torch.float64)
