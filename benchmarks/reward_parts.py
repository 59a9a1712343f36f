"""Regress the scores of a reward model of the embedded task on the parts of the gold score.

    python benchmarks/reward_parts.py runs/reward-… runs/prepare-…

Scores and parts are differences within held-out pairs, divided by their standard deviations, so
that the weights can be compared. The last row is the same regression for the gold score.
"""

from __future__ import annotations

import argparse
from dataclasses import astuple, fields
from pathlib import Path

import pyarrow.parquet as pq
import torch

from align.rewards import gold, reward_model


def main() -> None:
    """Read the command line, score the pairs, run both regressions, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("reward", type=Path, help="folder of a `reward` stage")
    parser.add_argument("data", type=Path, help="folder of its `prepare` stage")
    args = parser.parse_args()
    folder = args.reward
    rows = pq.read_table(args.data / "pairs-test.parquet").to_pylist()
    model = reward_model.RewardModel.load(folder, dtype="float32", device="cpu")
    prompts = [row["prompt"] for row in rows]
    scores = [
        model.score(prompts, [row[side] for row in rows], batch_size=64)
        for side in ("chosen", "rejected")
    ]
    differences = []
    for row in rows:
        prompt = row["prompt"][-1]["content"]
        chosen, rejected = (
            astuple(gold.gold_parts(prompt, row[side][-1]["content"]))
            for side in ("chosen", "rejected")
        )
        differences.append([a - b for a, b in zip(chosen, rejected, strict=True)])
    parts = torch.tensor(differences)
    gold_scores = torch.tensor(
        [
            gold.gold_score(row["prompt"][-1]["content"], row["chosen"][-1]["content"])
            - gold.gold_score(row["prompt"][-1]["content"], row["rejected"][-1]["content"])
            for row in rows
        ]
    )
    print("|", " | ".join(["", *(each.name for each in fields(gold.GoldParts))]), "|")
    print("|" + "---|" * (len(fields(gold.GoldParts)) + 1))
    for name, target in ((folder.name, scores[0] - scores[1]), ("gold", gold_scores)):
        weights = torch.linalg.lstsq(
            parts.double() / parts.double().std(0),
            (target.double() / target.double().std())[:, None],
        ).solution[:, 0]
        print("|", " | ".join([name, *(f"{w:.2f}" for w in weights.tolist())]), "|")


if __name__ == "__main__":
    main()
