"""Keys of recipes that were renamed: an old key is refused with the name of the new one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from align.config.recipe import load_recipe
from align.config.renamed_keys import REFUSED, REMOVED, RENAMED
from align.config.stages import STAGES
from align.errors import UserError

KINDS = {base.__name__: kind for kind, cls in STAGES.items() for base in cls.__mro__}
STAGE: dict[str, dict[str, Any]] = {
    "Control": {"environment": "CartPole-v1", "steps": 100},
    "PolicyGradient": {"environment": "CartPole-v1", "steps": 100},
    "PPO": {"model": "a/b", "rewards": ["a/b"], "steps": 1, "batch_size": 1},
    "OnlineRL": {"model": "a/b", "rewards": ["a/b"], "steps": 1, "batch_size": 1},
    "Prepare": {"source": "embedded"},
    "Evaluate": {"policies": ["a/b"], "baseline": "a/c", "judge": "gold"},
    "Label": {"judge": "gold"},
}


@pytest.mark.parametrize(("cls", "old"), RENAMED, ids=".".join)
def test_an_old_key_is_refused_with_the_new_one(cls: str, old: str, tmp_path: Path):
    kind, path = KINDS[cls], tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"stages": {kind: {**STAGE[cls], old: 1}}}))
    with pytest.raises(UserError) as error:
        load_recipe(path)
    (line,) = [line for line in error.value.lines if f": {kind}.{old}: " in line]
    assert line.endswith(f": {kind}.{old}: unknown key; renamed to {RENAMED[cls, old]}")


@pytest.mark.parametrize(("cls", "old"), RENAMED, ids=".".join)
def test_the_new_key_exists_and_the_old_one_does_not(cls: str, old: str):
    fields = STAGES[KINDS[cls]].model_fields
    assert RENAMED[cls, old].split("`")[1] in fields
    assert old not in fields


@pytest.mark.parametrize(("cls", "old"), REMOVED, ids=".".join)
def test_a_removed_key_is_refused_with_the_reason_and_the_repair(
    cls: str, old: str, tmp_path: Path
):
    kind, path = KINDS[cls], tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"stages": {kind: {**STAGE[cls], old: 1}}}))
    with pytest.raises(UserError) as error:
        load_recipe(path)
    (line,) = [line for line in error.value.lines if f": {kind}.{old}: " in line]
    assert line.endswith(f": {kind}.{old}: unknown key; removed: {REMOVED[cls, old]}")
    assert old not in STAGES[kind].model_fields


@pytest.mark.parametrize("kind", ["ppo", "grpo", "rloo", "reinforce"])
@pytest.mark.parametrize(("cls", "key"), REFUSED, ids=".".join)
def test_sampling_from_a_part_of_the_distribution_is_refused_with_the_reason(
    cls: str, key: str, kind: str, tmp_path: Path
):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"stages": {kind: {**STAGE[cls], key: 0.9}}}))
    with pytest.raises(UserError) as error:
        load_recipe(path)
    (line,) = [line for line in error.value.lines if f": {kind}.{key}: " in line]
    assert "training samples from the whole distribution" in line
    assert key not in STAGES[kind].model_fields


def test_an_old_key_on_the_command_line_is_refused_with_the_new_one(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"stages": {"control": STAGE["Control"]}}))
    for override in ("control.envs=4", "all.envs=4"):
        with pytest.raises(UserError, match=r"command line: .*renamed to `n_envs`"):
            load_recipe(path, [override])
