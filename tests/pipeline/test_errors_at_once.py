"""One pass finds all errors: those of a stage do not hide others, and cause none."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_models

from align.config.recipe import ErrorCollector, read_recipe
from align.config.stages import STAGES, stage_class
from align.pipeline import preflight
from align.pipeline.plan import plan_stages, with_invalid

MISTAKES = """\
stages:
  prepare: {source: rows.jsonl, test_fracton: 0.1}
  sft: {model: model, seed: -1, lora: {target_modules: [query_key_value]}, trainer: {
    logging_steps: many,
    eos_token: <stop>,
    chat_template_path: nothere.jinja,
    optim: adamw_torch_4bit}}
  sft_2: {stage: sft, model: model, trainer: {max_length: 100000}}
  dpo: {model: sft, lora: {r: 0, target_modules: "no_such.*"}, trainer: {pad_token: <fill>}}
  kto: {model: nothing, quantization: nf4, dtype: bfloat16, trainer: {optim: lomo}}
  ppo: {model: sft, rewards: ["no_such_module:score"], steps: 1, batch_size: none}
  evaluate: {policies: [dpo, nobody], baseline: model, judge: {function: "no_such:judge"}}
"""
FOUND = [
    "2: prepare.test_fracton: unknown key",
    "3: sft.seed: must be greater than or equal to 0",
    "3: sft.lora.target_modules: the model has no query_key_value",
    "4: sft.trainer.logging_steps: expected a number",
    "5: sft.trainer.eos_token: the tokenizer of model has no token",
    "6: sft.trainer.chat_template_path: nothere.jinja: no such file",
    "7: sft.trainer.optim: torchao is not installed",
    "8: sft_2.trainer.max_length: 100000 is more than the ",
    "9: dpo.lora.r: must be greater than or equal to 1",
    "9: dpo.lora.target_modules: no_such.* matches the whole name of no module",
    "9: dpo.trainer.pad_token: the tokenizer of model has no token",
    "10: kto.model: no earlier stage `nothing`",
    "10: kto: `dtype: bfloat16` rounds small updates",
    "10: kto: `quantization` freezes the backbone",
    "10: kto.trainer.optim: lomo_optim is not installed",
    "11: ppo.batch_size: expected a whole number",
    "11: ppo.rewards.0: no_such_module:score: cannot be imported",
    "12: evaluate.policies.1: no earlier stage `nobody`",
    "12: evaluate.judge.function: no_such:judge: cannot be imported",
]


def errors_of(recipe: Any, folder: Path) -> list[str]:
    """The lines of the checks that read no rows."""
    errors = ErrorCollector(read_recipe(recipe))
    stages = with_invalid(errors, plan_stages(errors, folder), folder)
    for check in preflight.CHECKS:
        check(errors, stages)
    return list(dict.fromkeys(errors.lines))


def test_every_check_that_needs_no_other_to_succeed_is_made(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
):
    world = tiny_models.world(tmp_path_factory.getbasetemp())
    shutil.copytree(world.sft, tmp_path / "model", ignore=shutil.ignore_patterns("artifact.json"))
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    Path("r.yaml").write_text(MISTAKES)
    errors = ErrorCollector(read_recipe("r.yaml"))
    stages = with_invalid(errors, plan_stages(errors, tmp_path), tmp_path)
    assert [stage.status for stage in stages] == ["invalid"] * 7
    list(preflight.examine(errors, stages, tmp_path, world_size=1))
    lines = list(dict.fromkeys(errors.lines))
    missing = [start for start in FOUND if not any(f"r.yaml:{start}" in line for line in lines)]
    assert missing == [], "\n".join(lines)
    assert len(lines) == len(FOUND), "\n".join(lines)


CONFLICTS = """\
stages:
  prepare: {source: embedded, test_fraction: 0.6, validation_fraction: 0.5, keep_columns: [prompt]}
  sft: {model: {}}
  grpo: {model: sft, rewards: ["m:f", "m:f"], weights: [1.0], steps: 1, batch_size: 5, n_completions: 2,
    minibatches: 6, warmup_steps: 3, kl_target: 1.0, kl_coef: 0.0, loss: cispo, clip: 0.1, seed: x}
  control: {environment: Pendulum-v1, environment_options: {g: 1, max_episode_steps: 0}, steps: 10,
    vectorization: batched, algorithm: a2c, epochs: 2, minibatches: 3, seeds: [1, 1]}
