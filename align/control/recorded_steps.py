"""Recorded steps of a policy: record them, write them to a file, and read several files.

The actions are sampled from the policy. The data has all that offline algorithms need, and none of
the policy's probabilities. Left out: rewards that are scaled, and observations that are normalized.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium.wrappers.utils import RunningMeanStd
from jaxtyping import Bool, Float, Shaped
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from align.control.environments import Environments, normalize
from align.control.networks import Policy
from align.control.seeds import derive_seed
from align.control.spaces import EnvSpec
from align.errors import ArtifactError

PATTERN = "steps-*.safetensors"
RECORDED_AT_ONCE = 10
"""Environments that are recorded in parallel."""


class RecordedSteps(NamedTuple):
    """Steps in any order; an observation that ends an episode is a next observation only."""

    observations: Float[Tensor, "steps features"]
    actions: Shaped[Tensor, "steps ..."]
    """Actions as the environment received them."""
    rewards: Float[Tensor, " steps"]
    next_observations: Float[Tensor, "steps features"]
    terminated: Bool[Tensor, " steps"]
    """The episode reached a terminal state; false at a time limit."""


def steps_file(folder: Path, seed: int) -> Path:
    """Path of the recorded steps of a seed."""
    return folder / f"steps-{seed}.safetensors"


@torch.no_grad()
def record(
    policy: Policy,
    environment: str,
    options: Mapping[str, Any],
    *,
    statistics: RunningMeanStd | None,
    steps: int,
    seed: int,
) -> RecordedSteps:
    """Take at least ``steps`` steps with sampled actions, in several environments at once."""
    environments = Environments(environment, options, RECORDED_AT_ONCE)
    generator = torch.Generator().manual_seed(derive_seed(seed, 6))
    observations = environments.reset(derive_seed(seed, 7))
    rows = []
    for _ in range(-(-steps // RECORDED_AT_ONCE)):
        seen = np.asarray(normalize(observations, statistics), np.float32)
        noise = policy.head.noise(RECORDED_AT_ONCE, generator=generator)
        sampled = policy.head.act(policy.body(torch.from_numpy(seen)), noise)
        actions = policy.head.env_actions(sampled)
        step = environments.step(actions)
        following = step.observations.copy()
        following[step.ended] = step.final_observations
        rows.append((observations, actions, step.rewards, following, step.terminated))
        observations = step.observations
    environments.close()
    arrays = [np.concatenate(column) for column in zip(*rows, strict=True)]
    return RecordedSteps(
        *(torch.from_numpy(a if a.dtype != float else np.float32(a)) for a in arrays)
    )


def save(file: Path, steps: RecordedSteps) -> None:
    """Write steps to a safetensors file."""
    save_file({name: tensor.contiguous() for name, tensor in steps._asdict().items()}, file)


def load(folders: Sequence[Path], spec: EnvSpec) -> RecordedSteps:
    """All recorded steps of the folders of ``control`` stages, one after another.

    Raises:
        ArtifactError: A folder has no recorded steps, a file is damaged, or its sizes are those of
            another environment.
    """
    parts = []
    for folder in folders:
        files = sorted(folder.glob(PATTERN))
        if not files:
            raise ArtifactError(
                f"{folder}: no recorded steps; set `record_steps` in the stage that writes it"
            )
        parts += [_load(file, spec) for file in files]
    return RecordedSteps(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _load(file: Path, spec: EnvSpec) -> RecordedSteps:
    try:
        steps = RecordedSteps(**load_file(file))
    except (SafetensorError, OSError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ArtifactError(f"{file}: no recorded steps ({reason})") from None
    n = len(steps.rewards)
    action = () if spec.low is None else (spec.n_actions,)
    shapes = ((n, spec.n_features), (n, *action), (n,), (n, spec.n_features), (n,))
    for name, tensor, shape in zip(steps._fields, steps, shapes, strict=True):
        if tensor.shape != shape or not bool(tensor.isfinite().all()):
            raise ArtifactError(
                f"{file}: {name} have the shape {tuple(tensor.shape)}; expected finite numbers of "
                f"the shape {shape}, those of the environment of the stage"
            )
    if spec.low is None and int(steps.actions.max()) >= spec.n_actions:
        raise ArtifactError(
            f"{file}: an action is {int(steps.actions.max())}; the environment has {spec.n_actions}"
        )
    return steps
