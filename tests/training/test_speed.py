"""What makes trainers faster leaves their results alone: adapter inputs, compiled layers."""

from __future__ import annotations

import json
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_models
from helpers.prefix_models import assert_close_in_norm, gradients
from torch.testing import assert_close
from transformers.integrations.liger import apply_liger_kernel

from align.config.base import Lora
from align.config.training import DPO, KTO, SFT, Reward
from align.errors import UserError
from align.models import adapters
from align.runtime import checkpoints, distributed
from align.stages import dpo, kto, reward, sft
from align.training import speed

BF16 = tiny_models.TRAINER | {"bf16": True}
STAGES = {
    "sft": (sft, SFT, "demonstrations"),
    "dpo": (dpo, DPO, "pairs"),
    "reward": (reward, Reward, "pairs"),
    "kto": (kto, KTO, "preferences"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tiny_models.World:
    return tiny_models.world(tmp_path_factory.getbasetemp())


def built(kind: str, world: tiny_models.World, folder: Path, source: str, **keys: Any) -> Any:
    module, config_class, data = STAGES[kind]
    inputs = {"model": getattr(world, source), data: world.data}
    distributed.reset_process_state(0)  # mixed precision is a state of the process
    return module.build(config_class(model="m", **keys), inputs, folder)


# Adapters in the compute type --------------------------------------------------------------------


def loss_and_gradients(trainer: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor], set[Any]]:
    """Of the first batch, with the types of the inputs of adapters."""
    types: set[Any] = set()
    hooks = [
        layer.lora_A["default"].register_forward_pre_hook(lambda _, x: types.add(x[0].dtype))
        for layer in adapters.adapter_layers(trainer.model)
        if "default" in getattr(layer, "lora_A", {})
    ]
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    with trainer.accelerator.autocast():
        loss = trainer.compute_loss(trainer.model, batch)
    result = gradients(trainer.model, loss)
    for hook in hooks:
        hook.remove()
    return loss, result, types


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_under_autocast_adapters_read_their_inputs_uncast_with_equal_results(
    world: tiny_models.World, tmp_path: Path, dtype: str
):
    keys = {"lora": tiny_models.LORA, "dtype": dtype, "trainer": BF16}
    trainer = built("dpo", world, tmp_path, "lora", **keys)
    trainer.model.eval()
    loss, actual, types = loss_and_gradients(trainer)
    # inputs of an adapter are the output of a norm or of another product, which is in bfloat16
    assert torch.bfloat16 in types
    for layer in adapters.adapter_layers(trainer.model):
        layer.cast_input_dtype_enabled = True
    expected_loss, expected, types = loss_and_gradients(trainer)
    assert types == {torch.float32}
    assert torch.equal(loss, expected_loss)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("lora", "trainer"),
    [
        pytest.param(Lora(r=4, alpha=8, dropout=0.5), BF16, id="dropout"),
        pytest.param(tiny_models.LORA, tiny_models.TRAINER, id="no autocast"),
    ],
)
def test_where_it_would_change_the_result_the_cast_remains(
    world: tiny_models.World, tmp_path: Path, lora: Lora, trainer: dict[str, Any]
):
    keys = {"lora": lora, "dtype": "bfloat16", "trainer": trainer}
    model = built("sft", world, tmp_path, "sft", **keys).model
    layers = adapters.adapter_layers(model)
    assert layers and all(layer.cast_input_dtype_enabled for layer in layers)


# Liger's kernels ---------------------------------------------------------------------------------


def liger_stand_in(calls: list[tuple[str, int]]) -> Any:
    """Liger's patch of a Llama with functions of torch: norms, feed-forward and rotary embedding.

    Liger replaces the methods of the modules of an instance, and the function of their file.
    """

    def norm(self: Any, states: torch.Tensor) -> torch.Tensor:
        calls.append(("norm", states.shape[1]))
        return torch.nn.functional.rms_norm(
            states, (states.shape[-1],), self.weight, self.variance_epsilon
        )

    def feed_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        calls.append(("mlp", x.shape[1]))
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

    def apply(model: Any, *, fused_linear_cross_entropy: bool) -> None:
        assert not fused_linear_cross_entropy  # the head is TRL's
        for module in model.modules():
            if type(module).__name__ == "LlamaRMSNorm":
                module.forward = types.MethodType(norm, module)
            elif type(module).__name__ == "LlamaMLP":
                module.forward = types.MethodType(feed_forward, module)

    return apply


