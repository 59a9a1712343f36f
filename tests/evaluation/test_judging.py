"""Judges in an evaluation: both orders, missing verdicts, panels, people, cards; no model runs."""

from __future__ import annotations

import io
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny_models
from rich.console import Console

from align.config.evaluate import Evaluate
from align.data import tables as data_tables
from align.data.rows import prompt_id
from align.errors import DataError
from align.evaluation import tables
from align.evaluation.completions import Samples, matches, read_completions
from align.evaluation.judge_tables import judge_tables
from align.evaluation.judging import judge_all
from align.evaluation.panel import add_ties
from align.evaluation.results import Estimate, EvaluationMetrics, Interval
from align.functional.intervals import proportion_interval
from align.judges.base import Pair, Verdict
from align.models.generation import Completion
from align.pipeline.summary import render_table
from align.stages.evaluate import judged_metrics

NOTHING = Verdict(math.nan, "no answer")


class Comparer:
    """Compares two texts by a function of both, in the order in which they are read."""

    name = "comparer"
    reads_in_order = True
    covers_all = True
    usage = None

    def __init__(self, prefer: Callable[[str, str], float | Verdict]) -> None:
        self.prefer = prefer
        self.pairs: list[Pair] = []

    def compare(self, pairs: Sequence[Pair]) -> list[Verdict]:
        self.pairs += pairs
        verdicts = [self.prefer(p.first[-1]["content"], p.second[-1]["content"]) for p in pairs]
        return [each if isinstance(each, Verdict) else Verdict(each) for each in verdicts]


class People(Comparer):
    """The same for people, who label some pairs, in one order."""

    name = "people"
    reads_in_order = False
    covers_all = False


class Lengths:
    """Scores a completion by its length."""

    name = "lengths"

    def check_prompts(self, prompts: Any, *, repair: str) -> None: ...

    def score(self, prompts: Any, completions: Any, columns: Any) -> list[float]:
        return [float(len(each[-1]["content"])) for each in completions]


def prompts(n: int) -> list[dict[str, Any]]:
    return [
        {"prompt": [{"role": "user", "content": f"Question {i}?"}], "prompt_id": str(i)}
        for i in range(n)
    ]


def texts(rows: Sequence[Sequence[str]], *, is_sampled: bool = False) -> Samples:
    return Samples(
        [[Completion(text, len(text), True) for text in row] for row in rows], is_sampled
    )


def settings(*policies: str, **more: Any) -> Evaluate:
    return Evaluate(
        policies=list(policies),
        **{"baseline": "reference", "judge": "gold", "resamples": 100} | more,
    )


def evaluate(
    config: Evaluate, judges: dict[str, Any], samples: dict[str, Samples], folder: Path
) -> EvaluationMetrics:
    rows = prompts(len(next(iter(samples.values())).completions))
    logger = tiny_models.logger("evaluate", folder)
    outcomes = judge_all(config, judges, rows, samples, logger)
    return EvaluationMetrics(**judged_metrics(config, judges, outcomes, samples))


def test_a_judge_that_compares_reads_both_orders_and_a_flip_is_half_a_win(tmp_path: Path):
    # always the first: 1/2 in each pair; always the longer: decided in each pair
    samples = {"a": texts([["long"], ["longer"], ["x"]]), "reference": texts([["no"]] * 3)}
    first = Comparer(lambda one, other: 1.0)
    longer = Comparer(lambda one, other: float(len(one) > len(other)))
    metrics = evaluate(settings("a"), {"first": first, "longer": longer}, samples, tmp_path)
    by_first, by_longer, panel = metrics.comparisons
    assert (by_first.win_rate, by_first.ties, by_first.consistency) == (0.5, 1.0, 0.0)
    assert by_longer.win_rate == pytest.approx(2 / 3)
    assert (by_longer.ties, by_longer.consistency) == (0.0, 1.0)
    assert len(first.pairs) == 6
    assert {(p.first[-1]["content"], p.second[-1]["content"]) for p in first.pairs[:2]} == {
        ("long", "no"),
        ("no", "long"),
    }
    assert panel.judge == "panel"
    assert panel.win_rate == pytest.approx((1 / 2 + 2 / 3) / 2)
    card = {each.judge: each for each in metrics.judges}
    assert card["first"].position_bias.value == 1.0
    assert card["longer"].position_bias.value == 0.5
    assert card["longer"].length_bias.value == 1.0
    assert card["first"].length_bias.value == 0.5


