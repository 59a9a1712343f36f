"""Digests, reuse, lineage, locks and atomic writes, with stages that only write a file."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import pickle
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from filelock import FileLock
from helpers.damage import DAMAGES
from pydantic import BaseModel
from rich.console import Console

from align.config import trl_fields
from align.config.base import NewModel
from align.config.control.algorithms import FAMILIES
from align.config.control.dynamic_programming import DynamicProgramming
from align.config.control.maddpg import MultiAgent
from align.config.control.off_policy import OffPolicy
from align.config.control.offline import Offline
from align.config.control.self_play import SelfPlay
from align.config.control.tabular import Tabular
from align.config.data import MixtureSource
from align.config.recipe import Recipe, load_recipe
from align.config.stages import STAGES
from align.config.stopping import Stop
from align.errors import DataError, UserError
from align.pipeline import plan as pipeline_plan
from align.pipeline import preflight, runner
from align.pipeline.plan import PlannedStage, stage_digest
from align.runtime import artifacts, checkpoints, checksums, distributed, out_of_memory, signals
from align.runtime.progress import Display
from align.runtime.results import StageResult
from align.stages import prepare

ROWS = "".join(
    json.dumps({"prompt": f"Say {i}.", "chosen": f"{i}!", "rejected": "No."}) + "\n"
    for i in range(40)
)
RECIPE = """\
stages:
  prepare: {source: SOURCE, test_fraction: 0.2}
  sft:
    model: {vocab_size: 300, hidden_size: 32}
    trainer: {max_steps: 2}
  dpo:
    model: sft
    beta: 0.1
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe and its data, in which training is replaced by writing a file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(ROWS)
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("SOURCE", "rows.jsonl"))
    monkeypatch.setattr(distributed, "init_process_group", lambda: None)
    monkeypatch.setattr(distributed, "reset_process_state", lambda seed: None)
    monkeypatch.setattr(preflight, "check_trainer_arguments", lambda recipe, pending: None)

    def train(config: Any, inputs: Any, folder: Path, logger: Any) -> StageResult:
        (folder / "model.safetensors").write_text(repr(config))
        return StageResult({"loss": 1.0})

    class Stub:
        run = staticmethod(train)

    monkeypatch.setattr(runner, "stage_module", lambda name: prepare if name == "prepare" else Stub)
    return tmp_path


def read(*overrides: str) -> Recipe:
    return load_recipe("recipe.yaml", overrides)


def plan(*overrides: str) -> dict[str, PlannedStage]:
    return {step.name: step for step in pipeline_plan.plan(read(*overrides), Path("runs"))}


def run(*overrides: str, **options: Any) -> dict[str, str]:
    display = Display(Console(quiet=True))
    summary = runner.run_recipe(read(*overrides), Path("runs"), display, **options)
    return {stage.name: stage.status for stage in summary.stages}


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_ino)
        for p in folder.rglob("*")
        if p.is_file()
    }


# Digests


CLASSES = STAGES | {
    "control: tabular": Tabular,
    "control: dynamic programming": DynamicProgramming,
    "control: off-policy": OffPolicy,
    "control: self-play": SelfPlay,
    "control: several agents": MultiAgent,
    "control: offline": Offline,
}
"""The configuration class of each kind of stage, and of each family of ``control``."""


def settings_of(stage: str) -> list[str]:
    return [name for name in CLASSES[stage].model_fields if name != "stage"]


