"""Loading of recipes: line numbers, overrides, needs, inputs, fields of TRL, schema."""

from __future__ import annotations

import dataclasses
import enum
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from align.config import json_schema, trl_fields
from align.config.base import Lora, NewModel
from align.config.recipe import Recipe, load_recipe
from align.config.stages import STAGES, stage_kind
from align.config.training import DPO, SFT
from align.config.training_base import TRLStage
from align.config.yaml_loader import read_yaml
from align.errors import UserError, did_you_mean, mismatch, nearest

N_RECIPES = 25
RECIPES = Path(__file__).parents[2] / "recipes"
CHAIN = """\
stages:
  prepare: {source: embedded}
  sft:
    model: {vocab_size: 512}
    trainer: {learning_rate: 1.0e-3}
  dpo:
    model: sft
    beta: 0.1
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``write("a.yaml", text)`` in an empty working directory; returns the file's name."""
    monkeypatch.chdir(tmp_path)

    def call(name: str, text: str) -> str:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return name

    return call


def problems(path: str, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(UserError) as error:
        load_recipe(path, overrides)
    return error.value.lines


def read_text(write: Any, text: str, *overrides: str) -> Recipe:
    return load_recipe(write("recipe.yaml", text), overrides)


# Reading


def test_a_recipe_becomes_typed_configurations_in_the_order_of_its_stages(write: Any):
    recipe = read_text(write, CHAIN)
    assert list(recipe.stages) == ["prepare", "sft", "dpo"]
    assert recipe.stages["sft"] == SFT(
        model=NewModel(vocab_size=512), trainer={"learning_rate": 0.001}
    )
    assert recipe.stages["dpo"] == DPO(model="sft", beta=0.1, pairs="prepare")
    assert [stage_kind(stage) for stage in recipe.stages.values()] == ["prepare", "sft", "dpo"]


def test_configurations_are_frozen(write: Any):
    stage = read_text(write, CHAIN).stages["dpo"]
    with pytest.raises(ValueError, match="frozen"):
        stage.beta = 0.5  # type: ignore[attr-defined]


def test_two_stages_of_one_kind_have_different_names(write: Any):
    recipe = read_text(write, CHAIN + "  low_beta: {stage: dpo, model: dpo, beta: 0.01}\n")
    assert stage_kind(recipe.stages["low_beta"]) == "dpo"
    assert recipe.stages["low_beta"].beta == 0.01  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("recipes/dpo.yaml", "dpo"),
        ("recipes/hh/dpo.yaml", "hh-dpo"),
        ("elsewhere/mine.yaml", "mine"),
        ("recipes/old/recipes/a/b.yaml", "a-b"),
        ("recipes.yaml", "recipes"),
    ],
)
def test_a_recipe_is_named_by_its_path_below_the_folder_recipes(path: str, name: str, write: Any):
    assert load_recipe(write(path, CHAIN)).name == name


def test_the_line_of_every_key_is_known(write: Any):
    recipe = read_text(write, CHAIN, "dpo.beta=0.2")
    assert recipe.at("sft", "trainer", "learning_rate") == (
        "recipe.yaml:5: sft.trainer.learning_rate"
    )
    assert recipe.at("sft", "model", "hidden_size") == "recipe.yaml:4: sft.model.hidden_size"
    assert recipe.at("sft", "seed") == "recipe.yaml:3: sft.seed"
    assert recipe.at("dpo", "beta") == "command line: dpo.beta"
    assert recipe.at("dpo", "model") == "recipe.yaml:7: dpo.model"
    assert recipe.at("nothing") == "recipe.yaml: nothing"


@pytest.mark.parametrize(
    ("line", "keys"),
    [(1, ("stages",)), (5, ("stages", "sft", "trainer", "learning_rate")), (7, ("stages", "dpo", "model")),
     (6, ("stages", "dpo", "not there", "nor below")), (1, ("not there",))],
)  # fmt: skip
def test_a_document_gives_the_line_of_a_key_or_of_the_nearest_above(
    line: int, keys: tuple[str, ...], write: Any
):
    assert read_yaml(Path(write("recipe.yaml", CHAIN))).line(keys) == line


