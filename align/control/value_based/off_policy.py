"""DQN, SAC and TD3 of Stable-Baselines3, behind the trainer of the stage.

The library trains; here its state is saved and its greedy policy becomes a :class:`Policy`, so that
evaluation, files and ``align play`` are those of all algorithms. The state has the replay buffer,
all random numbers, and the actions of the current episode, which a restored trainer repeats: it
reaches the same weights bit for bit where the environment is deterministic given seed and actions.
Left out: images, and several environments at once.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import gymnasium
import numpy as np
import torch
from stable_baselines3 import DQN, SAC, TD3
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer
from torch import Tensor, nn

from align.config.control.off_policy import OffPolicy
from align.control.networks import Policy
from align.control.seeds import SeededEpisodes, derive_seed
from align.control.spaces import EnvSpec
from align.control.trainer import RECENT, Trainer, recent_mean
from align.control.value_based.q_networks import DoubleDQN, DuelingPolicy
from align.errors import UserError

POINTS = 200
"""Points of the learning curve, unless updates are further apart."""
NEVER = 10**12
"""Episodes between outputs of the library's own logger."""
METRICS = {
    "train/loss": "value_loss",
    "train/critic_loss": "value_loss",
    "train/actor_loss": "policy_loss",
}
"""Names of the metrics of Stable-Baselines3, and those of the learning curve."""


