"""What can be known of an environment before anything runs: that it is there, and that a policy fits it."""

from __future__ import annotations

import contextlib
import importlib
import math
import sys
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from align.errors import did_you_mean

if TYPE_CHECKING:
    import gymnasium


_EXTRAS = {"box2d": "box2d", "swig": "box2d", "mujoco": "mujoco", "pygame": "control"}


class EnvSpec(NamedTuple):
    """The shapes of an environment. ``low`` and ``high`` bound continuous actions; None for discrete ones."""

    features: int
    actions: int
    """How many actions there are to choose from, or how many numbers an action is."""
    low: list[float] | None
    high: list[float] | None


class UnfitError(Exception):
    """An environment that cannot be used: the key that is wrong, and what is."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


def inspect_env(environment: str, options: Mapping[str, Any], distribution: str | None) -> EnvSpec:
    """Make one environment and read its spaces.

    Raises:
        UnfitError: It is not there, not installed, refuses its options, or has spaces that no policy here fits.
    """
    try:
        import gymnasium
    except ImportError:
        raise UnfitError(
            "environment", "Gymnasium is not installed: pip install -e '.[control]'"
        ) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Gymnasium warns that newer versions of a world exist
        env = _make(gymnasium, environment, options)
    try:
        return _shapes(env, environment, distribution)
    finally:
        env.close()


def silence_mujoco(environment: str) -> None:
    """Keep MuJoCo from saying for each world made that Gymnasium's own model file is out of date; the rest is told.

    Left alone, it says so on the terminal and in a file MUJOCO_LOG.TXT wherever the command was started.
    """
    import gymnasium

    spec = gymnasium.registry.get(environment)
    if spec is None or "mujoco" not in str(spec.entry_point):
        return
    with contextlib.suppress(ImportError):
        mujoco: Any = importlib.import_module("mujoco")
        mujoco.set_mju_user_warning(_hear)


def _hear(text: str) -> None:
    if "settotalmass" not in text:
        print(f"MuJoCo: {text}", file=sys.stderr)


def _make(gymnasium: Any, name: str, options: Mapping[str, Any]) -> gymnasium.Env[Any, Any]:
    errors = gymnasium.error
    silence_mujoco(name)
    try:
        return gymnasium.make(name, **options)
    except errors.DependencyNotInstalled as error:
        text = " ".join(str(error).split())
        extra = next((e for word, e in _EXTRAS.items() if word in text.lower()), "control")
        raise UnfitError(
            "environment", f"{name} needs more packages: pip install -e '.[{extra}]'"
        ) from None
    except (errors.UnregisteredEnv, errors.DeprecatedEnv, errors.Error, ImportError) as error:
        if isinstance(error, ImportError) and ":" not in name:
            raise UnfitError("environment", f"{name} needs a package: {error}") from None
        known = sorted(key for key in gymnasium.registry if "/" not in key)
        hint = did_you_mean(name, known) or "; gymnasium.pprint_registry() lists them"
        raise UnfitError("environment", f"no such environment: {name}{hint}") from None
    except (TypeError, ValueError) as error:
        told = " ".join(str(error).split())
        raise UnfitError("environment_options", f"{name} refuses: {told}") from None


def _shapes(env: gymnasium.Env[Any, Any], name: str, distribution: str | None) -> EnvSpec:
    from gymnasium.spaces import Box, Discrete

    seen, actions = env.observation_space, env.action_space
    if not isinstance(seen, Box) or len(seen.shape) > 1:
        raise UnfitError(
            "environment",
            f"{name} shows {seen}; expected one vector of numbers (no image, no dictionary)",
        )
    features = math.prod(seen.shape)
    if isinstance(actions, Discrete) and actions.start == 0:
        if distribution not in (None, "categorical"):
            raise UnfitError(
                "distribution",
                f"{name} has {actions.n} discrete actions: expected categorical, or leave it out",
            )
        return EnvSpec(features, int(actions.n), None, None)
    if not isinstance(actions, Box):
        raise UnfitError(
            "environment", f"{name} takes {actions}; expected Discrete from 0, or a Box"
        )
    if distribution == "categorical":
        raise UnfitError(
            "distribution",
            f"{name} has continuous actions, {actions}: expected gaussian or squashed, or leave it out",
        )
    low, high = actions.low.ravel().tolist(), actions.high.ravel().tolist()
    if distribution == "squashed" and not all(map(math.isfinite, low + high)):
        raise UnfitError(
            "distribution", f"{name} has unbounded actions, {actions}: expected gaussian"
        )
    return EnvSpec(features, math.prod(actions.shape), low, high)
