"""A loss, gradient or weight that is not finite ends a stage, which then saves nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import forks, tiny_models
from helpers.line_model import Line, train_on_this_rank, trained
from torch import nn
from torch.profiler import ProfilerActivity, profile

from align.config.training import DPO, KTO, SFT, Reward
from align.errors import UserError
from align.models import loading, logps, tokenization
from align.models.finite_weights import first_not_finite, is_finite
from align.stages import dpo, kto, reward, sft
from align.training import reference_logps

STAGES = [
    pytest.param(sft, SFT, "demonstrations", id="sft"),
    pytest.param(dpo, DPO, "pairs", id="dpo"),
    pytest.param(reward, Reward, "pairs", id="reward"),
    pytest.param(kto, KTO, "preferences", id="kto"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tiny_models.World:
    return tiny_models.world(tmp_path_factory.getbasetemp())


@pytest.mark.parametrize(("module", "config", "rows"), STAGES)
def test_a_stage_that_diverges_names_the_step_and_leaves_no_model(
    module: ModuleType, config: Any, rows: str, world: tiny_models.World, tmp_path: Path
) -> None:
    settings = config(
        model="sft",
        trainer=tiny_models.TRAINER
        | {"max_steps": 3, "learning_rate": 1e30, "save_strategy": "no"},
    )
    with pytest.raises(
        UserError, match=r"^step 2: .*; nothing is saved; lower `learning_rate`, or"
    ):
        tiny_models.stage(module, settings, {"model": world.sft, rows: world.data}, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    assert not (tmp_path / "artifact.json").exists()
    (batch,) = saved(tmp_path)["micro_batches"]
    rows = batch["input_ids"]
    assert batch["lengths"] == [len(row) for row in rows] and len(rows) in (8, 16)
    tokenizer = tokenization.load_tokenizer(world.sft)
    assert batch["text"] == [tokenizer.decode(row) for row in rows]
    assert all("assistant" in text for text in batch["text"])
    assert any(len(row) != len(rows[0]) for row in rows)  # without padding
    masks = "labels" if module is sft else "completion_mask"
    assert module is reward or list(map(len, batch[masks])) == batch["lengths"]


def saved(folder: Path) -> dict[str, Any]:
    """The batch that was saved, as strict JSON."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    text = (folder / "not-finite.json").read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return content


