"""The algorithms of ``control``, and the configuration class of each.

A family of algorithms is a module here, with its class in ``FAMILIES`` and its algorithms in
``Algorithm``, and a trainer that ``align/control/build.py`` builds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from pydantic import Field

from align.config.base import GymEnvironment
from align.config.control.base import Control
from align.config.control.dynamic_programming import DynamicProgramming
from align.config.control.maddpg import MultiAgent
from align.config.control.off_policy import OffPolicy
from align.config.control.offline import Offline
from align.config.control.policy_gradient import PolicyGradient
from align.config.control.self_play import SelfPlay
from align.config.control.tabular import Tabular

FAMILIES: tuple[type[Control], ...] = (
    PolicyGradient,
    Tabular,
    DynamicProgramming,
    OffPolicy,
    SelfPlay,
    MultiAgent,
    Offline,
)
"""The configuration classes; the first is that of the default algorithm."""


class UnknownAlgorithm(Control, extra="ignore"):
    """The keys that are checked while ``algorithm`` has no valid value."""

    steps: int = Field(1, ge=1)
    """Not required: some algorithms have a default."""

    @property
    def gym_environments(self) -> tuple[GymEnvironment, ...]:
        """None that can be checked: the algorithm decides what an environment must have."""
        return ()


def algorithms_of(family: type[Control]) -> tuple[str, ...]:
    """The algorithms that a configuration class describes."""
    return get_args(family.model_fields["algorithm"].annotation)


def family_of(settings: Mapping[str, Any]) -> type[Control]:
    """The configuration class of settings, by their ``algorithm``."""
    default = FAMILIES[0].model_fields["algorithm"].default
    algorithm = settings.get("algorithm", default)
    fitting = (family for family in FAMILIES if algorithm in algorithms_of(family))
    return next(fitting, UnknownAlgorithm)


def algorithms_with(key: str) -> list[str]:
    """The algorithms that have a key."""
    families = [family for family in FAMILIES if key in family.model_fields]
    return [algorithm for family in families for algorithm in algorithms_of(family)]