def test_all_errors_are_raised_at_once_in_the_order_of_their_lines(write: Any):
    text = CHAIN.replace("vocab_size", "vocab_sise").replace("0.1", "much") + "    bta: 1\n"
    errors = problems(write("recipe.yaml", text), "dpo.sede=1")
    assert [line.split(": ")[:2] for line in errors] == [
        ["recipe.yaml:4", "sft.model.vocab_sise"],
        ["recipe.yaml:8", "dpo.beta"],
        ["recipe.yaml:9", "dpo.bta"],
        ["command line", "dpo.sede"],
    ]


def test_a_duplicate_key_is_reported_with_both_lines(write: Any):
    errors = problems(write("recipe.yaml", CHAIN + "    model: prepare\n"))
    assert errors == (
        "recipe.yaml:9: stages.dpo: duplicate key `model`, first in line 7; remove one",
    )


def test_a_duplicate_stage_in_one_file_is_a_duplicate_key(write: Any):
    errors = problems(write("recipe.yaml", CHAIN + "  sft: {model: {}}\n"))
    assert errors == ("recipe.yaml:9: stages: duplicate key `sft`, first in line 3; remove one",)


@pytest.mark.parametrize(
    ("written", "repair"),
    [("5e-7", "5.0e-7"), ("1e3", "1.0e+3"), ("2.5e4", "2.5e+4"), ("-1E-2", "-1.0e-2")],
)
def test_the_repair_of_a_number_that_yaml_reads_as_text_is_that_number(
    written: str, repair: str, write: Any
):
    assert yaml.safe_load(written) == written
    assert yaml.safe_load(repair) == float(written)
    errors = problems(write("recipe.yaml", CHAIN.replace("0.1", written)))
    assert errors == (
        f"recipe.yaml:8: dpo.beta: expected a number, got the text '{written}' "
        f"(YAML reads {written} as text: write {repair})",
    )


@pytest.mark.parametrize("word", ["no", "off", "No", "yes", "on"])
def test_a_word_that_yaml_reads_as_true_or_false_is_reported_as_written(word: str, write: Any):
    errors = problems(write("recipe.yaml", CHAIN + f"    revision: {word}\n"))
    read_as = str(yaml.safe_load(word)).lower()
    assert errors == (
        f"recipe.yaml:9: dpo.revision: expected text, got {word}, which YAML reads as {read_as}: "
        f"write '{word}' in quotes",
    )


def test_true_and_false_are_reported_as_values():
    assert mismatch("text", True, "true") == "expected text, got true"
    assert mismatch("a number", False, None) == "expected a number, got false"


@pytest.mark.parametrize(
    ("word", "known", "hint"),
    [
        ("bta", ["beta", "model"], "; did you mean `beta`?"),
        ("modle", ["beta", "model"], "; did you mean `model`?"),
        ("zzz", ["beta", "model"], "; known: beta, model"),
    ],
)
def test_the_nearest_key_is_suggested_or_else_all_keys_are_listed(
    word: str, known: list[str], hint: str
):
    assert nearest(word, known) == hint
    assert did_you_mean(word, known) == ("" if "known" in hint else hint)


# Needs


def test_needed_stages_come_first_and_a_recipe_that_is_needed_twice_is_read_once(write: Any):
    write("base/prepare.yaml", "stages:\n  prepare: {source: embedded}\n")
    write("base/sft.yaml", "needs: [prepare.yaml]\nstages:\n  sft: {model: {}}\n")
    write("other.yaml", "needs: base/prepare.yaml\nstages:\n  other: {stage: sft, model: {}}\n")
    top = write(
        "dpo.yaml",
        "needs: [base/sft.yaml, other.yaml, ./base/../base/prepare.yaml]\nstages:\n  dpo: {model: sft}\n",
    )
    recipe = load_recipe(top)
    assert list(recipe.stages) == ["prepare", "sft", "other", "dpo"]
    assert recipe.at("sft", "model") == "base/sft.yaml:3: sft.model"


def test_a_recipe_of_needs_alone_is_a_recipe(write: Any):
    write("sft.yaml", CHAIN)
    assert list(load_recipe(write("all.yaml", "needs: [sft.yaml]\n")).stages) == [
        "prepare",
        "sft",
        "dpo",
    ]


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_cycle_of_needs_is_reported_with_its_path(length: int, write: Any):
    for n in range(length):
        write(f"r{n}.yaml", f"\nneeds: [r{(n + 1) % length}.yaml]\n")
    way = " → ".join([*(f"r{n}.yaml" for n in range(length)), "r0.yaml"])
    assert problems("r0.yaml") == (
        f"r{length - 1}.yaml:2: needs: a cycle: {way}; remove one of these `needs`",
    )


