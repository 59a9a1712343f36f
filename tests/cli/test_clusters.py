"""Tests of `align export --for`: what is written for verl and OpenRLHF, and what is refused.

``upstream/`` has the keys of verl's configuration and the flags of OpenRLHF's command line.
"""

from __future__ import annotations

import importlib.util
import json
import math
import shlex
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from helpers import finished_runs, tiny_models
from typer.testing import CliRunner

from align.cli.clusters import openrlhf, verl
from align.cli.clusters.job import Job
from align.cli.clusters.rules import UNUSED
from align.cli.main import app
from align.config.online_rl_stages import GRPO, PPO, RLOO, Reinforce
from align.data import tables
from align.functional.policy_gradient import importance_ratio, kl_k3
from align.online_rl.prompts import prompt_indices

UPSTREAM = Path(__file__).parent / "upstream"
REWARDS = """
def short(prompts, completions, prompt_id, **columns):
    assert len(prompts) == len(completions) == len(prompt_id) == 1
    return [-len(completions[0]) / 10]

def last_word(prompts, completions, answer):
    return [float(completions[0].endswith(answer[0]))]
"""
COMMON = {"rewards": ["scores:short"], "steps": 3, "batch_size": 24, "max_new_tokens": 32}
STAGES = {
    "grpo": {"n_completions": 4, "kl_placement": "token_loss", "schedule": "constant"},
    "ppo": {"minibatches": 2, "schedule": "cosine", "value_coef": 0.5, "critic_warmup_steps": 0},
    "rloo": {"n_completions": 2, "schedule": "constant"},
    "reinforce": {"schedule": "cosine", "kl_coef": 0.3},
}
CLASSES = {"grpo": GRPO, "ppo": PPO, "rloo": RLOO, "reinforce": Reinforce}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny_models.world(tmp_path_factory.getbasetemp())


