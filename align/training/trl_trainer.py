"""Shared by the stages with a TRL trainer: arguments, training, interruption and metrics.

Each stage builds its trainer itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import rotate_checkpoints

from align.config.training_base import PolicyStage
from align.errors import UserError
from align.models import quantization
from align.models.conversations import MISSING_END_REPAIR
from align.models.logps import small_vocabulary_tiles
from align.models.quantization import adapters_in_float32
from align.models.tokenization import rows_for_trl
from align.models.tokenizer_files import GENERATION_CONFIG
from align.runtime import checkpoints, distributed, sharding, signals
from align.runtime.artifacts import make_readable
from align.runtime.exit_codes import describe_failed_write
from align.runtime.out_of_memory import shortage
from align.runtime.progress import Logger
from align.training.finiteness import check_weights, stop_unless_finite
from align.training.optimizer_check import optimizer_problems
from align.training.sharded_trainers import load_whole_models, store_tied_weights_once

KEY_METRICS = ("loss", "mean_token_accuracy", "rewards/accuracies", "rewards/margins")
"""Logged metrics that the progress display shows and that the stage returns."""
HELD_OUT_METRICS = ("eval_loss", "eval_mean_token_accuracy", "eval_rewards/accuracies")
"""Metrics of the validation rows that the stage returns; the last of a run."""
OPTIMIZER_FIELDS = ("optim", "adam_", "learning_rate", "weight_decay", "lr_scheduler", "warmup")
"""Beginnings of the names of the fields that decide the optimizer and the schedule."""
TRAINING_ARGUMENTS = "training_args.bin"
"""The pickle that transformers writes beside a model; ``artifact.json`` has the settings."""
CARD = "README.md"
HEADLINE = ("loss", "mean_token_accuracy", "rewards/accuracies", "steps")


def config_class(name: str) -> type[Any]:
    """A configuration class of TRL by its name; one outside of TRL's top level is ``module:Class``.

    For example ``DPOConfig``, or ``trl.experimental.orpo:ORPOConfig``.
    """
    module, _, class_name = name.rpartition(":")
    cls: type[Any] = getattr(importlib.import_module(module or "trl"), class_name)
    return cls


def trl_arguments(
    config_class: type[Any], output_dir: Path, *, seed: int, trainer: dict[str, Any], **keys: Any
) -> Any:
    """Build TRL's training arguments from defaults, ``trainer``, other keys and fixed values.

    Each of these overrides the ones before it.

    By default ten checkpoints are written per run and the last two are kept, because one of them
    may be incomplete.

    Raises:
        UserError: TRL's class rejects a value.
    """
    from accelerate import PartialState

    cpu = PartialState().device.type == "cpu"
    # The `mixed_precision` of a launch config would override the recipe without changing its
    # digest.
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    defaults = {
        "save_steps": 0.1,
        "save_total_limit": 2,
        "report_to": "none",
        "log_level": "error",
        # On resuming, transformers would warn about tied weights and its rounding.
        "log_level_replica": "error",
        # A causal language model uses all of its parameters.
        "ddp_find_unused_parameters": False,
    }
    fixed = {
        "output_dir": str(output_dir),
        "seed": seed,
        # accelerate replaces FSDP on a CPU by plain data parallelism.
        "use_cpu": cpu and sharding.kind() != "FSDP2",
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,  # it would leave NaN out of the loss of an evaluation
        **({"dataloader_pin_memory": False} if cpu else {}),
    }
    try:
        arguments = config_class(**{**defaults, **trainer, **keys, **fixed})
    except Exception as error:  # of any kind, as values of the wrong kind cause them
        message = f"{config_class.__name__} rejects these values: {' '.join(str(error).split())}"
        raise UserError(f"trainer: {message}", *_optimizer_problems(trainer, output_dir)) from None
    problems = [
        f"trainer.{field}: requires a GPU; remove it"
        for field in ("activation_offloading", "fp16")
        if cpu and getattr(arguments, field, False)
    ]
    problems += optimizer_problems(arguments)
    if problems:
        raise UserError(*problems)
    load_whole_models()
    return arguments


def _optimizer_problems(trainer: Mapping[str, Any], output_dir: Path) -> list[str]:
    """The errors of the optimizer and the schedule of values of which TRL rejects others."""
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    chosen = {
        field: value
        for field, value in trainer.items()
        if field in known and field.startswith(OPTIMIZER_FIELDS)
    }
    try:
        arguments = TrainingArguments(output_dir=str(output_dir), report_to="none", **chosen)
    except Exception:  # the rejected value is one of these
        return []
    return list(optimizer_problems(arguments))


@contextlib.contextmanager
def construction(policy: Any, tokenizer: Any, config: PolicyStage) -> Iterator[None]:
    """Inside this block, TRL's trainer of a policy is constructed.

    TRL tokenizes the rows as every other stage does, and leaves adapters in float32.
    """
    rows = rows_for_trl(tokenizer, end_repair=end_repair(config))
    with trl_errors_as_user_errors(), rows, adapters_in_float32(policy):
        yield


def end_repair(config: PolicyStage) -> str | None:
    """The repair of a template without an end token; None if ``config`` allows such a template."""
    return None if config.allow_missing_end_token else MISSING_END_REPAIR


@contextlib.contextmanager
def trl_errors_as_user_errors() -> Iterator[None]:
    """Re-raise configuration errors from TRL's trainer constructors as ``UserError``."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, NotImplementedError, ImportError, OSError, RuntimeError) as error:
        if describe_failed_write(error) is not None or shortage(error) is not None:
            raise
        if type(error) is RuntimeError and "install" not in str(error):
            raise  # a RuntimeError is the user's only if it names a tracker to install
        message = " ".join(str(error).split())
        raise UserError(f"trainer: TRL rejects this configuration: {message}") from error


