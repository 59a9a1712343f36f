"""What 4 bits do not support is an error before anything runs."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from helpers import tiny_models
from helpers.ppo_fixtures import edit_json

from align.cli import chat as cli_chat
from align.cli import main as cli
from align.config.recipe import ErrorCollector, load_recipe
from align.pipeline import quantization_checks, runner
from align.pipeline.plan import plan_stages
from align.runtime import artifacts
from align.runtime.artifacts import Artifact
from align.runtime.progress import NullDisplay

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
    """The errors of a recipe, and the remarks about its optimizers."""
    file = folder / "recipe.yaml"
    file.write_text(RECIPE.format(width=width, folder=adapter))
    errors = ErrorCollector(load_recipe(file))
    stages = plan_stages(errors, folder / "runs")
    assert errors.lines == []
    quantization_checks.check_quantization(errors, stages)
    remarks = [line for line in quantization_checks.remarks(stages) if "paging" in line]
    return errors.lines, remarks


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


def test_adapters_that_are_read_in_4_bits_after_training_in_full_are_named(tmp_path: Path):
    file = tmp_path / "recipe.yaml"
    file.write_text("""\
stages:
  prepare: {source: embedded, max_rows: 50}
  sft: {model: {hidden_size: 64}}
  dpo: {model: sft, lora: {}}
  kto: {model: dpo, lora: {}, quantization: nf4}
  sample: {model: dpo, quantization: nf4}
  evaluate: {policies: [dpo, kto], baseline: sft, judge: gold, quantization: nf4}
""")
    errors = ErrorCollector(load_recipe(file))
    stages = plan_stages(errors, tmp_path / "runs")
    assert list(quantization_checks.remarks(stages)) == [
        f"{stage}: the adapters of dpo are trained on a base that is not quantized, and read here "
        "on a base in 4 bits; `quantization` decides"
        for stage in ("kto", "sample", "evaluate")
    ]


def test_a_run_has_the_lines_of_the_check_before_anything_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    lines: list[str] = []

    class Recorder(NullDisplay):
        def info(self, line: str) -> None:
            lines.append(line)

    def stops(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "_run_or_reuse", stops)
    stages = {
        "prepare": {"source": "embedded", "max_rows": 50},
        "sft": {"model": {"hidden_size": 64}},
        "dpo": {"model": "sft", "quantization": "nf4", "lora": {}},
        "sample": {"model": "dpo"},
    }
    with pytest.raises(KeyboardInterrupt):
        runner.run_recipe(load_recipe({"stages": stages}), tmp_path / "runs", Recorder())
    line = "sample: the adapters of dpo are trained on a base in 4 bits, and read here on a base"
    assert sum(each.startswith(line) for each in lines) == 1, lines


@pytest.mark.parametrize(
    ("trained", "option", "line"),
    [
        ("nf4", [], "are trained on a base in 4 bits, and read here on a base that is not quan"),
        (None, ["--quantization", "nf4"], "are trained on a base that is not quantized, and rea"),
        ("nf4", ["--quantization", "nf4"], ""),
        (None, [], ""),
    ],
)
def test_a_chat_begins_with_a_line_about_adapters_on_another_base(
    trained: str | None, option: list[str], line: str, adapter: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    folder = tmp_path / "dpo"
    shutil.copytree(adapter, folder, ignore=shutil.ignore_patterns("artifact.json"))
    recipe = {"quantization": trained, "lora": {"r": 4}}
    record = Artifact("dpo", "dpo", "1" * 64, recipe, {}, {}, {}, None, 0, 1, 0.0, None)
    artifacts.write_artifact(folder, record)
    monkeypatch.setattr(cli_chat, "chat", lambda *_, **__: print("chat", file=sys.stderr))
    monkeypatch.setattr(sys, "argv", ["align", "chat", str(folder), *option])
    with pytest.raises(SystemExit) as raised:
        cli.main()
    err = capsys.readouterr().err.splitlines()
    assert not raised.value.code and err[-1] == "chat", err
    assert len(err) == 1 + bool(line)
    assert not line or err[0].startswith(f"the adapters of {folder} {line}")


@pytest.mark.parametrize(
    ("stored", "settings", "problem"),
    [
        ({"quant_method": "gptq"}, "quantization: nf4, lora: {}", "dpo.quantization: model: the w"),
        ({"quant_method": "gptq"}, "seed: 1", "dpo.model: model: its weights are stored as gptq"),
        ({"quant_method": "gptq"}, "lora: {}", ""),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "quantization: nf4, lora: {}", ""),
        (None, "quantization: nf4, lora: {}", ""),
    ],
)
def test_weights_that_are_stored_in_few_bits_are_neither_trained_nor_quantized_again(
    stored: dict[str, object] | None, settings: str, problem: str, tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    world = tiny_models.world(tmp_path_factory.getbasetemp())
    ignored = shutil.ignore_patterns("artifact.json")
    shutil.copytree(world.sft, tmp_path / "model", ignore=ignored)
    edit_json(tmp_path / "model" / "config.json", quantization_config=stored)
    monkeypatch.chdir(tmp_path)
    recipe = "stages:\n  prepare: {source: embedded, max_rows: 50}\n  dpo: {model: model, "
    Path("r.yaml").write_text(f"{recipe}{settings}}}\n")
    errors = ErrorCollector(load_recipe("r.yaml"))
    quantization_checks.check_stored_types(errors, plan_stages(errors, tmp_path / "runs"))
    assert len(errors.lines) == bool(problem), errors.lines
    assert not problem or errors.lines[0].startswith(f"r.yaml:3: {problem}")
