"""Random mutations of recipes, overrides, command-line options and data rows, by a seed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter

from align.config.stages import STAGES
from align.config.trl_fields import fits, trl_fields

VALUES: list[Any] = [
    None, True, False, 0, 1, 2, -1, 7, 64, 10**6, 2**31, 2**63, 10**30, 0.0, -0.5, 0.3, 1.0, 1.5,
    1e308, 1e-308, float("inf"), float("nan"), "", " ", "0", "no", "null", "1e-3", "a", "a" * 300,
    "sft", "prepare", "embedded", "gold", "owner/name", "module:function", "json:loads", ".", "..",
    "/", "/dev/null", "~nobody/x", "rows.jsonl", "missing.jsonl", "recipe.yaml", "runs", "[x]", "*",
    "{}", "%s", "a b", "a:b", "a/b/c", "\u202e", "é", "日本", "\U0001f600", "a\nb", "\x1b[31m", "\0",
    "\ud800", [], [[]], [None], ["sft"], ["a", "a"], [1, "a"], {}, {"a": 1}, {"": None}, {"a": {"b": []}},
    {"vocab_size": 300}, "float32", "bfloat16", "train", "test", "k1", "linear", "adamw_torch",
]  # fmt: skip
CHARACTERS = [*"{}[]:,-#&*!|>'\"%@`?~\\ \n\tax0é\0\x1b\ufeff", "- ", ": ", "<<: "]
MODEL = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
         "num_attention_heads": 2, "max_position_embeddings": 128}  # fmt: skip
TRAINER = {"max_steps": 1, "per_device_train_batch_size": 4, "bf16": False, "max_length": 96}
RECIPE: dict[str, Any] = {
    "stages": {
        "prepare": {"source": "rows.jsonl", "test_fraction": 0.2, "split_seed": 1},
        "sft": {"model": MODEL, "trainer": TRAINER},
        "reward": {"model": "sft", "trainer": TRAINER},
        "dpo": {"model": "sft", "beta": 0.2, "lora": {"r": 4, "alpha": 8}, "trainer": TRAINER},
        "kto": {"model": "sft", "trainer": TRAINER},
        "ppo": {"model": "sft", "rewards": ["reward"], "steps": 1, "batch_size": 4,
                "max_new_tokens": 4},
        "sample": {"model": "sft", "n_prompts": 4, "n_completions": 2, "max_new_tokens": 4},
        "label": {"judge": "reward"},
        "evaluate": {"policies": ["dpo"], "baseline": "sft", "implicit_rewards": True,
                     "resamples": 100},
        "control": {"environment": "CartPole-v1", "steps": 64, "n_envs": 2, "n_steps": 16,
                    "seeds": [0], "episodes": 1},
    }
}  # fmt: skip


@dataclass
class Case:
    """Files, overrides and options of one command."""

    files: dict[str, bytes]
    overrides: list[str] = field(default_factory=list)
    options: list[str] = field(default_factory=list)
    mutations: list[str] = field(default_factory=list)


def case(seed: int) -> Case:
    """A recipe with its data, of which one to three things are mutated."""
    random = Random(seed)
    result = Case({"recipe.yaml": b"", "rows.jsonl": jsonl(rows(random))})
    recipe = json.loads(json.dumps(RECIPE))
    kept = random.sample(list(recipe["stages"]), random.randint(2, 5))
    for name in list(recipe["stages"]):
        if name not in {"prepare", "sft", "reward", "dpo", *kept} and random.random() < 0.8:
            del recipe["stages"][name]
    if "sample" not in recipe["stages"]:
        recipe["stages"].pop("label", None)
    text = None
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        kind = random.choice(("tree", "tree", "tree", "field", "field", "text", "override", "option",
                              "rows", "rows", "file"))  # fmt: skip
        if kind == "tree":
            result.mutations.append(f"tree: {mutate_tree(recipe, random)}")
        elif kind == "field":
            result.mutations.append(f"field: {set_field(recipe, random)}")
        elif kind == "text":
            text = mutate_text(dump(recipe), random)
            result.mutations.append("text")
        elif kind == "override":
            override = random_override(recipe, random)
            result.overrides.append(override)
            result.mutations.append(f"override {override!r}")
        elif kind == "option":
            option = random.choice(("--until", "--force"))
            value = random.choice([*RECIPE["stages"], "all", "x", "", "é", "../x"])
            result.options += [option, value]
            result.mutations.append(f"{option} {value!r}")
        elif kind == "rows":
            result.files["rows.jsonl"] = mutate_rows(random, result)
        else:
            name, content = random_file(random)
            result.files[name] = content
            deep_set(recipe, ["stages", "prepare", "source"], name)
            result.mutations.append(f"file {name}")
    result.files["recipe.yaml"] = (text or dump(recipe)).encode("utf-8", "surrogatepass")
    return result


def dump(recipe: Any) -> str:
    """The recipe as YAML."""
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=False)


def deep_set(tree: Any, keys: list[Any], value: Any) -> None:
    """Set a value if all keys above it exist."""
    for key in keys[:-1]:
        tree = tree.get(key) if isinstance(tree, dict) else None
    if isinstance(tree, dict):
        tree[keys[-1]] = value


def containers(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every container with one of its keys or positions."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(items):
        yield tree, key
        if isinstance(value, dict | list):
            yield from containers(value)


def mutate_tree(recipe: Any, random: Random) -> str:
    """Replace, delete, rename, move or wrap one value of the recipe."""
    places = list(containers(recipe))
    if not places:
        return "nothing left"
    tree, key = random.choice(places)
    action = random.choice(("replace", "replace", "replace", "delete", "rename", "move", "wrap"))
    if action == "replace":
        tree[key] = random.choice(VALUES)
    elif action == "delete":
        del tree[key]
    elif action == "rename" and isinstance(tree, dict):
        tree[random.choice(("x", f"{key}s", str(key)[:-1], "stage", "A b", "é"))] = tree.pop(key)
    elif action == "move" and isinstance(tree, dict):
        tree[key] = tree.pop(key)  # to the end
    else:
        tree[key] = random.choice(([tree[key]], {"a": tree[key]}, str(tree[key])))
    return f"{action} {key}"


def set_field(recipe: Any, random: Random) -> str:
    """Give a declared key or a field of TRL a random value."""
    stages = recipe.get("stages") if isinstance(recipe, dict) else None
    names = [n for n in stages if n in STAGES] if isinstance(stages, dict) else []
    if not names:
        return "nothing"
    name = random.choice(names)
    cls = STAGES[name]
    value = random.choice(VALUES)
    if cls.trainer_config and random.random() < 0.6:
        key = random.choice(list(trl_fields(cls.trainer_config)))
        field = trl_fields(cls.trainer_config)[key]
        if random.random() < 0.6:
            value = random.choice(
                [v for v in [*VALUES, *field.choices] if fits(field, v)] or [None]
            )
        deep_set(recipe, ["stages", name, "trainer", key], value)
        return f"{name}.trainer.{key} = {value!r:.40}"
    key = random.choice(list(cls.model_fields))
    if random.random() < 0.6:
        adapter = TypeAdapter(cls.model_fields[key].annotation, config=ConfigDict(strict=True))
        value = random.choice([v for v in VALUES if accepts(adapter, v)] or [None])
    deep_set(recipe, ["stages", name, key], value)
    return f"{name}.{key} = {value!r:.40}"


def accepts(adapter: TypeAdapter[Any], value: Any) -> bool:
    """Whether a value has the declared type, whatever its bounds are."""
    try:
        adapter.validate_python(value)
    except ValueError:
        return False
    return True


def mutate_text(text: str, random: Random) -> str:
    """Insert, delete or repeat characters or lines."""
    for _ in range(random.randint(1, 3)):
        i = random.randrange(len(text))
        lines = text.splitlines(keepends=True)
        changed = [
            text[:i] + random.choice(CHARACTERS) + text[i:],
            text[:i] + text[i + random.randint(1, 5) :],
            text[:i],
            "".join(lines[: len(lines) // 2] + lines[len(lines) // 2 - 1 :]),
            text.replace("  ", random.choice((" ", "   ", "\t")), random.randint(1, 9)),
        ]
        text = random.choice(changed) or "x"
    return text


def random_override(recipe: Any, random: Random) -> str:
    """An override of an existing key, of a declared one, or of neither."""
    stage = random.choice([*RECIPE["stages"], "all", "x", ""])
    keys = ["beta", "model", "trainer.max_steps", "seed", "lora.r", "trainer", "x", "", "stage"]
    keys += ["trainer.learning_rate", "source", "columns.prompt", "rewards", "seeds", "a.b.c"]
    value = random.choice(
        [str(v) for v in VALUES if "\0" not in str(v)] + ["[1", "{a: ", "&a [*a]"]
    )
    value = value.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    return random.choice(
        (f"{stage}.{random.choice(keys)}={value}", stage, f"{stage}={value}", value)
    )


def rows(random: Random, count: int = 60) -> list[dict[str, Any]]:
    """Preference pairs with different prompts."""
    return [
        {"prompt": f"question {i} of {random.random():.3f}", "chosen": f"good answer {i}",
         "rejected": f"bad answer {i}"}
        for i in range(count)
    ]  # fmt: skip


def jsonl(values: list[Any]) -> bytes:
    """One JSON value per line."""
    return "".join(json.dumps(value) + "\n" for value in values).encode()


CELLS: list[Any] = [
    *[value for value in VALUES if not (isinstance(value, int) and abs(value) > 2**63)],
    [{"role": "user", "content": "hi"}], [{"role": "user"}], [{"content": "x"}], [{}], [1],
    [{"role": "usr", "content": "hi"}, {"role": "assistant", "content": "x"}],
    [{"role": "system", "content": "s"}, {"role": "user", "content": 3}],
    [{"role": "assistant", "content": "x"}], [{"from": "human", "value": "x"}],
    "<|im_end|>", "x " * 2000,
]  # fmt: skip


def mutate_rows(random: Random, result: Case) -> bytes:
    """Rows in which one column, some cells or some bytes are replaced."""
    data = rows(random)
    action = random.choice(("column", "cells", "drop", "rename", "few", "bytes", "add"))
    key = random.choice(list(data[0]))
    value = random.choice(CELLS)
    result.mutations.append(f"rows: {action} {key} {value!r:.40}")
    for row in data if action in ("column", "drop", "rename", "add") else data[:20]:
        if action in ("column", "cells"):
            row[key] = value
        elif action == "drop":
            del row[key]
        elif action == "rename":
            row[random.choice((key.upper(), "label", "messages", "x"))] = row.pop(key)
        elif action == "add":
            row[random.choice(("label", "messages", "margin", "system", "x", "tools"))] = value
    if action == "few":
        data = data[: random.randint(0, 3)]
    content = jsonl(data)
    if action == "bytes":
        i = random.randrange(len(content))
        content = (
            content[:i] + random.choice((b"\xff", b"\0", b"\n", b"{", b"", b'"')) + content[i + 1 :]
        )
    return content


def random_file(random: Random) -> tuple[str, bytes]:
    """A data file of another format, right or wrong."""
    content = jsonl(rows(random))
    csv = "prompt,chosen,rejected\n" + "".join(
        f"q{i} {random.random()},a{i},b{i}\n" for i in range(60)
    )
    make: list[Callable[[], tuple[str, bytes]]] = [
        lambda: ("d.csv", csv.encode()),
        lambda: ("d.csv", csv.replace(",", ";").encode()),
        lambda: ("d.csv", csv.encode("utf-16")),
        lambda: ("d.csv", csv.replace("chosen", "chosen,chosen").encode()),
        lambda: ("d.csv", b'prompt,chosen,rejected\n"a,b\n'),
        lambda: ("d.json", b"[" + b",".join(content.split(b"\n")[:-1]) + b"]"),
        lambda: ("d.json", content), lambda: ("d.json", b'{"a": [1, 2'), lambda: ("d.json", b"[" * 5000),
        lambda: ("d.jsonl", b"{" + b'"a":{' * 3000 + b"\n"),
        lambda: ("d.parquet", content), lambda: ("d.parquet", b""), lambda: ("d.jsonl.gz", content),
        lambda: ("d.txt", content), lambda: ("d", content), lambda: ("d.jsonl", b""),
        lambda: ("d.jsonl", b"\n\n\n"), lambda: ("d.jsonl", content.replace(b"\n", b"\r\n")),
        lambda: ("d.jsonl", "\ufeff".encode() + content), lambda: ("d.arrow", content),
    ]  # fmt: skip
    return random.choice(make)()


def write(folder: Path, files: dict[str, bytes]) -> None:
    """Write the files of a case."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
