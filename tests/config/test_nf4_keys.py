"""The key ``quantization``: what it requires, and which digests it enters."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from align.config.base import Lora, Stage
from align.config.evaluate import Evaluate
from align.config.online_rl_stages import PPO
from align.config.stages import STAGES
from align.config.training import DPO, KTO, SFT, Reward

SETTINGS: dict[type[Stage], dict[str, Any]] = {
    SFT: {"model": "m"},
    DPO: {"model": "m"},
    KTO: {"model": "m"},
    Reward: {"model": "m"},
    PPO: {"model": "m", "rewards": ["r"], "steps": 1, "batch_size": 1},
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_training_in_four_bits_requires_adapters(kind: Any):
    with pytest.raises(ValidationError, match="freezes the backbone; set `lora`, or remove"):
        kind(**SETTINGS[kind], quantization="nf4")
    stage = kind(**SETTINGS[kind], quantization="nf4", lora=Lora())
    assert stage.required_packages["quantization"][0] == "bitsandbytes"


def test_the_key_enters_a_digest_only_where_it_is_used():
    for kind, settings in SETTINGS.items():
        plain, quantized = (
            kind(**settings, lora=Lora(), quantization=each).digest_settings()  # type: ignore[call-arg]
            for each in (None, "nf4")
        )
        assert quantized["quantization"] == "nf4"
        # `ppo` had the key before the others.
        assert ("quantization" in plain) is (kind is PPO)
    evaluation = Evaluate(policies=["a"], baseline="b", judge="gold")
    assert "quantization" not in evaluation.digest_settings()


def test_every_stage_that_loads_a_language_model_has_the_key():
    assert {name for name, cls in STAGES.items() if "quantization" in cls.model_fields} == {
        "sft", "dpo", "kto", "reward", "ppo", "grpo", "rloo", "reinforce", "sample", "label", "evaluate",
    }  # fmt: skip
