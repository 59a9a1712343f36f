"""The stage `control` as a user meets it: tables, files, mistakes, interruption, several processes, `align play`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from align.cli import main, play
from align.config import recipe
from align.config.control import Control
from align.control import policy_files, spaces
from align.errors import UserError
from align.pipeline import lookup, runner
from align.runtime import artifacts, checkpoints, distributed, signals
from align.runtime.progress import Display
from align.stages import control

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes" / "control"
SMALL = """\
stages:
  control:
    environment: CartPole-v1
    seeds: [3, 5]
    steps: 2_000
    n_envs: 8
    n_steps: 16
    episodes: 20
    normalize_observations: true
"""
SOLVED = 475

pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"
)


@pytest.fixture(scope="module", autouse=True)
def one_environment_variable() -> Any:
    """SDL draws without a screen."""
    before = os.environ.get("SDL_VIDEODRIVER")
    os.environ["SDL_VIDEODRIVER"] = "dummy"
    yield
    os.environ.pop("SDL_VIDEODRIVER") if before is None else os.environ.update(
        SDL_VIDEODRIVER=before
    )


def call(runs: Path, text: str = SMALL, *overrides: str) -> dict[str, Any]:
    """Run a recipe in this process; its only stage in the summary."""
    (runs.parent / "recipe.yaml").write_text(text)
    read = recipe.load_recipe(runs.parent / "recipe.yaml", overrides)
    return runner.run_recipe(read, runs, Display(Console(quiet=True))).as_json()["stages"][0]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small finished stage."""
    return Path(call(tmp_path_factory.mktemp("done") / "runs")["folder"])


# What comes out -------------------------------------------------------------------------------------------------------


def test_the_folder_has_what_the_table_the_curves_and_a_player_need(done):
    kept = {path.name for path in done.iterdir()}
    assert kept == {
        "artifact.json", "metrics.jsonl", "curves.png", "policy.json", "policy-3.safetensors",
        "policy-5.safetensors", "curve-3.json", "curve-5.json",
    }  # fmt: skip
    made = artifacts.read_artifact(done)
    assert made is not None
    assert [row["seed"] for row in made.metrics["control"]] == [3, 5]
    for row in made.metrics["control"]:
        curve = json.loads((done / f"curve-{row['seed']}.json").read_text())
        assert len(curve["returns"]) == 20
        assert row["mean_return"] == pytest.approx(sum(curve["returns"]) / 20)
        assert row["ci"][0] <= row["mean_return"] <= row["ci"][1]
        assert row["lowest"] == min(curve["returns"])
        assert row["steps"] == curve["steps"] == curve["curve"][-1]["steps"] == 2048
        assert row["steps_per_second"] == pytest.approx(2048 / row["seconds"], rel=0.01)
        assert row["seconds"] == pytest.approx(curve["curve"][-1]["seconds"], abs=0.001)
    lines = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    # 16 updates of 128 steps a seed, of which 2,000 count; the second seed counts on from there.
    steps = [*range(128, 2000, 128), 2000]
    assert [line["step"] for line in lines] == [first + s for first in (0, 2000) for s in steps]
    wanted = {"return", "policy_loss", "value_loss", "entropy", "kl", "clip_fraction", "seconds"}
    assert all(wanted | {"explained_variance", "seed"} <= line.keys() for line in lines)
    with Image.open(done / "curves.png") as picture:
        assert min(picture.size) > 500


def test_seeds_differ_and_a_seed_alone_is_the_same_policy(done, tmp_path):
    three, five = (load_file(done / f"policy-{seed}.safetensors") for seed in (3, 5))
    assert any(not torch.equal(three[name], five[name]) for name in three)
    alone = Path(call(tmp_path / "runs", SMALL, "control.seeds=[5]")["folder"])
    again = load_file(alone / "policy-5.safetensors")
    assert all(torch.equal(five[name], again[name]) for name in five)
    assert {"policy.body.0.weight", "critic.0.weight", "statistics.mean"} <= five.keys()