OTHER: dict[str, dict[str, Any]] = {
    "prepare": {
        "source": "other.jsonl", "demonstrations": "other.jsonl", "reader": "hh", "config": "x",
        "data_dir": "d", "data_split": "test", "revision": "abc", "columns": {"prompt": "p"},
        "test_fraction": 0.3, "validation_fraction": 0.1, "split_seed": 1, "max_rows": 7,
        "mixture": [MixtureSource(source="b", weight=1.0)], "pairing": "all", "margin": 1.0, "ratio": 2.0,
        "languages": ["en"], "near_duplicates": "keep", "near_duplicate_threshold": 0.7,
        "decontaminate": ["b"], "decontamination_ngram": 8, "keep_columns": ["x"],
        "labels": {"up": True},
    },
    "sft": {
        "train_on": "last", "quantization": "nf4", "tokens_per_batch": 99,
        "max_lost_rows": 0.5, "compile_layers": "inductor", "allow_missing_end_token": True,
        "model": NewModel(vocab_size=301, hidden_size=32), "demonstrations": "prepare_2",
        "dtype": "bfloat16", "revision": "abc", "lora": {"r": 2}, "seed": 1,
        "keep_checkpoints": True, "prefix_sharing": False, "trainer": {"max_steps": 3},
    },
    "dpo": {
        "quantization": "nf4", "tokens_per_batch": 99,
        "max_lost_rows": 0.5, "compile_layers": "inductor", "allow_missing_end_token": True,
        "model": "sft_2", "pairs": "prepare_2", "beta": 0.2, "dtype": "bfloat16", "revision": "abc",
        "lora": {"r": 2}, "seed": 1, "keep_checkpoints": True, "prefix_sharing": False, "trainer": {"max_steps": 3},
    },
    "kto": {
        "quantization": "nf4", "tokens_per_batch": 99,
        "max_lost_rows": 0.5, "compile_layers": "inductor", "allow_missing_end_token": True,
        "model": "sft_2", "preferences": "prepare_2", "beta": 0.2, "desirable_weight": 1.1, "undesirable_weight": 1.1,
        "dtype": "bfloat16", "revision": "abc", "lora": {"r": 2}, "seed": 1, "keep_checkpoints": True,
        "prefix_sharing": False, "trainer": {"max_steps": 3},
    },
    "sample": {
        "quantization": "nf4", "compile_decoding": "inductor",
        "model": "sft_2", "prompts": "prepare_2", "split": "test", "n_prompts": 3, "n_completions": 2,
        "temperature": 0.1, "top_p": 0.5, "max_new_tokens": 3, "batch_size": 3, "dtype": "bfloat16",
        "revision": "abc", "seed": 1,
    },
    "label": {
        "quantization": "nf4",
        "completions": "sample_2", "judge": "reward", "pairing": "all", "margin": 0.1,
        "label_noise": "bradley_terry", "label_noise_slope": 2.0, "max_pairs": 3, "batch_size": 3, "dtype": "bfloat16", "seed": 1,
    },
    "reward": {
        "quantization": "nf4", "tokens_per_batch": 99,
        "max_lost_rows": 0.5, "compile_layers": "inductor",
        "model": "sft_2", "pairs": "prepare_2", "margin_coef": 0.5, "dtype": "bfloat16", "revision": "abc", "lora": {"r": 2}, "seed": 1,
        "keep_checkpoints": True, "prefix_sharing": False, "trainer": {"max_steps": 3},
    },
    "ppo": {
        "tokens_per_batch": 99, "compile_decoding": "inductor", "merge_adapter": True, "optimizer": "paged_adamw_8bit", "mixed_precision": "bfloat16",
        "model": "sft_2", "prompts": "prepare_2", "rewards": ["reward_2"], "weights": [0.5], "judge": "gold",
        "steps": 3, "batch_size": 6, "n_completions": 4, "temperature": 0.5, "max_new_tokens": 3,
        "missing_eos_penalty": 0.5, "sampler": "vllm", "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.5, "vllm_url": "http://x", "vllm_timeout": 5.0, "max_staleness": 2, "importance_cap": 3.0,
        "gamma": 0.5, "gae_lambda": 0.5, "normalize_advantages": False, "normalize_rewards": True,
        "normalize_scores": "batch", "loss": "cispo", "aggregate": "constant", "overlong_buffer": 2, "overlong_penalty": 2.0, "kl_coef": 0.5, "kl_placement": "loss", "kl_target": 0.5, "kl_horizon": 3, "learning_rate": 0.5,
        "critic_learning_rate": 0.5, "schedule": "constant", "warmup_steps": 3, "critic_warmup_steps": 3,
        "epochs": 3, "minibatches": 3, "micro_batch_size": 3, "sample_batch_size": 3, "clip": 0.5,
        "clip_high": 0.5, "dual_clip": 2.0, "value_clip": 0.5, "value_coef": 0.5, "entropy_coef": 0.5,
        "max_grad_norm": 0.5, "target_kl": 0.5, "gradient_checkpointing": True, "quantization": "nf4",
        "eval_steps": 3, "eval_split": "test", "n_eval_prompts": 3, "save_steps": 3, "stop": Stop(judge="gold"), "dtype": "bfloat16",
        "revision": "abc", "lora": {"r": 2}, "seed": 1, "keep_checkpoints": True, "prefix_sharing": False,
        "report_to": ["wandb"], "environment": "arithmetic", "max_turns": 3, "max_episode_tokens": 99,
    },
    "evaluate": {
        "quantization": "nf4", "compile_decoding": "inductor",
        "policies": ["sft"], "baseline": "sft_2", "prompts": "prepare_2", "split": "validation",
        "judge": None, "implicit_rewards": True, "n_prompts": 3, "n_completions": 2,
        "temperature": 0.1, "top_p": 0.5, "max_new_tokens": 3, "batch_size": 3, "dtype": "bfloat16",
        "confidence": 0.9, "resamples": 500, "seed": 1, "prefix_sharing": False,
    },
    "control": {
        "environment": "Acrobot-v1", "environment_options": {"x": 1}, "algorithm": "a2c",
        "baseline": "none", "seeds": [1], "steps": 7, "n_envs": 3, "vectorization": "batched", "n_steps": 3, "gamma": 0.5, "gae_lambda": 0.5,
        "learning_rate": 0.5, "value_learning_rate": 0.5, "schedule": "constant", "epochs": 3,
        "minibatches": 3, "clip": 0.5, "clip_high": 0.5, "value_clip": 0.5, "target_kl": 0.5,
        "cost_limit": 0.5, "multiplier_learning_rate": 0.5, "multiplier_damping": 0.5, "record_steps": 7,
        "entropy_coef": 0.5, "max_grad_norm": 0.5, "normalize_advantages": False, "hidden_sizes": [3], "activation": "relu",
        "initial_log_std": -1.0, "initialization": "uniform",
        "distribution": "gaussian", "normalize_observations": True, "normalize_rewards": True,
        "episodes": 3, "confidence": 0.9, "resamples": 500, "keep_checkpoints": True,
        "report_to": ["wandb"],
    },
}  # fmt: skip
PPO_ONLY = ("gae_lambda", "value_clip", "value_coef", "critic_learning_rate", "critic_warmup_steps")
OF_ALL_ALGORITHMS = {
    "environment": "Acrobot-v1", "environment_options": {"x": 1}, "seeds": [1], "steps": 7, "gamma": 0.5,
    "episodes": 3, "confidence": 0.9, "resamples": 500, "keep_checkpoints": True, "report_to": ["wandb"],
}  # fmt: skip
OTHER["control: tabular"] = OF_ALL_ALGORITHMS | {
    "algorithm": "sarsa", "learning_rate": 0.1, "schedule": "linear", "epsilon": 0.3,
}  # fmt: skip
OTHER["control: dynamic programming"] = OF_ALL_ALGORITHMS | {
    "algorithm": "policy_iteration", "tolerance": 1e-3,
}  # fmt: skip
OTHER["control: off-policy"] = OF_ALL_ALGORITHMS | {
    "algorithm": "sac", "hidden_sizes": [3], "learning_rate": 0.1, "buffer_size": 7, "learning_starts": 7,
    "batch_size": 7, "schedule": "linear", "train_every": 7, "gradient_steps": 7, "tau": 0.7,
    "replay": "hindsight", "hindsight_goals": 7, "target": "double", "network": "dueling", "target_update_interval": 7, "exploration_fraction": 0.7,
    "exploration_final": 0.7, "action_noise": 0.7,
}  # fmt: skip
OTHER["control: self-play"] = OF_ALL_ALGORITHMS | {
    "algorithm": "other", "games": 7, "learning_rate": 0.1, "epochs": 7, "minibatches": 7, "clip": 0.7,
    "entropy_coef": 0.7, "hidden_sizes": [3],
}  # fmt: skip
OTHER["control: several agents"] = OF_ALL_ALGORITHMS | {
    "algorithm": "other", "critic": "independent", "learning_rate": 0.1, "buffer_size": 7, "learning_starts": 7,
    "batch_size": 7, "train_every": 7, "tau": 0.7, "action_noise": 0.7, "hidden_sizes": [3],
}  # fmt: skip
OTHER["control: offline"] = OF_ALL_ALGORITHMS | {
    "algorithm": "behavior_cloning", "data": ["control", "control_2"], "batch_size": 7, "learning_rate": 0.1,
    "hidden_sizes": [3], "expectile": 0.5, "temperature": 0.5, "tau": 0.5,
}  # fmt: skip
OTHER["reinforce"] = {k: v for k, v in OTHER["ppo"].items() if k not in PPO_ONLY}
OTHER["rloo"] = {k: v for k, v in OTHER["reinforce"].items() if k != "gamma"}
OTHER["rloo"] |= {
    "normalize_advantages": True,
    "ratio": "sequence",
    "filter": "mixed_groups",
    "max_draws": 9,
}
OTHER["grpo"] = OTHER["rloo"] | {"scale_advantages": "none", "kl_placement": "reward"}
ONLINE_RL = ("ppo", "grpo", "rloo", "reinforce")
BASE: dict[str, dict[str, Any]] = {
    "prepare": {"source": "rows.jsonl"},
    "sft": {"model": {"vocab_size": 300, "hidden_size": 32}},
    "dpo": {"model": "sft"},
    "evaluate": {
        "policies": ["dpo"],
        "baseline": "sft",
        "judge": "gold",
        "implicit_rewards": False,
    },
    "kto": {"model": "sft"},
    "sample": {"model": "sft"},
    "label": {"judge": "gold"},
    "reward": {"model": "sft"},
    "ppo": {
        "model": "sft", "rewards": ["reward"], "steps": 9, "batch_size": 8, "n_completions": 2, "lora": {"r": 3},
    },
    "control": {"environment": "CartPole-v1", "steps": 100},
    "control: tabular": {"environment": "Taxi-v4", "steps": 100, "algorithm": "q_learning"},
    "control: dynamic programming": {"environment": "Taxi-v4", "algorithm": "value_iteration"},
    "control: off-policy": {"environment": "CartPole-v1", "steps": 2000, "algorithm": "dqn"},
    "control: self-play": {
        "environment": "align.control.games:Game-v0", "environment_options": {"game": "kuhn_poker"},
        "algorithm": "self_play", "steps": 100,
    },
    "control: several agents": {
        "environment": "align.control.multi_agent.parallel:Parallel-v0", "algorithm": "maddpg",
        "environment_options": {"module": "mpe2.simple_spread_v3"}, "steps": 2000,
    },
    "control: offline": {
        "environment": "CartPole-v1", "algorithm": "iql", "data": ["control"], "steps": 100,
    },
}  # fmt: skip
BASE |= dict.fromkeys(ONLINE_RL, BASE["ppo"])


