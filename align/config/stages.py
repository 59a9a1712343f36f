"""The kinds of stages: the name of each in a recipe, and its configuration class.

A new kind is added here; its module in ``align/stages`` has the same name.
"""

from __future__ import annotations

from align.config.base import Input, Stage
from align.config.control import Control
from align.config.data import Label, Prepare, Sample
from align.config.evaluate import Evaluate
from align.config.online_rl_stages import GRPO, PPO, RLOO, Reinforce
from align.config.training import DPO, KTO, SFT, Reward

STAGES: dict[str, type[Stage]] = {
    "prepare": Prepare,
    "sft": SFT,
    "dpo": DPO,
    "reward": Reward,
    "kto": KTO,
    "ppo": PPO,
    "grpo": GRPO,
    "rloo": RLOO,
    "reinforce": Reinforce,
    "sample": Sample,
    "label": Label,
    "evaluate": Evaluate,
    "control": Control,
}


def stage_kind(stage: Stage) -> str:
    """The kind of a stage, such as ``dpo`` for a configuration of the class DPO."""
    return next(name for name, cls in STAGES.items() if type(stage) is cls)


def accepted_kinds(expected: Input) -> tuple[str, ...]:
    """The kinds of stages that an input may name."""
    return tuple(
        kind
        for kind, cls in STAGES.items()
        if kind in expected.stages or (expected.policies and cls.writes_policy)
    )
