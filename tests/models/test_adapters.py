"""Adapters: their base at its revision, merging, every kind of adapter as policy, reward model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_models
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from align.config.base import Lora
from align.config.training import DPO, KTO
from align.errors import UserError
from align.models import adapters, files, loading, merging, tokenization
from align.online_rl.vllm import weights
from align.rewards import reward_model
from align.stages import dpo, kto

# peft advises about embeddings that are adapted, which is what some of the adapters here do.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:Model .*tie_word_embeddings"),
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. 2 LoRA tensor"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in acme/tiny"),  # offline
]
MAIN, V2 = "1" * 40, "2" * 40
"""Commits of `acme/tiny`."""
SCORE = "base_model.model.score.weight"
ADAPTED = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
KINDS: list[Any] = [
    pytest.param({"target_modules": ["q_proj", "up_proj"]}, id="LoRA"),
    pytest.param({"target_modules": ["q_proj"], "use_rslora": True}, id="rsLoRA"),
    pytest.param({"target_modules": ["q_proj"], "use_dora": True}, id="DoRA"),
    pytest.param({"target_modules": ["q_proj", "embed_tokens"]}, id="embeddings"),
    pytest.param({"target_modules": ["q_proj", "lm_head"]}, id="output layer"),
    pytest.param(
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, id="saved embeddings"
    ),
    pytest.param(
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, id="saved output layer"
    ),
    pytest.param(
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
        id="saved embeddings, tied",
    ),
    pytest.param(
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 299]}, id="single tokens"
    ),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tiny_models.World:
    return tiny_models.world(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module", params=KINDS)
def adapter(world: tiny_models.World, request: pytest.FixtureRequest) -> Path:
    """An adapter of each kind on the SFT model."""
    folder = world.folder / f"adapter-{request.param_index}"
    if not folder.exists():
        trained_adapter(folder, world.sft, None, **request.param)
    return folder


@pytest.fixture
def hub(world: tiny_models.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the Hub with `acme/tiny`: other weights at `main` than at the tag `v2`."""
    repository = tmp_path / "hub" / "models--acme--tiny"
    for name, commit in (("main", MAIN), ("v2", V2)):
        shutil.copytree(world.sft, repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(commit)
    change_weight(repository / "snapshots" / MAIN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return repository


def change_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(
        weights | {name: weights[name] + 1}, folder / "model.safetensors", metadata={"format": "pt"}
    )


def trained_adapter(folder: Path, base: Path | str, revision: str | None, **kind: Any) -> Path:
    """An adapter with random weights, saved as a stage saves it."""
    model, config = adapters.load_for_training(
        base, lora=tiny_models.LORA.model_dump(), dtype="float32", revision=revision
    )
    assert config is not None
    if kind:
        config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **kind)
    adapted: Any = get_peft_model(model, config)
    randomize(adapted)
    adapted.save_pretrained(folder)
    tokenization.load_tokenizer(base, revision=revision).save_pretrained(folder)
    return folder


def randomize(adapted: Any) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 43).reshape(2, 20)).logits


def hidden(model: Any) -> torch.Tensor:
    with torch.no_grad():
        backbone = model.eval().base_model
        return backbone(input_ids=torch.arange(3, 43).reshape(2, 20)).last_hidden_state


# The base -----------------------------------------------------------------------------------------


def test_an_adapter_is_loaded_on_the_revision_of_its_base(hub: Path, tmp_path: Path):
    adapter = trained_adapter(tmp_path / "adapter", "acme/tiny", "v2")
    assert json.loads((adapter / "adapter_config.json").read_text())["revision"] == V2
    expected = AutoModelForCausalLM.from_pretrained(hub / "snapshots" / V2)
    expected.load_adapter(str(adapter))
    for model in (
        loading.load_for_inference(adapter, dtype="float32"),
        loading.load_merged(adapter, dtype="float32"),
    ):
        assert_close(logits(model), logits(expected), rtol=1e-4, atol=1e-4)
    lora = tiny_models.LORA.model_dump()
    scorer: Any = reward_model.new_reward_model(adapter, lora=lora, dtype="float32")
    assert_close(hidden(scorer.get_base_model()), hidden(expected), rtol=1e-4, atol=1e-4)
    scorer.save_pretrained(tmp_path / "scorer")
    loaded = reward_model.load_reward_model(tmp_path / "scorer", dtype="float32")
    assert_close(hidden(loaded), hidden(expected), rtol=1e-4, atol=1e-4)


