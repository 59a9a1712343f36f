"""The stage `control`: files, tables, errors, resuming, several ranks, `align play`.

``ALIGN_SEEDS=5`` trains CartPole with five seeds, and LunarLander; the default is one seed.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.damage import DAMAGES
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from align.cli import main, play
from align.config import recipe
from align.config.base import GymEnvironment
from align.config.control.policy_gradient import PolicyGradient
from align.control import policy_files, spaces
from align.control.policy_gradient import build_objective
from align.errors import ArtifactError, UserError
from align.pipeline import lookup, runner
from align.runtime import artifacts, checkpoints, distributed
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
N_SEEDS = int(os.environ.get("ALIGN_SEEDS", "1"))


@pytest.fixture(scope="module", autouse=True)
def sdl_without_a_screen() -> Any:
    """SDL renders without a screen."""
    before = os.environ.get("SDL_VIDEODRIVER")
    os.environ["SDL_VIDEODRIVER"] = "dummy"
    yield
    os.environ.pop("SDL_VIDEODRIVER") if before is None else os.environ.update(
        SDL_VIDEODRIVER=before
    )


def call(runs: Path, text: str = SMALL, *overrides: str, file: Any = None) -> dict[str, Any]:
    """Run a recipe in this process, with output to ``file``. Returns its only stage."""
    (runs.parent / "recipe.yaml").write_text(text)
    console = Console(file=file, quiet=file is None)
    loaded = recipe.load_recipe(runs.parent / "recipe.yaml", overrides)
    return runner.run_recipe(loaded, runs, Display(console)).as_json()["stages"][0]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small finished stage."""
    return Path(call(tmp_path_factory.mktemp("done") / "runs")["folder"])


# Results ------------------------------------------------------------------------------------------


def test_the_folder_of_a_finished_stage(done):
    names = {path.name for path in done.iterdir()}
    assert names == {
        "artifact.json", "metrics.jsonl", "curves.png", "policy.json", "policy-3.safetensors",
        "policy-5.safetensors", "curve-3.json", "curve-5.json",
    }  # fmt: skip
    artifact = artifacts.read_artifact(done)
    assert artifact is not None
    assert [row["seed"] for row in artifact.metrics["control"]] == [3, 5]
    for row in artifact.metrics["control"]:
        curve = json.loads((done / f"curve-{row['seed']}.json").read_text())
        assert len(curve["returns"]) == 20
        assert row["mean_return"] == pytest.approx(sum(curve["returns"]) / 20)
        assert row["ci"][0] <= row["mean_return"] <= row["ci"][1]
        assert row["lowest"] == min(curve["returns"])
        assert row["steps"] == curve["steps"] == curve["curve"][-1]["steps"] == 2048
        assert row["steps_per_second"] == pytest.approx(2048 / row["seconds"], rel=0.01)
        assert row["seconds"] == pytest.approx(curve["curve"][-1]["seconds"], abs=0.001)
    lines = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    # 16 updates of 128 steps per seed, of which 2,000 count; the second seed continues from there.
    steps = [*range(128, 2000, 128), 2000]
    assert [line["step"] for line in lines] == [first + s for first in (0, 2000) for s in steps]
    keys = {"return", "policy_loss", "value_loss", "entropy", "kl", "clip_fraction", "seconds"}
    assert all(keys | {"explained_variance", "seed"} <= line.keys() for line in lines)
    with Image.open(done / "curves.png") as picture:
        assert min(picture.size) > 500


def test_a_seed_gives_the_same_policy_alone_and_with_others(done, tmp_path):
    three, five = (load_file(done / f"policy-{seed}.safetensors") for seed in (3, 5))
    assert any(not torch.equal(three[name], five[name]) for name in three)
    alone = Path(call(tmp_path / "runs", SMALL, "control.seeds=[5]")["folder"])
    repeated = load_file(alone / "policy-5.safetensors")
    assert all(torch.equal(five[name], repeated[name]) for name in five)
    assert {"policy.body.0.weight", "critic.0.weight", "statistics.mean"} <= five.keys()


