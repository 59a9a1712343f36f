"""Models in 4 bits: their layers, adapters on them, their memory, and the merge without them."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_models, wide_model
from peft import get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close

from align.config.base import Lora, NewModel
from align.config.memory import ModelSize, new_model_size, training_bytes
from align.errors import UserError
from align.models import adapters, linear_layers, loading, quantization
from align.models.files import count_parameters
from align.rewards import reward_model

dequantize_4bit = pytest.importorskip("bitsandbytes").functional.dequantize_4bit
LORA = Lora(r=4, alpha=8)
NF4 = torch.tensor([
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
])  # fmt: skip
"""The values of a code, from appendix E of the paper (Dettmers et al. 2023, arXiv:2305.14314)."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tiny_models.World:
    return tiny_models.world(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def wide(world: tiny_models.World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wide_model.save(world, tmp_path_factory.mktemp("wide"))


def load(folder: Path, **options: Any) -> Any:
    return loading.load_base(
        folder, **{"dtype": "float32", "revision": None, "quantization": "nf4", **options}
    )


def trained_adapter(base: Path, folder: Path, *, kind: str = "CAUSAL_LM") -> Path:
    """Save an adapter with random weights, of which none is zero."""
    if kind == "CAUSAL_LM":
        model, config = adapters.load_for_training(
            base, lora=LORA.model_dump(), dtype="float32", quantization="nf4"
        )
        wrapped: Any = get_peft_model(model, config)
    else:
        wrapped = reward_model.new_reward_model(
            base, lora=LORA.model_dump(), dtype="float32", quantization="nf4"
        )
    torch.manual_seed(1)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    wrapped.save_pretrained(folder)
    return folder


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 19)[None]).logits


# Loading ------------------------------------------------------------------------------------------


def test_each_weight_becomes_the_nearest_of_sixteen_values_of_its_block(wide: Path):
    plain = loading.load_base(wide, dtype="float32", revision=None)
    for layer, quantized in zip(plain.model.layers, load(wide).model.layers, strict=True):
        weight, stored = layer.mlp.down_proj.weight, quantized.mlp.down_proj.weight
        blocks = weight.detach().view(-1, 64)
        scales = blocks.abs().amax(1, keepdim=True)
        codes = (blocks / scales).unsqueeze(-1).sub(NF4).abs().argmin(-1)
        loaded = dequantize_4bit(stored.data, stored.quant_state).view(-1, 64)
        # The scales are stored in 8 bits themselves, so the values differ by up to about 1 %.
        assert_close(loaded, NF4[codes] * scales, rtol=0.03, atol=1e-3)


@pytest.mark.parametrize("tied", [True, False], ids=["tied embeddings", "own output layer"])
def test_embeddings_norms_and_the_output_layer_keep_their_type(
    world: tiny_models.World, tmp_path: Path, tied: bool
):
    folder = wide_model.save(world, tmp_path, tie_word_embeddings=tied)
    model = load(folder)
    kinds = {name: type(m).__name__ for name, m in model.named_modules() if not [*m.children()]}
    in_four_bits = {name for name, kind in kinds.items() if kind == "Linear4bit"}
    assert in_four_bits == linear_layers.of_folder(folder).keys()
    assert kinds["lm_head"] == "Linear"
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    others = {p.dtype for n, p in model.named_parameters() if n.rpartition(".")[0] not in in_four_bits}  # fmt: skip
    assert others == {torch.float32}
    full: Any = loading.load_base(folder, dtype="float32", revision=None)
    assert quantization.count_parameters(model) == sum(p.numel() for p in full.parameters())
    for name in in_four_bits:
        stored = model.get_submodule(name).weight
        full.get_submodule(name).weight.data = dequantize_4bit(stored.data, stored.quant_state)
    assert_close(logits(model), logits(full), rtol=1e-4, atol=1e-4)


def test_every_cpu_uses_the_kernel_that_computes_in_the_type_of_the_input(wide: Path):
    layers = [m for m in load(wide).modules() if type(m).__name__ == "Linear4bit"]
    assert len(layers) == 14
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_a_layer_that_a_cpu_cannot_compute_is_named(world: tiny_models.World):
    with pytest.raises(UserError) as caught:
        load(world.sft)
    (line,) = caught.value.lines
    assert line.startswith(f"{world.sft}: its layer model.layers.0.")
    assert "has 32 inputs; on a CPU, 4-bit quantization requires multiples of 64" in line
    assert quantization.width_problem({"layers.0": (7, 64), "layers.1": (32, 128)}) is None


# Adapters -----------------------------------------------------------------------------------------


def test_adapters_stay_as_they_are_where_trl_casts_them(wide: Path, tmp_path: Path):
    folder = trained_adapter(wide, tmp_path)
    model = loading.load_adapter(folder, dtype="float32", quantization="nf4")
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    with quantization.adapters_in_float32(model):
        model.add_adapter("new", model.peft_config["default"])  # as TRL adds a new one
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
    after = dict(model.named_parameters())
    assert {after[name].dtype for name in before} == {torch.float32}
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_a_parameter_that_replaces_another_cannot_have_its_id():
    model = torch.nn.Linear(2, 1, bias=False)
    model.is_quantized = True
    with quantization.adapters_in_float32(model):
        replaced = weakref.ref(model.weight)
        model.weight = torch.nn.Parameter(torch.ones(1, 2, dtype=torch.bfloat16))
        assert replaced() is not None
    assert model.weight.dtype == torch.float32
    assert torch.equal(model.weight.data, torch.ones(1, 2))


