"""`align export` of a GGUF file, and the card of an adapter, which writes its base again by it."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import gguf_models

from align.cli import main
from align.config.stages import STAGES
from align.errors import ArtifactError, UserError
from align.models import files, gguf_conversion, gguf_files
from align.pipeline.model_card import model_card
from align.runtime import artifacts, checksums
from align.runtime.artifacts import Artifact

NAME = "a b's.gguf"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def quiet(_: str) -> None:
    """Announce nothing."""


def content(folder: Path) -> dict[str, bytes]:
    """The files of a folder but the record of its conversion."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != artifacts.FILE}


def test_an_export_of_a_file_is_the_converted_folder_wherever_it_was_converted():
    file = gguf_models.write_model(Path("a.gguf"))
    main.export("a.gguf", Path("deep/out"))
    assert [path.name for path in Path("deep").iterdir()] == ["out"]
    assert not Path("runs").exists()
    folder = gguf_conversion.converted(file, Path("runs"), quiet)
    assert content(Path("deep/out")) == content(folder)
    assert "README.md" in content(folder)
    main.export("a.gguf", Path("again"))
    main.export(str(folder), Path("of_folder"))
    assert content(Path("again")) == content(Path("of_folder")) == content(folder)
    main.export("a.gguf", Path("half"), dtype="bfloat16")
    weights = files.module_names(Path("half"))
    assert weights == files.module_names(folder)
    assert json.loads(Path("half/config.json").read_text())["dtype"] == "bfloat16"


def test_an_export_of_a_file_names_no_folder_that_is_removed_again(
    capsys: pytest.CaptureFixture[str],
):
    gguf_models.write_model(Path("a.gguf"))
    main.export("a.gguf", Path("out"), dtype="bfloat16")
    printed = capsys.readouterr().err
    lines = [line for line in printed.splitlines() if line.startswith("a.gguf: ")]
    assert lines[0] == "a.gguf: converting into out"
    assert lines[-2].startswith("a.gguf: rounding to bfloat16 changes the logits by ")
    assert lines[-1] == "a.gguf: written to out in bfloat16"
    assert ".align-" not in printed


def test_an_export_of_what_is_no_model_writes_nothing():
    gguf_models.write_model(Path("a.gguf"), without="token_embd")
    for name, problem in {
        "a.gguf": "a.gguf: incomplete: without token_embd.weight",
        "b.GGUF": "b.GGUF: no such file; name a GGUF file that exists",
    }.items():
        with pytest.raises(ArtifactError) as error:
            main.export(name, Path("deep/out"))
        assert error.value.lines[0].startswith(problem)
    assert [path.name for path in Path().iterdir()] == ["a.gguf"]