@pytest.fixture
def folder(tmp_path, monkeypatch, world):
    """The working directory: a recipe with a stage of each kind, and its reward functions."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scores.py").write_text(REWARDS)
    inputs = {"model": str(world.sft), "prompts": str(world.data)}
    stages = {kind: inputs | COMMON | keys for kind, keys in STAGES.items()}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"stages": stages}))
    yield tmp_path
    sys.modules.pop("scores", None)


def export(*arguments: str):
    result = CliRunner().invoke(app, ["export", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def written(kind: str, program: str, *overrides: str) -> Path:
    target = Path(f"{kind}-{program}")
    export("r.yaml", str(target), *overrides, "--for", program, "--stage", kind)
    return target


def leaves(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        nested = isinstance(value, dict) and key != "override_optimizer_config"
        flat |= leaves(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def verl_keys(target: Path) -> dict:
    tree = yaml.safe_load((target / "verl.yaml").read_text())
    assert tree.pop("hydra") == {"searchpath": ["pkg://verl.trainer.config"]}
    assert tree.pop("defaults") == ["ppo_trainer", "_self_"]
    return leaves(tree)


def command(target: Path) -> list[str]:
    """The words of the command in the launch script."""
    text = (target / "train.sh").read_text()
    return shlex.split(text[text.index("python3 -m") :].replace("\\\n", " "))


def openrlhf_flags(target: Path) -> dict[str, list[str]]:
    flags: dict[str, list[str]] = {}
    for word in command(target)[3:-1]:
        if word.startswith("--"):
            values = flags.setdefault(word[2:], [])
        else:
            values.append(word)
    return flags


def table(name: str) -> list[str]:
    lines = (UPSTREAM / name).read_text().splitlines()
    return [line for line in lines if not line.startswith("#")]


@pytest.mark.parametrize("kind", STAGES)
def test_every_key_for_verl_exists_there(folder, kind):
    target = written(kind, "verl")
    known = set(table("verl.txt"))
    assert len(known) == 317
    words = command(target)
    assert words[:7] == [
        "python3",
        "-m",
        "verl.trainer.main_ppo",
        "--config-path",
        "$FOLDER",
        "--config-name",
        "verl",
    ]
    overrides = {word.partition("=")[0] for word in words[7:-1]}
    assert len(overrides) == 6
    assert verl_keys(target).keys() | overrides <= known


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("grpo", ["grpo.aggregate=token", "grpo.dual_clip=3", "grpo.gradient_checkpointing=true"]),
        ("ppo", ["ppo.kl_coef=0", "ppo.overlong_buffer=8", "ppo.entropy_coef=0.1"]),
        ("ppo", ["ppo.lora={r: 4, target_modules: [q_proj, v_proj]}"]),
        ("rloo", ["rloo.kl_coef=0"]),
        ("reinforce", []),
    ],
)
def test_every_flag_for_openrlhf_exists_there_with_so_many_values(folder, kind, overrides):
    target = written(kind, "openrlhf", *overrides)
    known = {name: rest for name, *rest in (line.split() for line in table("openrlhf.txt"))}
    assert len(known) == 167
    words = command(target)
    assert (words[:3], words[-1]) == (["python3", "-m", "openrlhf.cli.train_ppo_ray"], "$@")
    for name, values in openrlhf_flags(target).items():
        count, kind_of_value, *choices = known[name]
        assert len(values) == int(count) if count.isdigit() else values, name
        for value in values:
            if "$" not in value:
                {"int": int, "float": float, "str": str}[kind_of_value](value)
            assert not choices or value in choices[0].split("|"), name


def test_the_values_of_grpo_for_verl(folder, world):
    keys = verl_keys(written("grpo", "verl", "grpo.clip_high=0.28", "grpo.seed=7"))
    actor, rollout = "actor_rollout_ref.actor.", "actor_rollout_ref.rollout."
    expected = {
        "actor_rollout_ref.model.path": str(world.sft.resolve()),
        "data.train_batch_size": 6,  # 24 completions, 4 of each prompt
        "data.max_response_length": 32,
        "data.shuffle": False,
        f"{actor}ppo_mini_batch_size": 6,
        f"{actor}ppo_epochs": 1,
        f"{actor}clip_ratio_low": 0.2,
        f"{actor}clip_ratio_high": 0.28,
        f"{actor}clip_ratio_c": 1e8,
        f"{actor}loss_agg_mode": "seq-mean-token-mean",
        f"{actor}use_kl_loss": True,
        f"{actor}kl_loss_coef": 0.04,
        f"{actor}kl_loss_type": "low_var_kl+",
        f"{actor}optim.lr": 1e-5,
        f"{actor}optim.weight_decay": 0.0,
        f"{actor}optim.override_optimizer_config": {"eps": 1e-5},
        f"{actor}data_loader_seed": 7,
        f"{rollout}n": 4,
        f"{rollout}temperature": 1.0,
        f"{rollout}seed": 7,
        "algorithm.adv_estimator": "grpo",
        "algorithm.norm_adv_by_std_in_grpo": True,
        "algorithm.use_kl_in_reward": False,
        "algorithm.rollout_correction.rollout_is_threshold": 2.0,
        "trainer.total_training_steps": 3,
        "trainer.save_freq": 1,
        "reward.custom_reward_function.name": "compute_score",
    }
    assert {key: keys[key] for key in expected} == expected
    assert not any(key.startswith("critic.") for key in keys)


def test_the_values_of_ppo_for_both(folder):
    overrides = ["ppo.critic_learning_rate=3e-5", "ppo.value_clip=null", "ppo.max_grad_norm=2"]
    keys = verl_keys(written("ppo", "verl", *overrides))
    expected = {
        "algorithm.adv_estimator": "gae",
        "algorithm.lam": 0.95,
        "algorithm.use_kl_in_reward": True,
        "algorithm.kl_ctrl.kl_coef": 0.05,
        "actor_rollout_ref.actor.ppo_mini_batch_size": 12,
        "actor_rollout_ref.actor.ppo_epochs": 4,
        "critic.optim.lr": 3e-5,
        "critic.optim.clip_grad": 4.0,  # 2 / 0.5
        "critic.optim.override_optimizer_config": {"eps": 2e-5},  # 1e-5 / 0.5
        "critic.cliprange_value": 1e8,
        "trainer.critic_warmup": 1,
    }
    assert {key: keys[key] for key in expected} == expected
    flags = openrlhf_flags(written("ppo", "openrlhf", *overrides))
    expected = {
        "algo.advantage.estimator": ["gae"],
        "algo.advantage.lambd": ["0.95"],
        "algo.kl.init_coef": ["0.05"],
        "algo.kl.estimator": ["k1"],
        "train.batch_size": ["12"],
        "train.max_epochs": ["4"],
        "rollout.batch_size": ["24"],
        "rollout.max_new_tokens": ["32"],
        "actor.lr_scheduler": ["cosine"],
        "critic.adam.lr": ["3e-05"],
        "critic.adam.eps": ["2e-05"],
        "critic.max_norm": ["4.0"],
        "critic.freezing_steps": ["-1"],
    }
    assert {key: flags[key] for key in expected} == expected
    assert "algo.kl.use_loss" not in flags


def test_the_warm_up_of_openrlhf_has_the_updates_of_the_recipe(folder):
    flags = openrlhf_flags(written("ppo", "openrlhf", "ppo.warmup_steps=2"))
    # It rounds up: 3 updates of 4 epochs and 2 minibatches are 24 optimizer steps, 2 of them 16.
    assert math.ceil(24 * float(flags["actor.lr_warmup_ratio"][0])) == 16


def test_a_scaled_loss_is_another_eps_and_another_norm():
    """What `value_coef` becomes: Adam is the same for c * loss, with eps / c and norm / c."""

    def trained(coef: float, eps: float, norm: float) -> torch.Tensor:
        weights = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.01], dtype=torch.float64))
        optimizer = torch.optim.AdamW([weights], lr=0.1, eps=eps, weight_decay=0.0)
        for step in range(5):
            optimizer.zero_grad()
            (coef * (weights**4 * 3.0**-step).sum()).backward()
            torch.nn.utils.clip_grad_norm_([weights], norm)
            optimizer.step()
        return weights.detach()

    torch.testing.assert_close(trained(0.1, 1e-3, 0.5), trained(1.0, 1e-2, 5.0), rtol=1e-6, atol=0)
    assert not torch.allclose(trained(0.1, 1e-3, 0.5), trained(1.0, 1e-3, 0.5), rtol=1e-3)


@pytest.mark.parametrize("moved", [0.0, 0.3], ids=["first step", "later step"])
def test_the_kl_term_of_a_token_has_the_gradient_of_the_other_trainers(moved):
    """`low_var_kl+` has the gradient of half the squared log-ratio, OpenRLHF's that times a ratio.

    Why verl is limited to one optimizer step: the ratio is 1 in the first one only.
    """
    generator = torch.Generator().manual_seed(0)
    old, ref, noise = (torch.randn(3, 20, generator=generator, dtype=torch.float64) - 3).unbind()
    logps = (old + moved * noise).requires_grad_()
    (importance_ratio(logps, old) * kl_k3(logps, ref)).sum().backward()
    with torch.no_grad():
        as_verl = logps - ref
        as_openrlhf = (logps - old).exp() * as_verl
    torch.testing.assert_close(logps.grad, as_openrlhf)
    assert torch.allclose(logps.grad, as_verl) == (moved == 0)


def test_the_files_have_the_prompts_of_each_update_in_order(folder, world):
    rows = tables.read(world.data, "prompts", "train")
    steps = len(rows) // 6 + 2  # more than one epoch
    order = [
        k
        for step in range(steps)
        for k in prompt_indices(step, len(rows), GRPO(**GRPO_KEYS | {"steps": steps}))[::4]
    ]
    assert len(order) == 6 * steps > len(set(order)) == len(rows)
    table = pq.read_table(written("grpo", "verl", f"grpo.steps={steps}") / "prompts.parquet")
    assert table.column_names == ["data_source", "prompt", "reward_model", "extra_info"]
    for k, row in zip(order, table.to_pylist(), strict=True):
        turns = [{key: turn[key] for key in ("role", "content")} for turn in rows[k]["prompt"]]
        assert row["prompt"] == turns
        content = json.loads(row["reward_model"]["ground_truth"])
        assert content["prompt"] == turns
        assert content["columns"]["prompt_id"] == rows[k]["prompt_id"]
        assert row["extra_info"] == {"index": k}
    overrides = [f"grpo.steps={steps}", "grpo.aggregate=token"]
    lines = (written("grpo", "openrlhf", *overrides) / "prompts.jsonl").read_text().splitlines()
    for k, line in zip(order, lines, strict=True):
        row = json.loads(line)
        assert rows[k]["prompt"][-1]["content"] in row["input"]
        assert json.loads(row["label"])["head"] == row["input"]


GRPO_KEYS = COMMON | STAGES["grpo"] | {"model": "m"}


def imported(target: Path):
    spec = importlib.util.spec_from_file_location("align_reward", target / "align_reward.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TWO = (
    'grpo.rewards=["scores:short", {function: "scores:last_word", answer: end, name: word}, number]'
)


def test_the_adapter_scores_for_verl(folder):
    target = written("grpo", "verl", TWO, "grpo.weights=[1, 2, 0.5]")
    (folder / "scores.py").unlink()  # the copy beside the adapter is used
    adapter = imported(target)
    label = json.dumps({"prompt": [], "columns": {"prompt_id": "p", "answer": "7"}, "head": ""})
    scores = adapter.compute_score("align", "it is 7, the end", label, {"index": 1})
    # 16 characters: -1.6; it ends with "end": 2 * 1; the number 7: 0.5 * 1
    assert scores == {"scores:short": -1.6, "word": 1.0, "number": 1.0, "score": pytest.approx(0.9)}
    assert Path(sys.modules["scores"].__file__).parent == target.resolve()
    adapter.settings()["rewards"][:] = [adapter.settings()["rewards"][0]]
    sys.modules["scores"].short = lambda prompts, completions: [math.nan]
    adapter.load.cache_clear()
    with pytest.raises(ValueError, match=r"scores:short: expected one finite number, got \[nan\]"):
        adapter.compute_score("align", "text", label)


def test_the_adapter_scores_for_openrlhf(folder):
    overrides = ["grpo.aggregate=token", "grpo.missing_eos_penalty=3"]
    target = written("grpo", "openrlhf", *overrides)
    adapter = imported(target)
    row = json.loads((target / "prompts.jsonl").read_text().splitlines()[0])
    queries = [row["input"] + "twelve chars<|im_end|>", row["input"] + "twelve chars"]
    scores = adapter.reward_func(queries, [row["input"]] * 2, [row["label"]] * 2)
    # one of them has no end: 3 less
    torch.testing.assert_close(scores["rewards"], torch.tensor([-1.2, -4.2]))
    torch.testing.assert_close(scores["extra_logs"]["scores:short"], torch.tensor([-1.2, -1.2]))
    with pytest.raises(ValueError, match="does not begin with its prompt"):
        adapter.reward_func(["other"], ["other"], [row["label"]])


@pytest.mark.parametrize("program", ["verl", "openrlhf"])
def test_what_has_no_counterpart_is_in_the_file_and_on_the_terminal(folder, program):
    overrides = ["ppo.judge=gold", "ppo.sample_batch_size=8"]
    target = Path("out")
    printed = export("r.yaml", "out", *overrides, "--for", program, "--stage", "ppo")
    text = (target / {"verl": "verl.yaml", "openrlhf": "train.sh"}[program]).read_text()
    for key in ("judge", "sample_batch_size", "dtype", "seed"):
        assert f"\n# no counterpart: {key} (" in text
        assert f"no counterpart: ppo.{key} (" in printed
    version = {"verl": "verl 0.9.1", "openrlhf": "OpenRLHF 0.11.2"}[program]
    assert f"The stage `ppo` of r.yaml for {version}, by Align" in text
    assert "kl_target" not in text


BOTH, VERL, OPENRLHF = ("verl", "openrlhf"), ("verl",), ("openrlhf",)
REFUSED = [
    ("grpo", BOTH, "kl_placement=loss", "kl_placement: not with {}: with `loss` a token pays"),
    ("grpo", BOTH, "normalize_scores=group", "normalize_scores: not with {}: set `none`"),
    ("grpo", BOTH, "scale_advantages=batch", "scale_advantages: not with {}"),
    ("grpo", BOTH, "target_kl=0.1", "target_kl: not with {}"),
    ("grpo", BOTH, "filter=mixed_groups", "filter: not with {}"),
    ("grpo", BOTH, "normalize_advantages=true", "this estimator always has `false` there"),
    ("ppo", BOTH, "normalize_advantages=false", "this estimator always has `true` there"),
    ("ppo", BOTH, "normalize_rewards=true", "normalize_rewards: not with {}"),
    ("ppo", BOTH, "kl_target=4", "kl_target: not with {}: its KL is per token there"),
    ("ppo", BOTH, "value_coef=0", "value_coef: not with {}"),
    ("ppo", BOTH, "critic_warmup_steps=1", "critic_warmup_steps: not with {}"),
    ("ppo", BOTH, "revision=main", "revision: not with {}"),
    ("grpo", VERL, "schedule=linear", "its schedules are `constant` and `cosine`"),
    ("grpo", VERL, "epochs=2", "kl_placement: not with {}: its KL term lacks the importance ratio"),
    ("grpo", VERL, "missing_eos_penalty=1", "missing_eos_penalty: not with {}"),
    ("grpo", VERL, "overlong_buffer=8", "overlong_buffer: not with {}"),
    ("grpo", VERL, "entropy_coef=0.1", "entropy_coef: not with {}"),
    ("ppo", VERL, "minibatches=5", "24 prompts of an update do not divide into 5 minibatches"),
    ("grpo", OPENRLHF, "loss=cispo", "loss: not with {}: set `clip`"),
    ("grpo", BOTH, "loss=sapo", "loss: not with {}: set `clip`"),
    ("grpo", BOTH, "loss=vespo", "loss: not with {}: set `clip`"),
    ("grpo", OPENRLHF, "ratio=sequence", "ratio: not with {}"),
    ("grpo", OPENRLHF, "aggregate=constant", "aggregate: not with {}"),
    ("rloo", OPENRLHF, "kl_coef=0.1", "its groups compare scores without the KL penalty"),
    ("ppo", OPENRLHF, "minibatches=5", "24 completions do not divide into 5 minibatches"),
]


@pytest.mark.parametrize(
    ("kind", "program", "change", "expected"),
    [
        pytest.param(kind, program, change, expected, id=f"{program}: {kind}.{change}")
        for kind, programs, change, expected in REFUSED
        for program in programs
    ],
)
def test_what_would_change_results_is_refused(folder, kind, program, change, expected):
    error = export("r.yaml", "out", f"{kind}.{change}", "--for", program, "--stage", kind)
    version = {"verl": verl, "openrlhf": openrlhf}[program].VERSION
    assert any(expected.format(version) in line for line in error.lines)
    assert all(f"{kind}." in line and "not with" in line for line in error.lines)
    assert not Path("out").exists()


def test_a_reward_model_is_refused_with_its_place(folder, world):
    recipe = yaml.safe_load(Path("r.yaml").read_text())
    recipe["stages"]["grpo"]["rewards"] = ["reward"]
    recipe["stages"] = {
        "reward": {"model": str(world.sft), "pairs": str(world.data)},
        "grpo": recipe["stages"]["grpo"],
    }
    Path("r.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    error = export("r.yaml", "out", "--for", "verl")
    assert len(error.lines) == 1
    assert "grpo.rewards.0: not with verl 0.9.1: `reward` is a reward model" in error.lines[0]


CHANGED = {
    "weights": [2.0], "judge": "gold", "missing_eos_penalty": 1.0, "overlong_buffer": 4,
    "normalize_scores": "batch", "normalize_rewards": True, "n_completions": 6, "temperature": 0.7,
    "max_new_tokens": 40, "sampler": "vllm", "importance_cap": 3.0, "sample_batch_size": 5,
    "kl_coef": 0.7, "kl_placement": "reward", "kl_target": 3.0, "loss": "cispo", "clip": 0.1,
    "aggregate": "constant", "clip_high": 0.5, "dual_clip": 4.0, "entropy_coef": 0.1, "steps": 5,
    "batch_size": 48, "learning_rate": 1.0, "schedule": "linear", "warmup_steps": 1, "epochs": 9,
    "minibatches": 3, "max_grad_norm": 9.0, "target_kl": 1.0, "micro_batch_size": 2,
    "tokens_per_batch": 9999, "optimizer": "paged_adamw_8bit", "gradient_checkpointing": True,
    "mixed_precision": "bfloat16", "eval_steps": 1, "save_steps": 2, "report_to": ["wandb"],
    "compile_decoding": "inductor", "revision": "main", "lora": {"r": 3}, "seed": 3,
    "prefix_sharing": False, "keep_checkpoints": True, "gamma": 0.9, "gae_lambda": 0.5,
    "critic_learning_rate": 1.0, "critic_warmup_steps": 1, "value_clip": 3.0, "value_coef": 0.3,
    "scale_advantages": "none", "ratio": "sequence", "filter": "mixed_groups",
    "merge_adapter": True,
}  # fmt: skip
WITH = {
    "normalize_advantages": {},
    "overlong_penalty": {"overlong_buffer": 4},
    "kl_horizon": {"kl_target": 3.0},
    "vllm_url": {"sampler": "vllm"},
    "vllm_mode": {"sampler": "vllm"},
    "vllm_gpu_memory_utilization": {"sampler": "vllm", "vllm_mode": "colocate"},
    "vllm_timeout": {"sampler": "vllm"},
    "max_staleness": {"sampler": "vllm"},
    "eval_split": {"eval_steps": 1},
    "n_eval_prompts": {"eval_steps": 1},
    "max_draws": {"filter": "mixed_groups"},
    "environment": {},
    "stop": {"eval_steps": 1},
    "dtype": {"lora": {"r": 3}},
    "merge_adapter": {"lora": {"r": 3}},
    "quantization": {"lora": {"r": 3}},
}
OTHER = {
    "overlong_penalty": 7.0, "kl_horizon": 999, "vllm_url": "http://x", "eval_split": "test",
    "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.4,
    "vllm_timeout": 5.0, "max_staleness": 2, "n_eval_prompts": 7, "max_draws": 9, "environment": "arithmetic", "stop": {"judge": "gold"},
    "dtype": "bfloat16", "quantization": "nf4",
}  # fmt: skip
ALTERNATIVES = {
    "kl_placement": ["reward", "token_loss"],
    "schedule": ["cosine", "constant"],
    "aggregate": ["token", "sequence"],
}
ELSEWHERE = {"stage", "model", "prompts", "rewards", "weights", "missing_eos_penalty"}
"""Keys that the files of prompts and rewards hold, and inputs."""
REFUSED_ALREADY = {"kl_horizon", "max_draws", "max_turns", "max_episode_tokens"}
"""Keys that have an effect only beside another key that is always refused."""


@pytest.mark.parametrize("program", [verl, openrlhf], ids=lambda module: module.VERSION)
@pytest.mark.parametrize("kind", CLASSES)
def test_no_key_of_a_stage_is_silently_ignored(kind, program):
    base = COMMON | STAGES[kind] | {"model": "m"}

    def translated(**keys):
        config = CLASSES[kind].model_validate(base | keys)
        job = Job(name=kind, config=config, origin="r", model="m", prompts=Path(), at=str)
        result = program.translate(job, 10)
        return result.settings, result.notes, result.refused

    keys = CLASSES[kind].model_fields.keys() - ELSEWHERE - REFUSED_ALREADY
    assert len(keys) > 40
    ignored = []
    for key in sorted(keys):
        beside = WITH.get(key, {})
        old = getattr(CLASSES[kind].model_validate(base | beside), key)
        values = [not old] if key == "normalize_advantages" else ALTERNATIVES.get(key)
        values = values or [CHANGED.get(key, OTHER.get(key))]
        value = next(each for each in values if each is not None and each != old)
        if translated(**beside | {key: value}) == translated(**beside):
            ignored.append(key)
    if program is verl:  # refuses `overlong_buffer`, without which the penalty has no effect
        assert ignored == ["overlong_penalty"]
    else:  # always listed with the value 1; and the number of prompts in their file
        assert ignored == ["micro_batch_size", "steps"]
    assert UNUSED.keys() <= CLASSES[kind].model_fields.keys()


def test_the_folder_of_a_finished_stage(folder, world):
    config = GRPO.model_validate(GRPO_KEYS | {"steps": 2})
    inputs = {
        "model": {"folder": str(world.sft), "digest": "1"},
        "prompts": {"folder": str(world.data), "digest": "2"},
    }
    stage = finished_runs.stage(folder / "runs", "grpo", recipe=config.model_dump(), inputs=inputs)
    export(str(stage), "out", "--for", "verl")
    keys = verl_keys(Path("out"))
    assert keys["trainer.total_training_steps"] == 2
    assert keys["actor_rollout_ref.model.path"] == str(world.sft.resolve())
    assert pq.read_table("out/prompts.parquet").num_rows == 12
    error = export(str(stage), "other", "grpo.steps=1", "--for", "verl")
    assert error.lines == (
        "grpo.steps=1: no effect on a finished stage; name its recipe in its place",
    )
    error = export(str(world.sft), "other", "--for", "verl")
    assert "a `sft` stage; name a recipe, or the folder of a stage of kind ppo, grpo" in str(error)


def test_errors_of_the_stage_and_its_inputs(folder, world):
    assert "choose a stage with --stage: " in str(export("r.yaml", "out", "--for", "verl"))
    error = export("r.yaml", "out", "--for", "verl", "--stage", "gro")
    assert error.lines == ("--stage gro: no stage of online RL; did you mean `grpo`?",)
    of_grpo = ("--for", "verl", "--stage", "grpo")
    error = export("r.yaml", "out", f"grpo.model={world.lora}", *of_grpo)
    assert "is an adapter; merge it with `align export " in str(error)
    error = export("r.yaml", "out", *of_grpo, "--dtype", "bfloat16")
    assert error.lines == ("--for verl: writes no model; remove the options for models",)
    error = export("dpo", "out", "grpo.steps=1")
    assert error.lines == ("overrides and --stage have an effect with --for only; remove them",)
    Path("out").mkdir()
    assert "out: exists already" in str(export("r.yaml", "out", *of_grpo))


def test_an_unfinished_model_is_named_with_the_command_that_trains_it(folder, world):
    recipe = yaml.safe_load(Path("r.yaml").read_text())
    first = {"model": str(world.sft), "demonstrations": str(world.data)}
    grpo = recipe["stages"]["grpo"] | {"model": "first"}
    stages = {"first": first | {"stage": "sft"}, "grpo": grpo}
    Path("r.yaml").write_text(yaml.safe_dump({"stages": stages}))
    (line,) = export("r.yaml", "out", "--for", "verl").lines
    assert line.endswith(
        "grpo.model: `first` is not finished; run it with `align run r.yaml --until first`"
    )
