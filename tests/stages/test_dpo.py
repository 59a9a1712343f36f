"""The DPO stage: the policy starts as its reference, which does not change.

A wrong reference raises no error: with the base without its adapter, or the policy itself, as the
reference, the loss still looks plausible.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_models
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid
from torch.testing import assert_close

from align.config.base import Lora
from align.config.training import DPO
from align.config.trl_fields import trl_fields
from align.errors import UserError
from align.models import loading, tokenization
from align.models.logps import completion_logps
from align.runtime import artifacts
from align.stages import dpo

FOUR_WAYS = tiny_models.FOUR_WAYS
LOG_2 = tiny_models.LOG_2
LOSSES = trl_fields("DPOConfig")["loss_type"].choices
Build = Callable[..., Any]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tiny_models.World:
    return tiny_models.world(tmp_path_factory.getbasetemp())


@pytest.fixture
def build(world: tiny_models.World, tmp_path: Path) -> Build:
    def call(source: str, lora: Lora | None, *, name: str = "dpo", **trainer: Any) -> Any:
        config = DPO(
            model=source, lora=lora, trainer=tiny_models.TRAINER | {"max_steps": 4} | trainer
        )
        inputs = {"model": getattr(world, source), "pairs": world.data}
        return dpo.build(config, inputs, tmp_path / name)

    return call


def first_batch(trainer: Any) -> Any:
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def reference_logps(trainer: Any, batch: Any) -> torch.Tensor:
    """Reference log-probabilities of the chosen, then the rejected completions, by TRL."""
    return torch.cat(trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch))


def policy_logps(trainer: Any, batch: Any) -> torch.Tensor:
    """Policy log-probabilities of the chosen, then the rejected completions."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    with torch.no_grad():
        output = trainer.model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=labels,
            use_cache=False,
            fused_lm_head=True,
        )
    return output.log_probs.sum(dim=1)