def test_a_missing_needed_recipe_is_reported_at_the_line_that_names_it(write: Any):
    path = write("recipe.yaml", "needs:\n- recipe2.yaml\n" + CHAIN)
    assert problems(path) == (
        "recipe.yaml:2: needs: recipe2.yaml: no such recipe; there are recipe.yaml",
    )


def test_a_stage_in_two_recipes_is_reported_with_both_places(write: Any):
    write("sft.yaml", "stages:\n  prepare: {source: embedded}\n")
    errors = problems(write("dpo.yaml", "needs: [sft.yaml]\n" + CHAIN))
    assert errors[0].startswith("dpo.yaml:3: prepare: sft.yaml:2 already has a stage of this name")


# Overrides


@pytest.mark.parametrize(
    ("override", "value"),
    [
        pytest.param("dpo.beta=0.2", 0.2, id="a number"),
        pytest.param("dpo.beta=5e-7", 5e-7, id="a number that YAML would read as text"),
        pytest.param("dpo.beta=1", 1.0, id="a whole number for a number"),
        pytest.param("dpo.seed=3", 3, id="a whole number"),
        pytest.param("dpo.revision=0123", "0123", id="digits where text is declared"),
        pytest.param("dpo.revision=1e3", "1e3", id="a commit like a number"),
        pytest.param("dpo.revision=no", "no", id="a branch called no"),
        pytest.param("dpo.revision=a=b", "a=b", id="text with an equals sign"),
        pytest.param("prepare.data_split=a #1", "a #1", id="what YAML reads as a comment"),
        pytest.param("dpo.revision=null", None, id="nothing"),
        pytest.param("dpo.keep_checkpoints=true", True, id="true"),
        pytest.param("dpo.keep_checkpoints=no", False, id="no as false"),
        pytest.param("dpo.pairs=prepare", "prepare", id="a stage"),
        pytest.param("evaluate.dtype=bfloat16", "bfloat16", id="a choice"),
        pytest.param("dpo.lora={r: 4}", Lora(r=4), id="a mapping"),
        pytest.param("sft.model.vocab_size=300", NewModel(vocab_size=300), id="below a mapping"),
        pytest.param("dpo.lora.r=4", Lora(r=4), id="below a mapping that is not there yet"),
        pytest.param("prepare.columns.chosen=1", {"chosen": "1"}, id="below a plain mapping"),
        pytest.param("prepare.columns={chosen: a}", {"chosen": "a"}, id="a plain mapping"),
        pytest.param("evaluate.policies=[sft]", ["sft"], id="a list"),
    ],
)  # fmt: skip
def test_an_override_is_read_by_the_type_of_its_key(override: str, value: object, write: Any):
    text = CHAIN + "  evaluate: {policies: [dpo], baseline: sft, judge: gold}\n"
    name, key = override.partition("=")[0].split(".")[:2]
    result = getattr(read_text(write, text, override).stages[name], key)
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("max_steps=50", 50),
        ("learning_rate=5e-7", 5e-7),
        ("warmup_steps=0.1", 0.1),
        ("bf16=false", False),
        ("lr_scheduler_type=cosine", "cosine"),
        ("run_name=12", "12"),
        ("loss_type=ipo", "ipo"),
        ("loss_type=[ipo, sft]", ["ipo", "sft"]),
        ("max_grad_norm=2", 2),
        ("max_length=null", None),
        ("gradient_checkpointing_kwargs={debug: false}", {"debug": False}),
    ],
)
def test_an_override_of_a_trainer_field_is_read_by_the_type_that_trl_declares(
    override: str, value: object, write: Any
):
    stage = read_text(write, CHAIN, f"dpo.trainer.{override}").stages["dpo"]
    assert stage.trainer == {override.partition("=")[0]: value}  # type: ignore[attr-defined]


def test_all_sets_a_key_in_every_stage_that_has_it(write: Any):
    recipe = read_text(write, CHAIN, "all.seed=7", "all.trainer.max_steps=3", "dpo.seed=8")
    assert [getattr(stage, "seed", None) for stage in recipe.stages.values()] == [None, 7, 8]
    trained = [stage for stage in recipe.stages.values() if isinstance(stage, TRLStage)]
    assert [stage.trainer["max_steps"] for stage in trained] == [3, 3]


