"""Thousands of environments in one tensor: CartPole and Pendulum, on the CPU or a GPU.

A step is a few operations on tensors with one entry per environment, so its time hardly depends on
the number of environments below a thousand. The equations are those of Gymnasium, step by step.
Environments reset in the step that ends an episode (``AutoresetMode.SAME_STEP``), with random
numbers of one generator. Left out: rendering, and environments with contacts.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import gymnasium
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from jaxtyping import Bool, Float, Shaped
from numpy.typing import NDArray
from torch import Tensor


class Transition(NamedTuple):
    """One step of all environments, as tensors on their device."""

    observations: Float[Tensor, "envs features"]
    """Next observations; after an episode, the first of the next one."""
    rewards: Float[Tensor, " envs"]
    terminated: Bool[Tensor, " envs"]
    truncated: Bool[Tensor, " envs"]
    final_observations: Float[Tensor, "envs features"]
    """Observations before the reset; equal to ``observations`` inside an episode."""


class BatchedEnvironment(VectorEnv[NDArray[Any], NDArray[Any], NDArray[Any]]):
    """Environments whose states are the columns of one tensor.

    ``reset`` and ``step`` follow Gymnasium's vector interface with arrays; :meth:`advance` takes
    and returns tensors, so that nothing leaves a GPU.
    """

    metadata = VectorEnv.metadata | {"autoreset_mode": AutoresetMode.SAME_STEP}
    environment: ClassVar[str]
    """Id of the Gymnasium environment that has the same equations."""

    def __init__(
        self, n_envs: int, *, max_episode_steps: int | None = None, device: str = "cpu"
    ) -> None:
        """``n_envs`` environments; the default time limit is that of Gymnasium."""
        spec = gymnasium.spec(self.environment)
        single = spec.make()
        self.num_envs = n_envs
        self.single_observation_space = single.observation_space
        self.single_action_space = single.action_space
        self.observation_space = batch_space(single.observation_space, n_envs)
        self.action_space = batch_space(single.action_space, n_envs)
        single.close()
        limit = max_episode_steps or spec.max_episode_steps
        self.max_episode_steps = math.inf if limit is None else limit
        self.device = torch.device(device)
        self.generator = torch.Generator(self.device)
        self.steps = torch.zeros(n_envs, dtype=torch.int64, device=self.device)
        self.state = self.initial_states()

    def initial_states(self) -> Float[Tensor, "variables envs"]:
        """Random first states of all environments, in float64."""
        raise NotImplementedError

    def next_states(
        self, states: Float[Tensor, "variables envs"], actions: Shaped[Tensor, "envs ..."]
    ) -> tuple[Float[Tensor, "variables envs"], Float[Tensor, " envs"]]:
        """States and rewards after one step."""
        raise NotImplementedError

    def is_terminal(self, states: Float[Tensor, "variables envs"]) -> Bool[Tensor, " envs"]:
        """Whether a state ends the episode."""
        raise NotImplementedError

    def observe(self, states: Float[Tensor, "variables envs"]) -> Float[Tensor, "envs features"]:
        """Observations of states, in float32."""
        raise NotImplementedError

    @torch.no_grad()
    def advance(self, actions: Shaped[Tensor, "envs ..."]) -> Transition:
        """Step all environments, and reset those whose episode ends."""
        self.state, rewards = self.next_states(self.state, actions)
        self.steps += 1
        terminated = self.is_terminal(self.state)
        truncated = self.steps >= self.max_episode_steps
        final_observations = self.observe(self.state)
        ended = terminated | truncated
        # On a GPU, asking whether any episode ended would wait for the step; random numbers of
        # resets are drawn in every step, so that the result does not depend on the device's speed.
        self.state = torch.where(ended, self.initial_states(), self.state)
        self.steps.masked_fill_(ended, 0)
        return Transition(
            self.observe(self.state), rewards, terminated, truncated, final_observations
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[Any], dict[str, Any]]:
        """Start new episodes in all environments."""
        if seed is not None:
            self.generator.manual_seed(seed)
        self.steps.zero_()
        self.state = self.initial_states()
        return self.observe(self.state).cpu().numpy(), {}

    def step(
        self, actions: NDArray[Any]
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Step all environments with an array of actions."""
        moved = self.advance(torch.from_numpy(actions).to(self.device))
        observations, rewards, terminated, truncated, finals = (
            tensor.cpu().numpy() for tensor in moved
        )
        ended = terminated | truncated
        info = {"final_obs": finals, "_final_obs": ended} if ended.any() else {}
        return observations, rewards, terminated, truncated, info

    def _uniform(self, *bounds: float) -> Float[Tensor, "variables envs"]:
        """One row per bound, uniform between its negative and it."""
        shape = (len(bounds), self.num_envs)
        unit = torch.rand(shape, dtype=torch.float64, device=self.device, generator=self.generator)
        return (2 * unit - 1) * unit.new_tensor(bounds)[:, None]


