"""A goal environment: move a point in a square to a goal, with a sparse reward.

``align.control.point_reach:PointReach-v0`` is its id in a recipe. Its observations have the parts
that hindsight replay needs, as in the environments of Gymnasium-Robotics.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

Array = NDArray[Any]
SPEED = 0.1
"""Largest distance of one step in each direction."""
RADIUS = 0.05
"""Largest distance from the goal that counts as reached."""
PIXELS = 200
"""Width and height of an image."""


class PointReach(gymnasium.Env[Any, Any]):
    """The reward is 0 where the point has reached the goal, and -1 elsewhere.

    An episode continues until its time limit, as in FetchReach; ``is_success`` tells whether the
    point is at the goal.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None) -> None:
        square = spaces.Box(-1.0, 1.0, (2,), np.float32)
        parts = dict.fromkeys(("observation", "achieved_goal", "desired_goal"), square)
        self.observation_space = spaces.Dict({**parts})
        self.action_space = square
        self.render_mode = render_mode

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Array], dict[str, Any]]:
        """Start at the center, with a new goal."""
        super().reset(seed=seed)
        self.point = np.zeros(2, np.float32)
        self.goal = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self._observation(), {}

    def step(self, action: Array) -> tuple[dict[str, Array], float, bool, bool, dict[str, Any]]:
        """Move by the action, within the square."""
        move = SPEED * np.clip(action, -1, 1)
        self.point = np.clip(self.point + move, -1, 1).astype(np.float32)
        reward = float(self.compute_reward(self.point, self.goal, {}))
        return self._observation(), reward, False, False, {"is_success": reward == 0}

    def compute_reward(self, achieved_goal: Array, desired_goal: Array, info: Any) -> Array:
        """Rewards of one step or of many."""
        distances = np.linalg.norm(achieved_goal - desired_goal, axis=-1)
        return -(distances > RADIUS).astype(np.float32)

    def render(self) -> Array:
        """The goal in green, the point in blue."""
        image = np.full((PIXELS, PIXELS, 3), 255, np.uint8)
        for place, color in ((self.goal, (80, 180, 80)), (self.point, (60, 90, 200))):
            x, y = ((place + 1) / 2 * (PIXELS - 1)).astype(int)
            half = int(RADIUS * PIXELS / 2)
            image[max(0, y - half) : y + half + 1, max(0, x - half) : x + half + 1] = color
        return image[::-1]

    def _observation(self) -> dict[str, Array]:
        return {
            "observation": self.point.copy(),
            "achieved_goal": self.point.copy(),
            "desired_goal": self.goal.copy(),
        }


gymnasium.register("PointReach-v0", f"{__name__}:PointReach", max_episode_steps=50)
