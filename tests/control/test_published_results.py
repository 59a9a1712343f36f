"""`align play` of every algorithm, and recipes against published or exact results.

``ALIGN_SEEDS=5`` also trains the recipes that take more than two minutes of a core.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

import align
from align.cli.play import play

RECIPES = Path(__file__).parents[2] / "recipes" / "control"
N_SEEDS = int(os.environ.get("ALIGN_SEEDS", "1"))
slow = pytest.mark.slow
long = pytest.mark.skipif(N_SEEDS < 5, reason="takes minutes; ALIGN_SEEDS=5 runs it")

CLIFF = {"environment": "CliffWalking-v1", "environment_options": {"max_episode_steps": 20}}
CARTPOLE = {"environment": "CartPole-v1"}
PENDULUM = {"environment": "Pendulum-v1", "environment_options": {"max_episode_steps": 5}}
REPLAY = {"steps": 60, "learning_starts": 20, "buffer_size": 50, "batch_size": 8, "episodes": 2}


def steps_of_cliff(episode_return: float) -> float:
    """A step costs 1, and one over the cliff 99 more."""
    return -episode_return % 99


# Settings, and the number of steps of an episode with a return. The first import of
# Stable-Baselines3 takes 3 s.
@pytest.mark.parametrize(
    ("algorithm", "settings", "n_steps"),
    [
        ("value_iteration", CLIFF | {"gamma": 1.0}, steps_of_cliff),
        ("q_learning", CLIFF | {"steps": 300}, steps_of_cliff),
        ("sarsa", CLIFF | {"steps": 300}, steps_of_cliff),
        pytest.param("dqn", REPLAY | CARTPOLE, lambda total: total, marks=slow),
        pytest.param("sac", REPLAY | PENDULUM, lambda total: 5, marks=slow),
        pytest.param("td3", REPLAY | PENDULUM, lambda total: 5, marks=slow),
    ],
)
def test_a_trained_policy_plays(
    algorithm: str,
    settings: dict[str, Any],
    n_steps: Callable[[float], float],
    tmp_path: Path,
    capsys: Any,
    monkeypatch: Any,
) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")  # SDL renders without a screen
    stages = {"control": settings | {"algorithm": algorithm}}
    result = align.run({"stages": stages}, tmp_path)["control"]
    capsys.readouterr()
    play(result.folder, gif=tmp_path / "episode.gif", episodes=1, seed=0)
    returned, written = capsys.readouterr().out.splitlines()
    place, _, total = returned.rpartition(" ")
    assert place == f"{settings['environment']}, seed 0: return"
    # A frame before each action, and one at the end.
    assert f": {n_steps(float(total)) + 1:.0f} frames, " in written
    with Image.open(tmp_path / "episode.gif") as picture:
        assert min(picture.size) >= 200
    if settings["environment"] == "CliffWalking-v1":  # nothing is random: as in the evaluation
        assert float(total) == result.metrics["control"][0]["mean_return"]
    if algorithm == "value_iteration":
        assert float(total) == -13


def run_stage(recipe: str, stage: str, changes: dict[str, Any], runs: Path) -> Any:
    """The result of one stage of a recipe, with one seed."""
    stages = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text(encoding="utf-8"))["stages"]
    return align.run({"stages": {stage: stages[stage] | {"seeds": [0]} | changes}}, runs)[stage]


def last_point(folder: Path, seed: int) -> dict[str, Any]:
    """The last point of the learning curve of a seed."""
    curve: list[dict[str, Any]] = json.loads((folder / f"curve-{seed}.json").read_text())["curve"]
    return curve[-1]


# The targets are those of Gymnasium, or near the published returns of docs/control.md. A point is
# about six steps away from its goal and earns -1 for each; a goal that is missed costs 50.
@slow
@pytest.mark.parametrize(
    ("recipe", "stage", "changes", "target"),
    [
        pytest.param("cartpole_batched", "control", {}, 475, id="batched CartPole"),
        pytest.param("point_reach", "hindsight", {}, -8, id="hindsight replay"),
        pytest.param(
            "cartpole_dqn",
            "control",
            {"seeds": [1], "target": "double", "network": "dueling"},
            475,
            id="double DQN with a dueling network",
            marks=long,
        ),
        pytest.param("pendulum", "sac", {"seeds": [1]}, -160, id="SAC", marks=long),
        pytest.param("pendulum", "td3", {"seeds": [1]}, -160, id="TD3", marks=long),
        pytest.param("halfcheetah_ppo", "control", {}, 4_500, id="HalfCheetah", marks=long),
    ],
)
def test_a_recipe_reaches_its_target(
    recipe: str, stage: str, changes: dict[str, Any], target: float, tmp_path: Path
) -> None:
    result = run_stage(recipe, stage, changes, tmp_path)
    (row,) = result.metrics["control"]
    assert row["mean_return"] >= target
    if recipe == "point_reach":  # each of the 100 goals is reached; the curve has earlier episodes
        assert row["lowest"] > -50


# The uniform policy has 0.4583, 2.3736 and 0.9598; a greedy policy with 0 never loses.
@slow
@pytest.mark.parametrize(
    ("stage", "target"),
    [
        pytest.param("kuhn", 0.15, id="Kuhn poker"),
        pytest.param("leduc", 1.0, id="Leduc poker"),
        pytest.param("tic_tac_toe", 0.0, id="tic-tac-toe"),
    ],
)
def test_self_play_can_hardly_be_exploited(stage: str, target: float, tmp_path: Path) -> None:
    result = run_stage("self_play", stage, {"episodes": 20}, tmp_path)
    assert last_point(result.folder, 0)["exploitability"] <= target + 1e-9
