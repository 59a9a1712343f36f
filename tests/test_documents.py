"""The documents: their links, recipes and commands are valid; all shipped recipes are listed."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
from test_architecture import MAY_IMPORT
from typer.testing import CliRunner

import align
from align.cli.main import app
from align.config.overrides import declared_type
from align.config.recipe import load_recipe
from align.config.stages import STAGES, stage_classes

ROOT = Path(__file__).parents[1]
FOLDERS = ("recipes", "benchmarks", "tests", "accelerate_configs")
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *(ROOT / folder / "README.md" for folder in FOLDERS),
]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PLACEHOLDERS = {"SEED": "0", "RECIPE": "recipes/dpo.yaml", "STAGE": "dpo"}
each_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT))
)


def blocks(document: Path, language: str) -> list[str]:
    """The code blocks of a language, in order."""
    text = document.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def without_code(document: Path) -> str:
    return re.sub(
        r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )


def anchors(document: Path) -> set[str]:
    """The anchors of the headings, as GitHub and MkDocs derive them."""
    headings = re.findall(r"^#+ (.*)$", without_code(document), re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading).strip()) for heading in plain}


def commands(document: Path) -> Iterator[list[str]]:
    """The words of the commands in `bash` blocks, without comments and assignments.

    In a recipe, the commands of the header.
    """
    found = blocks(document, "bash")
    if document.suffix == ".yaml":
        lines = document.read_text(encoding="utf-8").splitlines()
        found = [line.removeprefix("#   ") for line in lines if line.startswith("#   accelerate")]
    for block in found:
        for line in block.replace("\\\n", " ").splitlines():
            for command in line.split("&&"):
                words = shlex.split(command, comments=True)
                while words and re.match(r"[A-Z_]+=", words[0]):
                    words.pop(0)
                if words:
                    yield words


# Form ---------------------------------------------------------------------------------------------


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert len(text.split()) <= 1250


@each_document
def test_lines_have_at_most_100_columns(document):
    if document.name == "configuration.md":  # generated; a test compares it with the code
        return
    lines = document.read_text(encoding="utf-8").splitlines()
    too_long = [
        line
        for line in lines
        if len(line) > 100 and not line.lstrip().startswith("|") and "://" not in line
    ]
    assert too_long == []


@each_document
def test_relative_links_lead_to_files_and_headings(document):
    broken = []
    for target in LINK.findall(without_code(document)):
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        if re.match(r"[a-z]+:", target):
            continue
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


# Content ------------------------------------------------------------------------------------------


def test_recipe_blocks_are_valid(tmp_path):
    shutil.copytree(ROOT / "recipes", tmp_path, dirs_exist_ok=True)
    found = [
        (document, block)
        for document in DOCUMENTS
        for block in blocks(document, "yaml")
        if re.match(r"(needs|stages):", block)
    ]
    for number, (document, block) in enumerate(found):
        path = tmp_path / f"block-{number}.yaml"
        path.write_text(block, encoding="utf-8")
        assert load_recipe(path).stages, document
    assert len(found) == 8


def test_python_blocks_are_valid():
    found = [block for document in DOCUMENTS for block in blocks(document, "python")]
    for block in found:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert node.value.id != "align" or node.attr in align.__all__, node.attr
    assert len(found) >= 4


def click_command(words: list[str]):
    """The command that `align ...` runs, and its arguments."""
    command, rest = typer.main.get_command(app), words[1:]
    while getattr(command, "commands", None) and rest and not rest[0].startswith("-"):
        default = command.commands.get("compare") if rest[0] not in command.commands else None
        if default:  # `align eval dpo` is `align eval compare dpo`
            return default, rest
        assert rest[0] in command.commands, words
        command, rest = command.commands[rest[0]], rest[1:]
    return command, rest


@each_document
def test_commands_have_the_options_that_are_written(document):
    for words in commands(document):
        if words[0] == "align":
            command, rest = click_command(words)
        elif words[:2] == ["accelerate", "launch"]:
            command, rest = (
                click_command(["align", "run"])[0],
                words[words.index("align/run.py") + 1 :],
            )
        else:
            continue
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        written = {
            word.partition("=")[0].strip("[]") for word in rest if re.match(r"\[?--?[a-z]", word)
        }
        assert written <= known, words


@pytest.mark.parametrize(
    "document", [*DOCUMENTS, *RECIPES], ids=lambda path: str(path.relative_to(ROOT))
)
def test_recipes_and_overrides_in_commands_are_valid(document, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in commands(document):
        recipe = next(
            (word for word in words if re.match(r"recipes/(?!NAME).*\.yaml$", word)), None
        )
        if recipe is None:
            continue
        values = [re.sub(r"\b(SEED)\b", "0", word) for word in words]
        if "--sweep" in words:  # its first value
            values[words.index("--sweep") + 1] = values[words.index("--sweep") + 1].split(",")[0]
        overrides = [
            word
            for word in values  # a file of a model has to exist
            if re.match(r"[a-z_0-9]+\.[a-z_.0-9]+=", word) and ".gguf" not in word
        ]
        stages = load_recipe(recipe, overrides).stages
        assert stages, words
        for stage in stages.values():
            if str(getattr(stage, "source", "")).endswith((".jsonl", ".jsonl.gz")):
                hub_keys = {stage.config, stage.data_dir, stage.revision}  # type: ignore[attr-defined]
                assert hub_keys == {None} and stage.data_split == "train", words  # type: ignore[attr-defined]


@each_document
def test_scripts_and_extras_in_commands_exist(document):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for words in commands(document):
        for word in words:
            for extra in re.findall(r"\[([a-z0-9,]+)\]$", word) if words[0] == "pip" else ():
                assert set(extra.split(",")) <= project["optional-dependencies"].keys(), words
            if re.match(r"(align|benchmarks|tests|docs|accelerate_configs)/[\w/.]+$", word):
                assert (ROOT / word).exists(), words
        script = next((word for word in words if re.match(r"benchmarks/.*\.py$", word)), None)
        if script is not None:
            text = (ROOT / script).read_text(encoding="utf-8")
            options = [word for word in words[words.index(script) :] if word.startswith("--")]
            assert all(f'"{option}"' in text for option in options if option != "--"), words


@pytest.mark.parametrize(
    "words",
    [
        [], ["run"], ["plan"], ["check"], ["chat"], ["play"], ["env"],
        ["data"], ["data", "prepare"], ["data", "doctor"], ["data", "show"],
    ],
    ids=lambda words: " ".join(["align", *words]),
)  # fmt: skip
def test_every_documented_command_has_a_help_page(words):
    result = CliRunner().invoke(app, [*words, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert all(word in text for word in words)


@each_document
def test_keys_are_those_of_the_code(document):
    if document.name == "CHANGELOG.md":  # names old keys as well
        return
    unknown = []
    for code in re.findall(r"`([^`\n]+)`", without_code(document)):
        match = re.match(r"([a-z]+)\.([a-z_.0-9]+)(=.*|:.*)?$", code)
        if match is None or match[1] not in STAGES or re.search(r"\.(png|yaml|py|md|json)$", code):
            continue
        keys, classes = match[2].split("."), stage_classes(match[1])
        if all(declared_type(cls, keys) is None for cls in classes):
            unknown.append(code)
    assert unknown == []


# Recipes ------------------------------------------------------------------------------------------


def test_every_recipe_is_loaded_and_listed():
    listed = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    for path in RECIPES:
        assert load_recipe(path).stages
        assert f"`{path.relative_to(ROOT / 'recipes')}`" in listed
    assert len(RECIPES) == 47


def test_recipes_mentioned_in_documents_exist():
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for name in re.findall(r"(?<![\w/.])recipes/[\w/.-]+\.yaml", text):
            assert (ROOT / name).is_file() or name == "recipes/NAME.yaml", (document, name)


# Architecture -------------------------------------------------------------------------------------

ARCHITECTURE = ROOT / "docs" / "architecture.md"


@each_document
def test_paths_in_the_text_exist(document):
    if document.name == "CHANGELOG.md":  # names old paths as well
        return
    paths = re.findall(
        r"`((?:align|tests|docs|recipes|data|benchmarks|examples|accelerate_configs)/[\w./-]*)`",
        without_code(document),
    )
    missing = [path for path in paths if not (ROOT / path).exists() and "NAME" not in path]
    assert missing == []


def test_the_tree_lists_every_module():
    tree = next(block for block in blocks(ARCHITECTURE, "") if block.startswith("align/\n"))
    listed, folders = set(), {1: ""}
    for line in tree.splitlines()[1:]:
        name, depth = line.split()[0], (len(line) - len(line.lstrip())) // 2
        if name.endswith("/"):
            folders[depth + 1] = folders[depth] + name
        if name.endswith((".py", "/")):
            listed.add(folders[depth] + name)
    grouped = (
        "stages/",
        "rl/",
        "models/prefix_sharing/",
    )  # their line names the modules
    modules = {
        path.relative_to(ROOT / "align").as_posix() for path in (ROOT / "align").rglob("*.py")
    }
    expected = {
        module
        for module in modules
        if not module.startswith(grouped) and not module.endswith("/__init__.py")
    }
    assert {name for name in listed if name.endswith(".py")} == expected
    assert set(grouped) <= listed


def test_the_layer_table_is_the_one_that_is_enforced():
    rows = re.findall(r"^\| `([\w/]+)` \| (.*) \|$", ARCHITECTURE.read_text(encoding="utf-8"), re.M)
    table = {name: re.findall(r"`([\w/]+)`", allowed) for name, allowed in rows}
    enforced = {
        name.replace(".", "/"): allowed.replace(".", "/").split()
        for name, allowed in MAY_IMPORT.items()
    }
    assert {name: table.get(name) for name in enforced} == enforced
