"""Label: a judge scores the completions of a ``sample`` stage, and they become pairs, in the files that DPO and KTO read.

``pairs-train.parquet`` is as ``prepare`` leaves it; ``scores-train.parquet`` has every completion with its score.
Left out: judges that compare two completions, and judges behind an API.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from align.config.data import Label
from align.data import pairing
from align.errors import UserError
from align.judges.scores import build_judge, score_rows
from align.rewards import gold
from align.runtime import distributed
from align.runtime.progress import Logger
from align.runtime.results import StageResult


def run(
    config: Label, inputs: Mapping[str, Path | str], output_dir: Path, logger: Logger
) -> StageResult:
    """Score, pair and write every split that ``config.completions`` has."""
    data = Path(inputs["completions"])
    files = {
        file.stem.partition("-")[2]: file for file in sorted(data.glob("completions-*.parquet"))
    }
    if not files:
        raise UserError(f"{data}: no completions-*.parquet; name a finished `sample` stage")
    judge = build_judge(
        config.judge, inputs.get("judge"), dtype=config.dtype, batch_size=config.batch_size
    )
    slope = None
    if config.label_noise == "bradley_terry":
        own = gold.LABEL_SLOPE if config.judge == "gold" else 1.0
        slope = own if config.label_noise_slope is None else config.label_noise_slope
    metrics: dict[str, Any] = {"rows": 0, "pairs": {}, "dropped": {}, "agreement": {}}
    for split, file in files.items():
        sampled = pq.read_table(file).to_pylist()
        # A text that the length limit cut off is no answer: chosen, it would teach to end in the middle of a sentence.
        rows = [row for row in sampled if row.get("finished", True)]
        if len(rows) < len(sampled):
            metrics["dropped"][f"{split}: completion cut off"] = len(sampled) - len(rows)
        if not rows:
            raise UserError(
                f"{file}: none of {len(sampled)} completions ends by itself; sample anew with more `max_new_tokens`"
            )
        judge.check_prompts([row["prompt"] for row in rows], repair="set `judge` to a reward model")
        scores = score_rows(judge, rows, batch_size=config.batch_size, logger=logger)
        found = pairing.pairs_from_scores(
            rows,
            scores,
            pairing=config.pairing,
            margin=config.margin,
            slope=slope,
            max_pairs=config.max_pairs,
            seed=config.seed,
        )
        if not found.rows:
            why = ", ".join(f"{number} × {reason}" for reason, number in found.dropped.items())
            raise UserError(
                f"{file}: no pair is left of {len(rows)} completions: {why}; sample more a prompt, at a higher "
                "temperature, or lower `margin`"
            )
        if distributed.is_main():
            _write(output_dir, split, rows, scores, found.rows)
        metrics["rows"] += len(found.rows)
        metrics["pairs"][split] = len(found.rows)
        metrics["agreement"][split] = found.agreement
        for reason, number in found.dropped.items():
            metrics["dropped"][f"{split}: {reason}"] = number
        metrics |= {"mean_score": statistics.fmean(scores), "words": _words(found.rows)}
    # What reads pairs expects those to train on among them.
    metrics["pairs"] = {"train": 0} | metrics["pairs"]
    return StageResult(metrics)


def _write(
    folder: Path,
    split: str,
    rows: Sequence[dict[str, Any]],
    scores: Sequence[float],
    pairs: Sequence[dict[str, Any]],
) -> None:
    tables = {
        "scores": [row | {"score": score} for row, score in zip(rows, scores, strict=True)],
        "pairs": [
            {k: v for k, v in pair.items() if not k.endswith("_score")}
            | {"margin": pair["chosen_score"] - pair["rejected_score"]}
            for pair in pairs
        ],
    }
    for kind, table in tables.items():
        file = folder / f"{kind}-{split}.parquet"
        pq.write_table(pa.Table.from_pylist(table), file, compression="zstd")


def _words(pairs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Median lengths, as prepared data tell them."""
    return {
        f"{column}_median": statistics.median(
            sum(len(turn["content"].split()) for turn in pair[column]) for pair in pairs
        )
        for column in ("prompt", "chosen", "rejected")
    }
