"""Games of OpenSpiel for two players, as a Gymnasium environment against random moves.

``align.control.games:Game-v0`` with the option ``game`` is its id in a recipe. Observations are
what the player knows, followed by a mask of the legal moves.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

Array = NDArray[Any]


def load(name: str) -> Any:
    """The game of a name.

    Raises:
        gymnasium.error.DependencyNotInstalled: OpenSpiel is missing.
        ValueError: No such game, or not one of moves by two players in turn.
    """
    try:
        import pyspiel
    except ImportError:
        raise gymnasium.error.DependencyNotInstalled("pyspiel is not installed") from None
    try:
        game = pyspiel.load_game(name)
    except pyspiel.SpielError as error:
        raise ValueError(str(error).splitlines()[0]) from None
    kind = game.get_type()
    if game.num_players() != 2 or kind.dynamics != pyspiel.GameType.Dynamics.SEQUENTIAL:
        raise ValueError(f"{name} is not a game of two players who move in turn")
    return game


def knowledge(state: Any, player: int) -> Array:
    """What a player knows in a state, and which moves are legal, as one vector."""
    if state.get_game().get_type().provides_information_state_tensor:
        known = state.information_state_tensor(player)
    else:
        known = state.observation_tensor(player)
    return np.array([*known, *state.legal_actions_mask(player)], np.float32)


def play_chance(state: Any, random: np.random.Generator) -> None:
    """Draw the outcomes of chance until a player moves or the game ends."""
    while state.is_chance_node():
        outcomes, probabilities = zip(*state.chance_outcomes(), strict=True)
        state.apply_action(int(random.choice(outcomes, p=probabilities)))


class Game(gymnasium.Env[Any, Any]):
    """A game against an opponent with uniformly random moves, from either seat."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 1}  # noqa: RUF012

    def __init__(self, game: str, render_mode: str | None = None) -> None:
        self.game = load(game)
        self.render_mode = render_mode
        state = self.game.new_initial_state()
        play_chance(state, np.random.default_rng(0))
        n_features = len(knowledge(state, state.current_player()))
        self.observation_space = spaces.Box(-np.inf, np.inf, (n_features,), np.float32)
        self.action_space = spaces.Discrete(self.game.num_distinct_actions())

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Begin a game in a random seat, with the opponent's first move if it begins."""
        super().reset(seed=seed)
        self.seat = int(self.np_random.integers(2))
        self.state = self.game.new_initial_state()
        self._await_turn()
        return knowledge(self.state, self.seat), {}

    def step(self, action: Any) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Make a move, and the opponent's; the reward is the result of the game."""
        self.state.apply_action(int(action))
        self._await_turn()
        ended = self.state.is_terminal()
        reward = float(self.state.returns()[self.seat]) if ended else 0.0
        return knowledge(self.state, self.seat), reward, ended, False, {}

    def render(self) -> Array:
        """The text of the state."""
        from PIL import Image, ImageDraw

        image = Image.new("RGB", (320, 160), "white")
        ImageDraw.Draw(image).multiline_text((10, 10), str(self.state), fill="black")
        return np.asarray(image)

    def _await_turn(self) -> None:
        state = self.state
        while not state.is_terminal() and state.current_player() != self.seat:
            if state.is_chance_node():
                play_chance(state, self.np_random)
            else:
                state.apply_action(int(self.np_random.choice(state.legal_actions())))


gymnasium.register("Game-v0", f"{__name__}:Game", max_episode_steps=1000)
