"""Win rates of annotation files: exact means, clusters, joint length control, and the command."""

from __future__ import annotations

import json
import math
import random
import statistics

import pytest
import torch
from torch.testing import assert_close
from typer.testing import CliRunner

from align.cli.main import app
from align.errors import DataError
from align.evaluation.annotated_win_rates import annotated_win_rates
from align.evaluation.scores import length_controlled_rates
from align.functional import length_control
from align.functional.length_control import (
    NotEstimableError,
    length_controlled_win_rate,
    length_controlled_win_rates,
)


def published(model, seed=0, n=60, baseline="base"):
    """Rows of a file in AlpacaEval's layout, with ties, missing and continuous preferences."""
    rng = random.Random(seed)
    rows = []
    for number in range(n):
        lengths = rng.randint(1, 300), rng.randint(1, 300)
        probability = 1 / (1 + math.exp((lengths[0] - lengths[1]) / 150 + rng.gauss(0, 1)))
        preference = rng.choice([None, 0, 1, 2, *[1 + probability] * 8])
        rows.append(
            {
                "instruction": f"question {number}",
                "output_1": "a" * lengths[0],
                "output_2": "b" * lengths[1],
                "generator_1": baseline,
                "generator_2": model,
                "annotator": "judge",
                "preference": preference,
            }
        )
    return rows


def write(path, rows):
    path.write_text(json.dumps(rows))
    return path


def decided(rows):
    return [row for row in rows if row["preference"] is not None]


def test_the_raw_win_rate_is_the_mean_preference_minus_one(tmp_path):
    rows = published("model")
    (result,) = annotated_win_rates([write(tmp_path / "a.json", rows)])
    values = [1.5 if row["preference"] == 0 else row["preference"] for row in decided(rows)]
    assert result.win_rate == pytest.approx(statistics.fmean(values) - 1, abs=1e-12)
    n, missing = len(values), len(rows) - len(values)
    assert missing > 0
    assert (result.n_decisions, result.n_prompts, result.invalid) == (n, n, missing)
    assert result.ties == pytest.approx(values.count(1.5) / n)
    won = sum(values) - n
    assert result.bounds == pytest.approx((won / (n + missing), (won + missing) / (n + missing)))
    assert result.ci.low < result.win_rate < result.ci.high
    lengths = [len(row["output_2"]) for row in decided(rows)]
    assert result.mean_characters.policy == pytest.approx(statistics.fmean(lengths))
    assert (result.policy, result.baseline, result.judge) == ("model", "base", "judge")


def test_a_file_counts_once_however_its_path_is_written(tmp_path, monkeypatch):
    write(tmp_path / "a.json", published("model"))
    (tmp_path / "link.json").symlink_to(tmp_path / "a.json")
    monkeypatch.chdir(tmp_path)
    spellings = ["a.json", tmp_path / "a.json", "./a.json", tmp_path, "link.json"]
    (result,) = annotated_win_rates(spellings)
    assert (result.file, result.n_jointly) == ("a.json", 1)


def test_a_fit_that_fails_leaves_the_other_rates(tmp_path, monkeypatch):
    def fail(*arguments):
        raise NotEstimableError("no convergence")

    files = [
        write(tmp_path / f"{name}.json", published(name, seed)) for seed, name in enumerate("ab")
    ]
    monkeypatch.setattr(length_control, "_fit", fail)
    one, other = annotated_win_rates(files)
    assert one.length_controlled_win_rate is other.length_controlled_win_rate is None
    outcomes, differences = torch.rand(2, 9), torch.rand(2, 9)
    assert length_controlled_rates(outcomes, differences) == [None, None]
    with pytest.raises(ValueError, match="expected 0 to 1"):
        length_controlled_rates(outcomes + 1, differences)


def tensors(rows):
    """Outcomes and length differences of a file; NaN and 0 where there is no decision."""
    outcomes, differences = [], []
    for row in rows:
        value = 1.5 if row["preference"] == 0 else row["preference"]
        outcomes.append(math.nan if value is None else value - 1)
        difference = len(row["output_2"]) - len(row["output_1"])
        differences.append(0 if value is None else difference)
    return torch.tensor(outcomes).double(), torch.tensor(differences).double()


def test_one_file_is_length_controlled_without_difficulty(tmp_path):
    rows = published("model")
    (result,) = annotated_win_rates([write(tmp_path / "a.json", rows)])
    assert result.n_jointly == 1
    expected = length_controlled_win_rate(*tensors(rows)).item()
    assert result.length_controlled_win_rate == pytest.approx(expected, abs=1e-8)


def test_difficulty_is_estimated_jointly_from_files_over_the_same_prompts(tmp_path):
    files = [published(f"model-{seed}", seed) for seed in range(3)]
    files[2] = files[2][3:]  # most prompts are the same
    paths = [write(tmp_path / f"{n}.json", rows) for n, rows in enumerate(files)]
    results = {result.policy: result for result in annotated_win_rates(paths)}
    outcomes, differences = map(torch.stack, zip(*map(tensors, files[:2]), strict=True))
    last = [torch.cat([torch.full((3,), fill).double(), values]) for values, fill in
            zip(tensors(files[2]), (math.nan, 0.0), strict=True)]  # fmt: skip
    expected = length_controlled_win_rates(
        torch.cat([outcomes, last[0][None]]), torch.cat([differences, last[1][None]])
    ).rates
    found = [results[f"model-{n}"].length_controlled_win_rate for n in range(3)]
    assert_close(torch.tensor(found, dtype=torch.float64), expected)
    assert {result.n_jointly for result in results.values()} == {3}
    (alone,) = annotated_win_rates(paths[:1])
    assert alone.length_controlled_win_rate != pytest.approx(found[0], abs=1e-6)