def test_bases_at_different_revisions_are_different_models(hub: Path):
    main, v2, commit = (files.AdapterBase("acme/tiny", name) for name in (None, "v2", V2))
    assert loading.is_same_base(v2, commit)
    assert not loading.is_same_base(main, v2)


def test_a_changed_base_is_a_user_error(world: tiny_models.World, tmp_path: Path):
    base = Path(shutil.copytree(world.sft, tmp_path / "base"))
    adapter = trained_adapter(tmp_path / "adapter", base, None)
    loading.load_merged(adapter, dtype="float32")
    change_weight(base)
    for load in (loading.load_merged, loading.load_for_inference, reward_model.load_reward_model):
        with pytest.raises(UserError, match="has changed since the adapter was trained"):
            load(adapter, dtype="float32")
    with pytest.raises(UserError, match="has changed since the adapter was trained"):
        files.check_model_folder(adapter)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        pytest.param(7, "must be text", id="a number"),
        pytest.param(["a"], "must be text", id="a list"),
        pytest.param("", "the base model is unknown", id="empty"),
        pytest.param("/gone/base", "/gone/base does not exist", id="missing"),
        pytest.param("itself", "is an adapter itself", id="itself"),
    ],
)
def test_an_adapter_without_a_usable_base_is_a_user_error(
    world: tiny_models.World, tmp_path: Path, base: Any, message: str
):
    adapter = Path(shutil.copytree(world.lora, tmp_path / "adapter"))
    file = adapter / "adapter_config.json"
    fields = json.loads(file.read_text())
    fields["base_model_name_or_path"] = str(adapter) if base == "itself" else base
    file.write_text(json.dumps(fields))
    for check in (files.check_model_folder, loading.adapter_base):
        with pytest.raises(UserError, match=message):
            check(adapter)


# Kinds --------------------------------------------------------------------------------------------


def test_a_merged_adapter_of_any_kind_computes_the_same_also_after_saving(
    world: tiny_models.World, adapter: Path, tmp_path: Path
):
    expected = logits(loading.load_for_inference(adapter, dtype="float32"))
    base = logits(loading.load_merged(world.sft, dtype="float32"))
    assert (expected - base).abs().max() > 0.1, "an adapter without effect would prove nothing"
    merged = loading.load_merged(adapter, dtype="float32")
    assert all(p.requires_grad for p in merged.parameters())
    merged.save_pretrained(tmp_path / "merged")
    for model in (merged, loading.load_merged(tmp_path / "merged", dtype="float32")):
        assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)


def test_a_merge_that_changes_the_logits_is_a_user_error(
    world: tiny_models.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    kind = {"target_modules": ["q_proj", "embed_tokens"]}
    adapter = trained_adapter(tmp_path / "adapter", world.sft, None, **kind)
    monkeypatch.setattr(merging, "_untie_adapted_embeddings", lambda model: None)
    with pytest.raises(UserError, match=r"changes the logits by \d+\.\d%"):
        loading.load_merged(adapter, dtype="float32")


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_adapters_that_cannot_be_merged_or_trained_further_are_named(
    world: tiny_models.World, tmp_path: Path
):
    kind = {"target_modules": ["q_proj"], "lora_bias": True}
    biased = trained_adapter(tmp_path / "a", world.sft, None, **kind)
    with pytest.raises(UserError, match=r"peft cannot merge this adapter .*; set `lora`"):
        loading.load_merged(biased, dtype="float32")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(world.sft),
        IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
    )
    model.save_pretrained(tmp_path / "ia3")
    with pytest.raises(UserError, match="an adapter of the kind IA3"):
        adapters.load_for_training(
            tmp_path / "ia3", lora=tiny_models.LORA.model_dump(), dtype="float32"
        )