@pytest.mark.slow
def test_a_second_run_reuses_the_stage_and_prints_the_same_table(launch, tmp_path):
    (tmp_path / "recipe.yaml").write_text(SMALL)
    first = launch("recipe.yaml")
    assert first.code == 0, first.err
    lines = [line.split() for line in first.out.splitlines()]
    assert ["seed", "return", "interval", "lowest", "steps", "seconds", "steps/s"] in lines
    rows = [row for row in lines if row and row[0] in ("3", "5") and "2,048" in row]
    assert len(rows) == 2
    # Of equal returns, the interval is one number: "87.7" and not "87.7 to 87.7".
    assert all(row[2] != row[row.index("to") + 1] for row in rows if "to" in row)
    again = launch("recipe.yaml")
    assert "control: reused" in again.out
    assert [line for line in again.out.splitlines() if "2,048" in line] == [
        line for line in first.out.splitlines() if "2,048" in line
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cartpole_ppo", "cartpole_reinforce", "cartpole_a2c"])
def test_each_recipe_solves_cartpole(name, tmp_path):
    text = (RECIPES / f"{name}.yaml").read_text()
    stage = call(tmp_path / "runs", text, f"control.seeds={list(range(N_SEEDS))}")
    rows = stage["metrics"]["control"]
    assert [row["seed"] for row in rows] == list(range(N_SEEDS))
    assert min(row["mean_return"] for row in rows) >= SOLVED
    if name == "cartpole_reinforce":
        for seed in range(N_SEEDS):
            curve = json.loads((Path(stage["folder"]) / f"curve-{seed}.json").read_text())["curve"]
            points = [p for p in curve if "gradient_variance/without" in p]
            assert len(points) >= 20
            is_less = [
                p["gradient_variance/with_baseline"] < p["gradient_variance/without"]
                for p in points
            ]
            assert sum(is_less) >= len(points) - 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("acrobot_ppo", -100),
        pytest.param(
            "lunarlander_ppo",
            200,
            marks=pytest.mark.skipif(N_SEEDS < 5, reason="takes minutes; ALIGN_SEEDS=5 runs it"),
        ),
    ],
)
def test_the_other_recipes_reach_their_targets(name, target, tmp_path):
    text = (RECIPES / f"{name}.yaml").read_text()
    (row,) = call(tmp_path / "runs", text, "control.seeds=[0]")["metrics"]["control"]
    assert row["mean_return"] >= target


@pytest.mark.slow
@pytest.mark.parametrize("name", ["halfcheetah_ppo", "humanoid_ppo"])
def test_the_recipes_that_take_long_complete_their_first_updates(name, tmp_path):
    text = (RECIPES / f"{name}.yaml").read_text()
    changes = ("control.seeds=[0]", "control.steps=6_000", "control.episodes=2")
    (row,) = call(tmp_path / "runs", text, *changes)["metrics"]["control"]
    assert row["steps"] >= 6_000


# Settings and errors ------------------------------------------------------------------------------


def settings(**changes: Any) -> PolicyGradient:
    return PolicyGradient(**{"environment": "CartPole-v1", "steps": 100} | changes)


def test_the_algorithms_are_settings_of_one_update():
    ppo = settings(clip=0.1, clip_high=0.3, epochs=7, minibatches=3)
    objective = build_objective(ppo)
    assert (objective.epochs, objective.minibatches) == (7, 3)
    assert (objective.clip_low, objective.clip_high) == (0.1, 0.3)
    assert (ppo.rollout_steps, ppo.advantage_lambda) == (128, 0.95)
    objective = build_objective(settings())
    assert (objective.clip_low, objective.clip_high, objective.epochs) == (0.2, 0.2, 4)
    assert objective.whiten is True
    assert build_objective(settings(normalize_advantages="minibatch")).whiten == "minibatch"
    for algorithm, n_steps, gae_lambda in (("a2c", 16, 0.95), ("reinforce", None, 1.0)):
        config = settings(algorithm=algorithm)
        objective = build_objective(config)
        assert (objective.epochs, objective.minibatches) == (1, 1)
        assert objective.clip_low == objective.clip_high == float("inf")
        assert (config.rollout_steps, config.advantage_lambda) == (n_steps, gae_lambda)
    assert settings(gae_lambda=0.0).advantage_lambda == 0.0
    assert settings(learning_rate=0.5).critic_learning_rate == 0.5
    assert settings(value_learning_rate=0.1).critic_learning_rate == 0.1