def test_equal_completions_are_a_tie_and_not_sent_to_the_judge(tmp_path: Path):
    judge = Comparer(lambda one, other: 1.0)
    samples = {"a": texts([["same"], ["more"]]), "reference": texts([["same"], ["less"]])}
    (row,) = evaluate(settings("a"), {"judge": judge}, samples, tmp_path).comparisons
    assert len(judge.pairs) == 2
    assert row.n_prompts == 2


def test_equal_completions_tell_nothing_about_a_judge(tmp_path: Path):
    # 10 equal pairs and 10 others, in which the judges always prefer what they read first or own
    own = [["same"]] * 10 + [["own"]] * 10
    samples = {"a": texts(own), "reference": texts([["same"]] * 10 + [["base"]] * 10)}
    criteria = {"short": 1.0}
    first = Comparer(lambda one, other: Verdict(1.0, criteria=criteria))
    wins = Comparer(lambda one, other: Verdict(float(one == "own")))
    judges = {"first": first, "wins": wins}
    metrics = evaluate(settings("a"), judges, samples, tmp_path)
    row, decided, panel = metrics.comparisons
    assert (row.win_rate, row.ties, row.consistency, row.n_pairs) == (0.5, 1.0, 0.0, 20)
    assert (decided.win_rate, decided.ties, decided.consistency) == (0.75, 0.5, 1.0)
    assert panel.win_rate == 0.625
    assert row.criteria["short"].value == 0.5
    card = metrics.judges[0]
    assert (card.n_pairs, card.consistency.value, card.position_bias.value) == (10, 0.0, 1.0)
    (agreement,) = metrics.agreement
    assert (agreement.n_pairs, agreement.same) == (10, 0.0)
    always = Comparer(
        lambda one, other: Verdict(float(one == "own"), criteria={"x": 1.0 * (one == "own")})
    )
    metrics = evaluate(settings("a"), {"always": always}, samples, tmp_path)
    assert metrics.comparisons[0].criteria["x"].value == 0.75, "the win rate by one criterion"


def test_only_equal_completions_are_no_evidence_about_a_judge(tmp_path: Path):
    samples = {"a": texts([["same"]] * 4), "reference": texts([["same"]] * 4)}
    judge = Comparer(lambda one, other: 1.0)
    metrics = evaluate(settings("a"), {"judge": judge}, samples, tmp_path)
    assert (metrics.comparisons[0].win_rate, metrics.comparisons[0].consistency) == (0.5, None)
    assert metrics.judges == ()


def test_equal_completions_are_ties_for_people_too(tmp_path: Path):
    # Half of 400 pairs are equal. Of the others people prefer the policy in 90 %, so that the rate
    # of all pairs is 70 %; the judge, which prefers it in 60 %, reads them all, people label 80.
    generator = random.Random(5)
    own, base, labels = [], [], {}
    for i in range(400):
        text = f"text {i}"
        own.append([text])
        base.append([text if i % 2 else "base"])
        if not i % 2:
            labels[text] = float(i % 20 != 0)  # 9 in 10
    judged = {text: float(generator.random() < 0.6) for text in labels}
    labeled = set(list(labels)[:80])

    def by(decisions: dict[str, float], known: set[str]) -> Callable[[str, str], float | Verdict]:
        def prefer(one: str, other: str) -> float | Verdict:
            text = one if one in labels else other
            if text not in known:
                return NOTHING
            return decisions[text] if text == one else 1 - decisions[text]

        return prefer

    samples = {"a": texts(own), "reference": texts(base)}
    judges = {
        "judge": Comparer(by(judged, set(labels))),
        "people": People(by(labels, labeled)),
    }
    metrics = evaluate(settings("a"), judges, samples, tmp_path)
    row, people = metrics.comparisons
    assert people.win_rate == pytest.approx(0.7)
    assert people.ties == pytest.approx(0.5)
    assert people.ci.low < 0.7 < people.ci.high
    assert row.corrected.value == pytest.approx(0.7, abs=0.02)
    assert row.corrected.ci.low < 0.7 < row.corrected.ci.high


