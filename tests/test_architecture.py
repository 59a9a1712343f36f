"""House rules: who may import whom, and names that shadow nothing."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "align"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Of ours, what each room may import. A stage may use anything but another stage.
LIGHT = {"errors", "wording", "reading", "trainer_keys", "settings"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "wording": set(),
    "interrupts": set(),
    "reading": {"errors"},
    "trainer_keys": set(),
    "settings": {"catalogue"},
    "catalogue": set(),
    "artifact": {"errors", "__init__"},
    "processes": {"errors"},
    "tracking": {"processes"},
    "sources": {"errors", "wording", "__init__"},
    "comparisons": set(),
    "readers": {"errors", "wording", "sources", "comparisons"},
    "intake": {"readers"},
    "minhash": set(),
    "splitting": {"errors", "intake"},
    "contamination": {"readers"},
    "preferences": {
        "errors", "wording", "sources", "comparisons", "readers", "intake", "minhash", "contamination",
        "splitting",
    },
    "figures": {"preferences", "readers"},
    "doctor": {"errors", "settings", "preferences", "figures", "stages"},
    "token_streams": {"errors", "settings", "preferences", "models", "training", "generation"},
    "unpaired": {"errors"},
    "pairing": set(),
    "functional": {"functional"},
    "control": {"control", "rl", "functional", "wording"},
    "rl": {"rl", "functional"},
    "judges": {"judges", "functional", "generation", "models"},
    "meaning": {"settings", "wording", "readers"},
    "recipe": LIGHT | {"meaning"},
    "schema": {"recipe", "settings", "trainer_keys"},
    "prefix_trie": set(),
    "prefix_attention": {"prefix_trie"},
    "prefix_sharing": {"prefix_trie", "prefix_attention"},
    "models": {"errors"},
    "generation": {"errors", "functional"},
    "training": {"errors", "artifact", "interrupts", "processes", "tracking"},
    "references": {"errors", "artifact", "processes", "tracking"},
    "reward_functions": {"errors"},
    "rewards": {"generation", "models", "prefix_sharing"},
    "roles": {"errors", "models", "prefix_sharing", "rewards"},
    "episodes": {"functional", "generation", "rl", "roles"},
    "vllm_sampler": {"episodes", "errors", "processes", "roles"},
    "dashboard": set(),
    "checks": {
        "errors", "settings", "meaning", "recipe", "planning", "sources", "training", "judges", "control",
        "reward_functions", "trainer_keys", "unpaired",
    },
    "stages": {
        "errors", "settings", "artifact", "processes", "tracking", "sources", "readers",
        "preferences", "catalogue", "figures",
        "models", "generation", "training", "references", "functional", "judges", "prefix_sharing",
        "interrupts", "rl", "control", "meaning", "roles", "rewards", "reward_functions", "episodes",
        "dashboard", "vllm_sampler", "unpaired", "pairing",
    },
    "model_files": {"errors"},
    "planning": {
        "errors", "wording", "settings", "recipe", "meaning", "artifact", "sources", "model_files",
        "reward_functions",
    },
    "chain": {
        "errors", "settings", "recipe", "planning", "artifact", "interrupts", "processes",
        "tracking", "checks",
    },
    "estimates": {
        "artifact", "meaning", "model_files", "planning", "preferences", "figures", "settings",
        "sources", "trainer_keys",
    },
    "lengths": {
        "errors", "checks", "planning", "recipe", "settings", "preferences", "figures", "sources",
        "models", "trainer_keys",
    },
    "conversation": {"errors", "model_files", "artifact", "settings", "wording", "generation", "models"},
    "playing": {"errors", "conversation", "control"},
    "results": set(),
}  # fmt: skip
ONLY_UNDER = {
    "trl": {"stages", "checks", "training", "roles", "vllm_sampler", "token_streams"},
    "gymnasium": {"control"},
}
PARSERS = {"run", "cli"}  # argument parsing stays there


def room(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports of ours are written whole"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith("align.")}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_imports_only_what_the_house_allows(path):
    here = room(path)
    if here in PARSERS or path.name == "__init__.py":
        return
    version = {"__version__"} if "__init__" in MAY_IMPORT[here] else set()
    assert ours(path) - MAY_IMPORT[here] - version == set()
    for library, rooms in ONLY_UNDER.items():
        if here not in rooms:
            assert not any(name.split(".")[0] == library for name in imports(path))
    assert not any(name.split(".")[0] in ("typer", "argparse", "click") for name in imports(path))


def test_every_room_is_in_the_plan():
    rooms = {room(path) for path in MODULES if path.name != "__init__.py" or path.parent != PACKAGE}
    assert rooms == MAY_IMPORT.keys() | PARSERS


def test_stages_never_import_each_other():
    for path in (PACKAGE / "stages").glob("*.py"):
        assert not any(name.startswith("align.stages.") for name in imports(path))


def test_pure_functions_import_torch_only():
    allowed = {
        "math",
        "collections",
        "contextlib",
        "contextvars",
        "typing",
        "torch",
        "jaxtyping",
        "align",
        "__future__",
    }
    for path in (PACKAGE / "functional").glob("*.py"):
        assert {name.split(".")[0] for name in imports(path)} <= allowed


def test_no_module_of_ours_has_the_name_of_an_installed_package():
    # `accelerate launch align/run.py` puts `align/` first on the path until run.py takes it off.
    names = [
        p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()
    ]
    clash = [n for n in names if n != "__init__" and importlib.util.find_spec(n) is not None]
    assert clash == []


@pytest.mark.parametrize("module", ["recipe", "chain", "cli", "estimates", "lengths", "checks"])
def test_planning_loads_no_heavy_library(module):
    heavy = ("torch", "transformers", "trl", "datasets", "peft", "accelerate", "pandas")
    code = f"import sys, align.{module}\nprint([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"