def test_all_skips_stages_whose_value_has_no_such_key_below_it(write: Any):
    recipe = read_text(write, CHAIN, "all.model.vocab_size=300")
    assert recipe.stages["sft"].model == NewModel(vocab_size=300)  # type: ignore[attr-defined]
    assert recipe.stages["dpo"].model == "sft"  # type: ignore[attr-defined]


def test_the_last_override_of_a_key_applies_and_the_file_is_unchanged(write: Any):
    recipe = read_text(write, CHAIN, "dpo.beta=0.2", "dpo.beta=0.3")
    assert recipe.stages["dpo"].beta == 0.3  # type: ignore[attr-defined]
    assert Path("recipe.yaml").read_text(encoding="utf-8") == CHAIN


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("dpo.beta=-1", "dpo.beta: must be greater than 0, got -1"),
        ("dpo.beta=no", "dpo.beta: expected a number, got false"),
        ("dpo.seed=1.5", "dpo.seed: expected a whole number, got 1.5"),
        ("dpo.trainer.bf16=5", "dpo.trainer.bf16: expected true or false, got 5"),
        ("dpo.trainer.seed=5", "dpo.trainer.seed: cannot be set under `trainer`; set `seed` on the stage"),
        ("dpo.lora.rank=5", "dpo.lora.rank: unknown key; known: r, alpha, dropout, target_modules"),
        ("dpo..beta=5", "dpo..beta=5: expected STAGE.KEY=VALUE, such as dpo.beta=0.2"),
        ("=5", "=5: expected STAGE.KEY=VALUE, such as dpo.beta=0.2"),
        ("dpo.beta.x=5", "dpo.beta.x: `dpo.beta` has no keys below it"),
        ("all.model.zzz=5", "all.model.zzz=5: no stage has a key `model.zzz`"),
        ("dpo.model=spt", "dpo.model: no earlier stage `spt`; did you mean `sft`?"),
        ("dpo.stage=dop", "dpo.stage: expected a kind of stage, got the text 'dop'; did you mean `dpo`?"),
    ],
)  # fmt: skip
def test_an_invalid_override_is_reported_as_one_of_the_command_line(
    override: str, expected: str, write: Any
):
    lines = problems(write("recipe.yaml", CHAIN), override)
    assert any(line.startswith(f"command line: {expected}") for line in lines), lines


# Inputs


def test_inputs_are_named_by_key_and_items_of_a_list_by_number(write: Any):
    text = CHAIN + "  evaluate: {policies: [dpo, a/b], baseline: sft, judge: gold}\n"
    stages = read_text(write, text).stages
    assert stages["prepare"].input_names() == {}
    assert stages["sft"].input_names() == {"demonstrations": "prepare"}
    assert stages["dpo"].input_names() == {"model": "sft", "pairs": "prepare"}
    assert stages["evaluate"].input_names() == {
        "policies.0": "dpo",
        "policies.1": "a/b",
        "baseline": "sft",
        "prompts": "prepare",
    }


@pytest.mark.parametrize("model", ["sft", "Qwen/Qwen3-0.6B", "./folder", "folder", "a/folder"])
def test_a_model_is_an_earlier_stage_or_a_hub_id_or_a_folder_that_is_there(model: str, write: Any):
    write("folder/config.json", "{}")
    write("a/folder/config.json", "{}")
    recipe = read_text(write, CHAIN.replace("model: sft", f"model: {model}"))
    assert recipe.stages["dpo"].model == model  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("model: dpo", "dpo.model: stage `dpo` does not precede `dpo`"),
        ("model: later", "dpo.model: stage `later` does not precede `dpo`"),
        ("model: prepare", "dpo.model: stage `prepare` is of kind `prepare`; expected sft or dpo or kto or ppo"),
        ("model: tiny", "dpo.model: no earlier stage `tiny`; earlier stages that fit: sft"),
        ("model: ./tiny", "dpo.model: no such folder: ./tiny"),
        ("model: a/b/c", "dpo.model: no such folder: a/b/c"),
        ("model: near/tiny", "dpo.model: no such folder: near/tiny"),
        ("pairs: a/b", "dpo.pairs: no such folder: a/b; name an earlier `prepare` or `label` stage"),
    ],
)  # fmt: skip
def test_an_input_that_does_not_exist_is_reported(key: str, expected: str, write: Any):
    write("near/README.md", "a folder of this name makes `near/tiny` a path, not a Hub id")
    name, _, target = key.partition(": ")
    text = CHAIN if name == "pairs" else CHAIN.replace("    model: sft\n", "")
    text += f"    {name}: {target}\n"
    text += "  later: {stage: sft, model: {}}\n"
    lines = problems(write("recipe.yaml", text))
    line = text.splitlines().index(f"    {key}") + 1
    assert [expected in entry and entry.startswith(f"recipe.yaml:{line}: ") for entry in lines] == [
        True
    ], lines