def test_a_reward_model_on_an_adapter_of_any_kind_starts_with_its_hidden_states(
    adapter: Path, tmp_path: Path
):
    expected = hidden(loading.load_for_inference(adapter, dtype="float32"))
    lora = {"r": 4, "alpha": 8, "dropout": 0.0, "target_modules": "all-linear"}
    model: Any = reward_model.new_reward_model(adapter, lora=lora, dtype="float32")
    assert_close(hidden(model.get_base_model()), expected)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("score.modules_to_save" in name for name in trained)
    assert any("lora_A" in name for name in trained)
    randomize(model)
    model.save_pretrained(tmp_path / "scorer")
    for load in (reward_model.load_reward_model, reward_model.load_merged_reward_model):
        loaded = load(tmp_path / "scorer", dtype="float32")
        assert_close(hidden(loaded), hidden(model.get_base_model()), rtol=1e-3, atol=1e-3)
        head = reward_model.head_weight(loaded.score)
        assert torch.equal(head, reward_model.head_weight(model.get_base_model().score))


def test_a_copied_adapter_computes_the_same_and_has_no_weight_of_the_base(adapter: Path):
    model = loading.load_adapter(adapter, dtype="float32")
    expected = logits(model)
    base: Any = model.get_base_model()
    model.add_adapter("value", model.peft_config["default"])
    with adapters.active_adapter(base, "value"):
        assert not torch.equal(logits(base), expected)
    adapters.copy_adapter(base, "default", "value")
    with adapters.active_adapter(base, "value"):
        assert torch.equal(logits(base), expected)
    members = [adapters.adapter_parameters(base, name) for name in ("default", "value")]
    assert not members[0].keys() & members[1].keys()
    trained = {id(p) for p in base.parameters() if p.requires_grad}
    assert {id(p) for p in members[0].values()} == trained


# Layers and tokens --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        pytest.param(["query_key_value"], r"has no query_key_value; .*down_proj", id="nothing"),
        pytest.param(["q_proj", "w_pack"], "has no w_pack", id="one of two"),
        pytest.param("transformer.*", "has no transformer", id="an expression"),
        pytest.param("*", "no regular expression", id="no expression"),
    ],
)
@pytest.mark.parametrize("build", [adapters.load_for_training, reward_model.new_reward_model])
def test_target_modules_that_match_nothing_are_a_user_error(
    world: tiny_models.World, build: Any, targets: Any, message: str
):
    lora = tiny_models.LORA.model_dump() | {"target_modules": targets}
    with pytest.raises(UserError, match=message):
        build(world.sft, lora=lora, dtype="float32")


def test_layers_that_peft_cannot_adapt_are_a_user_error(world: tiny_models.World):
    lora = tiny_models.LORA.model_dump() | {"target_modules": ["input_layernorm"]}
    with pytest.raises(UserError, match="peft cannot adapt"):
        reward_model.new_reward_model(world.sft, lora=lora, dtype="float32")


def test_a_trained_adapter_has_the_layers_that_the_recipe_lists(world: tiny_models.World):
    lora = tiny_models.LORA.model_dump() | {"target_modules": ["q_proj"]}
    with pytest.raises(UserError, match=r"this adapter has target_modules=.*down_proj"):
        adapters.load_for_training(world.lora, lora=lora, dtype="float32")