def test_the_corrected_rate_covers_the_truth_with_equal_completions():
    # the share of equal completions is random as well: both deviations belong to the interval
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(300):
        share = float((torch.rand(100, generator=generator) < 0.5).double().mean())
        won = (torch.rand(40, 1, generator=generator) < 0.9).double()
        different = Estimate(float(won.mean()), Interval(*proportion_interval(won)))
        low, high = add_ties(different, share=share, n_prompts=100, confidence=0.95).ci
        covered += low < 0.7 < high
    assert 0.91 <= covered / 300 <= 0.99
    estimate = Estimate(0.75, Interval(0.5, 0.9))
    assert add_ties(estimate, share=0.0, n_prompts=9, confidence=0.95) == estimate


def test_the_labels_of_all_people_correct_a_judge(tmp_path: Path):
    # two files: the first has the labels of the first 30 of 100 prompts, the second of the next 30
    own = [[f"own {i}"] for i in range(100)]
    samples = {"a": texts(own), "reference": texts([["base"]] * 100)}

    def by(first: int, preference: float) -> Callable[[str, str], float | Verdict]:
        known = {f"own {i}" for i in range(first, first + 30)}
        return lambda one, other: preference if one in known else NOTHING

    judges = {
        "judge": Comparer(lambda one, other: float(one != "base")),
        "one": People(by(0, 1.0)),
        "two": People(by(30, 0.0)),
    }
    row = evaluate(settings("a"), judges, samples, tmp_path).comparisons[0]
    assert row.corrected.value == pytest.approx(0.5), "30 wins and 30 losses by people"


def test_resamples_change_no_win_rate(tmp_path: Path):
    samples = {"a": texts([["xxx"], ["x"], ["xxxx"]] * 5), "reference": texts([["xx"]] * 15)}
    few, many = (
        evaluate(settings("a", resamples=n), {"lengths": Lengths()}, samples, tmp_path)
        for n in (100, 900)
    )
    assert few.comparisons[0].ci == many.comparisons[0].ci
    assert few.comparisons[0].p_value == many.comparisons[0].p_value
    means = [each.comparisons[0].score_difference_ci for each in (few, many)]
    assert means[0] != means[1], "the interval of a mean is a bootstrap"


def test_missing_verdicts_are_no_losses_and_give_bounds(tmp_path: Path):
    # 20 prompts: the policy wins 12 and loses 4; 4 have no verdict in one of the orders.
    own = [["won"]] * 12 + [["lost"]] * 4 + [["lost, unclear"]] * 4
    verdicts = {"won": 1.0, "lost": 0.0, "base": 0.5, "lost, unclear": 0.0}

    def prefer(one: str, other: str) -> float | Verdict:
        if other == "lost, unclear":
            return NOTHING
        return verdicts[one] if other == "base" else 1 - verdicts[other]

    samples = {"a": texts(own), "reference": texts([["base"]] * 20)}
    metrics = evaluate(settings("a"), {"judge": Comparer(prefer)}, samples, tmp_path)
    (row,) = metrics.comparisons
    assert (row.win_rate, row.n_prompts, row.invalid) == (12 / 16, 16, 4)
    assert row.bounds == (12 / 20, 16 / 20)
    (line,) = tables.remarks(metrics, samples, ["judge"])
    assert line.startswith("warning: judge: 4 verdicts about a invalid")
    assert "60.0 or 80.0 %" in line