"""


def test_all_conflicts_of_a_stage_are_found_and_those_with_a_wrong_key_are_not(tmp_path: Path):
    (tmp_path / "r.yaml").write_text(CONFLICTS)
    problems = read_recipe(tmp_path / "r.yaml").problems
    found = [line.partition("r.yaml:")[2].partition(": ")[2] for line in problems]
    starts = [
        "prepare: `keep_columns` must not contain",
        "prepare: `test_fraction` and `validation_fraction` must sum",
        "grpo: `rewards` contains 'm:f' more than once",
        "grpo: `weights` must have one entry",
        "grpo: `clip` has no effect with `loss: cispo`",
        "grpo: `kl_target` adapts `kl_coef`",
        "grpo: `batch_size` (5) must be a multiple",
        "grpo: `minibatches` (6) must not exceed",
        "grpo: `warmup_steps` must be less than",
        "control: `environment_options.max_episode_steps` must be",
        "control: `seeds` contains 1 more than once",
        "control: `epochs` has no effect with `algorithm: a2c`",
        "control: `minibatches` has no effect with `algorithm: a2c`",
        "control: `environment_options.g` has no effect",
    ]
    missing = [start for start in starts if not any(line.startswith(start) for line in found)]
    assert missing == [], found
    assert any(line.startswith("grpo.seed: ") for line in found)


STAGES_OF_ALL_KINDS: dict[str, dict[str, Any]] = {
    "prepare": {"source": "embedded", "max_rows": 60},
    "sft": {"model": {}},
    "reward": {"model": "sft"},
    "dpo": {"model": "sft", "lora": {}},
    "kto": {"model": "sft", "quantization": "nf4", "lora": {}},
    "ppo": {"model": "sft", "rewards": ["reward"], "steps": 1, "batch_size": 4},
    "grpo": {"model": "sft", "rewards": ["reward"], "steps": 1, "batch_size": 8},
    "rloo": {"model": "sft", "rewards": ["reward"], "steps": 1, "batch_size": 8},
    "reinforce": {"model": "sft", "rewards": ["reward"], "steps": 1, "batch_size": 8},
    "sample": {"model": "sft"},
    "label": {"judge": "reward"},
    "evaluate": {"policies": ["dpo"], "baseline": "sft", "judge": ["reward", "gold"]},
    "control": {"environment": "CartPole-v1", "steps": 100},
}


OTHER_ALGORITHMS: dict[str, dict[str, Any]] = {
    "maddpg": {
        "stage": "control",
        "algorithm": "maddpg",
        "environment": "align.control.multi_agent.parallel:Parallel-v0",
        "environment_options": {"module": "mpe2.simple_spread_v3", "continuous_actions": True},
        "steps": 2000,
    },
    "sarsa": {
        "stage": "control",
        "algorithm": "sarsa",
        "environment": "CliffWalking-v1",
        "environment_options": {"max_episode_steps": 100},
        "steps": 100,
    },
    "value_iteration": {
        "stage": "control",
        "algorithm": "value_iteration",
        "environment": "FrozenLake-v1",
    },
}


@pytest.mark.parametrize("name", [*STAGES_OF_ALL_KINDS, *OTHER_ALGORITHMS])
def test_a_wrong_or_missing_value_causes_no_other_error(name: str, tmp_path: Path):
    assert STAGES_OF_ALL_KINDS.keys() == STAGES.keys()
    if name == "maddpg":
        pytest.importorskip("mpe2", reason="the extra [multi-agent] is not installed")
    stages = STAGES_OF_ALL_KINDS if name in STAGES_OF_ALL_KINDS else {name: OTHER_ALGORITHMS[name]}
    assert errors_of({"stages": stages}, tmp_path) == []
    cls = stage_class(stages[name].get("stage", name), stages[name])
    required = [key for key, field in cls.model_fields.items() if field.is_required()]
    wrong: Any = {"no": {"such": "key"}}
    changes = [{key: wrong if key not in ("trainer", "columns") else 5} for key in cls.model_fields]
    changes += [{key: None} for key in required] + [{"no_such_key": 1}]
    changes += [{"algorithm": "no_such"}] if cls.model_fields.get("algorithm") else []
    for change in changes:
        (key,) = change
        if key in ("stage", "algorithm") and change[key] is None:
            continue  # another kind of stage, or another algorithm
        values = stages[name] | change
        values = {key: value for key, value in values.items() if value is not None}
        lines = errors_of({"stages": stages | {name: values}}, tmp_path)
        assert lines, change
        places = (f" {name}.{key}", f" {name}: `{key}.")  # of a value, or of one in a mapping
        assert key == "stage" or all(any(at in line for at in places) for line in lines), lines


SPREAD = OTHER_ALGORITHMS["maddpg"]
BATCHED = {"stage": "control", "environment": "CartPole-v1", "vectorization": "batched", "steps": 9}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (BATCHED | {"environment": "CartPole-v9"}, "does not support `environment: CartPole-v9`"),
        (BATCHED | {"environment_options": {"max_episode_steps": 3.7}}, "a whole number from 1"),
        (SPREAD | {"environment_options": {"module": -1}}, "`environment_options.module` must be"),
    ],
)
def test_one_wrong_environment_is_one_error(values: Any, message: str, tmp_path: Path):
    lines = errors_of({"stages": {"a": values}}, tmp_path)
    assert len(lines) == 1, lines
    assert message in lines[0]


def test_a_wrong_algorithm_hides_no_error_and_causes_none(tmp_path: Path):
    values = SPREAD | {"critic": "independent", "seeds": [1, 1], "gamma": 2.0}
    lines = errors_of({"stages": {"a": values | {"algorithm": "madpg"}}}, tmp_path)
    found = [line.partition(": a")[2].partition(" ")[0] for line in lines]
    assert sorted(found) == [".algorithm:", ".gamma:", ":"], lines
    misspelled = {key: values[key] for key in values if key not in ("algorithm", "seeds", "steps")}
    lines = errors_of({"stages": {"a": misspelled | {"algo": "maddpg"}}}, tmp_path)
    found = [line.partition(": a")[2].partition(" ")[0] for line in lines]
    assert sorted(found) == [".algo:", ".gamma:"], lines


def test_offline_data_of_another_environment_is_one_error(tmp_path: Path):
    recorded = {"stage": "control", "environment": "CartPole-v1", "steps": 9, "record_steps": 9}
    offline = {"stage": "control", "algorithm": "iql", "environment": "true", "steps": 9}
    stages = {"a": recorded, "b": recorded, "c": offline | {"data": ["a", "b"]}}
    lines = errors_of({"stages": stages}, tmp_path)
    assert len(lines) == 1, lines
    assert ": c.environment: the stages `a`, `b` record CartPole-v1, but this stage" in lines[0]
