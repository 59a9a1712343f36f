"""PPO on two processes: the same batch gives the same step as on one, and each samples for itself.

Ranks sample differently from one process, so where numbers
are compared the completions are fixed ones, dealt out as the prompts are: the k-th to rank k mod 2.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from helpers.tiny_models import logger, stage, world
from test_launch import LAUNCH, SCRIPT, TWO
from torch.testing import assert_close

from align.config.ppo import PPO
from align.config.training import Reward
from align.errors import UserError
from align.online_rl import experience
from align.runtime import distributed

pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"
)

SETTINGS: dict[str, Any] = {
    "model": "sft",
    "rewards": ["reward"],
    "steps": 2,
    "batch_size": 12,
    "temperature": 0.7,
    "max_new_tokens": 8,
    "missing_eos_penalty": 1.0,
    "normalize_rewards": True,
    "kl_target": 0.1,
    "kl_horizon": 100,
    "learning_rate": 1.0,
    "schedule": "constant",
    "epochs": 1,
    "entropy_coef": 0.01,
    "value_coef": 0.5,
    "max_grad_norm": 0.1,
    "micro_batch_size": 4,
    "prefix_sharing": False,
}
LORA = {"lora": {"r": 4, "alpha": 8, "dropout": 0.0}}
KINDS: dict[str, dict[str, Any]] = {
    "gae": LORA,
    "rloo": LORA | {"advantages": "rloo", "n_completions": 2},
    "reinforce": {"advantages": "reinforce"},
    "gae in full": {},
}


def settings(kind: str, **own: Any) -> PPO:
    chosen = SETTINGS | KINDS[kind] | own
    if chosen.get("advantages", "gae") != "gae":
        del chosen["value_coef"]  # it means nothing without a critic, and is refused
    return PPO.model_validate(chosen)


def built(kind: str, inputs: dict[str, Path], folder: Path, **own: Any) -> Any:
    """A learner whose optimizer is plain gradient descent: Adam would make a large step of a rounding error."""
    from align.online_rl.trainer import build_trainer

    folder.mkdir(parents=True, exist_ok=True)
    distributed.reset_process_state(0)
    learner = build_trainer(settings(kind, **own), inputs, folder, logger("ppo", folder))
    groups = [
        {key: group[key] for key in ("params", "base")} for group in learner.optimizer.param_groups
    ]
    learner.optimizer = torch.optim.SGD(groups, lr=0.0)
    return learner


def said(learner: Any, step: int) -> list[tuple[list[int], list[int], bool]]:
    """Prompts and completions of a whole batch that depend on nothing but the step: lengths 1 to 8, a third cut off."""
    draw = torch.Generator().manual_seed(step)
    (stop,) = learner.stops
    per_step = learner.config.batch_size // learner.config.n_completions
    found = []
    for place in range(per_step):
        prompt = learner.prompts[(step * per_step + place) % len(learner.prompts)]
        for _ in range(learner.config.n_completions):
            n = int(torch.randint(1, 9, (), generator=draw))
            ids = torch.randint(10, 250, (n,), generator=draw).tolist()
            finished = n < 8 and bool(torch.rand((), generator=draw) < 0.7)
            found.append((prompt, [*ids, stop] if finished else ids, finished))
    return found


def feed(learner: Any) -> None:
    """Let a learner take this rank's share of :func:`said` for what its policy sampled."""

    def sample(prompts: Any, what: str, step: int) -> experience.Completions:
        n = learner.config.n_completions
        all_said = said(learner, step)
        groups = [all_said[i : i + n] for i in range(0, len(all_said), n)]
        mine = groups[distributed.rank() :: distributed.world_size()]
        told = [one for group in mine for one in group]
        return experience.Completions(*(list(each) for each in zip(*told, strict=True)))

    learner.sample = sample