def test_a_second_run_reuses_and_both_end_in_the_table(launch, tmp_path):
    (tmp_path / "recipe.yaml").write_text(SMALL)
    first = launch("recipe.yaml")
    assert first.code == 0, first.err
    told = [line.split() for line in first.out.splitlines()]
    assert ["seed", "return", "interval", "lowest", "steps", "seconds", "steps/s"] in told
    rows = [row for row in told if "to" in row and row[0] in "35"]
    assert len(rows) == 2
    assert all("2,048" in row for row in rows)
    again = launch("recipe.yaml")
    assert "control: reused" in again.out
    assert [line for line in again.out.splitlines() if " to " in line] == [
        line for line in first.out.splitlines() if " to " in line
    ]


@pytest.mark.parametrize("name", ["cartpole_ppo", "cartpole_reinforce", "cartpole_a2c"])
def test_one_seed_of_each_recipe_solves_cartpole(name, tmp_path):
    text = (RECIPES / f"{name}.yaml").read_text()
    (row,) = call(tmp_path / "runs", text, "control.seeds=[0]")["metrics"]["control"]
    assert row["mean_return"] >= SOLVED


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cartpole_ppo", "cartpole_reinforce", "cartpole_a2c"])
def test_every_seed_of_each_recipe_solves_cartpole(name, tmp_path):
    stage = call(tmp_path / "runs", (RECIPES / f"{name}.yaml").read_text())
    rows = stage["metrics"]["control"]
    assert [row["seed"] for row in rows] == [0, 1, 2, 3, 4]
    assert min(row["mean_return"] for row in rows) >= SOLVED
    if name == "cartpole_reinforce":
        for seed in range(5):
            curve = json.loads((Path(stage["folder"]) / f"curve-{seed}.json").read_text())["curve"]
            told = [p for p in curve if "gradient_variance/without" in p]
            assert len(told) >= 20
            less = [
                p["gradient_variance/with_baseline"] < p["gradient_variance/without"] for p in told
            ]
            assert sum(less) >= len(told) - 2


@pytest.mark.slow
@pytest.mark.parametrize(("name", "target"), [("acrobot_ppo", -100), ("lunarlander_ppo", 200)])
def test_the_other_recipes_reach_their_targets(name, target, tmp_path):
    text = (RECIPES / f"{name}.yaml").read_text()
    (row,) = call(tmp_path / "runs", text, "control.seeds=[0]")["metrics"]["control"]
    assert row["mean_return"] >= target


@pytest.mark.slow
@pytest.mark.parametrize("name", ["halfcheetah_ppo", "humanoid_ppo"])
def test_the_recipes_of_hours_take_their_first_updates(name, tmp_path):
    text = (RECIPES / f"{name}.yaml").read_text()
    (row,) = call(tmp_path / "runs", text, "control.steps=6_000", "control.episodes=2")["metrics"][
        "control"
    ]
    assert row["steps"] >= 6_000


# What a recipe means --------------------------------------------------------------------------------------------------


def settings(**given: Any) -> Control:
    return Control(**{"environment": "CartPole-v1", "steps": 100} | given)


def test_the_algorithms_are_settings_of_one_update():
    ppo = control.plan(settings(clip=0.1, clip_high=0.3, epochs=7, minibatches=3))
    assert (ppo.objective.epochs, ppo.objective.minibatches) == (7, 3)
    assert (ppo.objective.clip_low, ppo.objective.clip_high) == (0.1, 0.3)
    assert (ppo.stretch, ppo.lam) == (128, 0.95)
    plain = control.plan(settings())
    assert (plain.objective.clip_low, plain.objective.clip_high, plain.objective.epochs) == (
        0.2,
        0.2,
        4,
    )
    for algorithm, stretch, lam in (("a2c", 16, 0.95), ("reinforce", None, 1.0)):
        told = control.plan(settings(algorithm=algorithm))
        assert (told.objective.epochs, told.objective.minibatches) == (1, 1)
        assert told.objective.clip_low == told.objective.clip_high == float("inf")
        assert (told.stretch, told.lam) == (stretch, lam)
    assert control.plan(settings(gae_lambda=0.0)).lam == 0.0
    assert control.plan(settings(learning_rate=0.5)).value_learning_rate == 0.5
    assert control.plan(settings(value_learning_rate=0.1)).value_learning_rate == 0.1


