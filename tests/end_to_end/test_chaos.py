"""Runs that are killed at random moments, in every way, end in the same results, bit for bit.

These are the weights, and the win rates of what was trained, with the completions behind them.
The number of kills is an option: ``pytest -m slow tests/end_to_end/test_chaos.py --kills 50``.
Results of one and of two processes are compared with those of the same number.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from helpers import recipe_runs
from helpers.recipe_runs import log

from align.runtime import artifacts

ROOT = Path(__file__).parents[2]
SECONDS = 300  # no run takes that long, also on a busy machine
RECIPE = """\
stages:
  prepare: {source: embedded, max_rows: 60}
  sft:
    model:
      vocab_size: 300
      hidden_size: 32
      intermediate_size: 64
      num_hidden_layers: 2
      num_attention_heads: 2
    trainer: &trainer
      learning_rate: 1.0e-2
      max_steps: 16
      per_device_train_batch_size: 4
      save_steps: 3
      logging_steps: 2
      bf16: false
      gradient_checkpointing: false
  dpo: {model: sft, trainer: *trainer}
  kto: {model: sft, trainer: *trainer}
  reward: {model: sft, trainer: *trainer}
  ppo:
    model: sft
    rewards: [reward]
    steps: 8
    batch_size: 8
    max_new_tokens: 8
    learning_rate: 5.0e-3
    epochs: 2
    minibatches: 2
    save_steps: 3
""" + "".join(
    f"""\
  rates_{name}:
    stage: evaluate
    policies: [{policy}]
    baseline: reference
    judge: {judge}
    max_new_tokens: 16
