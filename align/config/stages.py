"""The kinds of stages: the name of each in a recipe, and its configuration class or classes.

A new kind is added here; its module in ``align/stages`` has the same name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align.config.base import Input, Stage
from align.config.completions import Label, Sample
from align.config.control.algorithms import FAMILIES, family_of
from align.config.data import Prepare
from align.config.evaluate import Evaluate
from align.config.online_rl import OnlineRL
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
    "control": FAMILIES[0],
}
"""Of a kind with several classes, this is the class without the key that chooses among them."""


def stage_classes(kind: str) -> tuple[type[Stage], ...]:
    """The configuration classes of a kind: of ``control`` one per family of algorithms."""
    return FAMILIES if kind == "control" else (STAGES[kind],)


def stage_class(kind: str, settings: Mapping[str, Any]) -> type[Stage]:
    """The configuration class of a stage of a kind with these settings."""
    return family_of(settings) if kind == "control" else STAGES[kind]


ONLINE_RL = tuple(kind for kind, stage in STAGES.items() if issubclass(stage, OnlineRL))
"""The kinds of stages that train a policy on its own completions."""


def stage_kind(stage: Stage) -> str:
    """The kind of a stage, such as ``dpo`` for a configuration of the class DPO."""
    return next(kind for kind in STAGES if type(stage) in stage_classes(kind))


def accepted_kinds(expected: Input) -> tuple[str, ...]:
    """The kinds of stages that an input may name."""
    return tuple(
        kind
        for kind, cls in STAGES.items()
        if kind in expected.stages or (expected.policies and cls.writes_policy)
    )
