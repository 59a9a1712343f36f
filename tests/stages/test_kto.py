"""The KTO stage: its batches, TRL's loss on them, and the reference."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from helpers import tiny_models
from torch.testing import assert_close
from torch.utils.data import BatchSampler, SequentialSampler
from trl import KTOConfig, KTOTrainer

from align.config.base import Lora
from align.config.training import KTO
from align.errors import UserError
from align.models import loading, tokenization
from align.runtime import artifacts
from align.stages import kto
from align.training import trl_trainer

FOUR_WAYS = tiny_models.FOUR_WAYS
Build = Callable[..., Any]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tiny_models.World:
    return tiny_models.world(tmp_path_factory.getbasetemp())


@pytest.fixture
def build(world: tiny_models.World, tmp_path: Path) -> Build:
    def call(
        source: str = "sft", lora: Lora | None = None, *, builder: Any = kto.build,
        data: Path | None = None, keys: dict[str, Any] | None = None, **trainer: Any,
    ) -> Any:  # fmt: skip
        config = KTO(
            model=source,
            lora=lora,
            trainer=tiny_models.TRAINER | {"max_steps": 4} | trainer,
            **keys or {},
        )
        inputs = {"model": getattr(world, source), "preferences": data or world.data}
        return builder(config, inputs, tmp_path / "kto")

    return call


def first_batch(trainer: Any) -> Any:
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def loss_of(trainer: Any, batch: Any) -> float:
    with torch.no_grad():
        return trainer.compute_loss(trainer.model, batch).item()


def texts(trainer: Any, batch: Any, prefix: str = "") -> list[list[Any]]:
    """Text of the prompt and of the completion of each row of a batch."""
    rows = []
    for ids, real, is_completion in zip(
        *(batch[f"{prefix}{name}"] for name in ("input_ids", "attention_mask", "completion_mask")),
        strict=True,
    ):
        parts = (ids[real.bool() & ~is_completion.bool()], ids[is_completion.bool()])
        rows.append([trainer.processing_class.decode(part.tolist()) for part in parts])
    return rows


def logps(model: Any, trainer: Any, batch: Any, prefix: str = "") -> torch.Tensor:
    """Log-probabilities of the completions: one row at a time, without padding, from all logits."""
    if isinstance(model, Path):
        model = loading.load_merged(model, dtype="float32")
    model.eval()
    sums = []
    for ids, real, is_completion in zip(
        *(batch[f"{prefix}{name}"] for name in ("input_ids", "attention_mask", "completion_mask")),
        strict=True,
    ):
        start, row = int(is_completion.bool().nonzero()[0]), ids[real.bool()]
        with torch.no_grad():
            logits = model(input_ids=row[None]).logits[0, start - 1 : -1].double()
        sums.append(logits.log_softmax(-1).gather(1, row[start:, None]).sum())
    return torch.stack(sums)


# The four ways ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "lora"), FOUR_WAYS)
def test_before_training_the_policy_equals_its_reference_and_the_reference_is_the_sft_model(
    build: Build, world: tiny_models.World, source: str, lora: Lora | None
):
    trainer = build(source, lora, learning_rate=1e-3, max_steps=3)
    batch = first_batch(trainer)
    # log-ratios and KL are 0, so the loss of every row is 1 - sigmoid(0)
    assert loss_of(trainer, batch) == 0.5
    model = trainer.ref_model or trainer.model
    reference, partners = trainer.compute_ref_log_probs(model, batch)
    small = {name: value[:2] for name, value in batch.items()}
    expected = logps(getattr(world, source), trainer, small)
    assert_close(reference[:2].double(), expected, rtol=1e-4, atol=1e-4)
    expected = logps(getattr(world, source), trainer, small, "KL_")
    assert_close(partners[:2].double(), expected, rtol=1e-4, atol=1e-4)
    if source == "lora":
        assert (reference[:2] - logps(world.sft, trainer, small)).abs().min() > 0.1

    trainer.train()
    again, _ = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch)
    assert torch.equal(again, reference), "training moves the policy, not its reference"
    assert abs(loss_of(trainer, batch) - 0.5) > 1e-3
    for name, parameter in trainer.model.named_parameters():
        trained = lora is None or (".default." in name and "lora_" in name)
        assert parameter.requires_grad == trained, name


# The loss -----------------------------------------------------------------------------------------


def perturbed(trainer: Any) -> Any:
    """Move the policy away from its reference: if they are equal, a wrong formula could pass."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return trainer


