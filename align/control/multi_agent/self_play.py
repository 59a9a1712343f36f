"""Self-play: one policy plays both sides of a game, and learns from both with the common update.

The result of a game is the return of every move of a player; a critic is the baseline. The measure
of progress is exploitability: what a perfect opponent would win per game, on average over seats. It
is 0 at an equilibrium. Left out: the exploitability of games too large to enumerate.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import gymnasium
import numpy as np
import pyspiel
import torch
from torch import Tensor, nn

from align.config.control.self_play import SelfPlay
from align.control.games import knowledge, play_chance
from align.control.networks import Policy, build_critic
from align.control.seeds import derive_seed
from align.control.spaces import EnvSpec
from align.control.trainer import Trainer
from align.rl.objective import Objective
from align.rl.rollout import Rollout
from align.rl.update import Evaluated, update

POINTS = 20
"""Measurements of exploitability in a run; of a game with many states, only the last one."""
MANY, LARGEST = 10_000, 1_000_000
"""Information sets that are many, and nodes of the largest game that is measured."""


class SelfPlayTrainer(Trainer[SelfPlay]):
    """Trains the policy of one seed."""

    critic: nn.Module

    def __init__(self, config: SelfPlay, spec: EnvSpec, seed: int) -> None:
        super().__init__(config, seed)
        env: Any = gymnasium.make(config.environment, **config.environment_options).unwrapped
        self.game = env.game
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            policy = Policy(spec, **asdict(config.policy_shape))
            self.critic = build_critic(spec, hidden_sizes=config.hidden_sizes, activation="tanh")
        parameters = [*policy.parameters(), *self.critic.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=config.learning_rate, eps=1e-5)
        self.parts = {"policy": policy, "critic": self.critic, "optimizer": self.optimizer}
        self.random = np.random.default_rng(derive_seed(seed, 2))

    def train(self) -> dict[str, Any]:
        """Play games and update once."""
        config = self.config
        remaining = max(0.0, 1 - self.steps / config.steps)
        part_before = self.steps * self.points // config.steps
        rollout = self.play()
        self.steps += len(rollout)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * remaining
        objective = Objective(
            epochs=config.epochs,
            minibatches=config.minibatches,
            clip_low=config.clip,
            clip_high=config.clip,
            entropy_coef=config.entropy_coef,
            max_grad_norm=1.0,
        )
        diagnostics = update(
            self.evaluate_policy, rollout, objective, self.optimizer, generator=self.generator
        )
        self.check_weights()
        is_due = self.done or self.steps * self.points // config.steps != part_before
        point: dict[str, Any] = {
            "episodes": config.games,
            "return": None,
            "exploitability": self._exploitability() if is_due else None,
        }
        finite = {key: value for key, value in asdict(diagnostics).items() if value == value}
        return point | {key: value for key, value in finite.items() if key not in point}

    @functools.cached_property
    def states(self) -> dict[str, Any]:
        """The states in which the policy is measured."""
        return decision_states(self.game)

    @property
    def points(self) -> int:
        """Measurements of exploitability in the run."""
        return POINTS if len(self.states) <= MANY else 1

    def _exploitability(self) -> float | None:
        return exploitability(self.game, self.states, self.policy) if self.states else None

    @torch.no_grad()
    def play(self) -> Rollout:
        """Play games to their ends; one row per move."""
        states = [self.game.new_initial_state() for _ in range(self.config.games)]
        observations: list[Tensor] = []
        actions: list[Tensor] = []
        moves: list[tuple[int, int]] = []  # game and player of each row
        running = list(range(len(states)))
        while running:
            for index in running:
                play_chance(states[index], self.random)
            running = [index for index in running if not states[index].is_terminal()]
            if not running:
                break
            players = [states[index].current_player() for index in running]
            seen = [knowledge(states[i], p) for i, p in zip(running, players, strict=True)]
            observations.append(torch.from_numpy(np.stack(seen)))
            logits = self.policy.body(observations[-1])
            noise = self.policy.head.noise(len(running), generator=self.generator)
            actions.append(self.policy.head.act(logits, noise))
            for index, action in zip(running, actions[-1].tolist(), strict=True):
                states[index].apply_action(action)
            moves += zip(running, players, strict=True)
        results = [state.returns() for state in states]
        returns = torch.tensor([[results[game][player]] for game, player in moves])
        inputs = {"observations": torch.cat(observations), "actions": torch.cat(actions)}
        evaluated = self.evaluate_policy(inputs)
        assert evaluated.logps is not None
        assert evaluated.values is not None
        return Rollout(
            inputs=inputs,
            logps=evaluated.logps,
            advantages=returns - evaluated.values,
            mask=torch.ones_like(returns, dtype=torch.bool),
            values=evaluated.values,
            returns=returns,
        )

    def evaluate_policy(self, inputs: dict[str, Tensor]) -> Evaluated:
        """Log-probabilities, entropies and values of moves."""
        observations, head = inputs["observations"], self.policy.head
        logits = self.policy.body(observations)
        logps = head.logps(logits, inputs["actions"]).unsqueeze(1)
        return Evaluated(logps, head.entropy(logits).unsqueeze(1), self.critic(observations))

    # State ----------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Networks, optimizer, random numbers, and the curve so far."""
        return super().state() | {"random": self.random.bit_generator.state}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that :meth:`state` returned."""
        super().restore(state)
        self.random.bit_generator.state = state["random"]


def decision_states(game: Any) -> dict[str, Any]:
    """One state of each information set in which a player moves, by the name of the set.

    Empty for a game whose tree has more than ``LARGEST`` nodes.
    """
    found: dict[str, Any] = {}
    waiting, n_nodes = [game.new_initial_state()], 0
    while waiting:
        state = waiting.pop()
        n_nodes += 1
        if n_nodes > LARGEST:
            return {}
        if state.is_terminal():
            continue
        if not state.is_chance_node():
            found.setdefault(state.information_state_string(), state)
        waiting += [state.child(action) for action in state.legal_actions()]
    return found


@torch.no_grad()
def exploitability(game: Any, states: Mapping[str, Any], policy: Policy) -> float:
    """Mean over seats of what a best response wins against the policy, by OpenSpiel.

    ``states`` are those of :func:`decision_states`. Where nothing is hidden, no move needs to be
    random, and the policy is the greedy one.

    Source: Lanctot et al. 2019, OpenSpiel, arXiv:1908.09453, section 2.3.
    """
    rows = [knowledge(state, state.current_player()) for state in states.values()]
    logits = policy.body(torch.from_numpy(np.stack(rows))).double()
    if game.get_type().information == pyspiel.GameType.Information.PERFECT_INFORMATION:
        logits = logits.where(logits == logits.amax(-1, keepdim=True), -torch.inf)
    probabilities = logits.softmax(-1).tolist()
    table = {
        name: [(action, row[action]) for action in state.legal_actions()]
        for (name, state), row in zip(states.items(), probabilities, strict=True)
    }
    return float(pyspiel.exploitability(game, pyspiel.TabularPolicy(table)))