class Overflow(torch.autograd.Function):
    """The identity, with an infinite gradient."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * torch.inf


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_loss_is_named_with_its_step_and_micro_batch(value: float, tmp_path: Path) -> None:
    model = Line()
    with pytest.raises(UserError, match=r"step 2: the loss is -?(nan|inf) \(micro-batch 2 of 2,"):
        trained(model, [1.0, 1.0, 1.0, value], tmp_path)
    assert model.weight.isfinite()  # the step was not applied
    first, second = saved(tmp_path)["micro_batches"]
    assert first["x"] == [[1.0]] and second["x"] == [[str(value)]]
    assert first["loss"] < 0.5 and second["loss"] == str(value)  # half of the sum of two
    trained(Line(), [1.0, 1.0], tmp_path)
    assert not list(tmp_path.glob("not-finite*"))


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_gradient_behind_a_finite_loss_is_detected(max_grad_norm: float, tmp_path: Path) -> None:
    class Model(Line):
        def forward(self, x: torch.Tensor, labels: Any = None) -> dict[str, torch.Tensor]:
            return {"loss": Overflow.apply(self.weight * x).sum()}

    with pytest.raises(UserError, match="step 1: a gradient is not finite"):
        trained(Model(), [1.0, 2.0], tmp_path, max_grad_norm=max_grad_norm)
    assert [batch["x"] for batch in saved(tmp_path)["micro_batches"]] == [[[1.0]], [[2.0]]]


@pytest.mark.slow
def test_the_rank_with_the_bad_row_saves_its_batch_and_all_ranks_name_it(tmp_path: Path) -> None:
    # Gradients are averaged, so those of both ranks are NaN. Rank 1 has the rows 2 and 4.
    values = [1.0, 2.0, 3.0, math.nan]
    with forks.ranks(train_on_this_rank, values, tmp_path, log=tmp_path / "log") as ranks:
        codes = [forks.wait(process) for process in ranks]
    lines = (tmp_path / "log").read_text().splitlines()
    assert codes == [2, 2], lines
    expected = "step 1: the loss is nan (micro-batch 2 of 2, "
    for rank in "01":
        (line,) = (line for line in lines if line.startswith(f"rank {rank}: {expected}"))
        assert str(tmp_path / "not-finite-1.json") in line
    assert [file.name for file in tmp_path.glob("not-finite*")] == ["not-finite-1.json"]
    batches = json.loads((tmp_path / "not-finite-1.json").read_text())["micro_batches"]
    assert [batch["x"] for batch in batches] == [[[2.0]], [["nan"]]]


def test_an_overflow_in_the_last_step_is_detected(tmp_path: Path) -> None:
    # 0.1 * 1e39 is too large for float32. The decay of weights does not show in the gradient.
    with pytest.raises(UserError, match="step 1: the weight `weight` is not finite; nothing is"):
        trained(Line(), [1.0, 1.0], tmp_path, weight_decay=1e39, learning_rate=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 500, 999])
def test_one_value_is_found_wherever_it_is(dtype: torch.dtype, value: float, place: int) -> None:
    weight = torch.linspace(-1, 1, 1000, dtype=dtype)
    assert is_finite(weight)
    weight[place] = value
    assert not is_finite(weight)


def test_empty_and_quantized_weights_are_finite() -> None:
    assert is_finite(torch.empty(0))
    assert is_finite(torch.full((3,), 255, dtype=torch.uint8))
    assert is_finite(torch.full((3,), math.nan).to(torch.float8_e4m3fn))


def test_a_check_of_weights_needs_no_memory_of_their_size() -> None:
    weight = torch.zeros(1000, 1000)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        assert is_finite(weight)
    assert sum(max(0, event.self_cpu_memory_usage) for event in profiler.events()) < 1000


def test_a_checkpoint_with_infinite_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="step 1: the weight `weight` is not finite"):
        settings = {"weight_decay": 1e39, "learning_rate": 1.0, "save_strategy": "steps"}
        trained(Line(), [1.0] * 4, tmp_path, save_steps=1, **settings)


def test_the_loss_of_the_validation_rows_is_checked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="step 0: the loss of the validation rows is nan"):
        trained(Line(), [1.0, 1.0], tmp_path, eval_on_start=True, eval_strategy="epoch")
    (batch,) = saved(tmp_path)["micro_batches"]
    assert (batch["loss"], batch["x"]) == ("nan", [["nan"]])


def test_finite_training_is_not_changed(tmp_path: Path) -> None:
    model = Line()
    trained(model, [1.0, 1.0], tmp_path, optim="sgd", weight_decay=0.0, max_grad_norm=0.0)
    assert model.weight.item() == pytest.approx(0.9)  # 1 - 0.1 * the mean gradient of 1


def test_quantized_weights_are_skipped_and_the_name_is_given() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert first_not_finite(model) is None
    model[1].bias.data[0] = torch.nan
    assert first_not_finite(model) == "1.bias"


def test_log_probabilities_that_are_nan_are_blamed_on_the_weights(
    world: tiny_models.World, tmp_path: Path
) -> None:
    model = loading.load_merged(world.sft, dtype="float32")
    tokenizer = tokenization.load_tokenizer(world.sft)
    model.get_input_embeddings().weight.data[:] = torch.nan
    row = ([{"role": "user", "content": "a"}], tokenization.assistant_turn("b"))
    with pytest.raises(UserError, match="weights are damaged"):
        logps.completion_logps(model, tokenizer, [row], batch_size=1)

    config = DPO(model="sft", trainer=tiny_models.TRAINER | {"max_steps": 20})
    inputs = {"model": world.sft, "pairs": world.data}
    trainer = dpo.build(config, inputs, tmp_path / "dpo")
    trainer.ref_model.get_input_embeddings().weight.data[:] = torch.nan
    logger = tiny_models.logger("dpo", tmp_path)
    with pytest.raises(UserError, match="the weights of `model` are damaged"):
        reference_logps.add_reference_logps(trainer, inputs=inputs, runs=tmp_path, logger=logger)
    assert not list(tmp_path.glob("reference-*/artifact.json"))