def test_an_item_of_a_list_is_reported_at_its_line(write: Any):
    evaluate = (
        "  evaluate:\n    baseline: sft\n    judge: gold\n    policies:\n    - dpo\n    - dop\n"
    )
    errors = problems(write("recipe.yaml", CHAIN + evaluate))
    assert errors == (
        "recipe.yaml:14: evaluate.policies.1: no earlier stage `dop`; did you mean `dpo`? "
        "(a folder is a path that exists; a Hub id is owner/name)",
    )


# Keys that depend on each other


def together(
    *, validation: float = 0.0, test: float = 0.1, dpo: str = "{}", evaluate: str = ""
) -> str:
    return (
        "stages:\n"
        f"  prepare: {{source: embedded, test_fraction: {test}, validation_fraction: {validation}}}\n"
        "  sft: {model: {}}\n"
        f"  dpo: {{model: sft, trainer: {dpo}}}\n"
        f"  evaluate: {{policies: [dpo], baseline: sft, judge: gold{evaluate}}}\n"
    )


@pytest.mark.parametrize(
    "text",
    [
        together(),
        together(dpo="{eval_strategy: 'no'}"),
        together(dpo="{eval_strategy: steps}", validation=0.1),
        together(dpo="{eval_on_start: false}"),
        together(evaluate=", split: validation", validation=0.1, test=0.0),
        together(dpo="{loss_type: exo_pair, label_smoothing: 1.0e-3}"),
        together(dpo="{loss_type: [sigmoid, sft]}"),
    ],
)
def test_compatible_keys_are_accepted(text: str, write: Any):
    assert list(read_text(write, text).stages) == ["prepare", "sft", "dpo", "evaluate"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            together(dpo="{eval_strategy: epoch}"),
            "recipe.yaml:4: dpo.trainer.eval_strategy: `prepare` has no validation split; "
            "set `prepare.validation_fraction` above 0",
        ),
        (
            together(dpo="{eval_on_start: true}"),
            "recipe.yaml:4: dpo.trainer.eval_on_start: `prepare` has no validation split; "
            "set `prepare.validation_fraction` above 0",
        ),
        (
            together(test=0.0),
            "recipe.yaml:5: evaluate.split: `prepare` has no test split; "
            "set `prepare.test_fraction` above 0",
        ),
        (
            together(evaluate=", split: validation"),
            "recipe.yaml:5: evaluate.split: `prepare` has no validation split; "
            "set `prepare.validation_fraction` above 0",
        ),
        *(
            (
                together(dpo=f"{{{keys}}}"),
                "recipe.yaml:4: dpo.trainer.loss_type: `exo_pair` requires label smoothing; "
                "set `label_smoothing` above 0 (1.0e-3 in the paper)",
            )
            for keys in (
                "loss_type: exo_pair",
                "loss_type: [sft, exo_pair]",
                "loss_type: exo_pair, label_smoothing: 0",
            )
        ),
    ],
)
def test_incompatible_keys_are_reported_before_anything_runs(text: str, expected: str, write: Any):
    assert problems(write("recipe.yaml", text)) == (expected,)


# Fields of TRL

CONFIGS = sorted({cls.trainer_config for cls in STAGES.values() if cls.trainer_config})


def fields(config: str) -> dict[str, dataclasses.Field[Any]]:
    from align.training.trl_trainer import config_class

    return {field.name: field for field in dataclasses.fields(config_class(config))}


def test_a_class_outside_of_trls_top_level_is_named_with_its_module():
    from align.training.trl_trainer import config_class

    assert config_class("trl.trainer.dpo_config:DPOConfig") is config_class("DPOConfig")


@pytest.mark.parametrize("config", CONFIGS)
def test_the_fields_are_those_of_the_class_of_trl(config: str):
    own = {name for name, field in fields(config).items() if field.init}
    assert set(trl_fields.trl_fields(config)) == own
    assert len(own) > 100


