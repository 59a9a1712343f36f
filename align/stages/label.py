"""Label: judge sampled completions, and write them as pairs for DPO and KTO.

``pairs-<split>.parquet`` has the columns of prepared data. A judge that scores also writes
``scores-<split>.parquet``, every completion with its score. Judges that compare, and several
judges, decide about all pairs of completions of a prompt.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from align.config.completions import Label
from align.data import pairing, statistics, tables
from align.data.rows import Row
from align.errors import DataError
from align.judges.base import Pair, ScoreJudge
from align.judges.build import Judge, build_judges, check_rows
from align.judges.preferences import preferences
from align.judges.scores import FunctionJudge, score_rows
from align.rewards import gold
from align.runtime import distributed
from align.runtime.progress import Logger
from align.runtime.results import StageResult


@dataclass(frozen=True, slots=True)
class LabeledSplit:
    """Finished completions of a split with their scores, and the pairs made of them."""

    rows: list[Row]
    scores: list[float] | None
    """None for judges that compare."""
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
    judges = build_judges(  # 1. judges
        config.judge,
        inputs,
        runs=output_dir.parent,
        dtype=config.dtype,
        quantization=config.quantization,
        batch_size=config.batch_size,
    )
    labeled: dict[str, LabeledSplit] = {}
    for split in splits:
        labeled[split] = _label(config, judges, data, split, logger)  # 2. judge and pair
        if distributed.is_main():
            _write(output_dir, split, labeled[split])  # 3. write
    metrics = _metrics(labeled)
    return StageResult(
        metrics, headline={"rows": metrics["rows"]}, remarks=tuple(statistics.remarks(metrics))
    )


def _label(
    config: Label, judges: Mapping[str, Judge], data: Path, split: str, logger: Logger
) -> LabeledSplit:
    """Judge the completions of a split and make pairs of them.

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
    check_rows(judges, rows, repair="set `judge` to a reward model")
    scores, n_finished = None, len(rows)
    if config.compares:
        result = _compare(config, judges, rows, logger)
    else:
        (judge,) = judges.values()
        assert isinstance(judge, ScoreJudge)
        scores = score_rows(judge, rows, batch_size=config.batch_size, logger=logger)
        if isinstance(judge, FunctionJudge):
            rows, scores = _scored(rows, scores)
        result = _pair(config, rows, scores)
    lost = {"completion cut off": len(sampled) - n_finished}
    lost["completion without a score"] = n_finished - len(rows)
    dropped = {reason: count for reason, count in lost.items() if count} | result.dropped
    if not result.rows:
        reasons = ", ".join(f"{count} × {reason}" for reason, count in dropped.items())
        raise DataError(
            f"{file}: {n_finished} completions give no pair: {reasons}; sample more completions per "
            "prompt, at a higher temperature, or lower `margin`"
        )
    return LabeledSplit(rows, scores, result.rows, result.agreement, dropped)


def _scored(rows: Sequence[Row], scores: Sequence[float]) -> tuple[list[Row], list[float]]:
    """The completions that a function has a score for."""
    scored = [each for each in zip(rows, scores, strict=True) if not math.isnan(each[1])]
    return [row for row, _ in scored], [score for _, score in scored]


def _pair(config: Label, rows: Sequence[Row], scores: Sequence[float]) -> pairing.PairingResult:
    """Pairs by the scores of one judge."""
    slope = None
    if config.label_noise == "bradley_terry":
        slope = config.label_noise_slope or (gold.LABEL_SLOPE if config.judge == "gold" else 1.0)
    return pairing.pairs_from_scores(
        rows,
        scores,
        pairing=config.pairing,
        margin=config.margin,
        slope=slope,
        max_pairs=config.max_pairs,
        seed=config.seed,
    )


def _compare(
    config: Label, judges: Mapping[str, Judge], rows: Sequence[Row], logger: Logger
) -> pairing.PairingResult:
    """Pairs by the decisions of judges about all pairs of completions of a prompt."""
    dropped: Counter[str] = Counter()
    candidates = pairing.candidates(rows, dropped)
    keys = rows[0].keys() - {"prompt", "completion"}
    pairs = [
        Pair(
            each.first["prompt"],
            each.first["completion"],
            each.second["completion"],
            {key: each.first[key] for key in sorted(keys)},
        )
        for each in candidates
    ]
    decided = preferences(judges, pairs, batch_size=config.batch_size, logger=logger)
    return pairing.pairs_from_preferences(
        candidates,
        decided,
        dropped,
        pairing=config.pairing,
        max_pairs=config.max_pairs,
        seed=config.seed,
    )


def _write(output_dir: Path, split: str, labeled: LabeledSplit) -> None:
    contents = {
        "pairs": [
            {key: value for key, value in pair.items() if not key.endswith("_score")}
            | {"margin": pair["chosen_score"] - pair["rejected_score"]}
            for pair in labeled.pairs
        ]
    }
    if labeled.scores is not None:
        scored = zip(labeled.rows, labeled.scores, strict=True)
        contents["scores"] = [row | {"score": score} for row, score in scored]
    for kind, rows in contents.items():
        tables.write(rows, tables.table_file(output_dir, kind, split))


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
        "mean_score": None if last.scores is None else fmean(last.scores),
        "words": statistics.median_words(last.pairs, ("prompt", "chosen", "rejected")),
    }
