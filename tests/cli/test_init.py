"""Tests of `align init`: its recipes are valid, and fit data of the layout that they show."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import pytest
from typer.testing import CliRunner

from align.cli import init
from align.cli.main import app
from align.config.recipe import load_recipe
from align.errors import UserError

NAMES = get_args(init.Template)
JUDGE = re.compile(
    r"^( *)# (evaluate:|  policies:.*|  baseline:.*|(?:  )?judge: .*)$", re.MULTILINE
)


def invoke(*arguments: str):
    result = CliRunner().invoke(app, ["init", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_every_template_is_offered():
    assert {file.stem for file in init.TEMPLATES.iterdir()} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_template_is_a_valid_recipe_with_and_without_its_judge(tmp_path, name):
    output = invoke(name, "--folder", str(tmp_path)).stdout
    file = tmp_path / "recipe.yaml"
    assert output == (
        f"{file}: put your data into {name}.jsonl, or name another file under `source`\n"
        f"next: align check {file}\n"
    )
    load_recipe(file)
    text = file.read_text()
    uncommented = JUDGE.sub(r"\1\2", text)
    assert (uncommented == text) == (name == "demonstrations")
    file.write_text(uncommented)
    recipe = load_recipe(file)
    if name != "demonstrations":
        assert recipe.stages["evaluate"].judge


@pytest.mark.parametrize("name", NAMES)
def test_check_accepts_data_of_the_layout_that_the_template_shows(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    invoke(name)
    shown = re.findall(r"^ *#   (\{.*\})$", Path("recipe.yaml").read_text(), re.MULTILINE)
    assert shown
    for layout in shown:
        rows = [json.dumps(_numbered(json.loads(layout), k)) for k in range(20)]
        Path(f"{name}.jsonl").write_text("\n".join(rows))
        model = "sft.model={hidden_size: 16, num_hidden_layers: 1, max_position_embeddings: 1024}"
        result = CliRunner().invoke(app, ["check", "recipe.yaml", model, "sft.lora=null"])
        assert result.exit_code == 0, result.exception


def _numbered(row, k):
    """The row with a number in its prompt, and every second label reversed."""
    if "messages" in row:
        row["messages"][0]["content"] += f" {k}"
    else:
        row["prompt"] += f" {k}"
    if "label" in row:
        row["label"] = k % 2 == 0
    return row


def test_no_file_is_replaced(tmp_path):
    invoke("pairs", "--folder", str(tmp_path / "new"))
    (tmp_path / "new" / "recipe.yaml").write_text("mine")
    with pytest.raises(UserError, match=r"recipe.yaml: exists already; move it away"):
        invoke("thumbs", "--folder", str(tmp_path / "new"))
    assert (tmp_path / "new" / "recipe.yaml").read_text() == "mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file: not a folder; name another one with --folder"):
        invoke("pairs", "--folder", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"file/sub/recipe.yaml: cannot be written: Not a dir"):
        invoke("pairs", "--folder", str(tmp_path / "file" / "sub"))