def digest_with(stage: str, **changes: Any) -> str:
    """The digest of a stage, with digests of its inputs that depend on their names."""
    cls = CLASSES[stage]
    base = cls.model_validate(BASE[stage])
    values = {name: getattr(base, name) for name in cls.model_fields} | changes
    settings = cls.model_construct(**values)
    # The digest of an input is derived from its name here.
    inputs = {role: f"digest of {target}" for role, target in settings.input_names().items()}
    if stage == "prepare":
        inputs = {
            k: f"content of {values[k]}"
            for k in ("source", "demonstrations", "decontaminate")
            if values[k]
        }
    return stage_digest(settings, inputs)


NOT_IN_DIGEST = [
    (stage, key)
    for stage in ONLINE_RL
    for key in (
        "save_steps",
        "vllm_url",
        "vllm_timeout",
        "vllm_gpu_memory_utilization",
        "report_to",
    )
]
NOT_IN_DIGEST += [(stage, "report_to") for stage in CLASSES if stage.startswith("control")]
NOT_IN_DIGEST += [(stage, "max_lost_rows") for stage in ("sft", "dpo", "kto", "reward")]


@pytest.mark.parametrize(
    ("stage", "key"),
    [
        (stage, key)
        for stage in CLASSES
        for key in settings_of(stage)
        if (stage, key) not in NOT_IN_DIGEST
    ],
)
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # values are set unvalidated
def test_a_change_of_any_setting_changes_the_digest(stage, key):
    assert digest_with(stage, **{key: OTHER[stage][key]}) != digest_with(stage)


SETTINGS_DIGESTS = {
    "sft": "ae07960ecc33", "dpo": "9de72a4e1c2d", "kto": "a1e51b2684c8", "reward": "e6ada3413de8",
    "ppo": "bd4e37c53a6a",
}  # fmt: skip
"""Begin of the digests of the settings in ``BASE``, in a version before several keys existed."""


@pytest.mark.parametrize("stage", SETTINGS_DIGESTS)
def test_a_new_key_with_its_default_changes_no_digest(stage):
    settings = STAGES[stage].model_validate(BASE[stage]).digest_settings()
    assert artifacts.digest(settings).startswith(SETTINGS_DIGESTS[stage])


