"""Rows longer than the model: they are cut at its positions, and lost rows are counted."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers import ppo_fixtures, tiny_models

from align.config.data import Prepare
from align.config.training import DPO, KTO, SFT, Reward
from align.config.training_base import TRLStage
from align.errors import UserError
from align.models import tokenizer_files
from align.models.conversations import TrainedRow
from align.pipeline import row_tokens
from align.pipeline.plan import PlannedStage
from align.stages import dpo, kto, prepare, reward, sft
from align.training import row_limits

STAGES = [
    pytest.param(sft, SFT, "demonstrations", id="sft"),
    pytest.param(dpo, DPO, "pairs", id="dpo"),
    pytest.param(reward, Reward, "pairs", id="reward"),
    pytest.param(kto, KTO, "preferences", id="kto"),
]
Build = Callable[..., Any]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tiny_models.World:
    return tiny_models.world(tmp_path_factory.getbasetemp())


def words(count: int) -> str:
    return "a " * count


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 short pairs, 3 with a prompt beyond the positions of the model, 1 with such an answer."""
    folder = tmp_path_factory.mktemp("long")
    lengths = [(3, 3)] * 30 + [(400, 3)] * 3 + [(3, 400)]
    rows = [
        {"prompt": f"{n} {words(a)}", "chosen": f"yes {words(b)}", "rejected": "no"}
        for n, (a, b) in enumerate(lengths)
    ]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = Prepare(source=str(file), test_fraction=0.0)
    tiny_models.stage(prepare, config, {}, folder / "data")
    return folder / "data"


@pytest.fixture
def build(world: tiny_models.World, data: Path, tmp_path: Path) -> Build:
    def call(
        module: Any, config: Any, role: str, source: Path | None = None, **settings: Any
    ) -> Any:
        trainer = tiny_models.TRAINER | {"max_steps": 1} | settings.pop("trainer", {})
        stage = config(model="sft", trainer=trainer, **settings)
        return module.build(stage, {"model": source or world.sft, role: data}, tmp_path)

    return call


def ids_of(trainer: Any) -> list[int]:
    """The lengths of the rows of all batches, without padding."""
    masks = [batch["attention_mask"] for batch in trainer.get_train_dataloader()]
    return [int(row.sum()) for mask in masks for row in mask]


@pytest.mark.parametrize(("module", "config", "role"), STAGES)
def test_rows_end_at_the_positions_of_the_model_and_lost_ones_are_counted(
    module: ModuleType, config: Any, role: str, build: Build, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "align.training"):
        trainer = build(module, config, role, max_lost_rows=0.2)
    assert trainer.args.max_length == tiny_models.POSITIONS
    lengths = ids_of(trainer)
    assert max(lengths) <= tiny_models.POSITIONS
    n, rows = {"reward": (4, 34), "kto": (6, 68)}.get(module.__name__.rpartition(".")[2], (3, 34))
    assert f"{n} of {rows} rows" in caplog.text
    assert f"({tiny_models.POSITIONS} tokens)" in caplog.text


@pytest.mark.parametrize(("module", "config", "role"), STAGES)
def test_more_lost_rows_than_accepted_are_an_error(
    module: ModuleType, config: Any, role: str, build: Build
) -> None:
    with pytest.raises(
        UserError, match=r"rows .* `max_length` \(192 tokens\); drop .*: 0\.(09|12)"
    ):
        build(module, config, role, max_lost_rows=0.05)


@pytest.mark.parametrize(("module", "config", "role"), STAGES)
def test_a_stage_that_would_train_on_no_row_is_refused(
    module: ModuleType, config: Any, role: str, build: Build
) -> None:
    with pytest.raises(UserError, match=r"(34 of 34|68 of 68) rows .*`max_length` \(4 tokens\)"):
        build(module, config, role, max_lost_rows=1.0, trainer={"max_length": 4})


@pytest.mark.parametrize(("module", "config", "role"), STAGES)
def test_a_max_length_beyond_the_positions_of_the_model_is_an_error(
    module: ModuleType, config: Any, role: str, build: Build
) -> None:
    with pytest.raises(UserError, match="max_length: 193 is more than the 192 positions of"):
        build(module, config, role, trainer={"max_length": 193})