ERRORS = [  # name, keys of the recipe, texts that one line of the error contains
    ("an unknown environment", {"environment": "CartPol-v1"}, ["control.environment: unknown environment CartPol-v1; did you mean `CartPole-v1`?"]),
    ("an old version", {"environment": "CartPole-v7"}, ["control.environment: unknown environment CartPole-v7; did you mean `CartPole-v1`?"]),
    ("a missing module", {"environment": "nothing_here:World-v0"}, ["control.environment: unknown environment nothing_here:World-v0"]),
    ("an unknown option of the environment", {"environment_options": {"gravity_": 3}}, ["control.environment_options: CartPole-v1 does not accept", "gravity_"]),
    ("no limit", {"environment_options": {"max_episode_steps": -1}}, ["`environment_options.max_episode_steps` must be a whole number from 1, got -1"]),
    ("discrete actions, a continuous distribution", {"distribution": "gaussian"}, ["control.distribution: CartPole-v1 has 2 discrete actions; expected categorical"]),
    ("continuous actions, a discrete distribution", {"environment": "Pendulum-v1", "distribution": "categorical"}, ["control.distribution: Pendulum-v1 has continuous actions", "gaussian or squashed"]),
    ("a tuple of observations", {"environment": "Blackjack-v1"}, ["control.environment: Blackjack-v1 has observations Tuple", "one vector of numbers"]),
    ("a clip for A2C", {"algorithm": "a2c", "clip": 0.2}, ["control: `clip` has no effect with `algorithm: a2c`"]),
    ("a cost limit for A2C", {"algorithm": "a2c", "cost_limit": 5.0}, ["control: `cost_limit` has no effect with `algorithm: a2c`; remove it, or set `algorithm: ppo`"]),
    ("a cost limit without costs", {"cost_limit": 5.0}, ["control.cost_limit: CartPole-v1 has no `cost` in the `info` of a step; remove the key, or change the environment"]),
    ("a multiplier without a limit", {"multiplier_learning_rate": 0.1}, ["control: `multiplier_learning_rate` has no effect without `cost_limit`"]),
    ("minibatches of A2C", {"algorithm": "a2c", "normalize_advantages": "minibatch"}, ["control: `algorithm: a2c` has no minibatches; set `normalize_advantages: true`, or `algorithm: ppo`"]),
    ("neither true nor minibatch", {"normalize_advantages": "batch"}, ["control.normalize_advantages: expected true, false or 'minibatch', got the text 'batch'; did you mean `minibatch`?"]),
    ("n_steps for REINFORCE", {"algorithm": "reinforce", "n_steps": 5}, ["`algorithm: reinforce` collects whole episodes; remove `n_steps`"]),
    ("a lambda for REINFORCE", {"algorithm": "reinforce", "gae_lambda": 0.5}, ["remove `gae_lambda`"]),
    ("no baseline for PPO", {"baseline": "none"}, ["`algorithm: ppo` requires values"]),
    ("more minibatches than steps", {"n_envs": 4, "n_steps": 8, "minibatches": 33}, ["control: `minibatches` (33) must not exceed `n_envs` times `n_steps` (32)"]),
    ("no batched environment", {"environment": "Acrobot-v1", "vectorization": "batched"}, ["`vectorization: batched` does not support `environment: Acrobot-v1`; expected CartPole-v1 or Pendulum-v1"]),
    ("an option of Gymnasium's environment", {"vectorization": "batched", "environment_options": {"sutton_barto_reward": True}}, ["control: `environment_options.sutton_barto_reward` has no effect with `vectorization: batched`"]),
    ("a seed twice", {"seeds": [1, 1]}, ["`seeds` contains 1 more than once"]),
    ("a seed that is no list", {"seeds": 1}, ["control.seeds: expected a list, got 1"]),
    ("a text for steps", {"steps": "1e5"}, ["control.steps: expected a whole number, got the text '1e5'"]),
    ("an unknown algorithm", {"algorithm": "pppo"}, ["did you mean `ppo`?"]),
    ("a key of other algorithms", {"epsilon": 0.1}, ["control.epsilon: unknown key; algorithms with this key: q_learning, sarsa"]),
    ("an algorithm for states with numbers", {"algorithm": "q_learning"}, ["control.environment: CartPole-v1 has Box", "the algorithm needs numbered states"]),
    ("an unknown key", {"horizon": 5}, ["control.horizon: unknown key"]),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "texts"), [e[1:] for e in ERRORS], ids=[e[0] for e in ERRORS])
def test_an_invalid_recipe_gives_one_line_with_the_repair(changes, texts, launch, tmp_path):
    keys = {"environment": "CartPole-v1", "steps": 1000} | changes
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"stages": {"control": keys}}))
    ended = launch("recipe.yaml")
    assert ended.code == 2, ended.out + ended.err
    assert "Traceback" not in ended.err
    assert any(all(text in line for text in texts) for line in ended.err.splitlines()), ended.err
    assert "recipe.yaml:" in ended.err
    assert not list(tmp_path.glob("runs/control-*"))


