"""Align: supervised fine-tuning, reward models, PPO, DPO and KTO, chained by recipe files.

The names below are the public Python API, together with :mod:`align.functional` and
:mod:`align.rl`. They are imported when they are first used, so ``import align`` loads no other
library. Everything else is internal and may move.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from align.config.recipe import Recipe as Recipe
    from align.config.recipe import load_recipe as load_recipe
    from align.data.dataset_dict import prepare as prepare
    from align.errors import ArtifactError as ArtifactError
    from align.errors import DataError as DataError
    from align.errors import RecipeError as RecipeError
    from align.errors import UserError as UserError
    from align.evaluation.annotated_win_rates import annotated_win_rates as annotated_win_rates
    from align.evaluation.reward_evaluation import evaluate_reward_model as evaluate_reward_model
    from align.evaluation.scores import win_rate as win_rate
    from align.models.policy import load_policy as load_policy
    from align.models.prefix_sharing.wrapper import prefix_sharing as prefix_sharing
    from align.pipeline.api import Run as Run
    from align.pipeline.api import plan as plan
    from align.pipeline.api import run as run
    from align.rewards.inference import load_reward_model as load_reward_model

_PUBLIC = {
    "ArtifactError": "align.errors",
    "DataError": "align.errors",
    "Recipe": "align.config.recipe",
    "RecipeError": "align.errors",
    "Run": "align.pipeline.api",
    "UserError": "align.errors",
    "annotated_win_rates": "align.evaluation.annotated_win_rates",
    "evaluate_reward_model": "align.evaluation.reward_evaluation",
    "load_policy": "align.models.policy",
    "load_recipe": "align.config.recipe",
    "load_reward_model": "align.rewards.inference",
    "plan": "align.pipeline.api",
    "prefix_sharing": "align.models.prefix_sharing.wrapper",
    "prepare": "align.data.dataset_dict",
    "run": "align.pipeline.api",
    "win_rate": "align.evaluation.scores",
}
_SUBPACKAGES = ("functional", "rl")

__all__ = ["__version__", *_PUBLIC, *_SUBPACKAGES]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name in _SUBPACKAGES:
        return importlib.import_module(f"align.{name}")
    raise AttributeError(f"module 'align' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
