"""Label: score sampled completions with a judge, and write them as pairs for DPO and KTO.

``pairs-<split>.parquet`` has the columns of prepared data; ``scores-<split>.parquet`` has every
completion with its score. Left out: judges that compare two completions, and judges behind an API.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from align.config.data import Label
from align.data import pairing, statistics, tables
from align.data.rows import Row
from align.errors import DataError
from align.judges.scores import Judge, build_judge, score_rows
from align.rewards import gold
from align.runtime import distributed
from align.runtime.progress import Logger
from align.runtime.results import StageResult


@dataclass(frozen=True, slots=True)
class LabeledSplit:
    """Finished completions of a split with their scores, and the pairs made of them."""

    rows: list[Row]
    scores: list[float]
    pairs: list[Row]
    agreement: float
    dropped: dict[str, int]


def run(
    config: Label, inputs: Mapping[str, Path | str], output_dir: Path, logger: Logger
) -> StageResult:
    """Score, pair and write every split that ``config.completions`` has."""
    data = Path(inputs["completions"])
    names = [name.partition("-") for name in tables.table_names(data)]
    splits = [split for kind, _, split in names if kind == "completions"]
    if not splits:
        raise DataError(f"{data}: no completions-*.parquet; set `completions` to a `sample` stage")
    judge = build_judge(  # 1. judge
        config.judge, inputs.get("judge"), dtype=config.dtype, batch_size=config.batch_size
    )
    labeled: dict[str, LabeledSplit] = {}
    for split in splits:
        labeled[split] = _label(config, judge, data, split, logger)  # 2. score and pair
        if distributed.is_main():
            _write(output_dir, split, labeled[split])  # 3. write
    metrics = _metrics(labeled)
    return StageResult(
        metrics, headline={"rows": metrics["rows"]}, remarks=tuple(statistics.remarks(metrics))
    )


def _label(config: Label, judge: Judge, data: Path, split: str, logger: Logger) -> LabeledSplit:
    """Score the completions of a split and make pairs of them.

    Raises:
        DataError: No completion ends in a stop token, no pair is left, or the judge cannot score
            the prompts.
    """
    sampled = tables.read(data, "completions", split)
    # A completion that the length limit cut off is left out: as a chosen one, it would teach to
    # stop within a sentence.
    rows = [row for row in sampled if row.get("finished", True)]
    file = tables.table_file(data, "completions", split)
    if not rows:
        raise DataError(
            f"{file}: none of {len(sampled)} completions ends in a stop token; sample again with a "
            "larger `max_new_tokens`"
        )
    judge.check_prompts([row["prompt"] for row in rows], repair="set `judge` to a reward model")
    slope = None
    if config.label_noise == "bradley_terry":
        slope = config.label_noise_slope or (gold.LABEL_SLOPE if config.judge == "gold" else 1.0)
    scores = score_rows(judge, rows, batch_size=config.batch_size, logger=logger)
    result = pairing.pairs_from_scores(
        rows,
        scores,
        pairing=config.pairing,
        margin=config.margin,
        slope=slope,
        max_pairs=config.max_pairs,
        seed=config.seed,
    )
    if not result.rows:
        reasons = ", ".join(f"{count} × {reason}" for reason, count in result.dropped.items())
        raise DataError(
            f"{file}: {len(rows)} completions give no pair: {reasons}; sample more completions per "
            "prompt, at a higher temperature, or lower `margin`"
        )
    cut_off = {"completion cut off": len(sampled) - len(rows)} if len(rows) < len(sampled) else {}
    return LabeledSplit(rows, scores, result.rows, result.agreement, cut_off | result.dropped)


def _write(output_dir: Path, split: str, labeled: LabeledSplit) -> None:
    contents = {
        "scores": [
            row | {"score": score} for row, score in zip(labeled.rows, labeled.scores, strict=True)
        ],
        "pairs": [
            {key: value for key, value in pair.items() if not key.endswith("_score")}
            | {"margin": pair["chosen_score"] - pair["rejected_score"]}
            for pair in labeled.pairs
        ],
    }
    for kind, rows in contents.items():
        file = tables.table_file(output_dir, kind, split)
        pq.write_table(pa.Table.from_pylist(rows), file, compression="zstd")


def _metrics(labeled: Mapping[str, LabeledSplit]) -> dict[str, Any]:
    """Counts by split, and the mean score and median lengths of the last split."""
    *_, last = labeled.values()
    return {
        "rows": sum(len(each.pairs) for each in labeled.values()),
        # Stages that read pairs expect a number for the training split.
        "pairs": {"train": 0} | {split: len(each.pairs) for split, each in labeled.items()},
        "dropped": {
            f"{split}: {reason}": count
            for split, each in labeled.items()
            for reason, count in each.dropped.items()
        },
        "agreement": {split: each.agreement for split, each in labeled.items()},
        "mean_score": fmean(last.scores),
        "words": statistics.median_words(last.pairs, ("prompt", "chosen", "rejected")),
    }
