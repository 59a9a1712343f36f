"""Configuration of the stages that train with TRL: ``sft``, ``dpo``, ``reward``, ``kto``.

Align defines only the keys that the pipeline itself uses. All other training options are fields of
TRL's configuration class, under ``trainer``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from align.config.base import (
    Input,
    ModelOrNew,
    NewModel,
    Problem,
    Stage,
    Table,
    Workload,
    between_keys,
)
from align.config.token_batches import TokenBatchStage
from align.config.training_base import BATCH_SIZE, PolicyStage


class SFT(PolicyStage, TokenBatchStage):
    """Supervised fine-tuning on demonstrations."""

    code_version: ClassVar[int] = 3
    trainer_config: ClassVar[str | None] = "SFTConfig"
    loss_is_mean_over_rows: ClassVar[bool] = False
    inputs: ClassVar = {
        "model": Input(policies=True, models=True),
        "demonstrations": Input(("prepare",)),
    }
    reads: ClassVar = (Table("demonstrations", "demonstrations"),)

    model: ModelOrNew
    """An earlier stage, a folder, a GGUF file or a Hub id; or a mapping with the shape of a new
    model to train from scratch."""
    demonstrations: str = "prepare"
    """The demonstrations to train on: an earlier ``prepare`` stage, or its folder."""
    train_on: Literal["all", "last"] = "all"
    """Turns of the assistant that are trained: ``all`` of a conversation, or the ``last``, before
    which the others are context. Set ``last`` if the earlier turns are of unknown quality, as in
    preference data."""

    @between_keys
    def _check_lora(self) -> Iterator[str]:
        if self.lora and isinstance(self.model, NewModel):
            yield (
                "`lora` freezes the weights, which are random in a new model; remove `lora`, "
                "or name a trained `model`"
            )

    @property
    def trained_turns(self) -> Literal["all", "last"]:
        """The turns that ``train_on`` names; where all tokens are trained, one row has them all."""
        return "last" if self.trainer.get("completion_only_loss") is False else self.train_on

    def problems(self, stages: Mapping[str, Stage]) -> Iterator[Problem]:
        """``train_on`` where all tokens are trained."""
        yield from super().problems(stages)
        if (
            "train_on" in self.model_fields_set
            and self.trainer.get("completion_only_loss") is False
        ):
            yield Problem(
                ("train_on",),
                "`trainer.completion_only_loss: false` trains all tokens of a row, those of prompts "
                "too; remove one of the two keys",
            )


class DPO(PolicyStage, TokenBatchStage):
    """Direct preference optimization, and the other losses of TRL's trainer.

    Source: Rafailov et al. 2023, arXiv:2305.18290.
    """

    trainer_config: ClassVar[str | None] = "DPOConfig"
    inputs: ClassVar = {
        "model": Input(policies=True, models=True),
        "pairs": Input(("prepare", "label")),
    }
    reads: ClassVar = (Table("pairs", "pairs"),)
    row_columns: ClassVar[tuple[str, ...]] = ("chosen", "rejected")

    model: str
    """The initial policy and the reference: an earlier stage, a folder, a GGUF file or a Hub id."""
    pairs: str = "prepare"
    """The preference pairs to train on: an earlier ``prepare`` or ``label`` stage, or its folder.
    """
    beta: float = Field(0.1, gt=0.0)
    """Strength of the implicit KL penalty towards the reference."""

    def frozen_models(self, workload: Workload, *, sharded: bool) -> int:
        """The reference, if it changes during training, or weights are sharded, or rows unused.

        Otherwise its log-probabilities are computed before training.
        """
        return int(sharded or workload.is_partial or bool(self.trainer.get("sync_ref_model")))


class Reward(TokenBatchStage):
    """A Bradley-Terry reward model.

    Source: Bradley and Terry 1952; Ouyang et al. 2022, arXiv:2203.02155, eq. 1.
    """

    code_version: ClassVar[int] = 4
    trainer_config: ClassVar[str | None] = "RewardConfig"
    writes_policy: ClassVar[bool] = False
    metrics_class: ClassVar = "align.evaluation.reward_results:RewardModelReport"
    inputs: ClassVar = {
        "model": Input(policies=True, models=True),
        "pairs": Input(("prepare", "label")),
    }
    reads: ClassVar = (Table("pairs", "pairs"),)
    row_columns: ClassVar[tuple[str, ...]] = ("chosen", "rejected")

    model: str
    """The backbone below the scalar head, usually the SFT model: an earlier stage, a folder or a
    Hub id."""
    pairs: str = "prepare"
    """The preference pairs to train on: an earlier ``prepare`` or ``label`` stage, or its folder.
    Held-out pairs measure the model; its scores are shifted so that the demonstrations beside them
    have mean 0."""
    margin_coef: float = Field(0.0, ge=0.0)
    """Difference of scores that a pair must reach, per unit of its ``margin`` (Touvron et al. 2023,
    arXiv:2307.09288)."""

    def problems(self, stages: Mapping[str, Stage]) -> Iterator[Problem]:
        """Fields of TRL that would change the tokens after the pairs were tokenized."""
        yield from super().problems(stages)
        for field in ("chat_template_path", "eos_token"):
            if self.trainer.get(field) is not None:
                yield Problem(
                    ("trainer", field),
                    "a reward model reads the tokens of its policy; set this key in the `sft` "
                    "stage, and name that stage as `model`",
                )

    @property
    def required_columns(self) -> dict[str, tuple[Table, str]]:
        """The margin of the pairs, if it is used."""
        return {"margin_coef": (self.reads[0], "margin")} if self.margin_coef else {}


class KTO(PolicyStage, TokenBatchStage):
    """Kahneman-Tversky optimization: labels instead of pairs.

    Source: Ethayarajh et al. 2024, arXiv:2402.01306.
    """

    trainer_config: ClassVar[str | None] = "KTOConfig"
    inputs: ClassVar = {
        "model": Input(policies=True, models=True),
        "preferences": Input(("prepare", "label")),
    }
    reads: ClassVar = (Table("unpaired", "preferences"), Table("pairs", "preferences"))

    model: str
    """The initial policy and the reference: an earlier stage, a folder, a GGUF file or a Hub id."""
    preferences: str = "prepare"
    """Labeled completions, and both sides of preference pairs: an earlier ``prepare`` or ``label``
    stage, or its folder."""
    beta: float = Field(0.1, gt=0.0)
    """Strength of the implicit KL penalty towards the reference."""
    desirable_weight: float | None = Field(None, gt=0.0)
    """Weight of desirable completions. Default: chosen so that the ratio of the summed weights of
    desirable and undesirable completions lies between 1:1 and 4:3, as the paper recommends."""
    undesirable_weight: float | None = Field(None, gt=0.0)
    """Weight of undesirable completions. Default: as for ``desirable_weight``."""

    def problems(self, stages: Mapping[str, Stage]) -> Iterator[Problem]:
        """Fields of TRL that would undo the batches that the stage composes."""
        yield from super().problems(stages)
        conflicts = {
            "train_sampling_strategy": "rows are shuffled with `seed` in every epoch",
            "dataloader_persistent_workers": "its workers would keep the order of the first epoch",
        }
        for field, message in conflicts.items():
            if self.trainer.get(field) not in (None, False, "sequential"):
                yield Problem(("trainer", field), f"{message}; remove this key")
        size = self.trainer.get(BATCH_SIZE)
        if isinstance(size, int) and size < 2:
            yield Problem(
                ("trainer", BATCH_SIZE),
                f"must be at least 2, because every batch holds both labels, got {size}",
            )

    @property
    def labels_per_batch(self) -> int | None:
        """Every batch holds both labels; one of a number of tokens may be as large as needed."""
        return sys.maxsize if self.tokens_per_batch else int(self.trl_value(BATCH_SIZE))

    def frozen_models(self, workload: Workload, *, sharded: bool) -> int:
        """The reference."""
        return 1

    def count_rows(self, statistics: Mapping[str, Any]) -> int | None:
        """Labeled completions, and two completions for each pair."""
        unpaired, pairs = (statistics.get(table.kind, {}).get("train") for table in self.reads)
        return (unpaired or 0) + 2 * (pairs or 0) or None

    def words_per_row(self, statistics: Mapping[str, Any]) -> float | None:
        """Words of one completion with its prompt; of pairs, the mean of both sides."""
        words = statistics.get("words", {})
        columns = ("chosen", "rejected") if "pairs" in statistics else ("completion",)
        if not all(f"{column}_median" in words for column in columns):
            return None
        total = sum(words["prompt_median"] + words[f"{column}_median"] for column in columns)
        return float(total / len(columns))
