"""An environment with a cost: drive a road whose sections are dry or icy.

``align.control.icy_road:IcyRoad-v0`` is its id in a recipe. With a limit on the cost, the best
speed of a section is its grip times a number that the limit determines, in closed form.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

Array = NDArray[Any]
SECTIONS = 20
"""Sections of the road that cost and count."""
DRY, ICY = 1.0, 0.25
"""Grip of a dry section and of an icy one."""
PIXELS = 200
"""Width of an image."""


class IcyRoad(gymnasium.Env[Any, Any]):
    """A step is a section. The action is the speed, from 0 to 1, on the next section.

    The reward of a section is the speed there, and its cost is the squared speed divided by the
    grip. The effects of an action thus follow one step later. Sections are dry or icy with equal
    probability; the vehicle starts at rest, and an episode terminates after the last section.

    The observation has the speed and the grip of the section, the grip of the next one, and the
    part of the road ahead.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None) -> None:
        self.observation_space = spaces.Box(0.0, 1.0, (4,), np.float32)
        self.action_space = spaces.Box(0.0, 1.0, (1,), np.float32)
        self.render_mode = render_mode

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Start at rest before a new road."""
        super().reset(seed=seed)
        icy = self.np_random.random(SECTIONS) < 0.5
        self.grips = np.append(np.where(icy, ICY, DRY), DRY)  # before and after the road: dry
        self.section, self.speed = 0, 0.0
        return self._observation(), {}

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Pass the present section, and reach the next one with the speed of the action."""
        speed, grip = self.speed, self.grips[self.section - 1]
        self.speed = float(np.clip(action, 0.0, 1.0)[0])
        self.section += 1
        ended = self.section > SECTIONS
        return self._observation(), speed, ended, False, {"cost": speed**2 / grip}

    def render(self) -> Array:
        """The road in gray and light blue; the vehicle's bar is as long as it is fast."""
        image = np.full((PIXELS // 4, PIXELS, 3), 255, np.uint8)
        width = PIXELS // SECTIONS
        for index, grip in enumerate(self.grips[:SECTIONS]):
            color = (150, 150, 150) if grip == DRY else (170, 215, 240)
            image[30:, index * width : (index + 1) * width] = color
        left = max(0, self.section - 1) * width
        image[32:46, left : left + width] = (60, 90, 200)
        image[8:20, : int(self.speed * PIXELS)] = (200, 90, 60)
        return image

    def _observation(self) -> Array:
        ahead = max(0, SECTIONS - self.section)
        here, following = self.grips[self.section - 1], self.grips[min(self.section, SECTIONS)]
        return np.array([self.speed, here, following, ahead / SECTIONS], np.float32)


gymnasium.register("IcyRoad-v0", f"{__name__}:IcyRoad", max_episode_steps=SECTIONS + 1)
