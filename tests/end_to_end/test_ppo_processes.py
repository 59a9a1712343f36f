"""PPO on two processes: the same batch gives the same step as on one, and ranks sample separately.

Two ranks sample the completions of one process, the k-th on rank k mod 2. Where numbers are
compared, completions are fixed nevertheless: of all lengths, and without the rounding of earlier
steps.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import forks, recipe_runs
from helpers.tiny_models import logger, stage, world
from torch.testing import assert_close

from align.config.stages import STAGES
from align.config.training import Reward
from align.errors import UserError
from align.online_rl.completions import Completions
from align.online_rl.draws import training_draw
from align.online_rl.prompts import prompt_indices
from align.online_rl.trainer import OnlineRLTrainer
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
    "rloo": LORA | {"stage": "rloo", "n_completions": 2},
    "grpo": {"stage": "grpo", "n_completions": 2, "scale_advantages": "batch"},
    "reinforce": {"stage": "reinforce"},
    "gae, full fine-tuning": {},
}


def config_of(kind: str, **own: Any) -> Any:
    """The configuration of a kind of run."""
    fields = SETTINGS | KINDS[kind] | own
    stage = STAGES[fields.pop("stage", "ppo")]
    return stage.model_validate({k: v for k, v in fields.items() if k in stage.model_fields})


def build(kind: str, inputs: dict[str, Path], folder: Path, **own: Any) -> OnlineRLTrainer:
    """A trainer with plain gradient descent: Adam would turn a rounding error into a large step."""
    folder.mkdir(parents=True, exist_ok=True)
    distributed.reset_process_state(0)
    trainer = OnlineRLTrainer(config_of(kind, **own), inputs, folder, logger("ppo", folder))
    groups = [
        {key: group[key] for key in ("params", "base")} for group in trainer.optimizer.param_groups
    ]
    trainer.optimizer = torch.optim.SGD(groups, lr=0.0)
    return trainer


class FixedSampler:
    """Returns this rank's share of completions that depend only on the step."""

    def __init__(self, trainer: OnlineRLTrainer) -> None:
        self.trainer, self.n_steps = trainer, 0
        (self.stop,) = trainer.sampler.stops

    def generate(self, prompts: Any, *, seeds: Any) -> Completions:
        """The next step's completions, distributed over the ranks like the prompts."""
        n = self.trainer.config.n_completions
        rows = self.batch(self.n_steps)
        self.n_steps += 1
        groups = [rows[i : i + n] for i in range(0, len(rows), n)]
        own = groups[distributed.rank() :: distributed.world_size()]
        own_rows = [row for group in own for row in group]
        return Completions(*(list(column) for column in zip(*own_rows, strict=True)))

    def batch(self, step: int) -> list[tuple[list[int], list[int], bool]]:
        """Prompts and completions of all ranks: lengths 1 to 8, a third cut off."""
        config, prompts = self.trainer.config, self.trainer.prompts.tokens
        draw = torch.Generator().manual_seed(step)
        per_step = config.batch_size // config.n_completions
        rows = []
        for place in range(per_step):
            prompt = prompts[(step * per_step + place) % len(prompts)]
            for _ in range(config.n_completions):
                n = int(torch.randint(1, 9, (), generator=draw))
                ids = torch.randint(10, 250, (n,), generator=draw).tolist()
                finished = n < 8 and bool(torch.rand((), generator=draw) < 0.7)
                rows.append((prompt, [*ids, self.stop] if finished else ids, finished))
        return rows


def flat_weights(trainer: OnlineRLTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.models.weights().values()])


def train(kind: str, inputs: dict[str, Path], folder: Path) -> dict[str, Any]:
    """Weights and metrics of two steps on fixed completions."""
    trainer = build(kind, inputs, folder)
    trainer.sampler = FixedSampler(trainer)
    before, metrics = flat_weights(trainer), []
    for step in range(trainer.config.steps):
        trainer.step(step)
        metrics.append(trainer.metrics)
    after = flat_weights(trainer)
    return {"before": before, "after": after, "metrics": metrics, "kl_coef": trainer.kl_coef}


def sample(inputs: dict[str, Path], folder: Path) -> dict[str, Any]:
    """Prompts and completions of a rank in two steps, computed twice."""
    trainer = build("gae", inputs, folder, batch_size=24, max_new_tokens=12, temperature=1.0)
    trainer.set_train_mode(False)
    n, config = len(trainer.prompts), trainer.config
    results = []
    for _ in range(2):
        torch.rand(3)  # the global random state must not matter
        same = [trainer.prompts.tokens[0]] * 24
        completions = [
            trainer.sampler.generate(same[: len(draw.places)], seeds=draw.seeds).completions
            for draw in (training_draw(config, step) for step in (0, 1))
        ]
        results.append(
            {
                "indices": prompt_indices(0, n, config),
                "next_indices": prompt_indices(1, n, config),
                "completions": completions[0],
                "next_completions": completions[1],
                "drawn": trainer.draw(0).completions.completions,
            }
        )
    return {"first": results[0], "second": results[1]}


