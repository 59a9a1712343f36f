"""Evaluation of a reward model: its mean score, and accuracy and calibration on held-out pairs.

Left out: training, which is the ``reward`` stage, and loading, which is
:mod:`align.rewards.reward_model`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.data import tables
from align.errors import DataError
from align.evaluation.intervals import Bootstrap, prompt_means
from align.evaluation.results import CalibrationBin, RewardModelReport
from align.evaluation.tables import percent, percent_interval
from align.functional import winrate
from align.models import tokenization
from align.rewards import gold, reward_model
from align.rewards.reward_model import RewardModel
from align.runtime import artifacts, distributed
from align.runtime.progress import Logger
from align.runtime.results import ResultTable

LOGGER = logging.getLogger("align.reward")
N_CENTER = 2048
"""Number of demonstrations whose mean score becomes 0."""
N_BINS = 10
"""Number of bins of the calibration."""
BATCH_SIZE = 64


def center(
    model: RewardModel, data: Path, output_dir: Path, logger: Logger
) -> dict[str, float | int]:
    """Store the mean score of the demonstrations, the offset of the model, in ``reward.json``.

    Labeled completions come without demonstrations; their chosen completions are scored instead.
    ``model`` must have an offset of 0.
    """
    has_demonstrations = tables.has_table(data, "demonstrations", "train")
    kind, column = ("demonstrations", "completion") if has_demonstrations else ("pairs", "chosen")
    rows = rows_that_fit(model, tables.read(data, kind, "train", most=N_CENTER), [column])
    scores = _score_column(model, rows, column, logger)
    mean = scores.mean().item()
    if distributed.is_main():
        artifacts.write_json(output_dir / reward_model.FILE, {reward_model.MEAN: mean})
    return {"score_mean": mean, "score_std": scores.std().item(), "demonstrations": len(rows)}


def measure(model: RewardModel, data: Path, logger: Logger) -> RewardModelReport | None:
    """Measure accuracy and calibration on the held-out pairs; None if no pair is held out.

    A difference d of scores predicts that the completion with the higher score is preferred with
    probability sigmoid(d).
    """
    split = next((s for s in ("test", "validation") if tables.has_table(data, "pairs", s)), None)
    if split is None:
        return None
    rows = rows_that_fit(model, tables.read(data, "pairs", split), ["chosen", "rejected"])
    chosen, rejected = (
        _score_column(model, rows, side, logger).double() for side in ("chosen", "rejected")
    )
    outcomes = winrate.outcomes(chosen[:, None], rejected[:, None])[:, 0]
    accuracies = prompt_means(rows, outcomes.tolist())
    return RewardModelReport(
        split=split,
        pairs=len(rows),
        accuracy=accuracies.mean().item(),
        ci=Bootstrap().proportion(accuracies),
        mean_margin=(chosen - rejected).mean().item(),
        calibration=calibration(chosen - rejected),
        expected_calibration_error=calibration_error(chosen - rejected),
        **gold_agreement(rows, chosen - rejected),
    )


def result_table(report: RewardModelReport) -> ResultTable:
    """One row with the accuracies and the calibration error."""
    cells = {
        "accuracy": percent(report.accuracy),
        "interval": percent_interval(report.ci),
        "upper bound": percent(report.accuracy_upper_bound),
        "agrees with gold": percent(report.agreement_with_gold),
        "calibration error": f"{report.expected_calibration_error:.3f}",
    }
    title = f"reward model on {report.pairs:,} held-out pairs"
    return ResultTable(title, tuple(cells), [tuple(cells.values())])


def calibration(margins: Tensor) -> tuple[CalibrationBin, ...]:
    """Calibration of score differences ``[pairs]``, in bins of the predicted probability.

    Empty bins are left out.
    """
    confidence = torch.sigmoid(margins.double().abs())
    correct = torch.where(margins == 0, 0.5, (margins > 0).double())  # a tie counts one half
    bin_of_pair = ((confidence - 0.5) * 2 * N_BINS).long().clamp(max=N_BINS - 1)
    return tuple(
        CalibrationBin(
            confidence=confidence[bin_of_pair == k].mean().item(),
            accuracy=correct[bin_of_pair == k].mean().item(),
            pairs=int((bin_of_pair == k).sum()),
        )
        for k in range(N_BINS)
        if (bin_of_pair == k).any()
    )


def calibration_error(margins: Tensor) -> float:
    """Expected calibration error: ``|confidence - accuracy|``, averaged over pairs.

    Source: Naeini et al. 2015, Obtaining well calibrated probabilities using Bayesian binning, eq.
    3.
    """
    return sum(
        each.pairs * abs(each.confidence - each.accuracy) for each in calibration(margins)
    ) / len(margins)


def gold_agreement(rows: Sequence[Mapping[str, Any]], margins: Tensor) -> dict[str, float]:
    """Compare score differences ``[pairs]`` with gold scores; empty for another task.

    ``accuracy_upper_bound`` is the expected accuracy of the best classifier, since the labels are
    noisy. ``agreement_with_gold`` is the share of pairs that the reward model orders as the gold
    score does; ties in the gold score are left out.
    """
    try:
        probabilities = [
            gold.preference_probability(
                row["prompt"][-1]["content"],
                row["chosen"][-1]["content"],
                row["rejected"][-1]["content"],
            )
            for row in rows
        ]
    except ValueError:
        return {}  # not prompts of the embedded task
    best = prompt_means(rows, [max(p, 1 - p) for p in probabilities])
    agreement: dict[str, float] = {"accuracy_upper_bound": sum(best.tolist()) / len(best)}
    gaps = torch.tensor([p - 0.5 for p in probabilities], dtype=torch.float64)
    untied = gaps != 0
    if untied.any():
        agrees = ((margins > 0) == (gaps > 0))[untied]
        agreement["agreement_with_gold"] = agrees.double().mean().item()
    return agreement


def rows_that_fit(
    model: RewardModel, rows: list[dict[str, Any]], columns: Sequence[str]
) -> list[dict[str, Any]]:
    """Rows that fit into the model's positions with each of the completions.

    A warning gives the number of other rows.

    Raises:
        DataError: No row fits.
    """
    limit = getattr(model.model.config, "max_position_embeddings", None)
    if limit is None:
        return rows
    assert model.tokenizer is not None

    def longest(row: Mapping[str, Any]) -> int:
        prompts, completions = [row["prompt"]] * len(columns), [row[column] for column in columns]
        ids = tokenization.tokenize_for_reward(model.tokenizer, prompts, completions)
        return max(map(len, ids))

    fitting = [row for row in rows if longest(row) <= limit]
    if not fitting:
        raise DataError(
            f"every row is longer than the reward model's {limit} positions, so none can be "
            "scored; train on a model with more positions"
        )
    if len(fitting) < len(rows):
        LOGGER.warning(
            "%d of %d rows are longer than the reward model's %d positions and are not scored",
            len(rows) - len(fitting),
            len(rows),
            limit,
        )
    return fitting


def _score_column(
    model: RewardModel, rows: Sequence[Mapping[str, Any]], column: str, logger: Logger
) -> Tensor:
    """Scores of one column of completions, ``[rows]``. The rows are shared over the ranks."""
    scores = distributed.map_rows(
        rows,
        lambda share: model.score(
            [row["prompt"] for row in share],
            [row[column] for row in share],
            batch_size=BATCH_SIZE,
        ).tolist(),
        size=None,
    )
    logger.step(len(rows), len(rows), unit=f"scored {column}")
    return torch.tensor(scores)