def train(trainer: Trainer, output_dir: Path, logger: Logger) -> dict[str, Any]:
    """Train, resuming from the last complete checkpoint; save the model; return the last metrics.

    Raises:
        Interrupted: A signal arrived; a complete checkpoint of the last step exists.
        UserError: A loss, a gradient or a weight is not finite; nothing is saved.
    """
    trainer.remove_callback(PrinterCallback)
    # TRL's model card does not name the data or the initial model; that of the runner does.
    trainer.create_model_card = lambda *_, **__: None
    store_tied_weights_once(trainer)
    callback = _ProgressCallback(logger, kept=trainer.args.save_total_limit)
    # transformers deletes those with the oldest times, which a clock that was set back changes.
    trainer.args.save_total_limit = None
    if distributed.is_main():
        checkpoints.remove_interrupted(output_dir)  # by step, they could count as the newest
    checkpoint = checkpoints.last_checkpoint(output_dir, world_size=distributed.world_size())
    step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    logger.rewind(step)
    if checkpoint:
        logger.info(f"resuming from step {step}: {checkpoint}")
    with stop_unless_finite(trainer):
        trainer.add_callback(callback)  # after the check, so that it marks checked checkpoints only
        with signals.deferred() as callback.stop, small_vocabulary_tiles():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if callback.stopped:
        raise signals.Interrupted
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    check_weights(model, place=f"step {trainer.state.global_step}")
    if "ref" in getattr(model, "peft_config", {}):
        model.delete_adapter("ref")  # TRL's frozen copy of the input adapter
    trainer.save_model(str(output_dir))
    load_whole_models()  # for the rest of the stage
    if distributed.is_main():
        _complete_model_folder(model, output_dir)
    return _last_metrics(trainer)


def _complete_model_folder(model: Any, folder: Path) -> None:
    """Add and remove what distinguishes the folder of a model from a checkpoint of TRL.

    An adapter needs the end tokens of its chat template, which its base may not list. The pickle of
    TRL's arguments and the empty card of peft are removed; the runner writes the model card.
    """
    config = getattr(model, "generation_config", None)
    if config is not None and getattr(model, "peft_config", None):
        config.to_json_file(folder / GENERATION_CONFIG)
    for name in (TRAINING_ARGUMENTS, CARD):
        (folder / name).unlink(missing_ok=True)
    make_readable(folder)


def headline(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that are shown when a training stage ends."""
    return {key: metrics[key] for key in HEADLINE if key in metrics}


def count_parameters(trainer: Trainer) -> int:
    """Number of parameters of the trained model, frozen ones included."""
    return quantization.count_parameters(trainer.model)


def _last_metrics(trainer: Trainer) -> dict[str, Any]:
    """The last logged metrics; of a run shorter than ``logging_steps``, those of the whole run."""
    history = trainer.state.log_history
    whole = [{**entry, "loss": entry["train_loss"]} for entry in history if "train_loss" in entry]
    last: dict[str, Any] = next(
        (entry for entry in reversed([*whole, *history]) if "loss" in entry), {}
    )
    metrics: dict[str, Any] = {key: last[key] for key in KEY_METRICS if key in last}
    metrics |= {"steps": trainer.state.global_step, "epochs": trainer.state.epoch}
    for entry in history:
        metrics |= {key: entry[key] for key in HELD_OUT_METRICS if key in entry}
    if any(key in metrics for key in HELD_OUT_METRICS):
        metrics |= _held_out_counts(trainer.eval_dataset)
    return metrics


def _held_out_counts(rows: Any) -> dict[str, int]:
    """The number of validation rows and, of pairs, that of their prompts."""
    counts = {"eval_rows": len(rows)}
    if "prompt_ids" in getattr(rows, "column_names", ()):
        counts["eval_prompts"] = len(set(map(tuple, rows["prompt_ids"])))
    return counts


class _ProgressCallback(TrainerCallback):
    """Reports progress, marks checkpoints complete, keeps the last ones, stops after a signal."""

    def __init__(self, logger: Logger, *, kept: int | None) -> None:
        self._logger = logger
        self._kept = kept
        self._latest: dict[str, Any] = {}
        self.stop: Any = None
        self.stopped = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._logger.step(state.global_step, state.max_steps, self._latest)
        if distributed.any_rank(self.stop.requested):
            self.stopped = state.global_step < state.max_steps
            control.should_save = control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        logs = logs or {}
        self._latest |= {key: logs[key] for key in KEY_METRICS if key in logs}
        self._logger.log(state.global_step, logs)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        distributed.barrier()  # every rank has written its part
        folder = Path(args.output_dir or "") / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero:
            (folder / CARD).unlink(missing_ok=True)  # peft's template
        # A checkpoint of the very last step is never resumed: transformers would train one more
        # step.
        if state.is_world_process_zero and state.global_step < state.max_steps:
            checkpoints.mark_complete(folder, world_size=distributed.world_size())
        if args.should_save:
            rotate_checkpoints(str(folder.parent), self._kept, state.best_model_checkpoint)
        distributed.barrier()  # no rank ends the run before the mark is written