def test_what_is_logged_or_saved_does_not_change_the_digest():
    def trained(**keys: Any) -> str:
        return digest_with("dpo", **keys)

    for field in trl_fields.REPORTING | trl_fields.SAVING:
        assert field in trl_fields.trl_fields("DPOConfig")
        assert trl_fields.reserved("DPOConfig", field) is None
        assert trained(trainer={field: "x", "max_steps": 3}) == trained(trainer={"max_steps": 3})
    for stage, key in NOT_IN_DIGEST:
        assert digest_with(stage, **{key: OTHER[stage][key]}) == digest_with(stage)
    # Here the checkpoints are part of the result, or decide on it.
    kept = {"keep_checkpoints": True}
    assert trained(trainer={"save_steps": 3}, **kept) != trained(**kept)
    best = {"load_best_model_at_end": True}
    assert trained(trainer=best | {"save_steps": 3}) != trained(trainer=best)
    assert digest_with("ppo", save_steps=3, **kept) != digest_with("ppo", **kept)


def test_other_kept_columns_change_only_the_stages_that_read_prompts(here):
    before, after = plan(), plan("prepare.keep_columns=[id]")
    changed = {name for name in before if before[name].digest != after[name].digest}
    assert "prepare" in changed
    assert not changed & {"sft", "dpo", "kto", "reward"}
    assert all(
        before[name].config.reads[0].kind == "prompts" for name in changed & {"sample", *ONLINE_RL}
    )


def test_the_name_of_a_run_is_not_read_as_a_path(here):
    before = plan("dpo.trainer.run_name=wandb")["dpo"].digest
    (here / "wandb").mkdir()
    assert plan("dpo.trainer.run_name=wandb")["dpo"].digest == before


def test_a_path_that_cannot_be_read_is_an_error_with_its_place(here):
    with pytest.raises(UserError, match=r"command line: sft.trainer.chat_template_path: aaa.*too"):
        plan(f"sft.trainer.chat_template_path={'a' * 300}")


def test_the_code_version_of_a_stage_is_in_its_digest_and_in_later_ones(here, monkeypatch):
    before = plan()
    monkeypatch.setattr(STAGES["sft"], "code_version", 99)
    after = plan()
    assert before["prepare"].digest == after["prepare"].digest
    assert before["sft"].digest != after["sft"].digest
    assert before["dpo"].digest != after["dpo"].digest


def test_comments_layout_output_folder_and_names_of_stages_do_not_change_a_digest(here):
    before = plan()
    text = "# a comment\n" + RECIPE.replace("SOURCE", "rows.jsonl").replace(
        "    beta: 0.1", "    beta: 1.0e-1   # as ever\n    lora: null"
    ).replace("dpo:", "tuned:\n    stage: dpo")
    (here / "recipe.yaml").write_text(text)
    elsewhere = {s.name: s for s in pipeline_plan.plan(read(), Path("somewhere/else"))}
    assert [before[n].digest for n in ("prepare", "sft", "dpo")] == [
        elsewhere[n].digest for n in ("prepare", "sft", "tuned")
    ]


def test_files_of_the_same_name_in_two_folders_both_change_the_digest(here):
    for folder in ("a", "b"):
        (here / "source" / folder).mkdir(parents=True)
        (here / "source" / folder / "train.jsonl").write_text(ROWS)
    before = plan("prepare.source=source")["prepare"].digest
    (here / "source" / "a" / "train.jsonl").write_text(ROWS.replace("39!", "thirty-nine!"))
    assert plan("prepare.source=source")["prepare"].digest != before


def test_the_content_of_a_file_in_trainer_changes_the_digest(here):
    template = here / "template.jinja"
    template.write_text("{{ messages }}")
    override = "sft.trainer.chat_template_path=template.jinja"
    before = plan(override)["sft"].digest
    template.write_text("{{ messages[0] }}")
    assert plan(override)["sft"].digest != before


