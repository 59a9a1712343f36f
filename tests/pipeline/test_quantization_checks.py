"""What 4 bits do not support is an error before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import tiny_models

from align.config.recipe import ErrorCollector, load_recipe
from align.pipeline import quantization_checks
from align.pipeline.plan import plan_stages
from align.runtime import artifacts
from align.runtime.artifacts import Artifact

RECIPE = """\
stages:
  prepare: {{source: embedded, max_rows: 50}}
  sft: {{model: {{hidden_size: {width}, intermediate_size: 128}}}}
  dpo: {{model: sft, quantization: nf4, lora: {{}}, trainer: {{optim: paged_adamw_8bit}}}}
  kto: {{model: {folder}, quantization: nf4, lora: {{}}}}
  evaluate: {{policies: [dpo], baseline: sft, judge: gold, quantization: nf4}}
  ppo: {{model: sft, rewards: ["a:b"], steps: 1, batch_size: 1, optimizer: paged_adamw_8bit}}
"""


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.world(tmp_path_factory.getbasetemp()).lora


def problems(folder: Path, adapter: Path, width: int) -> tuple[list[str], list[str]]:
    """The errors and the remarks of a recipe."""
    file = folder / "recipe.yaml"
    file.write_text(RECIPE.format(width=width, folder=adapter))
    errors = ErrorCollector(load_recipe(file))
    stages = plan_stages(errors, folder / "runs")
    assert errors.lines == []
    quantization_checks.check_quantization(errors, stages)
    return errors.lines, list(quantization_checks.remarks(stages))


def test_layers_that_a_cpu_cannot_compute_are_named_with_their_stage(
    tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(quantization_checks, "_has_accelerator", lambda: False)
    narrow, remarks = problems(tmp_path, adapter, 96)
    places = [line.split(": ")[1] for line in narrow]
    assert places == ["dpo.quantization", "kto.quantization", *["evaluate.quantization"] * 2]
    assert "recipe.yaml:4: " in narrow[0]
    assert "its layer model.layers.0.self_attn.q_proj has 96 inputs" in narrow[0]
    assert "has 32 inputs" in narrow[1]  # of the base of the adapter
    assert remarks == [
        f"{stage}: paged_adamw_8bit keeps its state in memory: a CPU has no paging"
        for stage in ("dpo", "ppo")
    ]
    wide, _ = problems(tmp_path, adapter, 64)
    assert [line.split(": ")[1] for line in wide] == ["kto.quantization"]
    monkeypatch.setattr(quantization_checks, "_has_accelerator", lambda: True)
    assert problems(tmp_path, adapter, 96) == ([], [])


def test_adapters_that_are_read_on_another_base_than_in_training_are_named(tmp_path: Path):
    folder = tmp_path / "earlier"
    folder.mkdir()
    recipe = {"quantization": "nf4"}
    record = Artifact("reward", "old", "1" * 64, recipe, {}, {}, {}, None, 0, 1, 0.0, None)
    artifacts.write_artifact(folder, record)
    file = tmp_path / "recipe.yaml"
    file.write_text(f"""\
stages:
  prepare: {{source: embedded, max_rows: 50}}
  sft: {{model: {{hidden_size: 64}}}}
  dpo: {{model: sft, quantization: nf4, lora: {{}}}}
  kto: {{model: dpo, quantization: nf4, lora: {{}}}}
  sample: {{model: dpo}}
  ppo: {{model: sft, rewards: [{folder}, "a:b"], steps: 1, batch_size: 1}}
  evaluate: {{policies: [dpo, kto], baseline: sft, judge: gold}}
""")
    errors = ErrorCollector(load_recipe(file))
    stages = plan_stages(errors, tmp_path / "runs")
    assert errors.lines == []
    lines = list(quantization_checks.remarks(stages))
    read = [
        line.partition(" are trained on a base in 4 bits, and read here on")[0] for line in lines
    ]
    assert read == [
        "sample: the adapters of dpo",
        f"ppo: the adapters of {folder}",
        "evaluate: the adapters of dpo",
        "evaluate: the adapters of kto",
    ]