class OffPolicyTrainer(Trainer[OffPolicy]):
    """Trains the networks of one seed."""

    def __init__(self, config: OffPolicy, spec: EnvSpec, seed: int) -> None:
        super().__init__(config, seed)
        self.spec = spec
        env = gymnasium.make(config.environment, **config.environment_options)
        _check_first_episode(config, env)
        self.env = SeededEpisodes(Monitor(env), seed)
        self._random: tuple[Any, Tensor] | None = None
        with self._own_randomness():
            self.model = build_model(config, self.env, derive_seed(seed, 1))
        if config.schedule == "linear":  # that of the library decays over each call of `learn`
            model = self.model
            model.lr_schedule = lambda _: (
                config.learning_rate * max(0.0, 1 - model.num_timesteps / config.steps)
            )
        self.model.set_logger(Logger(None, []))
        self.first_observation, _ = env.reset(seed=seed)

    def train(self) -> dict[str, Any]:
        """Train for a part of the steps."""
        episodes_before, model = self.env.episodes, self.model
        every = self.config.train_every
        n_steps = max(every, self.config.steps // POINTS // every * every)
        with self._own_randomness():
            model.learn(n_steps, log_interval=NEVER, reset_num_timesteps=False)
        self.steps = model.num_timesteps
        self.check_weights(model.policy)
        logged = model.logger.name_to_value
        return {
            "episodes": self.env.episodes - max(1, episodes_before),
            "return": recent_mean([episode["r"] for episode in model.ep_info_buffer or ()]),
            "success": recent_mean([float(success) for success in model.ep_success_buffer or ()]),
            "value": self._value_of_the_first_state(),
            **{METRICS[name]: float(logged[name]) for name in METRICS if name in logged},
        }

    def _value_of_the_first_state(self) -> float | None:
        """DQN's estimate of the best discounted return from the first state of the seed."""
        if not isinstance(self.model, DQN):
            return None
        with torch.no_grad():
            observation, _ = self.model.policy.obs_to_tensor(self.first_observation)
            return float(self.model.q_net(observation).max())

    @property
    def policy(self) -> Policy:
        """The greedy policy: the layers of the network of values, or of the actor."""
        policy = Policy(self.spec, **asdict(self.config.policy_shape))
        trained = [module for module in _greedy_layers(self.model) if isinstance(module, nn.Linear)]
        layers = [module for module in policy.body if isinstance(module, nn.Linear)]
        for layer, source in zip(layers, trained, strict=True):
            layer.load_state_dict(source.state_dict())
        return policy

    # State ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _own_randomness(self) -> Iterator[None]:
        """Give the library, which draws from the global generators, a state of this trainer."""
        outside = np.random.get_state(), torch.get_rng_state()
        if self._random is not None:
            np.random.set_state(self._random[0])
            torch.set_rng_state(self._random[1])
        try:
            yield
        finally:
            self._random = np.random.get_state(), torch.get_rng_state()
            np.random.set_state(outside[0])
            torch.set_rng_state(outside[1])

    def state(self) -> dict[str, Any]:
        """Weights, optimizers, replay buffer, random numbers, episode, and the curve so far."""
        model = self.model
        assert self._random is not None
        name, keys, *position = self._random[0]
        entropy = getattr(model, "log_ent_coef", None)
        return super().state() | {
            "parameters": copy.deepcopy(model.get_parameters()),
            "entropy_coef": None if entropy is None else entropy.detach().clone(),
            "buffer": _buffer_state(model.replay_buffer),
            "random": [self._random[1], name, torch.from_numpy(keys.astype(np.int64)), *position],
            "random_actions": model.action_space.np_random.bit_generator.state,
            "exploration_rate": getattr(model, "exploration_rate", None),
            "n_updates": model._n_updates,
            "episodes": self.env.episodes,
            "actions": [torch.from_numpy(action) for action in self.env.actions],
            "returns": [[episode["r"], episode["l"]] for episode in model.ep_info_buffer or ()],
            "successes": [float(success) for success in model.ep_success_buffer or ()],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that :meth:`state` returned."""
        super().restore(state)
        model: Any = self.model
        model.set_parameters(state["parameters"])
        if state["entropy_coef"] is not None:
            with torch.no_grad():
                model.log_ent_coef.copy_(state["entropy_coef"])
        _restore_buffer(model.replay_buffer, state["buffer"])
        torch_state, name, keys, *position = state["random"]
        self._random = (name, keys.numpy().astype(np.uint32), *position), torch_state
        model.action_space.np_random.bit_generator.state = state["random_actions"]
        if state["exploration_rate"] is not None:
            model.exploration_rate = state["exploration_rate"]
        model._n_updates = state["n_updates"]
        model.num_timesteps = model._n_calls = self.steps  # of one environment
        self.env.resume(state["episodes"], [action.numpy() for action in state["actions"]])
        with self._own_randomness():
            model.learn(0, log_interval=NEVER, reset_num_timesteps=False)  # creates the deques
        model.ep_info_buffer.extend({"r": r, "l": length} for r, length in state["returns"])
        model.ep_success_buffer.extend(state["successes"])


def build_model(config: OffPolicy, env: gymnasium.Env[Any, Any], seed: int) -> OffPolicyAlgorithm:
    """The algorithm of Stable-Baselines3 with the settings of a recipe."""
    has_parts = isinstance(env.observation_space, gymnasium.spaces.Dict)
    settings: dict[str, Any] = {
        "policy": "MultiInputPolicy" if has_parts else "MlpPolicy",
        "env": env,
        "learning_rate": config.learning_rate,
        "buffer_size": config.buffer_size,
        "learning_starts": config.learning_starts,
        "batch_size": config.batch_size,
        "tau": config.tau or (1.0 if config.algorithm == "dqn" else 0.005),
        "gamma": config.gamma,
        "train_freq": config.train_every,
        "gradient_steps": config.gradient_steps,
        "policy_kwargs": {"net_arch": list(config.hidden_sizes), "activation_fn": nn.ReLU},
        "stats_window_size": RECENT,
        "seed": seed,
        "device": "cpu",
    }
    if config.replay == "hindsight":
        goals = config.hindsight_goals or 4
        settings["replay_buffer_class"] = HerReplayBuffer
        settings["replay_buffer_kwargs"] = {"n_sampled_goal": goals}
    if config.algorithm == "sac":
        return SAC(**settings)
    if config.algorithm == "td3":
        size = config.action_noise if config.action_noise is not None else 0.1
        zeros = np.zeros(env.action_space.shape or ())
        return TD3(**settings, action_noise=NormalActionNoise(zeros, zeros + size))
    settings["target_update_interval"] = config.target_update_interval or 1000
    if config.network == "dueling":
        settings["policy"] = DuelingPolicy
        extractor = CombinedExtractor if has_parts else FlattenExtractor
        settings["policy_kwargs"]["features_extractor_class"] = extractor
    model = (DoubleDQN if config.target == "double" else DQN)(**settings)
    fraction = config.exploration_fraction or 0.2
    final = 0.05 if config.exploration_final is None else config.exploration_final
    # That of the library decays over each call of `learn`.
    model.exploration_schedule = lambda _: max(
        final, 1 - (1 - final) * model.num_timesteps / (fraction * config.steps)
    )
    return model


def _check_first_episode(config: OffPolicy, env: gymnasium.Env[Any, Any]) -> None:
    longest = env.spec.max_episode_steps if env.spec else None
    if config.replay == "hindsight" and config.learning_starts <= (longest or 0):
        raise UserError(
            f"`replay: hindsight` needs a whole episode before the first update: "
            f"`learning_starts` ({config.learning_starts}) must exceed the longest episode of "
            f"{config.environment} ({longest} steps); raise it"
        )


def _greedy_layers(model: OffPolicyAlgorithm) -> list[nn.Module]:
    """The layers of the greedy policy, in order."""
    if isinstance(model, DQN):
        return [*model.q_net.q_net]
    actor: Any = model.actor
    return [*actor.latent_pi, actor.mu] if isinstance(model, SAC) else [*actor.mu]


def _arrays(buffer: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of a replay buffer by name; ``name.key`` of dictionary observations."""
    for name, value in vars(buffer).items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        for key, array in parts:
            if isinstance(array, np.ndarray) and array.dtype != object:
                yield f"{name}.{key}", array


def _buffer_state(buffer: Any) -> dict[str, Any]:
    """The filled part of a replay buffer."""
    filled = buffer.size()
    arrays = {
        name: torch.from_numpy(array[: filled if len(array) == buffer.buffer_size else None].copy())
        for name, array in _arrays(buffer)
    }
    return {"position": buffer.pos, "full": buffer.full, "arrays": arrays}


def _restore_buffer(buffer: Any, state: Mapping[str, Any]) -> None:
    buffer.pos, buffer.full = state["position"], state["full"]
    for name, array in _arrays(buffer):
        saved = state["arrays"][name].numpy()
        array[: len(saved)] = saved
