"""The architecture as tests: imports, sizes, and words that the style guide rules out."""

from __future__ import annotations

import ast
import graphlib
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "align"
MODULES = sorted(PACKAGE.rglob("*.py"))

# What each folder or top-level module may import from Align. `align/__init__.py` may import
# anything, in functions.
MAY_IMPORT = {
    "errors": "",
    "functional": "",
    "models.prefix_sharing": "",
    "rl": "functional",
    "config": "errors",
    "models": "errors models.prefix_sharing runtime",
    "runtime": "errors __version__",
    "report": "errors config",
    "report.page": "errors config functional report runtime",
    "data": "errors config runtime",
    "control": "errors functional rl report config",
    "rewards": "errors config models models.prefix_sharing runtime",
    "judges": "errors config data functional models models.prefix_sharing runtime rewards",
    "training": "errors config data models models.prefix_sharing runtime",
    "online_rl": "errors config data functional judges models models.prefix_sharing rewards rl runtime report",
    "evaluation": "errors config data functional models models.prefix_sharing rewards judges runtime",
    "evaluation.annotation": "errors data functional runtime",
    "stages": "errors config data functional models models.prefix_sharing rewards rl runtime control training "
    "online_rl evaluation judges report",
    "pipeline": "errors config control data functional judges models report rewards runtime training",  # stages by name only
    "pipeline.probe": "errors config control data evaluation functional models models.prefix_sharing online_rl "
    "pipeline rewards runtime training",
    "cli": "errors config control data evaluation evaluation.annotation functional judges models models.prefix_sharing online_rl pipeline "
    "pipeline.probe report report.page rewards rl runtime stages training __version__",
    "run": "cli",
}
LIBRARY_ONLY_UNDER = {
    "trl": ("stages/", "training/", "online_rl/", "models/logps.py", "pipeline/preflight.py"),
    "gymnasium": ("control/",),
    "typer": ("cli/",),
    "click": ("cli/",),
    "argparse": ("cli/",),
}
HEAVY = (
    "torch",
    "transformers",
    "trl",
    "datasets",
    "peft",
    "accelerate",
    "pandas",
    "matplotlib",
    "gymnasium",
)
PURE = {"math", "collections", "contextlib", "contextvars", "typing", "dataclasses", "torch"}
PURE |= {"jaxtyping", "__future__", "align"}


def unit(dotted: str) -> str:
    """The row of the table to which `align.<dotted>` belongs."""
    parts = dotted.split(".")
    nested = ".".join(parts[:2])
    return nested if nested in MAY_IMPORT else parts[0]


def unit_of(path: Path) -> str:
    return unit(".".join(path.relative_to(PACKAGE).with_suffix("").parts))


def imports(tree: ast.AST) -> set[str]:
    """Dotted names of everything imported anywhere in the tree, functions included."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_units(path: Path) -> set[str]:
    """Rows of the table that a module imports, without its own."""
    names = {
        name.partition(".")[2] for name in imports(parse(path)) if name.split(".")[0] == "align"
    }
    return {unit(name) for name in names} - {unit_of(path)}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_what_its_layer_allows(path):
    relative = path.relative_to(PACKAGE).as_posix()
    libraries = {name.split(".")[0] for name in imports(parse(path))}
    for library, places in LIBRARY_ONLY_UNDER.items():
        assert library not in libraries or relative.startswith(places), library
    if relative == "__init__.py":
        at_import = [
            node for node in parse(path).body if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        modules = {name.split(".")[0] for node in at_import for name in imports(node)}
        assert modules == {"__future__", "importlib", "typing"}  # the rest is imported when used
    else:
        assert imported_units(path) <= set(MAY_IMPORT[unit_of(path)].split())
    if relative.startswith("functional/"):
        assert libraries <= PURE
    if relative.startswith("stages/"):
        assert not any(name.startswith("align.stages.") for name in imports(parse(path)))


def test_folders_form_no_cycle():
    graph: dict[str, set[str]] = {}
    for path in MODULES:
        if path != PACKAGE / "__init__.py":
            graph.setdefault(unit_of(path), set()).update(imported_units(path) - {"__version__"})
    assert list(graphlib.TopologicalSorter(graph).static_order())
    assert graph.keys() <= MAY_IMPORT.keys()


def test_modules_form_no_cycle():
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in MODULES}

    def imported(path: Path) -> set[str]:
        addresses = [name.split(".") for name in imports(parse(path)) if name.startswith("align.")]
        prefixes = (".".join(parts[:n]) for parts in addresses for n in range(2, len(parts) + 1))
        return {prefix for prefix in prefixes if prefix in names}

    graph = {name: imported(path) for name, path in names.items() if name != "align.__init__"}
    assert list(graphlib.TopologicalSorter(graph).static_order())


def test_config_pipeline_and_cli_load_no_heavy_library():
    light = [path for path in MODULES if unit_of(path) in ("config", "pipeline", "cli")]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in light]
    code = f"import sys, {', '.join(names)}; print([n for n in {HEAVY!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_top_level_modules_shadow_nothing_and_are_few():
    entries = [path for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 20
    taken = sys.stdlib_module_names | importlib.metadata.packages_distributions().keys()
    assert {path.stem for path in entries if path.name != "py.typed"} & taken == set()


def test_names_of_test_files_are_unique():
    """pytest refuses to collect two modules with one name in folders that are no packages."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names)), sorted(n for n in names if names.count(n) > 1)


def test_files_have_at_most_400_lines_and_functions_60():
    too_long = []
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > 400:
            too_long.append(f"{path.relative_to(ROOT)}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > 60 and (path.parent.name, node.name) != ("rl", "update"):
                    too_long.append(f"{path.relative_to(ROOT)}: {node.name}: {lines} lines")
    assert too_long == []


# Written with a hole in each word, so that this file does not contain them.
RULED_OUT = [
    word.replace("_", "")
    for word in (
        "to_ld", "sa_id", "spe_ak", "spe_aks", "spe_aking", "me_nd", "me_nds", "va_in", "an_ew", "fore_tell",
        "fore_tells", "fore_told", "goes o_n", "sta_nds", "of ou_rs", "of you_rs", "of its ow_n",
    )
]  # fmt: skip


def test_texts_contain_no_word_that_the_style_guide_rules_out():
    folders = (
        "align",
        "tests",
        "docs",
        "recipes",
        "benchmarks",
        "examples",
        "metrics",
        "accelerate_configs",
    )
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    files += [path for path in ROOT.iterdir() if path.suffix in (".md", ".toml", ".yml", ".cff")]
    pattern = re.compile(rf"\b({'|'.join(RULED_OUT)})\b", re.IGNORECASE)
    matches = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sorted(files)
        if path.suffix in (".py", ".md", ".yaml", ".yml", ".toml", ".cff")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]
    assert matches == []