def test_the_digest_of_an_external_adapter_includes_its_base(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    (base / "model.safetensors").write_text("weights")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    before = artifacts.digest_folder(adapter)
    (base / "model.safetensors").write_text("other weights")
    assert artifacts.digest_folder(adapter) != before


def test_the_names_in_an_evaluation_label_its_results_and_change_its_digest(here):
    text = RECIPE.replace("SOURCE", "rows.jsonl")
    text += "  evaluate: {policies: [dpo], baseline: sft, implicit_rewards: true}\n"
    (here / "recipe.yaml").write_text(text)
    before = plan()["evaluate"].digest
    (here / "recipe.yaml").write_text(
        text.replace("  sft:\n", "  base:\n    stage: sft\n")
        .replace("model: sft", "model: base")
        .replace("baseline: sft", "baseline: base")
    )
    assert plan()["evaluate"].digest != before


def test_the_content_of_a_source_changes_the_digest_and_its_path_does_not(here):
    before = plan()
    (here / "moved").mkdir()
    (here / "rows.jsonl").rename(here / "moved" / "rows.jsonl")
    assert plan("prepare.source=moved/rows.jsonl")["dpo"].digest == before["dpo"].digest
    (here / "moved" / "rows.jsonl").write_text(ROWS.replace("39!", "thirty-nine!"))
    assert plan("prepare.source=moved/rows.jsonl")["prepare"].digest != before["prepare"].digest


# Reuse


def test_the_same_command_again_reuses_everything_and_writes_only_the_summary(here):
    assert set(run().values()) == {"ran"}
    before = snapshot(here / "runs")
    assert set(run().values()) == {"reused"}
    after = snapshot(here / "runs")
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed == {os.path.join("recipe", "summary.json")}


def test_another_beta_reuses_sft_and_runs_dpo(here):
    run()
    assert run("dpo.beta=0.3") == {"prepare": "reused", "sft": "reused", "dpo": "ran"}
    assert len(list((here / "runs").glob("dpo-*"))) == 2


def test_force_runs_one_stage_again_and_reuses_the_others(here):
    run()
    folder = plan()["sft"].folder
    (folder / "left over").write_text("from before")
    assert run(force="sft") == {"prepare": "reused", "sft": "ran", "dpo": "reused"}
    assert not (folder / "left over").exists()
    assert set(run(force="all").values()) == {"ran"}


def test_until_runs_a_stage_and_those_whose_results_it_needs(here):
    assert run(until="sft") == {"prepare": "ran", "sft": "ran"}
    recipe = Path("recipe.yaml")
    other = "  dpo_alone: {stage: dpo, model: sft, beta: 0.3}\n"
    recipe.write_text(recipe.read_text() + other)
    # `dpo` comes before it in the file, and neither its model nor its data come from `dpo`
    assert run(until="dpo_alone") == {"prepare": "reused", "sft": "reused", "dpo_alone": "ran"}
    with pytest.raises(UserError, match="--force dpo: `--until dpo_alone` does not need this"):
        run(until="dpo_alone", force="dpo")
    assert run(until="dpo_alone", force="sft")["sft"] == "ran"
    assert set(run(until="dpo_alone", force="all").values()) == {"ran"}


def test_force_and_until_must_name_existing_stages(here):
    with pytest.raises(UserError, match="--force sfd: no such stage; did you mean `sft`"):
        run(force="sfd")
    with pytest.raises(UserError, match="--until"):
        run(until="ppo")


def test_a_stage_that_crashes_leaves_no_artifact_and_runs_again(here, monkeypatch):
    def crash(folder: Path, artifact: artifacts.Artifact) -> None:
        if artifact.stage == "sft":
            raise RuntimeError("the power went")
        original(folder, artifact)

    original = artifacts.write_artifact
    with monkeypatch.context() as m:
        m.setattr(artifacts, "write_artifact", crash)
        with pytest.raises(RuntimeError, match="power"):
            run()
    assert plan()["prepare"].status == "reused"
    assert plan()["sft"].status == "run"
    # Until the run has its summary, its plan protects what it uses from `align runs --prune`.
    (file,) = (here / "runs" / "recipe").iterdir()
    assert file.match("planned-*.json")
    folders = {stage["folder"] for stage in json.loads(file.read_text())["stages"]}
    assert folders == {stage.folder.name for stage in plan().values()}
    assert run() == {"prepare": "reused", "sft": "ran", "dpo": "ran"}
    file.write_text("{}")  # as after a kill between the summary and the end of the run
    assert set(run().values()) == {"reused"}
    assert [path.name for path in file.parent.iterdir()] == ["summary.json"]


@pytest.mark.parametrize("name", ["prepare", "sft"])  # one process, or all of them
def test_an_error_of_a_stage_keeps_its_class_and_gets_a_place(here, monkeypatch, name):
    def fail(*_: Any) -> StageResult:
        raise DataError("rows.jsonl:1: no text", "rows.jsonl:2: no text")

    original = runner.stage_module
    failing = SimpleNamespace(run=fail)
    monkeypatch.setattr(runner, "stage_module", lambda k: failing if k == name else original(k))
    with pytest.raises(DataError) as raised:
        run()
    line = {"prepare": 2, "sft": 3}[name]
    assert raised.value.lines == tuple(
        f"recipe.yaml:{line}: {name}: rows.jsonl:{row}: no text" for row in (1, 2)
    )
    # With several processes, the error is sent to those that wait.
    received = pickle.loads(pickle.dumps(raised.value))
    assert (type(received), received.lines) == (DataError, raised.value.lines)


@pytest.mark.parametrize("name", ["prepare", "sft"])  # one process, or all of them
def test_a_full_disk_is_reported_with_the_folder_and_leaves_no_empty_folder(
    here, monkeypatch, name
):
    def fail(*_: Any) -> StageResult:
        raise OSError(errno.ENOSPC, "No space left on device")

    original = runner.stage_module
    failing = SimpleNamespace(run=fail)
    monkeypatch.setattr(runner, "stage_module", lambda k: failing if k == name else original(k))
    with pytest.raises(UserError, match=rf"runs/{name}-.*: No space left on device; .*resumes"):
        run()
    assert not list(Path("runs").glob(f"{name}-*"))


MORE_STAGES = """\
  reward: {model: sft, tokens_per_batch: 64, trainer: {gradient_checkpointing: false}}
  kto: {model: sft, lora: {r: 2, alpha: 2}, trainer: {gradient_checkpointing: true}}
  ppo: {model: sft, rewards: [reward], steps: 1, batch_size: 2}
  grpo: {model: sft, rewards: [reward], steps: 1, batch_size: 8, tokens_per_batch: 9}
  sample: {model: sft, prompts: prepare}
  evaluate: {policies: [dpo], baseline: sft, implicit_rewards: true}
"""
TRL_BATCH = (
    "a smaller `trainer.per_device_train_batch_size` with more "
    "`trainer.gradient_accumulation_steps`"
)
CHECKPOINTING = "`trainer.gradient_checkpointing: true`"
GPU = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.1 GiB"
HOST = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"
)
MACHINE = "the machine, which has 64 GB (4 TB more were asked for)"
DEVICE = "cuda:0, which has 80 GB (2.50 GiB more were asked for)"


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("prepare", ""),
        ("sft", f"{TRL_BATCH}, `lora`, `quantization: nf4`"),
        ("dpo", f"{TRL_BATCH}, {CHECKPOINTING}, `lora`, `quantization: nf4`"),
        (
            "reward",
            f"a smaller `tokens_per_batch`, {CHECKPOINTING}, `lora`, `quantization: nf4`",
        ),
        ("kto", f"{TRL_BATCH}, `quantization: nf4`"),
        (
            "ppo",
            "a smaller `micro_batch_size` (results stay the same), a smaller `sample_batch_size`, "
            "`gradient_checkpointing: true`, `lora`, `quantization: nf4`",
        ),
        (
            "grpo",
            "a smaller `tokens_per_batch` (results stay the same), a smaller `sample_batch_size`, "
            "`gradient_checkpointing: true`, `lora`, `quantization: nf4`",
        ),
        ("sample", "a smaller `batch_size`, `quantization: nf4`"),
        ("evaluate", "a smaller `batch_size`, `quantization: nf4`"),
    ],
)
@pytest.mark.parametrize(
    ("error", "size"),
    [
        pytest.param(torch.OutOfMemoryError(GPU), "80GB", id="GPU"),
        pytest.param(RuntimeError(HOST), "64GB", id="host"),
    ],
)
def test_a_lack_of_memory_is_one_line_with_the_settings_that_lower_it_and_the_plan(
    here, monkeypatch, name, settings, error, size
):
    def fail(config: Any, inputs: Any, folder: Path, logger: Any) -> StageResult:
        (folder / "checkpoint-1").mkdir()
        raise error

    recipe = RECIPE.replace("SOURCE", "rows.jsonl") + MORE_STAGES
    (here / "recipe.yaml").write_text(
        recipe.replace("  dpo:", "  dpo:\n    trainer: {gradient_checkpointing: false}")
    )
    monkeypatch.setattr(out_of_memory, "_gpu", lambda: ("cuda:0", 80_000_000_000))
    monkeypatch.setattr(out_of_memory, "_machine", lambda: ("the machine", 64_000_000_000))
    stage = plan()[name]
    stage.folder.mkdir(parents=True)
    monkeypatch.setattr(runner, "stage_module", lambda _: SimpleNamespace(run=fail))
    with pytest.raises(UserError) as raised:
        runner._stage_result(stage, read("sft.seed=3"), Display(Console(quiet=True)))
    (line,) = raised.value.lines
    place, _, message = line.partition(": out of memory on ")
    assert re.fullmatch(rf"recipe\.yaml:\d+: {name}", place)
    device, _, advice = message.partition("; ")
    assert device == (DEVICE if size == "80GB" else MACHINE)
    in_order, _, command = advice.partition("; ")
    assert in_order == (
        f"in this order, set {settings}" if settings else "free memory, or use a machine with more"
    )
    has_bill = name != "prepare"
    plan_command = f"align plan recipe.yaml sft.seed=3 --gpu-memory {size}"
    assert command == (
        f"`{plan_command}` lists what the stages need and what would lower it" if has_bill else ""
    )
    assert (stage.folder / "checkpoint-1").exists()