def test_few_missing_verdicts_are_reported_without_a_warning(tmp_path: Path):
    def prefer(one: str, other: str) -> float | Verdict:
        return NOTHING if "odd" in (one, other) else 1.0

    samples = {
        "a": texts([["odd"]] + [["even"]] * 19),
        "reference": texts([["base"]] * 20),
    }
    metrics = evaluate(settings("a"), {"judge": Comparer(prefer)}, samples, tmp_path)
    (line,) = tables.remarks(metrics, samples, ["judge"])
    assert line.startswith("judge: 1 verdict about a invalid"), "5 % are not above 5 %"


def test_a_judge_without_any_verdict_is_an_error_with_its_reason(tmp_path: Path):
    samples = {"a": texts([["x"]]), "reference": texts([["y"]])}
    judge = Comparer(lambda one, other: NOTHING)
    with pytest.raises(DataError, match=r"judge: no usable verdict about `a`.*no answer"):
        evaluate(settings("a"), {"judge": judge}, samples, tmp_path)


def test_policies_without_a_common_prompt_are_named(tmp_path: Path):
    samples = {"a": texts([["x"], []]), "reference": texts([[], ["y"]])}
    with pytest.raises(DataError, match="no held-out prompt has a completion of both"):
        evaluate(settings("a"), {"lengths": Lengths()}, samples, tmp_path)


def test_people_label_some_pairs_and_correct_the_judge(tmp_path: Path):
    # The judge prefers the longer text, people the text with "good"; they labeled 40 of 200.
    generator = random.Random(0)
    own, labels = [], []
    for i in range(200):
        good = generator.random() < 0.3
        long = generator.random() < (0.9 if good else 0.6)
        own.append([f"{'good' if good else 'bad'} {'word ' * 5 * long}{i}"])
        labels.append(i % 5 == 0)
    samples = {"a": texts(own), "reference": texts([["a base text"]] * 200)}
    labeled = {text for (text,), each in zip(own, labels, strict=True) if each}

    def by_people(one: str, other: str) -> float | Verdict:
        return float(one.startswith("good")) if one in labeled else NOTHING

    longer = Comparer(lambda one, other: float(len(one) > len(other)))
    judges = {"longer": longer, "people": People(by_people)}
    metrics = evaluate(settings("a"), judges, samples, tmp_path)
    judged, people = metrics.comparisons
    truth = sum(text.startswith("good") for (text,) in own) / 200
    assert (people.n_prompts, people.invalid, people.bounds) == (40, 0, None)
    assert people.corrected is None
    assert judged.win_rate > truth + 0.2, "the judge is biased"
    assert judged.corrected.ci.low < truth < judged.corrected.ci.high
    # The labels' mean, moved by the judge's difference between all other prompts and these, times
    # the weight that minimizes the variance (arXiv:2311.01453, example 6.1).
    is_good = np.array([text.startswith("good") for (text,) in own], dtype=float)
    is_long = np.array([len(text) > len("a base text") for (text,) in own], dtype=float)
    known = np.array(labels)
    covariance = np.cov(is_good[known], is_long[known])[0, 1]
    weight = covariance / ((1 + 40 / 160) * is_long.var(ddof=1))
    shift = weight * (is_long[~known].mean() - is_long[known].mean())
    assert judged.corrected.value == pytest.approx(is_good[known].mean() + shift, abs=1e-9)
    assert abs(shift) > 1e-3
    width = judged.corrected.ci.high - judged.corrected.ci.low
    assert width < people.ci.high - people.ci.low, "narrower than people alone"
    (agreement,) = metrics.agreement
    assert (agreement.first, agreement.second, agreement.n_pairs) == ("longer", "people", 40)
    assert agreement.kappa.ci.low < agreement.kappa.value < agreement.kappa.ci.high
    assert "panel" not in {row.judge for row in metrics.comparisons}, "people are no panel"


