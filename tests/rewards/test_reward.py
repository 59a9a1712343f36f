"""The reward stage: margins, rows that are too long, calibration, and the ceiling of the embedded labels."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import tiny_models
from torch.testing import assert_close

from align.config.training import Reward
from align.errors import UserError
from align.evaluation import reward_model
from align.models import tokenization
from align.rewards import gold
from align.stages import reward


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tiny_models.World:
    return tiny_models.world(tmp_path_factory.getbasetemp())


def built(
    world: tiny_models.World, data: Path, folder: Path, *, coef: float = 0.0, **trainer: Any
) -> Any:
    settings = Reward(
        model="sft", margin_coef=coef, trainer=tiny_models.TRAINER | {"max_steps": 1} | trainer
    )
    inputs = {"model": world.sft, "pairs": data}
    return reward.build(settings, inputs, folder, logger=tiny_models.logger("reward", folder))


@pytest.fixture
def with_margins(world: tiny_models.World, tmp_path: Path) -> Path:
    """The tiny pairs, the k-th of which has the margin k."""
    folder = tmp_path / "margins"
    shutil.copytree(world.data, folder)
    file = folder / "pairs-train.parquet"
    table = pq.read_table(file)
    margins = pa.array([float(k) for k in range(len(table))])
    pq.write_table(table.append_column("margin", margins), file)
    return folder


def test_a_margin_is_what_the_scores_are_asked_to_differ_by(
    world: tiny_models.World, with_margins: Path, tmp_path: Path
):
    (tmp_path / "out").mkdir()
    trainer = built(world, with_margins, tmp_path / "out", coef=0.5)
    batch = trainer.data_collator([trainer.train_dataset[k] for k in (0, 2, 3)])
    assert batch["margin"].tolist() == [0.0, 1.0, 1.5]
    with torch.no_grad():
        chosen, rejected = (
            trainer.model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                use_cache=False,
            )
            .logits[:, 0]
            .chunk(2)
        )
        loss = trainer.compute_loss(trainer.model, dict(batch))
    # -log sigmoid(d) = log(1 + e^-d), by hand
    differences = (chosen - rejected - torch.tensor([0.0, 1.0, 1.5])).tolist()
    expected = sum(math.log1p(math.exp(-d)) for d in differences) / 3
    assert_close(loss.item(), expected, rtol=1e-5, atol=1e-6)


def test_margins_are_left_alone_unless_they_are_asked_for(
    world: tiny_models.World, with_margins: Path, tmp_path: Path
):
    (tmp_path / "out").mkdir()
    trainer = built(world, with_margins, tmp_path / "out")
    assert set(trainer.train_dataset.column_names) == {"chosen_ids", "rejected_ids"}


def test_margins_that_are_not_there_are_a_users_mistake(world: tiny_models.World, tmp_path: Path):
    with pytest.raises(UserError, match="margin_coef: these pairs have no `margin`"):
        built(world, world.data, tmp_path, coef=1.0)


def test_pairs_that_are_too_long_are_counted_and_left_out(
    world: tiny_models.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    told: list[str] = []
    logger = tiny_models.logger("reward", tmp_path)
    monkeypatch.setattr(logger, "info", told.append)
    tokenizer = tokenization.load_tokenizer(world.sft)
    rows = tiny_models.rows(world.data, "pairs-train")
    lengths = [
        max(len(tokenization.tokenize_for_reward(tokenizer, [r["prompt"]], [r[s]])[0]) for s in ("chosen", "rejected"))
        for r in rows
    ]  # fmt: skip
    limit = sorted(lengths)[len(lengths) // 2]
    settings = Reward(
        model="sft", trainer=tiny_models.TRAINER | {"max_steps": 1, "max_length": limit}
    )
    trainer = reward.build(
        settings, {"model": world.sft, "pairs": world.data}, tmp_path, logger=logger
    )
    kept = sum(length <= limit for length in lengths)
    assert len(trainer.train_dataset) == kept < len(rows)
    assert (
        f"{len(rows) - kept} of {len(rows)} pairs are longer than {limit} tokens: left out" in told
    )
    with pytest.raises(UserError, match="no pair is of 3 tokens or fewer"):
        built(world, world.data, tmp_path / "none", max_length=3)


def test_calibration_by_hand():
    # sigmoid(log 3) = 0.75 and sigmoid(log 9) = 0.9: bins 0.75-0.8 and 0.9-0.95 (a little above, for rounding)
    three, nine = math.log(3.001), math.log(9.01)
    margins = torch.tensor([three, three, three, -three, nine, -nine])
    found = reward_model.calibration(margins)
    assert [(round(b["said"], 2), b["right"], b["pairs"]) for b in found] == [
        (0.75, 0.75, 4),
        (0.9, 0.5, 2),
    ]
    # (4 * |0.75 - 0.75| + 2 * |0.9 - 0.5|) / 6
    assert_close(reward_model.calibration_error(margins), 0.8 / 6, rtol=1e-3, atol=1e-4)
    assert reward_model.calibration(torch.zeros(3)) == [{"said": 0.5, "right": 0.5, "pairs": 3}]


def test_the_ceiling_is_that_of_whoever_knows_gold(world: tiny_models.World):
    rows = tiny_models.rows(world.data, "pairs-test")
    by_prompt: dict[str, list[float]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt_id"], []).append(1.0)
    gaps = [
        gold.gold_score(r["prompt"][-1]["content"], r["chosen"][-1]["content"])
        - gold.gold_score(r["prompt"][-1]["content"], r["rejected"][-1]["content"])
        for r in rows
    ]
    found = reward_model._ceiling(rows, by_prompt, torch.tensor(gaps))
    assert found["agreement_with_gold"] == 1.0
    each: dict[str, list[float]] = {}
    for row, gap in zip(rows, gaps, strict=True):
        p = 1 / (1 + math.exp(-gold.LABEL_SLOPE * abs(gap)))  # of the better side
        each.setdefault(row["prompt_id"], []).append(p)
    expected = sum(sum(v) / len(v) for v in each.values()) / len(each)
    assert_close(found["ceiling"], expected)
    assert reward_model._ceiling(rows, by_prompt, -torch.tensor(gaps))["agreement_with_gold"] == 0.0