@pytest.mark.parametrize("config", CONFIGS)
def test_every_default_of_trl_fits_the_type_and_the_choices_of_its_field(config: str):
    keys = trl_fields.trl_fields(config)
    for name, field in fields(config).items():
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        if isinstance(default, enum.Enum):
            default = default.value
        if field.init and default is not dataclasses.MISSING:
            assert trl_fields.fits(keys[name], default), (name, default)
            assert not trl_fields.invalid_choices(keys[name], default), (name, default)


@pytest.mark.parametrize("config", CONFIGS)
def test_the_choices_are_those_that_the_class_of_trl_declares(config: str):
    keys = trl_fields.trl_fields(config)
    for name, field in fields(config).items():
        declared = field.metadata.get("choices")
        if isinstance(declared, list):
            assert list(keys[name].choices) == declared


def test_the_losses_of_dpo_are_those_of_its_trainer():
    # Independent of the help text: the trainer compares `loss_type` with each in an if chain.
    import inspect

    import trl

    source = inspect.getsource(trl.DPOTrainer._compute_loss)
    known = set(re.findall(r'if loss_type == "(\w+)"', source))
    assert set(trl_fields.trl_fields("DPOConfig")["loss_type"].choices) == known
    source = inspect.getsource(trl.DPOTrainer)
    known = set(re.findall(r'f_divergence_type == "(\w+)"', source))
    assert set(trl_fields.trl_fields("DPOConfig")["f_divergence_type"].choices) == known


def test_the_reserved_fields_are_fields_of_trl():
    known = {name for config in CONFIGS for name in trl_fields.trl_fields(config)}
    assert set(trl_fields.RESERVED) <= known


@pytest.mark.parametrize(
    ("key", "value", "fit"),
    [
        ("learning_rate", 1e-3, True),
        ("learning_rate", 1, True),
        ("learning_rate", "1e-3", False),
        ("learning_rate", True, False),
        ("learning_rate", None, False),
        ("max_steps", 5, True),
        ("max_steps", 5.0, False),
        ("bf16", False, True),
        ("bf16", None, True),
        ("bf16", 1, False),
        ("eval_strategy", "steps", True),
        ("eval_strategy", False, False),
        ("loss_type", "ipo", True),
        ("loss_type", ["ipo"], True),
        ("loss_type", [1], False),
        ("max_length", None, True),
        ("lr_scheduler_kwargs", {"a": 1}, True),
        ("lr_scheduler_kwargs", [1], False),
    ],
)
def test_a_trainer_value_must_have_the_type_that_trl_declares(key: str, value: object, fit: bool):
    assert trl_fields.fits(trl_fields.trl_fields("DPOConfig")[key], value) is fit


INVALID_VALUES = [
    ("learning_rate", -1.0e-3, "must be at least 0, got -0.001"),
    ("learning_rate", float("nan"), "must be a finite number, got nan"),
    ("learning_rate", float("inf"), "must be a finite number, got inf"),
    ("per_device_train_batch_size", 0, "must be at least 1, got 0"),
    ("adam_beta1", 2.0, "must be at least 0 and below 1, got 2.0"),
    ("adam_epsilon", -1.0, "must be at least 0, got -1.0"),
    ("max_grad_norm", -1.0, "must be at least 0, got -1.0"),
    ("max_length", 1, "must be at least 2, got 1"),
    ("max_steps", 0, "must be at least 1, got 0"),
    ("max_steps", -2, "must be at least 1, got -2"),
    ("neftune_noise_alpha", -5.0, "must be above 0, got -5.0"),
    ("label_smoothing", 0.5, "must be at least 0 and below 0.5, got 0.5"),
    ("save_total_limit", 1, "must be at least 2, got 1"),
    ("report_to", "wandbb", "no such report_to: wandbb; did you mean `wandb`?"),
    ("report_to", ["tensorboard", "mlfow"], "no such report_to: mlfow; did you mean `mlflow`?"),
    ("hub_token", "hf_1", "cannot be set under `trainer`; push the finished folder"),
    ("gradient_checkpointing_kwargs", {"reentrant": True}, "no such key; did you mean `use_reent"),
    ("gradient_checkpointing_kwargs", {"use_reentrant": 1}, "expected true or false, got 1"),
    ("gradient_checkpointing_kwargs", "yes", "expected a mapping (key: value), got the text"),
    ("accelerator_config", {"split_batches": True}, "no such key"),
    ("lr_scheduler_kwargs", {"num_cycles": 2}, "no such key; allowed: no keys (of `linear`)"),
    ("discopop_tau", 0.1, "it has an effect only with `loss_type: discopop`; set"),
    ("label_smoothing", 0.1, "it has an effect only with `loss_type: exo_pair or robust or aot"),
    ("label_smoothing_factor", 0.1, "it has an effect only with `loss_type: nll`"),
    ("eval_steps", 10, "it has an effect only with `eval_strategy: steps`; set"),
    ("dataloader_persistent_workers", True, "it has an effect only with `dataloader_num_workers`"),
]