def test_the_loss_of_a_batch_by_hand(build: Build, world: tiny_models.World):
    keys = {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.9}
    trainer = perturbed(build(keys=keys, per_device_train_batch_size=4))
    batch = first_batch(trainer)
    ratios, kls = (
        logps(trainer.model, trainer, batch, prefix) - logps(world.sft, trainer, batch, prefix)
        for prefix in ("", "KL_")
    )
    # arXiv:2402.01306, eq. 7 and 8: lambda (1 - v), v = sigmoid(beta (r - z0)) or sigmoid(beta (z0
    # - r))
    z0 = max(kls.mean().item(), 0.0)
    losses = []
    for ratio, label in zip(ratios.tolist(), batch["label"].tolist(), strict=True):
        gap = 0.3 * (ratio - z0) * (1 if label else -1)
        losses.append((1.2 if label else 0.9) * (1 - 1 / (1 + math.exp(-gap))))
    assert max(losses) - min(losses) > 0.1
    assert loss_of(trainer, batch) == pytest.approx(sum(losses) / 4, abs=1e-4)


def test_the_loss_of_a_batch_equals_that_of_trl(
    build: Build, world: tiny_models.World, tmp_path: Path
):
    # The rows of the stage's first batches, in order, in TRL's unmodified trainer: no prefix
    # sharing, TRL's KL partners. In batches of two, the partner of each row is the other row, so
    # the batches are equal.
    stage_trainer = build(per_device_train_batch_size=2)
    order = stage_trainer.train_dataset.order[:8]
    rows = kto.labeled_rows(world.data, "train", tmp_path).select(order)
    trainer = tiny_models.TRAINER | {"per_device_train_batch_size": 2, "max_steps": 4}
    tokenizer = tokenization.load_tokenizer(world.sft)
    with tokenization.rows_for_trl(tokenizer, end_repair=None):
        trl_only = KTOTrainer(
            model=loading.load_merged(world.sft, dtype="float32"),
            ref_model=loading.load_merged(world.sft, dtype="float32"),
            args=trl_trainer.trl_arguments(KTOConfig, tmp_path, seed=0, beta=0.1, trainer=trainer),
            train_dataset=rows,
            processing_class=tokenizer,
        )
    losses, expected = (
        [
            loss_of(each, each._prepare_inputs(batch))
            for _, batch in zip(range(4), each.get_train_dataloader(), strict=False)
        ]
        for each in (perturbed(stage_trainer), perturbed(trl_only))
    )
    assert len(expected) == 4
    assert max(abs(loss - 0.5) for loss in expected) > 0.01
    assert losses == pytest.approx(expected, abs=2e-6)


# Batches ------------------------------------------------------------------------------------------


def test_every_batch_of_the_loader_has_both_labels_and_kl_completions_of_other_prompts(
    build: Build,
):
    trainer = build(per_device_train_batch_size=6, num_train_epochs=2, max_steps=-1)
    true_pairs = {
        (tuple(row["prompt_ids"]), tuple(row["completion_ids"]))
        for row in trainer.train_dataset.rows
    }
    loader = trainer.get_train_dataloader()
    epochs = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        epochs.append([])
        for batch in loader:
            assert 0 < batch["label"].sum() < len(batch["label"])
            true, partners = texts(trainer, batch), texts(trainer, batch, "KL_")
            assert [prompt for prompt, _ in true] == [prompt for prompt, _ in partners]
            # each completion of the batch is used once, and never with the prompt that it answers
            assert Counter(c for _, c in true) == Counter(c for _, c in partners)
            pairs = {tuple(map(tuple, (trainer.processing_class.encode(p), trainer.processing_class.encode(c)))) for p, c in partners}  # fmt: skip
            assert not pairs & true_pairs
            epochs[-1].append(batch["input_ids"])
    assert len(epochs[0]) == math.ceil(len(true_pairs) / 6)
    assert not any(torch.equal(a, b) for a, b in zip(*epochs, strict=True))


def test_the_order_depends_on_the_seed_of_the_stage(build: Build):
    one, same, other = (build(keys={"seed": seed}).train_dataset.order for seed in (0, 0, 1))
    assert one == same != other


def test_the_order_of_trl_has_batches_of_a_single_label(build: Build):
    # The reason for `kto_batches`. If TRL mixes labels one day, this test fails and most of that
    # module can be deleted.
    trainer = build(builder=kto.build_with_trl_batches, per_device_train_batch_size=4)
    labels = [set(batch["label"].tolist()) for batch in trainer.get_train_dataloader()]
    assert sum(len(both) == 1 for both in labels) >= len(labels) - 1


@pytest.mark.parametrize("processes", [2, 3])
def test_every_process_gets_batches_of_both_labels(build: Build, processes: int):
    trainer = build(per_device_train_batch_size=4)
    rows = trainer.train_dataset
    batches = BatchSampler(SequentialSampler(rows), batch_size=4, drop_last=False)
    for rank in range(processes):
        for batch in BatchSamplerShard(batches, processes, rank):
            assert len({rows[place]["label"] for place in batch}) == 2


def test_every_epoch_of_a_training_has_its_order(build: Build, world: tiny_models.World):
    trainer = build(per_device_train_batch_size=20, max_steps=-1, num_train_epochs=3)
    seen: list[int] = []
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: seen.extend(hash(tuple(r["prompt_ids"] + r["completion_ids"])) for r in rows) or collate(rows)  # fmt: skip
    trainer.train()
    rows = trainer.train_dataset
    expected = []
    for epoch in range(3):
        rows.set_epoch(epoch)
        expected += [hash(tuple(r["prompt_ids"] + r["completion_ids"])) for r in map(rows.__getitem__, range(len(rows)))]  # fmt: skip
    assert seen == expected