def test_a_policy_is_its_adapter_on_the_base_of_the_type_that_is_named(wide: Path, tmp_path: Path):
    folder = trained_adapter(wide, tmp_path)
    plain = loading.load_for_inference(folder, dtype="float32")
    quantized = loading.load_for_inference(folder, dtype="float32", quantization="nf4")
    assert not torch.equal(logits(plain), logits(quantized))
    # By hand: the quantized base, and the update of each layer in a forward hook.
    base, weights = load(wide), _adapter_weights(folder)
    for name, module in base.named_modules():
        if f"{name}.lora_A" in weights:
            a, b = weights[f"{name}.lora_A"], weights[f"{name}.lora_B"]
            module.register_forward_hook(
                lambda _, inputs, output, a=a, b=b: output + 2 * inputs[0] @ a.T @ b.T
            )
    assert_close(logits(quantized), logits(base), rtol=1e-4, atol=1e-4)


def test_a_merge_uses_the_weights_of_the_base_in_full_precision(wide: Path, tmp_path: Path):
    folder = trained_adapter(wide, tmp_path)
    merged = loading.load_merged(folder, dtype="float32")
    base, weights = (
        loading.load_base(wide, dtype="float32", revision=None),
        _adapter_weights(folder),
    )
    for name, module in base.named_modules():
        if f"{name}.lora_A" in weights:
            update = 2 * weights[f"{name}.lora_B"] @ weights[f"{name}.lora_A"]  # alpha / r = 2
            assert_close(merged.get_submodule(name).weight, module.weight + update)


def _adapter_weights(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    stored = load_file(folder / "adapter_model.safetensors")
    return {
        name.removeprefix("base_model.model.").removesuffix(".weight"): weight
        for name, weight in stored.items()
    }


# Reward models ------------------------------------------------------------------------------------


def test_a_reward_model_has_quantized_layers_and_a_head_in_float32(wide: Path, tmp_path: Path):
    policy = trained_adapter(wide, tmp_path / "policy")
    rm = reward_model.new_reward_model(
        policy, lora=LORA.model_dump(), dtype="float32", quantization="nf4"
    )
    assert type(rm.get_base_model().model.layers[0].mlp.up_proj.base_layer).__name__ == "Linear4bit"
    head = reward_model.score_head(rm)
    assert reward_model.head_weight(head).dtype == torch.float32
    # Below the head, it starts as the policy.
    ids = torch.arange(3, 19)[None]
    expected = loading.load_for_inference(policy, dtype="float32", quantization="nf4")
    with torch.no_grad():
        assert_close(
            rm.get_base_model().model(input_ids=ids).last_hidden_state,
            expected.model(input_ids=ids).last_hidden_state,
        )


def test_a_reward_model_is_loaded_as_it_was_trained(wide: Path, tmp_path: Path):
    folder = trained_adapter(wide, tmp_path, kind="SEQ_CLS")
    plain = reward_model.load_reward_model(folder, dtype="float32")
    quantized = reward_model.load_reward_model(folder, dtype="float32", quantization="nf4")
    assert isinstance(quantized.score.modules_to_save["default"], nn.Linear)
    assert_close(plain.score.modules_to_save["default"].weight, quantized.score.modules_to_save["default"].weight)  # fmt: skip
    assert not torch.equal(logits(plain), logits(quantized))


# Memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bits", [None, "nf4"])
def test_the_planned_memory_of_weights_is_that_of_the_loaded_model(
    wide: Path, dtype: str, bits: str | None
):
    size = ModelSize(count_parameters(wide / "model.safetensors"), linear_layers.of_folder(wide))
    model = load(wide, dtype=dtype, quantization=bits)
    # The state of a quantized layer has its scales; each has its own copy of the 16 and 256 values.
    state = {name: t for name, t in model.state_dict().items() if not name.endswith("quant_map")}
    tensors = {t.data_ptr(): t for name, t in state.items() if "quant_state" not in name}
    measured = sum(t.numel() * t.element_size() for t in tensors.values())
    assert size.weight_bytes(dtype, bits) == pytest.approx(measured, rel=0.03)


def test_the_memory_of_four_bits_by_hand():
    # 64 x 256 weights: 8,192 bytes of codes, 256 scales of a byte, one scale of four bytes.
    size = ModelSize(64 * 256 + 100, {"layers.0.linear": (64, 256)})
    assert size.weight_bytes("float32", "nf4") == 4 * 100 + 8192 + 256 + 4
    assert size.weight_bytes("bfloat16", None) == 2 * (64 * 256 + 100)
    assert size.adapter_parameters(LORA) == 4 * (64 + 256)
    assert size.adapter_parameters(Lora(target_modules=["linear"])) == 16 * 320
    assert size.adapter_parameters(Lora(target_modules=["near"])) == 0
    assert size.adapter_parameters(Lora(target_modules=r".*\.linear")) == 16 * 320
    # Weight, gradient, two moments of four bytes, or of one byte.
    assert (training_bytes("adamw_torch_fused"), training_bytes("paged_adamw_8bit")) == (16, 10)


def test_the_size_of_an_adapter_is_that_of_peft(wide: Path, tmp_path: Path):
    for targets in ("all-linear", ["q_proj", "down_proj"]):
        lora = Lora(r=4, target_modules=targets)
        model, config = adapters.load_for_training(wide, lora=lora.model_dump(), dtype="float32")
        wrapped: Any = get_peft_model(model, config)
        trained = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
        size = ModelSize(0, linear_layers.of_folder(wide))
        assert size.adapter_parameters(lora) == trained


def test_the_layers_of_a_new_model_are_those_that_are_saved(wide: Path):
    new = NewModel(**wide_model.SHAPE)
    assert new_model_size(new).linear == linear_layers.of_folder(wide)
    assert sum(a * b for a, b in new_model_size(new).linear.values()) == wide_model.LAYERS
