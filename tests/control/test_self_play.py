"""Self-play: exploitability against OpenSpiel's own policies, legal moves, learning, resuming."""

from __future__ import annotations

import io
import sys
from typing import Any

import gymnasium
import numpy as np
import pyspiel
import pytest
import torch
from open_spiel.python.algorithms import exploitability as reference
from open_spiel.python.policy import TabularPolicy
from pydantic import ValidationError

from align.config.base import GymEnvironment
from align.config.control.self_play import SelfPlay
from align.control import policy_files, spaces
from align.control.evaluate import evaluate
from align.control.games import knowledge
from align.control.multi_agent.self_play import SelfPlayTrainer, exploitability
from align.control.networks import Policy

ID = "align.control.games:Game-v0"


def build(game: str = "kuhn_poker", **changes: Any) -> SelfPlayTrainer:
    settings: dict[str, Any] = {
        "environment": ID,
        "environment_options": {"game": game},
        "algorithm": "self_play",
        "steps": 2000,
        "games": 64,
        "hidden_sizes": [16],
    }
    config = SelfPlay(**settings | changes)
    return SelfPlayTrainer(config, spaces.inspect_env(*config.gym_environments), 0)


@pytest.mark.parametrize(
    ("game", "n_states", "uniform"),
    # The values of the uniform policy are those that OpenSpiel documents for its games.
    [
        ("kuhn_poker", 12, 0.4583),
        pytest.param("leduc_poker", 936, 2.3736, marks=pytest.mark.slow),
    ],
)
def test_the_exploitability_of_the_uniform_policy(game: str, n_states: int, uniform: float) -> None:
    trainer = build(game)
    for parameter in trainer.policy.parameters():
        torch.nn.init.zeros_(parameter)
    assert len(trainer.states) == n_states
    assert exploitability(trainer.game, trainer.states, trainer.policy) == pytest.approx(
        uniform, abs=1e-4
    )


@pytest.mark.parametrize("game", ["kuhn_poker", "nim(pile_sizes=1;2;2)"])
def test_exploitability_is_that_of_the_policy_in_every_state(game: str) -> None:
    trainer = build(game)
    with torch.no_grad():
        for parameter in trainer.policy.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    table = TabularPolicy(trainer.game)
    for state in trainer.states.values():
        seen = knowledge(state, state.current_player())
        logits = trainer.policy.body(torch.from_numpy(seen)).detach()
        probabilities = logits.softmax(-1).numpy()
        if game.startswith("nim"):  # nothing is hidden: that of the greedy policy
            probabilities = np.eye(len(logits))[int(logits.argmax())]
        table.policy_for_key(state.information_state_string())[:] = probabilities
    # Computed by the best responses of OpenSpiel in Python.
    expected = reference.exploitability(trainer.game, table)
    assert exploitability(trainer.game, trainer.states, trainer.policy) == pytest.approx(
        expected, abs=1e-6
    )
    assert expected > 0.1


def test_illegal_moves_have_the_probability_0() -> None:
    trainer = build("tic_tac_toe")
    state = trainer.game.new_initial_state()
    for move in (0, 4, 8):
        state.apply_action(move)
    seen = torch.from_numpy(knowledge(state, state.current_player()))
    probabilities = trainer.policy.body(seen).softmax(-1)
    assert (probabilities > 0).tolist() == [move not in (0, 4, 8) for move in range(9)]
    env: Any = gymnasium.make(ID, game="tic_tac_toe", render_mode="rgb_array")
    env.reset(seed=0)
    assert env.render().shape == (160, 320, 3)


def test_rows_are_the_moves_of_both_players_with_their_results() -> None:
    trainer = build(games=3, minibatches=1)
    rollout = trainer.play()
    assert rollout.returns is not None
    assert rollout.values is not None
    observations = rollout.inputs["observations"]
    # The first entries of Kuhn poker's observations are the player; rows are by turn, then by game.
    players = observations[:, :2].argmax(-1).tolist()
    assert players[:6] == [0, 0, 0, 1, 1, 1]
    first, second = rollout.returns[:3, 0], rollout.returns[3:6, 0]
    assert torch.equal(first, -second)  # a zero-sum game
    assert first.abs().min() >= 1
    torch.testing.assert_close(rollout.advantages, rollout.returns - rollout.values)


@pytest.mark.slow
def test_self_play_becomes_harder_to_exploit() -> None:
    trainer = build(steps=30_000, games=512, hidden_sizes=[32], learning_rate=5e-3)
    before = exploitability(trainer.game, trainer.states, trainer.policy)
    while not trainer.done:
        trainer.train_step()
    assert before > 0.4
    assert exploitability(trainer.game, trainer.states, trainer.policy) < 0.3
    assert trainer.curve[-1]["exploitability"] == exploitability(
        trainer.game, trainer.states, trainer.policy
    )


