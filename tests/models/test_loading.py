"""Models and tokenizers: new, saved, loaded, adapted. What is saved loads without Align too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_models
from safetensors.torch import load_file, save_file
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


def test_a_new_tokenizer_ends_turns_with_im_end_and_pads_with_another_token():
    new = tokenizer()
    assert (new.eos_token, new.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert new.eos_token_id != new.pad_token_id
    assert new.model_max_length == 64
    assert new("").input_ids == [], "a new tokenizer adds nothing by itself"
    assert [
        new.convert_tokens_to_ids(t) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    ] == [0, 1, 2]


def test_a_new_tokenizer_has_the_bytes_the_special_tokens_and_what_it_learned():
    assert len(tokenizer(264)) == 264  # 256 bytes, 3 special tokens and 5 merges
    learned = set(tokenizer(300).get_vocab()) - set(tokenizer(264).get_vocab())
    assert len(learned) <= 36
    assert all(len(token) > 1 for token in learned)


def test_chatml_comes_back_from_its_tokens_letter_by_letter():
    new = tokenizer()
    ids = new.apply_chat_template(CHAT, return_dict=False)
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nÉcoute : 海, 🌊\nand <b>tags</b>  & two spaces?<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n"
    )
    assert new.decode(ids) == expected
    assert ids.count(new.eos_token_id) == 3
    asked = new.apply_chat_template(CHAT[:2], add_generation_prompt=True, return_dict=False)
    assert ids[: len(asked)] == asked, "the prompt's tokens begin the conversation's"
    assert new.decode(ids[len(asked) :]) == "Yes.<|im_end|>\n"


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
def test_a_stages_tokenizer_loads_without_align_template_included(
    world: tiny_models.World, stage: str
):
    found = AutoTokenizer.from_pretrained(getattr(world, stage))
    assert (found.eos_token, found.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert found.chat_template == tokenization.CHATML
    assert found.decode(found.apply_chat_template(CHAT, return_dict=False)).endswith(
        "<|im_start|>assistant\nYes.<|im_end|>\n"
    )


def test_a_tokenizer_without_a_pad_token_pads_with_eos(tmp_path: Path):
    new = tokenizer()
    new.pad_token = None
    new.save_pretrained(tmp_path)
    assert tokenization.load_tokenizer(tmp_path).pad_token == "<|im_end|>"


def test_a_folder_without_a_tokenizer_is_a_users_mistake(tmp_path: Path):
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
        # two of four heads have keys and values of their own: those projections are half as wide
        pytest.param({"num_key_value_heads": 2}, 3 * 16 * 16, 1, id="grouped queries"),
        pytest.param({"tie_word_embeddings": False}, 4 * 16 * 16, 2, id="untied"),
    ],
)
def test_a_new_model_has_the_parameters_that_its_shape_says(
    more: dict[str, Any], attention: int, heads: int
):
    model = shaped(**more)
    # a layer: attention, a gated feed-forward net of three matrices, two norms; a last norm
    layer = attention + 3 * 16 * 24 + 2 * 16
    expected = 3 * layer + 16 + heads * len(tokenizer()) * 16
    assert sum(p.numel() for p in model.parameters()) == expected
    assert model.dtype == torch.float32
    assert model.config.max_position_embeddings == 64


def test_a_new_model_knows_where_its_tokenizer_ends():
    model, new = shaped(), tokenizer()
    assert model.config.vocab_size == len(new)
    for config in (model.config, model.generation_config):
        assert (config.eos_token_id, config.pad_token_id) == (new.eos_token_id, new.pad_token_id)


def test_tied_embeddings_are_one_tensor_also_after_training_and_loading(world: tiny_models.World):
    for model in (shaped(), loading.load_merged(world.sft, dtype="float32")):
        embeddings = model.get_input_embeddings().weight
        assert model.get_output_embeddings().weight.data_ptr() == embeddings.data_ptr()
    untied = shaped(tie_word_embeddings=False)
    assert not torch.equal(
        untied.get_output_embeddings().weight, untied.get_input_embeddings().weight
    )


def test_the_random_state_alone_makes_the_weights():
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
def test_a_stages_model_loads_without_align_and_says_the_same(world: tiny_models.World, stage: str):
    folder = getattr(world, stage)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # an adapter is added there and merged here: two orders of summation
    assert_close(
        logits(loading.load_merged(folder, dtype="float32")), logits(theirs), rtol=1e-4, atol=1e-4
    )


def test_a_model_loads_in_the_type_asked_for(world: tiny_models.World):
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
    ("damage", "told"),
    [
        pytest.param(rename, r"1 weights are missing, such as .*up_proj", id="a weight renamed"),
        pytest.param(reshape, "its model cannot be loaded", id="a weight of another shape"),
    ],
)
def test_weights_that_do_not_fit_are_never_random_numbers(
    world: tiny_models.World, tmp_path: Path, damage: Any, told: str
):
    folder = copy(world.sft, tmp_path / "sft")
    file = folder / "model.safetensors"
    save_file(damage(load_file(file)), file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=told):
        loading.load_merged(folder, dtype="float32")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_folder_cut_off_while_it_was_copied_is_a_users_mistake(
    world: tiny_models.World, tmp_path: Path, name: str
):
    folder = copy(world.sft, tmp_path / "sft")
    (folder / name).write_bytes((folder / name).read_bytes()[:500])
    with pytest.raises(UserError, match="its model cannot be loaded"):
        loading.load_merged(folder, dtype="float32")


def test_an_adapter_without_its_weights_is_a_users_mistake(
    world: tiny_models.World, tmp_path: Path
):
    folder = copy(world.lora, tmp_path / "lora")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="its adapter cannot be loaded"):
        loading.load_merged(folder, dtype="float32")


def test_an_adapter_that_lacks_a_weight_is_a_users_mistake(
    world: tiny_models.World, tmp_path: Path
):
    folder = copy(world.lora, tmp_path / "lora")
    file = folder / "adapter_model.safetensors"
    save_file(rename(load_file(file)), file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="missing"):
        loading.load_merged(folder, dtype="float32")


# Adapters -----------------------------------------------------------------------------------------


def test_a_merged_adapter_says_what_the_adapter_on_its_base_says(world: tiny_models.World):
    base = logits(loading.load_merged(world.sft, dtype="float32"))
    added = logits(loading.load_adapter(world.lora, dtype="float32"))
    merged = logits(loading.load_merged(world.lora, dtype="float32"))
    assert (added - base).abs().max() > 1.0, "an adapter that does nothing proves nothing"
    assert_close(merged, added, rtol=1e-4, atol=1e-4)  # float32, summed in another order


def test_a_merged_adapter_is_base_plus_scaled_product_weight_by_weight(world: tiny_models.World):
    base = load_file(world.sft / "model.safetensors")
    adapter = load_file(world.lora / "adapter_model.safetensors")
    merged = loading.load_merged(world.lora, dtype="float32").state_dict()
    name = "model.layers.0.self_attn.q_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    # alpha / r = 8 / 4
    assert_close(merged[f"{name}.weight"], base[f"{name}.weight"] + 2.0 * b @ a)


def test_a_merged_model_is_trainable_in_full_and_has_no_adapter_left(world: tiny_models.World):
    merged = loading.load_merged(world.lora, dtype="float32")
    assert all(p.requires_grad for p in merged.parameters())
    assert not hasattr(merged, "peft_config")
    whole = loading.load_merged(world.sft, dtype="float32")
    assert merged.state_dict().keys() == whole.state_dict().keys()


def test_a_whole_model_is_trained_in_full_or_gets_the_adapter_that_was_asked_for(
    world: tiny_models.World,
):
    model, adapter = adapters.load_for_training(world.sft, lora=None, dtype="float32")
    assert adapter is None
    assert all(p.requires_grad for p in model.parameters())
    wanted = {"r": 3, "alpha": 7, "dropout": 0.25, "target_modules": ["q_proj"]}
    _, adapter = adapters.load_for_training(world.sft, lora=wanted, dtype="float32")
    assert adapter is not None
    assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout) == (3, 7, 0.25)
    assert (adapter.target_modules, adapter.task_type) == ({"q_proj"}, "CAUSAL_LM")


def test_an_adapter_is_trained_on_with_its_base_frozen(world: tiny_models.World):
    model, adapter = adapters.load_for_training(
        world.lora, lora=tiny_models.LORA.model_dump(), dtype="float32"
    )
    assert adapter is None
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name


@pytest.mark.parametrize("other", [{"r": 8}, {"alpha": 16}])
def test_an_adapter_of_another_shape_is_refused(world: tiny_models.World, other: dict[str, int]):
    with pytest.raises(
        UserError, match=r"an adapter with r=4, alpha=8, dropout=0.0, and `lora` asks for"
    ):
        adapters.load_for_training(
            world.lora, lora=tiny_models.LORA.model_dump() | other, dtype="float32"
        )


def test_an_adapter_finds_its_base_beside_it_where_both_were_moved(
    world: tiny_models.World, tmp_path: Path
):
    config = "adapter_config.json"
    folders = [copy(world.sft, tmp_path / "a" / "sft"), copy(world.lora, tmp_path / "a" / "lora")]
    named = json.loads((folders[1] / config).read_text())
    named["base_model_name_or_path"] = "/gone/sft"
    (folders[1] / config).write_text(json.dumps(named))
    assert loading.adapter_base(folders[1]) == str(folders[0])
    moved = logits(loading.load_merged(folders[1], dtype="float32"))
    assert torch.equal(moved, logits(loading.load_merged(world.lora, dtype="float32")))
    shutil.rmtree(folders[0])
    with pytest.raises(UserError, match="its base model /gone/sft is gone"):
        loading.load_merged(folders[1], dtype="float32")
    named["base_model_name_or_path"] = None
    (folders[1] / config).write_text(json.dumps(named))
    with pytest.raises(UserError, match="its base model is not known"):
        loading.load_merged(folders[1], dtype="float32")


def test_whole_weights_have_no_base(world: tiny_models.World):
    assert loading.adapter_base(world.sft) is None
    assert loading.adapter_base(world.lora) == str(world.sft)
