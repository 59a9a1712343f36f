"""Prediction-powered inference: a judge corrected by the labels of people.

Decisions of people about a few prompts measure the judge's bias, and the judge's verdicts about
all other prompts reduce the variance.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from align.functional.distributions import normal_quantile
from align.functional.intervals import Estimate, Interval, check_confidence, prompt_means


def prediction_powered_mean(
    labels: Float[Tensor, "labeled *rest"],
    labeled_predictions: Float[Tensor, "labeled *rest"],
    predictions: Float[Tensor, "unlabeled *rest"],
    *,
    confidence: float = 0.95,
) -> Estimate:
    """Mean of the labels, estimated from a few labels and many predictions.

    The estimate is ``mean(labels) + weight * (mean(predictions) - mean(labeled_predictions))``,
    with the weight that minimizes its variance. It needs no assumption about the predictions: with
    useless ones the weight is about 0, and the result that of the labels alone. ``predictions`` are
    those of prompts without labels. The labeled prompts must be a random sample of all prompts.
    Values of one prompt are averaged first.

    Source: Angelopoulos et al. 2023, arXiv:2301.09633, with the weight of Angelopoulos, Duchi and
    Zrnic 2023, arXiv:2311.01453, example 6.1.

    Raises:
        ValueError: There are fewer than two labels, or labels and their predictions do not match.
    """
    check_confidence(confidence)
    if labels.shape != labeled_predictions.shape:
        raise ValueError(
            f"labeled_predictions: expected the shape of the labels, {list(labels.shape)}, "
            f"found {list(labeled_predictions.shape)}"
        )
    missing = labels.isnan() | labeled_predictions.isnan()
    true = prompt_means(labels.masked_fill(missing, math.nan)).means
    judged = prompt_means(labeled_predictions.masked_fill(missing, math.nan)).means
    others = prompt_means(predictions).means
    n, unlabeled = len(true), len(others)
    if n < 2:
        raise ValueError(f"labels: expected at least two prompts, found {n}")
    covariance = float(((true - true.mean()) * (judged - judged.mean())).sum()) / (n - 1)
    variance = float(torch.cat([judged, others]).var())
    weight = 0.0
    if variance > 0:
        weight = min(1.0, max(0.0, covariance / ((1 + n / unlabeled) * variance)))
    value = float(true.mean()) + weight * (float(others.mean()) - float(judged.mean()))
    squared = float((true - weight * judged).var()) / n
    squared += weight**2 * variance / unlabeled
    margin = normal_quantile((1 + confidence) / 2) * math.sqrt(squared)
    return Estimate(value, Interval(value - margin, value + margin))
