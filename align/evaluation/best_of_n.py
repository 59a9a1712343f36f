"""Best-of-n with a reward model, judged by other scores: the gold score, or those of a judge.

Left out: sampling the completions, which the ``sample`` stage does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from align.errors import DataError
from align.evaluation.intervals import Bootstrap
from align.evaluation.results import Interval
from align.evaluation.reward_results import BestOfN, BestOfNReport
from align.evaluation.tables import percent, percent_interval
from align.functional.best_of_n import best_of_n_accuracy, best_of_n_kl, best_of_n_values
from align.runtime.results import ResultTable

ENOUGH = 0.9
"""Share of the prompts that must have as many completions as the largest n."""


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Two scores of each completion of one prompt."""

    scores: Float[Tensor, " completions"]
    """Scores of the reward model, which picks a completion."""
    gold: Float[Tensor, " completions"]
    """Scores of the judge."""


def report(prompts: Sequence[PromptScores], *, judge: str) -> BestOfNReport:
    """The curve of best-of-n over n, and the accuracy of the picks.

    All completions of a prompt are used for every n, as the mean over all subsets of n. The largest
    n is one that 9 of 10 prompts reach; prompts with fewer completions are left out for every n, so
    that all points of the curve are about the same prompts.

    Raises:
        DataError: Fewer than 9 of 10 prompts have two completions.
    """
    counts = sorted((len(each.scores) for each in prompts), reverse=True)
    largest = counts[math.ceil(ENOUGH * len(counts)) - 1] if counts else 0
    if largest < 2:
        raise DataError(
            f"best-of-n: {sum(count < 2 for count in counts)} of {len(counts)} prompts have fewer "
            "than two completions with scores; sample more completions per prompt"
        )
    used = [each for each in prompts if len(each.scores) >= largest]
    scores, gold, best, accuracy = (
        torch.stack([curve(each)[:largest] for each in used])
        for curve in (
            lambda each: best_of_n_values(each.scores, each.scores),
            lambda each: best_of_n_values(each.scores, each.gold),
            lambda each: best_of_n_values(each.gold, each.gold),
            lambda each: best_of_n_accuracy(each.scores, each.gold),
        )
    )
    bootstrap = Bootstrap()
    points = [
        BestOfN(
            n=n,
            kl=best_of_n_kl(n),
            score=scores[:, n - 1].mean().item(),
            gold=gold[:, n - 1].mean().item(),
            gold_ci=bootstrap.mean(gold[:, n - 1]),
            best_gold=best[:, n - 1].mean().item(),
            accuracy=accuracy[:, n - 1].mean().item(),
            accuracy_ci=bootstrap.proportion(accuracy[:, n - 1]) if n > 1 else Interval(1.0, 1.0),
        )
        for n in points_of_curve(largest)
    ]
    return BestOfNReport(
        judge=judge,
        prompts=len(used),
        completions=largest,
        left_out=len(prompts) - len(used),
        curve=tuple(points),
    )


def points_of_curve(largest: int) -> list[int]:
    """1, 2, 4, 8, … up to the largest n, and that one.

    >>> points_of_curve(12)
    [1, 2, 4, 8, 12]
    """
    powers = [2**k for k in range(largest.bit_length()) if 2**k < largest]
    return [*powers, largest]


def best_of_n_table(report: BestOfNReport) -> ResultTable:
    """One row per n."""
    rows = [
        (
            str(point.n),
            f"{point.kl:.2f}",
            f"{point.score:.2f}",
            _decimals(point.gold),
            f"{_decimals(point.gold_ci.low)} to {_decimals(point.gold_ci.high)}",
            _decimals(point.best_gold),
            percent(point.accuracy),
            percent_interval(point.accuracy_ci) if point.n > 1 else "–",
        )
        for point in report.curve
    ]
    left_out = f"; {report.left_out:,} with fewer are left out" if report.left_out else ""
    return ResultTable(
        title=f"best-of-n, judged by {report.judge}; {report.prompts:,} prompts{left_out}",
        columns=("n", "KL", "score", "gold", "interval", "best", "accuracy", "interval"),
        rows=rows,
        note="score: by the reward model, of its pick; gold: by the judge, of that pick;\n"
        "best: of the best of n; accuracy: the pick is the best; means over all subsets;\n"
        "KL: in nats from the sampled policy, an upper bound",
    )


def _decimals(score: float) -> str:
    """A score with three decimals, or with one from 10 on."""
    return f"{score:.3f}" if abs(score) < 10 else f"{score:.1f}"