def test_a_template_that_adds_tokens_is_a_user_error_with_lora():
    texts = ["The gentle wave rests near the quiet pier, and gulls call over cold water."]
    tokenizers: list[Any] = [
        tokenization.new_tokenizer(texts, vocab_size=size, max_length=64) for size in (264, 264)
    ]
    multiple_of_64, other = tokenizers
    multiple_of_64.add_tokens([f"<{i}>" for i in range(320 - 264)])
    assert (len(multiple_of_64), len(other) % 64) == (320, 8)
    adapters.check_no_new_tokens(multiple_of_64, other)  # the same special tokens
    with pytest.raises(UserError, match=r"adds tokens such as <extra_id_0>.*remove `lora`"):
        adapters.check_no_new_tokens(other, other)
    other.add_tokens(["<|turn|>"])
    with pytest.raises(UserError, match=r"adds tokens such as <\|turn\|>"):
        adapters.check_no_new_tokens(multiple_of_64, other)


# Several adapters on one model --------------------------------------------------------------------


@pytest.mark.parametrize("stage", [dpo, kto], ids=["dpo", "kto"])
def test_the_reference_of_an_adapter_of_embeddings_is_a_copy_of_it(
    world: tiny_models.World, tmp_path: Path, stage: Any
):
    lora = Lora(r=4, alpha=8, target_modules=["q_proj", "embed_tokens"])
    kind = {"target_modules": ["q_proj", "embed_tokens"]}
    source = trained_adapter(tmp_path / "adapter", world.sft, None, **kind)
    data = {"pairs": world.data, "preferences": world.data}
    config = {dpo: DPO, kto: KTO}[stage](model="sft", lora=lora, trainer=tiny_models.TRAINER)
    trainer = stage.build(config, {"model": source} | data, tmp_path)
    base = trainer.model.get_base_model()
    policy = logits(base)
    with adapters.active_adapter(base, "ref"):
        assert torch.equal(logits(base), policy)
    with adapters.active_adapter(base, None):
        assert not torch.equal(logits(base), policy)


def reward_adapter(world: tiny_models.World, folder: Path) -> Path:
    lora = tiny_models.LORA.model_dump()
    model: Any = reward_model.new_reward_model(world.sft, lora=lora, dtype="float32")
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(lambda w: w | {SCORE: w[SCORE] * torch.nan}, "is not finite", id="NaN head"),
        pytest.param(
            lambda w: w | {ADAPTED: w[ADAPTED] * torch.nan}, "is not finite", id="NaN adapter"
        ),
        pytest.param(
            lambda w: {k: v for k, v in w.items() if k != ADAPTED},
            "1 weights of the adapter are missing",
            id="a missing weight",
        ),
        pytest.param(
            lambda w: w | {ADAPTED: w[ADAPTED][:, :3].contiguous()},
            "cannot be loaded",
            id="another shape",
        ),
    ],
)
def test_a_damaged_reward_adapter_is_a_user_error_on_the_policy_and_alone(
    world: tiny_models.World, tmp_path: Path, damage: Any, message: str
):
    folder = reward_adapter(world, tmp_path / "reward")
    file = folder / "adapter_model.safetensors"
    save_file(damage(load_file(file)), file, metadata={"format": "pt"})
    policy = loading.load_adapter(world.lora, dtype="float32")
    with pytest.raises(UserError, match=message):
        reward_model.attach_reward_model(policy, folder, name="reward0")
    with pytest.raises(UserError):
        reward_model.load_reward_model(folder, dtype="float32")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ({"target_modules": ["q_proj"], "use_rslora": True}, None),
        ({"target_modules": ["q_proj"], "use_dora": True}, "is more than LoRA"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "is more than LoRA"),
        ({"target_modules": ["embed_tokens"]}, "changes tied embeddings"),
    ],
)
def test_a_vllm_server_receives_plain_lora_only(
    world: tiny_models.World, tmp_path: Path, kind: dict[str, Any], message: str | None
):
    source = trained_adapter(tmp_path / "adapter", world.sft, None, **kind)
    model = loading.load_for_inference(source, dtype="float32")
    if message is None:
        weights.check_mergeable(model)
        merged = loading.load_merged(source, dtype="float32").state_dict()
        for name, weight in weights.merged_weights(model):
            assert_close(weight, merged[name])
    else:
        with pytest.raises(UserError, match=message):
            weights.check_mergeable(model)
