"""Reference log-probabilities: what TRL and a token-by-token forward find, kept, and computed once."""

from __future__ import annotations

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
from safetensors.torch import load_file, save_file
from test_dpo import FOUR_WAYS, LOG_2
from torch.testing import assert_close

from align.config.base import Lora
from align.config.training import DPO
from align.models import loading, logps
from align.runtime import artifacts
from align.stages import dpo
from align.training import reference_logps


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tiny_models.World:
    return tiny_models.world(tmp_path_factory.getbasetemp())


class Runs:
    """A folder of runs, and DPO stages in it."""

    def __init__(self, world: tiny_models.World, folder: Path) -> None:
        self.world, self.folder = world, folder

    def build(self, source: str = "sft", lora: Lora | None = None, **given: Any) -> Any:
        trainer = tiny_models.TRAINER | {"max_steps": 4} | given.pop("trainer", {})
        settings = DPO(model=source, lora=lora, trainer=trainer, **given)
        inputs = {"model": getattr(self.world, source), "pairs": self.world.data}
        return dpo.build(settings, inputs, self.folder / "dpo")

    def attach(self, trainer: Any, source: str = "sft") -> dict[str, Any]:
        return reference_logps.add_reference_logps(
            trainer,
            model=getattr(self.world, source),
            pairs=self.world.data,
            runs=self.folder,
            logger=tiny_models.logger("dpo", self.folder / "dpo"),
        )

    def stage(self, name: str = "dpo", **given: Any) -> dict[str, Any]:
        trainer = (
            tiny_models.TRAINER | {"max_steps": 5} | given.pop("trainer", {})
        )  # 5 × 8: every row
        settings = DPO(model="sft", trainer=trainer, **given)
        inputs = {"model": self.world.sft, "pairs": self.world.data}
        return tiny_models.stage(dpo, settings, inputs, self.folder / name)

    @property
    def kept(self) -> list[Path]:
        return sorted(self.folder.glob("reference-*"))


@pytest.fixture
def runs(world: tiny_models.World, tmp_path: Path) -> Runs:
    return Runs(world, tmp_path)


def columns(trainer: Any) -> torch.Tensor:
    return torch.tensor([trainer.train_dataset[name][:] for name in reference_logps.LOGPS])


@pytest.mark.parametrize(("source", "lora"), FOUR_WAYS)
def test_they_are_what_the_model_says_token_by_token(
    runs: Runs, world: tiny_models.World, source: str, lora: Lora | None
):
    trainer = runs.build(source, lora)
    found = runs.attach(trainer, source)
    assert trainer.ref_model is None
    assert (found["pairs"], found["computed"]) == (len(trainer.train_dataset),) * 2
    reference = loading.load_merged(getattr(world, source), dtype="float32").eval()
    rows = trainer.train_dataset
    for i in (0, 7, len(rows) - 1):
        for column, side in zip(reference_logps.LOGPS, ("chosen_ids", "rejected_ids"), strict=True):
            ids = rows[i]["prompt_ids"] + rows[i][side]
            expected = tiny_models.slow_logps(reference, ids, len(rows[i]["prompt_ids"]))
            assert rows[i][column] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("source", "lora"), FOUR_WAYS)
@pytest.mark.parametrize("share", [True, False], ids=["shared", "padded"])
def test_training_takes_the_same_losses_from_them_as_from_a_reference_in_each_step(
    runs: Runs, source: str, lora: Lora | None, share: bool
):
    losses = []
    for ahead in (False, True):
        trainer = runs.build(source, lora, prefix_sharing=share)
        if ahead:
            runs.attach(trainer, source)
        trainer.train()
        losses.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
    assert len(losses[1]) == 4
    assert losses[0][0] == pytest.approx(LOG_2, abs=1e-6)
    assert losses[0][3] != pytest.approx(LOG_2, abs=1e-3)
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


def test_a_sweep_over_beta_and_seeds_computes_them_once(runs: Runs, monkeypatch):
    first = runs.stage("first")["reference"]
    assert (first["computed"], len(runs.kept)) == (first["pairs"], 1)
    monkeypatch.setattr(reference_logps, "_score", lambda *_: pytest.fail("computed again"))
    for name, given in {"second": {"beta": 0.3}, "third": {"beta": 0.3, "seed": 1}}.items():
        again = runs.stage(name, **given)["reference"]
        assert (again["computed"], again["folders"]) == (0, first["folders"])
    made = artifacts.read_artifact(runs.kept[0])
    assert made is not None and made.stage == "reference"
    assert made.inputs.keys() == {"model", "pairs"}
    assert made.inputs["model"]["digest"] == artifacts.digest_folder(runs.world.sft)
    assert sorted(p.name for p in runs.kept[0].iterdir()) == ["artifact.json", "logps.parquet"]


