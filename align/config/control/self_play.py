"""Keys of self-play on games of OpenSpiel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from align.config.base import GymEnvironment, between_keys
from align.config.control.base import Control, PolicyShape
from align.errors import shown


class SelfPlay(Control):
    """PPO against itself: one policy plays both sides of a game of OpenSpiel for two players.

    The environment is ``align.control.games:Game-v0`` with the option ``game``, such as
    ``kuhn_poker``. The evaluation plays against an opponent with uniformly random moves.
    """

    code_version: ClassVar[int] = 2

    algorithm: Literal["self_play"]
    """Algorithm."""
    steps: int = Field(ge=1)
    """Moves of both players per seed."""
    gamma: float = Field(1.0, ge=1.0, le=1.0)
    """Discount per move: 1, as only the end of a game has a reward."""
    games: int = Field(2048, ge=1)
    """Games that are played at once, each to its end, for an update."""
    learning_rate: float = Field(2e-3, gt=0.0)
    """Learning rate of policy and critic; it decays to 0 over the run."""
    epochs: int = Field(1, ge=1)
    """Passes over the moves of an update."""
    minibatches: int = Field(4, ge=1)
    """Optimizer steps per pass."""
    clip: float = Field(0.2, gt=0.0)
    """Clipping range of the probability ratio."""
    entropy_coef: float = Field(0.1, ge=0.0)
    """Weight of the entropy bonus. Without one, the policies of games with hidden information
    circle around the equilibrium; a large one keeps them away from it."""
    hidden_sizes: list[Annotated[int, Field(ge=1)]] = Field([64, 64])
    """Widths of the hidden layers, with tanh, of the policy and of the critic."""

    @between_keys
    def _check_game(self) -> Iterator[str]:
        game = self.environment_options.get("game")
        if not isinstance(game, str):
            yield (
                "`environment_options.game` must be the name of a game of OpenSpiel, such as "
                f"kuhn_poker, got {shown(game)}"
            )

    @between_keys
    def _check_minibatches(self) -> Iterator[str]:
        if self.minibatches > self.games:
            yield (
                f"`minibatches` ({self.minibatches}) must not exceed `games` ({self.games}); "
                "lower it"
            )

    @property
    def policy_shape(self) -> PolicyShape:
        """A perceptron with tanh that gives illegal moves the probability 0."""
        return PolicyShape(self.hidden_sizes, "tanh", "legal")

    @property
    def gym_environments(self) -> tuple[GymEnvironment, ...]:
        """The game against an opponent with random moves."""
        needs = ("a game",)
        return (GymEnvironment(self.environment, self.environment_options, needs=needs),)
