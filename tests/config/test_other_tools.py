"""Configurations of TRL, LLaMA-Factory and axolotl become valid recipes that lose nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from align.cli.main import app
from align.config.other_tools import as_yaml, translate
from align.config.recipe import load_recipe
from align.errors import RecipeError, UserError

TRL = """
model_name_or_path: Qwen/Qwen2-0.5B-Instruct
torch_dtype: bfloat16
attn_implementation: flash_attention_2
dataset_name: trl-lib/ultrafeedback_binarized
beta: 0.01
loss_type: [sigmoid]
learning_rate: 5e-6
max_length: 1024
max_prompt_length: 512
gradient_checkpointing_kwargs: {use_reentrant: false}
output_dir: out
seed: 42
warmup_ratio: 0.1
use_peft: true
lora_r: 8
"""
LLAMA_FACTORY = """
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
pref_beta: 0.2
pref_loss: hinge
dataset: one, two
template: llama3
cutoff_len: 2048
max_samples: 1000
val_size: 0.1
quantization_bit: 4
trust_remote_code: true
plot_loss: true
"""
AXOLOTL = """
base_model: NousResearch/Llama-3.2-1B
load_in_8bit: false
datasets:
  - {path: teknium/GPT4-LLM-Cleaned, type: alpaca, split: train}
  - {path: other/data, type: alpaca}