def rows_of(trainer: Any, batch: Any) -> list[tuple[Any, Any]]:
    """Prompts and completions of the rows in a batch: chosen, then rejected."""
    by_ids = {
        tuple(row["prompt_ids"] + row[f"{side}_ids"]): (row["prompt"], row[side])
        for row in trainer.train_dataset
        for side in ("chosen", "rejected")
    }
    sequences = [
        tuple(ids[mask.bool()].tolist())
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    return [by_ids[sequence] for sequence in sequences]


def logps(folder_or_model: Any, tokenizer: Any, rows: Any) -> torch.Tensor:
    model = folder_or_model
    if isinstance(model, Path):
        model = loading.load_merged(model, dtype="float32")
    return completion_logps(model, tokenizer, rows, batch_size=len(rows))


def loss_of(trainer: Any, batch: Any) -> float:
    with torch.no_grad():
        return trainer.compute_loss(trainer.model, batch).item()


# The four ways ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "lora"), FOUR_WAYS)
def test_before_training_the_policy_equals_its_reference_and_the_reference_is_the_sft_model(
    build: Build, world: tiny_models.World, source: str, lora: Lora | None
):
    trainer = build(source, lora)
    batch = first_batch(trainer)
    reference = reference_logps(trainer, batch)
    assert torch.equal(policy_logps(trainer, batch), reference)
    assert loss_of(trainer, batch) == LOG_2

    rows = rows_of(trainer, batch)
    prepared = tiny_models.rows(world.data, "pairs-train")
    for side, half in (("chosen", rows[: len(rows) // 2]), ("rejected", rows[len(rows) // 2 :])):
        assert all(any((p["prompt"], p[side]) == row for p in prepared) for row in half), side
    tokenizer = tokenization.load_tokenizer(world.sft)
    sft = logps(getattr(world, source), tokenizer, rows)
    assert_close(reference.double(), sft, rtol=1e-4, atol=1e-4)
    if source == "lora":
        base = logps(world.sft, tokenizer, rows)
        assert (reference - base).abs().min() > 0.1, "the base without its adapter"


@pytest.mark.parametrize(("source", "lora"), FOUR_WAYS)
def test_training_moves_the_policy_and_not_the_reference(
    build: Build, world: tiny_models.World, source: str, lora: Lora | None
):
    trainer = build(source, lora)
    batch = first_batch(trainer)
    before = reference_logps(trainer, batch)
    trainer.train()
    assert torch.equal(reference_logps(trainer, batch), before)
    policy = policy_logps(trainer, batch)
    assert (policy - before).abs().min() > 0.01

    # eq. 7 of arXiv:2305.18290 with beta 0.1, from log-probabilities of the policy and the SFT
    # model
    rows = rows_of(trainer, batch)
    tokenizer = tokenization.load_tokenizer(world.sft)
    now = logps(trainer.model, tokenizer, rows)
    assert_close(now, policy.double(), rtol=1e-4, atol=1e-4)
    chosen, rejected = (now - logps(getattr(world, source), tokenizer, rows)).chunk(2)
    expected = -logsigmoid(0.1 * (chosen - rejected)).mean().item()
    assert abs(expected - LOG_2) > 0.005, "at log 2 a wrong formula could pass"
    assert loss_of(trainer, batch) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("source", "lora"), FOUR_WAYS)
def test_only_trained_parameters_have_gradients(build: Build, source: str, lora: Lora | None):
    trainer = build(source, lora)
    trainer.compute_loss(trainer.model, first_batch(trainer)).backward()
    for name, parameter in trainer.model.named_parameters():
        trained = lora is None or (".default." in name and "lora_" in name)
        assert (parameter.grad is not None) == parameter.requires_grad == trained, name
    if lora is None:
        assert all(p.grad is None for p in trainer.ref_model.parameters())


@pytest.mark.parametrize(("source", "lora"), FOUR_WAYS)
def test_with_mixed_precision_and_checkpointing_the_first_loss_is_log_2(
    build: Build, source: str, lora: Lora | None
):
    trainer = build(source, lora, bf16=True, gradient_checkpointing=True, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == LOG_2
    assert trainer.state.log_history[0]["grad_norm"] > 0


# Whole stages -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(world: tiny_models.World) -> Callable[[str, Lora | None], Path]:
    """The folder of a finished stage of four steps, run once."""

    @functools.cache
    def call(source: str, lora: Lora | None) -> Path:
        folder = world.folder / f"dpo-{source}-{'full' if lora is None else 'lora'}"
        config = DPO(model=source, lora=lora, trainer=tiny_models.TRAINER | {"max_steps": 4})
        inputs = {"model": getattr(world, source), "pairs": world.data}
        tiny_models.stage(dpo, config, inputs, folder)
        return folder

    return lambda source, lora: call(source, lora)


@pytest.mark.parametrize(("source", "lora"), FOUR_WAYS)
def test_a_stage_saves_the_policy_that_it_trained(
    world: tiny_models.World, build: Build, finished: Any, source: str, lora: Lora | None
):
    folder = finished(source, lora)
    again = build(source, lora)  # the same seed, trained by TRL alone
    again.train()
    batch = first_batch(again)
    saved = logps(folder, tokenization.load_tokenizer(folder), rows_of(again, batch))
    assert_close(saved, policy_logps(again, batch).double(), rtol=1e-4, atol=1e-4)

    artifact = artifacts.read_artifact(folder)
    assert artifact is not None
    keys = {"loss", "rewards/accuracies", "rewards/margins", "steps", "epochs", "parameters"}
    assert keys <= artifact.metrics.keys()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    # the stage has computed its reference before training, in other batches: equal up to rounding
    expected = [e["loss"] for e in again.state.log_history if "loss" in e]
    assert losses == pytest.approx(expected, abs=1e-4)
    assert (artifact.metrics["steps"], artifact.metrics["loss"]) == (4, losses[-1])
    assert (folder / "adapter_config.json").is_file() == (lora is not None)


def test_an_adapter_that_is_trained_further_saves_no_copy_of_its_reference(
    world: tiny_models.World, finished: Any
):
    folder = finished("lora", tiny_models.LORA)
    assert not (folder / "ref").exists()
    weights = load_file(folder / "adapter_model.safetensors")
    assert weights.keys() == load_file(world.lora / "adapter_model.safetensors").keys()
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(world.sft), "its base is the SFT model"


def test_a_second_dpo_stage_on_an_adapter_has_the_first_as_its_reference(
    world: tiny_models.World, finished: Any, tmp_path: Path
):
    first = finished("lora", tiny_models.LORA)
    config = DPO(model="first", lora=tiny_models.LORA, trainer=tiny_models.TRAINER)
    trainer = dpo.build(config, {"model": first, "pairs": world.data}, tmp_path)
    batch = first_batch(trainer)
    reference = reference_logps(trainer, batch)
    assert torch.equal(policy_logps(trainer, batch), reference)
    rows = rows_of(trainer, batch)
    tokenizer = tokenization.load_tokenizer(world.sft)
    assert_close(reference.double(), logps(first, tokenizer, rows), rtol=1e-4, atol=1e-4)
    assert (reference - logps(world.lora, tokenizer, rows)).abs().min() > 0.01


def test_an_adapter_of_another_shape_is_a_user_error(build: Build):
    with pytest.raises(
        UserError,
        match=r"this adapter has r=4, alpha=8, but `lora` has r=16, alpha=32",
    ):
        build("lora", Lora())


def test_missing_pairs_are_a_user_error(world: tiny_models.World, tmp_path: Path):
    with pytest.raises(UserError, match=r"no pairs-train.parquet"):
        dpo.build(
            DPO(model="sft", trainer=tiny_models.TRAINER),
            {"model": world.sft, "pairs": tmp_path},
            tmp_path,
        )


# Losses -------------------------------------------------------------------------------------------


def test_all_losses_of_trl_are_tested_here():
    assert len(set(LOSSES)) == 15
    assert {"sigmoid", "hinge", "ipo", "exo_pair", "apo_zero", "sigmoid_norm"} <= set(LOSSES)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_of_trl_trains(build: Build, loss_type: str):
    smoothing = {"label_smoothing": 1e-3} if loss_type == "exo_pair" else {}
    trainer = build("sft", None, loss_type=loss_type, max_steps=2, **smoothing)
    assert trainer.loss_types == [loss_type]
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))
    changed = [not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters()]
    assert any(changed)
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_losses_combine_with_their_weights(build: Build):
    both = build("sft", None, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5])
    only = build("sft", None, loss_type="sft", name="only")
    batch = first_batch(both)
    # the policy equals its reference, so the sigmoid loss is log 2
    expected = LOG_2 + 0.5 * loss_of(only, batch)
    assert loss_of(both, batch) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("losses", [["sft"], ["sigmoid", "sft"]])
def test_the_sft_loss_is_the_mean_over_tokens_however_the_step_is_divided(
    build: Build, losses: list[str]
):
    entries = {}
    for size in (2, 8):
        trainer = build(
            "sft", None, name=f"dpo-{size}", loss_type=losses, loss_weights=[0.5] * len(losses),
            per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, max_steps=1,
            train_sampling_strategy="sequential", max_grad_norm=0.0,
        )  # fmt: skip
        batch = next(iter(trainer.get_train_dataloader()))
        lengths = batch["completion_mask"].chunk(2)[0].sum(1)
        assert len(set(lengths.tolist())) > 1, "with equal lengths, all means are equal"
        trainer.train()
        assert trainer.loss_weights == [0.5] * len(losses)
        entries[size] = trainer.state.log_history[0]
    for key in ("loss", "grad_norm"):
        assert entries[2][key] == pytest.approx(entries[8][key], rel=1e-4), key


def test_a_configuration_that_trl_rejects_is_a_user_error(build: Build):
    with pytest.raises(
        UserError, match=r"trainer: TRL rejects this configuration: Label smoothing must"
    ):
        build("sft", None, loss_type="exo_pair")
    with pytest.raises(UserError, match=r"TRL rejects this configuration: .*sync_ref_model"):
        build("sft", tiny_models.LORA, sync_ref_model=True)


def test_beta_scales_the_implicit_rewards(world: tiny_models.World, tmp_path: Path):
    margins = []
    for beta in (0.1, 0.3):
        config = DPO(model="sft", beta=beta, trainer=tiny_models.TRAINER)
        inputs = {"model": world.sft, "pairs": world.data}
        trainer = dpo.build(config, inputs, tmp_path)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.mul_(1.1)
        trainer.model.train()
        loss_of(trainer, first_batch(trainer))
        margins.append(trainer._metrics["train"]["rewards/margins"][0])
    assert abs(margins[0]) > 0.01
    assert margins[1] == pytest.approx(3 * margins[0], rel=1e-4)


def test_an_adapter_stays_an_adapter(build: Build):
    assert isinstance(build("lora", tiny_models.LORA).model, PeftModel)
    assert isinstance(build("sft", tiny_models.LORA).model, PeftModel)
    assert not isinstance(build("lora", None).model, PeftModel)