def train_and_sample(inputs: dict[str, Path], folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = {kind: train(kind, inputs, folder / kind) for kind in KINDS}
    return results | {"sampled": sample(inputs, folder / "sampled")}


def one_of_two(inputs: dict[str, Path], folder: Path) -> None:
    """A process of a launch of two."""
    distributed.init_process_group()
    rank = distributed.rank()
    torch.save(train_and_sample(inputs, folder / str(rank)), folder / f"{rank}.pt")
    distributed.barrier()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Inputs of a PPO stage: an SFT model, prompts, and a reward model on the SFT model."""
    from align.stages import reward

    tiny = world(tmp_path_factory.getbasetemp())
    folder = tmp_path_factory.mktemp("reward") / "reward"
    trainer = {
        "per_device_train_batch_size": 8,
        "learning_rate": 1.0e-2,
        "max_steps": 4,
        "save_strategy": "no",
        "bf16": False,
        "gradient_checkpointing": False,
    }
    config = Reward(model="sft", lora={"r": 4, "alpha": 8, "dropout": 0.0}, trainer=trainer)
    stage(reward, config, {"model": tiny.sft, "pairs": tiny.data}, folder)
    return {"model": tiny.sft, "prompts": tiny.data, "rewards.0": folder}


@pytest.fixture(scope="module")
def one(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train_and_sample(inputs, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def two(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two")
    log = folder / "log"
    with forks.ranks(one_of_two, inputs, folder, log=log) as processes:
        assert [forks.wait(process) for process in processes] == [0, 0], log.read_text()
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


TIMES = ("seconds", "seconds_sampling", "seconds_scoring")


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.slow
def test_two_processes_take_the_steps_that_one_takes_with_the_whole_batch(one, two, kind):
    # float32 sums in another order. Each step has length 0.1 * 1.0 (the clipped norm times the
    # rate) in policy and critic; without the other rank's gradients it would be about 0.1 off.
    whole, halves = one[kind], [rank[kind] for rank in two]
    assert (whole["after"] - whole["before"]).norm() > 0.05
    assert torch.equal(halves[0]["after"], halves[1]["after"])
    assert_close(halves[0]["before"], whole["before"], rtol=0, atol=0)
    assert_close(halves[0]["after"], whole["after"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", list(KINDS))
def test_two_processes_log_the_metrics_of_all_completions(one, two, kind):
    # Scores, KL, entropy, losses on whitened advantages and gradient norms are of the whole batch.
    for step in (0, 1):
        expected = one[kind]["metrics"][step]
        assert expected["grad_norm"] > 0
        assert 0 < expected["missing_eos"] < 1
        for rank in two:
            metrics = rank[kind]["metrics"][step]
            assert metrics.keys() == expected.keys()
            for key in metrics.keys() - {*TIMES}:
                # Sums of another order differ by at most 5e-6, but the norm of a gradient (up to 63
                # in grpo) by 1e-6 of it.
                relative = 1e-5 if key == "grad_norm" else 0
                assert metrics[key] == pytest.approx(expected[key], rel=relative, abs=1e-4), key
        for key in two[0][kind]["metrics"][step].keys() - {*TIMES}:
            assert two[0][kind]["metrics"][step][key] == two[1][kind]["metrics"][step][key], key
    assert one[kind]["kl_coef"] != 0.05
    for rank in two:
        assert rank[kind]["kl_coef"] == pytest.approx(one[kind]["kl_coef"], rel=1e-4)


def test_two_ranks_together_sample_the_completions_of_one_process(one, two):
    first, second = (rank["sampled"]["first"] for rank in two)
    assert not set(first["indices"]) & set(second["indices"])
    assert first["completions"] != second["completions"]
    # Together they have prompts and completions of one process: 24 per step, 12 per rank.
    whole = one["sampled"]["first"]
    for column in ("indices", "completions", "next_completions", "drawn"):
        assert len(whole[column]) == 24
        assert [whole[column][0::2], whole[column][1::2]] == [first[column], second[column]]
    assert len({tuple(row) for row in whole["drawn"]}) > 12


def test_a_rank_repeats_itself_and_its_next_step_differs(one, two):
    for results in (one["sampled"], *(rank["sampled"] for rank in two)):
        first = results["first"]
        assert first == results["second"]
        assert first["completions"] != first["next_completions"]
        assert len({tuple(row) for row in first["completions"]}) > 1
        assert first["indices"] != first["next_indices"]


def test_every_epoch_uses_each_prompt_once_in_a_different_order(inputs):
    n = n_prompts(inputs)
    config = config_of("gae", batch_size=n)
    epochs = [prompt_indices(step, n, config) for step in range(3)]
    unshuffled = list(range(n))
    assert [sorted(epoch) for epoch in epochs] == [unshuffled] * 3
    assert len({tuple(epoch) for epoch in [*epochs, unshuffled]}) == 4


def n_prompts(inputs: dict[str, Path]) -> int:
    import pyarrow.parquet as pq

    return pq.read_metadata(inputs["prompts"] / "prompts-train.parquet").num_rows


@pytest.mark.parametrize("kind", ["gae", "gae, full fine-tuning"])
@pytest.mark.slow
def test_a_run_repeats_itself_to_the_bit_and_another_seed_does_not(inputs, tmp_path, kind):
    from align.stages import ppo

    results = []
    for place, seed in enumerate((0, 0, 1)):
        folder = tmp_path / str(place)
        torch.rand(place)
        own = {"seed": seed, "steps": 2, "learning_rate": 1e-2}
        own |= {"eval_steps": 2, "eval_split": "test", "n_eval_prompts": 4}
        stage(ppo, config_of(kind, **own), inputs, folder)
        (file,) = folder.glob("*.safetensors")
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        metrics = [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
        results.append((file.read_bytes(), (folder / "samples.jsonl").read_text(), metrics))
    assert results[0] == results[1]
    assert all(a != b for a, b in zip(results[0], results[2], strict=True))


def test_prompts_that_two_processes_cannot_share_are_rejected(monkeypatch, inputs, tmp_path):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    own = {"batch_size": 10, "n_completions": 2, "stage": "rloo"}
    with pytest.raises(
        UserError, match=r"batch_size: 5 prompts .* over 2 processes.* multiple of 4"
    ):
        OnlineRLTrainer(config_of("gae", **own), inputs, tmp_path, logger("ppo", tmp_path))


RECIPE = """\
stages:
  prepare: {source: embedded, max_rows: 60, test_fraction: 0.2}
  sft:
    model:
      vocab_size: 300
      hidden_size: 32
      intermediate_size: 64
      num_hidden_layers: 2
      num_attention_heads: 2
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


@pytest.mark.slow
def test_reward_and_ppo_run_on_two_processes_from_start_to_end(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    place = tmp_path / "runs"
    assert recipe_runs.run_on_two_processes(place) == 0, recipe_runs.log(place)
    assert recipe_runs.log(place).count("ppo: ran") == 1
    runs = {path.name.rpartition("-")[0]: path for path in place.glob("*-*")}
    artifacts = {
        name: json.loads((runs[name] / "artifact.json").read_text()) for name in ("reward", "ppo")
    }
    assert {name: artifact["world_size"] for name, artifact in artifacts.items()} == {
        "reward": 2,
        "ppo": 2,
    }
    assert artifacts["reward"]["metrics"]["held_out"]["pairs"] > 0
    assert math.isfinite(artifacts["reward"]["metrics"]["center"]["score_mean"])
    lines = [json.loads(line) for line in (runs["ppo"] / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "score" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]  # one process writes
    assert [line["step"] for line in lines if "eval_score" in line] == [0, 2, 4]
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-3)
    samples = [
        json.loads(line) for line in (runs["ppo"] / "samples.jsonl").read_text().splitlines()
    ]
    assert {row["step"] for row in samples} == {1, 2, 3, 4}
    assert (runs["ppo"] / "adapter_model.safetensors").is_file()
    last = sorted(runs["ppo"].glob("checkpoint-*"))[-1]
    assert json.loads((last / "complete.json").read_text())["world_size"] == 2

    # Removed and repeated from the last checkpoint: the same weights. With one process: rejected.
    weights = (runs["ppo"] / "adapter_model.safetensors").read_bytes()
    (runs["ppo"] / "artifact.json").unlink()
    (runs["ppo"] / "adapter_model.safetensors").unlink()
    assert recipe_runs.run_on_two_processes(place) == 0, recipe_runs.log(place)
    assert "resuming from step 3" in recipe_runs.log(place)
    assert (runs["ppo"] / "adapter_model.safetensors").read_bytes() == weights
    (runs["ppo"] / "artifact.json").unlink()
    assert recipe_runs.run(place) == 2
    assert "written by 2 processes, and this run has 1" in recipe_runs.log(place)
    assert "Traceback" not in recipe_runs.log(place)