@pytest.mark.parametrize(
    ("environment", "hidden", "extra"),
    [("LunarLander-v3", "Box2D", "box2d"), ("HalfCheetah-v5", "mujoco", "mujoco"), ("CartPole-v1", "gymnasium", "control")],
)  # fmt: skip
def test_the_error_of_a_missing_dependency_names_the_extra(environment, hidden, extra, monkeypatch):
    for name in [
        n for n in sys.modules if n.startswith(("gymnasium.envs.box2d", "gymnasium.envs.mujoco"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, hidden, None)
    with pytest.raises(spaces.UnfitError, match=rf"pip install -e '.\[{extra}\]'"):
        spaces.inspect_env(GymEnvironment(environment, {}))


@pytest.mark.parametrize(
    ("environment", "options", "message"),
    [
        ("FrozenLake-v1", {"map_name": "9x9"}, "does not accept {'map_name': '9x9'}: KeyError: '9x9'"),
        ("LunarLander-v3", {"gravity": 5}, "AssertionError: gravity (current value: 5) must be"),
        ("Pendulum-v1", {"g": "x"}, "does not accept {'g': 'x'}: unsupported operand"),  # in a step
    ],
)  # fmt: skip
def test_an_option_that_breaks_an_environment_is_an_error(environment, options, message):
    if environment == "LunarLander-v3":
        pytest.importorskip("Box2D", reason="the extra [box2d] is not installed")
    with pytest.raises(spaces.UnfitError, match=re.escape(message)) as error:
        spaces.inspect_env(GymEnvironment(environment, options))
    assert error.value.key == "environment_options"


def test_a_module_that_breaks_is_an_error_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_environment.py").write_text("1 / 0")
    message = "broken_environment:Any-v0 cannot be made: ZeroDivisionError: division by zero; ch"
    with pytest.raises(spaces.UnfitError, match=message) as error:
        spaces.inspect_env(GymEnvironment("broken_environment:Any-v0", {}))
    assert error.value.key == "environment"


def test_plan_and_check_inspect_the_environment(tmp_path, monkeypatch, capsys):
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


# Interruption -------------------------------------------------------------------------------------
# The interrupted run is a subprocess; the same recipe is resumed in this process.

RUN = """\
import sys
from pathlib import Path
from align.cli import run
from align.stages import control

control.SECONDS_BETWEEN_CHECKPOINTS = float(sys.argv.pop(1))
sys.argv[0] = "run.py"
run.main()
"""


class Run:
    """A run of the small recipe in a subprocess."""

    def __init__(self, folder: Path, *, seconds_between_checkpoints: float) -> None:
        self.runs = folder / "runs"
        self.log = folder / "log"
        (folder / "recipe.yaml").write_text(SMALL)
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", RUN, str(seconds_between_checkpoints), "recipe.yaml"],
                cwd=folder,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=log,
            )

    def wait_for(self, pattern: str) -> None:
        """Wait until a file of the run matches the pattern."""
        while not list(self.runs.glob(pattern)):
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.002)

    def finish(self) -> int:
        """Wait for the end of the run. Returns its exit code."""
        return self.process.wait(timeout=120)


def assert_finished_like(done: Path, runs: Path) -> None:
    (folder,) = runs.glob("control-*")
    assert not list(folder.glob("checkpoint-*"))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == sorted(set(steps))
    assert len(steps) == 32
    for seed in (3, 5):
        name = f"policy-{seed}.safetensors"
        assert (folder / name).read_bytes() == (done / name).read_bytes()


@pytest.mark.parametrize("pattern", ["checkpoint-[23]???", "curve-3.json"])
@pytest.mark.slow
def test_a_killed_run_resumes_and_ends_in_the_same_policies(pattern, done, tmp_path):
    killed = Run(tmp_path, seconds_between_checkpoints=0.0)
    killed.wait_for(f"control-*/{pattern}")
    killed.process.kill()
    killed.finish()
    (curve,) = killed.runs.glob("control-*/curve-3.json")  # the first seed was finished
    before = curve.read_bytes()
    call(killed.runs)
    assert_finished_like(done, killed.runs)
    assert curve.read_bytes() == before  # including its seconds: it was not trained again