def trained(kind: str, inputs: dict[str, Path], folder: Path) -> dict[str, Any]:
    """Weights, and what was told, after two steps on fixed completions."""
    from align.online_rl.trainer import PPOTrainer

    learner = built(kind, inputs, folder)
    open_ended = type("Fed", (PPOTrainer,), {})  # without slots: `sample` can be put in its place
    values = {f.name: getattr(learner, f.name) for f in dataclasses.fields(learner)}
    learner = open_ended(**values)
    feed(learner)
    told: list[dict[str, float]] = []
    learner.tell = lambda step, figures, *_: told.append(figures)
    before = torch.cat([p.detach().flatten().clone() for p in learner.cast.weights().values()])
    for step in range(learner.config.steps):
        learner.step(step)
    after = torch.cat([p.detach().flatten() for p in learner.cast.weights().values()])
    return {"before": before, "after": after, "told": told, "kl_coef": learner.kl_coef}


def sampled(inputs: dict[str, Path], folder: Path) -> dict[str, Any]:
    """Which prompts and completions a rank has in a step; twice, to see that it repeats itself."""
    learner = built("gae", inputs, folder, batch_size=24, max_new_tokens=12)
    found = []
    for _ in range(2):
        torch.rand(3)  # whatever was drawn before
        drawn = learner.drawn(0)
        same = [learner.prompts[0]] * 6
        found.append(
            {
                "drawn": drawn,
                "later": learner.drawn(1),
                "completions": learner.sample(same, "sample", 0).completions,
                "next": learner.sample(same, "sample", 1).completions,
            }
        )
    return {"first": found[0], "second": found[1]}


