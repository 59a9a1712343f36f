"""Decoding with a merged adapter: the same tokens, and weights that keep their bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models.test_decoding import ABSOLUTE, GREEDY, NUCLEUS, SMALL, SOFTMAX, STOPS, build, prompts
from peft import LoraConfig, get_peft_model
from torch import Tensor

from align.models.adapters import active_adapter, adapter_layers
from align.models.decoding import eager
from align.models.decoding.compiled import CompiledDecoder
from align.models.decoding.merged import merged_adapter, obstacle

LAYERS = {"llama": "all-linear", "qwen3": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}


def adapted(kind: str, shape: dict[str, Any], *names: str, **options: Any) -> Any:
    """A model with random adapters, the first of which is called ``default``."""
    model = build(kind, shape, **options.pop("sampling", GREEDY))
    config = LoraConfig(
        **{"r": 3, "lora_alpha": 7, "target_modules": LAYERS[kind], "init_lora_weights": False}
        | options
    )
    wrapped = get_peft_model(model, config)
    for name in names:
        wrapped.add_adapter(name, config)
    return model.eval()


def bits(model: Any) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(weight, other[name]) for name, weight in one.items())


def decoded(model: Any, seed: int) -> list[Any]:
    torch.manual_seed(seed)
    return eager.decode(model, prompts(6, copies=2), STOPS)


@pytest.mark.parametrize(
    ("kind", "shape", "sampling", "options"),
    [
        pytest.param("llama", SMALL, GREEDY, {}, id="greedy"),
        pytest.param("llama", SMALL, SOFTMAX, {"use_rslora": True}, id="scaled by 1/√r"),
        pytest.param("qwen3", SMALL, NUCLEUS, {}, id="some layers"),
        pytest.param("gpt2", ABSOLUTE, SOFTMAX, {"fan_in_fan_out": True}, id="transposed weights"),
    ],
)
def test_tokens_and_log_probabilities_are_those_of_the_adapter(
    kind: str, shape: dict[str, Any], sampling: dict[str, Any], options: dict[str, Any]
):
    model = adapted(kind, shape, "other", sampling=sampling, **options)
    assert obstacle(model, "default") is None
    before = bits(model)
    for seed in range(3):
        with active_adapter(model, "default"):
            expected = decoded(model, seed)
        with active_adapter(model, None):
            without = decoded(model, seed)
        with active_adapter(model, "other"), merged_adapter(model, "default"):
            result = decoded(model, seed)
        assert [row.tokens for row in result] == [row.tokens for row in expected]
        assert [row.tokens for row in result] != [row.tokens for row in without]
        for row, other in zip(result, expected, strict=True):
            assert row.logps == pytest.approx(other.logps, abs=1e-4)
    assert equal(bits(model), before)


def test_the_merged_weights_are_the_sum_in_double_precision():
    model = adapted("llama", SMALL)
    ids = torch.tensor([prompts(1)[0]])
    with torch.no_grad(), merged_adapter(model, "default"):
        logits = model(input_ids=ids).logits
    plain = build("llama", SMALL, **GREEDY).double()  # the same seed, the same weights
    with torch.no_grad():
        for layer, other in zip(
            adapter_layers(model),
            [m for m in plain.model.modules() if isinstance(m, torch.nn.Linear)],
            strict=True,
        ):
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            other.weight += 7 / 3 * torch.einsum("or,ri->oi", up.double(), down.double())
        expected = plain(input_ids=ids).logits
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-5)


def test_the_weights_keep_their_bits_where_a_subtraction_changes_them():
    model = adapted("llama", SMALL)
    before = bits(model)
    layer = model.model.layers[0].mlp.down_proj
    weight, delta = layer.base_layer.weight.detach(), layer.get_delta_weight("default")
    assert not torch.equal(weight + delta - delta, weight), "a subtraction would do as well"
    states = [(each._active_adapter, each._disable_adapters) for each in adapter_layers(model)]
    for _ in range(3):
        with merged_adapter(model, "default"):
            during = bits(model)
            assert not [each for each in adapter_layers(model) if each.merged]
        changed = {name for name, each in during.items() if not torch.equal(each, before[name])}
        assert changed == {name for name in before if name.endswith("base_layer.weight")}
        assert equal(bits(model), before)
    assert [(e._active_adapter, e._disable_adapters) for e in adapter_layers(model)] == states


def test_the_weights_are_restored_after_an_error_and_after_an_error_in_merging(
    monkeypatch: pytest.MonkeyPatch,
):
    model = adapted("llama", SMALL)
    before = bits(model)
    with pytest.raises(KeyboardInterrupt), merged_adapter(model, "default"):
        assert not equal(bits(model), before)
        raise KeyboardInterrupt
    assert equal(bits(model), before)
    addmm_, calls = Tensor.addmm_, []

    def failing(weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(addmm_(weight, *args, **kwargs))
        if len(calls) == 5:
            raise torch.OutOfMemoryError
        return calls[-1]

    monkeypatch.setattr(Tensor, "addmm_", failing)
    with pytest.raises(torch.OutOfMemoryError), merged_adapter(model, "default"):
        pytest.fail("the block is entered")
    assert len(calls) == 5
    assert equal(bits(model), before)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_gradients_are_those_of_a_model_that_was_never_merged(mode: Any):
    gradients = []
    for merges in (False, True):
        model = adapted("llama", SMALL)
        if merges:
            with mode(), merged_adapter(model, "default"):
                decoded(model, 0)
        model(input_ids=torch.tensor([prompts(1)[0]])).logits.square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert {name.rpartition(".lora_")[2][0] for name in gradients[1]} == {"A", "B"}
    assert equal(*gradients)


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_compiled_steps_follow_the_adapter_without_another_compilation(backend: str):
    model = adapted("llama", SMALL, sampling=SOFTMAX)
    decoder, seen = CompiledDecoder(model, backend), []
    rows = prompts(4)
    for _ in range(2):
        with merged_adapter(model, "default"):
            torch.manual_seed(0)
            result = decoder.decode(rows, STOPS)
        with active_adapter(model, "default"):
            torch.manual_seed(0)
            expected = eager.decode(model, rows, STOPS)
        assert [row.tokens for row in result] == [row.tokens for row in expected]
        for row, other in zip(result, expected, strict=True):
            assert row.logps == pytest.approx(other.logps, abs=1e-4)
        seen.append([row.tokens for row in result])
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.mul_(2 if "lora_B" in name else 1)
    assert seen[0] != seen[1]


def test_the_sum_is_at_the_address_of_the_weights():
    model = adapted("llama", SMALL)
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    with merged_adapter(model, "default"):
        assert {name: p.data_ptr() for name, p in model.named_parameters()} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "it is more than LoRA"),
        ({"lora_bias": True}, "it is more than LoRA"),
        ({"modules_to_save": ["norm"]}, "of the kind peft.utils.other.ModulesToSaveWrapper"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "lora.layer.Embedding"),
        ({"target_modules": ["q_proj", "lm_head"]}, "weights that another layer has too"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*", "ignore:`lora_bias=True`")
def test_adapters_that_are_no_sum_with_the_weights_have_an_obstacle(
    options: dict[str, Any], message: str
):
    model = adapted("llama", SMALL | {"tie_word_embeddings": True}, **options)
    assert message in str(obstacle(model, "default"))


def test_weights_in_bfloat16_have_an_obstacle_because_they_lose_a_small_adapter():
    model = adapted("llama", SMALL)
    assert obstacle(model, "default") is None
    assert obstacle(model.bfloat16(), "default") == "its weights are in bfloat16, not in float32"
    torch.manual_seed(0)
    weight = (0.02 * torch.randn(256, 256)).bfloat16()
    delta = 1e-5 * torch.randn(256, 256)
    kept = (weight + delta.bfloat16()).float() - weight.float()
    assert (kept * delta).sum() / delta.square().sum() < 0.5


def test_an_adapter_of_other_layers_is_no_obstacle():
    model = build("llama", SMALL, **GREEDY)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    wrapped.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"], use_dora=True))
    assert obstacle(model, "default") is None
    assert obstacle(model, "other") == "it is more than LoRA"