@pytest.mark.parametrize(("key", "value", "message"), INVALID_VALUES)
def test_a_trainer_value_outside_of_its_range_or_without_effect_is_reported(
    key: str, value: object, message: str, write: Any
):
    text = json.dumps({key: value}).replace("NaN", ".nan").replace("Infinity", ".inf")
    found = problems(write("recipe.yaml", f"{CHAIN}    trainer: {text}\n"))
    assert all(problem.startswith(f"recipe.yaml:9: dpo.trainer.{key}") for problem in found)
    assert any(f": {message}" in problem for problem in found)


def test_a_field_that_another_field_enables_is_accepted(write: Any):
    settings = {
        "loss_type": ["sigmoid", "discopop"], "discopop_tau": 0.1, "save_strategy": "steps",
        "save_steps": 5, "max_steps": -1, "sync_ref_model": True, "ref_model_sync_steps": 2,
        "lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 2},
        "dataloader_num_workers": 1, "dataloader_prefetch_factor": 2, "pad_to_multiple_of": "auto",
        "gradient_checkpointing_kwargs": {"use_reentrant": False}, "report_to": ["tensorboard"],
    }  # fmt: skip
    text = f"{CHAIN}    trainer: {json.dumps(settings)}\n"
    load_recipe(write("recipe.yaml", text))


def test_warmup_without_a_schedule_that_has_one_is_reported(write: Any):
    settings = {"lr_scheduler_type": "constant", "warmup_steps": 5}
    (problem,) = problems(write("recipe.yaml", f"{CHAIN}    trainer: {json.dumps(settings)}\n"))
    assert "dpo.trainer.warmup_steps: `lr_scheduler_type: constant` has no warmup" in problem


@pytest.mark.parametrize("config", CONFIGS)
def test_the_tables_name_fields_of_trl(config: str):
    known = {name for each in CONFIGS for name in trl_fields.trl_fields(each)}
    for table in (trl_fields.RANGES, trl_fields.MAPPINGS, trl_fields.NEEDS):
        assert set(table) <= known
    assert {other for other, _ in trl_fields.NEEDS.values()} <= known


def test_the_fields_of_trl_are_read_without_importing_it():
    code = (
        "import sys; from align.config import trl_fields as t; t.trl_fields('DPOConfig');"
        "print([m for m in ('trl', 'transformers', 'torch') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        cwd=RECIPES.parent,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        ("float", "a number"),
        ("int | None", "a whole number"),
        ("bool | None", "true or false"),
        ("IntervalStrategy | str", "text"),
        ("dict[str, Any] | str | None", "a mapping (key: value) or text"),
        ("None | str | list[str]", "text or a list"),
    ],
)
def test_a_declared_type_is_described_in_words(annotation: str, words: str):
    assert trl_fields.expected(trl_fields.TRLField(annotation, None)) == words


# The schema and the shipped recipes


def test_every_shipped_recipe_is_valid_and_matches_the_schema():
    paths = sorted(RECIPES.rglob("*.yaml"))
    assert len(paths) >= N_RECIPES
    validator = jsonschema.Draft202012Validator(json_schema.json_schema())
    for path in paths:
        assert load_recipe(path).stages, path
        assert [*validator.iter_errors(yaml.safe_load(path.read_text(encoding="utf-8")))] == [], (
            path
        )