def test_several_policies_are_ranked_with_adjusted_p_values(tmp_path: Path):
    generator = random.Random(1)
    rows = {
        name: texts([["x" * (10 + generator.randint(-9, 9) + bonus)] for _ in range(60)])
        for name, bonus in (("weak", -2), ("strong", 6), ("reference", 0))
    }
    metrics = evaluate(settings("weak", "strong"), {"lengths": Lengths()}, rows, tmp_path)
    (ranking,) = metrics.rankings
    assert ranking.policies == ("weak", "strong", "reference")
    weak, strong, baseline = (each.value for each in ranking.strengths)
    assert weak < baseline == 0.0 < strong
    by_name = {row.policy: row for row in metrics.comparisons}
    assert ranking.win_rates[0][2] == pytest.approx(by_name["weak"].win_rate)
    assert ranking.win_rates[1][0] == pytest.approx(1 - ranking.win_rates[0][1])
    for row in metrics.comparisons:
        assert row.p_value <= row.adjusted_p_value <= 1
    least = min(row.p_value for row in metrics.comparisons)
    assert min(row.adjusted_p_value for row in metrics.comparisons) == pytest.approx(2 * least)


def test_a_judge_that_compares_ranks_by_the_baseline_alone(tmp_path: Path):
    samples = {
        "a": texts([["aaa"], ["b"], ["aaa"]]),
        "b": texts([["a"], ["bbb"], ["a"]]),
        "reference": texts([["cc"]] * 3),
    }
    longer = Comparer(lambda one, other: float(len(one) > len(other)))
    (ranking,) = evaluate(settings("a", "b"), {"longer": longer}, samples, tmp_path).rankings
    assert ranking.win_rates[0][1] is None
    assert ranking.strengths[0].value > 0 > ranking.strengths[1].value


def test_the_self_agreement_of_repeated_verdicts(tmp_path: Path):
    # 1 pair in 2 has the votes 1, 1 and 1 in 2 the votes 1, 0: (1 + 0) / 2 agree
    def prefer(one: str, other: str) -> Verdict:
        votes = (1.0, 1.0) if "sure" in (one, other) else (1.0, 0.0)
        return Verdict(sum(votes) / 2, votes=votes)

    samples = {"a": texts([["sure"], ["unsure"]]), "reference": texts([["base"]] * 2)}
    metrics = evaluate(settings("a"), {"judge": Comparer(prefer)}, samples, tmp_path)
    assert metrics.judges[0].self_agreement.value == 0.5
    assert metrics.judges[0].annotator_agreement is None
    metrics = evaluate(settings("a"), {"people": People(prefer)}, samples, tmp_path)
    assert metrics.judges[0].self_agreement is None, "several people are not one judge"
    assert metrics.judges[0].annotator_agreement.value == 0.5


def test_the_detectable_difference_is_that_of_the_policy_with_the_largest_deviation(tmp_path: Path):
    samples = {
        "always": texts([["xxxx"]] * 20),
        "half": texts([["xxxx"], ["x"]] * 10),
        "reference": texts([["xx"]] * 20),
    }
    judges = {"lengths": Lengths()}
    (both,) = evaluate(settings("always", "half"), judges, samples, tmp_path).judges
    (one,) = evaluate(settings("half"), judges, samples, tmp_path).judges
    assert both.detectable_difference == one.detectable_difference > 0.3


def test_the_card_of_a_judge_with_planted_bias(tmp_path: Path):
    # 400 pairs. In a fifth of them the judge prefers what it reads first, whatever it is; in three
    # fifths the longer completion; in the last fifth the shorter one.
    generator = random.Random(3)
    own = [["x" * (20 if generator.random() < 0.5 else 5) + str(i)] for i in range(400)]
    base = [["y" * 12 + str(i)] for i in range(400)]

    def prefer(one: str, other: str) -> float:
        group = int(one.strip("xy")) % 5
        if group == 0:
            return 1.0
        return float((len(one) > len(other)) == (group < 4))

    samples = {"a": texts(own), "reference": texts(base)}
    metrics = evaluate(settings("a"), {"judge": Comparer(prefer)}, samples, tmp_path)
    (card,) = metrics.judges
    assert card.consistency.value == pytest.approx(4 / 5)
    assert card.position_bias.value == pytest.approx(1 / 5 + 4 / 5 / 2)
    assert card.position_bias.ci.low > 0.5, "the bias is detected"
    assert card.length_bias.value == pytest.approx(3 / 5 + 1 / 5 / 2)
    assert card.length_bias.ci.low < 0.7 < card.length_bias.ci.high
    assert metrics.comparisons[0].ties == pytest.approx(1 / 5), "flips"