def test_the_checkpoints_of_a_seed_lie_between_those_of_its_neighbors(tmp_path):
    for number in (1500, 2500, 3999):
        (tmp_path / f"checkpoint-{number}").mkdir()
        checkpoints.mark_complete(tmp_path / f"checkpoint-{number}", world_size=1)
    config = settings(seeds=[3, 5], steps=2000)
    names = [[c.name for c in control.seed_checkpoints(config, s, tmp_path)] for s in (3, 5)]
    assert names == [["checkpoint-1500"], ["checkpoint-2500", "checkpoint-3999"]]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.slow
def test_a_signal_saves_a_checkpoint_from_which_the_run_resumes(number, done, tmp_path):
    # The checkpoint of the signal is the only one.
    interrupted = Run(tmp_path, seconds_between_checkpoints=1e9)
    interrupted.wait_for("control-*/metrics.jsonl")
    interrupted.process.send_signal(number)
    assert interrupted.finish() == 130, interrupted.log.read_text()
    (folder,) = interrupted.runs.glob("control-*")
    assert artifacts.read_artifact(folder) is None
    (checkpoint,) = checkpoints.list_checkpoints(folder)
    out = io.StringIO()
    call(interrupted.runs, file=out)
    step = int(checkpoint.name.removeprefix("checkpoint-")) % 2000
    assert f"resuming from step {step:,}" in out.getvalue()
    assert_finished_like(done, interrupted.runs)


