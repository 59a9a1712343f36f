"""Preference losses: computed by hand, and equal to the losses of TRL's trainers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_models
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import (
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    unpair_preference_dataset,
)

from align.data import tables
from align.functional.preference import bradley_terry_loss, dpo_loss, kto_loss
from align.models import tokenization


def test_bradley_terry_by_hand():
    # -log sigmoid(3 - 1) = log(1 + e^-2); the other way round log(1 + e^2)
    loss = bradley_terry_loss(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 3.0]))
    assert_close(loss, torch.tensor([math.log1p(math.exp(-2)), math.log1p(math.exp(2))]))


def test_dpo_by_hand():
    # beta * (chosen - rejected) = 0.5 * (1 - (-1)) = 1;  -log sigmoid(1) = log(1 + e^-1)
    # the other way round: -1 and log(1 + e)
    loss = dpo_loss(torch.tensor([1.0, -1.0]), torch.tensor([-1.0, 1.0]), beta=0.5)
    assert_close(loss, torch.tensor([math.log1p(math.exp(-1)), math.log1p(math.e)]))


@pytest.mark.parametrize(
    ("logratio", "desirable", "gain"),
    [
        # beta * (logratio - kl) = 0.5 * (3 - 1), with the opposite sign if undesirable
        pytest.param(3.0, True, +1.0, id="desirable and likelier than the reference point"),
        pytest.param(3.0, False, -1.0, id="undesirable and likelier than the reference point"),
        pytest.param(-3.0, True, -2.0, id="desirable and less likely"),
        pytest.param(-3.0, False, +2.0, id="undesirable and less likely"),
        pytest.param(1.0, True, 0.0, id="at the reference point"),
    ],
)
def test_kto_by_hand(logratio, desirable, gain):
    loss = kto_loss(
        torch.tensor([logratio]),
        torch.tensor([desirable]),
        torch.tensor(1.0),
        beta=0.5,
        desirable_weight=1.5,
        undesirable_weight=0.75,
    )
    weight = 1.5 if desirable else 0.75
    assert_close(loss, torch.tensor([weight * (1 - 1 / (1 + math.exp(-gain)))]))


def test_losses_fall_in_the_direction_of_the_preference():
    chosen = torch.tensor([0.3], requires_grad=True)
    rejected = torch.tensor([0.1], requires_grad=True)
    dpo_loss(chosen, rejected, beta=0.1).sum().backward()
    assert chosen.grad.item() == -rejected.grad.item() < 0
    ratios = torch.tensor([0.3, 0.3], requires_grad=True)
    kl = torch.tensor(0.2, requires_grad=True)
    kto_loss(ratios, torch.tensor([True, False]), kl, beta=0.1).sum().backward()
    assert ratios.grad[0] < 0 < ratios.grad[1]
    assert kl.grad is None, "the reference point is a constant"


def test_large_differences_stay_finite():
    loss = dpo_loss(torch.tensor([-1e4]), torch.tensor([1e4]), beta=1.0)
    assert_close(loss, torch.tensor([2e4]))


# Against TRL's trainers. Policy and reference differ, and their weights are wide: at equality every
# loss is that of log-ratio 0, whatever the formula.


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tiny_models.World:
    return tiny_models.world(tmp_path_factory.getbasetemp())


def model(world: tiny_models.World, seed: int, kind: Any = AutoModelForCausalLM) -> Any:
    config = AutoConfig.from_pretrained(world.sft, initializer_range=0.5)
    if kind is AutoModelForSequenceClassification:
        config.num_labels = 1
    torch.manual_seed(seed)
    return kind.from_config(config).eval()


def arguments(kind: Any, folder: Path, **more: Any) -> Any:
    fixed = {"output_dir": str(folder), "report_to": "none", "use_cpu": True}
    return kind(**tiny_models.TRAINER | fixed | {"per_device_train_batch_size": 4} | more)


def first_batch(trainer: Any) -> Any:
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def loss_of(trainer: Any, batch: Any) -> Tensor:
    with torch.no_grad():
        return trainer.compute_loss(trainer.model, batch)


@torch.no_grad()
def logratios(policy: Any, reference: Any, batch: Any, prefix: str = "") -> Tensor:
    """One row at a time, without padding and from all logits."""
    ratios = []
    keys = ("input_ids", "attention_mask", "completion_mask")
    for ids, real, completion in zip(*(batch[f"{prefix}{key}"] for key in keys), strict=True):
        row, start = ids[real.bool()][None], int(completion.bool().nonzero()[0])
        logps = [
            each(input_ids=row).logits[0, start - 1 : -1].log_softmax(-1)
            for each in (policy, reference)
        ]
        ratios.append((logps[0] - logps[1]).gather(1, row[0, start:, None]).sum())
    return torch.stack(ratios)


def test_bradley_terry_is_the_loss_of_trls_reward_trainer(world: tiny_models.World, tmp_path: Path):
    trainer = RewardTrainer(
        model=model(world, 0, AutoModelForSequenceClassification),
        args=arguments(RewardConfig, tmp_path),
        train_dataset=tables.load_dataset(world.data, "pairs", "train", tmp_path),
        processing_class=tokenization.load_tokenizer(world.sft),
    )
    batch = first_batch(trainer)
    with torch.no_grad():
        rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
        scores = [
            trainer.model(input_ids=ids[real.bool()][None]).logits[0, 0] for ids, real in rows
        ]
    chosen, rejected = torch.stack(scores).chunk(2)
    assert (chosen - rejected).abs().max() > 0.1
    assert_close(bradley_terry_loss(chosen, rejected).mean(), loss_of(trainer, batch))


@pytest.mark.parametrize("beta", [0.02, 0.1])
def test_dpo_is_the_loss_of_trls_trainer(world: tiny_models.World, tmp_path: Path, beta: float):
    policy, reference = model(world, 0), model(world, 1)
    trainer = DPOTrainer(
        model=policy,
        ref_model=reference,
        args=arguments(DPOConfig, tmp_path, beta=beta),
        train_dataset=tables.load_dataset(world.data, "pairs", "train", tmp_path),
        processing_class=tokenization.load_tokenizer(world.sft),
    )
    batch = first_batch(trainer)
    chosen, rejected = logratios(policy, reference, batch).chunk(2)
    expected = loss_of(trainer, batch)
    assert abs(expected - math.log(2)) > 0.01
    assert_close(dpo_loss(chosen, rejected, beta=beta).mean(), expected, rtol=1e-4, atol=1e-5)


def test_kto_is_the_loss_of_trls_trainer(world: tiny_models.World, tmp_path: Path):
    policy, reference = model(world, 0), model(world, 1)
    weights = {"beta": 0.02, "desirable_weight": 1.5, "undesirable_weight": 0.75}
    pairs = tables.load_dataset(world.data, "pairs", "train", tmp_path)
    trainer = KTOTrainer(
        model=policy,
        ref_model=reference,
        args=arguments(KTOConfig, tmp_path, **weights),
        train_dataset=unpair_preference_dataset(pairs).shuffle(seed=0),  # both labels in a batch
        processing_class=tokenization.load_tokenizer(world.sft),
    )
    batch = first_batch(trainer)
    ratios = logratios(policy, reference, batch)
    kl = logratios(policy, reference, batch, "KL_").mean().clamp(min=0)
    desirable = batch["label"].bool()
    assert desirable.any()
    assert not desirable.all()
    assert kl > 0
    loss = kto_loss(ratios, desirable, kl, **weights)
    assert_close(loss.mean(), loss_of(trainer, batch), rtol=1e-4, atol=1e-5)
