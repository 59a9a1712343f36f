"""Files of a trained policy: save and load weights and statistics, play episodes, write GIFs."""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium.wrappers.utils import RunningMeanStd
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from align.config.control.base import Control
from align.control.environments import features, normalize
from align.control.networks import Policy
from align.control.spaces import EnvSpec
from align.control.vector.workers import flattened
from align.errors import ArtifactError

CONFIG = "policy.json"
KEYS = (
    "environment", "options", "spec", "hidden_sizes", "activation", "distribution", "seeds",
)  # fmt: skip
"""Keys of ``policy.json``."""
PREFIX = "policy."
"""Begins the names of the policy's weights in a safetensors file."""
REPAIR = "run the `control` stage again"
GIF_FRAMES_PER_SECOND = 25


@dataclass(frozen=True, slots=True)
class LoadedPolicy:
    """A trained policy with its environment and the statistics of its observations."""

    environment: str
    options: Mapping[str, Any]
    policy: Policy
    statistics: RunningMeanStd | None
    n_agents: int


class Frame(NamedTuple):
    """One frame of an episode."""

    image: Any
    """``[height, width, 3]``; None if a window shows it."""
    episode_return: float | None
    """The return of the episode, at its last frame."""


def save(
    file: Path, policy: Policy, critic: nn.Module | None, statistics: RunningMeanStd | None
) -> None:
    """Write the weights of policy and critic, and the statistics, to a safetensors file."""
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in policy.state_dict().items()}
    if critic is not None:
        tensors |= {f"critic.{name}": tensor for name, tensor in critic.state_dict().items()}
    if statistics is not None:
        for name in ("mean", "var"):
            tensors[f"statistics.{name}"] = torch.from_numpy(getattr(statistics, name).copy())
        tensors["statistics.count"] = torch.tensor(statistics.count, dtype=torch.float64)
    temporary = file.with_suffix(".tmp")
    save_file(tensors, temporary)
    temporary.replace(file)


def describe(folder: Path, config: Control, spec: EnvSpec) -> None:
    """Write ``policy.json``: what :func:`load` needs to build the policies of a folder."""
    description = {
        "environment": config.environment,
        "options": config.environment_options,
        "spec": spec._asdict(),
        **asdict(config.policy_shape),
        "seeds": config.seeds,
    }
    temporary = folder / f".{CONFIG}"
    temporary.write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    temporary.replace(folder / CONFIG)


def seeds(folder: Path) -> list[int]:
    """The seeds whose policies are in a folder.

    Raises:
        ArtifactError: ``policy.json`` cannot be read or lists no seeds.
    """
    listed = read_description(folder)["seeds"]
    if not isinstance(listed, list):
        raise ArtifactError(f"{folder / CONFIG}: `seeds` is not a list; {REPAIR}")
    return [seed for seed in listed if policy_file(folder, seed).is_file()]


def read_description(folder: Path) -> dict[str, Any]:
    """Content of ``policy.json``, as :func:`describe` writes it.

    Raises:
        ArtifactError: The file cannot be read, or a key is missing.
    """
    try:
        description = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{folder / CONFIG}: cannot be read as JSON: {error}") from None
    if not isinstance(description, dict):
        raise ArtifactError(f"{folder / CONFIG}: not a JSON object; {REPAIR}")
    missing = [key for key in KEYS if key not in description]
    if missing:
        raise ArtifactError(
            f"{folder / CONFIG}: no `{'`, `'.join(missing)}`, so another version of Align wrote it; "
            f"{REPAIR}"
        )
    return description


def policy_file(folder: Path, seed: int) -> Path:
    """Path of the weights of a seed."""
    return folder / f"policy-{seed}.safetensors"


def load(folder: Path, seed: int) -> LoadedPolicy:
    """Build the policy of a seed from ``policy.json`` and ``policy-<seed>.safetensors``.

    Raises:
        ArtifactError: One of the files is damaged, or they do not fit each other.
    """
    description = read_description(folder)
    file = policy_file(folder, seed)
    try:
        spec = EnvSpec(**description["spec"])
        shape = {key: description[key] for key in ("hidden_sizes", "activation", "distribution")}
        policy = Policy(spec, **shape)
        tensors = load_file(file)
        weights = {k.removeprefix(PREFIX): v for k, v in tensors.items() if k.startswith(PREFIX)}
        policy.load_state_dict(weights)
        statistics = _load_statistics(spec, tensors)
        environment, options = description["environment"], dict(description["options"])
        if not isinstance(environment, str):
            raise TypeError("`environment` is not text")
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ArtifactError(
            f"{file}, {CONFIG}: damaged, or not of one policy ({reason}); {REPAIR}"
        ) from None
    return LoadedPolicy(environment, options, policy, statistics, spec.n_agents)


def _load_statistics(spec: EnvSpec, tensors: Mapping[str, torch.Tensor]) -> RunningMeanStd | None:
    if "statistics.mean" not in tensors:
        return None
    statistics = RunningMeanStd(shape=(spec.n_features,))
    for name in ("mean", "var"):
        values = tensors[f"statistics.{name}"].numpy()
        if values.shape != (spec.n_features,):
            raise ValueError(f"statistics.{name} has the shape {values.shape}")
        setattr(statistics, name, values)
    statistics.count = float(tensors["statistics.count"])
    return statistics


def play_episodes(
    trained: LoadedPolicy, *, render_mode: str, episodes: int, seed: int
) -> Iterator[Frame]:
    """Play greedy episodes in a new environment, with a frame before each action and at the end."""
    env = flattened(gymnasium.make(trained.environment, render_mode=render_mode, **trained.options))
    policy = trained.policy
    try:
        for episode in range(episodes):
            observation, _ = env.reset(seed=seed + episode)
            total, ended = 0.0, False
            while not ended:
                yield Frame(env.render(), None)
                row = normalize(
                    features(np.asarray([observation]), env.observation_space), trained.statistics
                )
                with torch.no_grad():
                    outputs = policy.body(torch.from_numpy(row.astype(np.float32)))
                    actions = policy.head.env_actions(policy.head.act(outputs, 0.0))
                observation, reward, terminated, truncated, _ = env.step(actions[0])
                total += float(reward)
                ended = terminated or truncated
            yield Frame(env.render(), total)
    finally:
        env.close()


def render_errors() -> tuple[type[Exception], ...]:
    """The exceptions that rendering raises without a screen or without OpenGL."""
    errors: list[type[Exception]] = [gymnasium.error.Error]
    for module, name in (("pygame", "error"), ("mujoco", "FatalError"), ("glfw", "GLFWError")):
        with contextlib.suppress(ImportError, AttributeError):
            errors.append(getattr(importlib.import_module(module), name))
    return tuple(errors)


def frames_per_second(trained: LoadedPolicy) -> int:
    """Number of frames of the environment per second of its simulated time."""
    env = gymnasium.make(trained.environment, **trained.options)
    try:
        return int(env.metadata.get("render_fps", 30))
    finally:
        env.close()


def write_gif(frames: list[Any], file: Path, *, fps: int) -> None:
    """Write frames ``[height, width, 3]`` as a GIF in real time, at most 25 frames per second."""
    from PIL import Image

    every = max(1, round(fps / GIF_FRAMES_PER_SECOND))
    images = [
        Image.fromarray(frame).quantize(64, dither=Image.Dither.NONE) for frame in frames[::every]
    ]
    first, *others = images
    # GIF durations are in hundredths of a second.
    duration = max(2, round(100 * every / fps)) * 10
    first.save(file, save_all=True, append_images=others, duration=duration, loop=0, optimize=False)
