"""The metric of Hugging Face `evaluate`, loaded by `evaluate` itself."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import pytest
import torch

from align import functional

METRIC = Path(__file__).parents[2] / "metrics" / "win_rate"
pytestmark = pytest.mark.slow  # importing `evaluate` takes seconds


@pytest.fixture(scope="module")
def metric(tmp_path_factory):
    import evaluate

    path = list(sys.path)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_MODULES_CACHE", "HF_METRICS_CACHE"):
            patch.setattr(evaluate.config, name, tmp_path_factory.mktemp("cache"))
        yield evaluate.load(str(METRIC))
    sys.path[:] = path


def test_wins_ties_and_losses_are_counted_by_hand(metric):
    scores = {"predictions": [3.0, 2.0, 1.0, 5.0], "references": [1.0, 2.0, 2.0, 4.0]}
    results = metric.compute(**scores)
    assert results["win_rate"] == (1 + 0.5 + 0 + 1) / 4
    assert results["ties"] == 1 / 4
    assert (results["n_prompts"], results["invalid"]) == (4, 0)
    assert results["bounds"] == [0.625, 0.625]
    assert results["length_controlled_win_rate"] is None
    won = torch.tensor([[1.0], [0.5], [0.0], [1.0]], dtype=torch.float64)
    assert results["confidence_interval"] == list(functional.proportion_interval(won))
    assert results["p_value"] == functional.win_rate_p_value(won).item()


def test_a_missing_score_is_left_out_and_bounded(metric):
    results = metric.compute(predictions=[1.0, math.nan, 1.0], references=[0.0, 0.0, 2.0])
    assert (results["win_rate"], results["invalid"], results["n_prompts"]) == (0.5, 1, 2)
    assert results["bounds"] == pytest.approx([1 / 3, 2 / 3])
    with pytest.raises(ValueError, match="no comparison has two scores"):
        metric.compute(predictions=[math.nan], references=[0.0])


def test_completions_of_a_prompt_are_one_observation(metric):
    once = metric.compute(predictions=[1.0, 0.0, 1.0], references=[0.0, 1.0, 0.0])
    twice = metric.compute(
        predictions=[1.0, 0.0, 1.0] * 2, references=[0.0, 1.0, 0.0] * 2, prompt_ids=[*"abc"] * 2
    )
    assert twice == once  # a second copy is no more evidence
    with pytest.raises(ValueError, match="prompt_ids: expected 3, one per comparison; got 1"):
        metric.compute(predictions=[1.0] * 3, references=[0.0] * 3, prompt_ids=["a"])


def test_lengths_control_the_win_rate(metric):
    # The longer completion always wins; each side is longer in half of the prompts.
    lengths = [[1, 2, 3, 4], [4, 3, 2, 1]]
    results = metric.compute(
        predictions=[0.0, 0.0, 1.0, 1.0],
        references=[1.0, 1.0, 0.0, 0.0],
        prediction_lengths=lengths[0],
        reference_lengths=lengths[1],
    )
    assert results["length_controlled_win_rate"] == pytest.approx(0.5)
    scores = {"predictions": [1.0, 0.0], "references": [0.0, 1.0]}
    # All completions are longer by the same length, which cannot be separated from quality.
    equal = metric.compute(**scores, prediction_lengths=[2, 2], reference_lengths=[1, 1])
    assert equal["length_controlled_win_rate"] is None
    with pytest.raises(ValueError, match="must be given together"):
        metric.compute(**scores, prediction_lengths=[1, 2])
    with pytest.raises(ValueError, match="expected 2, one per comparison; got 1 and 2"):
        metric.compute(**scores, prediction_lengths=[1], reference_lengths=[1, 2])


def test_rows_may_be_added_in_batches(metric):
    metric.add_batch(predictions=[3.0, 2.0], references=[1.0, 2.0])
    metric.add(prediction=1.0, reference=2.0)
    assert metric.compute()["win_rate"] == 0.5


def test_the_card_lists_every_key_and_its_example_is_right(metric, capsys, monkeypatch):
    card = (METRIC / "README.md").read_text()
    results = metric.compute(predictions=[1.0], references=[0.0])
    output = card.split("## Output")[1].split("## ")[0]
    assert set(re.findall(r"`(\w+)`", output)) == results.keys()
    monkeypatch.chdir(METRIC.parents[1])
    (example,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(example)
    assert capsys.readouterr().out == "0.625\n"