"""
    for name, policy, judge in [
        ("sft", "sft", "gold"),
        ("dpo", "dpo", "gold"),
        ("kto", "kto", "gold"),
        ("reward", "sft", "reward"),
        ("ppo", "ppo", "gold"),
    ]
)
STAGES = ("prepare", "sft", "dpo", "kto", "reward", "ppo")
EPISODES = [("ppo", 2), ("sft", 1), ("kto", 1), ("dpo", 1), ("reward", 1)]
EPISODES += [(stage, 3 - processes) for stage, processes in EPISODES]
ANY = ("SIGKILL of rank 0", "SIGTERM to rank 0", "SIGINT to rank 0")
LAUNCHED = ("SIGTERM to the group", "SIGHUP to the group", "SIGKILL of the launcher")
ONE_OF_TWO = ("SIGKILL of rank 1", "SIGTERM to rank 1")


@dataclass
class Chaos:
    """Uninterrupted results, and what happened to the kills."""

    folder: Path
    counts: Counter[str] = field(default_factory=Counter)

    def inputs(self, stage: str, runs: Path) -> None:
        """Link everything before a stage, finished by one process, into a new runs folder."""
        runs.mkdir(parents=True)
        (runs.parent / "recipe.yaml").write_text(RECIPE)
        for name in STAGES[: STAGES.index(stage)]:
            (source,) = (self.folder / "whole" / "runs").glob(f"{name}-*")
            (runs / source.name).symlink_to(source)

    def uninterrupted(self, stage: str, processes: int) -> Path:
        """The folder of a stage that nothing stopped."""
        runs = self.folder / "whole" / "runs"
        if processes == 2:
            runs = self.folder / f"{stage}-2" / "runs"
            if not runs.exists():
                self.inputs(stage, runs)
                run(runs, stage, processes)
                run(runs, f"rates_{stage}", 1)
        (result,) = runs.glob(f"{stage}-*")
        artifact = artifacts.read_artifact(result)
        assert artifact is not None
        assert artifact.world_size == processes
        return result


@contextmanager
def launched(
    runs: Path, until: str, processes: int, kind: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A run in a new process group, with a launcher if there are two processes or ``kind`` says so.

    What still runs at the end is killed.
    """
    command = [str(ROOT / "align" / "run.py")]
    if processes == 2 or kind in LAUNCHED:
        command = ["-m", "align.cli.main", "run"]
    if processes == 2:
        command += ["--config", str(ROOT / "accelerate_configs" / "cpu.yaml")]
    command = [sys.executable, *command, "recipe.yaml", "--until", until]
    with (runs.parent / "log").open("a") as log:
        process = subprocess.Popen(
            command,
            cwd=runs.parent,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        for member in [*ranks(process).values(), process]:
            try:
                member.kill()
            except psutil.NoSuchProcess:
                continue
        process.wait()


def run(runs: Path, until: str, processes: int) -> None:
    """Run to the end; only what is killed needs a launcher."""
    start = recipe_runs.run_on_two_processes if processes == 2 else recipe_runs.run
    assert start(runs, "--until", until) == 0, log(runs)


def ranks(process: subprocess.Popen[bytes]) -> dict[int, psutil.Process]:
    """The processes of a run by their ranks."""
    found = {}
    try:
        main = psutil.Process(process.pid)
        for child in (main, *main.children()):
            if any(word.endswith("align/run.py") for word in child.cmdline()):
                found[int(child.environ().get("RANK", "0"))] = child
    except psutil.Error:
        pass
    return found


def logged_step(folder: Path) -> int:
    """The last step in the metrics of a stage; 0 before the first."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return max((int(step) for step in re.findall(r'"step": (\d+)', "\n".join(lines))), default=0)


def kill(
    runs: Path, stage: str, processes: int, kind: str, last: int, generator: random.Random
) -> int | None:
    """Start a run, and end it within half a second after a random one of its ``last`` steps.

    Returns its exit code; None if it was faster.
    """
    begin = len(log(runs))
    with launched(runs, stage, processes, kind) as process:
        deadline = time.monotonic() + SECONDS

        def wait_until(condition: Callable[[], bool]) -> None:
            while process.poll() is None and not condition():
                assert time.monotonic() < deadline, log(runs)
                time.sleep(0.01)

        # "running" or "resuming"
        wait_until(lambda: f"{stage}: r" in log(runs)[begin:])
        assert process.poll() is None, log(runs)
        members = ranks(process)
        assert sorted(members) == list(range(processes)), log(runs)
        (folder,) = runs.glob(f"{stage}-*")
        step = generator.randint(logged_step(folder), last)
        wait_until(lambda: logged_step(folder) >= step)
        time.sleep(generator.random() / 2)
        if process.poll() is not None or (folder / artifacts.FILE).exists():
            process.wait(timeout=SECONDS)
            return None
        name, _, target = kind.partition(" ")
        number = signal.Signals[name]
        if target.endswith("group"):
            os.killpg(process.pid, number)
        elif target.endswith("launcher"):
            process.send_signal(number)
        else:
            members[int(target[-1])].send_signal(number)
        code = process.wait(timeout=SECONDS)
        _, orphans = psutil.wait_procs(members.values(), timeout=SECONDS)
        assert orphans == [], kind
    return code


def check_end(runs: Path, kind: str, code: int, output: str) -> None:
    """Check the exit code and the last words of a run that was killed."""
    assert "Traceback" not in output, output
    if kind == "SIGKILL of the launcher":
        assert code == -signal.SIGKILL
    elif kind.startswith("SIGKILL"):
        # -9: without a launcher; 1: another rank was the first to end
        assert code in (1, 128 + signal.SIGKILL, -signal.SIGKILL), output
        assert ("the same command resumes" in output) == (code > 0)
    else:
        assert code in (130, 0), output  # 0: it came after the last step
        assert ("the same command resumes" in output) == (code == 130)


def check_same(result: Path, expected: Path) -> None:
    """Check that a stage is complete and equals the uninterrupted one, except for durations."""
    names = sorted(file.name for file in expected.iterdir())
    assert sorted(file.name for file in result.iterdir()) == names
    for name in names:
        if name.endswith(".safetensors") or name in ("samples.jsonl", "reward.json"):
            assert (result / name).read_bytes() == (expected / name).read_bytes(), name
    lines = [json.loads(line) for line in (result / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(steps)
    assert (
        steps[-1] == json.loads((expected / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    )


def check_same_win_rates(runs: Path, expected: Path, stage: str) -> None:
    """Check the verdicts and the win rates of what a stage trained, or of what its model judges."""
    folders = [next(each.glob(f"rates_{stage}-*")) for each in (runs, expected)]
    ours, whole = [artifacts.read_artifact(folder) for folder in folders]
    assert ours is not None and whole is not None
    assert ours.metrics["comparisons"] == whole.metrics["comparisons"]
    (row,) = whole.metrics["comparisons"]
    assert 0 <= row["win_rate"] <= 1
    completions = [(folder / "comparisons.parquet").read_bytes() for folder in folders]
    assert completions[0] == completions[1] != b""


@pytest.fixture(scope="module")
def chaos(tmp_path_factory: pytest.TempPathFactory) -> Chaos:
    folder = tmp_path_factory.mktemp("chaos")
    runs = folder / "whole" / "runs"
    runs.mkdir(parents=True)
    (runs.parent / "recipe.yaml").write_text(RECIPE)
    assert recipe_runs.run(runs) == 0, log(runs)
    return Chaos(folder)


@pytest.fixture
def hangups() -> Iterator[None]:
    """Hangups end a run, also where pytest runs under nohup, which ignores them."""
    handler = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, handler)


@pytest.mark.slow
@pytest.mark.usefixtures("hangups")
@pytest.mark.timeout(4 * 3600)
def test_runs_that_are_killed_at_random_moments_end_bit_for_bit_as_if_nothing_had_happened(
    chaos: Chaos, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
):
    kills = request.config.getoption("--kills")
    generator = random.Random(kills)
    for number, (stage, processes) in enumerate(EPISODES[:kills]):
        expected = chaos.uninterrupted(stage, processes)
        kinds = [*ANY, *LAUNCHED, *(ONE_OF_TWO if processes == 2 else ())]
        left = len(range(number, kills, len(EPISODES)))  # kills of this episode
        attempt = 0
        while left:
            attempt += 1
            runs = chaos.folder / f"{stage}-{processes}-{attempt}" / "runs"
            chaos.inputs(stage, runs)
            pending: list[str] = []
            while left:
                kind = generator.choice(kinds)
                begin = len(log(runs))
                code = kill(runs, stage, processes, kind, logged_step(expected), generator)
                if code is None:
                    break  # the stage is finished: the rest of the kills hit another run
                check_end(runs, kind, code, log(runs)[begin:])
                pending.append(kind)
                left -= 1
            run(runs, stage, processes)
            (result,) = runs.glob(f"{stage}-*")
            check_same(result, expected)
            run(runs, f"rates_{stage}", 1)
            check_same_win_rates(runs, expected.parent, stage)
            chaos.counts.update(f"{kind}, {processes} processes" for kind in pending)
            with capsys.disabled():
                print(f"\n{stage}, {processes} processes: {len(pending)} kills survived", end="")
    with capsys.disabled():
        print(f"\nkills survived bit for bit: {chaos.counts.total()} of {kills}")
        for kind, count in sorted(chaos.counts.items()):
            print(f"  {count:3}  {kind}")
    assert chaos.counts.total() == kills