@pytest.mark.parametrize("limit", [None, 30])
@pytest.mark.parametrize(("module", "config", "role"), STAGES)
def test_before_a_run_the_lost_and_the_longest_rows_are_counted_exactly(
    module: ModuleType,
    config: Any,
    role: str,
    limit: int | None,
    build: Build,
    data: Path,
    world: Any,
) -> None:
    fields = {} if limit is None else {"max_length": limit}
    trainer = build(module, config, role, max_lost_rows=1.0, trainer=fields)
    stage = config(model="sft", trainer=fields)
    planned = PlannedStage("x", stage, "", data, {"model": world.sft, role: data}, {}, "run")
    names = ("demonstrations", "pairs")
    tables = {name: {"train": tiny_models.rows(data, f"{name}-train")} for name in names}
    rows = row_tokens.rows_of(stage, tables)
    counts = row_tokens.count(stage, rows, row_tokens.read_model(planned, rows, {}))
    assert counts.limit == trainer.args.max_length
    kept = getattr(trainer.train_dataset, "rows", trainer.train_dataset)  # KTO fills its batches
    assert len(rows) - counts.lost == len(kept)
    lengths = ids_of(trainer)
    if counts.lost == 0:
        assert max(lengths) == min(max(counts.lengths), counts.limit)


def test_rows_near_the_limit_are_counted_outside_of_the_sample(
    data: Path, world: tiny_models.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_tokens, "SAMPLE", 2)
    monkeypatch.setattr(row_tokens, "BATCH", 3)
    stage = SFT(model="sft")
    planned = PlannedStage("x", stage, "", data, {"model": world.sft}, {}, "run")
    tables = {"demonstrations": {"train": tiny_models.rows(data, "demonstrations-train")}}
    rows = row_tokens.rows_of(stage, tables)
    counts = row_tokens.count(stage, rows, row_tokens.read_model(planned, rows, {}))
    assert (len(counts.lengths), counts.lost, counts.truncated) == (2, 3, 4)


def test_the_tokens_that_a_template_adds_to_many_turns_are_counted(
    world: tiny_models.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_tokens, "SAMPLE", 1)
    conversations = tokenizer_files.read_conversations(world.sft)
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}
    prompts = [[user], [user], [*[user, answer] * 30, user]]
    rows = [row_tokens.Sequences(prompt, ([answer],)) for prompt in prompts]
    model = row_tokens.TokenizedModel(conversations, positions=200)
    assert row_tokens.count(SFT(model="sft"), rows, model).truncated == 1


def test_a_model_with_absolute_positions_trains_on_long_rows(
    build: Build, world: tiny_models.World, tmp_path: Path
) -> None:
    ppo_fixtures.save_gpt2(world, tmp_path / "gpt2")
    trainer = build(sft, SFT, "demonstrations", source=tmp_path / "gpt2")
    trainer.train()
    assert max(ids_of(trainer)) == tiny_models.POSITIONS


TWO_TURNS = TrainedRow(list(range(20)), ((4, 7), (12, 20)))
KEEP_END = {"truncation_mode": "keep_end"}


@pytest.mark.parametrize(
    ("stage", "rows", "limit", "trained"),
    [
        pytest.param(SFT(model="m"), [TWO_TURNS], None, 11, id="no limit: 3 and 8"),
        pytest.param(SFT(model="m"), [TWO_TURNS], 14, 5, id="3, and 2 of 8"),
        pytest.param(SFT(model="m"), [TWO_TURNS], 5, 1, id="a part of the first turn is left"),
        pytest.param(SFT(model="m"), [TWO_TURNS], 4, 0, id="the prompt alone fills the limit"),
        pytest.param(SFT(model="m", trainer=KEEP_END), [TWO_TURNS], 14, 9, id="1 of 3, and 8"),
        pytest.param(SFT(model="m"), [TWO_TURNS, TWO_TURNS], 14, 10, id="two token rows"),
        pytest.param(
            SFT(model="m", trainer={"completion_only_loss": False}), [TWO_TURNS], 4, 4,
            id="all tokens",
        ),
        pytest.param(Reward(model="m"), [TWO_TURNS, TWO_TURNS], 20, 2, id="one score for a side"),
        pytest.param(Reward(model="m"), [TWO_TURNS, TWO_TURNS], 19, 0, id="a side does not fit"),
    ],
)  # fmt: skip
def test_how_many_tokens_of_a_row_are_trained(
    stage: TRLStage, rows: list[TrainedRow], limit: int | None, trained: int
) -> None:
    assert row_limits.count_trained(stage, rows, limit) == trained


def test_the_accepted_share_of_lost_rows_does_not_change_the_digest() -> None:
    first, second = SFT(model="m"), SFT(model="m", max_lost_rows=0.5)
    assert first.digest_settings() == second.digest_settings()
