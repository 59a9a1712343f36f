"""``align eval reward``: what a reward model is worth, on a stage's folder or on a file.

Held-out pairs give accuracy and calibration, several completions per prompt give choices or the
curve of best-of-n. Left out: reward models during training, which the ``reward`` stage measures.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from align.data import reward_files, tables
from align.data.reward_files import Choice
from align.data.rows import Row, prompt_id
from align.errors import DataError
from align.evaluation import best_of_n, reward_accuracy, reward_choices, reward_model
from align.evaluation.best_of_n import PromptScores
from align.evaluation.held_out import check_not_trained_on
from align.evaluation.reward_results import (
    BestOfNReport,
    ChoicesReport,
    RewardEvaluation,
)
from align.judges.base import ScoreJudge
from align.rewards.inference import load_reward_model
from align.rewards.reward_model import RewardModel
from align.runtime.progress import Logger, NullDisplay
from align.runtime.results import ResultTable

LOGGER = logging.getLogger("align.reward")
SPLITS = ("test", "validation", "train")
GIVEN_SCORES = "the scores of the data"


@dataclass(frozen=True, slots=True)
class _Completions:
    """Completions of several prompts, and their gold scores."""

    rows: list[Row]
    """Rows with ``prompt``, ``prompt_id`` and ``completion``."""
    gold: list[float]
    judge: str


@dataclass(frozen=True, slots=True)
class _Inputs:
    """Rows that a reward model is measured on."""

    place: str
    """Name of the split or of the file."""
    pairs: list[Row]
    choices: list[Choice]
    completions: _Completions | None

    @property
    def prompts(self) -> list[Row]:
        """A row with the identity of its prompt for everything that is measured."""
        rows = [*self.pairs, *({"prompt_id": prompt_id(c.prompt)} for c in self.choices)]
        return rows if self.completions is None else [*rows, *self.completions.rows]


def evaluate_reward_model(
    source: Path | str,
    data: Path | str,
    *,
    judge: ScoreJudge | None = None,
    dtype: str = "float32",
    quantization: str | None = None,
    logger: Logger | None = None,
) -> RewardEvaluation:
    """Measure a reward model on a folder of a stage, or on a file.

    A folder of ``prepare`` or ``label`` has pairs. One of ``sample`` or ``label`` has completions;
    ``judge`` scores those that ended, and without a judge the scores of ``label`` are used. A file
    has pairs, choices or scored completions. Without a logger, no progress is shown.

    Raises:
        DataError: There is nothing to measure on, the model was trained on these prompts, or the
            data cannot be read.
        UserError: The model cannot be loaded.
    """
    data = Path(data)
    logger = logger or Logger("reward", Path(), NullDisplay(), main=False)
    if data.is_dir():
        inputs = _read_folder(data, judge, logger)
    elif data.is_file():
        inputs = _read_file(data)
    else:
        raise DataError(f"{data}: no such file or folder; expected a stage's folder or a file")
    if not inputs.prompts:
        raise DataError(
            f"{data}: nothing to measure a reward model on; expected held-out pairs, or completions "
            "and a judge (`--judge gold`): the folder of a `prepare`, `sample` or `label` stage"
        )
    check_not_trained_on(inputs.prompts, data, {str(source): source})
    model = load_reward_model(source, dtype=dtype, quantization=quantization).reward_model
    pairs = choices = curve = None
    if inputs.pairs:
        pairs = reward_model.measure_pairs(model, inputs.pairs, logger, split=inputs.place)
    if inputs.choices:
        choices = _measure_choices(model, inputs.choices, inputs.place, logger)
    if inputs.completions is not None:
        try:
            curve = _measure_best_of_n(model, inputs.completions, logger)
        except DataError as error:
            if pairs is None:
                raise
            LOGGER.warning("%s: %s", data, error)
    return RewardEvaluation(model=str(source), pairs=pairs, choices=choices, best_of_n=curve)


def _read_folder(data: Path, judge: ScoreJudge | None, logger: Logger) -> _Inputs:
    split = next((s for s in SPLITS[:2] if tables.has_table(data, "pairs", s)), None)
    pairs = [] if split is None else tables.read(data, "pairs", split)
    return _Inputs(split or "", pairs, [], _read_completions(data, judge, logger))


def _read_file(data: Path) -> _Inputs:
    file = reward_files.read_reward_file(data)
    for reason, count in file.dropped.items():
        first = file.examples[reason]
        LOGGER.warning("%s: %d pairs left out: %s (%s)", data, count, reason, first)
    completions = None
    if file.scored:
        rows = [
            {"prompt": row.prompt, "prompt_id": prompt_id(row.prompt), "completion": completion}
            for row in file.scored
            for completion in row.completions
        ]
        scores = [score for row in file.scored for score in row.scores]
        completions = _Completions(rows, scores, GIVEN_SCORES)
    return _Inputs(str(data), file.pairs, file.choices, completions)


def result_tables(evaluation: RewardEvaluation) -> list[ResultTable]:
    """The tables of everything that was measured."""
    result = []
    if evaluation.pairs is not None:
        result.append(reward_accuracy.result_table(evaluation.pairs))
        result.append(reward_accuracy.group_table(evaluation.pairs))
    if evaluation.choices is not None:
        result.append(reward_choices.choices_table(evaluation.choices))
    if evaluation.best_of_n is not None:
        result.append(best_of_n.best_of_n_table(evaluation.best_of_n))
    return result


def _read_completions(data: Path, judge: ScoreJudge | None, logger: Logger) -> _Completions | None:
    """Finished completions with the scores of a judge, or with those of a ``label`` stage."""
    kinds = ("scores",) if judge is None else ("completions", "scores")
    for split, kind in itertools.product(SPLITS, kinds):
        if not tables.has_table(data, kind, split):
            continue
        sampled = tables.read(data, kind, split)
        rows = [row for row in sampled if row.get("finished", True)]
        if not rows:
            raise DataError(
                f"{tables.table_file(data, kind, split)}: none of {len(sampled)} completions ends in "
                "a stop token; sample again with a larger `max_new_tokens`"
            )
        if judge is None:
            return _Completions(rows, [row["score"] for row in rows], GIVEN_SCORES)
        prompts = [row["prompt"] for row in rows]
        judge.check_prompts(prompts, repair="use another judge")
        names = [name for name in rows[0] if name not in ("prompt", "completion")]
        columns = {name: [row[name] for row in rows] for name in names}
        gold = judge.score(prompts, [row["completion"] for row in rows], columns)
        logger.step(len(rows), len(rows), unit=f"scored by {judge.name}")
        return _Completions(rows, list(gold), judge.name)
    return None


def _measure_best_of_n(
    model: RewardModel, completions: _Completions, logger: Logger
) -> BestOfNReport:
    """Score the completions; those without a finite gold score are left out."""
    judged = [
        row | {"gold": gold}
        for row, gold in zip(completions.rows, completions.gold, strict=True)
        if math.isfinite(gold)
    ]
    rows = reward_model.rows_that_fit(model, judged, ["completion"])
    scores = reward_model.score_column(model, rows, "completion", logger)
    by_prompt: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        by_prompt.setdefault(row["prompt_id"], []).append(place)
    gold = torch.tensor([row["gold"] for row in rows], dtype=torch.float64)
    prompts = [PromptScores(scores[places].double(), gold[places]) for places in by_prompt.values()]
    return best_of_n.report(prompts, judge=completions.judge)


def _measure_choices(
    model: RewardModel, choices: Sequence[Choice], place: str, logger: Logger
) -> ChoicesReport:
    """Score every completion; choices with a completion that the model cannot read are left out."""
    rows = [
        {"prompt": choice.prompt, "completion": completion, "choice": k, "side": side}
        for k, choice in enumerate(choices)
        for side in ("chosen", "rejected")
        for completion in getattr(choice, side)
    ]
    fitting = reward_model.rows_that_fit(model, rows, ["completion"])
    scores = reward_model.score_column(model, fitting, "completion", logger).tolist()
    sides: dict[tuple[int, str], list[float]] = {}
    for row, score in zip(fitting, scores, strict=True):
        sides.setdefault((row["choice"], row["side"]), []).append(score)
    complete = [
        k
        for k, choice in enumerate(choices)
        if len(sides.get((k, "chosen"), [])) == len(choice.chosen)
        and len(sides.get((k, "rejected"), [])) == len(choice.rejected)
    ]
    if not complete:
        raise DataError(
            f"{place}: every row has a completion that is longer than the reward model's positions"
        )
    return reward_choices.report(
        [choices[k] for k in complete],
        [sides[k, "chosen"] for k in complete],
        [sides[k, "rejected"] for k in complete],
        place=place,
    )