val_set_size: 0.05
adapter: qlora
lora_alpha: 16
lora_target_linear: true
sequence_len: 2048
sample_packing: true
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_8bit
bf16: auto
wandb_project:
special_tokens: {pad_token: "<|end|>"}
"""


def translated(tmp_path, text, method=None):
    """The stages of the recipe, and the keys that were not carried over."""
    source, target = tmp_path / "config.yaml", tmp_path / "recipe.yaml"
    source.write_text(text)
    translation = translate(source, method)
    target.write_text(as_yaml(translation, source.name))
    return load_recipe(target).stages, {key for key, _, _ in translation.notes}, target.read_text()


def test_trl(tmp_path):
    stages, notes, text = translated(tmp_path, TRL)
    dpo = stages["dpo"]
    assert stages["prepare"].source == "trl-lib/ultrafeedback_binarized"
    assert (dpo.model, dpo.dtype, dpo.beta, dpo.seed) == (
        "Qwen/Qwen2-0.5B-Instruct", "bfloat16", 0.01, 42,
    )  # fmt: skip
    assert dpo.lora is not None
    assert (dpo.lora.r, dpo.lora.alpha) == (8, 16)
    assert dpo.trainer == {
        "loss_type": ["sigmoid"],
        "learning_rate": 5e-6,
        "max_length": 1024,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "warmup_steps": 0.1,
    }
    assert notes == {"attn_implementation", "max_prompt_length", "output_dir"}
    assert "#   max_prompt_length: 512 (no field of TRL's DPOConfig)" in text


def test_llama_factory(tmp_path):
    stages, notes, text = translated(tmp_path, LLAMA_FACTORY)
    dpo, prepare = stages["dpo"], stages["prepare"]
    assert (prepare.source, prepare.max_rows, prepare.validation_fraction) == ("one", 1000, 0.1)
    assert (dpo.beta, dpo.quantization) == (0.2, "nf4")
    assert dpo.lora is not None
    assert (dpo.lora.r, dpo.lora.target_modules) == (8, "all-linear")
    assert dpo.trainer == {"loss_type": "hinge", "max_length": 2048}
    assert notes == {"dataset", "template", "trust_remote_code", "plot_loss"}
    assert "never runs the code of a model repository" in text


def test_axolotl(tmp_path):
    stages, notes, text = translated(tmp_path, AXOLOTL)
    sft, prepare = stages["sft"], stages["prepare"]
    assert (prepare.source, prepare.data_split) == ("teknium/GPT4-LLM-Cleaned", "train")
    assert prepare.validation_fraction == 0.05
    assert (sft.model, sft.quantization) == ("NousResearch/Llama-3.2-1B", "nf4")
    assert sft.lora is not None
    assert (sft.lora.r, sft.lora.alpha, sft.lora.target_modules) == (16, 16, "all-linear")
    assert sft.trainer == {
        "max_length": 2048,
        "packing": True,
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1,
        "optim": "adamw_8bit",
        "bf16": True,
    }
    assert notes == {"datasets", "special_tokens", "load_in_8bit"}
    assert "list several under `mixture`" in text


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("base_model: a/b\nrl: ipo\n", "dpo"),
        ("base_model: a/b\nrl: kto\n", "kto"),
        ("base_model: a/b\nreward_model: true\n", "reward"),
        ("model_name_or_path: a/b\ntemplate: x\nstage: rm\n", "reward"),
        ("model_name_or_path: a/b\ndesirable_weight: 1.0\n", "kto"),
        ("model_name_or_path: a/b\ncenter_rewards_coefficient: 0.01\n", "reward"),
    ],
)
def test_the_method_follows_from_the_file(tmp_path, text, kind):
    stages, _, _ = translated(tmp_path, text)
    assert list(stages) == ["prepare", kind]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model_name_or_path: a/b\n", "names no method; choose one with --method: sft, dpo, kto"),
        ("base_model: a/b\nrl: grpo\n", "names no method"),
        (
            "model_name_or_path: a/b\nbeta: 0.04\nnum_generations: 8\n",
            "`num_generations` belongs to online RL, whose configurations are not converted",
        ),
        ("learning_rate: 1.0\n", "no `model_name_or_path` and no `base_model`"),
        ("- 1\n", "expected a mapping of keys"),
        ("a: [\n", "config.yaml:"),
    ],
)
def test_what_cannot_be_converted_is_an_error_of_one_line(tmp_path, text, message):
    with pytest.raises(RecipeError, match=message):
        translated(tmp_path, text)


def test_values_cannot_leave_their_comment(tmp_path):
    text = (
        'model_name_or_path: a/b\nbeta: 0.1\nunknown: "x) \\u2014 # y: [z"\nother: {a: [1, "b"]}\n'
    )
    stages, notes, recipe = translated(tmp_path, text)
    assert list(stages) == ["prepare", "dpo"]
    assert notes == {"unknown", "other"}
    assert '#   other: {"a": [1, "b"]} (no field' in recipe


@pytest.mark.parametrize("value", ["5", "{a: 1}"])
def test_names_that_are_neither_text_nor_a_list_are_reported_by_the_recipe(tmp_path, value):
    text = f"model_name_or_path: a/b\nbeta: 0.1\nlora_target_modules: {value}\n"
    (tmp_path / "trl.yaml").write_text(text)
    translation = translate(tmp_path / "trl.yaml", None)
    (tmp_path / "recipe.yaml").write_text(as_yaml(translation, "trl.yaml"))
    with pytest.raises(UserError, match=r"target_modules"):
        load_recipe(tmp_path / "recipe.yaml")


def test_the_command_writes_a_new_file_and_names_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("axolotl.yaml").write_text(AXOLOTL)
    output = CliRunner().invoke(app, ["import", "axolotl.yaml"]).stdout
    assert output.startswith("recipe.yaml: `sft`, from a configuration of axolotl\n")
    assert "not carried over: special_tokens (the tokenizer of the model is used" in output
    assert output.endswith("next: align check recipe.yaml\n")
    load_recipe("recipe.yaml")
    with pytest.raises(UserError, match=r"recipe.yaml: exists already; name another file"):
        raise CliRunner().invoke(app, ["import", "axolotl.yaml"]).exception
    Path("trl.yaml").write_text("model_name_or_path: a/b\n")
    arguments = ["import", "trl.yaml", "--out", "sft.yaml", "--method", "sft"]
    assert "sft.yaml: `sft`" in CliRunner().invoke(app, arguments).stdout
