"""Observation and action spaces of an environment, checked before anything runs.

Imports Gymnasium only when an environment is inspected. Left out: image observations, and several
discrete actions at once.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import sys
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from align.config.base import GymEnvironment
from align.errors import did_you_mean, not_installed, printable

if TYPE_CHECKING:
    import gymnasium


_EXTRAS = {
    "box2d": "box2d",
    "swig": "box2d",
    "mujoco": "mujoco",
    "pyspiel": "games",
    "mpe2": "multi-agent",
    "pettingzoo": "multi-agent",
    "pygame": "control",
}


class EnvSpec(NamedTuple):
    """The sizes of the spaces of an environment, and the bounds of its actions."""

    n_features: int
    """Length of the flattened observation."""
    n_actions: int
    """Number of discrete actions, or the length of a continuous action."""
    low: list[float] | None
    """Lower bounds of continuous actions; None for discrete ones."""
    high: list[float] | None
    """Upper bounds of continuous actions; None for discrete ones."""
    n_agents: int = 1
    """Number of agents, whose observations and actions follow each other in equal parts."""


class UnfitError(Exception):
    """An environment cannot be used; ``key`` is the key of the recipe that is wrong."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


class NotInstalledError(UnfitError):
    """An environment, or Gymnasium itself, needs a package that is not installed."""


def inspect_env(environment: GymEnvironment) -> EnvSpec:
    """Make one environment and read its spaces.

    Raises:
        NotInstalledError: A package is missing.
        UnfitError: The environment does not exist, cannot be made, does not accept its options, has
            no time limit, or has spaces that no policy supports.
    """
    try:
        import gymnasium
    except ImportError:
        raise NotInstalledError(
            "environment", not_installed("Gymnasium", "-e '.[control]'")
        ) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a newer version of the environment exists
        env = _make(gymnasium, environment.name, environment.options)
    try:
        spec = _spec(env, environment.name, environment.distribution)
        _check_needs(env, environment)
        _check_options(env, environment)
        if env.spec is None or env.spec.max_episode_steps is None:
            raise UnfitError(
                "environment_options",
                f"{environment.name} has no time limit, so an episode may never end; set "
                "`environment_options: {max_episode_steps: …}`",
            )
        return spec
    finally:
        env.close()


def silence_mujoco(environment: str) -> None:
    """Suppress MuJoCo's warning about Gymnasium's outdated model files; print all others.

    By default MuJoCo prints it for each environment, and writes it to MUJOCO_LOG.TXT in the working
    directory.
    """
    import gymnasium

    spec = gymnasium.registry.get(environment)
    if spec is None or "mujoco" not in str(spec.entry_point):
        return
    with contextlib.suppress(ImportError):
        mujoco: Any = importlib.import_module("mujoco")
        mujoco.set_mju_user_warning(_print_warning)


def _print_warning(text: str) -> None:
    if "settotalmass" not in text:
        print(f"MuJoCo: {printable(text)}", file=sys.stderr)


def _make(gymnasium: Any, name: str, options: Mapping[str, Any]) -> gymnasium.Env[Any, Any]:
    errors = gymnasium.error
    silence_mujoco(name)
    try:
        return gymnasium.make(name, **options)
    except errors.DependencyNotInstalled as error:
        text = " ".join(str(error).split())
        extra = next((e for word, e in _EXTRAS.items() if word in text.lower()), "control")
        raise NotInstalledError(
            "environment", f"{name} needs more packages: pip install -e '.[{extra}]'"
        ) from None
    except (errors.UnregisteredEnv, errors.DeprecatedEnv, errors.Error, ImportError) as error:
        if isinstance(error, ImportError) and ":" not in name:
            raise NotInstalledError("environment", f"{name} needs a package: {error}") from None
        known = sorted(key for key in gymnasium.registry if "/" not in key)
        hint = did_you_mean(name, known) or "; gymnasium.pprint_registry() lists them"
        raise UnfitError("environment", f"unknown environment {name}{hint}") from None
    except Exception as error:  # of any kind: many environments do not check their options
        raise _unfit(name, options, error) from None


def _unfit(name: str, options: Mapping[str, Any], error: Exception) -> UnfitError:
    """The error about an environment that raised ``error`` when it was made or stepped."""
    text = " ".join(str(error).split())
    if not isinstance(error, (TypeError, ValueError)):
        text = f"{type(error).__name__}: {text}"
    if options or isinstance(error, TypeError):  # a required option is missing
        return UnfitError("environment_options", f"{name} does not accept {dict(options)}: {text}")
    return UnfitError("environment", f"{name} cannot be made: {text}; change the environment")