def test_the_first_line_of_a_run_has_the_number_of_processes(here):
    console = Console(file=io.StringIO(), width=100)
    runner.run_recipe(read(), Path("runs"), Display(console), until="prepare")
    assert console.file.getvalue().splitlines()[0] == "recipe.yaml: 1 process"


def test_force_removes_nothing_outside_the_runs_folder(here):
    run()
    folder = plan()["sft"].folder
    elsewhere = here / "elsewhere"
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)
    before = {file.name for file in elsewhere.iterdir()}
    for force in ("sft", "all"):
        with pytest.raises(UserError, match=r"a symbolic link to .*elsewhere.*; remove the link"):
            run(force=force)
    assert plan()["prepare"].status == "reused"  # found before the first stage
    assert {file.name for file in elsewhere.iterdir()} == before

    folder.unlink()
    run()
    for link in ("checkpoint-2", "notes"):  # links within a folder are removed as links
        (folder / link).symlink_to(elsewhere)
    assert run(force="sft")["sft"] == "ran"
    assert {file.name for file in elsewhere.iterdir()} == before
    assert {file.name for file in folder.iterdir()} == before


def test_a_broken_artifact_is_reported_with_a_repair_that_works(here):
    run()
    (plan()["sft"].folder / artifacts.FILE).write_text("{}")
    with pytest.raises(UserError, match=r"recipe.yaml:3: sft: .*has no checksum.*--force"):
        run()
    assert run(force="sft") == {"prepare": "reused", "sft": "ran", "dpo": "reused"}


FINISHED_FILES = (
    "prepare/artifact.json", "prepare/pairs-train.parquet", "prepare/README.md",
    "sft/artifact.json", "sft/README.md", "sft/model.safetensors", "dpo/model.safetensors",
)  # fmt: skip


@pytest.mark.parametrize("damage", sorted(DAMAGES))
def test_a_damaged_file_of_a_finished_stage_is_an_error_with_a_repair_that_works(here, damage):
    run()
    stages = plan()
    assert {path.name for path in stages["sft"].folder.iterdir()} == {
        "README.md", "artifact.json", "model.safetensors"
    }  # fmt: skip
    for damaged in FINISHED_FILES:
        name, _, file_name = damaged.partition("/")
        file = stages[name].folder / file_name
        if file_name == artifacts.FILE and damage == "deleted":
            continue  # an unfinished stage
        whole = file.read_bytes()
        DAMAGES[damage](file)
        with pytest.raises(UserError, match="--force") as raised:
            run()
        assert len(raised.value.lines) == 1
        assert f": {name}: {file}: " in raised.value.lines[0]
        assert run(until="prepare") if name != "prepare" else True  # the others stay usable
        if name == "dpo":
            assert run(force="dpo") == {"prepare": "reused", "sft": "reused", "dpo": "ran"}
        else:
            checkpoints_remove(file)
            file.write_bytes(whole)
    assert set(run().values()) == {"reused"}


def test_a_damaged_file_of_a_finished_stage_hides_no_other_error(here):
    run()
    file = plan()["prepare"].folder / "pairs-train.parquet"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError) as raised:
        run("dpo.trainer={optim: lomo}")
    first, second = raised.value.lines
    assert f": prepare: {file}: its content differs" in first
    assert ": dpo.trainer.optim: lomo_optim is not installed" in second


def checkpoints_remove(path: Path) -> None:
    if path.is_dir():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    "change", [{"digest": "0" * 64}, {"stage": "dpo"}, {"stage": "unknown"}], ids=str
)
def test_the_artifact_of_another_stage_is_not_believed(here, change):
    run()
    folder = plan()["sft"].folder
    artifact = artifacts.read_artifact(folder)
    assert artifact is not None
    artifacts.write_artifact(folder, dataclasses.replace(artifact, **change))
    with pytest.raises(UserError, match=r"artifact.json: of a `.*expected `sft` with .*--force"):
        run()


