"""Gymnasium environments in one process each, for environments whose steps are slow.

Processes are forked by a server that has imported this module only, so a worker starts without
torch and without the threads of the training process.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import queue
from collections.abc import Iterable, Iterator, Mapping
from multiprocessing import connection
from typing import Any

import gymnasium
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from gymnasium.vector.async_vector_env import AsyncState, _async_worker
from gymnasium.wrappers import FlattenObservation

from align.control.spaces import silence_mujoco
from align.errors import UserError

SECONDS_TO_END = 5.0
"""Time in which a worker that failed reports its error, or ends, for its exit code."""


def flattened(env: Any) -> Any:
    """The environment, with the parts of a dictionary observation as one vector."""
    if isinstance(env.observation_space, gymnasium.spaces.Dict):
        return FlattenObservation(env)
    return env


class Workers(AsyncVectorEnv[Any, Any]):
    """Environments in one process each, which reset in the step that ends an episode.

    Where one fails, all processes are ended, and the error is one line.
    """

    def __init__(self, spec: EnvSpec, options: Mapping[str, Any], n_envs: int) -> None:
        self.name = spec.id
        self._state, self.parent_pipes, self.processes = AsyncState.DEFAULT, [], []
        has_server = "forkserver" in multiprocessing.get_all_start_methods()
        if has_server:
            multiprocessing.set_forkserver_preload([__name__])
        with self._one_line():
            super().__init__(
                [functools.partial(_make, spec, options)] * n_envs,
                context="forkserver" if has_server else "spawn",
                worker=_work,
                autoreset_mode=AutoresetMode.SAME_STEP,
            )

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> Any:
        """Start new episodes, with the seeds ``seed``, ``seed`` + 1, and so on."""
        with self._one_line():
            return super().reset(seed=seed, options=options)

    def step(self, actions: Any) -> Any:
        """Step all environments."""
        with self._one_line():
            return super().step(actions)

    @contextlib.contextmanager
    def _one_line(self) -> Iterator[None]:
        """End all workers on any error, and report the end of a worker in one line.

        Raises:
            UserError: An environment raised an error, or its process has ended.
        """
        try:
            yield
        except BaseException as error:
            text = self._exit_codes() if isinstance(error, EOFError | ConnectionError) else None
            self._state = AsyncState.DEFAULT  # nothing is waited for
            self.close(terminate=True)
            if text is None:
                raise
            raise self._failure(text) from None

    def _raise_if_errors(self, successes: Iterable[bool]) -> None:
        if all(successes):
            return
        try:
            _, kind, value, _ = self.error_queue.get(timeout=SECONDS_TO_END)
        except queue.Empty:  # an error that cannot be pickled
            raise EOFError from None
        raise self._failure(f"failed: {kind.__name__}: {' '.join(str(value).split())}")

    def _exit_codes(self) -> str:
        ended = connection.wait([p.sentinel for p in self.processes], SECONDS_TO_END)
        codes = [str(p.exitcode) for p in self.processes if p.sentinel in ended]
        return f"ended with exit code {', '.join(codes)}; -9 often is a lack of memory"

    def _failure(self, text: str) -> UserError:
        return UserError(
            f"a worker process of {self.name} {text}; `vectorization: gymnasium` steps the "
            "environments in the training process and shows where an error arises"
        )


def _make(spec: EnvSpec, options: Mapping[str, Any]) -> Any:
    silence_mujoco(spec.id)
    return flattened(gymnasium.make(spec, **options))


def _work(*arguments: Any) -> None:
    """Serve one environment.

    Ctrl-C and schedulers signal the whole process group, which a worker therefore leaves: the
    training process saves a checkpoint first. Where that is killed, its connections end workers.
    """
    os.setpgrp()
    with contextlib.suppress(ConnectionError):
        _async_worker(*arguments)