# Data and weights ---------------------------------------------------------------------------------


def unpaired_rows(world: tiny_models.World, folder: Path, desirable: int, undesirable: int) -> Path:
    rows = tiny_models.rows(world.data, "pairs-train")
    labeled = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen", "prompt_id": row["prompt_id"]}
        for side, count in (("chosen", desirable), ("rejected", undesirable))
        for row in rows[:count]
    ]  # fmt: skip
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(labeled), folder / "unpaired-train.parquet")
    return folder


def test_labeled_completions_are_used_and_weighted(
    build: Build, world: tiny_models.World, tmp_path: Path
):
    data = unpaired_rows(world, tmp_path / "unpaired", 6, 24)
    trainer = build(data=data)
    assert len(trainer.train_dataset) == 32  # 30, filled up to batches of 8
    assert sum(trainer.train_dataset.labels) == 6
    assert (trainer.desirable_weight, trainer.undesirable_weight) == (4.0, 1.0)


def test_weights_outside_of_the_recommended_range_give_a_warning(
    world: tiny_models.World, tmp_path: Path
):
    config = KTO(model="sft", desirable_weight=3.0, undesirable_weight=1.0, trainer=tiny_models.TRAINER | {"max_steps": 1})  # fmt: skip
    inputs = {"model": world.sft, "preferences": world.data}
    metrics = tiny_models.stage(kto, config, inputs, tmp_path / "kto")
    assert metrics["weight_ratio"] == 3.0
    assert ["have 3.00 times the weight" in line for line in metrics["warnings"]] == [True]


def test_held_out_batches_have_both_labels(build: Build, world: tiny_models.World, tmp_path: Path):
    data = unpaired_rows(world, tmp_path / "unpaired", 12, 12)
    shutil.copy(data / "unpaired-train.parquet", data / "unpaired-validation.parquet")
    trainer = build(data=data, per_device_eval_batch_size=6, eval_on_start=True)
    for batch in trainer.get_eval_dataloader():
        assert batch["label"].tolist().count(True) == 3
    assert trainer.evaluate()["eval_loss"] == 0.5


@pytest.mark.parametrize(
    ("counts", "message"),
    [((8, 0), "no completion is undesirable"), ((0, 8), "no completion is desirable"),
     ((1, 20), "1 desirable of 21 completions are not enough for 3 batches")],
)  # fmt: skip
def test_too_few_completions_of_a_label_are_a_user_error(
    build: Build, world: tiny_models.World, tmp_path: Path, counts: tuple[int, int], message: str
):
    with pytest.raises(UserError, match=message):
        build(data=unpaired_rows(world, tmp_path / "unpaired", *counts))


def test_missing_preferences_are_a_user_error(build: Build, tmp_path: Path):
    with pytest.raises(UserError, match=r"no pairs-train.parquet"):
        build(data=tmp_path)


def test_a_loss_without_kl_has_no_kl_completions(build: Build):
    trainer = build(loss_type="apo_zero_unpaired")
    batch = first_batch(trainer)
    assert not [key for key in batch if key.startswith("KL_")]
    assert loss_of(trainer, batch) == 0.5


# Whole stages -------------------------------------------------------------------------------------


def test_a_stage_saves_the_policy_that_it_trained(
    build: Build, world: tiny_models.World, tmp_path: Path
):
    config = KTO(
        model="lora",
        lora=tiny_models.LORA,
        trainer=tiny_models.TRAINER | {"max_steps": 4, "learning_rate": 1e-3},
    )
    folder = tmp_path / "stage"
    tiny_models.stage(kto, config, {"model": world.lora, "preferences": world.data}, folder)
    again = build("lora", tiny_models.LORA, learning_rate=1e-3)
    again.train()
    batch = {k: v[:2] for k, v in first_batch(again).items()}
    rows = logps(folder, again, batch)
    assert_close(rows, logps(again.model, again, batch), rtol=1e-4, atol=1e-4)

    artifact = artifacts.read_artifact(folder)
    assert artifact is not None
    keys = {"loss", "rewards/margins", "steps", "epochs", "parameters", "weight_ratio"}
    assert keys <= artifact.metrics.keys()
    assert artifact.metrics["warnings"] == []
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    expected = [e["loss"] for e in again.state.log_history if "loss" in e]
    assert losses == pytest.approx(expected, abs=1e-6)
    assert losses[-1] != losses[0] == 0.5
    assert (folder / "adapter_config.json").is_file()
    assert not (folder / "ref").exists()
    assert tokenization.tokenize_prompts(
        tokenization.load_tokenizer(folder), [[{"role": "user", "content": "."}]]
    )
