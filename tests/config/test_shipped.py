"""Files that ship with Align, and recipes by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.config import catalog, shipped
from align.config.recipe import load_recipe
from align.config.shipped import find_recipe, shipped_recipes
from align.errors import UserError

ROOT = Path(__file__).parents[2]


def test_the_folders_of_a_checkout_are_those_beside_the_package():
    assert shipped.data_dir() == ROOT / "data"
    assert shipped.recipes_dir() == ROOT / "recipes"


def test_the_folders_of_a_wheel_are_inside_the_package(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(shipped, "_PACKAGE", tmp_path / "site-packages" / "align")
    (tmp_path / "site-packages" / "align" / "_data").mkdir(parents=True)
    assert shipped.data_dir() == tmp_path / "site-packages" / "align" / "_data"


def test_a_folder_beside_an_installed_package_is_not_used(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(shipped, "_PACKAGE", tmp_path / "align")
    (tmp_path / "data").mkdir()
    (tmp_path / "align").mkdir()
    with pytest.raises(UserError, match=r"_data: missing, so this installation of Align is incom"):
        shipped.data_dir()


def test_a_missing_catalog_is_an_error_and_not_an_empty_catalog(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(shipped, "_PACKAGE", tmp_path / "align")
    catalog.entries.cache_clear()
    try:
        with pytest.raises(UserError, match="install it again"):
            catalog.with_catalog_entry({"source": "hh-rlhf"})
    finally:
        catalog.entries.cache_clear()


@pytest.mark.parametrize("name", ["dpo", "control/cartpole_ppo"])
def test_a_shipped_recipe_is_found_by_name(name: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(name)
    assert recipe.path.samefile(ROOT / "recipes" / f"{name}.yaml")
    assert recipe.name == name.replace("/", "-")


def test_every_shipped_recipe_has_a_name():
    names = shipped_recipes()
    assert len(names) == len(list((ROOT / "recipes").rglob("*.yaml")))
    assert {"dpo", "ppo", "hh/dpo", "control/cartpole_ppo"} <= names.keys()


def test_a_file_of_the_working_directory_has_precedence(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dpo").write_text("stages: {prepare: {source: embedded}}\n")
    assert find_recipe("dpo") == Path("dpo")
    assert list(load_recipe("dpo").stages) == ["prepare"]


def test_a_folder_does_not_hide_the_shipped_recipe_of_its_name(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sft").mkdir()
    assert find_recipe("sft").samefile(ROOT / "recipes" / "sft.yaml")
    needing = load_recipe({"needs": "sft"})
    assert list(needing.stages) == list(load_recipe("sft").stages)


def test_an_unknown_name_is_refused_with_the_shipped_recipes(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"dop: no such recipe; did you mean `dpo`\?.*, dpo, .*ppo"):
        load_recipe("dop")
