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

import torch

from align.config.ppo import PPO
from align.errors import UserError
from align.models import logps
from align.online_rl.trainer import build_trainer
from align.runtime import distributed, signals
from align.runtime.progress import Logger
from align.runtime.results import StageResult


def run(
    config: PPO, inputs: Mapping[str, Path | str], output_dir: Path, logger: Logger
) -> StageResult:
    """Train ``config.model`` to earn ``config.rewards`` without going far from where it starts."""
    try:
        learner = build_trainer(config, inputs, output_dir, logger)
        begin = learner.resume()
        with signals.deferred() as stop, logps.small_vocabulary_tiles():
            for step in range(begin, config.steps):
                if step == 0:
                    learner.evaluate(0)
                learner.step(step)
                done = step + 1
                if config.eval_steps and (done % config.eval_steps == 0 or done == config.steps):
                    learner.evaluate(done)
                stopping = distributed.any_rank(stop.requested) and done < config.steps
                if stopping or (done % learner.save_steps == 0 and done < config.steps):
                    learner.save(done)
                if stopping:
                    raise signals.Interrupted
        return StageResult(learner.finish())
    except torch.OutOfMemoryError as error:
        raise UserError(
            "out of memory: lower `micro_batch_size`, which changes no result, or `sample_batch_size`, or set "
            f"`gradient_checkpointing: true`, `lora`, or `quantization: nf4` ({str(error).splitlines()[0]})"
        ) from error
