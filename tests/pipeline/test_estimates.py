"""Work and memory of the stages, computed by hand."""

from __future__ import annotations

from typing import Any

import pytest

from align.config.base import Lora, NewModel, Stage, Workload
from align.config.completions import Sample
from align.config.control.policy_gradient import PolicyGradient
from align.config.evaluate import Evaluate
from align.config.memory import ModelSize
from align.config.online_rl_stages import PPO, RLOO, Reinforce
from align.config.training import DPO, KTO, SFT, Reward

STATISTICS = {
    "demonstrations": {"train": 100, "test": 10},
    "pairs": {"train": 60, "test": 6},
    "prompts": {"train": 50, "test": 5},
    "words": {
        "prompt_median": 10,
        "completion_median": 20,
        "chosen_median": 30,
        "rejected_median": 40,
    },
}
TRAINER = {
    "per_device_train_batch_size": 8,
    "num_train_epochs": 2,
    "gradient_accumulation_steps": 1,
}
POLICY: dict[str, Any] = {"model": "sft"}


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        # ceil(100 / (8 * 2)) = 7 steps per epoch; (10 + 20) * 1.35 * 14 * 16 = 9,072 tokens
        pytest.param(SFT(model=NewModel(), trainer=TRAINER), Workload(100, 14, 9072), id="sft"),
        # ceil(60 / 16) = 4; the prompt is in both sequences: (10 + 30 + 10 + 40) * 1.35 * 8 * 16
        pytest.param(DPO(**POLICY, trainer=TRAINER), Workload(60, 8, 15552), id="dpo"),
        # 3 * 16 of 60 rows
        pytest.param(
            DPO(**POLICY, trainer=TRAINER | {"max_steps": 3}),
            Workload(60, 3, 5832, is_partial=True),
            id="dpo that does not see all rows",
        ),
        pytest.param(Reward(**POLICY, trainer=TRAINER), Workload(60, 8, 15552), id="reward"),
        # 120 completions, ceil(120 / 16) = 8; (10 + 30 + 10 + 40) / 2 * 1.35 * 16 * 16 = 15,552
        pytest.param(KTO(**POLICY, trainer=TRAINER), Workload(120, 16, 15552), id="kto"),
        pytest.param(Sample(**POLICY, n_completions=3, n_prompts=20), Workload(60), id="sample"),
        # 5 prompts * 2 completions * (2 policies besides the baseline + the control)
        pytest.param(
            Evaluate(policies=["a", "b", "c"], baseline="c", judge="gold", n_completions=2),
            Workload(30),
            id="evaluate",
        ),
        pytest.param(
            Evaluate(policies=["a", "b.jsonl"], baseline="reference", judge="gold", n_prompts=3),
            Workload(6),
            id="evaluate without a control",
        ),
        pytest.param(
            Evaluate(policies=["a"], baseline="b", implicit_rewards=True),
            Workload(),
            id="evaluate without completions",
        ),
        pytest.param(
            PPO(**POLICY, rewards=["reward"], steps=5, batch_size=8, epochs=3, minibatches=2),
            Workload(40, 30),
            id="ppo",
        ),
        pytest.param(
            PolicyGradient(environment="CartPole-v1", steps=100, seeds=[0, 1]),
            Workload(steps=200),
            id="control",
        ),
    ],
)
def test_the_work_of_a_stage_by_hand(stage: Stage, expected: Workload):
    assert stage.workload(STATISTICS, world_size=2) == expected


def test_unknown_data_leave_rows_and_tokens_unknown():
    assert SFT(model=NewModel(), trainer=TRAINER).workload({}, 1) == Workload()
    assert SFT(model=NewModel(), trainer={"max_steps": 3}).workload({}, 1) == Workload(steps=3)


@pytest.mark.parametrize(
    ("stage", "sharded", "copies"),
    [
        # Weights, gradients and two moments are 4 copies of 4 bytes; a reference is one more.
        pytest.param(SFT(model=NewModel()), False, 4, id="sft"),
        pytest.param(DPO(**POLICY), False, 4, id="dpo computes reference logps first"),
        pytest.param(DPO(**POLICY), True, 5, id="dpo with sharded weights"),
        pytest.param(DPO(**POLICY, trainer={"sync_ref_model": True}), False, 5, id="dpo, synced"),
        pytest.param(DPO(**POLICY, lora=Lora()), True, 1, id="dpo with adapters"),
        pytest.param(KTO(**POLICY), False, 5, id="kto"),
        pytest.param(KTO(**POLICY, lora=Lora()), False, 1, id="kto with adapters"),
        # PPO: policy and critic are trained (8); the reference and one reward model are frozen.
        pytest.param(
            PPO(**POLICY, rewards=["reward", "module:function"], steps=1, batch_size=1),
            False,
            10,
            id="ppo",
        ),
        pytest.param(
            RLOO(**POLICY, rewards=["reward"], steps=1, batch_size=2, n_completions=2),
            False,
            6,
            id="rloo has no critic",
        ),
    ],
)  # fmt: skip
def test_the_memory_of_a_stage_by_hand(stage: Stage, sharded: bool, copies: int):
    assert stage.memory_bytes(ModelSize(1000), Workload(), sharded=sharded) == 4 * 1000 * copies


def test_the_reference_of_dpo_is_in_memory_where_training_ends_before_all_rows_are_used():
    # 60 pairs on 2 processes; with 4 batches of 16 every pair is used.
    for max_steps, copies in ((3, 5), (4, 4)):
        dpo = DPO(**POLICY, trainer=TRAINER | {"max_steps": max_steps})
        work = dpo.workload(STATISTICS, world_size=2)
        assert dpo.memory_bytes(ModelSize(1000), work, sharded=False) == 4 * 1000 * copies


def test_memory_with_adapters_by_hand():
    # 640 of 1,000 weights in 4 bits: 320 bytes, 10 scales, a 25.6th of a scale of the scales.
    size = ModelSize(1000, {"layers.0.linear": (10, 64)})
    four_bits = 360 * 4 + 320 + 10
    adapter = 16 * (10 + 64)  # parameters; weight, gradient and moments take 16 bytes each
    lora = {"lora": Lora(r=16), "quantization": "nf4"}
    ppo = {"rewards": ["r"], "steps": 1, "batch_size": 1}
    eight_bits = {"trainer": {"optim": "paged_adamw_8bit"}}  # a byte for each of the two moments
    for stage, expected in (
        (DPO(**POLICY, **lora), four_bits + adapter * 16),
        (DPO(**POLICY, **lora, **eight_bits), four_bits + adapter * 10),
        (PPO(**POLICY, **lora, **ppo), four_bits + adapter * 2 * 16),
        (Reinforce(**POLICY, **lora, **ppo), four_bits + adapter * 16),
        (KTO(**POLICY, lora=Lora(), dtype="bfloat16"), 2 * 1000 + adapter * 16),
        (SFT(model="m", **eight_bits), 1000 * 10),
    ):
        assert stage.memory_bytes(size, Workload(), sharded=False) == expected, stage


def test_the_parameters_of_a_new_model_are_those_that_transformers_builds():
    from transformers import LlamaConfig, LlamaForCausalLM

    for shape in ({}, {"num_key_value_heads": 2, "tie_word_embeddings": False}):
        new = NewModel(vocab_size=300, hidden_size=32, intermediate_size=48, **shape)  # type: ignore[arg-type]
        model = LlamaForCausalLM(LlamaConfig(**new.model_dump()))
        assert new.count_parameters() == sum(p.numel() for p in model.parameters())