MISTAKES = [
    ("an unknown environment", "environment: CartPol-v1", ["control.environment: no such environment: CartPol-v1; did you mean `CartPole-v1`?"]),
    ("an old version", "environment: CartPole-v7", ["control.environment: no such environment: CartPole-v7; did you mean `CartPole-v1`?"]),
    ("a module that is not there", "environment: 'nothing_here:World-v0'", ["control.environment: no such environment: nothing_here:World-v0"]),
    ("an option that the environment does not take", "environment_options: {gravity_: 3}", ["control.environment_options: CartPole-v1 refuses", "gravity_"]),
    ("a discrete world with a continuous distribution", "distribution: gaussian", ["control.distribution: CartPole-v1 has 2 discrete actions: expected categorical"]),
    ("a continuous world with a discrete distribution", "{environment: Pendulum-v1, distribution: categorical}", ["control.distribution: Pendulum-v1 has continuous actions", "gaussian or squashed"]),
    ("a world of cards", "environment: Blackjack-v1", ["control.environment: Blackjack-v1 shows Tuple", "one vector of numbers"]),
    ("a clip for A2C", "{algorithm: a2c, clip: 0.2}", ["control: `clip` has no effect with `algorithm: a2c`"]),
    ("a stretch for REINFORCE", "{algorithm: reinforce, n_steps: 5}", ["`algorithm: reinforce` collects whole episodes; remove `n_steps`"]),
    ("a lambda for REINFORCE", "{algorithm: reinforce, gae_lambda: 0.5}", ["remove `gae_lambda`"]),
    ("no baseline for PPO", "baseline: none", ["`algorithm: ppo` requires values"]),
    ("more minibatches than steps", "{n_envs: 4, n_steps: 8, minibatches: 33}", ["control: `minibatches` (33) must not exceed `n_envs` times `n_steps` (32)"]),
    ("a seed twice", "seeds: [1, 1]", ["`seeds` contains 1 more than once"]),
    ("a seed alone", "seeds: 1", ["control.seeds: expected a list, got 1"]),
    ("a text for steps", "steps: 1e5", ["control.steps: expected a whole number, got the text '1e5'"]),
    ("an algorithm that is not there", "algorithm: pppo", ["did you mean `ppo`?"]),
    ("a misspelt key", "horizon: 5", ["control.horizon: unknown key"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "told"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES]
)
def test_a_mistake_is_a_line_with_its_repair_before_anything_runs(changes, told, launch, tmp_path):
    given = {"environment": "CartPole-v1", "steps": 1000}
    import yaml

    given |= yaml.safe_load(changes)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"stages": {"control": given}}))
    left = launch("recipe.yaml")
    assert left.code == 2, left.out + left.err
    assert "Traceback" not in left.err
    assert any(all(piece in line for piece in told) for line in left.err.splitlines()), left.err
    assert "recipe.yaml:" in left.err
    assert not list(tmp_path.glob("runs/control-*"))


