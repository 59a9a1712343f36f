"""`align eval reward` as a function: pairs, choices and best-of-n of a reward model."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import ppo_fixtures, tiny_models
from torch.testing import assert_close

import align
from align.errors import DataError
from align.evaluation import best_of_n, reward_evaluation
from align.evaluation.best_of_n import PromptScores
from align.evaluation.reward_results import RewardEvaluation
from align.rewards.inference import load_reward_model
from align.runtime.results import ResultTable

TEXTS = ["The gull.", "A boat and a gull.", "Sea sea sea.", "Wind."]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> ppo_fixtures.Folders:
    return ppo_fixtures.folders(tmp_path_factory.getbasetemp())


class LengthJudge:
    """The score is the number of characters; NaN for the texts in ``unknown``."""

    name = "length"

    def __init__(self, unknown: Sequence[str] = ()) -> None:
        self.unknown = unknown

    def check_prompts(self, prompts: Sequence[Any], *, repair: str) -> None: ...

    def score(
        self, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Any]
    ) -> list[float]:
        assert all(len(column) == len(prompts) for column in columns.values())
        texts = [completion[-1]["content"] for completion in completions]
        return [math.nan if text in self.unknown else float(len(text)) for text in texts]


def evaluate(
    folders: ppo_fixtures.Folders, data: Path, tmp_path: Path, judge: Any = None
) -> RewardEvaluation:
    logger = tiny_models.logger("eval", tmp_path)
    return reward_evaluation.evaluate_reward_model(
        folders.adapter, data, judge=judge, logger=logger
    )


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def reference_scores(folders: ppo_fixtures.Folders, prompts: Sequence[str]) -> torch.Tensor:
    return load_reward_model(folders.adapter).score(prompts, [TEXTS] * len(prompts)).double()


def test_the_pairs_of_a_folder_are_those_of_the_reward_stage(
    folders: ppo_fixtures.Folders, tmp_path: Path
):
    evaluation = evaluate(folders, folders.world.data, tmp_path)
    assert evaluation.pairs is not None and evaluation.best_of_n is None
    assert evaluation.pairs.pairs == len(tiny_models.rows(folders.world.data, "pairs-test"))
    tables = reward_evaluation.result_tables(evaluation)
    assert [len(table.rows) > 0 for table in tables] == [True, True]
    json.dumps(evaluation.to_metrics(), allow_nan=False)


def test_training_prompts_are_refused(folders: ppo_fixtures.Folders, tmp_path: Path):
    row = tiny_models.rows(folders.world.data, "pairs-train")[0]
    texts = {side: row[side][0]["content"] for side in ("chosen", "rejected")}
    file = write(tmp_path / "pairs.jsonl", [{"prompt": row["prompt"]} | texts])
    with pytest.raises(DataError, match=r"1 of 1 held-out prompts of .* are in the training data"):
        evaluate(folders, file, tmp_path)


def test_choices_of_a_file(folders: ppo_fixtures.Folders, tmp_path: Path):
    prompts = ["One?", "Two?", "Three?"]
    rows = [{"prompt": p, "chosen": TEXTS[:1], "rejected": TEXTS[1:]} for p in prompts]
    evaluation = evaluate(folders, write(tmp_path / "choices.jsonl", rows), tmp_path)
    expected = (reference_scores(folders, prompts).argmax(1) == 0).double().mean().item()
    assert evaluation.choices is not None
    assert evaluation.choices.accuracy == expected
    (table,) = reward_evaluation.result_tables(evaluation)
    assert table.rows[0][0] == "all"


@pytest.mark.parametrize("form", ["file", "folder"])
def test_best_of_n_of_scored_completions(folders: ppo_fixtures.Folders, tmp_path: Path, form: str):
    prompts = ["One?", "Two?", "Three?", "Four?"]
    scores = reference_scores(folders, prompts)
    gold = torch.tensor([[float(len(text)) for text in TEXTS]] * len(prompts)).double()
    if form == "file":
        rows = [
            {"prompt": p, "completions": TEXTS, "scores": [len(t) for t in TEXTS]} for p in prompts
        ]
        data, judge = write(tmp_path / "scored.jsonl", rows), None
    else:
        data, judge = tmp_path / "samples", LengthJudge(unknown=["no score"])
        data.mkdir()
        texts = [(text, True) for text in TEXTS] + [("cut off", False), ("no score", True)]
        table = [
            {
                "prompt": [{"role": "user", "content": p}], "prompt_id": p, "finished": finished,
                "completion": [{"role": "assistant", "content": text}],
            }
            for p in prompts for text, finished in texts
        ]  # fmt: skip
        pq.write_table(pa.Table.from_pylist(table), data / "completions-test.parquet")
    report = evaluate(folders, data, tmp_path, judge).best_of_n
    assert report is not None
    assert (report.prompts, report.completions, report.left_out) == (4, 4, 0)
    assert report.judge == ("length" if judge else reward_evaluation.GIVEN_SCORES)
    assert [point.n for point in report.curve] == [1, 2, 4]
    for point in report.curve:
        subsets = list(itertools.combinations(range(4), point.n))
        picks = [
            (row, max(subset, key=lambda i: scores[row, i]), subset)
            for row in range(4) for subset in subsets
        ]  # fmt: skip
        expected = sum(gold[row, i] for row, i, _ in picks) / len(picks)
        assert_close(torch.tensor(point.gold), expected.float())
        best = [max(gold[row, j].item() for j in subset) for row, _, subset in picks]
        assert point.best_gold == pytest.approx(sum(best) / len(best))
        correct = [gold[row, i] == max(gold[row, j] for j in subset) for row, i, subset in picks]
        assert point.accuracy == pytest.approx(sum(map(float, correct)) / len(picks))


def prompt_scores(*counts: int) -> list[PromptScores]:
    return [PromptScores(torch.arange(float(n)), torch.arange(float(n))) for n in counts]


def test_prompts_with_few_completions_are_left_out_of_the_whole_curve():
    report = best_of_n.report(prompt_scores(*[8] * 18, 5, 2), judge="gold")
    # 18 of 20 prompts have 8 completions
    assert (report.completions, report.prompts, report.left_out) == (8, 18, 2)
    # a perfect reward model: the expected maximum of n of 0 to 7 is 9 n / (n + 1) - 1
    expected = [9 * n / (n + 1) - 1 for n in (1, 2, 4, 8)]
    assert [point.gold for point in report.curve] == pytest.approx(expected)
    assert [point.best_gold for point in report.curve] == pytest.approx(expected)
    assert [point.accuracy for point in report.curve] == pytest.approx([1.0] * 4)
    assert report.curve[0].accuracy_ci == (1.0, 1.0), "one completion is the best of one"
    assert report.curve[1].accuracy_ci.low < 1.0, "prompts with other picks may exist"
    report = best_of_n.report(prompt_scores(*[8] * 17, 5, 5, 2), judge="gold")
    assert (report.completions, report.prompts, report.left_out) == (5, 19, 1)


def test_one_completion_per_prompt_gives_no_curve():
    with pytest.raises(DataError, match="2 of 3 prompts have fewer than two completions"):
        best_of_n.report(prompt_scores(1, 1, 4), judge="gold")


def width(table: ResultTable) -> int:
    columns = zip(table.columns, *table.rows, strict=True)
    return sum(max(map(len, cells)) for cells in columns) + 2 * len(table.columns)


def test_the_table_of_best_of_n_fits_into_80_columns():
    prompts = [PromptScores(-each.scores - 10, each.gold * 10) for each in prompt_scores(*[64] * 9)]
    table = best_of_n.best_of_n_table(best_of_n.report(prompts, judge="gold"))
    assert width(table) <= 80


def test_the_python_api_measures_a_reward_model(folders: ppo_fixtures.Folders):
    evaluation = align.evaluate_reward_model(str(folders.adapter), str(folders.world.data))
    assert evaluation.pairs is not None and 0 <= evaluation.pairs.accuracy <= 1


def test_completions_that_were_all_cut_off_are_refused(
    folders: ppo_fixtures.Folders, tmp_path: Path
):
    row = {
        "prompt": [{"role": "user", "content": "One?"}], "prompt_id": "1", "finished": False,
        "completion": [{"role": "assistant", "content": "a"}],
    }  # fmt: skip
    pq.write_table(pa.Table.from_pylist([row, row]), tmp_path / "completions-test.parquet")
    message = "completions-test.parquet: none of 2 completions ends in a stop token"
    with pytest.raises(DataError, match=re.escape(message)):
        evaluate(folders, tmp_path, tmp_path, LengthJudge())


def test_a_folder_without_rows_to_measure_is_refused(folders: ppo_fixtures.Folders, tmp_path: Path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match="nothing to measure a reward model on"):
        evaluate(folders, empty, tmp_path)
    with pytest.raises(DataError, match="no such file or folder"):
        evaluate(folders, tmp_path / "missing", tmp_path)
