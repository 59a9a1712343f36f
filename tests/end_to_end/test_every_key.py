"""Every key of Align has an effect, or is refused.

A stage runs with a key and without it, in settings in which the key matters. Then the recipe is
refused, or the files of the stage or its results differ. ``tests/training/test_trainer_fields.py``
does the same with the fields of TRL.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_models
from helpers.key_changes import BASE, CHANGES, TRAINER, Change, build_files
from pydantic import BaseModel

import align
from align.config.control.algorithms import FAMILIES
from align.config.control.dynamic_programming import DynamicProgramming
from align.config.control.maddpg import MultiAgent
from align.config.control.off_policy import OffPolicy
from align.config.control.offline import Offline
from align.config.control.self_play import SelfPlay
from align.config.control.tabular import Tabular
from align.config.online_rl import OnlineRL
from align.config.stages import STAGES
from align.errors import UserError
from align.online_rl import plots as ppo_plots
from align.stages import control

CLASSES = STAGES | {
    "control: tabular": Tabular,
    "control: dynamic programming": DynamicProgramming,
    "control: off-policy": OffPolicy,
    "control: self-play": SelfPlay,
    "control: several agents": MultiAgent,
    "control: offline": Offline,
}
"""The configuration class of each kind of stage, and of each family of ``control``."""
SPEED = {
    "prefix_sharing",
    "batch_size",
    "micro_batch_size",
    "tokens_per_batch",
    "sample_batch_size",
    "gradient_checkpointing",
    "compile_layers",
    "compile_decoding",
    "merge_adapter",
}
"""Keys that only change time or memory, so that results are equal up to rounding."""
ELSEWHERE = (
    *(
        "mixture.",
        "stop.judge.",
        "judge.api",
        "judge.rubric",
        "judge.annotations",
        "importance_cap",
    ),
    *("rewards.", "judge.answer", "judge.name", "judge.timeout_seconds"),
)
"""Keys of other tests: those of a source, which ``prepare`` reads in the same way; of judges
(``tests/judges``); of functions that score (``tests/rewards``, ``tests/config``); of vLLM
(``tests/online_rl/test_vllm.py``, ``test_vllm_engine.py``)."""
SAMPLER = ("importance_cap", "vllm_timeout", "vllm_gpu_memory_utilization", "max_staleness")
"""Keys that need vLLM."""
SHARED = TRAINER.keys() | {"lora.dropout", "allow_missing_end_token"}
"""Keys that all stages with a trainer share."""
EVERYWHERE = "ALIGN_ALL_KEYS" in os.environ
"""Whether shared keys are tested in all stages, and those of ``ppo`` too: minutes more."""
TIMED = ("second", "runtime", "time", "memory", "flos")
"""Parts of the names of results that differ between two equal runs."""
CONTENT = (".parquet", ".safetensors", ".jsonl")
"""Suffixes of result files. Others only repeat the settings."""


def _is_own(kind: str, key: str) -> bool:
    """Whether the short run tests a key: those of online RL are tested in detail elsewhere."""
    if issubclass(CLASSES[kind], OnlineRL):
        return kind != "ppo" and key in inspect.get_annotations(CLASSES[kind])
    return kind == "sft" or key not in SHARED


def keys_of(config: type[BaseModel]) -> Iterator[str]:
    """The keys of a configuration, and those of nested ones below ``key.``."""
    for name, field in config.model_fields.items():
        yield name
        for nested in _configs(field.annotation):
            yield from (f"{name}.{key}" for key in keys_of(nested))


def _configs(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [config for each in typing.get_args(annotation) for config in _configs(each)]


def test_every_family_of_control_is_tested() -> None:
    assert {*FAMILIES} <= {*CLASSES.values()}


@pytest.mark.parametrize("kind", CLASSES)
def test_every_key_has_a_change(kind: str) -> None:
    keys = set(keys_of(CLASSES[kind])) - {"stage"}
    elsewhere = {key for key in keys if key.startswith(ELSEWHERE)}
    assert keys - elsewhere - CHANGES[kind].keys() == set()
    assert CHANGES[kind].keys() - keys == set()


@pytest.fixture(scope="module")
def outcome(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[str, dict[str, Any]], str]]:
    """The fingerprint of a stage with these settings, or its error; each runs once."""
    root = tmp_path_factory.mktemp("keys")
    world = tiny_models.world(tmp_path_factory.getbasetemp())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(control, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
        for plots, draw in ((control.plots, "draw_curves"), (ppo_plots, "draw")):
            patch.setattr(plots, draw, lambda *_, **__: None)  # half of the time
        places = build_files(root, world)
        known: dict[str, str] = {}

        def call(kind: str, settings: dict[str, Any]) -> str:
            text = json.dumps([kind, settings], sort_keys=True)
            for name, path in places.items():
                text = text.replace(f'"{name}"', json.dumps(path))
            if text not in known:
                runs = root / f"runs-{len(known)}"
                known[text] = fingerprint(kind, json.loads(text)[1], runs)
            return known[text]

        yield call


def fingerprint(kind: str, settings: dict[str, Any], runs: Path) -> str:
    """The files and the results of a stage as text, or its error."""
    kind = kind.partition(":")[0]
    try:
        stage = align.run({"stages": {kind: settings}}, runs)[kind]
    except UserError as error:
        return f"refused: {error}"
    files = {}
    for path in sorted(stage.folder.rglob("*")):
        name = str(path.relative_to(stage.folder))
        is_content = path.suffix in CONTENT and path.name != "metrics.jsonl"
        files[name] = hashlib.sha256(path.read_bytes()).hexdigest() if is_content else ""
    artifact = json.loads((stage.folder / "artifact.json").read_text(encoding="utf-8"))
    results = {key: untimed(artifact[key]) for key in ("metrics", "headline")}
    return json.dumps([files, results], indent=1)


def untimed(value: Any) -> Any:
    """Results without what differs between two equal runs, and without repeated settings."""
    if isinstance(value, dict):
        left_out = (*TIMED, "temperature", "confidence", "folder")
        return {
            key: untimed(item)
            for key, item in value.items()
            if not any(part in key for part in left_out)
        }
    return [untimed(item) for item in value] if isinstance(value, list) else value


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "key"),
    [
        (kind, key)
        for kind in CHANGES
        for key in CHANGES[kind]
        if key not in SAMPLER and (EVERYWHERE or _is_own(kind, key))
    ],
)
def test_a_change_of_a_key_has_an_effect_or_is_refused(
    kind: str, key: str, outcome: Callable[[str, dict[str, Any]], str], monkeypatch: Any
) -> None:
    change: Change = CHANGES[kind][key]
    before = {**BASE[kind], **change.context}
    after = {**before, key.partition(".")[0]: change.value, **change.beside}
    if "." in key and not isinstance(change.value, (dict, list)):
        name, _, nested = key.partition(".")
        after[name] = before[name] | {nested: change.value}
    read: set[str] = set()

    def recorded(config: BaseModel, name: str) -> Any:
        read.add(name)
        return object.__getattribute__(config, name)

    monkeypatch.setattr(CLASSES[kind], "__getattribute__", recorded)
    first, second = outcome(kind, before), outcome(kind, after)
    if key in SPEED:
        assert key in read
    else:
        assert first != second, second