@pytest.mark.parametrize(
    ("stages", "valid"),
    [
        ({"prepare": {"source": "embedded"}}, True),
        ({"sft": {"model": {"vocab_size": 512}, "trainer": {"max_steps": 3}}}, True),
        ({"dpo": {"model": "sft", "trainer": {"loss_type": "ipo"}}}, True),
        ({"dpo": {"model": "sft", "trainer": {"loss_type": ["ipo", "sft"]}}}, True),
        ({"low_beta": {"stage": "dpo", "model": "sft", "beta": 0.01}}, True),
        ({"low_beta": {"model": "sft", "beta": 0.01}}, False),
        ({"dpo": {"model": "sft", "bta": 0.1}}, False),
        ({"dpo": {"model": "sft", "beta": "0.1"}}, False),
        ({"dpo": {"model": "sft", "trainer": {"loss_type": "sigmod"}}}, False),
        ({"dpo": {"model": "sft", "trainer": {"seed": 1}}}, False),
        ({"dpo": {"beta": 0.1}}, False),
        ({"kto": {"model": "sft", "trainer": {"loss_type": "apo_zero_unpaired"}}}, True),
        ({"kto": {"model": "sft", "trainer": {"loss_type": "sigmoid"}}}, False),
        ({"kto": {"model": "sft", "desirable_weight": "1"}}, False),
    ],
)
def test_the_schema_and_the_loader_agree(stages: dict[str, Any], valid: bool, write: Any):
    validator = jsonschema.Draft202012Validator(json_schema.json_schema())
    assert validator.is_valid({"stages": stages}) is valid
    before = {"prepare": {"source": "embedded"}, "sft": {"model": {}}}
    text = json.dumps({"stages": {**before, **stages}})
    if valid:
        read_text(write, text)
    else:
        problems(write("recipe.yaml", text))


# Arbitrary values

ODD = st.sampled_from(
    [None, True, 0, -1, 1.5, float("inf"), "", "sft", "a/b", "\0", "~nobody-here/x", "x" * 300,
     "no", "5e-7", "exo_pair", [], ["sft", {}], [1], {}, {"r": 8}, {"stage": []}, {1: 2}]
)  # fmt: skip
WHOLE: dict[str, dict[str, Any]] = {
    "prepare": {"source": "embedded"},
    "sft": {"model": {}},
    "dpo": {"model": "sft"},
    "reward": {"model": "sft"},
    "ppo": {"model": "sft", "rewards": ["reward"], "steps": 3, "batch_size": 4},
    "grpo": {"model": "sft", "rewards": ["reward"], "steps": 3, "batch_size": 8},
    "rloo": {"model": "sft", "rewards": ["reward"], "steps": 3, "batch_size": 8},
    "reinforce": {"model": "sft", "rewards": ["reward"], "steps": 3, "batch_size": 8},
    "kto": {"model": "sft"},
    "sample": {"model": "sft"},
    "label": {"judge": "gold"},
    "evaluate": {"policies": ["dpo"], "baseline": "sft", "judge": "gold"},
    "control": {"environment": "CartPole-v1", "steps": 100},
}
PLACES = [
    *((name, key) for name, cls in STAGES.items() for key in cls.model_fields),
    *(("dpo", "trainer", key) for key in ("loss_type", "eval_strategy", "max_steps", "zzz")),
    *(("sft", "model", key) for key in NewModel.model_fields),
    *((name,) for name in STAGES),
    ("stages",),
    ("needs",),
]


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(changes=st.lists(st.tuples(st.sampled_from(PLACES), ODD), min_size=1, max_size=3))
def test_no_value_of_any_key_raises_anything_but_user_errors(
    changes: list[tuple[tuple[str, ...], Any]], tmp_path: Path
):
    data: dict[str, Any] = {"stages": json.loads(json.dumps(WHOLE))}
    for place, value in changes:
        keys = place if place[0] in ("stages", "needs") else ("stages", *place)
        below: Any = data
        for key in keys[:-1]:
            below = below.setdefault(key, {}) if isinstance(below, dict) else {}
        if isinstance(below, dict):
            below[keys[-1]] = value
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    errors: tuple[str, ...] = ()
    try:
        assert load_recipe(path).stages
    except UserError as error:
        errors = error.lines
    assert all(line.startswith(f"{path}:") for line in errors)


@pytest.mark.parametrize("name", ["...yaml", "..yaml", "recipes/...yaml", "...", " .yaml"])
def test_a_name_of_dots_is_refused_because_its_summary_would_be_elsewhere(
    tmp_path, monkeypatch, name
):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("stages:\n  prepare: {source: embedded}\n")
    stages = {"stages": {"prepare": {"source": "embedded"}}}
    with pytest.raises(UserError, match="must not consist of dots"):
        load_recipe(name)
    with pytest.raises(UserError, match="must not consist of dots"):
        load_recipe(stages, name=name)
    assert load_recipe(stages, name="a...yaml").name == "a.."
