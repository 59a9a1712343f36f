"""The stop rule: fresh comparisons with the best policy, what is saved, and an exact resume."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ppo_fixtures, tiny_models
from helpers.ppo_fixtures import Folders, build_trainer, flat_weights, ppo_config
from torch.testing import assert_close

from align.functional.sequential import decline_e_values
from align.online_rl import plots
from align.online_rl import run as online_rl_run
from align.online_rl.results import OnlineRLMetrics, StopMetrics
from align.online_rl.stopping import StopRule
from align.online_rl.trainer import OnlineRLTrainer

LENGTH = {"function": "helpers.ppo_fixtures:length"}
STOP = {"eval_steps": 1, "n_eval_prompts": 6, "stop": {"judge": LENGTH, "alpha": 0.2}}


@pytest.fixture
def held_out(folders: Folders, tmp_path: Path) -> Folders:
    """The folders, with data that have a validation split."""
    data = tmp_path / "data"
    shutil.copytree(folders.world.data, data)
    shutil.copy(data / "prompts-test.parquet", data / "prompts-validation.parquet")
    return dataclasses.replace(folders, world=dataclasses.replace(folders.world, data=data))


def rule_of(trainer: OnlineRLTrainer) -> StopRule:
    assert trainer.stop_rule is not None
    return trainer.stop_rule


def worsen(trainer: OnlineRLTrainer) -> None:
    """Let the policy write the shortest completions: eos at once."""
    head = trainer.models.policy.model.get_output_embeddings()
    end = trainer.models.tokenizer.eos_token_id
    with torch.no_grad():
        # Hidden states have both signs, so the row of eos is replaced by that of the likeliest
        # first token, doubled.
        prompt = torch.tensor([trainer.held_out.tokens[0]])
        first = int(trainer.models.policy.model(input_ids=prompt).logits[0, -1].argmax())
        head.weight[end] = 3 * head.weight[first]


def test_a_policy_that_is_worse_is_found_and_the_best_one_is_restored(
    held_out: Folders, tmp_path: Path
):
    trainer = build_trainer(held_out, tmp_path / "run", steps=3, **STOP)
    rule = rule_of(trainer)
    rule.per_check = 40
    assert rule.check(0, training={}, held_out={}) == {}
    best = flat_weights(trainer)
    worsen(trainer)
    worse = flat_weights(trainer)
    metrics = rule.check(1, training={}, held_out={})
    assert torch.equal(flat_weights(trainer), worse)  # the check leaves the policy as it was
    assert metrics["stop_win_rate"] < 0.3
    assert metrics["best_step"] == 0
    assert rule.stops
    assert metrics["stop_e_value"] >= 1 / 0.2
    expected = decline_e_values(torch.tensor(rule.outcomes), planned=3)
    assert metrics["stop_e_value"] == pytest.approx(float(expected[-1]))
    rule.restore_best()
    assert torch.equal(flat_weights(trainer), best)


def test_a_policy_that_wins_becomes_the_best_one(held_out: Folders, tmp_path: Path):
    trainer = build_trainer(held_out, tmp_path / "run", steps=3, **STOP)
    rule = rule_of(trainer)
    rule.per_check = 40
    better = flat_weights(trainer)
    worsen(trainer)
    rule.check(0, training={}, held_out={})  # the worse policy comes first
    with torch.no_grad():
        start = 0
        for p in trainer.models.weights().values():
            p.copy_(better[start : start + p.numel()].view_as(p))
            start += p.numel()
    metrics = rule.check(1, training={}, held_out={})
    assert metrics["stop_win_rate"] > 0.7
    assert metrics["best_step"] == 1
    assert not rule.stops
    assert_close(
        torch.cat([p.flatten() for p in rule.best]), better[: sum(map(torch.numel, rule.best))]
    )


def test_each_check_draws_other_prompts_and_other_completions(
    held_out: Folders, tmp_path: Path, recorder: Any
):
    trainer = build_trainer(held_out, tmp_path / "run", steps=3, **STOP)
    rule = rule_of(trainer)
    for done in range(3):
        rule.check(done, training={}, held_out={})
    pairs = recorder.completions  # policy and best policy, in two checks
    assert len(pairs) == 4
    for policy, best in (pairs[:2], pairs[2:]):
        assert policy.prompts == best.prompts
        assert policy.completions != best.completions  # equal weights, other seeds
    assert pairs[0].prompts != pairs[2].prompts


def test_training_is_that_without_the_rule_until_it_stops(held_out: Folders, tmp_path: Path):
    weights = []
    for name, stop in (("with", STOP), ("without", {})):
        trainer = build_trainer(held_out, tmp_path / name, steps=2, **stop)
        for step in range(2):
            trainer.step(step)
            if stop:
                trainer.evaluate(step)
        weights.append(flat_weights(trainer))
    assert torch.equal(*weights)


def stage(
    folders: Folders, output_dir: Path, monkeypatch: Any, **settings: Any
) -> tuple[dict[str, Any], Any]:
    config = ppo_config(**{"steps": 6, "save_steps": 2} | STOP | settings)
    inputs = {
        "model": folders.world.sft,
        "prompts": folders.world.data,
        "rewards.0": folders.full,
    }
    output_dir.mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(plots, "draw", lambda _: None)
    result = online_rl_run.run(config, inputs, output_dir, tiny_models.logger("ppo", output_dir))
    return result.metrics, result


def always_lost(judges: Any, pairs: Sequence[Any], **_: Any) -> list[float]:
    return [0.0] * len(pairs)


def always_won(judges: Any, pairs: Sequence[Any], **_: Any) -> list[float]:
    return [1.0, *[math.nan] * (len(pairs) - 1)]


def test_a_stopped_stage_reports_why_and_saves_the_best_policy(
    held_out: Folders, tmp_path: Path, monkeypatch: Any
):
    monkeypatch.setattr("align.online_rl.stopping.preferences", always_lost)
    metrics, result = stage(held_out, tmp_path / "run", monkeypatch)
    typed = OnlineRLMetrics.from_metrics(metrics)
    assert typed.stop is not None
    assert typed.stop.is_stopped
    # Six lost comparisons a check: ((1.05**6 + ... + 1.8**6) / 5 + 5) / 6 = 2.58 after the first
    assert typed.steps == typed.stop.checks == 2
    assert typed.stop.best_step == 0
    assert result.remarks[0].startswith(
        "stopped after 2 of 6 updates: by helpers.ppo_fixtures:length the policy declines"
    ), result.remarks
    assert "the policy of step 0 is saved" in result.remarks[0]
    saved = ppo_fixtures.load_plain_policy(tmp_path / "run")
    initial = ppo_fixtures.load_plain_policy(held_out.world.sft)
    assert all(
        torch.equal(a, b) for a, b in zip(saved.parameters(), initial.parameters(), strict=True)
    )
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["best_step"] for line in lines if "best_step" in line] == [0.0, 0.0]
    # The policy of step 0 is saved: its batch is that of the first step, its evaluation comes first
    held_out_lines = [line for line in lines if "eval_score" in line]
    (first,) = [line for line in lines if line["step"] == 1 and "score" in line]
    assert len({line["eval_score"] for line in held_out_lines}) > 1
    assert typed.held_out is not None
    assert typed.held_out.score == held_out_lines[0]["eval_score"]
    assert (typed.training.score, typed.training.kl) == (first["score"], first["kl"])
    (table,) = result.tables
    assert table.title.startswith("after 0 updates; ")
    assert table.rows[1][1] == f"{held_out_lines[0]['eval_score']:.3f}"
    assert "gold" not in table.columns  # no judge of the recipe measures it


def test_a_run_without_decline_ends_after_all_steps(
    held_out: Folders, tmp_path: Path, monkeypatch: Any
):
    monkeypatch.setattr("align.online_rl.stopping.preferences", always_won)
    metrics, result = stage(held_out, tmp_path / "run", monkeypatch, steps=2)
    assert metrics["steps"] == metrics["stop"]["best_step"] == 2
    assert not metrics["stop"]["is_stopped"]
    assert metrics["stop"]["missing"] == 10  # five of six in each of two checks
    assert "found no decline" in result.remarks[0]
    assert "10 comparisons without a verdict" in result.remarks[0]
    logged_lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    last = [line for line in logged_lines if line["step"] == 2]  # the update and its evaluation
    assert metrics["ppo"]["eval_score"] == last[1]["eval_score"]
    assert metrics["ppo"]["score"] == last[0]["score"]


def test_a_decline_that_the_last_check_finds_is_reported():
    """There is nothing left to stop, so the run is not called stopped."""
    stop = StopMetrics(
        judge="gold", alpha=0.05, is_stopped=False, best_step=4, checks=3, e_value=25.0, missing=0
    )
    assert online_rl_run.stop_remark(stop, 6, 6) == (
        "by gold the policy declines (e-value 25 in 3 checks, limit 20); the policy of step 4 is "
        "saved"
    )


def test_a_run_that_continues_from_a_checkpoint_makes_the_same_checks(
    held_out: Folders, tmp_path: Path
):
    settings = STOP | {"save_steps": 2, "stop": {"judge": LENGTH, "alpha": 1e-6}}
    whole = build_trainer(held_out, tmp_path / "run", **settings)
    whole.train()
    logs = logged(tmp_path / "run")
    # The second run finds the checkpoint of step 2, as if the first one had been killed after it
    resumed = build_trainer(held_out, tmp_path / "run", **settings)
    assert resumed.resume() == 2
    assert rule_of(resumed).outcomes == rule_of(whole).outcomes[:2]
    resumed.train()
    assert rule_of(resumed).outcomes == rule_of(whole).outcomes
    assert rule_of(resumed).best_step == rule_of(whole).best_step
    assert resumed.held_out_metrics == whole.held_out_metrics
    assert without_seconds(resumed.metrics) == without_seconds(whole.metrics)
    assert torch.equal(flat_weights(resumed), flat_weights(whole))
    assert logged(tmp_path / "run") == logs


def without_seconds(metrics: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metrics.items() if "seconds" not in key}


def logged(folder: Path) -> list[dict[str, Any]]:
    """All logged lines without times."""
    lines = [
        json.loads(line)
        for name in ("metrics.jsonl", "held_out.jsonl")
        for line in (folder / name).read_text().splitlines()
    ]
    return [without_seconds(line) for line in lines]


def test_held_out_measurements_average_to_the_logged_metrics(held_out: Folders, tmp_path: Path):
    trainer = build_trainer(held_out, tmp_path / "run", judge="gold", **STOP | {"stop": None})
    trainer.step(0)
    trainer.evaluate(1)
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "held_out.jsonl").read_text().splitlines()
    ]
    assert [(row["step"], row["prompt"]) for row in rows] == [(1, i) for i in range(6)]
    for key in ("kl", "score", "reward", "gold"):
        mean = sum(row[key] for row in rows) / len(rows)
        assert mean == pytest.approx(trainer.held_out_metrics[f"eval_{key}"], abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_steps": None, "n_eval_prompts": 128}, "set `eval_steps`"),
        ({"eval_split": "test"}, "set `eval_split: validation`"),
        ({"stop": {"judge": {"annotations": "votes.jsonl"}}}, "name another judge"),
    ],
)
def test_a_rule_that_cannot_work_is_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ppo_config(
            **{k: v for k, v in (STOP | settings).items() if k != "n_eval_prompts" or v == 6}
        )
