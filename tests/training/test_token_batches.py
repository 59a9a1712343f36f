"""Batches of a number of tokens: which rows they have, and that steps weigh all rows alike."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from accelerate import skip_first_batches
from helpers import tiny_models
from helpers.prefix_models import assert_close_in_norm, batch, gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from align.config.training import DPO, KTO, SFT, Reward
from align.models.prefix_sharing import trie
from align.models.token_batches import divide
from align.stages import dpo, kto, reward, sft
from align.training.token_batches import TokenBatches, build_batches

ROW = st.lists(st.integers(0, 2), min_size=1, max_size=6)
ITEMS = st.lists(st.lists(ROW, min_size=1, max_size=2), min_size=1, max_size=8)


def count(items: list[list[list[int]]], sharing: bool) -> int:
    """Tokens that a forward pass computes for a batch."""
    ids, mask = batch([row for item in items for row in item], "right", extra=0)
    if not sharing:
        return ids.numel()
    layout = trie.build_layout(ids, mask, absolute=False)
    assert layout is not None
    return len(layout.tokens)


@settings(max_examples=60, deadline=None)
@given(items=ITEMS, tokens=st.integers(1, 20), sharing=st.booleans())
def test_batches_keep_the_order_and_are_as_large_as_the_tokens_allow(items, tokens, sharing):
    batches = divide(items, tokens=tokens, prefix_sharing=sharing)
    assert [index for each in batches for index in each] == list(range(len(items)))
    for each in batches:
        assert len(each) == 1 or count([items[i] for i in each], sharing) <= tokens
    for each, following in itertools.pairwise(batches):
        assert count([items[i] for i in [*each, following[0]]], sharing) > tokens


@settings(max_examples=60, deadline=None)
@given(items=ITEMS, tokens=st.integers(1, 20), ranks=st.integers(1, 3), seed=st.integers(0, 3))
def test_all_ranks_have_equally_many_batches_and_every_row_once(items, tokens, ranks, seed):
    options: dict[str, Any] = {"tokens": tokens, "prefix_sharing": True, "seed": seed}
    batches = build_batches(items, ranks=ranks, **options)
    assert batches == build_batches(items, ranks=ranks, **options)
    rows = sorted(index for each in batches for index in each)
    assert set(rows) == set(range(len(items)))
    if len(items) >= ranks:
        repeats = len(rows) - len(items)
        assert repeats == 0 or (set(map(len, batches)) == {1} and repeats < ranks)
    samplers = [TokenBatches(batches, seed=seed, rank=k, ranks=ranks) for k in range(ranks)]
    epochs = []
    for epoch in range(2):
        taken = []
        for sampler in samplers:
            sampler.set_epoch(epoch)
            own = list(sampler)
            assert len(own) == len(sampler) == len(batches) // ranks
            taken += own
        assert sorted(taken) == sorted(batches)
        epochs.append(taken)
    if len(batches) > 6:
        assert epochs[0] != epochs[1]


# Trainers ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tiny_models.World:
    return tiny_models.world(tmp_path_factory.getbasetemp())


STAGES = [
    pytest.param(sft, SFT, "demonstrations", id="sft"),
    pytest.param(dpo, DPO, "pairs", id="dpo"),
    pytest.param(reward, Reward, "pairs", id="reward"),
    pytest.param(kto, KTO, "preferences", id="kto"),
]


@pytest.mark.parametrize(("stage", "config_class", "data"), STAGES)
def test_the_loss_of_a_step_is_that_of_its_rows_in_one_batch(
    stage, config_class, data, world, tmp_path
):
    fields = {k: v for k, v in tiny_models.TRAINER.items() if "batch_size" not in k}
    fields |= {"gradient_accumulation_steps": 3, "max_steps": 1}
    if config_class is KTO:  # the KL term of the other loss depends on the batch of a row
        fields["loss_type"] = "apo_zero_unpaired"
    config = config_class(model="sft", tokens_per_batch=700, trainer=fields)
    trainer = stage.build(config, {"model": world.sft, data: world.data}, tmp_path)
    trainer.model.train()
    loader = trainer.get_train_dataloader()
    loader.set_epoch(1)
    skipped = list(skip_first_batches(loader, 2))
    full = list(loader)
    assert [b["input_ids"].tolist() for b in skipped] == [b["input_ids"].tolist() for b in full[2:]]

    loader.set_epoch(0)
    batches, items = trainer.get_batch_samples(iter(loader), 3, torch.device("cpu"))
    assert len({len(b["input_ids"]) for b in batches}) > 1
    steps = 1 if items is not None else 3  # transformers divides by them
    losses = [
        trainer.compute_loss(trainer.model, b, num_items_in_batch=items) / steps for b in batches
    ]
    actual = gradients(trainer.model, sum(losses))
    assert any(gradient.norm() > 1e-3 for gradient in actual.values())

    sampler = trainer.token_batches
    sampler.set_epoch(0)
    rows = [index for taken in list(sampler)[:3] for index in taken]
    whole = trainer.data_collator([trainer.train_dataset[index] for index in rows])
    expected = trainer.compute_loss(trainer.model, whole)
    assert_close(sum(losses), expected)
    assert_close_in_norm(actual, gradients(trainer.model, expected), tolerance=1e-4)


def test_batches_of_kto_have_both_labels_and_both_sides_of_a_pair(world, tmp_path):
    fields = {k: v for k, v in tiny_models.TRAINER.items() if "batch_size" not in k}
    config = KTO(model="sft", tokens_per_batch=500, trainer=fields)
    trainer = kto.build(config, {"model": world.sft, "preferences": world.data}, tmp_path)
    rows, batches = trainer.train_dataset, trainer.token_batches.batches
    assert len(set(map(len, batches))) > 1
    seen = [index for each in batches for index in each]
    assert set(seen) == set(range(len(rows)))
    assert len(seen) - len(rows) < 4  # the last block is filled
    together = 0
    for each in batches:
        sides = [(rows.prompts[index], rows.labels[index]) for index in each]
        assert {label for _, label in sides} == {True, False}
        assert 2 * max(Counter(prompt for prompt, _ in sides).values()) <= len(each)
        together += sum((prompt, not label) in sides for prompt, label in sides)
        ids = [[rows[i]["prompt_ids"] + rows[i]["completion_ids"]] for i in each]
        assert len(each) == 4 or count(ids, sharing=True) <= 500
    assert together >= len(rows) - 4
    for inputs in trainer.get_train_dataloader():
        partners = zip(inputs["input_ids"], inputs["KL_input_ids"], strict=True)
        assert all(one.tolist() != other.tolist() for one, other in partners)


@pytest.mark.parametrize("field", ["per_device_train_batch_size", "train_sampling_strategy"])
def test_other_settings_of_the_batches_are_refused(field):
    values = {"per_device_train_batch_size": 4, "train_sampling_strategy": "sequential"}
    config = DPO(model="sft", tokens_per_batch=100, trainer={field: values[field]})
    (problem,) = config.problems({})
    assert problem.keys == ("tokens_per_batch",)
    assert f"trainer.{field}" in problem.message


def test_a_loss_over_tokens_among_losses_over_rows_is_refused():
    config = DPO(
        model="sft",
        tokens_per_batch=100,
        trainer={"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0]},
    )
    (problem,) = config.problems({})
    assert "the loss `sft` is a mean over tokens" in problem.message


def test_steps_are_estimated_from_tokens():
    statistics = {"pairs": {"train": 100}, "words": {}}
    statistics["words"] = {"prompt_median": 20, "chosen_median": 10, "rejected_median": 10}
    config = DPO(model="sft", tokens_per_batch=540, trainer={"num_train_epochs": 2})
    # 100 rows of 60 words and 1.35 tokens a word, twice, are 16,200 tokens
    work = config.workload(statistics, world_size=2)
    assert (work.rows, work.tokens, work.steps) == (100, 16_200, 15)