def test_a_finished_folder_from_outside_the_recipe_is_checked_as_well(here):
    run()
    folder = plan()["sft"].folder
    arguments = (f"dpo.model={folder}", "dpo.beta=0.2")
    (folder / "notes.txt").write_text("A file that nothing loads does not matter.")
    assert run(*arguments)["dpo"] == "ran"
    DAMAGES["a flipped bit"](folder / "model.safetensors")
    with pytest.raises(UserError, match="differs from its checksum"):
        run(*arguments, "dpo.beta=0.3", until="dpo")


def test_a_file_that_a_later_stage_would_load_is_not_added_unnoticed(here):
    run()
    (plan()["sft"].folder / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(
        UserError, match=r"chat_template.jinja: a file that the stage did not write"
    ):
        run()


def test_each_finished_file_is_read_once_in_a_run(here, monkeypatch):
    run()
    read: list[Path] = []
    monkeypatch.setattr(checksums, "digest_file", lambda file: read.append(file) or "x")
    with pytest.raises(UserError):
        run("dpo.beta=0.2")
    assert len(read) == len(set(read)) > 2


def test_the_cache_of_an_interrupted_run_is_not_used(here, monkeypatch):
    run(until="prepare")
    folder = plan()["sft"].folder
    (folder / ".cache").mkdir(parents=True)
    (folder / ".cache" / "rows.arrow").write_text("damaged")
    seen = []
    original = checkpoints.set_aside_damaged
    monkeypatch.setattr(
        checkpoints,
        "set_aside_damaged",
        lambda folder, announce: [
            seen.append((folder / ".cache").exists()),
            original(folder, announce),
        ],
    )
    run()
    assert not any(seen)


@pytest.mark.parametrize("kind", ["a folder", "a link to itself", "a pipe"])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "metrics.jsonl", artifacts.WORKING, ".cache", "README.md"]
)
def test_something_else_in_the_place_of_a_file_is_an_error_or_harmless(here, name, kind):
    run(until="prepare")
    path = plan()["sft"].folder / name
    path.parent.mkdir(parents=True)
    match kind:
        case "a folder":
            path.mkdir()
        case "a link to itself":
            path.symlink_to(path.name)
        case "a pipe":
            os.mkfifo(path)
    if name == ".cache":
        assert run(until="sft")["sft"] == "ran"
        return
    with pytest.raises(UserError, match=re.escape(str(path)) + r": .*; move it away$"):
        run()
    if name != artifacts.WORKING:
        assert run(force="sft")["sft"] == "ran"


@pytest.mark.parametrize("name", ["recipe", "recipe/summary.json"])
def test_a_summary_that_cannot_be_written_is_reported_before_anything_runs(here, name):
    path = here / "runs" / name
    path.parent.mkdir(parents=True)
    if name == "recipe":
        path.write_text("")
    else:
        path.mkdir()
    with pytest.raises(UserError, match="no summary can be written; move it away"):
        run()
    assert list((here / "runs").glob("*-*")) == []


def test_a_signal_in_the_last_step_ends_the_run_after_the_stage(here, monkeypatch):
    monkeypatch.setattr(signals._stop, "requested", True)
    with pytest.raises(signals.Interrupted):
        run()
    assert plan()["prepare"].status == "reused"
    assert plan()["sft"].status == "run"


def test_the_next_run_removes_the_working_files_of_a_killed_run(here):
    run()
    folder = plan()["sft"].folder
    checkpoint(folder, 3)
    (folder / artifacts.WORKING).write_text("{}")
    assert set(run().values()) == {"reused"}
    assert not (folder / artifacts.WORKING).exists()
    assert list(folder.glob("checkpoint-*")) == []


def test_reuse_of_a_model_trained_by_another_number_of_processes_is_logged(here, caplog):
    run()
    folder = plan()["sft"].folder
    artifact = artifacts.read_artifact(folder)
    assert artifact is not None
    artifacts.write_artifact(folder, dataclasses.replace(artifact, world_size=8))
    run()
    assert "sft: trained by 8 processes; this run has 1" in caplog.messages


def test_data_that_a_later_stage_cannot_use_are_reported_before_anything_trains(here):
    (here / "rows.jsonl").write_text(
        "".join(
            json.dumps({"prompt": f"Say {i}.", "completion": f"{i}!"}) + "\n" for i in range(40)
        )
    )
    with pytest.raises(
        UserError, match=r"recipe.yaml:6: dpo.pairs: .* no table pairs-train, only demonstr"
    ):
        run()
    assert list((here / "runs").glob("sft-*")) == []


def test_the_gold_judge_is_refused_for_other_prompts_before_anything_trains(here):
    text = RECIPE.replace("SOURCE", "rows.jsonl")
    text += "  evaluate: {policies: [dpo], baseline: sft, judge: gold}\n"
    (here / "recipe.yaml").write_text(text)
    with pytest.raises(
        UserError,
        match=r"recipe.yaml:9: evaluate.judge: `gold` scores only prompts of the embedded",
    ):
        run()
    assert list((here / "runs").glob("sft-*")) == []


def test_the_artifact_is_written_after_everything_else(here):
    run()
    for step in plan().values():
        artifact = (step.folder / artifacts.FILE).stat().st_mtime_ns
        assert all(p.stat().st_mtime_ns <= artifact for p in step.folder.iterdir())


def test_lineage_names_inputs_by_folder_and_digest(here):
    run()
    steps = plan()
    artifact = artifacts.read_artifact(steps["dpo"].folder)
    assert artifact is not None
    assert artifact.inputs == {
        "model": {"folder": str(steps["sft"].folder), "digest": steps["sft"].digest},
        "pairs": {"folder": str(steps["prepare"].folder), "digest": steps["prepare"].digest},
    }
    assert artifact.digest == steps["dpo"].digest
    assert artifact.recipe["beta"] == 0.1
    assert {"torch", "trl", "transformers", "align"} <= artifact.versions.keys()


def test_the_summary_has_the_documented_keys(here):
    run()
    summary = json.loads((here / "runs" / "recipe" / "summary.json").read_text())
    assert summary.keys() == {"recipe", "overrides", "seconds", "stages"}
    keys = {"name", "stage", "digest", "folder", "status", "seconds", "metrics"}
    assert all(stage.keys() == keys for stage in summary["stages"])