def _check_options(env: gymnasium.Env[Any, Any], environment: GymEnvironment) -> None:
    """Take a step, where some environments use their options for the first time.

    Those of games are used when the game is loaded, and its moves may be illegal. With a
    ``render_mode``, which only ``align play`` sets, a step would open a window.
    """
    options = environment.options.keys() - {"max_episode_steps"}
    if options and "render_mode" not in options and not hasattr(env.unwrapped, "game"):
        _first_step(env, environment)


def _first_step(env: gymnasium.Env[Any, Any], environment: GymEnvironment) -> Mapping[str, Any]:
    """The ``info`` of the first step of an episode, with a random action."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            env.reset(seed=0)
            env.action_space.seed(0)
            *_, info = env.step(env.action_space.sample())
    except Exception as error:  # as when it is made
        raise _unfit(environment.name, environment.options, error) from None
    return info


def _check_needs(env: gymnasium.Env[Any, Any], environment: GymEnvironment) -> None:
    from gymnasium.spaces import Box, Dict, Discrete

    name, needs = environment.name, environment.needs
    observations, actions = env.observation_space, env.action_space
    fulfilled = {
        "numbered states": (isinstance(observations, Discrete), observations),
        "discrete actions": (isinstance(actions, Discrete), actions),
        "continuous actions": (isinstance(actions, Box), actions),
        "bounded continuous actions": (
            isinstance(actions, Box) and actions.is_bounded(),
            actions,
        ),
        "several agents": (_n_agents(env) > 1, "one agent"),
        "a game": (hasattr(env.unwrapped, "game"), "no game of OpenSpiel"),
        "goals": (
            isinstance(observations, Dict) and {"achieved_goal", "desired_goal"} <= {*observations},
            observations,
        ),
        "a table of transitions": (hasattr(env.unwrapped, "P"), "no attribute `P`"),
    }
    if _n_agents(env) > 1 and "several agents" not in needs:
        raise UnfitError(
            "environment",
            f"{name} has {_n_agents(env)} agents, but the algorithm trains one; change the "
            "environment, or set `algorithm: maddpg`",
        )
    for need in needs:
        if need == "a cost":
            _check_cost(env, environment)
            continue
        is_fulfilled, has = fulfilled[need]
        if not is_fulfilled:
            raise UnfitError(
                "environment",
                f"{name} has {has}, but the algorithm needs {need}; change the environment or "
                "`algorithm`",
            )


def _n_agents(env: gymnasium.Env[Any, Any]) -> int:
    return int(getattr(env.unwrapped, "n_agents", 1))


def _check_cost(env: gymnasium.Env[Any, Any], environment: GymEnvironment) -> None:
    if "cost" not in _first_step(env, environment):
        raise UnfitError(
            "cost_limit",
            f"{environment.name} has no `cost` in the `info` of a step; remove the key, or change "
            "the environment",
        )


def _n_features(space: gymnasium.Space[Any]) -> int | None:
    """Length of observations as one vector; None if they are none."""
    from gymnasium.spaces import Box, Dict, Discrete

    if isinstance(space, Discrete) and space.start == 0:
        return int(space.n)
    if isinstance(space, Box) and len(space.shape) <= 1:
        return math.prod(space.shape)
    if isinstance(space, Dict) and all(isinstance(part, Box) for part in space.values()):
        lengths = [_n_features(part) for part in space.values()]
        return None if None in lengths else sum(length or 0 for length in lengths)
    return None


def _spec(env: gymnasium.Env[Any, Any], name: str, distribution: str | None) -> EnvSpec:
    from gymnasium.spaces import Box, Discrete

    observations, actions = env.observation_space, env.action_space
    n_features = _n_features(observations)
    if n_features is None:
        raise UnfitError(
            "environment",
            f"{name} has observations {observations}; expected one vector of numbers, a Box of one "
            "dimension, a Dict of such vectors, or numbered states, Discrete from 0",
        )
    if isinstance(actions, Discrete) and actions.start == 0:
        if distribution not in (None, "categorical"):
            raise UnfitError(
                "distribution",
                f"{name} has {actions.n} discrete actions; expected categorical, or remove the key",
            )
        return EnvSpec(n_features, int(actions.n), None, None)
    if not isinstance(actions, Box):
        raise UnfitError(
            "environment", f"{name} has actions {actions}; expected Discrete from 0, or a Box"
        )
    if distribution == "categorical":
        raise UnfitError(
            "distribution",
            f"{name} has continuous actions, {actions}; expected gaussian or squashed, or remove "
            "the key",
        )
    low, high = actions.low.ravel().tolist(), actions.high.ravel().tolist()
    if distribution == "squashed" and not all(map(math.isfinite, low + high)):
        raise UnfitError(
            "distribution", f"{name} has unbounded actions, {actions}; expected gaussian"
        )
    return EnvSpec(n_features, math.prod(actions.shape), low, high, _n_agents(env))