@pytest.mark.parametrize(
    "given",
    [
        {"trainer": {"max_length": 100}},
        {"trainer": {"ld_alpha": 0.5}},
        {"trainer": {"bf16": True}},
        {"dtype": "bfloat16"},
        {"lora": tiny_models.LORA, "source": "lora"},
    ],
    ids=lambda given: str(given)[:40],
)
def test_whatever_changes_them_makes_others(runs: Runs, given: dict[str, Any]):
    runs.attach(runs.build())
    found = runs.attach(runs.build(**given), given.get("source", "sft"))
    assert found["computed"] == found["pairs"]
    assert len(runs.kept) == 2


@pytest.mark.parametrize("change", ["a token of a prompt", "a token of a completion", "order"])
def test_other_rows_or_another_template_make_others(runs: Runs, change: str):
    trainer = runs.build()
    runs.attach(trainer)
    again = runs.build()
    rows = again.train_dataset.to_list()
    if change == "order":
        rows[0], rows[1] = rows[1], rows[0]
    else:
        rows[3]["prompt_ids" if "prompt" in change else "rejected_ids"][-1] ^= 1
    again.train_dataset = Dataset.from_list(rows)
    assert runs.attach(again)["computed"] == len(rows)
    if change == "order":
        swapped = columns(trainer)[:, [1, 0, *range(2, len(rows))]]
        assert_close(columns(again), swapped, rtol=1e-5, atol=1e-4)
    else:
        moved = (columns(again) - columns(trainer)).abs() > 1e-2
        assert moved.nonzero()[:, 1].unique().tolist() == [3]


def test_tokens_that_move_over_a_lists_end_are_other_rows():
    def row(prompt: list[int], chosen: list[int]) -> dict[str, list[int]]:
        return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": [5]}

    a = Dataset.from_list([row([1, 2], [4]), row([3], [4])])
    b = Dataset.from_list([row([1], [4]), row([2, 3], [4])])
    assert reference_logps._digest(a) != reference_logps._digest(b)
    assert reference_logps._digest(a) == reference_logps._digest(Dataset.from_list(a.to_list()))
    assert reference_logps._digest(a.select([1, 0])) == reference_logps._digest(
        Dataset.from_list(a.to_list()[::-1])
    )


def test_the_settings_of_losses_and_the_sharing_change_nothing_kept(runs: Runs):
    runs.attach(runs.build())
    for given in ({"trainer": {"loss_type": "ipo"}}, {"seed": 3}, {"prefix_sharing": False}):
        assert runs.attach(runs.build(**given))["computed"] == 0


def test_what_was_cut_off_is_computed_anew(runs: Runs):
    runs.stage("first")
    (runs.kept[0] / artifacts.FILE).unlink()
    found = runs.stage("second")["reference"]
    assert found["computed"] == found["pairs"]
    assert json.loads((runs.kept[0] / artifacts.FILE).read_text())["metrics"]["pairs"] == 40


def test_held_out_pairs_have_theirs_in_a_folder_of_their_own(runs: Runs, world: tiny_models.World):
    data = runs.folder / "data"
    shutil.copytree(world.data, data)
    pq.write_table(pq.read_table(data / "pairs-test.parquet"), data / "pairs-validation.parquet")
    runs.world = tiny_models.World(world.folder, data, world.sft, world.lora)
    assert runs.attach(runs.build())["pairs"] == 40, "without evaluation nobody reads theirs"
    trainer = runs.build(trainer={"eval_strategy": "steps", "eval_steps": 2})
    found = runs.attach(trainer)
    assert len(runs.kept) == 2
    assert found["pairs"] == len(trainer.train_dataset) + len(trainer.eval_dataset)
    trainer.train()
    logged = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    assert len(logged) == 2 and logged[0] != pytest.approx(LOG_2, abs=1e-4)


def changed(world: tiny_models.World, folder: Path, **config: Any) -> tiny_models.World:
    """The SFT model with other weights, or another configuration, under the artifact that it had."""
    shutil.copytree(world.sft, folder)
    if config:
        old = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(old | config))
    else:
        weights = load_file(folder / "model.safetensors")
        weights["model.norm.weight"] *= 1.01
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return tiny_models.World(world.folder, world.data, folder, world.lora)


@pytest.mark.parametrize("config", [{}, {"rms_norm_eps": 1e-2}], ids=["weights", "configuration"])
def test_other_weights_under_the_same_artifact_make_others(
    runs: Runs, world: tiny_models.World, config: dict[str, Any]
):
    # A stage's digest names its settings: trained again on two processes, the weights under it are others.
    runs.attach(runs.build())
    runs.world = changed(world, runs.folder / "again", **config)
    assert artifacts.digest_folder(runs.world.sft) == artifacts.digest_folder(world.sft)
    trainer = runs.build()
    assert runs.attach(trainer)["computed"] == 40
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(LOG_2, abs=1e-5)


