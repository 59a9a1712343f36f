"""What the stages that train with TRL share: arguments, checkpoints, interruption, and metrics as they come."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from align import artifact, interrupts, processes
from align.errors import UserError
from align.tracking import Track

if TYPE_CHECKING:
    from datasets import Dataset

KEY_METRICS = ("loss", "mean_token_accuracy", "rewards/accuracies", "rewards/margins")


def arguments(
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
def refusals() -> Iterator[None]:
    """Building a trainer checks what its arguments mean together; what it refuses is the user's to mend."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, NotImplementedError, ImportError, OSError, RuntimeError) as error:
        if type(error) is RuntimeError and "install" not in str(error):
            raise  # a tracker that is not installed is the user's; any other is ours
        raise UserError(f"trainer: TRL refuses: {' '.join(str(error).split())}") from error


def dataset(data: Path, kind: str, split: str, folder: Path) -> Dataset | None:
    """One prepared file, such as ``pairs-train.parquet``; None where the split was not asked for.

    Its cache lies below the stage's folder: every process finds the same, and it goes when the stage is complete.
    """
    from datasets import Dataset

    file = data / f"{kind}-{split}.parquet"
    if not file.is_file():
        if split == "train":
            raise UserError(
                f"{data}: no {file.name}; the source of this `prepare` stage had no {kind}"
            )
        return None
    return Dataset.from_parquet(str(file), cache_dir=str(folder / ".cache"))


def fit(trainer: Trainer, folder: Path, track: Track) -> dict[str, Any]:
    """Train from the last complete checkpoint on, and save the model. Returns the metrics that were logged last.

    Raises:
        Interrupted: After a signal; a checkpoint of the last step is complete by then.
    """
    trainer.remove_callback(PrinterCallback)
    # TRL's template knows neither the data nor where the model came from: artifact.json does.
    trainer.create_model_card = lambda *_, **__: None
    follow = _Follow(track)
    trainer.add_callback(follow)
    checkpoint = artifact.last_checkpoint(folder, world_size=processes.world_size())
    step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    track.rewind(step)
    if checkpoint:
        track.say(f"going on from step {step}: {checkpoint}")
    with interrupts.deferred() as follow.stop, small_tiles():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if follow.stopped:
        raise interrupts.Interrupted
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    if "ref" in getattr(model, "peft_config", {}):
        model.delete_adapter("ref")  # TRL's frozen copy: the reference is the input, and lies there
    trainer.save_model(str(folder))
    if processes.is_main():
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


@contextlib.contextmanager
def small_tiles() -> Iterator[None]:
    """On CPU, let TRL's LM head take 256 tokens at a time, for as long as this lasts; sums change by rounding.

    Its 4,096 suit a GPU: a tile of logits is then 128 MiB at a vocabulary of 8,192 and goes through memory several
    times, where one of 8 MiB stays in the cache.
    """
    from accelerate import PartialState
    from trl.kernels import chunked_logprob

    usual = chunked_logprob.TOKEN_CHUNK_SIZE
    if PartialState().device.type == "cpu":
        chunked_logprob.TOKEN_CHUNK_SIZE = min(usual, 256)
    try:
        yield
    finally:
        chunked_logprob.TOKEN_CHUNK_SIZE = usual


def make_readable(folder: Path) -> None:
    """Give weights the usual permissions: safetensors writes through a private temporary file."""
    umask = os.umask(0)
    os.umask(umask)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o666 & ~umask)


class _Follow(TrainerCallback):
    """Tells how far training is, declares checkpoints complete, and stops at the end of a step when asked to."""

    def __init__(self, track: Track) -> None:
        self._track = track
        self._latest: dict[str, Any] = {}
        self.stop: Any = None
        self.stopped = False

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        self._track.step(state.global_step, state.max_steps, self._latest)
        if anyone(self.stop.requested):
            self.stopped = state.global_step < state.max_steps
            control.should_save = control.should_training_stop = True

    def on_log(
        self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **_: Any
    ) -> None:
        logs = logs or {}
        self._latest |= {key: logs[key] for key in KEY_METRICS if key in logs}
        self._track.log(state.global_step, logs)

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        processes.wait()  # every rank has written its part
        # Resumed from the very last step, transformers takes one more: that checkpoint is never gone on from.
        if state.is_world_process_zero and state.global_step < state.max_steps:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            artifact.mark_checkpoint(folder, world_size=processes.world_size())


def anyone(requested: bool) -> bool:
    """Whether any process was asked to stop: all must stop at the same step."""
    if processes.world_size() == 1:
        return requested
    import torch
    from accelerate import PartialState

    flag = torch.tensor(float(requested), device=PartialState().device)
    torch.distributed.all_reduce(flag)
    return bool(flag.item())
