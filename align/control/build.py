"""The trainer of a ``control`` stage, by the family of its algorithm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.config.control.base import Control
from align.config.control.dynamic_programming import DynamicProgramming
from align.config.control.maddpg import MultiAgent
from align.config.control.off_policy import OffPolicy
from align.config.control.offline import Offline
from align.config.control.policy_gradient import PolicyGradient
from align.config.control.self_play import SelfPlay
from align.config.control.tabular import Tabular
from align.control.spaces import EnvSpec
from align.control.trainer import Trainer


def build_trainer(
    config: Control, spec: EnvSpec, seed: int, folders: Sequence[Path] = ()
) -> Trainer[Any]:
    """A trainer of one seed, at its first step. ``folders`` have the recorded steps of others."""
    match config:
        case PolicyGradient():
            from align.control.policy_gradient import PolicyGradientTrainer

            return PolicyGradientTrainer(config, spec, seed)
        case Tabular():
            from align.control.value_based.tabular import TabularTrainer

            return TabularTrainer(config, spec, seed)
        case DynamicProgramming():
            from align.control.value_based.dynamic_programming import DynamicProgrammingTrainer

            return DynamicProgrammingTrainer(config, spec, seed)
        case OffPolicy():
            from align.control.value_based.off_policy import OffPolicyTrainer

            return OffPolicyTrainer(config, spec, seed)
        case SelfPlay():
            from align.control.multi_agent.self_play import SelfPlayTrainer

            return SelfPlayTrainer(config, spec, seed)
        case MultiAgent():
            from align.control.multi_agent.maddpg import MultiAgentTrainer

            return MultiAgentTrainer(config, spec, seed)
        case Offline():
            from align.control.recorded_steps import load
            from align.control.value_based.offline import OfflineTrainer

            return OfflineTrainer(config, spec, seed, load(folders, spec))
    raise TypeError(f"no trainer for {type(config).__name__}")
