"""Stages with judges other than gold: labels alone are evaluated, comparisons label pairs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from helpers import tiny_models
from helpers.judge_server import Request, judge_server

from align.config.completions import Label
from align.config.data import Prepare
from align.config.evaluate import Evaluate
from align.config.recipe import read_recipe
from align.config.training import Reward
from align.data.rows import prompt_id
from align.errors import UserError
from align.evaluation import held_out
from align.pipeline import estimates
from align.pipeline.plan import plan
from align.runtime import artifacts
from align.stages import evaluate, label, prepare, reward

KEYS = {"max_new_tokens": 8, "batch_size": 32, "resamples": 200}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tiny_models.World:
    return tiny_models.world(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def labels(world: tiny_models.World) -> Path:
    """Prepared data with labeled completions alone, as for KTO."""
    file = world.folder / "labels.jsonl"
    rows = [
        {"prompt": f"Say {n}.", "completion": f"The {word} {n} sings.", "label": good, "answer": n}
        for n in range(40)
        for word, good in (("calm", True), ("grey", False))
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    folder = world.folder / "labels"
    config = Prepare(source=str(file), test_fraction=0.3, keep_columns=["answer"])
    tiny_models.stage(prepare, config, {}, folder)
    return folder


def test_labels_alone_can_be_evaluated_against_their_desirable_completions(
    world: tiny_models.World, labels: Path, tmp_path: Path
):
    config = Evaluate(
        policies=["sft"], baseline="reference", judge={"function": "math"}, n_completions=2, **KEYS
    )
    inputs = {"policies.0": world.sft, "prompts": labels}
    metrics = tiny_models.stage(evaluate, config, inputs, tmp_path)
    (row,) = metrics["comparisons"]
    held_out = {each["prompt_id"] for each in tiny_models.rows(labels, "prompts-test")}
    assert row["n_prompts"] == len(held_out)
    assert (row["policy"], row["baseline"], row["judge"]) == ("sft", "reference", "math")
    assert row["mean_score"]["baseline"] == 1.0, "each reference ends in the number of its prompt"
    assert row["win_rate"] < 0.5
    assert row["mean_tokens"]["baseline"] is None
    texts = {
        row["completion"][-1]["content"]
        for row in tiny_models.rows(labels, "unpaired-test")
        if row["label"]
    }
    compared = pq.read_table(tmp_path / "comparisons.parquet").to_pylist()
    assert {row["baseline_completion"] for row in compared} == texts


def test_a_function_without_its_column_is_refused_before_sampling(
    world: tiny_models.World, tmp_path: Path
):
    config = Evaluate(policies=["sft"], baseline="reference", judge={"function": "math"}, **KEYS)
    inputs = {"policies.0": world.sft, "prompts": world.data}
    with pytest.raises(UserError, match=r"math: requires the column `answer`.*`keep_columns`"):
        tiny_models.stage(evaluate, config, inputs, tmp_path)


@pytest.mark.slow
def test_a_reward_model_that_learned_from_the_same_pairs_is_named(
    world: tiny_models.World, tmp_path: Path
):
    from align.config.training import DPO
    from align.stages import dpo

    trainer = tiny_models.TRAINER | {"max_steps": 1}
    pairs = {"model": world.sft, "pairs": world.data}
    tiny_models.stage(reward, Reward(model="sft", trainer=trainer), pairs, tmp_path / "reward")
    tiny_models.stage(dpo, DPO(model="sft", trainer=trainer), pairs, tmp_path / "dpo")
    config = Evaluate(policies=["dpo"], baseline="sft", judge=["reward"], n_prompts=6, **KEYS)
    inputs = {"policies.0": tmp_path / "dpo", "baseline": world.sft, "prompts": world.data}
    inputs |= {"judge.0": tmp_path / "reward"}
    metrics = tiny_models.stage(evaluate, config, inputs, tmp_path / "evaluate")
    assert [row["judge"] for row in metrics["comparisons"]] == ["reward", "reward"]
    artifact = artifacts.read_artifact(tmp_path / "evaluate")
    assert artifact is not None
    assert any(
        line.startswith("warning: judge `reward` was trained on the same preferences as dpo:")
        for line in artifact.remarks
    )


def trained(folder: Path, kind: str, prompts: Sequence[str]) -> Path:
    """Write the training table of a model with these prompts; return the folder of the data."""
    import pyarrow as pa

    data = folder.with_name(f"{folder.name} data")
    data.mkdir()
    rows = [{"prompt_id": prompt} for prompt in prompts]
    pq.write_table(pa.Table.from_pylist(rows), data / f"{kind}-train.parquet")
    return data


def test_a_judge_that_learned_from_the_held_out_prompts_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # The data were prepared twice, so no folder is shared; prompts 1 and 2 are.
    lineages = {
        tmp_path / "judge": {(trained(tmp_path / "judge", "pairs", "0123"), "pairs")},
        tmp_path / "dpo": {(trained(tmp_path / "dpo", "unpaired", "127"), "unpaired")},
        tmp_path / "sft": {(trained(tmp_path / "sft", "demonstrations", "01"), "demonstrations")},
    }
    monkeypatch.setattr(held_out, "training_tables", lineages.__getitem__)
    config = Evaluate(policies=["dpo", "sft"], baseline="reference", judge="reward")
    sources = {name: tmp_path / name for name in ("dpo", "sft")}
    prompts = [{"prompt_id": name, "prompt": []} for name in "3389"]
    inputs = {"judge": tmp_path / "judge"}
    lines = list(evaluate.dependent_judges(config, inputs, sources, prompts))
    assert len(lines) == 2
    assert "judge `reward` was trained on 1 of the 3 held-out prompts" in lines[0]
    assert "trained on the same preferences as dpo:" in lines[1]
    assert not list(evaluate.dependent_judges(config, {}, sources, prompts))


# Label --------------------------------------------------------------------------------------------


def sampled(folder: Path, texts: Sequence[Sequence[str]]) -> Path:
    """A folder of completions as the stage `sample` writes it."""
    import pyarrow as pa

    folder.mkdir()
    rows = []
    for n, completions in enumerate(texts):
        prompt = [{"role": "user", "content": f"Say {n}."}]
        rows += [
            {
                "prompt": prompt,
                "completion": [{"role": "assistant", "content": text}],
                "prompt_id": prompt_id(prompt),
                "finished": True,
            }
            for text in completions
        ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "completions-train.parquet")
    return folder


def annotations(file: Path, rows: Sequence[tuple[int, str, str, str]]) -> str:
    lines = [
        json.dumps({"prompt": f"Say {n}.", "first": one, "second": other, "decision": decision})
        for n, one, other, decision in rows
    ]
    file.write_text("\n".join(lines), encoding="utf-8")
    return str(file)


def run_label(folder: Path, completions: Path, **keys: Any) -> tuple[dict[str, Any], list[Any]]:
    inputs = {"completions": completions}
    metrics = tiny_models.stage(label, Label(completions="sample", **keys), inputs, folder)
    pairs = [
        (row["prompt"][0]["content"], row["chosen"][0]["content"], row["rejected"][0]["content"])
        for row in tiny_models.rows(folder, "pairs-train")
    ]
    return metrics, pairs


def test_people_label_pairs_and_missing_or_tied_pairs_are_dropped(tmp_path: Path):
    completions = sampled(tmp_path / "sample", [["a", "b"], ["c", "d"], ["e", "f"], ["g", "h"]])
    file = annotations(
        tmp_path / "people.jsonl",
        [(0, "a", "b", "second"), (1, "d", "c", "second"), (2, "e", "f", "tie")],
    )
    metrics, pairs = run_label(tmp_path / "label", completions, judge={"annotations": file})
    assert pairs == [("Say 0.", "b", "a"), ("Say 1.", "c", "d")]
    assert metrics["dropped"] == {"train: tie": 1, "train: no usable verdict": 1}
    assert not (tmp_path / "label" / "scores-train.parquet").exists()


@pytest.mark.parametrize(
    ("pairing", "expected"),
    [
        ("all", {("a", "b"), ("b", "c"), ("a", "c")}),
        ("best_worst", {("a", "c")}),
    ],
)
def test_pairs_of_three_completions_follow_the_decisions(
    tmp_path: Path, pairing: str, expected: set[tuple[str, str]]
):
    completions = sampled(tmp_path / "sample", [["c", "a", "b"]])
    file = annotations(
        tmp_path / "people.jsonl",
        [(0, "a", "b", "first"), (0, "c", "b", "second"), (0, "a", "c", "first")],
    )
    _, pairs = run_label(
        tmp_path / "label", completions, judge={"annotations": file}, pairing=pairing
    )
    assert {(chosen, rejected) for _, chosen, rejected in pairs} == expected


def with_answers(completions: Path, answers: Sequence[str | None]) -> Path:
    """The completions with a column of reference answers."""
    import pyarrow as pa

    table = completions / "completions-train.parquet"
    rows = pq.read_table(table).to_pylist()
    data = [row | {"answer": answer} for row, answer in zip(rows, answers, strict=True)]
    pq.write_table(pa.Table.from_pylist(data), table)
    return completions


def test_completions_without_a_score_of_a_function_are_left_out(tmp_path: Path):
    completions = sampled(tmp_path / "sample", [["one", "none at all"], ["two", "few"]])
    with_answers(completions, [None, None, "two", "two"])
    metrics, pairs = run_label(tmp_path / "label", completions, judge={"function": "contains"})
    assert pairs == [("Say 1.", "two", "few")]
    assert metrics["dropped"] == {"train: completion without a score": 2}
    with_answers(completions, [None, None, None, "two"])
    with pytest.raises(UserError, match=r"4 completions give no pair: 3 × completion without a"):
        run_label(tmp_path / "none", completions, judge={"function": "contains"})


def test_several_judges_label_by_their_mean_where_each_has_a_verdict(tmp_path: Path):
    # `contains` ignores letter case, `regex` does not; "(" is no regular expression.
    rows = [["one", "nil"], ["two", "TWO"], ["(x", "x"]]
    completions = with_answers(
        sampled(tmp_path / "sample", rows), ["one", "one", "two", "two", "(", "("]
    )
    judges = [{"function": "contains"}, {"function": "regex"}]
    metrics, pairs = run_label(tmp_path / "label", completions, judge=judges)
    assert pairs == [("Say 0.", "one", "nil"), ("Say 1.", "two", "TWO")]
    assert metrics["dropped"] == {"train: no usable verdict": 1}, "as the panel of `evaluate`"


def test_people_are_no_part_of_a_panel_that_labels(tmp_path: Path):
    file = annotations(tmp_path / "people.jsonl", [(0, "a", "b", "first")])
    config = Label(judge=[{"function": "contains"}, {"annotations": file}])
    (problem,) = config.problems({})
    assert problem.keys == ("judge",) and "name their file alone" in problem.message
    assert not list(Label(judge={"annotations": file}).problems({}))


def test_the_requests_of_a_label_stage_and_of_a_stop_rule_are_planned(tmp_path: Path):
    # 8 completions of 10 prompts: 28 pairs in 2 orders for each, before any is sampled.
    # Evaluations after 2, 4, 6 and 7 updates: 4 * 5 pairs in 2 orders, however many are trained on.
    source = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"Say {n}.", "chosen": "yes", "rejected": "no"} for n in range(40)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    judge = {"api": {"base_url": "http://localhost:1/v1", "model": "m"}}
    recipe = {
        "stages": {
            "prepare": {"source": str(source), "validation_fraction": 0.2},
            "sample": {"model": "org/model", "n_completions": 8, "n_prompts": 10},
            "label": {"judge": judge},
            "rloo": {
                "model": "org/model", "rewards": ["length"], "steps": 7, "batch_size": 8,
                "eval_steps": 2, "n_eval_prompts": 5, "stop": {"judge": judge},
            },
        }
    }  # fmt: skip
    stages = plan(read_recipe(recipe), tmp_path / "runs")
    work = estimates.estimate(stages, world_size=1)
    assert work["label"].work.rows == 280
    lines = list(estimates.count_requests(stages, work))
    assert lines[0].startswith("label: at most 560 requests to m")
    assert lines[1].startswith("rloo: at most 40 requests to m")
    scored = Label(judge="gold")
    assert scored.workload({"prompts": {"train": 10}, "completions": {"train": 80}}, 1).rows is None


@pytest.mark.parametrize("key", ["margin", "label_noise"])
def test_keys_for_scores_are_refused_where_judges_compare(key: str):
    value = {"margin": 0.5, "label_noise": "bradley_terry"}[key]
    with pytest.raises(ValueError, match=f"`{key}` needs the scores of one judge"):
        Label(judge={"annotations": "people.jsonl"}, **{key: value})


def test_a_server_labels_pairs_in_both_orders_and_no_question_is_sent_twice(tmp_path: Path):
    # The server prefers the longer completion, and always the first one for "?".
    def script(request: Request) -> None:
        first, second = request.question.find("long answer"), request.question.find("brief")
        request.prefer("A" if first < second or first < 0 else "B")

    rows = [["a long answer", "brief"], ["brief", "a long answer", "brief"], ["?", "!"]]
    completions = sampled(tmp_path / "sample", rows)
    with judge_server(script) as server:
        judge = {"api": {"base_url": server.base_url, "model": "a-judge"}}
        metrics, pairs = run_label(tmp_path / "label", completions, judge=judge)
        assert server.n_requests == 2 * 3, "three different pairs, each in both orders"
        again, _ = run_label(tmp_path / "again", completions, judge=judge)
        assert server.n_requests == 2 * 3
    assert pairs == [("Say 0.", "a long answer", "brief"), ("Say 1.", "a long answer", "brief")]
    expected = {"train: same completion again": 1, "train: tie": 1}
    assert metrics["dropped"] == again["dropped"] == expected
