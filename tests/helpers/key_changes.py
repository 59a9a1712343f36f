"""A change of every key of Align: another value, and the settings in which it has an effect.

Names in angle brackets are files and folders that :func:`build_files` writes.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from align.config.completions import Sample
from align.config.control.policy_gradient import PolicyGradient
from align.config.data import Prepare
from align.config.training import SFT, Reward
from align.runtime import artifacts
from align.stages import control, prepare, reward, sample, sft
from helpers import preference_data, tiny_models, wide_model

OASST_FILE = Path(__file__).parents[2] / "data" / "catalog" / "oasst1.sample.jsonl"
SHAPE = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 2, "max_position_embeddings": tiny_models.POSITIONS}
LORA = {"r": 4, "alpha": 8}
ECHO = "helpers.ppo_fixtures:Echo"
THREE_STEPS = tiny_models.TRAINER | {"max_steps": 3, "save_strategy": "steps", "save_steps": 2}
SCORED = {"source": "<scores>", "reader": "ultrafeedback"}
VOTES = {"source": "<votes>", "reader": "shp"}
TREES = {"source": str(OASST_FILE), "reader": "oasst", "test_fraction": 0.0}
TWO = [{"source": "<pairs>", "weight": 1.0}, {"source": "<others>", "weight": 1.0}]
MIXTURE = {"source": None, "mixture": TWO}


ROLES_OF_COLUMNS = [
    *(("user", "prompt"), ("assistant", "rejected")),
    *(("user", "prompt"), ("assistant", "chosen")),
]


class Change(NamedTuple):
    """Another value of a key; or several keys, where the key requires it."""

    value: Any
    context: Mapping[str, Any] = MappingProxyType({})
    """Settings of both runs."""
    beside: Mapping[str, Any] = MappingProxyType({})
    """Further settings of the changed run."""


def _mixture(**keys: Any) -> Change:
    return Change([TWO[0], TWO[1] | keys], MIXTURE)


BASE: dict[str, dict[str, Any]] = {
    "prepare": {"source": "<pairs>"},
    "sft": {"model": "<sft>", "demonstrations": "<data>", "trainer": THREE_STEPS},
    "dpo": {"model": "<sft>", "pairs": "<data>", "trainer": THREE_STEPS},
    "reward": {"model": "<sft>", "pairs": "<data>", "trainer": THREE_STEPS},
    "kto": {"model": "<sft>", "preferences": "<data>", "trainer": THREE_STEPS},
    "ppo": {
        "model": "<sft>",
        "prompts": "<data>",
        "rewards": ["<reward>"],
        "steps": 2,
        "batch_size": 8,
        "max_new_tokens": 8,
        "learning_rate": 1e-2,
        "epochs": 2,
        "minibatches": 2,
    },
    "sample": {"model": "<sft>", "prompts": "<data>", "n_prompts": 4, "max_new_tokens": 12},
    "label": {"completions": "<completions>", "judge": "gold"},
    "evaluate": {
        "policies": ["<lora>"],
        "baseline": "<sft>",
        "prompts": "<data>",
        "judge": "gold",
        "implicit_rewards": True,
        "n_prompts": 6,
        "max_new_tokens": 12,
    },
    "control": {
        "environment": "CartPole-v1",
        "environment_options": {"max_episode_steps": 15},
        "steps": 192,
        "n_envs": 4,
        "n_steps": 16,
        "episodes": 4,
    },
    "control: tabular": {
        "environment": "CliffWalking-v1",
        "environment_options": {"max_episode_steps": 100},
        "algorithm": "q_learning",
        "steps": 300,
        "episodes": 4,
    },
    "control: dynamic programming": {
        "environment": "FrozenLake-v1",
        "environment_options": {"max_episode_steps": 100},
        "algorithm": "value_iteration",
        "episodes": 20,
    },
    "control: self-play": {
        "environment": "align.control.games:Game-v0",
        "environment_options": {"game": "kuhn_poker"},
        "algorithm": "self_play",
        "steps": 300,
        "games": 32,
        "episodes": 20,
        "epochs": 2,
        "hidden_sizes": [8],
    },
    "control: several agents": {
        "environment": "align.control.multi_agent.parallel:Parallel-v0",
        "environment_options": {"module": "helpers.agents"},
        "algorithm": "maddpg",
        "steps": 120,
        "episodes": 20,
        "learning_starts": 50,
        "batch_size": 8,
        "hidden_sizes": [8],
        "train_every": 5,
    },
    "control: offline": {
        "environment": "CartPole-v1",
        "environment_options": {"max_episode_steps": 15},
        "algorithm": "iql",
        "data": ["<recorded>"],
        "steps": 30,
        "episodes": 4,
        "batch_size": 16,
        "hidden_sizes": [8],
    },
    "control: off-policy": {
        "environment": "CartPole-v1",
        "environment_options": {"max_episode_steps": 15},
        "algorithm": "dqn",
        "steps": 120,
        "episodes": 4,
        "learning_starts": 50,
        "batch_size": 8,
        "hidden_sizes": [8, 8],
        "train_every": 20,
        "gradient_steps": 5,
        "target_update_interval": 40,
    },
}

ICY_ROAD = {"environment": "align.control.icy_road:IcyRoad-v0"}
LORA_CHANGES = {
    "lora.r": Change(2, {"lora": LORA}),
    "lora.alpha": Change(64, {"lora": LORA}),
    "lora.target_modules": Change(["q_proj"], {"lora": LORA}),
}
TRAINING = {
    "model": Change("<lora>"),
    "revision": Change("v2"),
    "dtype": Change("bfloat16", {"lora": LORA}),
    "quantization": Change("nf4", {"model": "<wide>", "lora": LORA}),
    "lora": Change(LORA),
    **LORA_CHANGES,
    "seed": Change(1),
    "prefix_sharing": Change(False),
    "keep_checkpoints": Change(True),
}
TRAINER = TRAINING | {
    "compile_layers": Change("aot_eager"),
    "trainer": Change(THREE_STEPS | {"learning_rate": 1e-3}),
    "max_lost_rows": Change(
        0.0, {"max_lost_rows": 1.0, "trainer": THREE_STEPS | {"max_length": 48}}
    ),
}
UNSIZED = {k: v for k, v in THREE_STEPS.items() if k != "per_device_train_batch_size"}
TOKENS = Change(150, {"trainer": UNSIZED})
WITH_DROPOUT = {"lora": LORA, "trainer": THREE_STEPS | {"disable_dropout": False}}
DROPOUT = {"lora.dropout": Change(0.5, WITH_DROPOUT)}
POLICY = TRAINER | {"allow_missing_end_token": Change(True, {"model": "<no-end>"})}
NEW = {"model": SHAPE}
SAMPLING = {
    "compile_decoding": Change("aot_eager"),
    "n_prompts": Change(3),
    "n_completions": Change(2),
    "temperature": Change(0.3),
    "top_p": Change(0.3),
    "max_new_tokens": Change(5),
    "batch_size": Change(3),
    "dtype": Change("bfloat16"),
    "seed": Change(1),
}
FUNCTION = Change(
    {"function": "helpers.key_changes:words"}, {"judge": {"function": "helpers.key_changes:length"}}
)
WHOLE_EPISODES = {"environment_options": {}, "steps": 64}
EVALUATES = {"eval_steps": 1, "n_eval_prompts": 6}

CHANGES: dict[str, dict[str, Change]] = {
    "prepare": {
        "source": Change("<others>"),
        "reader": Change("hh"),
        "config": Change("x"),
        "data_dir": Change("x"),
        "data_split": Change("test", {"source": "<folder>"}),
        "revision": Change("x"),
        "columns": Change({"rejected": "worse"}),
        "labels": Change(
            {"up": False, "down": True},
            {"source": "<labels>", "labels": {"up": True, "down": False}},
        ),
        "pairing": Change("all", SCORED),
        "margin": Change(8.5, SCORED),
        "ratio": Change(5.0, VOTES),
        "languages": Change(["de"], TREES),
        "max_rows": Change(30),
        "mixture": Change(TWO, {}, {"source": None}),
        "mixture.source": _mixture(source="<similar>"),
        "mixture.weight": _mixture(weight=0.5),
        "mixture.max_rows": _mixture(max_rows=9),
        "mixture.columns": _mixture(columns={"rejected": "worse"}),
        "demonstrations": Change("<others>"),
        "test_fraction": Change(0.4),
        "validation_fraction": Change(0.3),
        "split_seed": Change(1),
        "near_duplicates": Change("drop", {"source": "<similar>"}),
        "near_duplicate_threshold": Change(
            0.99, {"source": "<similar>", "near_duplicates": "drop"}
        ),
        "decontaminate": Change(["<evaluation>"]),
        "decontamination_ngram": Change(4, {"decontaminate": ["<evaluation>"]}),
        "keep_columns": Change(["worse"]),
    },
    "sft": POLICY
    | {
        "lora.dropout": Change(0.5, {"lora": LORA}),
        "demonstrations": Change("<others-data>"),
        "tokens_per_batch": TOKENS,
        "train_on": Change("last", {"demonstrations": "<turns-data>"}),
        "model.vocab_size": Change(SHAPE | {"vocab_size": 280}, NEW),
        "model.hidden_size": Change(SHAPE | {"hidden_size": 40}, NEW),
        "model.intermediate_size": Change(SHAPE | {"intermediate_size": 48}, NEW),
        "model.num_hidden_layers": Change(SHAPE | {"num_hidden_layers": 1}, NEW),
        "model.num_attention_heads": Change(SHAPE | {"num_attention_heads": 4}, NEW),
        "model.num_key_value_heads": Change(SHAPE | {"num_key_value_heads": 1}, NEW),
        "model.max_position_embeddings": Change(SHAPE | {"max_position_embeddings": 96}, NEW),
        "model.tie_word_embeddings": Change(SHAPE | {"tie_word_embeddings": False}, NEW),
        "model.initializer_range": Change(SHAPE | {"initializer_range": 0.1}, NEW),
    },
    "dpo": POLICY
    | DROPOUT
    | {"pairs": Change("<others-data>"), "beta": Change(0.5), "tokens_per_batch": TOKENS},
    "reward": TRAINER
    | DROPOUT
    | {
        "pairs": Change("<others-data>"),
        "tokens_per_batch": TOKENS,
        "margin_coef": Change(2.0, {"pairs": "<scored-data>"}),
        "max_lost_rows": Change(
            0.0, {"max_lost_rows": 1.0, "trainer": THREE_STEPS | {"max_length": 120}}
        ),
    },
    "kto": POLICY
    | DROPOUT
    | {
        "preferences": Change("<others-data>"),
        "beta": Change(0.5),
        "tokens_per_batch": TOKENS,
        "desirable_weight": Change(3.0),
        "undesirable_weight": Change(3.0),
    },
    "ppo": TRAINING
    | {
        "lora.dropout": Change(0.5, {"lora": LORA}),
        "prompts": Change("<others-data>"),
        "compile_decoding": Change("aot_eager"),
        "merge_adapter": Change(True, {"lora": LORA}),
        "rewards": Change(["helpers.key_changes:length"]),
        "weights": Change([3.0]),
        "judge": Change("gold"),
        "steps": Change(1),
        "batch_size": Change(4),
        "n_completions": Change(2),
        "temperature": Change(0.5),
        "max_new_tokens": Change(6),
        "missing_eos_penalty": Change(2.0),
        "sampler": Change("vllm"),
        "vllm_mode": Change("colocate", {"sampler": "vllm"}),
        "vllm_gpu_memory_utilization": Change(0.5, {"sampler": "vllm", "vllm_mode": "colocate"}),
        "vllm_url": Change("http://localhost:1", {"sampler": "vllm"}),
        "vllm_timeout": Change(5.0, {"sampler": "vllm"}),
        "max_staleness": Change(2, {"sampler": "vllm"}),
        "importance_cap": Change(1.1, {"sampler": "vllm"}),
        "gamma": Change(0.5),
        "gae_lambda": Change(0.1),
        "normalize_advantages": Change(False),
        "normalize_scores": Change("batch"),
        "normalize_rewards": Change(True, {"normalize_advantages": False}),
        "loss": Change("cispo", {"epochs": 4}),
        "environment": Change(ECHO),
        "max_turns": Change(1, {"environment": ECHO, "max_new_tokens": 40}),
        "max_episode_tokens": Change(120, {"environment": ECHO, "max_new_tokens": 40}),
        "overlong_buffer": Change(8),
        "overlong_penalty": Change(3.0, {"overlong_buffer": 8}),
        "aggregate": Change("sequence", {"max_new_tokens": 60}),  # some completions end
        "kl_coef": Change(1.0),
        "kl_placement": Change("loss"),
        "kl_target": Change(0.01),
        "kl_horizon": Change(20, {"kl_target": 0.01}),
        "learning_rate": Change(1e-3),
        "critic_learning_rate": Change(1e-4),
        "schedule": Change("constant"),
        "warmup_steps": Change(1),
        "critic_warmup_steps": Change(1),
        "epochs": Change(1),
        "minibatches": Change(1),
        "micro_batch_size": Change(3),
        "tokens_per_batch": Change(40),
        "sample_batch_size": Change(3),
        "clip": Change(0.01),
        "clip_high": Change(0.01),
        "dual_clip": Change(1.01, {"clip": 1e-3, "epochs": 4}),
        "value_clip": Change(0.001),
        "value_coef": Change(5.0),
        "entropy_coef": Change(1.0),
        "max_grad_norm": Change(1e-3),
        "target_kl": Change(1e-6),
        "optimizer": Change("paged_adamw_8bit", {"model": "<wide>"}),
        "gradient_checkpointing": Change(True),
        "mixed_precision": Change("bfloat16"),
        "eval_steps": Change(1),
        "eval_split": Change("test", EVALUATES),
        "n_eval_prompts": Change(2, EVALUATES),
        "stop": Change({"judge": "gold"}, EVALUATES),
        "stop.judge": Change({"judge": "<reward>"}, EVALUATES | {"stop": {"judge": "gold"}}),
        "stop.alpha": Change(
            {"judge": "gold", "alpha": 0.9}, EVALUATES | {"stop": {"judge": "gold"}}
        ),
        "save_steps": Change(1, {"keep_checkpoints": True, "save_steps": 2}),
        "report_to": Change(["wandb"]),
    },
    "sample": SAMPLING
    | {
        "model": Change("<lora>"),
        "prompts": Change("<others-data>"),
        "split": Change("test"),
        "revision": Change("v2"),
        "quantization": Change("nf4", {"model": "<wide>"}),
    },
    "label": {
        "completions": Change("<other-completions>"),
        "judge": Change("<reward>"),
        "judge.function": FUNCTION,
        "pairing": Change("all"),
        "margin": Change(0.3),
        "label_noise": Change("bradley_terry"),
        "label_noise_slope": Change(0.01, {"label_noise": "bradley_terry"}),
        "max_pairs": Change(2),
        "batch_size": Change(3, {"judge": "<reward>"}),
        "dtype": Change("bfloat16", {"judge": "<reward>"}),
        "quantization": Change("nf4", {"judge": "<wide-reward>"}),
        "seed": Change(1, {"label_noise": "bradley_terry", "label_noise_slope": 0.1}),
    },
    "evaluate": SAMPLING
    | {
        "policies": Change(["<other-lora>"]),
        "baseline": Change("<other-lora>"),
        "prompts": Change("<others-data>"),
        "split": Change("validation"),
        "judge": Change(None),
        "judge.function": FUNCTION,
        "implicit_rewards": Change(False),
        "prefix_sharing": Change(False),
        "quantization": Change(
            "nf4", {"policies": ["<wide>"], "baseline": "reference", "implicit_rewards": False}
        ),
        "confidence": Change(0.5),
        "resamples": Change(100, {"n_prompts": None, "n_completions": 4, "max_new_tokens": 24}),
    },
    "control": {
        "environment": Change("Acrobot-v1"),
        "environment_options": Change({"max_episode_steps": 9}),
        "algorithm": Change("a2c"),
        "baseline": Change("none", {"algorithm": "reinforce", "n_steps": None}),
        "seeds": Change([1]),
        "steps": Change(128),
        "n_envs": Change(2),
        "vectorization": Change("batched"),
        "n_steps": Change(8),
        "gamma": Change(0.5),
        "gae_lambda": Change(0.5),
        "learning_rate": Change(1e-2),
        "value_learning_rate": Change(1e-2),
        "schedule": Change("constant"),
        "epochs": Change(1),
        "minibatches": Change(1),
        "clip": Change(1e-3),
        "clip_high": Change(1e-3),
        "value_clip": Change(1e-3),
        "target_kl": Change(1e-7),
        "cost_limit": Change(1.0, ICY_ROAD),
        "multiplier_learning_rate": Change(1.0, ICY_ROAD | {"cost_limit": 1.0}),
        "record_steps": Change(20),
        "multiplier_damping": Change(1.0, ICY_ROAD | {"cost_limit": 1.0}),
        "entropy_coef": Change(1.0),
        "max_grad_norm": Change(1e-3),
        "normalize_advantages": Change(False),
        "hidden_sizes": Change([8]),
        "activation": Change("relu"),
        "distribution": Change("gaussian"),
        "initial_log_std": Change(-1.0),
        "initialization": Change("uniform"),
        "normalize_observations": Change(True),
        "normalize_rewards": Change(True),
        "episodes": Change(3),
        "confidence": Change(0.5, WHOLE_EPISODES),
        "resamples": Change(100, WHOLE_EPISODES),
        "keep_checkpoints": Change(True),
        "report_to": Change(["wandb"]),
    },
}

OF_ALL_ALGORITHMS = (
    *("environment", "environment_options", "seeds", "steps", "gamma", "episodes"),
    *("confidence", "resamples", "keep_checkpoints", "report_to"),
)
SLIPPERY = {
    "environment": "FrozenLake-v1",
    "environment_options": {"max_episode_steps": 100},
    "steps": 20_000,
    "episodes": 20,
}
"""Episodes with different returns, so that their mean has an interval."""
CHANGES["control: tabular"] = {key: CHANGES["control"][key] for key in OF_ALL_ALGORITHMS} | {
    "environment": Change("Taxi-v4"),
    "algorithm": Change("sarsa"),
    "learning_rate": Change(0.1),
    "schedule": Change("linear"),
    "epsilon": Change(0.5),
    "confidence": Change(0.5, SLIPPERY),
    "resamples": Change(100, SLIPPERY),
}
CHANGES["control: dynamic programming"] = {
    key: CHANGES["control"][key] for key in OF_ALL_ALGORITHMS
} | {
    "environment": Change("Taxi-v4"),
    "algorithm": Change("policy_iteration"),
    "steps": Change(3),
    "tolerance": Change(1e-3),
    "confidence": Change(0.5),
    "resamples": Change(100),
}
CONTINUOUS = {"target_update_interval": None, "environment": "Pendulum-v1", "algorithm": "td3"}
GOALS = {
    "environment": "align.control.point_reach:PointReach-v0",
    "algorithm": "sac",
    "target_update_interval": None,
}
CHANGES["control: off-policy"] = {key: CHANGES["control"][key] for key in OF_ALL_ALGORITHMS} | {
    "algorithm": Change("sac", CONTINUOUS),
    "steps": Change(80),
    "confidence": Change(0.5, {"environment_options": {}}),
    "resamples": Change(100, {"environment_options": {}}),
    "hidden_sizes": Change([8]),
    "learning_rate": Change(1e-2),
    "buffer_size": Change(30),
    "learning_starts": Change(30),
    "batch_size": Change(16),
    "schedule": Change("linear"),
    "train_every": Change(30),
    "gradient_steps": Change(2),
    "tau": Change(0.1),
    "replay": Change("hindsight", GOALS),
    "hindsight_goals": Change(1, GOALS | {"replay": "hindsight"}),
    "target": Change("double", {"learning_rate": 0.1}),
    "network": Change("dueling"),
    "target_update_interval": Change(3),
    "exploration_fraction": Change(0.9),
    "exploration_final": Change(0.5),
    "action_noise": Change(0.5, CONTINUOUS),
}
SPREAD = {"module": "mpe2.simple_spread_v3", "continuous_actions": True}
CHANGES["control: self-play"] = {key: CHANGES["control"][key] for key in OF_ALL_ALGORITHMS} | {
    "environment_options": Change({"game": "leduc_poker"}),
    "algorithm": Change("dqn"),
    "steps": Change(200),
    "games": Change(16),
    "learning_rate": Change(1e-2),
    "epochs": Change(1),
    "minibatches": Change(2),
    "clip": Change(1e-3),
    "entropy_coef": Change(1.0),
    "hidden_sizes": Change([4]),
    "confidence": Change(0.5),
    "resamples": Change(100),
}
CHANGES["control: several agents"] = {key: CHANGES["control"][key] for key in OF_ALL_ALGORITHMS} | {
    "environment_options": Change({"module": "helpers.agents", "stakes": 1.0}),
    "algorithm": Change("td3"),
    "critic": Change("independent"),
    "steps": Change(100),
    # The episodes of the environment of the tests have one step.
    "gamma": Change(0.5, {"environment_options": SPREAD}),
    "learning_rate": Change(1e-1),
    "buffer_size": Change(30),
    "learning_starts": Change(30),
    "batch_size": Change(16),
    "train_every": Change(30),
    "tau": Change(0.5, {"environment_options": SPREAD}),
    "action_noise": Change(0.5),
    "hidden_sizes": Change([4]),
    "confidence": Change(0.5),
    "resamples": Change(100),
}
CHANGES["control: offline"] = {key: CHANGES["control"][key] for key in OF_ALL_ALGORITHMS} | {
    "algorithm": Change("behavior_cloning"),
    "data": Change(["<recorded>", "<others-recorded>"]),
    "steps": Change(20),
    "confidence": Change(0.5, {"environment_options": {}}),
    "resamples": Change(100, {"environment_options": {}}),
    "batch_size": Change(8),
    "learning_rate": Change(1e-1),
    "hidden_sizes": Change([4]),
    "expectile": Change(0.9),
    "temperature": Change(0.5),
    "tau": Change(0.5),
}
EQUAL_GROUPS = {"rewards": ["helpers.key_changes:long"]}
PPO_ONLY = ("gae_lambda", "value_clip", "value_coef", "critic_learning_rate", "critic_warmup_steps")
CHANGES["reinforce"] = {k: v for k, v in CHANGES["ppo"].items() if k not in PPO_ONLY}
CHANGES["rloo"] = {k: v for k, v in CHANGES["reinforce"].items() if k != "gamma"}
CHANGES["rloo"] |= {
    "n_completions": Change(4),
    "ratio": Change("sequence", {"epochs": 4}),
    "filter": Change("mixed_groups", EQUAL_GROUPS),
    "max_draws": Change(2, {"filter": "mixed_groups", **EQUAL_GROUPS}),
    "normalize_advantages": Change(True),
    "normalize_rewards": Change(True),
}
CHANGES["grpo"] = CHANGES["rloo"] | {
    "scale_advantages": Change("none"),
    "aggregate": Change("token", {"max_new_tokens": 60}),
    "kl_placement": Change("reward"),
}
for kind in ("grpo", "rloo", "reinforce"):
    BASE[kind] = BASE["ppo"] | {"n_completions": 2}


def length(prompts: list[str], completions: list[str]) -> list[float]:
    """A reward function: the number of characters."""
    return [float(len(completion)) for completion in completions]


def long(prompts: list[str], completions: list[str]) -> list[float]:
    """A reward function that is equal for many completions: whether there are many characters."""
    return [float(len(completion) > 20) for completion in completions]


def words(prompts: list[str], completions: list[str]) -> list[float]:
    """A reward function: the negative number of words."""
    return [-float(len(completion.split())) for completion in completions]


def build_files(folder: Path, world: tiny_models.World) -> dict[str, str]:
    """Write data, models and completions; the name in angle brackets of each, and its path."""
    places: dict[str, str] = {}
    others, same = preference_data.random_pairs(40, seed=1), preference_data.random_pairs(40)
    for row in others + same:
        row["worse"] = row["rejected"] + " worse"
    similar = [row | {"prompt": f"{row['prompt']} {k}"} for row in same[:20] for k in "ab"]
    labels = [
        {"prompt": row["prompt"], "completion": row[side], "label": label}
        for row in same
        for side, label in (("chosen", "up"), ("rejected", "down"))
    ]
    evaluation = [{"prompt": " ".join(row["prompt"].split()[4:10])} for row in same[:5]]
    evaluation += [{"prompt": row["prompt"]} for row in same[5:8]]
    scores = [
        {
            "instruction": row["prompt"],
            "completions": [
                {"response": f"{row['chosen']} {k}", "overall_score": (3 * i + 7 * k) % 10}
                for k in range(4)
            ],
        }
        for i, row in enumerate(same)
    ]
    votes = [
        {
            "history": row["prompt"],
            "human_ref_A": row["chosen"],
            "human_ref_B": row["rejected"],
            "labels": 1,
            "score_A": 5 * (i + 1),
            "score_B": 5,
        }
        for i, row in enumerate(same)
    ]
    turns = [
        {"messages": [{"role": r, "content": row[c]} for r, c in ROLES_OF_COLUMNS]} for row in same
    ]
    for name, rows in {
        "scores": scores,
        "turns": turns,
        "votes": votes,
        "pairs": same,
        "others": others,
        "similar": similar,
        "labels": labels,
        "evaluation": evaluation,
    }.items():
        places[f"<{name}>"] = preference_data.write_jsonl(folder / f"{name}.jsonl", rows)
    for split, rows in {"train": same, "test": others}.items():
        (folder / "splits" / split).mkdir(parents=True)
        preference_data.write_jsonl(folder / "splits" / split / "0000.jsonl", rows)
    places["<folder>"] = str(folder / "splits")
    return places | _build_stages(folder, world)


def _replace_completions(folder: Path, data: Path, first: int) -> None:
    """Give the completions of pairs to a `sample` stage, because those of tiny models tie."""
    rows = [
        {"prompt": row["prompt"], "completion": row[side], "prompt_id": row["prompt_id"]}
        for row in tiny_models.rows(data, "pairs-train")[first:]
        for side in ("chosen", "rejected")
    ]
    table = pa.Table.from_pylist([row | {"n_tokens": 9, "finished": True} for row in rows])
    pq.write_table(table, folder / "completions-train.parquet")
    artifact = artifacts.read_artifact(folder)
    assert artifact is not None
    artifacts.write_artifact(folder, artifact)  # with the checksum of the new table


def _build_stages(folder: Path, world: tiny_models.World) -> dict[str, str]:
    """Finished stages, each trained far enough that its files differ from those it began with."""

    def built(name: str, module: Any, settings: Any, **inputs: Path) -> Path:
        tiny_models.stage(module, settings, inputs, folder / name)
        return folder / name

    # Held-out prompts as in `world`, whose models are not trained on them.
    splits = {"test_fraction": 0.15, "validation_fraction": 0.1}
    data = built("data", prepare, Prepare(source="embedded", max_rows=60, **splits))
    built("others-data", prepare, Prepare(source="embedded", max_rows=60, split_seed=5, **splits))
    scored = Prepare(source=str(folder / "scores.jsonl"), reader="ultrafeedback")
    built("scored-data", prepare, scored)
    turns = Prepare(source=str(folder / "turns.jsonl"), test_fraction=0.0)
    built("turns-data", prepare, turns)
    whole = world.sft
    adapter = SFT(model="m", lora=LORA, seed=1, trainer=THREE_STEPS)
    built("other-lora", sft, adapter, model=whole, demonstrations=world.data)
    built("reward", reward, Reward(model="m", trainer=THREE_STEPS), model=whole, pairs=data)
    wide = wide_model.save(world, folder / "wide")
    settings = Reward(model="m", lora=LORA, trainer=THREE_STEPS)
    built("wide-reward", reward, settings, model=wide, pairs=data)
    shutil.copytree(whole, folder / "no-end")
    template = (whole / "chat_template.jinja").read_text(encoding="utf-8")
    (folder / "no-end" / "chat_template.jinja").write_text(template.replace("<|im_end|>", ""))
    (folder / "no-end" / "artifact.json").unlink()
    for name, seed in (("completions", 0), ("other-completions", 1)):
        sampled = Sample(model="m", n_prompts=1, max_new_tokens=2, seed=seed)
        _replace_completions(built(name, sample, sampled, model=whole, prompts=data), data, seed)
    for name, seed in (("recorded", 0), ("others-recorded", 1)):
        built(name, control, PolicyGradient(**BASE["control"], record_steps=60, seeds=[seed]))
    places = {f"<{path.name}>": str(path) for path in folder.iterdir() if path.is_dir()}
    return places | {"<sft>": str(world.sft), "<lora>": str(world.lora)}