def test_a_restored_trainer_reaches_the_same_weights() -> None:
    whole = build(steps=400)
    whole.train_step()
    file = io.BytesIO()
    torch.save(whole.state(), file)
    resumed = build(steps=400)
    file.seek(0)
    resumed.restore(torch.load(file, weights_only=True))
    while not whole.done:
        whole.train_step()
        resumed.train_step()
    for first, second in zip(whole.policy.parameters(), resumed.policy.parameters(), strict=True):
        assert torch.equal(first, second)
    assert [p["value_loss"] for p in whole.curve] == [p["value_loss"] for p in resumed.curve]


def test_the_saved_policy_plays_against_random_moves(tmp_path: Any) -> None:
    trainer = build("tic_tac_toe")
    spec = spaces.inspect_env(*trainer.config.gym_environments)
    policy_files.describe(tmp_path, trainer.config, spec)
    policy_files.save(policy_files.policy_file(tmp_path, 0), trainer.policy, trainer.critic, None)
    loaded = policy_files.load(tmp_path, 0)
    assert isinstance(loaded.policy, Policy)
    place = loaded.environment, loaded.options
    returns, _ = evaluate(loaded.policy, *place, statistics=None, episodes=20, seed=0)
    assert {*returns.tolist()} <= {-1.0, 0.0, 1.0}
    frames = policy_files.play_episodes(loaded, render_mode="rgb_array", episodes=1, seed=0)
    assert [*frames][-1].episode_return in (-1.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"game": "kun_poker"}, "does not accept .*kun_poker"),
        ({"game": "goofspiel"}, "not a game of two players who move in turn"),
    ],
)
def test_a_game_that_does_not_fit_is_refused(options: Any, message: str) -> None:
    with pytest.raises(spaces.UnfitError, match=message):
        spaces.inspect_env(GymEnvironment(ID, options))


def test_the_recipe_names_a_game() -> None:
    with pytest.raises(ValidationError, match=r"`environment_options.game` must be the name"):
        SelfPlay(environment=ID, algorithm="self_play", steps=9)
    config = SelfPlay(
        environment="CartPole-v1", environment_options={"game": "x"}, algorithm="self_play", steps=9
    )
    with pytest.raises(spaces.UnfitError, match=r"no game of OpenSpiel.* needs a game"):
        spaces.inspect_env(
            GymEnvironment("CartPole-v1", {}, needs=config.gym_environments[0].needs)
        )


def test_a_missing_extra_is_one_line(launch: Any, tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "pyspiel", None)
    text = (
        f"stages: {{control: {{environment: '{ID}', environment_options: {{game: kuhn_poker}}, "
        "algorithm: self_play, steps: 9}}\n"
    )
    (tmp_path / "recipe.yaml").write_text(text)
    ended = launch("recipe.yaml")
    assert ended.code == 2
    lines = [line for line in ended.err.splitlines() if "games" in line]
    assert len(lines) == 1, ended.err
    assert "needs more packages: pip install -e '.[games]'" in lines[0]


class Table(torch.nn.Module):
    """The body of a policy with given probabilities in each state of a game."""

    def __init__(self, seen: Any, probabilities: Any) -> None:
        super().__init__()
        self.seen, self.logits = torch.from_numpy(seen), torch.from_numpy(probabilities).log()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        is_row = (rows[:, None] == self.seen).all(-1)
        assert (is_row.sum(1) == 1).all()
        return self.logits[is_row.int().argmax(1)]


def test_an_almost_optimal_policy_can_hardly_be_exploited() -> None:
    # That of OpenSpiel's CFR+, to which the documentation compares self-play. Reversed, it raises
    # with the worst cards.
    trainer = build("kuhn_poker")
    solver = pyspiel.CFRPlusSolver(trainer.game)
    for _ in range(100):
        solver.evaluate_and_update_policy()
    solution = solver.average_policy()
    seen, rows = [], []
    for state in trainer.states.values():
        seen.append(knowledge(state, state.current_player()))
        rows.append([solution.action_probabilities(state)[move] for move in (0, 1)])
    values = []
    for probabilities in (np.array(rows), 1 - np.array(rows)):
        trainer.policy.body = Table(np.stack(seen), probabilities)  # type: ignore[assignment]
        values.append(exploitability(trainer.game, trainer.states, trainer.policy))
    assert values[0] == pytest.approx(pyspiel.exploitability(trainer.game, solution), abs=1e-9)
    assert values[0] < 0.002
    assert values[1] > 0.4583  # more than the uniform policy
