"""A trained policy as files: its weights, its statistics, and what it takes to build it again; and how to watch it."""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium.wrappers.utils import RunningMeanStd
from safetensors.torch import load_file, save_file
from torch import nn

from align.control.environments import scaled
from align.control.networks import Policy
from align.control.spaces import EnvSpec

CONFIG = "policy.json"
FRAMES_A_SECOND = 25


@dataclass(frozen=True, slots=True)
class LoadedPolicy:
    """A policy that can be asked for actions, with the statistics that it was trained on."""

    environment: str
    options: Mapping[str, Any]
    policy: Policy
    statistics: RunningMeanStd | None


class Played(NamedTuple):
    """One frame (None where a window shows it); at an episode's end its return too."""

    frame: Any
    returned: float | None


def save(
    file: Path, policy: Policy, critic: nn.Module | None, statistics: RunningMeanStd | None
) -> None:
    """Write weights and statistics."""
    tensors = {f"policy.{name}": tensor for name, tensor in policy.state_dict().items()}
    if critic is not None:
        tensors |= {f"critic.{name}": tensor for name, tensor in critic.state_dict().items()}
    if statistics is not None:
        for name in ("mean", "var"):
            tensors[f"statistics.{name}"] = torch.from_numpy(getattr(statistics, name).copy())
        tensors["statistics.count"] = torch.tensor(statistics.count, dtype=torch.float64)
    temporary = file.with_suffix(".tmp")
    save_file(tensors, temporary)
    temporary.replace(file)


def describe(
    folder: Path,
    *,
    environment: str,
    options: Mapping[str, Any],
    world: EnvSpec,
    hidden: Sequence[int],
    activation: str,
    distribution: str | None,
    seeds: Sequence[int],
) -> None:
    """Write down what it takes to build the policies in a folder again."""
    config = {
        "environment": environment,
        "options": dict(options),
        "world": world._asdict(),
        "hidden": list(hidden),
        "activation": activation,
        "distribution": distribution,
        "seeds": list(seeds),
    }
    temporary = folder / f".{CONFIG}"
    temporary.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    temporary.replace(folder / CONFIG)


def load(folder: Path, seed: int) -> LoadedPolicy:
    """Build the policy of a seed again, from ``policy.json`` and ``policy-<seed>.safetensors``."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    world = EnvSpec(**config["world"])
    shape = {key: config[key] for key in ("hidden", "activation", "distribution")}
    policy = Policy(world, **shape)
    tensors = load_file(folder / f"policy-{seed}.safetensors")
    mine = {k.removeprefix("policy."): v for k, v in tensors.items() if k.startswith("policy.")}
    policy.load_state_dict(mine)
    statistics = None
    if "statistics.mean" in tensors:
        statistics = RunningMeanStd(shape=(world.features,))
        statistics.mean = tensors["statistics.mean"].numpy()
        statistics.var = tensors["statistics.var"].numpy()
        statistics.count = float(tensors["statistics.count"])
    return LoadedPolicy(config["environment"], config["options"], policy, statistics)


def watch(trained: LoadedPolicy, *, render: str, episodes: int, seed: int) -> Iterator[Played]:
    """Play episodes greedily, in an environment of its own, and render what is seen before each action and at the end."""
    env = gymnasium.make(trained.environment, render_mode=render, **trained.options)
    policy = trained.policy
    try:
        for episode in range(episodes):
            observation, _ = env.reset(seed=seed + episode)
            total, over = 0.0, False
            while not over:
                yield Played(env.render(), None)
                seen = scaled(np.asarray(observation).reshape(1, -1), trained.statistics)
                with torch.no_grad():
                    outputs = policy.body(torch.from_numpy(seen.astype(np.float32)))
                    actions = policy.head.to_world(policy.head.act(outputs, 0.0))
                observation, reward, terminated, truncated, _ = env.step(actions[0])
                total += float(reward)
                over = terminated or truncated
            yield Played(env.render(), total)
    finally:
        env.close()


def cannot_render() -> tuple[type[Exception], ...]:
    """What is raised where there is no screen, or no OpenGL."""
    kinds: list[type[Exception]] = [gymnasium.error.Error]
    for module, name in (("pygame", "error"), ("mujoco", "FatalError"), ("glfw", "GLFWError")):
        with contextlib.suppress(ImportError, AttributeError):
            kinds.append(getattr(importlib.import_module(module), name))
    return tuple(kinds)


def frames_a_second(trained: LoadedPolicy) -> int:
    """How many frames of the environment are a second of its time."""
    found = gymnasium.make(trained.environment, **trained.options)
    try:
        return int(found.metadata.get("render_fps", 30))
    finally:
        found.close()


def write_gif(frames: list[Any], file: Path, *, fps: int) -> None:
    """Write frames ``[height, width, 3]`` as a GIF of 25 frames a second at most, in true time."""
    from PIL import Image

    every = max(1, round(fps / FRAMES_A_SECOND))
    pictures = [
        Image.fromarray(frame).quantize(64, dither=Image.Dither.NONE) for frame in frames[::every]
    ]
    first, *others = pictures
    # GIF counts in hundredths of a second.
    duration = max(2, round(100 * every / fps)) * 10
    first.save(file, save_all=True, append_images=others, duration=duration, loop=0, optimize=False)
