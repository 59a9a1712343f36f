"""What a reward model of the embedded task looks at: its score differences on held-out pairs, regressed on gold's parts.

    python benchmarks/reward_parts.py runs/reward-… runs/prepare-…

Parts and scores are differences within a pair, divided by their standard deviation, so weights compare. The last row is the
gold score itself, by the same regression.
"""

from __future__ import annotations

import sys
from dataclasses import astuple, fields
from pathlib import Path

import pyarrow.parquet as pq
import torch

from align.rewards import gold, reward_model


def main() -> None:
    """Score, regress, print."""
    folder, data = map(Path, sys.argv[1:3])
    rows = pq.read_table(data / "pairs-test.parquet").to_pylist()
    model = reward_model.RewardModel.load(folder, dtype="float32", device="cpu")
    prompts = [row["prompt"] for row in rows]
    scores = [
        model.score(prompts, [row[side] for row in rows], batch_size=64)
        for side in ("chosen", "rejected")
    ]
    parts = torch.tensor(
        [
            [
                a - b
                for a, b in zip(
                    *(
                        astuple(
                            gold.gold_parts(row["prompt"][-1]["content"], row[side][-1]["content"])
                        )
                        for side in ("chosen", "rejected")
                    ),
                    strict=True,
                )
            ]
            for row in rows
        ]
    )
    truth = torch.tensor(
        [
            gold.gold_score(row["prompt"][-1]["content"], row["chosen"][-1]["content"])
            - gold.gold_score(row["prompt"][-1]["content"], row["rejected"][-1]["content"])
            for row in rows
        ]
    )
    print("|", " | ".join(["", *(each.name for each in fields(gold.GoldParts))]), "|")
    print("|" + "---|" * (len(fields(gold.GoldParts)) + 1))
    for name, target in ((folder.name, scores[0] - scores[1]), ("gold", truth)):
        weights = torch.linalg.lstsq(
            parts.double() / parts.double().std(0),
            (target.double() / target.double().std())[:, None],
        ).solution[:, 0]
        print("|", " | ".join([name, *(f"{w:.2f}" for w in weights.tolist())]), "|")


if __name__ == "__main__":
    main()
