"""Model folders from elsewhere: each fault is a line that names the file, before and at loading."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_models
from safetensors.torch import load_file, save_file

from align.errors import UserError
from align.models import files, loading, model_config, policy, tokenization, tokenizer_files
from align.rewards import reward_model

CODE = "raise SystemExit('code of the repository was run')"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tiny_models.World:
    return tiny_models.world(tmp_path_factory.getbasetemp())


@pytest.fixture
def folder(world: tiny_models.World, tmp_path: Path) -> Path:
    """A model without checksums, as one from elsewhere, that a test may damage."""
    ignored = shutil.ignore_patterns("artifact.json")
    return Path(shutil.copytree(world.sft, tmp_path / "model", ignore=ignored))


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def config(**fields: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", **fields)


def add_token(folder: Path, *, special: bool) -> None:
    """Add a token for which the model has no embedding."""
    file = folder / "tokenizer.json"
    added = json.loads(file.read_text())["added_tokens"]
    token = {"id": 300, "content": "<|more|>", "special": special}
    edit(file, added_tokens=[*added, added[0] | token])


def more_tokens(folder: Path) -> None:
    add_token(folder, special=False)


def more_tokens_in_the_template(folder: Path) -> None:
    add_token(folder, special=True)
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + "<|more|>")


def check(folder: Path) -> None:
    files.check_model_folder(folder)
    tokenizer_files.check_vocabulary(folder)


def only_a_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


FAULTS = [
    pytest.param(config(num_attention_heads=0), "`num_attention_heads` must be", id="no heads"),
    pytest.param(config(num_hidden_layers=-1), "`num_hidden_layers` must be", id="layers below 0"),
    pytest.param(config(hidden_size="32"), "`hidden_size` must be", id="a size as text"),
    pytest.param(config(vocab_size=True), "`vocab_size` must be", id="a size as truth value"),
    pytest.param(config(vocab_size=2.5), "`vocab_size` must be", id="a fraction"),
    pytest.param(config(model_type=5), "`model_type` must be", id="a type as number"),
    pytest.param(
        config(architectures=["LlamaForSequenceClassification"]),
        "LlamaForSequenceClassification, which predicts no next token",
        id="a reward model",
    ),
    pytest.param(
        config(architectures=["BertForMaskedLM"]), "predicts no next token", id="an encoder"
    ),
    pytest.param(more_tokens, r"ids up to 300, but the model has 300", id="too many tokens"),
    pytest.param(more_tokens_in_the_template, r"ids up to 300", id="too many special tokens"),
    pytest.param(only_a_pickle, "pickle.* may contain code", id="only a pickle"),
]


@pytest.mark.parametrize(("damage", "message"), FAULTS)
def test_a_faulty_model_is_a_user_error_in_the_plan_and_when_it_is_loaded(
    folder: Path, damage: Callable[[Path], None], message: str
):
    damage(folder)
    with pytest.raises(UserError, match=message):
        check(folder)
    with pytest.raises(UserError):
        policy.load_policy(folder)


def test_a_special_token_that_no_row_has_needs_no_embedding(folder: Path):
    add_token(folder, special=True)  # as the placeholder of an image in Gemma 3's models for text
    edit(folder / "tokenizer_config.json", image_token="<|more|>")
    check(folder)
    loaded = policy.load_policy(folder)
    ids = tokenization.tokenize_prompts(
        loaded.tokenizer, [[{"role": "user", "content": "<|more|>"}]]
    )
    assert max(ids[0]) < loaded.model.config.vocab_size


def test_classes_that_are_no_list_are_a_user_error(folder: Path):
    edit(folder / "config.json", architectures="LlamaForCausalLM")
    with pytest.raises(UserError, match="`architectures` must be a list of names"):
        files.check_model_folder(folder)


@pytest.mark.parametrize("layers", [-1, 0, 1])
def test_weights_of_more_layers_than_the_config_describes_are_a_user_error(
    folder: Path, layers: int
):
    edit(folder / "config.json", num_hidden_layers=layers)
    with pytest.raises(UserError, match=r"fewer layers|cannot be loaded"):
        loading.load_merged(folder, dtype="float32")


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"hidden_act": "no-such"}, id="an unknown function"),
        pytest.param({"model_type": "no-such"}, id="an unknown type"),
        pytest.param({"rope_parameters": "x"}, id="text for a mapping"),
        pytest.param({"hidden_size": 30}, id="weights of other shapes"),
    ],
)
def test_what_only_transformers_detects_is_a_user_error(folder: Path, fields: dict[str, Any]):
    edit(folder / "config.json", **fields)
    with pytest.raises(UserError, match="its model cannot be loaded"):
        loading.load_merged(folder, dtype="float32")


def test_a_config_that_makes_probabilities_not_finite_is_a_user_error(folder: Path):
    rope = {"rope_type": "default", "rope_theta": float("nan")}
    edit(folder / "config.json", rope_parameters=rope)
    loaded = policy.load_policy(folder)
    with pytest.raises(UserError, match="probabilities of the next token are not finite"):
        loaded.generate(["hello"], max_new_tokens=2)


@pytest.mark.parametrize("eos", [2**40, -1, "2", None, [2, 2**40]])
def test_an_end_token_that_is_no_token_is_left_out(folder: Path, eos: Any):
    edit(folder / "generation_config.json", eos_token_id=eos)
    assert policy.load_policy(folder).generate(["hello"], max_new_tokens=2)


def test_a_setting_of_the_tokenizer_of_a_wrong_type_is_a_user_error(folder: Path):
    edit(folder / "tokenizer_config.json", model_max_length=[None])
    with pytest.raises(UserError, match="its tokenizer cannot be loaded"):
        tokenization.load_tokenizer(folder)


def test_a_weight_that_is_not_finite_is_named(folder: Path):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 2] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is not finite"):
        loading.load_merged(folder, dtype="float32")


def test_an_adapter_with_a_weight_that_is_not_finite_is_a_user_error(
    world: tiny_models.World, tmp_path: Path
):
    adapter = Path(shutil.copytree(world.lora, tmp_path / "adapter"))
    weights = load_file(adapter / "adapter_model.safetensors")
    next(iter(weights.values()))[0] = float("inf")
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="is not finite"):
        loading.load_for_inference(adapter, dtype="float32")


@pytest.mark.parametrize("auto_class", ["AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"])
def test_the_code_of_a_repository_never_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, auto_class: str
):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (folder / "code.py").write_text(CODE)
    fields = {"auto_map": {auto_class: "code.Model"}, "model_type": "of_the_repository"}
    if auto_class == "AutoTokenizer":
        fields |= {"auto_map": {auto_class: ["code.Model", None]}, "tokenizer_class": "Model"}
        edit(folder / "tokenizer_config.json", **fields)
    edit(folder / "config.json", **fields)
    load = tokenization.load_tokenizer if auto_class == "AutoTokenizer" else policy.load_policy
    with pytest.raises(UserError) as raised:
        load(folder)
    if auto_class != "AutoModelForCausalLM":
        assert "which Align never runs" in str(raised.value)


# Reward models ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM, which has no trained score"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "a classifier with 2 labels"),
        ({"architectures": None}, "no trained score head"),
    ],
)
def test_a_reward_model_is_a_classifier_with_one_label(
    folder: Path, fields: dict[str, Any], message: str
):
    edit(folder / "config.json", **fields)
    with pytest.raises(UserError, match=message):
        files.check_model_folder(folder, "reward model")


def test_an_adapter_has_the_head_that_its_role_requires(world: tiny_models.World, tmp_path: Path):
    adapter = Path(shutil.copytree(world.lora, tmp_path / "adapter"))
    with pytest.raises(UserError, match="has no score head"):
        files.check_model_folder(adapter, "reward model")
    edit(adapter / "adapter_config.json", task_type="SEQ_CLS")
    files.check_model_folder(adapter, "reward model")
    with pytest.raises(UserError, match="is not a policy"):
        files.check_model_folder(adapter)


@pytest.mark.parametrize(
    ("file", "content", "role"),
    [
        ("config.json", {"architectures": ["LlamaForCausalLM"]}, "policy"),
        ("config.json", {"architectures": ["LlamaForSequenceClassification"]}, "reward model"),
        ("config.json", {}, "policy"),
        ("config.json", "{", "policy"),
        ("adapter_config.json", {"task_type": "SEQ_CLS"}, "reward model"),
        ("adapter_config.json", {"task_type": "CAUSAL_LM"}, "policy"),
        ("README.md", "", "policy"),
    ],
)
def test_the_role_of_a_model_is_that_of_its_head(
    tmp_path: Path, file: str, content: Any, role: str
):
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / file).write_text(text)
    assert files.role(tmp_path) == role


@pytest.mark.parametrize(
    "content",
    ["", "[]", "7", "null", "{}", '{"score_mean": "1"}', '{"score_mean": NaN}', "\xff",
     '{"score_mean": null}', '{"score_mean": true}', '{"score_mean": [1]}'],
)  # fmt: skip
def test_a_stored_mean_that_is_no_number_is_a_user_error(tmp_path: Path, content: str):
    (tmp_path / "reward.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"reward\.json: expected a JSON object"):
        reward_model.score_mean(tmp_path)


def test_sizes_may_differ_between_layers():
    fields = {"intermediate_size": [32, 64], "text_config": {"vocab_size": 7}}
    assert not model_config.config_problems(Path("config.json"), fields, "policy")
    assert model_config.vocabulary_size(fields) == 7
