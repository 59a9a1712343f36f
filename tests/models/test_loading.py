"""Models, adapters and tokenizers: new and loaded ones. Saved models load without Align as well."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_models
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.errors import UserError
from align.models import adapters, loading, tokenization

TEXTS = [
    "Write two calm sentences about the sea.",
    "The gentle wave rests near the quiet pier.",
    "The gentle gull rests near the quiet shore.",
    "Écoute : 海, 🌊 and\ttabs\nand lines.",
]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Écoute : 海, 🌊\nand <b>tags</b>  & two spaces?"},
    {"role": "assistant", "content": "Yes."},
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tiny_models.World:
    return tiny_models.world(tmp_path_factory.getbasetemp())


def tokenizer(vocab_size: int = 300) -> Any:
    return tokenization.new_tokenizer(TEXTS, vocab_size=vocab_size, max_length=64)


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 43).reshape(2, 20)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


# Tokenizers ---------------------------------------------------------------------------------------


def test_a_new_tokenizer_ends_turns_with_im_end_and_has_another_pad_token():
    new = tokenizer()
    assert (new.eos_token, new.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert new.eos_token_id != new.pad_token_id
    assert new.model_max_length == 64
    assert new("").input_ids == [], "a new tokenizer adds no special tokens"
    assert [
        new.convert_tokens_to_ids(t) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    ] == [0, 1, 2]


def test_a_new_vocabulary_has_bytes_special_tokens_and_merges():
    assert len(tokenizer(264)) == 264  # 256 bytes, 3 special tokens and 5 merges
    learned = set(tokenizer(300).get_vocab()) - set(tokenizer(264).get_vocab())
    assert len(learned) <= 36
    assert all(len(token) > 1 for token in learned)


def test_chatml_survives_tokenization():
    new = tokenizer()
    ids = new.apply_chat_template(CHAT, return_dict=False)
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nÉcoute : 海, 🌊\nand <b>tags</b>  & two spaces?<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n"
    )
    assert new.decode(ids) == expected
    assert ids.count(new.eos_token_id) == 3
    prompt = new.apply_chat_template(CHAT[:2], add_generation_prompt=True, return_dict=False)
    assert ids[: len(prompt)] == prompt, "the conversation starts with the tokens of the prompt"
    assert new.decode(ids[len(prompt) :]) == "Yes.<|im_end|>\n"


def test_the_same_texts_give_the_same_tokenizer_byte_for_byte(tmp_path: Path):
    for name in ("first", "second"):
        tokenizer().save_pretrained(tmp_path / name)
    first, second = (
        {f.name: f.read_bytes() for f in (tmp_path / name).iterdir()}
        for name in ("first", "second")
    )
    assert first == second
    assert "tokenizer.json" in first


@pytest.mark.parametrize("stage", ["sft", "lora"])
def test_the_tokenizer_of_a_stage_loads_without_align_and_has_its_template(
    world: tiny_models.World, stage: str
):
    loaded = AutoTokenizer.from_pretrained(getattr(world, stage))
    assert (loaded.eos_token, loaded.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert loaded.chat_template == tokenization.CHATML
    assert loaded.decode(loaded.apply_chat_template(CHAT, return_dict=False)).endswith(
        "<|im_start|>assistant\nYes.<|im_end|>\n"
    )


def test_a_tokenizer_without_a_pad_token_pads_with_eos(tmp_path: Path):
    new = tokenizer()
    new.pad_token = None
    new.save_pretrained(tmp_path)
    assert tokenization.load_tokenizer(tmp_path).pad_token == "<|im_end|>"


def test_a_folder_without_a_tokenizer_is_a_user_error(tmp_path: Path):
    with pytest.raises(UserError, match="its tokenizer cannot be loaded"):
        tokenization.load_tokenizer(tmp_path)


# New models ---------------------------------------------------------------------------------------


def shaped(**more: Any) -> Any:
    shape = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": None,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(0)
    return loading.new_model(tokenizer(), dtype="float32", **shape | more)


@pytest.mark.parametrize(
    ("more", "attention", "heads"),
    [
        # query, key, value and output: 16 x 16 each; one table of tokens
        pytest.param({}, 4 * 16 * 16, 1, id="tied"),
        # four query heads share two heads of keys and values: those projections are half as wide
        pytest.param({"num_key_value_heads": 2}, 3 * 16 * 16, 1, id="grouped queries"),
        pytest.param({"tie_word_embeddings": False}, 4 * 16 * 16, 2, id="untied"),
    ],
)
def test_a_new_model_has_as_many_parameters_as_its_shape_requires(
    more: dict[str, Any], attention: int, heads: int
):
    model = shaped(**more)
    # a layer: attention, a gated feed-forward net of three matrices, two norms; and a final norm
    layer = attention + 3 * 16 * 24 + 2 * 16
    expected = 3 * layer + 16 + heads * len(tokenizer()) * 16
    assert sum(p.numel() for p in model.parameters()) == expected
    assert model.dtype == torch.float32
    assert model.config.max_position_embeddings == 64


def test_a_new_model_has_the_special_tokens_of_its_tokenizer():
    model, new = shaped(), tokenizer()
    assert model.config.vocab_size == len(new)
    for config in (model.config, model.generation_config):
        assert (config.eos_token_id, config.pad_token_id) == (new.eos_token_id, new.pad_token_id)


def test_tied_embeddings_are_one_tensor_after_training_and_loading(world: tiny_models.World):
    for model in (shaped(), loading.load_merged(world.sft, dtype="float32")):
        embeddings = model.get_input_embeddings().weight
        assert model.get_output_embeddings().weight.data_ptr() == embeddings.data_ptr()
    untied = shaped(tie_word_embeddings=False)
    assert not torch.equal(
        untied.get_output_embeddings().weight, untied.get_input_embeddings().weight
    )


def test_the_weights_depend_on_the_random_state_only():
    first, second = shaped(), shaped()
    torch.manual_seed(1)
    other = loading.new_model(
        tokenizer(),
        dtype="float32",
        hidden_size=16,
        num_hidden_layers=1,
        intermediate_size=24,
        num_attention_heads=4,
    )
    assert torch.equal(logits(first), logits(second))
    assert not torch.equal(first.get_input_embeddings().weight, other.get_input_embeddings().weight)


# Saved models -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["sft", "lora"])
def test_the_model_of_a_stage_loads_without_align_and_computes_the_same(
    world: tiny_models.World, stage: str
):
    folder = getattr(world, stage)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # the adapter is added in one and merged in the other: two orders of summation
    assert_close(
        logits(loading.load_merged(folder, dtype="float32")), logits(plain), rtol=1e-4, atol=1e-4
    )


def test_a_model_loads_in_the_configured_type(world: tiny_models.World):
    for stage in (world.sft, world.lora):
        assert loading.load_merged(stage, dtype="bfloat16").dtype == torch.bfloat16
        assert loading.load_merged(stage, dtype="float32").dtype == torch.float32


def rename(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        key.replace("layers.1.mlp.up_proj", "layers.1.mlp.upproj"): value
        for key, value in weights.items()
    }


def reshape(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return weights | {"model.norm.weight": torch.ones(7)}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(rename, r"1 weights are missing, such as .*up_proj", id="a weight renamed"),
        pytest.param(reshape, "its model cannot be loaded", id="a weight of another shape"),
    ],
)
def test_weights_that_do_not_fit_are_a_user_error(
    world: tiny_models.World, tmp_path: Path, damage: Any, message: str
):
    folder = copy(world.sft, tmp_path / "sft")
    file = folder / "model.safetensors"
    save_file(damage(load_file(file)), file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=message):
        loading.load_merged(folder, dtype="float32")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_truncated_file_is_a_user_error(world: tiny_models.World, tmp_path: Path, name: str):
    folder = copy(world.sft, tmp_path / "sft")
    (folder / name).write_bytes((folder / name).read_bytes()[:500])
    with pytest.raises(UserError, match="its model cannot be loaded"):
        loading.load_merged(folder, dtype="float32")


def test_an_adapter_without_weights_is_a_user_error(world: tiny_models.World, tmp_path: Path):
    folder = copy(world.lora, tmp_path / "lora")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="its adapter cannot be loaded"):
        loading.load_merged(folder, dtype="float32")


def test_an_adapter_with_a_missing_weight_is_a_user_error(world: tiny_models.World, tmp_path: Path):
    folder = copy(world.lora, tmp_path / "lora")
    file = folder / "adapter_model.safetensors"
    save_file(rename(load_file(file)), file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="missing"):
        loading.load_merged(folder, dtype="float32")


# Adapters -----------------------------------------------------------------------------------------


def test_a_merged_adapter_computes_the_same_as_the_adapter_on_its_base(world: tiny_models.World):
    base = logits(loading.load_merged(world.sft, dtype="float32"))
    added = logits(loading.load_adapter(world.lora, dtype="float32"))
    merged = logits(loading.load_merged(world.lora, dtype="float32"))
    assert (added - base).abs().max() > 1.0, "an adapter without effect would prove nothing"
    assert_close(merged, added, rtol=1e-4, atol=1e-4)  # float32 in another order of summation


def test_a_merged_weight_is_the_base_plus_the_scaled_product(world: tiny_models.World):
    base = load_file(world.sft / "model.safetensors")
    adapter = load_file(world.lora / "adapter_model.safetensors")
    merged = loading.load_merged(world.lora, dtype="float32").state_dict()
    name = "model.layers.0.self_attn.q_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    # alpha / r = 8 / 4
    assert_close(merged[f"{name}.weight"], base[f"{name}.weight"] + 2.0 * b @ a)


def test_all_weights_of_a_merged_model_are_trainable_and_none_is_an_adapter(
    world: tiny_models.World,
):
    merged = loading.load_merged(world.lora, dtype="float32")
    assert all(p.requires_grad for p in merged.parameters())
    assert not hasattr(merged, "peft_config")
    full = loading.load_merged(world.sft, dtype="float32")
    assert merged.state_dict().keys() == full.state_dict().keys()


def test_a_model_gets_full_fine_tuning_or_the_configured_adapter(
    world: tiny_models.World,
):
    model, adapter = adapters.load_for_training(world.sft, lora=None, dtype="float32")
    assert adapter is None
    assert all(p.requires_grad for p in model.parameters())
    lora = {"r": 3, "alpha": 7, "dropout": 0.25, "target_modules": ["q_proj"]}
    _, adapter = adapters.load_for_training(world.sft, lora=lora, dtype="float32")
    assert adapter is not None
    assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout) == (3, 7, 0.25)
    assert (adapter.target_modules, adapter.task_type) == ({"q_proj"}, "CAUSAL_LM")


def test_an_adapter_is_trained_further_with_a_frozen_base(world: tiny_models.World):
    model, adapter = adapters.load_for_training(
        world.lora, lora=tiny_models.LORA.model_dump(), dtype="float32"
    )
    assert adapter is None
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name


def test_the_dropout_of_an_adapter_is_that_of_the_stage_that_trains_it_further(
    world: tiny_models.World,
):
    torch.manual_seed(0)
    ids = torch.arange(1, 9)[None]

    def outputs(dropout: float) -> list[Tensor]:
        lora = tiny_models.LORA.model_dump() | {"dropout": dropout}
        model = adapters.load_for_training(world.lora, lora=lora, dtype="float32")[0].train()
        assert model.peft_config["default"].lora_dropout == dropout
        return [model(input_ids=ids).logits for _ in range(2)]

    without, again = outputs(0.0)
    assert torch.equal(without, again)
    first, second = outputs(0.5)
    assert not torch.equal(first, second)
    assert not torch.equal(first, without)


@pytest.mark.parametrize("other", [{"r": 8}, {"alpha": 16}])
def test_an_adapter_of_another_shape_is_a_user_error(
    world: tiny_models.World, other: dict[str, int]
):
    with pytest.raises(UserError, match=r"this adapter has r=4, alpha=8, but `lora` has"):
        adapters.load_for_training(
            world.lora, lora=tiny_models.LORA.model_dump() | other, dtype="float32"
        )


def test_the_base_of_an_adapter_is_found_beside_it_if_both_were_moved(
    world: tiny_models.World, tmp_path: Path
):
    config = "adapter_config.json"
    folders = [copy(world.sft, tmp_path / "a" / "sft"), copy(world.lora, tmp_path / "a" / "lora")]
    fields = json.loads((folders[1] / config).read_text())
    fields["base_model_name_or_path"] = "/gone/sft"
    (folders[1] / config).write_text(json.dumps(fields))
    base = loading.adapter_base(folders[1])
    assert base is not None
    assert base.source == str(folders[0])
    moved = logits(loading.load_merged(folders[1], dtype="float32"))
    assert torch.equal(moved, logits(loading.load_merged(world.lora, dtype="float32")))
    shutil.rmtree(folders[0])
    with pytest.raises(UserError, match="the base model /gone/sft does not exist"):
        loading.load_merged(folders[1], dtype="float32")
    fields["base_model_name_or_path"] = None
    (folders[1] / config).write_text(json.dumps(fields))
    with pytest.raises(UserError, match="the base model is unknown"):
        loading.load_merged(folders[1], dtype="float32")


def test_full_weights_have_no_base(world: tiny_models.World):
    assert loading.adapter_base(world.sft) is None
    base = loading.adapter_base(world.lora)
    assert base is not None
    assert base.source == str(world.sft)