def test_all_weights_and_a_new_adapter_have_the_same_reference(runs: Runs):
    first = runs.attach(runs.build())
    again = runs.attach(runs.build(lora=tiny_models.LORA))
    assert (again["computed"], again["folders"]) == (0, first["folders"])


def test_a_model_from_the_hub_has_one_too(runs: Runs):
    trainer = runs.build()
    found = reference_logps.add_reference_logps(
        trainer, model="some/model", pairs=runs.world.data, runs=runs.folder, logger=tiny_models.logger("dpo", runs.folder)
    )  # fmt: skip
    assert found["computed"] == 40
    made = artifacts.read_artifact(runs.kept[0])
    assert made is not None and made.inputs["model"]["folder"] == "some/model"


@pytest.mark.parametrize("broken", ["missing", "cut off", "of other rows", "artifact"])
def test_a_table_that_is_not_whole_is_made_again(runs: Runs, broken: str):
    runs.attach(runs.build())
    file = runs.kept[0] / reference_logps.FILE
    whole = pq.read_table(file)
    if broken == "missing":
        file.unlink()
    elif broken == "cut off":
        file.write_bytes(file.read_bytes()[:-20])
    elif broken == "artifact":
        (runs.kept[0] / artifacts.FILE).write_text("{")
    else:
        pq.write_table(whole[:-1], file)
    assert runs.attach(runs.build())["computed"] == 40
    assert pq.read_table(file).equals(whole)


def test_a_run_that_ends_before_it_has_seen_all_rows_does_not_score_them_all(runs: Runs):
    assert "reference" not in runs.stage("short", trainer={"max_steps": 4})
    assert runs.kept == []
    assert "reference" in runs.stage("long", trainer={"max_steps": 2, "gradient_accumulation_steps": 3})  # fmt: skip


def test_another_run_waits_for_the_one_that_scores(runs: Runs, monkeypatch):
    score, holder = reference_logps._score, []

    def slowly(*given: Any) -> torch.Tensor:
        lock = FileLock(runs.kept[0] / artifacts.WORKING)
        with pytest.raises(Timeout):
            lock.acquire(timeout=0)
        holder.append(True)
        return score(*given)

    monkeypatch.setattr(reference_logps, "_score", slowly)
    runs.attach(runs.build())
    assert holder == [True]


def test_in_bfloat16_the_first_loss_is_log_2_up_to_its_rounding(runs: Runs):
    for given in ({"dtype": "bfloat16"}, {"trainer": {"bf16": True}}):
        trainer = runs.build(**given)
        runs.attach(trainer)
        trainer.train()
        # 40 tokens, each rounded to 2^-9 of itself: a tenth of a nat, times beta, half of it in the loss
        assert trainer.state.log_history[0]["loss"] == pytest.approx(LOG_2, abs=5e-3)


def test_trls_head_takes_small_tiles_on_cpu_while_a_stage_trains_and_its_own_after(runs: Runs, monkeypatch):  # fmt: skip
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


def test_a_reference_that_moves_is_not_kept(runs: Runs):
    settings = DPO(
        model="sft",
        trainer=tiny_models.TRAINER
        | {"max_steps": 6, "sync_ref_model": True, "ref_model_sync_steps": 1},
    )  # fmt: skip
    inputs = {"model": runs.world.sft, "pairs": runs.world.data}
    found = tiny_models.stage(dpo, settings, inputs, runs.folder / "dpo")
    assert "reference" not in found
    assert runs.kept == []


def test_rows_of_a_prompt_go_together_and_like_lengths_do():
    def row(prompt: list[int], chosen: int) -> dict[str, list[int]]:
        return {"prompt_ids": prompt, "chosen_ids": [9] * chosen, "rejected_ids": [9]}

    rows = [row([1, 2], 3), row([7], 9), row([1, 2], 8), row([3], 2), row([1, 2], 1)]
    # the longest of a prompt's rows decides its place: [1, 2] has 10, [7] has 10 too, [3] has 3
    assert reference_logps._order(Dataset.from_list(rows)) in ([2, 0, 4, 1, 3], [1, 2, 0, 4, 3])


def test_the_memory_of_the_second_model_is_given_back(runs: Runs):
    trainer = runs.build()
    reference = trainer.ref_model
    assert reference is not None
    runs.attach(trainer)
    assert all(p.is_meta for p in reference.parameters())
    assert not any(p.is_meta for p in trainer.model.parameters())
