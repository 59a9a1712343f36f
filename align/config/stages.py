"""What each stage can be told: one strict, frozen class a stage, named like its key in a recipe.

Only what means something to the pipeline stands here. Every other knob of a training run is a field of TRL's own
configuration class and goes under ``trainer:``.
"""

from __future__ import annotations

from align.config.base import Stage
from align.config.control import Control
from align.config.data import Label, Prepare, Sample
from align.config.evaluate import Evaluate
from align.config.ppo import PPO
from align.config.training import DPO, KTO, SFT, Reward

STAGES: dict[str, type[Stage]] = {
    "prepare": Prepare,
    "sft": SFT,
    "dpo": DPO,
    "reward": Reward,
    "kto": KTO,
    "ppo": PPO,
    "sample": Sample,
    "label": Label,
    "evaluate": Evaluate,
    "control": Control,
}
