"""config.training"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from align.config.base import POLICY_STAGES, Input, Lora, ModelOrNew, NewModel, Stage


class TrainingStage(Stage):
    """What every stage has that trains a language model."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """The type of the weights as loaded. Mixed precision is TRL's own ``trainer: {bf16: true}``."""
    revision: str | None = None
    """The commit, branch or tag of a model from the Hub."""
    lora: Lora | None = None
    """Train adapters; without it, all weights."""
    seed: int = Field(0, ge=0, lt=2**32)
    prefix_sharing: bool = True
    """Compute shared prompts once and no padding; the results are the same, up to rounding."""
    keep_checkpoints: bool = False
    """Leave the checkpoints in the folder when the stage is complete."""

    @property
    def lora_dict(self) -> dict[str, Any] | None:
        """The settings of the adapters as plain data; None for full fine-tuning."""
        return self.lora.model_dump() if self.lora else None


class TRLStage(TrainingStage):
    """What every stage has that trains a model with a trainer of TRL."""

    trainer: dict[str, Any] = {}
    """Fields of TRL's own configuration class, verbatim."""


class SFT(TRLStage):
    """Supervised fine-tuning on demonstrations."""

    trainer_config: ClassVar[str | None] = "SFTConfig"
    inputs: ClassVar = {
        "model": Input(POLICY_STAGES, models=True),
        "demonstrations": Input(("prepare",)),
    }

    model: ModelOrNew
    """An earlier stage, a folder, a Hub id; or a mapping that describes a new model to train from scratch."""
    demonstrations: str = "prepare"

    @model_validator(mode="after")
    def _adapters_need_weights(self) -> SFT:
        if self.lora and isinstance(self.model, NewModel):
            raise ValueError(
                "`lora` freezes the model, and this one is new: remove `lora`, or name a trained `model`"
            )
        return self


class DPO(TRLStage):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290) and the other losses of TRL's trainer."""

    trainer_config: ClassVar[str | None] = "DPOConfig"
    inputs: ClassVar = {
        "model": Input(POLICY_STAGES, models=True),
        "pairs": Input(("prepare", "label")),
    }

    model: str
    """An earlier stage, a folder or a Hub id: the policy at the start, and the reference."""
    pairs: str = "prepare"
    beta: float = Field(0.1, gt=0.0)
    """How much the policy is held to the reference."""


class Reward(TRLStage):
    """A Bradley-Terry reward model (Bradley and Terry 1952; Ouyang et al. 2022, arXiv:2203.02155, eq. 1)."""

    trainer_config: ClassVar[str | None] = "RewardConfig"
    inputs: ClassVar = {
        "model": Input(POLICY_STAGES, models=True),
        "pairs": Input(("prepare", "label")),
    }

    model: str
    """An earlier stage, a folder or a Hub id: the layers below the score. The SFT model, as a rule."""
    pairs: str = "prepare"
    """Pairs to learn from; those held out measure it, and the demonstrations beside them are given a mean score of 0."""
    margin_coef: float = Field(0.0, ge=0.0)
    """Scores by which a pair is asked to differ, for each unit of its ``margin`` (Touvron et al. 2023, arXiv:2307.09288)."""


class KTO(TRLStage):
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv:2402.01306): labels instead of pairs."""

    trainer_config: ClassVar[str | None] = "KTOConfig"
    inputs: ClassVar = {
        "model": Input(POLICY_STAGES, models=True),
        "preferences": Input(("prepare", "label")),
    }

    model: str
    """An earlier stage, a folder or a Hub id: the policy at the start, and the reference."""
    preferences: str = "prepare"
    """Completions with labels of their own, and both sides of pairs."""
    beta: float = Field(0.1, gt=0.0)
    """How much the policy is held to the reference."""
    desirable_weight: float | None = Field(None, gt=0.0)
    """Of desirable completions; without it, so that both labels' sums stand 1:1 to 4:3, as the paper advises."""
    undesirable_weight: float | None = Field(None, gt=0.0)
    """Of undesirable completions; without it, likewise."""
