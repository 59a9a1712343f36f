"""Chat templates of GGUF files: missing, malformed, without an end. The repairs are tried."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import gguf_models
from helpers.gguf_models import TEMPLATE, by_hand

from align.config.recipe import ErrorCollector, load_recipe
from align.errors import ArtifactError, UserError
from align.models import gguf_conversion
from align.pipeline import lookup, token_lengths
from align.pipeline.plan import plan

DATA = {"source": "embedded", "max_rows": 60, "test_fraction": 0.25}
NO_TEMPLATE = (
    "a b.gguf: no chat template (tokenizer.chat_template); write a file with one, "
    "`gguf-new-metadata --chat-template-file FILE.jinja 'a b.gguf' NEW.gguf`, or train it in an "
    "`sft` stage with `trainer: {chat_template_path: FOLDER_OR_HUB_ID_OR_JINJA_FILE}`"
)
LORA = {"lora": {"r": 2}}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def check(**stages: Any) -> tuple[list[str], list[str]]:
    """The lines and the errors of the check of a recipe."""
    recipe = load_recipe({"stages": {"prepare": DATA} | stages})
    collected = ErrorCollector(recipe)
    lines = list(token_lengths.examine(collected, plan(recipe, Path("runs"))))
    return lines, [line.removeprefix("recipe: ") for line in collected.lines]


def repair(line: str) -> None:
    """Run the program that the line of an error names."""
    _, command, *arguments = shlex.split("- " + line.split("`gguf-")[1].split("`")[0])
    module = "gguf.scripts.gguf_" + command.removeprefix("gguf-").replace("-", "_")
    program = f"from {module} import main; main()"
    subprocess.run([sys.executable, "-c", program, *arguments], check=True, capture_output=True)


def test_a_file_without_a_chat_template_is_refused_where_one_is_needed_before_it_is_converted():
    gguf_models.write_model(Path("a b.gguf"), template="")
    with pytest.raises(ArtifactError) as error:
        lookup.find_policy("a b.gguf", Path("runs"))  # `align chat`
    assert error.value.lines == (NO_TEMPLATE,)
    _, errors = check(
        sample={"model": "a b.gguf"},
        sft={"model": "a b.gguf", "trainer": {"eos_token": "<|im_end|>"}} | LORA,
        evaluate={"policies": ["a b.gguf"], "baseline": "reference", "judge": "gold"},
    )
    keys = ("sample.model", "sft.model", "evaluate.policies.0")
    assert errors == [f"{key}: {NO_TEMPLATE}" for key in keys]
    assert not Path("runs").exists()
    Path("FILE.jinja").write_text(TEMPLATE)
    repair(NO_TEMPLATE)
    _, errors = check(sample={"model": "NEW.gguf", "max_new_tokens": 8})
    assert not errors


def test_a_stage_with_its_own_template_starts_from_a_file_without_one():
    gguf_models.write_model(Path("a.gguf"), without=r"tokenizer\.chat_template")
    Path("own.jinja").write_text(TEMPLATE)
    trainer = {"chat_template_path": "own.jinja", "max_length": 150}
    lines, errors = check(
        sft={"model": "a.gguf", "trainer": trainer} | LORA,
        sample={"model": "sft", "max_new_tokens": 8},
    )
    assert not errors
    assert [line for line in lines if line.startswith("sft: tokens per row: ")]
    gguf_conversion.converted(Path("a.gguf"), Path("runs"), lambda _: None)
    _, errors = check(sample={"model": "a.gguf"})
    line = NO_TEMPLATE.replace("'a b.gguf'", "a.gguf").replace("a b.gguf", "a.gguf")
    assert errors == [f"sample.model: {line}"]


@pytest.mark.parametrize("is_converted", [False, True])
def test_a_wrong_template_has_a_repair_of_the_file(is_converted: bool):
    gguf_models.write_model(Path("a.gguf"), template="{{ messages[0")
    if is_converted:
        gguf_conversion.converted(Path("a.gguf"), Path("runs"), lambda _: None)
    sft = {"model": "a.gguf"} | LORA
    _, errors = check(sft=sft, dpo={"model": "sft"} | LORA, sample={"model": "a.gguf"})
    assert len(errors) == 3
    for line in errors:
        key, _, rest = line.partition(".model: ")
        assert key in ("sft", "dpo", "sample")
        assert rest.startswith("a.gguf: its chat template is malformed: line 1: ")
        assert rest.endswith(
            "; set another template in the `sft` stage, `trainer: {chat_template_path: "
            "FILE.jinja}`, or write a file with a corrected one: "
            "`gguf-new-metadata --chat-template-file FILE.jinja a.gguf NEW.gguf`"
        )
    Path("FILE.jinja").write_text(TEMPLATE)
    repair(errors[0])
    assert not check(sft=sft | {"model": "NEW.gguf"})[1]


@pytest.mark.parametrize("is_converted", [False, True])
def test_a_template_without_an_end_token_has_a_repair_of_the_file(is_converted: bool):
    gguf_models.write_model(Path("a.gguf"), ends=(0,))
    if is_converted:
        gguf_conversion.converted(Path("a.gguf"), Path("runs"), lambda _: None)
    sft = {"model": "a.gguf"} | LORA
    _, (line,) = check(sft=sft)
    assert line.startswith(
        "sft.model: a.gguf: its chat template ends a completion with '<|im_end|>"
    )
    assert line.endswith(
        "set `trainer: {eos_token: TOKEN}` in the `sft` stage to the token that ends a turn, or "
        "write a file with it: `gguf-new-metadata --special-token eos TOKEN a.gguf NEW.gguf`, or "
        "set `allow_missing_end_token: true`"
    )
    repair(line.replace("TOKEN a.gguf", "'<|im_end|>' a.gguf"))
    assert not check(sft=sft | {"model": "NEW.gguf"})[1]


def test_errors_of_the_tokens_of_a_file_have_the_same_repair():
    from align.cli.data import data_show

    gguf_models.write_model(Path("a b.gguf"), template="")
    with pytest.raises(UserError) as error:
        data_show("embedded", ["max_rows=60"], stage="sft", model="a b.gguf", n=1)
    assert error.value.lines == (NO_TEMPLATE,)


def test_the_api_and_folders_name_what_to_load_instead():
    from align.models.policy import load_policy
    from align.rewards.inference import load_reward_model

    Path("x.gguf").write_bytes(by_hand())
    with pytest.raises(ArtifactError) as error:
        load_policy("x.gguf")
    assert error.value.lines == (
        "x.gguf: a GGUF file; `align export x.gguf FOLDER` writes its model folder, name that",
    )
    with pytest.raises(
        ArtifactError, match=r"x\.gguf: a GGUF file, which contains a language model;"
    ):
        load_reward_model("x.gguf")


def test_a_folder_that_has_only_gguf_files_names_the_largest():
    for name in ("dir.gguf", "repository"):
        Path(name).mkdir()
    Path("repository/mmproj.gguf").write_bytes(b"small")
    Path("repository/model.GGUF").write_bytes(by_hand())
    expected = {
        "dir.gguf": "a folder, in which there is no model; name a GGUF file, or another folder",
        "repository": "no config.json, but GGUF files; name repository/model.GGUF",
    }
    for name, line in expected.items():
        with pytest.raises(UserError) as error:
            plan(
                load_recipe({"stages": {"prepare": DATA, "sft": {"model": f"./{name}"}}}), Path("r")
            )
        assert error.value.lines == (f"recipe: sft.model: {name}: {line}",)
    Path("repository/config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    Path("repository/tokenizer.json").write_text("{}")
    with pytest.raises(UserError) as error:
        lookup.find_policy("repository", Path("runs"))
    assert error.value.lines == (
        "repository: no weights; expected model.safetensors, or name repository/model.GGUF",
    )
