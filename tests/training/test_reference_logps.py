"""Cached reference log-probabilities: their values, their cache, and the losses with them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from filelock import FileLock, Timeout
from helpers import tiny_models
from helpers.damage import DAMAGES
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from align.config.base import Lora
from align.config.training import DPO
from align.models import loading, logps
from align.runtime import artifacts
from align.stages import dpo
from align.training import reference_logps

FOUR_WAYS = tiny_models.FOUR_WAYS
LOG_2 = tiny_models.LOG_2


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tiny_models.World:
    return tiny_models.world(tmp_path_factory.getbasetemp())


class Runs:
    """A folder of runs with DPO stages."""

    def __init__(self, world: tiny_models.World, folder: Path) -> None:
        self.world, self.folder = world, folder

    def build(self, source: str = "sft", lora: Lora | None = None, **keys: Any) -> Any:
        trainer = tiny_models.TRAINER | {"max_steps": 4} | keys.pop("trainer", {})
        config = DPO(model=source, lora=lora, trainer=trainer, **keys)
        inputs = {"model": getattr(self.world, source), "pairs": self.world.data}
        return dpo.build(config, inputs, self.folder / "dpo")

    def add(self, trainer: Any, source: str = "sft") -> dict[str, Any]:
        return reference_logps.add_reference_logps(
            trainer,
            inputs={"model": getattr(self.world, source), "pairs": self.world.data},
            runs=self.folder,
            logger=tiny_models.logger("dpo", self.folder / "dpo"),
        )

    def stage(self, name: str = "dpo", **keys: Any) -> dict[str, Any]:
        # 5 steps of 8 rows see every row
        trainer = tiny_models.TRAINER | {"max_steps": 5} | keys.pop("trainer", {})
        config = DPO(model="sft", trainer=trainer, **keys)
        inputs = {"model": self.world.sft, "pairs": self.world.data}
        return tiny_models.stage(dpo, config, inputs, self.folder / name)

    @property
    def caches(self) -> list[Path]:
        return sorted(self.folder.glob("reference-*"))


@pytest.fixture
def runs(world: tiny_models.World, tmp_path: Path) -> Runs:
    return Runs(world, tmp_path)


def columns(trainer: Any) -> torch.Tensor:
    return torch.tensor([trainer.train_dataset[name][:] for name in reference_logps.LOGPS])


@pytest.mark.parametrize(("source", "lora"), FOUR_WAYS)
def test_they_equal_the_log_probabilities_of_single_tokens(
    runs: Runs, world: tiny_models.World, source: str, lora: Lora | None
):
    trainer = runs.build(source, lora)
    report = runs.add(trainer, source)
    assert trainer.ref_model is None
    assert (report["pairs"], report["computed"]) == (len(trainer.train_dataset),) * 2
    reference = loading.load_merged(getattr(world, source), dtype="float32").eval()
    rows = trainer.train_dataset
    for i in (0, 7, len(rows) - 1):
        for column, side in zip(reference_logps.LOGPS, ("chosen_ids", "rejected_ids"), strict=True):
            ids = rows[i]["prompt_ids"] + rows[i][side]
            expected = tiny_models.slow_logps(reference, ids, len(rows[i]["prompt_ids"]))
            assert rows[i][column] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("source", "lora", "share"),
    [
        pytest.param("sft", None, True, id="full fine-tuning, shared"),
        pytest.param("lora", tiny_models.LORA, True, id="a trained adapter, shared"),
        pytest.param("sft", tiny_models.LORA, False, id="a new adapter, padded"),
        pytest.param("lora", None, False, id="a merged adapter, padded"),
    ],
)
def test_training_has_the_same_losses_as_with_a_reference_in_each_step(
    runs: Runs, source: str, lora: Lora | None, share: bool
):
    losses = []
    for cached in (False, True):
        trainer = runs.build(source, lora, prefix_sharing=share)
        if cached:
            runs.add(trainer, source)
        trainer.train()
        losses.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
    assert len(losses[1]) == 4
    assert losses[0][0] == pytest.approx(LOG_2, abs=1e-6)
    assert losses[0][3] != pytest.approx(LOG_2, abs=1e-3)
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


def test_a_sweep_over_beta_and_seeds_computes_them_once(runs: Runs, monkeypatch):
    first = runs.stage("first")["reference"]
    assert (first["computed"], len(runs.caches)) == (first["pairs"], 1)
    monkeypatch.setattr(reference_logps, "compute_logps", lambda *_: pytest.fail("computed again"))
    for name, keys in {"second": {"beta": 0.3}, "third": {"beta": 0.3, "seed": 1}}.items():
        again = runs.stage(name, **keys)["reference"]
        assert (again["computed"], again["folders"]) == (0, first["folders"])
    artifact = artifacts.read_artifact(runs.caches[0])
    assert artifact is not None and artifact.stage == "reference"
    assert artifact.inputs.keys() == {"model", "pairs"}
    assert artifact.inputs["model"]["digest"] == artifacts.digest_folder(runs.world.sft)
    assert sorted(p.name for p in runs.caches[0].iterdir()) == ["artifact.json", "logps.parquet"]


@pytest.mark.parametrize(
    "keys",
    [
        {"trainer": {"max_length": 100}},
        {"trainer": {"ld_alpha": 0.5}},
        {"trainer": {"bf16": True}},
        {"dtype": "bfloat16", "lora": tiny_models.LORA},
        {"lora": tiny_models.LORA, "source": "lora"},
    ],
    ids=lambda keys: str(keys)[:40],
)
def test_settings_that_change_them_have_another_cache(runs: Runs, keys: dict[str, Any]):
    runs.add(runs.build())
    report = runs.add(runs.build(**keys), keys.get("source", "sft"))
    assert report["computed"] == report["pairs"]
    assert len(runs.caches) == 2


@pytest.mark.parametrize("change", ["a token of a prompt", "a token of a completion", "order"])
def test_other_tokens_have_another_cache(runs: Runs, change: str):
    trainer = runs.build()
    runs.add(trainer)
    again = runs.build()
    rows = again.train_dataset.to_list()
    if change == "order":
        rows[0], rows[1] = rows[1], rows[0]
    else:
        rows[3]["prompt_ids" if "prompt" in change else "rejected_ids"][-1] ^= 1
    again.train_dataset = Dataset.from_list(rows)
    assert runs.add(again)["computed"] == len(rows)
    if change == "order":
        swapped = columns(trainer)[:, [1, 0, *range(2, len(rows))]]
        assert_close(columns(again), swapped, rtol=1e-5, atol=1e-4)
    else:
        moved = (columns(again) - columns(trainer)).abs() > 1e-2
        assert moved.nonzero()[:, 1].unique().tolist() == [3]


def test_the_digest_depends_on_the_boundaries_between_lists():
    def row(prompt: list[int], chosen: list[int]) -> dict[str, list[int]]:
        return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": [5]}

    a = Dataset.from_list([row([1, 2], [4]), row([3], [4])])
    b = Dataset.from_list([row([1], [4]), row([2, 3], [4])])
    assert reference_logps.digest_tokens(a) != reference_logps.digest_tokens(b)
    assert reference_logps.digest_tokens(a) == reference_logps.digest_tokens(
        Dataset.from_list(a.to_list())
    )
    assert reference_logps.digest_tokens(a.select([1, 0])) == reference_logps.digest_tokens(
        Dataset.from_list(a.to_list()[::-1])
    )


def test_loss_seed_and_prefix_sharing_use_the_same_cache(runs: Runs):
    runs.add(runs.build())
    for keys in ({"trainer": {"loss_type": "ipo"}}, {"seed": 3}, {"prefix_sharing": False}):
        assert runs.add(runs.build(**keys))["computed"] == 0


def test_an_interrupted_computation_is_repeated(runs: Runs):
    runs.stage("first")
    (runs.caches[0] / artifacts.FILE).unlink()
    report = runs.stage("second")["reference"]
    assert report["computed"] == report["pairs"]
    assert json.loads((runs.caches[0] / artifacts.FILE).read_text())["metrics"]["pairs"] == 40


def test_held_out_pairs_have_a_separate_cache(runs: Runs, world: tiny_models.World):
    data = runs.folder / "data"
    shutil.copytree(world.data, data)
    pq.write_table(pq.read_table(data / "pairs-test.parquet"), data / "pairs-validation.parquet")
    runs.world = tiny_models.World(world.folder, data, world.sft, world.lora)
    assert runs.add(runs.build())["pairs"] == 40, "without evaluation they are not needed"
    trainer = runs.build(trainer={"eval_strategy": "steps", "eval_steps": 2})
    report = runs.add(trainer)
    assert len(runs.caches) == 2
    assert report["pairs"] == len(trainer.train_dataset) + len(trainer.eval_dataset)
    trainer.train()
    logged = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    assert len(logged) == 2 and logged[0] != pytest.approx(LOG_2, abs=1e-4)


def changed(world: tiny_models.World, folder: Path, **config: Any) -> tiny_models.World:
    """The SFT model with other weights or another config, and an unchanged artifact."""
    shutil.copytree(world.sft, folder)
    if config:
        original = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(original | config))
    else:
        weights = load_file(folder / "model.safetensors")
        weights["model.norm.weight"] *= 1.01
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return tiny_models.World(world.folder, world.data, folder, world.lora)


@pytest.mark.parametrize("config", [{}, {"rms_norm_eps": 1e-2}], ids=["weights", "config"])
def test_other_weights_with_the_same_artifact_have_another_cache(
    runs: Runs, world: tiny_models.World, config: dict[str, Any]
):
    # A stage's digest covers its settings only: trained again on two ranks, it has other weights.
    runs.add(runs.build())
    runs.world = changed(world, runs.folder / "again", **config)
    assert artifacts.digest_folder(runs.world.sft) == artifacts.digest_folder(world.sft)
    trainer = runs.build()
    assert runs.add(trainer)["computed"] == 40
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(LOG_2, abs=1e-5)


def test_full_fine_tuning_and_a_new_adapter_have_the_same_reference(runs: Runs):
    first = runs.add(runs.build())
    again = runs.add(runs.build(lora=tiny_models.LORA))
    assert (again["computed"], again["folders"]) == (0, first["folders"])


def test_a_model_from_the_hub_is_recorded_by_its_id(runs: Runs):
    trainer = runs.build()
    report = reference_logps.add_reference_logps(
        trainer,
        inputs={"model": "some/model", "pairs": runs.world.data},
        runs=runs.folder,
        logger=tiny_models.logger("dpo", runs.folder),
    )
    assert report["computed"] == 40
    artifact = artifacts.read_artifact(runs.caches[0])
    assert artifact is not None and artifact.inputs["model"]["folder"] == "some/model"


@pytest.mark.parametrize(
    "broken",
    ["missing", "truncated", "of other rows", "reversed", "a folder", "artifact", "copied"],
)
def test_a_damaged_cache_is_computed_again(runs: Runs, broken: str):
    runs.add(runs.build())
    file = runs.caches[0] / reference_logps.FILE
    complete = pq.read_table(file)
    if broken == "missing":
        file.unlink()
    elif broken == "truncated":
        file.write_bytes(file.read_bytes()[:-20])
    elif broken == "artifact":
        (runs.caches[0] / artifacts.FILE).write_text("{")
    elif broken == "reversed":
        pq.write_table(complete[::-1], file)
    elif broken == "a folder":
        DAMAGES["a folder"](file)
    elif broken == "copied":  # from the cache of another reference
        artifact = artifacts.read_artifact(runs.caches[0])
        assert artifact is not None
        artifacts.write_artifact(runs.caches[0], dataclasses.replace(artifact, digest="0" * 64))
    else:
        pq.write_table(complete[:-1], file)
    assert runs.add(runs.build())["computed"] == 40
    assert pq.read_table(file).equals(complete)


def test_a_run_that_does_not_see_all_rows_computes_no_cache(runs: Runs):
    assert "reference" not in runs.stage("short", trainer={"max_steps": 4})
    assert runs.caches == []
    trainer = {"max_steps": 2, "gradient_accumulation_steps": 3}
    assert "reference" in runs.stage("long", trainer=trainer)


def test_the_cache_is_locked_while_it_is_computed(runs: Runs, monkeypatch):
    compute_logps, locked = reference_logps.compute_logps, []

    def checked(*arguments: Any) -> torch.Tensor:
        lock = FileLock(runs.caches[0] / artifacts.WORKING)
        with pytest.raises(Timeout):
            lock.acquire(timeout=0)
        locked.append(True)
        return compute_logps(*arguments)

    monkeypatch.setattr(reference_logps, "compute_logps", checked)
    runs.add(runs.build())
    assert locked == [True]


def test_in_bfloat16_the_first_loss_is_log_2_up_to_its_rounding(runs: Runs):
    adapter = {"dtype": "bfloat16", "lora": tiny_models.LORA}
    for keys in (adapter, {"trainer": {"bf16": True}}):
        trainer = runs.build(**keys)
        runs.add(trainer)
        trainer.train()
        # 40 tokens with relative rounding errors of 2^-9: 0.1 nat, times beta 0.1, and half of it
        # in the loss
        assert trainer.state.log_history[0]["loss"] == pytest.approx(LOG_2, abs=5e-3)


def test_the_head_of_trl_uses_small_tiles_on_cpu_only_during_a_stage(runs: Runs, monkeypatch):
    from trl.kernels import chunked_logprob

    seen = []
    forward = chunked_logprob._forward_tile
    monkeypatch.setattr(
        chunked_logprob,
        "_forward_tile",
        lambda *a, **k: (
            seen.append((chunked_logprob.TOKEN_CHUNK_SIZE, len(a[0]))) or forward(*a, **k)
        ),
    )
    runs.stage("dpo")
    assert {size for size, _ in seen} == {256}
    assert max(rows for _, rows in seen) == 256
    assert chunked_logprob.TOKEN_CHUNK_SIZE == 4096
    with pytest.raises(ZeroDivisionError), logps.small_vocabulary_tiles():
        _ = 1 / 0
    assert chunked_logprob.TOKEN_CHUNK_SIZE == 4096


def test_a_reference_that_changes_is_not_cached(runs: Runs):
    config = DPO(
        model="sft",
        trainer=tiny_models.TRAINER
        | {"max_steps": 6, "sync_ref_model": True, "ref_model_sync_steps": 1},
    )  # fmt: skip
    inputs = {"model": runs.world.sft, "pairs": runs.world.data}
    metrics = tiny_models.stage(dpo, config, inputs, runs.folder / "dpo")
    assert "reference" not in metrics
    assert runs.caches == []


def test_rows_of_a_prompt_are_computed_together_and_the_longest_first():
    def row(prompt: list[int], chosen: int) -> dict[str, list[int]]:
        return {"prompt_ids": prompt, "chosen_ids": [9] * chosen, "rejected_ids": [9]}

    rows = [row([1, 2], 3), row([7], 9), row([1, 2], 8), row([3], 2), row([1, 2], 1)]
    # prompts are ordered by their longest row: [1, 2] has 10 tokens, [7] has 10, [3] has 3
    assert reference_logps.computation_order(Dataset.from_list(rows)) in (
        [2, 0, 4, 1, 3],
        [1, 2, 0, 4, 3],
    )


def test_the_memory_of_the_second_model_is_freed(runs: Runs):
    trainer = runs.build()
    reference = trainer.ref_model
    assert reference is not None
    runs.add(trainer)
    assert all(p.is_meta for p in reference.parameters())
    assert not any(p.is_meta for p in trainer.model.parameters())