@pytest.mark.parametrize(
    ("environment", "hidden", "extra"),
    [("LunarLander-v3", "Box2D", "box2d"), ("HalfCheetah-v5", "mujoco", "mujoco"), ("CartPole-v1", "gymnasium", "control")],
)  # fmt: skip
def test_an_extra_that_is_not_installed_is_named(environment, hidden, extra, monkeypatch):
    for name in [
        n for n in sys.modules if n.startswith(("gymnasium.envs.box2d", "gymnasium.envs.mujoco"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, hidden, None)
    with pytest.raises(spaces.UnfitError, match=rf"pip install -e '.\[{extra}\]'"):
        spaces.inspect_env(environment, {}, None)


def test_plan_and_check_look_at_the_environment_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.yaml").write_text(SMALL)
    (tmp_path / "bad.yaml").write_text(SMALL.replace("CartPole-v1", "CartPol-v1"))
    for command in (main.plan, main.check):
        command(Path("good.yaml"))
        with pytest.raises(UserError, match="did you mean `CartPole-v1`"):
            command(Path("bad.yaml"))
    out = capsys.readouterr().out
    assert "4,000" in out  # steps of two seeds
    assert "no errors" in out
    assert not (tmp_path / "runs").exists()


# Interruption ---------------------------------------------------------------------------------------------------------


def start(runs: Path, text: str, seconds_between: float = 0.0) -> int:
    """Run a recipe in a fork of this process that writes a checkpoint after each update; its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        log = (runs.parent / "log").open("a")
        os.dup2(log.fileno(), 2)
        signals.install()
        control.SECONDS_BETWEEN_CHECKPOINTS = seconds_between
        (runs.parent / "recipe.yaml").write_text(text)
        runner.run_recipe(
            recipe.load_recipe(runs.parent / "recipe.yaml"), runs, Display(Console(file=log))
        )
        code = 0
    except signals.Interrupted:
        code = 130
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def finish(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wait_for(pid: int, runs: Path, pattern: str) -> None:
    while not list(runs.glob(pattern)):
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), (runs.parent / "log").read_text()
        time.sleep(0.002)


def same(done: Path, runs: Path) -> bool:
    (folder,) = runs.glob("control-*")
    names = [f"policy-{seed}.safetensors" for seed in (3, 5)]
    assert not list(folder.glob("checkpoint-*"))
    lines = [
        json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    assert lines == sorted(set(lines))
    assert len(lines) == 32
    return all((folder / name).read_bytes() == (done / name).read_bytes() for name in names)


@pytest.mark.parametrize("at", ["checkpoint-[23]???", "curve-3.json"])
def test_killed_and_started_again_it_ends_in_the_same_policies(at, done, tmp_path):
    pid = start(tmp_path / "runs", SMALL)
    wait_for(pid, tmp_path / "runs", f"control-*/{at}")
    os.kill(pid, signal.SIGKILL)
    finish(pid)
    (curve,) = (tmp_path / "runs").glob("control-*/curve-3.json")  # the first seed was done by then
    before = curve.read_bytes()
    assert finish(start(tmp_path / "runs", SMALL, 1e9)) == 0, (tmp_path / "log").read_text()
    assert same(done, tmp_path / "runs")
    assert curve.read_bytes() == before  # with its seconds: it was not trained again


def test_each_seed_has_the_checkpoints_between_its_neighbours(tmp_path):
    for number in (1500, 2500, 3999):
        (tmp_path / f"checkpoint-{number}").mkdir()
        checkpoints.mark_complete(tmp_path / f"checkpoint-{number}", world_size=1)
    told = settings(seeds=[3, 5], steps=2000)
    found = [[c.name for c in control._checkpoints(told, seed, tmp_path)] for seed in (3, 5)]
    assert found == [["checkpoint-1500"], ["checkpoint-2500", "checkpoint-3999"]]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_a_checkpoint_and_the_same_command_goes_on_there(number, done, tmp_path):
    runs = tmp_path / "runs"
    pid = start(runs, SMALL, 1e9)  # the signal's checkpoint is the only one
    wait_for(pid, runs, "control-*/metrics.jsonl")
    os.kill(pid, number)
    assert finish(pid) == 130, (tmp_path / "log").read_text()
    (folder,) = runs.glob("control-*")
    assert artifacts.read_artifact(folder) is None
    (checkpoint,) = checkpoints.list_checkpoints(folder)
    assert finish(start(runs, SMALL, 1e9)) == 0, (tmp_path / "log").read_text()
    assert (
        f"going on from step {int(checkpoint.name[11:]) % 2000:,}" in (tmp_path / "log").read_text()
    )
    assert same(done, runs)


# Several processes ----------------------------------------------------------------------------------------------------


def test_processes_share_the_seeds(tmp_path, monkeypatch):
    class Quiet:
        def __getattr__(self, name: str) -> Any:
            return lambda *_: None

    trained: list[int] = []
    monkeypatch.setattr(control, "_train", lambda told, world, seed, *rest: trained.append(seed))
    monkeypatch.setattr(distributed, "barrier", lambda: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    found = control.run(settings(seeds=[7, 8, 9, 10, 11]), {}, tmp_path, Quiet())  # type: ignore[arg-type]
    assert (trained, found.metrics) == ([8, 10], {})
    assert list(tmp_path.iterdir()) == []  # what is written once, the main process writes


@pytest.mark.slow
def test_two_processes_end_in_the_policies_of_one(done, tmp_path):
    (tmp_path / "recipe.yaml").write_text(SMALL)
    config = str(ROOT / "accelerate_configs" / "cpu.yaml")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    left = subprocess.run(
        [*command, str(ROOT / "align" / "run.py"), "recipe.yaml"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert left.returncode == 0, left.stderr
    assert left.stdout.count("control: ran") == 1
    (folder,) = (tmp_path / "runs").glob("control-*")
    for seed in (3, 5):
        name = f"policy-{seed}.safetensors"
        assert (folder / name).read_bytes() == (done / name).read_bytes()
    made = artifacts.read_artifact(folder)
    assert made is not None
    assert [row["seed"] for row in made.metrics["control"]] == [3, 5]


# Playing --------------------------------------------------------------------------------------------------------------


def test_play_writes_a_gif_of_the_episode_and_says_its_return(done, tmp_path, capsys):
    file = tmp_path / "cart.gif"
    main.play("control", runs=done.parent, gif=file, episodes=2, seed=5)
    said = capsys.readouterr().out.splitlines()
    returns = [float(line.rpartition(" ")[2]) for line in said if ": return " in line]
    assert len(returns) == 2
    assert all(line.startswith("CartPole-v1, seed 5: ") for line in said[:2])
    # Every step and the end of both episodes, of which every second is kept: 50 frames a second are played at 25.
    kept = -(-int(sum(returns) + 2) // 2)
    with Image.open(file) as picture:
        lasting = []
        for frame in range(picture.n_frames):  # frames that are alike are one that lasts longer
            picture.seek(frame)
            lasting.append(picture.info["duration"])
        assert sum(lasting) == 40 * kept
        assert picture.n_frames > kept // 2
        assert picture.size == (600, 400)
        assert len(picture.convert("RGB").getcolors(10_000) or []) > 5


def test_play_takes_the_policy_of_the_seed_that_it_is_told(done):
    trained = policy_files.load(done, 5)
    stored = load_file(done / "policy-5.safetensors")
    assert torch.equal(trained.policy.body[0].weight, stored["policy.body.0.weight"])
    assert trained.statistics is not None
    assert trained.statistics.count == pytest.approx(2048 + 8, abs=0.01)  # all that was ever seen


def test_play_in_a_window_without_a_screen_is_told(done, monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "no-such-driver")
    with pytest.raises(UserError, match=r"nothing can be drawn here .*--gif FILE"):
        play.play(done, gif=None, episodes=1, seed=None)


def test_what_play_cannot_find_is_told(done, tmp_path):
    with pytest.raises(UserError, match=r"no finished policy `contrl`; did you mean `control`"):
        lookup.find_control_policy("contrl", done.parent)
    with pytest.raises(UserError, match=r"no finished policy `control`; run .*cartpole_ppo.yaml"):
        lookup.find_control_policy("control", tmp_path)
    with pytest.raises(UserError, match=r"no policy.json; name a `control` stage"):
        lookup.find_control_policy(str(tmp_path), done.parent)
    with pytest.raises(UserError, match=r"no policy of seed 4; found 3, 5"):
        play.play(done, gif=None, episodes=1, seed=4)
    with pytest.raises(UserError, match=r"expected a file that ends in .gif"):
        play.play(done, gif=tmp_path / "cart.mp4", episodes=1, seed=None)
    assert (
        lookup.find_control_policy("control", done.parent)
        == lookup.find_control_policy(str(done), tmp_path)
        == done
    )
