"""An environment whose third step fails, for tests of worker processes."""

from __future__ import annotations

import os
import signal
from typing import Any

import gymnasium
import numpy as np

ID = "helpers.failing_env:Failing-v0"


class Failing(gymnasium.Env[Any, Any]):
    """Raises an error in the third step, or has its process killed."""

    def __init__(self, how: str) -> None:
        self.observation_space = gymnasium.spaces.Box(0.0, 9.0, (1,), np.float32)
        self.action_space = gymnasium.spaces.Discrete(2)
        self.how, self.time = how, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        self.time += 1
        if self.time == 3 and self.how == "raise":
            raise ValueError("the third step\nis missing")
        if self.time == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return np.zeros(1, np.float32), 0.0, False, False, {}


gymnasium.register("Failing-v0", Failing, max_episode_steps=9)