class BatchedCartPole(BatchedEnvironment):
    """Gymnasium's ``CartPole-v1``: position, velocity, angle and angular velocity.

    Source: Barto, Sutton and Anderson 1983, IEEE Transactions SMC-13, 834 to 846; equations without
    friction and Euler's method as in Gymnasium.
    """

    environment = "CartPole-v1"
    GRAVITY, MASS, POLE_MASS, HALF_LENGTH, FORCE, SECONDS = 9.8, 1.1, 0.1, 0.5, 10.0, 0.02
    MAX_POSITION, MAX_ANGLE = 2.4, 12 * 2 * math.pi / 360

    def initial_states(self) -> Float[Tensor, "4 envs"]:
        """All variables uniform within 0.05 of 0."""
        return self._uniform(0.05, 0.05, 0.05, 0.05)

    def next_states(
        self, states: Float[Tensor, "4 envs"], actions: Shaped[Tensor, " envs"]
    ) -> tuple[Float[Tensor, "4 envs"], Float[Tensor, " envs"]]:
        """One step of Euler's method; the reward is 1."""
        _, velocity, angle, angular_velocity = states
        cosine, sine = angle.cos(), angle.sin()
        moment = self.POLE_MASS * self.HALF_LENGTH
        force = (2 * actions - 1) * self.FORCE
        push = (force + moment * angular_velocity.square() * sine) / self.MASS
        angular_acceleration = (self.GRAVITY * sine - cosine * push) / (
            self.HALF_LENGTH * (4 / 3 - self.POLE_MASS * cosine.square() / self.MASS)
        )
        acceleration = push - moment * angular_acceleration * cosine / self.MASS
        slopes = torch.stack([velocity, acceleration, angular_velocity, angular_acceleration])
        return states + self.SECONDS * slopes, torch.ones(self.num_envs, device=self.device)

    def is_terminal(self, states: Float[Tensor, "4 envs"]) -> Bool[Tensor, " envs"]:
        """Whether the cart has left the track or the pole has fallen."""
        return (states[0].abs() > self.MAX_POSITION) | (states[2].abs() > self.MAX_ANGLE)

    def observe(self, states: Float[Tensor, "4 envs"]) -> Float[Tensor, "envs 4"]:
        """The four variables."""
        return states.T.to(torch.float32, memory_format=torch.contiguous_format)


class BatchedPendulum(BatchedEnvironment):
    """Gymnasium's ``Pendulum-v1``: angle from upright, and angular velocity."""

    environment = "Pendulum-v1"
    GRAVITY, MASS, LENGTH, SECONDS = 10.0, 1.0, 1.0, 0.05
    MAX_SPEED, MAX_TORQUE = 8.0, 2.0

    def initial_states(self) -> Float[Tensor, "2 envs"]:
        """Any angle; a velocity of at most 1."""
        return self._uniform(math.pi, 1.0)

    def next_states(
        self, states: Float[Tensor, "2 envs"], actions: Float[Tensor, "envs 1"]
    ) -> tuple[Float[Tensor, "2 envs"], Float[Tensor, " envs"]]:
        """One step; the reward is minus the squares of angle, velocity and torque."""
        angle, speed = states
        torque = actions[:, 0].clamp(-self.MAX_TORQUE, self.MAX_TORQUE)
        from_upright = torch.remainder(angle + math.pi, 2 * math.pi) - math.pi
        rewards = -(from_upright.square() + 0.1 * speed.square() + 0.001 * torque.square())
        acceleration = (
            3 * self.GRAVITY / (2 * self.LENGTH) * angle.sin()
            + 3 / (self.MASS * self.LENGTH**2) * torque
        )
        speed = (speed + acceleration * self.SECONDS).clamp(-self.MAX_SPEED, self.MAX_SPEED)
        return torch.stack([angle + speed * self.SECONDS, speed]), rewards.float()

    def is_terminal(self, states: Float[Tensor, "2 envs"]) -> Bool[Tensor, " envs"]:
        """Never: only the time limit ends an episode."""
        return torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)

    def observe(self, states: Float[Tensor, "2 envs"]) -> Float[Tensor, "envs 3"]:
        """Cosine and sine of the angle, and the velocity."""
        angle, speed = states
        return torch.stack([angle.cos(), angle.sin(), speed], dim=1).float()


BATCHED: dict[str, type[BatchedEnvironment]] = {
    kind.environment: kind for kind in (BatchedCartPole, BatchedPendulum)
}
"""The batched environments, by the id of Gymnasium's."""
