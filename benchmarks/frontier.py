"""The reward-KL frontier of several methods, from one finished evaluation.

    python benchmarks/frontier.py runs/evaluate-… --scores runs/label_test-…

Reads the metrics of an ``evaluate`` stage that samples at the temperature of training: KL from the
baseline and the difference of scores, both with intervals over prompts. The method of a policy is
its name up to the last underscore: ``dpo_low`` and ``dpo_high`` form one line. ``--scores`` is a
``label`` stage with completions of the baseline and their scores by the same judge; it adds
best-of-n (Rafailov et al. 2023, arXiv:2305.18290, figure 2 left; Gao et al. 2022).

Prints a table, and writes ``frontier.png`` into the folder of the evaluation.
"""

from __future__ import annotations

import argparse
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from align.functional.best_of_n import best_of_n_kl, best_of_n_values
from align.functional.intervals import bootstrap_interval
from align.report import frontier
from align.report.frontier import FrontierPoint
from align.runtime import artifacts


def of_evaluation(metrics: dict[str, Any]) -> list[FrontierPoint]:
    """The points of the policies of an evaluation, as its artifact stores them."""
    drift = {row["policy"]: row for row in metrics["drift"]}
    points = []
    for row in metrics["comparisons"]:
        policy = drift.get(row["policy"])
        if policy is None or policy["kl"] is None or row["score_difference"] is None:
            continue  # the control, or a judge without scores
        low, high = policy["kl_ci"]
        gain_low, gain_high = row["score_difference_ci"]
        method = row["policy"].rpartition("_")[0] or row["policy"]
        points.append(
            FrontierPoint(
                method, policy["kl"], (low, high), row["score_difference"], (gain_low, gain_high)
            )
        )
    return points


def of_best_of_n(rows: list[dict[str, Any]]) -> list[FrontierPoint]:
    """Best-of-n of scored completions with the score itself, for n up to the smallest group."""
    ordered = sorted(rows, key=lambda row: repr(row["prompt"]))
    groups = [[r["score"] for r in group] for _, group in groupby(ordered, lambda r: repr(r["prompt"]))]  # fmt: skip
    largest = min(len(group) for group in groups)
    curves = torch.stack([best_of_n_values(s, s)[:largest] for s in map(torch.tensor, groups)])
    points = []
    for n in range(2, largest + 1):
        gains = (curves[:, n - 1] - curves[:, 0])[:, None]
        kl, interval = best_of_n_kl(n), bootstrap_interval(gains)
        points.append(
            FrontierPoint("best of n", kl, (kl, kl), float(gains.mean()), tuple(interval))
        )
    return points


def main() -> None:
    """Read the folders, print the points and draw them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("--scores", type=Path)
    args = parser.parse_args()
    artifact = artifacts.read_artifact(args.evaluation)
    if artifact is None:
        raise SystemExit(f"{args.evaluation}: no finished stage")
    points = of_evaluation(artifact.metrics)
    if args.scores is not None:
        (file,) = args.scores.glob("scores-*.parquet")
        points += of_best_of_n(pq.read_table(file).to_pylist())
    print("| method | KL | reward gained |\n|---|---|---|")
    for p in sorted(points, key=lambda p: (p.method, p.kl)):
        print(f"| {p.method} | {p.kl:.2f} ({p.kl_interval[0]:.2f} to {p.kl_interval[1]:.2f}) "
              f"| {p.gain:+.3f} ({p.gain_interval[0]:+.3f} to {p.gain_interval[1]:+.3f}) |")  # fmt: skip
    frontier.draw(points, args.evaluation / "frontier.png", reward="sentiment")


if __name__ == "__main__":
    main()
