"""Keys that every stage with training of a language model has, and those of stages that use TRL.

All training options that Align does not define are fields of TRL's configuration class, under
``trainer``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from align.config import trl_fields
from align.config.base import (
    HeldOut,
    Keys,
    Lora,
    Problem,
    Stage,
    Workload,
    between_keys,
)
from align.config.memory import ModelSize
from align.config.memory_bill import Work, trained_weights
from align.config.optimizers import required_package
from align.config.quantization import QuantizableStage

TOKENS_PER_WORD = 1.35  # usual ratio of subword vocabularies in English
BATCH_SIZE = "per_device_train_batch_size"


class TrainingStage(QuantizableStage):
    """The keys of every stage that trains a language model."""

    trains_model: ClassVar[bool] = True
    writes_policy: ClassVar[bool] = True

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type in which the weights are loaded; ``bfloat16`` requires ``lora``. Mixed precision is
    a field of TRL: ``trainer: {bf16: true}``."""
    revision: str | None = None
    """Commit, branch or tag of a model on the Hub."""
    lora: Lora | None = None
    """Train low-rank adapters. Default: full fine-tuning."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of initialization, data order and dropout."""
    prefix_sharing: bool = True
    """Compute each shared prompt once and skip padding. Results are equal up to rounding."""
    keep_checkpoints: bool = False
    """Keep the checkpoints after the stage is complete."""

    @between_keys
    def _check_dtype(self) -> Iterator[str]:
        if self.dtype == "bfloat16" and not self.lora:
            key = (
                "trainer: {bf16: true}" if hasattr(self, "trainer") else "mixed_precision: bfloat16"
            )
            yield (
                "`dtype: bfloat16` rounds small updates to zero in full fine-tuning (8 bits of "
                f"precision); use float32 (mixed precision: `{key}`), or set `lora`, whose adapters stay in float32"
            )

    @between_keys
    def _check_quantization(self) -> Iterator[str]:
        if self.quantization and not self.lora:
            yield "`quantization` freezes the backbone; set `lora`, or remove `quantization`"

    @property
    def lora_dict(self) -> dict[str, Any] | None:
        """The settings of the adapters as plain data; None for full fine-tuning."""
        return self.lora.model_dump() if self.lora else None

    def digest_settings(self) -> dict[str, Any]:
        """All settings except the names of inputs, whose content counts instead."""
        settings = super().digest_settings()
        named = self.input_names()
        for key in self.inputs.keys() & settings.keys():
            if isinstance(settings[key], str):
                del settings[key]
            elif isinstance(settings[key], list):  # of a list, what names no input counts by itself
                items = enumerate(settings[key])
                settings[key] = [None if f"{key}.{i}" in named else item for i, item in items]
        return settings

    def problems(self, stages: Mapping[str, Stage]) -> Iterator[Problem]:
        """An adapter of another shape than the one that training continues from."""
        name = getattr(self, "model", None)
        parent = stages.get(name) if isinstance(name, str) else None
        trained = parent.lora if isinstance(parent, TrainingStage) else None
        if trained and self.lora and trained.shape != self.lora.shape:
            yield Problem(
                ("lora",),
                f"training continues with the adapter of `{name}`, so `lora` must have "
                f"{trained.shape}; without `lora` the adapter is merged and all weights are trained",
            )

    @property
    def optimizer_name(self) -> str:
        """The name of the optimizer, which tells the bits of its state."""
        return "adamw"

    @property
    def trained_models(self) -> int:
        """Models that are trained, or adapters on one frozen model."""
        return 1

    def frozen_models(self, workload: Workload, *, sharded: bool) -> int:
        """Models in memory besides the trained ones, in full fine-tuning."""
        return 0

    def memory_bytes(self, size: ModelSize, workload: Workload, *, sharded: bool) -> int:
        """Weights, gradients, moments of Adam, and the reference where it stays in memory."""
        return trained_weights(size, self, workload, sharded=sharded).total_bytes