def test_criteria_of_a_rubric_have_their_own_win_rates(tmp_path: Path):
    # "clear" is won in both orders of every pair, "short" in the first order only
    def prefer(one: str, other: str) -> Verdict:
        criteria = {"clear": float(one == "own"), "short": 1.0}
        return Verdict(0.5 * sum(criteria.values()), criteria=criteria)

    samples = {"a": texts([["own"]] * 30), "reference": texts([["base"]] * 30)}
    metrics = evaluate(settings("a"), {"judge": Comparer(prefer)}, samples, tmp_path)
    criteria = metrics.comparisons[0].criteria
    assert criteria["clear"].value == 1.0
    assert criteria["short"].value == 0.5
    assert criteria["clear"].ci.low < 1.0, "an interval has no width 0"
    stored = json.loads(json.dumps(metrics.to_metrics()))
    assert EvaluationMetrics.from_metrics(stored) == metrics
    titles = [table.title for table in judge_tables(metrics)]
    assert "win rates by the criteria of a rubric" in titles


def test_the_control_is_in_no_card_and_no_ranking(tmp_path: Path):
    config = settings("a", baseline="sft")
    rows = [["x" * k] for k in range(1, 9)]
    samples = {
        "a": texts([["y" * 20]] * 8),
        "sft": texts(rows),
        "sft again": texts(rows[::-1]),
    }
    metrics = evaluate(config, {"lengths": Lengths()}, samples, tmp_path)
    assert [row.policy for row in metrics.comparisons] == ["a", "sft again"]
    assert metrics.comparisons[1].adjusted_p_value is None
    assert metrics.judges[0].n_pairs == 8
    assert metrics.rankings == ()


@pytest.mark.parametrize("n_policies", [1, 4, 7])
def test_every_table_fits_into_80_columns(tmp_path: Path, n_policies: int):
    names = [f"runs/a_long_name_of_a_folder_{k}-0123456789ab" for k in range(n_policies)]
    generator = random.Random(2)
    samples = {
        name: texts([["x" * generator.randint(1, 900)] for _ in range(20)], is_sampled=True)
        for name in [*names, "reference"]
    }

    def some(one: str, other: str) -> float | Verdict:
        return float(len(one) > len(other)) if len(one) % 2 else NOTHING

    judges = {
        "a_model/with-a-long-name-2026-01-01 by thoroughness": Comparer(
            lambda one, other: float(len(one) >= len(other))
        ),
        "lengths": Lengths(),
        "annotations/of/many/people.jsonl": People(some),
    }
    metrics = evaluate(settings(*names), judges, samples, tmp_path)
    assert {"comparisons", "judges", "agreement"} <= metrics.to_metrics().keys()
    panel = next(row for row in metrics.comparisons if row.judge == "panel")
    assert panel.n_prompts == 20, "people, who labeled some prompts, are no part of it"
    assert EvaluationMetrics.from_metrics(json.loads(json.dumps(metrics.to_metrics()))) == metrics
    shown = [*map(tables.win_rate_table, tables.by_judge(metrics.comparisons))]
    shown += judge_tables(metrics)
    assert len(shown) == 4 + 3 + {1: 0, 4: 5, 7: 4}[n_policies]
    for table in shown:
        out = io.StringIO()
        Console(file=out, width=300).print(render_table(table, "evaluate"))
        assert max(map(len, map(str.rstrip, out.getvalue().splitlines()))) <= 80, out.getvalue()