def adapter(base: Path, folder: Path) -> Artifact:
    """The folder of an `sft` stage with an adapter on a converted model, without weights."""
    folder.mkdir()
    config = {
        "base_model_name_or_path": str(base.absolute()),
        "revision": files.fingerprint(base),
        "peft_type": "LORA",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    found = artifacts.read_artifact(base)
    assert found is not None
    settings: dict[str, Any] = {"model": NAME, "lora": {"r": 2}}
    artifact = Artifact(
        stage="sft",
        name="sft",
        digest="1" * 64,
        recipe=STAGES["sft"].model_validate(settings).model_dump(exclude={"stage"}),
        inputs={"model": {"folder": str(base), "digest": found.digest}},
        metrics={},
        versions={"transformers": "5.0.0"},
        commit=None,
        seed=0,
        world_size=1,
        seconds=1.0,
        peak_memory_bytes=None,
    )
    artifacts.write_artifact(folder, artifact)
    return artifact


def test_the_card_of_an_adapter_has_the_command_that_writes_its_base_again(
    monkeypatch: pytest.MonkeyPatch,
):
    import transformers

    file = gguf_models.write_model(Path(NAME))
    base = gguf_conversion.converted(file, Path("runs"), quiet)
    stage = Path("runs/sft-0123456789ab")
    card = model_card(stage, adapter(base, stage))
    place = card.partition("machine of the training, the folder\n")[2].partition("\n\n##")[0]
    sha256 = checksums.digest_file(file)
    assert place.startswith(f"""`{base.name}`. Elsewhere, set `base_model_name_or_path` in it to the \
place of the base.

The base is the GGUF file `{NAME}`, SHA-256
`{sha256}`,
in Hugging Face layout. Align with its extra `gguf` and transformers {transformers.__version__} writes
the same folder from the file again. Beside this folder, Align finds it:

```bash
align export {shlex.quote(NAME)} ../{base.name}
```
""")
    command = place.partition("```bash\n")[2].partition("\n")[0]
    shutil.move("runs", "elsewhere")
    shutil.rmtree(f"elsewhere/{base.name}")
    stage = Path("elsewhere/sft-0123456789ab").absolute()
    shutil.copy(NAME, stage)
    monkeypatch.chdir(stage)
    with pytest.raises(UserError) as error:
        files.read_adapter_base(Path("adapter_config.json"), stage)
    assert error.value.lines[0].endswith(
        f"{base.name} does not exist; write it again from its GGUF file, `align export FILE.gguf "
        f"{stage.parent / base.name}`, or set `base_model_name_or_path` to its folder"
    )
    program, name, *arguments = shlex.split(command)
    assert (program, name) == ("align", "export")
    main.export(arguments[0], Path(arguments[1]))
    found = files.read_adapter_base(Path("adapter_config.json"), stage)
    assert Path(found.source) == stage.parent / base.name
    found.check_unchanged(stage)  # compares the fingerprint
    folder = gguf_conversion.converted(Path(NAME), stage.parent, quiet)  # takes the equal copy
    assert folder == Path(found.source)
    artifacts.check_folder(folder)
    assert not (folder / ".converting").exists()


def test_other_cards_have_no_such_command():
    base = gguf_conversion.converted(gguf_models.write_model(Path(NAME)), Path("runs"), quiet)
    stage = Path("runs/sft-0123456789ab")
    artifact = adapter(base, stage)
    config = json.loads((stage / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(Path("runs/other").absolute())
    (stage / "adapter_config.json").write_text(json.dumps(config))
    assert "align export 'a b" not in model_card(stage, artifact)  # an adapter on a trained model
    (stage / "adapter_config.json").unlink()
    card = model_card(stage, artifact)
    assert f"| base model | the GGUF file `{NAME}` |" in card
    assert "SHA-256" not in card


def test_a_converted_file_hides_no_stage_of_its_name():
    from align.cli import comparison

    file = gguf_models.write_model(Path("sft.gguf"))
    adapter(gguf_conversion.converted(file, Path("runs"), quiet), Path("runs/sft-0123456789ab"))
    shutil.rmtree(gguf_files.converted_folder(file, Path("runs")))
    gguf_conversion.converted(file, Path("runs"), quiet)  # the last one to finish
    assert comparison.stages_of_run(Path("runs")) == {"sft": ("sft", Path("runs/sft-0123456789ab"))}


def test_a_configuration_for_another_trainer_names_the_command_for_the_folder():
    gguf_models.write_model(Path(NAME))
    stages = {
        "prepare": {"source": "embedded", "max_rows": 60},
        "grpo": {
            "model": NAME,
            "rewards": ["mod:f"],
            "steps": 1,
            "batch_size": 8,
            "lora": {"r": 2},
        },
    }
    Path("mod.py").write_text("def f(prompts, completions): return [0.0] * len(completions)\n")
    Path("r.yaml").write_text(json.dumps({"stages": stages}))
    with pytest.raises(UserError) as error:
        main.export("r.yaml", Path("out"), program="verl")
    line = f"grpo.model: {NAME} is a GGUF file; `align export {shlex.quote(NAME)} FOLDER` writes its model, name that"
    assert any(each.endswith(line) for each in error.value.lines), error.value.lines