class TRLStage(TrainingStage):
    """The keys of every stage that trains a model with a TRL trainer."""

    code_version: ClassVar[int] = 3
    later_keys: ClassVar = {"compile_layers": None}
    row_columns: ClassVar[tuple[str, ...]] = ("completion",)
    """The columns of a row, besides its prompt, that the trainer reads."""

    trainer: dict[str, Any] = Field({})
    """Fields of TRL's configuration class, passed on unchanged."""
    compile_layers: Literal["inductor", "aot_eager"] | None = None
    """Compile each layer with this backend of ``torch.compile``, also with ``prefix_sharing``:
    fewer kernels are launched on a GPU. Results are equal up to rounding. ``aot_eager`` generates
    no code; it is for tests."""
    max_lost_rows: float = Field(0.1, ge=0.0, le=1.0)
    """Largest share of the training rows that may be lost. A row is lost if its prompt alone fills
    ``trainer.max_length`` or the positions of the model, or if it is longer, in ``reward``."""

    def forward_work(
        self, size: ModelSize, statistics: Mapping[str, Any], world_size: int
    ) -> Work | None:
        """A batch of rows of the largest length; None if nothing bounds their length."""
        limit = self.row_limit(size.positions)
        tokens = getattr(self, "tokens_per_batch", None)
        if tokens is None and limit is not None:
            tokens = self.trl_value(BATCH_SIZE) * limit * len(self.row_columns)
        if tokens is None:
            return None
        half = self.dtype == "bfloat16" or bool(self.trainer.get("bf16"))
        return Work(
            tokens,
            checkpointing=bool(self.trl_value("gradient_checkpointing")),
            accumulates=self.trl_value("gradient_accumulation_steps") > 1,
            activation_bytes=2 if half else 4,
            has_logits=self.writes_policy,
        )

    @property
    def data_input(self) -> str:
        """The key that names the training data."""
        return self.reads[0].input

    def named_paths(self) -> dict[str, str]:
        """The chat template, if it is a path."""
        template = self.trainer.get("chat_template_path")
        if not isinstance(template, str) or not template:
            return {}
        return {"trainer.chat_template_path": template}

    @property
    def trained_turns(self) -> Literal["all", "last"]:
        """The turns of the assistant that the stage trains in each row."""
        return "last"

    @property
    def optimizer_name(self) -> str:
        """The value of ``optim``."""
        return str(self.trl_value("optim"))

    @property
    def trains_without_dropout(self) -> bool:
        """Whether TRL switches dropout off."""
        fields = trl_fields.trl_fields(str(self.trainer_config))
        return "disable_dropout" in fields and bool(self.trl_value("disable_dropout"))

    @property
    def trackers(self) -> tuple[str, ...]:
        """The values of ``report_to``."""
        value = self.trainer.get("report_to") or ()
        return (value,) if isinstance(value, str) else tuple(value)

    @property
    def required_packages(self) -> dict[str, tuple[str, str]]:
        """Those of the stage, Liger's kernels, and the package of the optimizer."""
        packages = {}
        if self.trainer.get("use_liger_kernel"):
            packages["trainer.use_liger_kernel"] = ("liger_kernel", "liger-kernel")
        if (package := required_package(self.optimizer_name)) is not None:
            packages["trainer.optim"] = package
        return super().required_packages | packages

    def digest_settings(self) -> dict[str, Any]:
        """All settings but those, here and in ``trainer``, that cannot change the trained model."""
        settings = super().digest_settings()
        del settings["max_lost_rows"]
        ignored = trl_fields.REPORTING
        if not (self.keep_checkpoints or self.trainer.get("load_best_model_at_end")):
            ignored |= trl_fields.SAVING
        settings["trainer"] = {
            field: value for field, value in self.trainer.items() if field not in ignored
        }
        return settings

    def trl_value(self, field: str) -> Any:
        """The value of a field of TRL's class: that of the recipe, else the default."""
        if field in self.trainer:
            return self.trainer[field]
        return trl_fields.trl_fields(str(self.trainer_config))[field].default

    def row_limit(self, positions: int | None) -> int | None:
        """The longest row in tokens, of a model with so many positions; None without a limit."""
        limits = (self.trl_value("max_length"), positions)
        return min((limit for limit in limits if limit is not None), default=None)

    def trl_arguments(self) -> dict[str, Any]:
        """The fields of ``trainer``, and ``beta`` where the stage has it."""
        beta = getattr(self, "beta", None)
        return self.trainer | ({} if beta is None else {"beta": beta})

    def held_out(self) -> Iterator[HeldOut]:
        """The validation split, if the trainer evaluates during training."""
        strategy = self.trainer.get("eval_strategy", "no")
        keys: Keys | None = None
        if isinstance(strategy, str) and strategy != "no":
            keys = ("trainer", "eval_strategy")
        elif self.trainer.get("eval_on_start") is True:
            keys = ("trainer", "eval_on_start")
        if keys is not None:
            yield HeldOut(keys, self.data_input, "validation")

    def problems(self, stages: Mapping[str, Stage]) -> Iterator[Problem]:
        """Fields of TRL that have no effect, and losses that it refuses after earlier stages."""
        yield from super().problems(stages)
        for keys, message in trl_fields.conflicts(str(self.trainer_config), self.trainer):
            yield Problem(("trainer", *keys), message)
        for field in ("torch_compile", "torch_compile_backend", "torch_compile_mode"):
            if self.prefix_sharing and self.trainer.get(field):
                yield Problem(
                    ("trainer", field),
                    "prefix sharing does not work in a compiled model; set `compile_layers: "
                    "inductor` instead, or `prefix_sharing: false`",
                )
            elif self.compile_layers and self.trainer.get(field):
                yield Problem(
                    ("compile_layers",), f"`trainer.{field}` compiles the layers too; remove one"
                )
        if self.compile_layers and self.quantization:
            yield Problem(
                ("compile_layers",),
                "layers in 4 bits are not compiled; remove `quantization` or it",
            )

    def count_rows(self, statistics: Mapping[str, Any]) -> int | None:
        """The number of training rows, from the metrics of the data; None if unknown."""
        rows: int | None = statistics.get(self.reads[0].kind, {}).get("train")
        return rows

    def words_per_row(self, statistics: Mapping[str, Any]) -> float | None:
        """The median number of words of a row, as the trainer reads it; None if unknown."""
        words = statistics.get("words", {})
        if not all(f"{column}_median" in words for column in self.row_columns):
            return None
        prompt = words["prompt_median"]
        return float(sum(prompt + words[f"{column}_median"] for column in self.row_columns))

    def workload(self, statistics: Mapping[str, Any], world_size: int) -> Workload:
        """Rows of the training table, optimizer steps and tokens of all epochs."""
        rows = self.count_rows(statistics)
        if rows is not None:
            rows -= statistics.get("lost_rows", 0)
        batch = self.trl_value(BATCH_SIZE) * world_size
        accumulation = self.trl_value("gradient_accumulation_steps")
        steps = self.trl_value("max_steps")
        is_partial = rows is not None and 0 < steps * batch * accumulation < rows
        if steps <= 0 and rows is not None:
            steps_per_epoch = max(1, math.ceil(math.ceil(rows / batch) / accumulation))
            steps = math.ceil(steps_per_epoch * self.trl_value("num_train_epochs"))
        words = self.words_per_row(statistics)
        tokens = None
        if steps > 0 and words is not None:
            tokens = round(words * TOKENS_PER_WORD * steps * batch * accumulation)
        return Workload(rows, int(steps) if steps > 0 else None, tokens, is_partial=is_partial)


class PolicyStage(TRLStage):
    """The keys of the stages that train a policy on completions."""

    allow_missing_end_token: bool = False
    """Train although the chat template ends no completion with a token at which the policy stops.
    Such a policy does not learn to stop."""