# Completions that are not sampled -----------------------------------------------------------------


def completion_file(file: Path, rows: Sequence[tuple[Any, Any]]) -> str:
    lines = [json.dumps({"prompt": prompt, "completion": text}) for prompt, text in rows]
    file.write_text("\n".join(lines), encoding="utf-8")
    return str(file)


def test_a_file_of_completions_is_matched_by_prompt(tmp_path: Path):
    from align.data.rows import prompt_id

    rows = [row | {"prompt_id": prompt_id(row["prompt"])} for row in prompts(3)]
    turns = [{"role": "user", "content": "Question 1?"}]
    file = completion_file(
        tmp_path / "other.jsonl",
        [("question 0? ", "zero"), (turns, "one"), (turns, "one b"), ("Who?", "me")],
    )
    config = settings(file, n_completions=1)
    samples = read_completions(config.model_copy(update={"baseline": "sft"}), tmp_path, rows)[file]
    assert [[c.text for c in row] for row in samples.completions] == [["zero"], ["one"], []]
    assert samples.remark == (
        f"{file}: left out: 1 of 3 held-out prompts have no completion, 1 prompt not held out, "
        "1 completion above `n_completions`"
    )
    assert samples.mean_tokens is None


def test_a_prompt_without_completion_is_left_out_and_not_invalid(tmp_path: Path):
    samples = {"a": texts([["xx"], [], ["x"]]), "reference": texts([["x"], ["x"], ["xx"]])}
    config = settings("a", n_completions=3)
    (row,) = evaluate(config, {"lengths": Lengths()}, samples, tmp_path).comparisons
    assert (row.n_prompts, row.invalid, row.win_rate) == (2, 0, 0.5)
    assert row.n_pairs == 2, "what was compared, and not the setting"
    assert "2 prompts, 2 pairs" in tables.win_rate_table([row]).title


def test_fewer_completions_of_one_side_are_used_again(tmp_path: Path):
    samples = {"a": texts([["x", "xxx", "x"]]), "reference": texts([["xx"]])}
    config = settings("a", n_completions=3)
    (row,) = evaluate(config, {"lengths": Lengths()}, samples, tmp_path).comparisons
    assert row.win_rate == pytest.approx(1 / 3)
    both = {"a": texts([["xxx"]]), "reference": texts([["xx"]])}
    metrics = evaluate(config, {"lengths": Lengths()}, both, tmp_path)
    assert metrics.judges[0].n_pairs == 1, "no pair is compared twice"
    pairs = matches(texts([["a", "b"]]), texts([["c", "d", "e"]]), 4)
    assert [(match.own, match.baseline) for match in pairs] == [(0, 0), (1, 1), (0, 2), (1, 0)]


def test_wrong_rows_of_a_file_are_named(tmp_path: Path):
    file = completion_file(tmp_path / "wrong.jsonl", [("Question 0?", 3), ("Question 1?", "a")])
    with pytest.raises(DataError, match=r"wrong.jsonl: row 1: `completion`: expected a text"):
        read_completions(settings(file), tmp_path, prompts(2))


def test_a_file_of_other_prompts_is_refused(tmp_path: Path):
    file = completion_file(tmp_path / "other.jsonl", [("Who?", "me")])
    with pytest.raises(DataError, match="none of its 1 prompt is a held-out prompt"):
        read_completions(settings(file), tmp_path, prompts(2))


def test_completions_of_the_data_set_with_tool_calls_are_no_reference(tmp_path: Path):
    call = {"type": "function", "function": {"name": "rain", "arguments": "{}"}}
    prompt = [{"role": "user", "content": "Rain?"}]
    completion = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    row = {"prompt": prompt, "completion": completion, "prompt_id": prompt_id(prompt)}
    data_tables.write([row], data_tables.table_file(tmp_path, "demonstrations", "test"))
    with pytest.raises(DataError, match="a completion has tool calls or reasoning"):
        read_completions(settings("a"), tmp_path, [row])