def everything(inputs: dict[str, Path], folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {kind: trained(kind, inputs, folder / kind) for kind in KINDS}
    return found | {"sampled": sampled(inputs, folder / "sampled")}


def one_of_two(rank: int, inputs: dict[str, Path], folder: Path, port: int) -> None:
    """What a launched process is, in a fork of this one: libraries are imported once."""
    from accelerate import PartialState

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    PartialState._reset_state()
    distributed.init_process_group()
    torch.save(everything(inputs, folder / str(rank)), folder / f"{rank}.pt")
    distributed.barrier()
    torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What a PPO stage reads: an SFT model, prompts, and a reward model on that same model."""
    from align.stages import reward

    made = world(tmp_path_factory.getbasetemp())
    folder = tmp_path_factory.mktemp("reward") / "reward"
    trainer = {
        "per_device_train_batch_size": 8,
        "learning_rate": 1.0e-2,
        "max_steps": 4,
        "save_strategy": "no",
        "bf16": False,
        "gradient_checkpointing": False,
    }
    found = Reward(model="sft", lora={"r": 4, "alpha": 8, "dropout": 0.0}, trainer=trainer)
    stage(reward, found, {"model": made.sft, "pairs": made.data}, folder)
    return {"model": made.sft, "prompts": made.data, "rewards.0": folder}


@pytest.fixture(scope="module")
def one(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return everything(inputs, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def two(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.start_processes(
        one_of_two, (inputs, folder, free_port()), nprocs=2, start_method="fork"
    )
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


TIMES = ("seconds", "seconds_sampling", "seconds_scoring")
OWN = ("wasted_tokens",)  # how rows stand together in a batch that is sampled


@pytest.mark.parametrize("kind", list(KINDS))
def test_two_processes_take_the_steps_that_one_takes_with_the_whole_batch(one, two, kind):
    # float32 sums in another order. A plain gradient step of length 0.1 * 1.0 (the clipped norm times the rate) in
    # policy and critic each; a rank that forgot the other would be some 0.1 away.
    whole, halves = one[kind], [rank[kind] for rank in two]
    assert (whole["after"] - whole["before"]).norm() > 0.05
    assert torch.equal(halves[0]["after"], halves[1]["after"])
    assert_close(halves[0]["before"], whole["before"], rtol=0, atol=0)
    assert_close(halves[0]["after"], whole["after"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", list(KINDS))
def test_two_processes_tell_the_metrics_of_all_their_completions(one, two, kind):
    # Means of scores, KL and entropy, losses on whitened advantages, gradient norms: all of the whole batch.
    for step in (0, 1):
        expected = one[kind]["told"][step]
        assert expected["grad_norm"] > 0
        assert 0 < expected["missing_eos"] < 1
        for rank in two:
            found = rank[kind]["told"][step]
            assert found.keys() == expected.keys()
            for key in found.keys() - {*TIMES, *OWN}:
                assert found[key] == pytest.approx(expected[key], rel=2e-3, abs=2e-5), key
        for key in two[0][kind]["told"][step].keys() - {*TIMES}:
            assert two[0][kind]["told"][step][key] == two[1][kind]["told"][step][key], key
    assert one[kind]["kl_coef"] != 0.05
    for rank in two:
        assert rank[kind]["kl_coef"] == pytest.approx(one[kind]["kl_coef"], rel=1e-4)


def test_two_ranks_take_other_prompts_and_sample_other_completions_of_the_same_one(one, two):
    first, second = (rank["sampled"]["first"] for rank in two)
    assert not set(first["drawn"]) & set(second["drawn"])
    assert first["completions"] != second["completions"]
    # Together they have the prompts of one process, in its order: 24 a step, 12 a rank.
    whole = one["sampled"]["first"]["drawn"]
    assert len(whole) == 24
    assert [whole[0::2], whole[1::2]] == [first["drawn"], second["drawn"]]


def test_a_rank_repeats_itself_and_says_other_things_in_the_next_step(one, two):
    for found in (one["sampled"], *(rank["sampled"] for rank in two)):
        assert found["first"] == found["second"]
        assert found["first"]["completions"] != found["first"]["next"]
        assert len({tuple(row) for row in found["first"]["completions"]}) > 1
        assert found["first"]["drawn"] != found["first"]["later"]


def test_every_prompt_comes_once_an_epoch_in_orders_that_differ(inputs, tmp_path):
    learner = built("gae", inputs, tmp_path, batch_size=len_of_prompts(inputs))
    epochs = [learner.drawn(step) for step in range(3)]
    everyone = list(range(len(learner.prompts)))
    assert [sorted(epoch) for epoch in epochs] == [everyone] * 3
    assert len({tuple(epoch) for epoch in [*epochs, everyone]}) == 4


def len_of_prompts(inputs: dict[str, Path]) -> int:
    import pyarrow.parquet as pq

    return pq.read_metadata(inputs["prompts"] / "prompts-train.parquet").num_rows


@pytest.mark.parametrize("kind", ["gae", pytest.param("gae in full", marks=pytest.mark.slow)])
def test_a_run_repeats_itself_to_the_bit_and_another_seed_does_not(inputs, tmp_path, kind):
    from align.stages import ppo

    found = []
    for place, seed in enumerate((0, 0, 1)):
        folder = tmp_path / str(place)
        torch.rand(place)
        own = {"seed": seed, "steps": 2, "learning_rate": 1e-2, "eval_steps": 2, "eval_split": "test", "n_eval_prompts": 4}  # fmt: skip
        stage(ppo, settings(kind, **own), inputs, folder)
        (file,) = folder.glob("*.safetensors")
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        told = [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
        found.append((file.read_bytes(), (folder / "samples.jsonl").read_text(), told))
    assert found[0] == found[1]
    assert all(a != b for a, b in zip(found[0], found[2], strict=True))


def test_prompts_that_two_processes_cannot_share_are_refused(monkeypatch, inputs, tmp_path):
    from align.online_rl.trainer import build_trainer

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    own = {"batch_size": 10, "n_completions": 2, "advantages": "rloo"}
    with pytest.raises(UserError, match=r"5 prompts are not shared by 2 .* multiple of 4"):
        build_trainer(settings("gae", **own), inputs, tmp_path, logger("ppo", tmp_path))


@pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP", "MEGATRON_LM"])
def test_a_sharded_launch_is_refused_in_one_line_before_anything_is_loaded(
    monkeypatch, inputs, tmp_path, kind
):
    from accelerate.utils import DistributedType

    from align.online_rl import trainer
    from align.online_rl.trainer import build_trainer

    class Sharded:
        distributed_type = DistributedType[kind]

    monkeypatch.setattr(trainer, "Accelerator", Sharded)
    monkeypatch.setattr(trainer, "build_models", None)
    with pytest.raises(UserError) as refused:
        build_trainer(settings("gae"), inputs, tmp_path, logger("ppo", tmp_path))
    (line,) = refused.value.lines
    assert "accelerate_configs/multi_gpu.yaml" in line
    assert "\n" not in line


# Launched ------------------------------------------------------------------------------------------------------------

RECIPE = """\
stages:
  prepare: {source: embedded, max_rows: 60, test_fraction: 0.2}
  sft:
    model: {vocab_size: 300, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}
    trainer: &trainer
      learning_rate: 1.0e-2
      max_steps: 6
      per_device_train_batch_size: 4
      bf16: false
      gradient_checkpointing: false
  reward:
    model: sft
    lora: &lora {r: 2, alpha: 4}
    trainer: *trainer
  ppo:
    model: sft
    rewards: [reward]
    judge: gold
    lora: *lora
    steps: 4
    batch_size: 8
    n_completions: 2
    max_new_tokens: 8
    learning_rate: 1.0e-2
    epochs: 2
    minibatches: 2
    eval_steps: 2
    eval_split: test
    n_eval_prompts: 5
    keep_checkpoints: true
"""


def launched(
    configuration: str, folder: Path, *more: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    (folder / "recipe.yaml").write_text(RECIPE)
    kept = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")}
    command = [*LAUNCH, "--config_file", configuration, SCRIPT, "recipe.yaml", *more]
    with subprocess.Popen(
        command,
        cwd=folder,
        env=kept | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=300)
        except BaseException:  # processes that wait for each other outlive their launcher
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.mark.slow
def test_reward_and_ppo_run_on_two_launched_processes_from_start_to_end(tmp_path):
    done = launched(TWO[1], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ppo: ran") == 1
    runs = {path.name.rpartition("-")[0]: path for path in (tmp_path / "runs").glob("*-*")}
    made = {
        name: json.loads((runs[name] / "artifact.json").read_text()) for name in ("reward", "ppo")
    }
    assert {name: each["world_size"] for name, each in made.items()} == {"reward": 2, "ppo": 2}
    assert made["reward"]["metrics"]["held_out"]["pairs"] > 0
    assert math.isfinite(made["reward"]["metrics"]["centre"]["score_mean"])
    lines = [json.loads(line) for line in (runs["ppo"] / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "score" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]  # one process writes
    assert [line["step"] for line in lines if "eval_score" in line] == [0, 2, 4]
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-3)
    said = [json.loads(line) for line in (runs["ppo"] / "samples.jsonl").read_text().splitlines()]
    assert {row["step"] for row in said} == {1, 2, 3, 4}
    assert (runs["ppo"] / "adapter_model.safetensors").is_file()
    last = sorted(runs["ppo"].glob("checkpoint-*"))[-1]
    assert json.loads((last / "complete.json").read_text())["world_size"] == 2

    # Taken away and done again from the last checkpoint: the same weights; by one process: refused.
    weights = (runs["ppo"] / "adapter_model.safetensors").read_bytes()
    (runs["ppo"] / "artifact.json").unlink()
    (runs["ppo"] / "adapter_model.safetensors").unlink()
    again = launched(TWO[1], tmp_path)
    assert again.returncode == 0, again.stderr
    assert "going on from step 3" in again.stdout
    assert (runs["ppo"] / "adapter_model.safetensors").read_bytes() == weights
    (runs["ppo"] / "artifact.json").unlink()
    alone = subprocess.run(
        [sys.executable, SCRIPT, "recipe.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert alone.returncode == 2
    assert "written by 2 processes, and this run has 1" in alone.stderr
    assert "Traceback" not in alone.stderr