# Damage -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kept"), [("policy-5.safetensors", True), ("curve-3.json", False)]
)
@pytest.mark.slow
def test_a_damaged_file_of_a_finished_seed_trains_it_again(done, tmp_path, name, kept):
    runs = tmp_path / "runs"
    shutil.copytree(done.parent, runs)
    (folder,) = runs.glob("control-*")
    (folder / artifacts.FILE).unlink()
    DAMAGES["a flipped bit"](folder / name)
    curve = (folder / "curve-3.json").read_bytes()
    out = io.StringIO()
    call(runs, file=out)
    assert f"{folder / name}: " in out.getvalue()
    assert f"trained again from seed {name[7 if kept else 6]} on" in out.getvalue()
    assert_finished_like(done, runs)
    assert ((folder / "curve-3.json").read_bytes() == curve) == kept


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Code:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "executed",)

    torch.save({"policy": Code()}, tmp_path / "state.pt")
    with pytest.raises(UserError, match="code in it is not run"):
        control._load_state(tmp_path / "state.pt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("damage", sorted(DAMAGES))
def test_play_names_the_damaged_file_of_a_finished_stage(done, tmp_path, damage):
    folder = tmp_path / done.name
    shutil.copytree(done, folder)
    options = {"gif": tmp_path / "x.gif", "episodes": 1, "seed": None}
    for name in ("artifact.json", "policy.json", "policy-3.safetensors"):
        whole = (folder / name).read_bytes()
        DAMAGES[damage](folder / name)
        for policy in ("control", str(folder)):
            with pytest.raises(UserError, match=re.escape(name) + "|no finished policy"):
                main.play(policy, runs=tmp_path, **options)
            if name == "artifact.json" and damage == "deleted":
                break  # a folder from elsewhere, without checksums
        if (folder / name).is_dir():
            (folder / name).rmdir()
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(whole)


@pytest.mark.parametrize("damage", sorted(DAMAGES))
def test_play_names_a_damaged_file_of_a_folder_without_checksums(done, tmp_path, damage):
    for name in ("policy.json", "policy-3.safetensors"):
        for each in ("policy.json", "policy-3.safetensors"):
            shutil.copy(done / each, tmp_path / each)
        if (name, damage) == ("policy-3.safetensors", "a flipped bit"):
            continue  # only a checksum reveals it
        DAMAGES[damage](tmp_path / name)
        with pytest.raises(UserError, match=r"policy(-3|)\.|no policy"):
            policy = lookup.find_control_policy(str(tmp_path), tmp_path)
            play.play(policy, gif=tmp_path / "x.gif", episodes=1, seed=None)
        if (tmp_path / name).is_dir():
            (tmp_path / name).rmdir()
        (tmp_path / name).unlink(missing_ok=True)


# Several ranks ------------------------------------------------------------------------------------


def test_ranks_share_the_seeds(tmp_path, monkeypatch):
    class NullLogger:
        def __getattr__(self, name: str) -> Any:
            return lambda *_: None

    trained: list[int] = []
    monkeypatch.setattr(control, "_train", lambda config, spec, seed, *rest: trained.append(seed))
    monkeypatch.setattr(distributed, "barrier", lambda: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    result = control.run(settings(seeds=[7, 8, 9, 10, 11]), {}, tmp_path, NullLogger())  # type: ignore[arg-type]
    assert (trained, result.metrics) == ([8, 10], {})
    assert list(tmp_path.iterdir()) == []  # the main rank writes the common files


@pytest.mark.slow
def test_two_ranks_train_the_policies_of_one(done, tmp_path):
    (tmp_path / "recipe.yaml").write_text(SMALL)
    config = str(ROOT / "accelerate_configs" / "cpu.yaml")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    process = subprocess.run(
        [*command, str(ROOT / "align" / "run.py"), "recipe.yaml"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("control: ran") == 1
    (folder,) = (tmp_path / "runs").glob("control-*")
    for seed in (3, 5):
        name = f"policy-{seed}.safetensors"
        assert (folder / name).read_bytes() == (done / name).read_bytes()
    artifact = artifacts.read_artifact(folder)
    assert artifact is not None
    assert [row["seed"] for row in artifact.metrics["control"]] == [3, 5]


# Playing ------------------------------------------------------------------------------------------


def test_play_writes_a_gif_and_prints_the_returns(done, tmp_path, capsys):
    file = tmp_path / "cart.gif"
    main.play("control", runs=done.parent, gif=file, episodes=2, seed=5)
    lines = capsys.readouterr().out.splitlines()
    returns = [float(line.rpartition(" ")[2]) for line in lines if ": return " in line]
    assert len(returns) == 2
    assert all(line.startswith("CartPole-v1, seed 5: ") for line in lines[:2])
    # A frame for each step and for the end of both episodes; of 50 frames a second, 25 are kept.
    n_frames = -(-int(sum(returns) + 2) // 2)
    with Image.open(file) as picture:
        durations = []
        for frame in range(picture.n_frames):  # equal frames are one frame that lasts longer
            picture.seek(frame)
            durations.append(picture.info["duration"])
        assert sum(durations) == 40 * n_frames
        assert picture.n_frames > n_frames // 2
        assert picture.size == (600, 400)
        assert len(picture.convert("RGB").getcolors(10_000) or []) > 5


def test_the_policy_of_a_seed_is_loaded(done):
    trained = policy_files.load(done, 5)
    stored = load_file(done / "policy-5.safetensors")
    assert torch.equal(trained.policy.body[0].weight, stored["policy.body.0.weight"])
    assert trained.statistics is not None
    assert trained.statistics.count == pytest.approx(2048 + 8, abs=0.01)  # all observations


def test_play_without_a_screen_suggests_a_gif(done, monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "no-such-driver")
    with pytest.raises(UserError, match=r"cannot open a window .*--gif FILE"):
        play.play(done, gif=None, episodes=1, seed=None)


def test_a_folder_of_another_version_is_refused_with_the_missing_keys(done, tmp_path):
    description = json.loads((done / "policy.json").read_text())
    description["world"], description["hidden"] = (
        description.pop("spec"),
        description.pop("hidden_sizes"),
    )
    (tmp_path / "policy.json").write_text(json.dumps(description))
    with pytest.raises(
        ArtifactError,
        match=r"policy.json: no `spec`, `hidden_sizes`, so .*; run the `control` stage",
    ):
        play.play(tmp_path, gif=None, episodes=1, seed=None)


def test_errors_of_play_name_what_is_missing(done, tmp_path):
    with pytest.raises(UserError, match=r"no finished policy `contrl`; did you mean `control`"):
        lookup.find_control_policy("contrl", done.parent)
    with pytest.raises(UserError, match=r"no finished policy `control`; run .*cartpole_ppo.yaml"):
        lookup.find_control_policy("control", tmp_path)
    with pytest.raises(UserError, match=r"no policy.json; name a `control` stage"):
        lookup.find_control_policy(str(tmp_path), done.parent)
    with pytest.raises(UserError, match=r"no policy of seed 4; found 3, 5"):
        play.play(done, gif=None, episodes=1, seed=4)
    with pytest.raises(UserError, match=r"expected a file name ending in .gif"):
        play.play(done, gif=tmp_path / "cart.mp4", episodes=1, seed=None)
    assert (
        lookup.find_control_policy("control", done.parent)
        == lookup.find_control_policy(str(done), tmp_path)
        == done
    )
