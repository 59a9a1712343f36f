"""What the stages that train with TRL share: arguments, checkpoints, interruption, and metrics as they come."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from align.errors import UserError
from align.models.logps import small_vocabulary_tiles
from align.runtime import checkpoints, distributed, signals
from align.runtime.artifacts import make_readable
from align.runtime.distributed import any_rank
from align.runtime.progress import Logger

KEY_METRICS = ("loss", "mean_token_accuracy", "rewards/accuracies", "rewards/margins")


def trl_arguments(
    config: type[Any], folder: Path, *, seed: int, trainer: dict[str, Any], **own: Any
) -> Any:
    """TRL's own configuration: our defaults, then the recipe's ``trainer``, then what the chain decides.

    Ten checkpoints a run are the default, of which two stay: one may be cut off while it is written.

    Raises:
        UserError: The configuration class refuses a value.
    """
    from accelerate import PartialState

    cpu = PartialState().device.type == "cpu"
    # A launch configuration's `mixed_precision` would overrule the recipe, under the same digest.
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    defaults = {
        "save_steps": 0.1,
        "save_total_limit": 2,
        "report_to": "none",
        "log_level": "error",
        "log_level_replica": "error",  # on resuming, transformers warns of tied weights and of its own rounding
        "ddp_find_unused_parameters": False,  # a causal language model uses all of them
    }
    decided = {
        "output_dir": str(folder),
        "seed": seed,
        "use_cpu": cpu,
        "disable_tqdm": True,
        **({"dataloader_pin_memory": False} if cpu else {}),
    }
    try:
        return config(**{**defaults, **trainer, **own, **decided})
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(
            f"trainer: {config.__name__} refuses: {' '.join(str(error).split())}"
        ) from None


@contextlib.contextmanager
def trl_errors_as_user_errors() -> Iterator[None]:
    """Building a trainer checks what its arguments mean together; what it refuses is the user's to mend."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, NotImplementedError, ImportError, OSError, RuntimeError) as error:
        if type(error) is RuntimeError and "install" not in str(error):
            raise  # a tracker that is not installed is the user's; any other is ours
        raise UserError(f"trainer: TRL refuses: {' '.join(str(error).split())}") from error


def train(trainer: Trainer, folder: Path, logger: Logger) -> dict[str, Any]:
    """Train from the last complete checkpoint on, and save the model. Returns the metrics that were logged last.

    Raises:
        Interrupted: After a signal; a checkpoint of the last step is complete by then.
    """
    trainer.remove_callback(PrinterCallback)
    # TRL's template knows neither the data nor where the model came from: artifact.json does.
    trainer.create_model_card = lambda *_, **__: None
    follow = _Follow(logger)
    trainer.add_callback(follow)
    checkpoint = checkpoints.last_checkpoint(folder, world_size=distributed.world_size())
    step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    logger.rewind(step)
    if checkpoint:
        logger.info(f"going on from step {step}: {checkpoint}")
    with signals.deferred() as follow.stop, small_vocabulary_tiles():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if follow.stopped:
        raise signals.Interrupted
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    if "ref" in getattr(model, "peft_config", {}):
        model.delete_adapter("ref")  # TRL's frozen copy: the reference is the input, and lies there
    trainer.save_model(str(folder))
    if distributed.is_main():
        make_readable(folder)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    last = history[-1] if history else {}
    found = {key: last[key] for key in KEY_METRICS if key in last}
    found |= {"steps": trainer.state.global_step, "epochs": trainer.state.epoch}
    for entry in trainer.state.log_history:
        found |= {
            key: value
            for key, value in entry.items()
            if key in ("eval_loss", "eval_rewards/accuracies")
        }
    return found


class _Follow(TrainerCallback):
    """Tells how far training is, declares checkpoints complete, and stops at the end of a step when asked to."""

    def __init__(self, logger: Logger) -> None:
        self._logger = logger
        self._latest: dict[str, Any] = {}
        self.stop: Any = None
        self.stopped = False

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        self._logger.step(state.global_step, state.max_steps, self._latest)
        if any_rank(self.stop.requested):
            self.stopped = state.global_step < state.max_steps
            control.should_save = control.should_training_stop = True

    def on_log(
        self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **_: Any
    ) -> None:
        logs = logs or {}
        self._latest |= {key: logs[key] for key in KEY_METRICS if key in logs}
        self._logger.log(state.global_step, logs)

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        distributed.barrier()  # every rank has written its part
        # Resumed from the very last step, transformers takes one more: that checkpoint is never gone on from.
        if state.is_world_process_zero and state.global_step < state.max_steps:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            checkpoints.mark_complete(folder, world_size=distributed.world_size())