@pytest.mark.filterwarnings("ignore:`use_liger_kernel=True` is deprecated:FutureWarning")
def test_the_kernels_of_liger_run_on_shared_prefixes(
    world: tiny_models.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls: list[tuple[str, int]] = []
    package = types.ModuleType("liger_kernel.transformers")
    package._apply_liger_kernel_to_instance = liger_stand_in(calls)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package)
    monkeypatch.setattr("transformers.integrations.liger.is_liger_kernel_available", lambda: True)
    plain = built("dpo", world, tmp_path, "sft", trainer=tiny_models.TRAINER, prefix_sharing=False)
    batch = plain._prepare_inputs(next(iter(plain.get_train_dataloader())))
    expected = plain.compute_loss(plain.model, batch)
    trainer = built(
        "dpo", world, tmp_path, "sft", trainer=tiny_models.TRAINER | {"use_liger_kernel": True}
    )
    # as the trainer does when it starts to train
    apply_liger_kernel(trainer.model, trainer.args.liger_kernel_config)
    loss = trainer.compute_loss(trainer.model, batch)
    assert_close(loss, expected)
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    rows = [row[real].tolist() for row, real in zip(ids, mask, strict=True)]
    distinct = len({tuple(row[:k]) for row in rows for k in range(1, len(row) + 1)})
    assert distinct < ids.numel()
    # two layers with two norms each, and the last norm; the reference has none of these kernels
    assert calls.count(("norm", distinct)) == 5
    assert calls.count(("mlp", distinct)) == 2
    assert_close_in_norm(
        gradients(trainer.model, loss), gradients(plain.model, expected), tolerance=1e-4
    )


# Compiled layers ---------------------------------------------------------------------------------


@pytest.fixture
def compiler() -> Iterator[None]:
    """Forget compiled graphs before and after the test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


COMPILED = [
    pytest.param("sft", {"prefix_sharing": False}, False, id="sft, padded"),
    pytest.param("reward", {}, True, id="reward, checkpointing"),
    pytest.param("kto", {}, False, id="kto, two models"),
]


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(("kind", "keys", "checkpointing"), COMPILED)
def test_compiled_layers_have_the_losses_and_gradients_of_others(
    world: tiny_models.World, tmp_path: Path, kind: str, keys: dict[str, Any], checkpointing: bool
):
    trainer = tiny_models.TRAINER | {"gradient_checkpointing": checkpointing}
    results = []
    for backend in (None, "aot_eager"):
        folder = tmp_path / str(backend)
        built_ = built(kind, world, folder, "sft", trainer=trainer, compile_layers=backend, **keys)
        built_.model.train()
        batches = [b for _, b in zip(range(2), built_.get_train_dataloader(), strict=False)]
        losses = [built_.compute_loss(built_.model, built_._prepare_inputs(b)) for b in batches]
        slopes = gradients(built_.model, losses[0] + 2 * losses[1])
        results.append((torch.stack(losses).detach(), slopes))
    (expected, slopes), (actual, compiled_slopes) = results
    assert_close(actual, expected)
    assert_close_in_norm(compiled_slopes, slopes, tolerance=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_a_compiled_stage_with_adapters_resumes_bit_for_bit(
    world: tiny_models.World, tmp_path: Path
):
    trainer = tiny_models.TRAINER | {"max_steps": 4, "gradient_checkpointing": True}
    trainer |= {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}
    inputs = {"model": world.lora, "pairs": world.data}
    losses = {}
    for name, backend in (("plain", None), ("whole", "aot_eager"), ("resumed", "aot_eager")):
        folder = tmp_path / name / "dpo"
        if name == "resumed":
            shutil.copytree(tmp_path / "whole" / "dpo" / "checkpoint-2", folder / "checkpoint-2")
            assert checkpoints.last_checkpoint(folder, world_size=1) is not None
        config = DPO(model="m", lora=tiny_models.LORA, trainer=trainer, compile_layers=backend)
        tiny_models.stage(dpo, config, inputs, folder)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        losses[name] = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
    weights = {
        name: (tmp_path / name / "dpo" / "adapter_model.safetensors").read_bytes()
        for name in ("whole", "resumed")
    }
    assert weights["whole"] == weights["resumed"]
    assert len(losses["whole"]) == 4
    assert losses["whole"] == pytest.approx(losses["plain"], abs=1e-5)
    assert losses["whole"][2:] == losses["resumed"]


def test_compiling_is_refused_where_it_is_not_supported():
    lora = tiny_models.LORA
    for keys, message in (
        ({"quantization": "nf4", "lora": lora}, "layers in 4 bits are not compiled"),
        ({"trainer": {"torch_compile": True}}, "set `compile_layers: inductor` instead"),
        (
            {"trainer": {"torch_compile": True}, "prefix_sharing": False},
            "`trainer.torch_compile` compiles the layers too",
        ),
    ):
        config = DPO(model="m", compile_layers="inductor", **keys)  # type: ignore[arg-type]
        (problem,) = config.problems({})
        assert message in problem.message
    with pytest.raises(UserError, match="the layers of Linear are not of the class"):
        speed.compile_layers(torch.nn.Linear(1, 1), backend="aot_eager")


@pytest.mark.parametrize("plugin", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_layers_with_sharded_weights_are_not_compiled(
    world: tiny_models.World, tmp_path: Path, plugin: str
):
    trainer = built("sft", world, tmp_path, "sft", trainer=tiny_models.TRAINER)
    setattr(trainer, plugin, True)
    config = SFT(model="m", compile_layers="aot_eager")
    with pytest.raises(UserError, match="layers with sharded weights are not compiled"):
        speed.speed_up(trainer, config)


def test_the_digest_of_a_recipe_without_compiled_layers_is_that_from_before():
    assert "compile_layers" not in SFT(model="m").digest_settings()
    assert SFT(model="m", compile_layers="inductor").digest_settings()["compile_layers"]
