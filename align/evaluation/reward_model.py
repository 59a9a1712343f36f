"""evaluation.reward_model"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from align.data import tables
from align.errors import UserError
from align.functional import winrate
from align.models import tokenization
from align.rewards import gold, reward_model
from align.runtime import artifacts, distributed
from align.runtime.progress import Logger

N_CENTER = 2048  # demonstrations whose mean is 0
N_BINS = 10  # of the calibration
LEVEL, RESAMPLES = 0.95, 2000
BATCH = 64


def center(
    model: reward_model.RewardModel, data: Path, folder: Path, logger: Logger
) -> dict[str, float | int]:
    """Store the mean score of SFT's demonstrations, and take it off from now on.

    Labelled completions come without any: there it is the mean of the chosen ones.
    """
    shown = tables.has_table(data, "demonstrations", "train")
    rows = tables.read(data, "demonstrations" if shown else "pairs", "train", most=N_CENTER)
    side = "completion" if shown else "chosen"
    rows = _fitting(model, rows, [side], logger)
    scores = _scores(model, rows, side, logger)
    mean = scores.mean().item()
    if distributed.is_main():
        artifacts.write_json(folder / reward_model.FILE, {reward_model.MEAN: mean})
    return {"score_mean": mean, "score_std": scores.std().item(), "demonstrations": len(rows)}


def measure(
    model: reward_model.RewardModel, data: Path, folder: Path, logger: Logger
) -> dict[str, Any] | None:
    """Accuracy, calibration and ceiling on held-out pairs; None where no prompt was held out.

    A pair's reward difference d says that the chosen one wins with probability sigmoid(d). ``calibration`` has, in bins of
    the likelier side's probability, how likely it was said to be and how often it was right.
    """
    split = next((s for s in ("test", "validation") if tables.has_table(data, "pairs", s)), "")
    if not split:
        logger.info("no held-out pairs: accuracy and calibration are not known")
        return None
    rows = _fitting(model, tables.read(data, "pairs", split), ["chosen", "rejected"], logger)
    chosen, rejected = (
        _scores(model, rows, side, logger).double() for side in ("chosen", "rejected")
    )
    right = winrate.outcomes(chosen[:, None], rejected[:, None])[:, 0]
    by_prompt: dict[str, list[float]] = {}
    for row, value in zip(rows, right.tolist(), strict=True):
        by_prompt.setdefault(row["prompt_id"], []).append(value)
    values = torch.tensor([sum(v) / len(v) for v in by_prompt.values()], dtype=torch.float64)
    interval = winrate.proportion_interval(values, confidence=LEVEL, resamples=RESAMPLES, seed=0)
    found = {
        "split": split,
        "pairs": len(rows),
        "accuracy": values.mean().item(),
        "ci": list(interval),
        "mean_margin": (chosen - rejected).mean().item(),
        "calibration": calibration(chosen - rejected),
        "expected_calibration_error": calibration_error(chosen - rejected),
    }
    return found | _ceiling(rows, by_prompt, chosen - rejected)


def calibration(margins: torch.Tensor) -> list[dict[str, float]]:
    """Bins of the likelier side's probability: mean of what was said, how often it was right, how many pairs."""
    said, right, place = _said(margins)
    return [
        {
            "said": said[place == k].mean().item(),
            "right": right[place == k].mean().item(),
            "pairs": int((place == k).sum()),
        }
        for k in range(N_BINS)
        if (place == k).any()
    ]


def calibration_error(margins: torch.Tensor) -> float:
    """Mean distance between what was said and how often it was right, over bins weighed by their pairs.

    Source: Naeini et al. 2015, Obtaining well calibrated probabilities using Bayesian binning, eq. 3.
    """
    return sum(
        each["pairs"] * abs(each["said"] - each["right"]) for each in calibration(margins)
    ) / len(margins)


def _said(margins: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Probability of the likelier side, whether it was the chosen one (one half for a tie), and the bin."""
    said = torch.sigmoid(margins.double().abs())
    right = torch.where(margins == 0, 0.5, (margins > 0).double())
    place = ((said - 0.5) * 2 * N_BINS).long().clamp(max=N_BINS - 1)
    return said, right, place


def _ceiling(
    rows: Sequence[Mapping[str, Any]], by_prompt: Mapping[str, Any], margins: torch.Tensor
) -> dict[str, float]:
    """What is known of the embedded task's labels: the best accuracy there is, and the agreement with gold itself."""
    try:
        gaps, best = [], {key: [] for key in by_prompt}  # type: list[float], dict[str, list[float]]
        for row in rows:
            prompt = row["prompt"][-1]["content"]
            sides = (row["chosen"][-1]["content"], row["rejected"][-1]["content"])
            p = gold.preference_probability(prompt, *sides)
            best[row["prompt_id"]].append(max(p, 1 - p))
            gaps.append(p - 0.5)
    except ValueError:
        return {}  # not the embedded task
    truth = torch.tensor(gaps, dtype=torch.float64)
    found = {"ceiling": sum(sum(v) / len(v) for v in best.values()) / len(best)}
    apart = truth != 0
    if apart.any():
        agree = ((margins > 0) == (truth > 0))[apart]
        found["agreement_with_gold"] = agree.double().mean().item()
    return found


def _fitting(
    model: reward_model.RewardModel,
    rows: list[dict[str, Any]],
    sides: Sequence[str],
    logger: Logger,
) -> list[dict[str, Any]]:
    """The rows that fit into the model's positions; how many do not is said."""
    limit = getattr(model.model.config, "max_position_embeddings", None)
    if limit is None:
        return rows

    def longest(row: Mapping[str, Any]) -> int:
        prompts, said = [row["prompt"]] * len(sides), [row[side] for side in sides]
        return max(map(len, tokenization.tokenize_for_reward(model.tokenizer, prompts, said)))

    kept = [row for row in rows if longest(row) <= limit]
    if len(kept) < len(rows):
        cut = len(rows) - len(kept)
        logger.info(f"{cut:,} of {len(rows):,} rows are longer than the model: not scored")
    if not kept:
        raise UserError(
            f"every row is longer than the model's {limit} positions; nothing to measure"
        )
    return kept


def _scores(
    model: reward_model.RewardModel, rows: Sequence[Mapping[str, Any]], side: str, logger: Logger
) -> torch.Tensor:
    """Scores of a column, each process scoring its share."""
    scores = distributed.map_rows(
        rows,
        lambda part: model.score(
            [row["prompt"] for row in part], [row[side] for row in part], batch_size=BATCH
        ).tolist(),
        size=None,
    )
    logger.step(len(rows), len(rows), what=f"scored {side}")
    return torch.tensor(scores)
