"""The reward stage: margins, long rows, and a repeated run."""

from __future__ import annotations

import json
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
from align.models import tokenization
from align.rewards import reward_model
from align.runtime import distributed
from align.stages import reward


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tiny_models.World:
    return tiny_models.world(tmp_path_factory.getbasetemp())


def built(
    world: tiny_models.World,
    data: Path,
    folder: Path,
    *,
    coef: float = 0.0,
    max_lost_rows: float = 0.1,
    **trainer: Any,
) -> Any:
    config = Reward(
        model="sft",
        margin_coef=coef,
        max_lost_rows=max_lost_rows,
        trainer=tiny_models.TRAINER | {"max_steps": 1} | trainer,
    )
    return reward.build(config, {"model": world.sft, "pairs": data}, folder)


@pytest.fixture
def with_margins(world: tiny_models.World, tmp_path: Path) -> Path:
    """The tiny pairs; the k-th pair has the margin k."""
    folder = tmp_path / "margins"
    shutil.copytree(world.data, folder)
    file = folder / "pairs-train.parquet"
    table = pq.read_table(file)
    margins = pa.array([float(k) for k in range(len(table))])
    pq.write_table(table.append_column("margin", margins), file)
    return folder


def test_a_margin_is_subtracted_from_the_difference_of_scores(
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


def test_margins_are_ignored_by_default(
    world: tiny_models.World, with_margins: Path, tmp_path: Path
):
    (tmp_path / "out").mkdir()
    trainer = built(world, with_margins, tmp_path / "out")
    assert set(trainer.train_dataset.column_names) == {"chosen_ids", "rejected_ids"}


def test_missing_margins_are_a_user_error(world: tiny_models.World, tmp_path: Path):
    with pytest.raises(UserError, match="margin_coef: these pairs have no `margin`"):
        built(world, world.data, tmp_path, coef=1.0)


def test_pairs_that_are_too_long_are_left_out_with_a_warning(
    world: tiny_models.World, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    tokenizer = tokenization.load_tokenizer(world.sft)
    rows = tiny_models.rows(world.data, "pairs-train")
    lengths = [
        max(len(tokenization.tokenize_for_reward(tokenizer, [r["prompt"]], [r[s]])[0]) for s in ("chosen", "rejected"))
        for r in rows
    ]  # fmt: skip
    limit = sorted(lengths)[len(lengths) // 2]
    trainer = built(world, world.data, tmp_path / "some", max_lost_rows=0.6, max_length=limit)
    fitting = sum(length <= limit for length in lengths)
    assert len(trainer.train_dataset) == fitting < len(rows)
    (record,) = [record for record in caplog.records if record.name == "align.training"]
    assert record.levelname == "WARNING"
    assert record.getMessage() == (
        f"{len(rows) - fitting} of {len(rows)} rows are longer than `max_length` ({limit} tokens)"
    )
    with pytest.raises(UserError, match=r"40 of 40 rows are longer than `max_length` \(3 tokens"):
        built(world, world.data, tmp_path / "none", max_length=3)


def test_a_stage_that_runs_again_after_centering_stores_the_same_mean(
    world: tiny_models.World, tmp_path: Path
):
    config = Reward(
        model="sft", lora=tiny_models.LORA, trainer=tiny_models.TRAINER | {"max_steps": 4}
    )
    inputs = {"model": world.sft, "pairs": world.data}
    means = []
    for _ in range(2):
        distributed.reset_process_state(0)  # as before every stage
        reward.run(config, inputs, tmp_path, logger=tiny_models.logger("reward", tmp_path))
        means.append(json.loads((tmp_path / reward_model.FILE).read_text())[reward_model.MEAN])
    assert means[0] == means[1]
    assert abs(means[0]) > 1e-3