@pytest.mark.parametrize("change", ["instruction", "generator_1"])
def test_files_over_other_prompts_or_baselines_are_not_estimated_jointly(tmp_path, change):
    other = [row | {change: row[change] + " (other)"} for row in published("other", 1)]
    files = [write(tmp_path / "a.json", published("model")), write(tmp_path / "b.json", other)]
    assert [result.n_jointly for result in annotated_win_rates(files)] == [1, 1]


def test_results_are_sorted_by_win_rate_and_a_file_may_compare_several_policies(tmp_path):
    rows = published("strong") + published("weak", 1)
    for row in rows:
        row["preference"] = 1.8 if row["generator_2"] == "strong" else 1.2
    results = annotated_win_rates([write(tmp_path / "a.json", rows[::-1])])
    assert [(result.policy, round(result.win_rate, 9)) for result in results] == [
        ("strong", 0.8),
        ("weak", 0.2),
    ]


def test_decisions_of_a_prompt_are_one_observation_in_the_interval(tmp_path):
    rows = decided(published("model"))
    (once,) = annotated_win_rates([write(tmp_path / "a.json", rows)])
    (thrice,) = annotated_win_rates([write(tmp_path / "b.json", rows * 3)])
    assert (thrice.n_prompts, thrice.n_decisions) == (once.n_prompts, 3 * once.n_decisions)
    assert thrice.ci == pytest.approx(once.ci)  # three copies are no more evidence
    assert thrice.win_rate == pytest.approx(once.win_rate)
    assert thrice.length_controlled_win_rate == pytest.approx(once.length_controlled_win_rate)


def test_a_named_baseline_may_be_second(tmp_path):
    path = write(tmp_path / "a.json", published("model"))
    (first,) = annotated_win_rates([path])
    (swapped,) = annotated_win_rates([path], baseline="model")
    assert (swapped.policy, swapped.baseline) == ("base", "model")
    assert swapped.win_rate == pytest.approx(1 - first.win_rate)
    # The regressor is antisymmetric, see length_controlled_win_rate.
    expected = 1 - first.length_controlled_win_rate
    assert swapped.length_controlled_win_rate == pytest.approx(expected)


def test_sides_in_random_order_need_a_named_baseline(tmp_path):
    row = {"prompt": "?", "first": "a", "second": "bb", "decision": "first"}
    names = {"first_policy": "dpo", "second_policy": "sft"}
    rows = [row | names, row | {"prompt": "!", "first_policy": "sft", "second_policy": "dpo"}]
    path = write(tmp_path / "a.json", rows)
    with pytest.raises(DataError, match=r"each first in some rows; .* --reference"):
        annotated_win_rates([path])
    (result,) = annotated_win_rates([path], baseline="sft")
    assert (result.policy, result.win_rate, result.n_prompts) == ("dpo", 0.5, 2)


def test_files_without_names_are_named_after_themselves(tmp_path):
    rows = [{"prompt": "?", "first": "a", "second": "b", "decision": "second"}]
    (result,) = annotated_win_rates([write(tmp_path / "mine.json", rows)])
    assert (result.policy, result.baseline, result.judge) == ("mine", "first completion", "")
    assert result.win_rate == 1.0


@pytest.mark.parametrize(
    ("change", "baseline", "message"),
    [
        pytest.param({}, "modle", "compares no policy with `modle`; did you mean `model`?", id="name"),
        pytest.param({"generator_1": None, "generator_2": None}, "base", "names no policies", id="no names"),
        pytest.param({"preference": None}, None, "no decision about `model`; all 60 rows have none", id="no decision"),
        pytest.param({"preference": 4}, None, "row 1: `preference`", id="value"),
    ],
)  # fmt: skip
def test_errors_of_all_files_are_reported_at_once(tmp_path, change, baseline, message):
    rows = [row | change for row in published("model")]
    files = [write(tmp_path / name, rows) for name in ("a.json", "b.json")]
    with pytest.raises(DataError) as error:
        annotated_win_rates(files, baseline=baseline)
    for file in files:
        assert any(str(file) in line and message in line for line in error.value.lines)


def test_the_command_prints_a_table_in_80_columns_and_json(tmp_path):
    files = [write(tmp_path / f"{n}.json", published(f"model-{n}", n)) for n in range(2)]
    arguments = ["eval", "annotations", *map(str, files)]
    printed = CliRunner().invoke(app, arguments).output
    assert "win rates against base" in printed
    assert "estimated jointly from 2 comparisons" in printed
    assert max(map(len, map(str.rstrip, printed.splitlines()))) <= 80
    shown = CliRunner().invoke(app, [*arguments, "--json"]).output
    comparisons = json.loads(shown)["comparisons"]
    assert [each["win_rate"] for each in comparisons] == [
        result.win_rate for result in annotated_win_rates(files)
    ]
    assert f"{100 * comparisons[0]['win_rate']:.1f} %" in printed
    assert {"policy", "baseline", "judge", "ci", "invalid", "bounds"} <= comparisons[0].keys()
