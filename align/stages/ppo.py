"""PPO on a language model: prompts, a policy and rewards in; a policy out. The update is the one that CartPole proves.

Each step samples completions, has every role speak about them, turns scores and KL into rewards and advantages, and calls
:func:`align.rl.update.update`. Nothing random is kept between steps: seeds come from the step's number, so weights,
optimizer and KL coefficient are all that a checkpoint needs, and a resumed run is the same run to the bit.

Several processes share each batch; gradients are averaged once an optimizer step. Left out: DeepSpeed and FSDP (say so and
stop), several models a device.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from align.config.ppo import PPO
from align.errors import UserError
from align.models import logps
from align.online_rl.trainer import build_trainer
from align.runtime import distributed, signals
from align.runtime.progress import Logger


def run(
    settings: PPO, inputs: Mapping[str, Path | str], folder: Path, track: Logger
) -> dict[str, Any]:
    """Train ``settings.model`` to earn ``settings.rewards`` without going far from where it starts."""
    try:
        learner = build_trainer(settings, inputs, folder, track)
        begin = learner.resume()
        with signals.deferred() as stop, logps.small_vocabulary_tiles():
            for step in range(begin, settings.steps):
                if step == 0:
                    learner.evaluate(0)
                learner.step(step)
                done = step + 1
                if settings.eval_steps and (
                    done % settings.eval_steps == 0 or done == settings.steps
                ):
                    learner.evaluate(done)
                stopping = distributed.any_rank(stop.requested) and done < settings.steps
                if stopping or (done % learner.save_steps == 0 and done < settings.steps):
                    learner.save(done)
                if stopping:
                    raise signals.Interrupted
        return learner.finish()
    except torch.OutOfMemoryError as error:
        raise UserError(
            "out of memory: lower `micro_batch_size`, which changes no result, or `sample_batch_size`, or set "
            f"`gradient_checkpointing: true`, `lora`, or `quantization: nf4` ({str(error).splitlines()[0]})"
        ) from error