def test_a_finished_stage_can_be_named_by_its_folder_in_another_recipe(here):
    run()
    steps = plan()
    Path("second.yaml").write_text(
        f"stages:\n  dpo: {{model: {steps['sft'].folder}, pairs: {steps['prepare'].folder}}}\n"
    )
    again = pipeline_plan.plan(load_recipe("second.yaml"), Path("runs"))
    assert again[0].digest == steps["dpo"].digest
    assert again[0].status == "reused"


def test_an_unfinished_folder_is_refused_as_input(here):
    run()
    folder = plan()["sft"].folder
    (folder / artifacts.FILE).unlink()
    (folder / artifacts.WORKING).write_text("{}")
    Path("second.yaml").write_text(
        f"stages:\n  dpo: {{model: {folder}, pairs: {plan()['prepare'].folder}}}\n"
    )
    with pytest.raises(UserError, match=r"second.yaml:2: dpo.model: .*no artifact.json"):
        pipeline_plan.plan(load_recipe("second.yaml"), Path("runs"))


# Locks


def test_a_second_run_of_a_stage_reports_the_holder_waits_and_reuses(here, capsys):
    run(until="prepare")
    folder = plan()["sft"].folder
    folder.mkdir()
    lock = FileLock(folder / artifacts.WORKING)
    lock.acquire()
    (folder / artifacts.WORKING).write_text(
        json.dumps({"pid": 4711, "host": "elsewhere", "since": "noon"})
    )
    lines: list[str] = []
    display = Display(Console(quiet=True))
    display.info = lambda line, style=None: lines.append(line)  # type: ignore[method-assign]
    results: list[runner.RunSummary] = []
    thread = threading.Thread(
        target=lambda: results.append(runner.run_recipe(read(), Path("runs"), display, until="sft"))
    )
    thread.start()
    deadline = time.monotonic() + 20
    while not any("held by" in line for line in lines) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert any("process 4711 on elsewhere since noon" in line for line in lines)
    assert thread.is_alive()
    donor = artifacts.read_artifact(plan()["prepare"].folder)
    assert donor is not None
    artifacts.write_artifact(folder, donor)  # the holder finishes
    lock.release()
    thread.join(20)
    assert [stage.status for stage in results[0].stages] == ["reused", "reused"]


def test_the_lock_of_a_killed_run_is_released(here):
    run(until="prepare")
    folder = plan()["sft"].folder
    folder.mkdir()
    code = (
        "import sys, time; from filelock import FileLock\n"
        "FileLock(sys.argv[1]).acquire(); print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(folder / artifacts.WORKING)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        holder.kill()
    assert run(until="sft")["sft"] == "ran"


# Files


def test_json_is_written_completely_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    artifacts.write_json(path, {"a": 1})
    monkeypatch.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        artifacts.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}


def checkpoint(folder: Path, step: int, *, complete: bool = True, world_size: int = 1) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    (path / "model.safetensors").write_text("weights")
    if complete:
        checkpoints.mark_complete(path, world_size=world_size)
    return path


def test_an_incomplete_checkpoint_is_skipped_and_the_last_one_has_the_highest_number(tmp_path):
    checkpoint(tmp_path, 9)
    checkpoint(tmp_path, 100)
    checkpoint(tmp_path, 110, complete=False)
    assert checkpoints.last_checkpoint(tmp_path, world_size=1) == tmp_path / "checkpoint-100"


@pytest.mark.parametrize("damage", ["removed", "cut off"])
def test_a_partly_removed_checkpoint_is_skipped_although_it_is_marked_complete(tmp_path, damage):
    checkpoint(tmp_path, 3)
    last = checkpoint(tmp_path, 6)
    (last / "optimizer.pt").write_text("moments")
    checkpoints.mark_complete(last, world_size=1)
    assert checkpoints.list_checkpoints(tmp_path)[-1] == last
    if damage == "removed":
        (last / "optimizer.pt").unlink()
    else:
        (last / "optimizer.pt").write_text("mom")
    assert checkpoints.last_checkpoint(tmp_path, world_size=1) == tmp_path / "checkpoint-3"


def test_a_killed_force_leaves_no_checkpoint_to_resume_from(tmp_path, monkeypatch):
    checkpoint(tmp_path, 3)
    monkeypatch.setattr(
        runner.shutil, "rmtree", lambda path: (_ for _ in ()).throw(OSError("killed"))
    )
    with pytest.raises(OSError, match="killed"):
        runner.clear_folder(tmp_path)
    assert checkpoints.list_checkpoints(tmp_path) == []


def test_a_checkpoint_of_another_number_of_processes_is_refused(tmp_path):
    checkpoint(tmp_path, 5, world_size=2)
    with pytest.raises(UserError, match="written by 2 processes, and this run has 1; launch 2"):
        checkpoints.last_checkpoint(tmp_path, world_size=1)


def test_an_unreadable_artifact_is_reported_with_its_repair(tmp_path):
    (tmp_path / artifacts.FILE).write_text("{}")
    with pytest.raises(UserError, match="has no checksum"):
        artifacts.read_artifact(tmp_path)


def test_the_name_of_a_recipe_is_its_path_below_recipes(tmp_path):
    def name(path: str) -> str:
        return Recipe(tmp_path / path, {}).name

    assert name("recipes/dpo.yaml") == "dpo"
    assert name("recipes/hh/dpo.yaml") == "hh-dpo"
    assert name("elsewhere/mine.yaml") == "mine"


def test_every_setting_has_a_second_value_in_this_file():
    assert set(FAMILIES) <= set(CLASSES.values())
    assert {stage: set(settings_of(stage)) for stage in CLASSES} == {
        stage: set(values) for stage, values in OTHER.items()
    }
    assert all(issubclass(cls, BaseModel) for cls in STAGES.values())
