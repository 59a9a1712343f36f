"""GGUF files as models: read without loading, converted once, refused with the reason."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import gguf_models
from helpers.gguf_models import by_hand

from align.config.data import Prepare
from align.config.recipe import ErrorCollector, load_recipe
from align.errors import ArtifactError, UserError
from align.evaluation import held_out
from align.models import gguf_conversion, gguf_files, tokenization
from align.pipeline import (
    estimates,
    lookup,
    model_checks,
    quantization_checks,
    runner,
    token_lengths,
)
from align.pipeline.plan import plan, plan_stages
from align.runtime import artifacts, checksums

DATA = {"source": "embedded", "max_rows": 60, "test_fraction": 0.25}
STEPS = {"max_steps": 2, "per_device_train_batch_size": 2, "bf16": False,
         "gradient_checkpointing": False, "save_strategy": "no"}  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A GGUF file, and the runs folder that it is converted into."""
    folder = tmp_path_factory.mktemp("gguf")
    file = gguf_models.write_model(folder / "tiny.gguf")
    gguf_conversion.converted(file, folder / "runs", lambda _: None)
    return file, folder / "runs"


def test_a_header_is_read_without_the_package():
    Path("a.gguf").write_bytes(by_hand())
    header = gguf_files.read_header(Path("a.gguf"))
    assert (header.architecture, header.positions) == ("llama", 77)
    assert header.parameters == 4 * 2
    assert header.metadata["tokenizer.ggml.tokens"] == 2


def test_a_file_that_is_cut_anywhere_is_one_line(monkeypatch: pytest.MonkeyPatch):
    # As the package lists it: a block of float32 is one value in 4 bytes.
    monkeypatch.setattr(gguf_files, "_block_sizes", lambda: {0: (1, 4)})
    whole = by_hand()
    for size in range(len(whole)):
        Path("cut.gguf").write_bytes(whole[:size])
        with pytest.raises(ArtifactError) as error:
            gguf_files.read_header(Path("cut.gguf"))
        (line,) = error.value.lines
        assert line.startswith("cut.gguf: ")


def test_damaged_bytes_are_one_line_or_another_header():
    whole, draw = by_hand(), random.Random(0)
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 6)):
            data[draw.randrange(4, len(whole) - 64)] = draw.randrange(256)
        Path("damaged.gguf").write_bytes(data)
        with contextlib.suppress(ArtifactError):  # of any other kind, the test fails
            gguf_files.read_header(Path("damaged.gguf"))


def errors(**stages: Any) -> list[str]:
    """The errors of a recipe when it is planned and its models are checked."""
    collected = ErrorCollector(load_recipe({"stages": {"prepare": DATA, **stages}}))
    planned = plan_stages(collected, Path("runs"))
    model_checks.check_gguf_files(collected, planned)
    return collected.lines


def test_what_is_no_model_is_refused_with_its_place_and_the_repair(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match=r"sft\.model: no such file: a\.gguf; name a GGUF file"):
        load_recipe({"stages": {"prepare": DATA, "sft": {"model": "a.gguf"}}})
    Path("a.gguf").write_bytes(b"no model")
    (line,) = errors(sft={"model": "a.gguf"})
    assert line.endswith("sft.model: a.gguf: not a GGUF file; name a GGUF file, or a model folder")
    Path("a.gguf").write_bytes(by_hand()[:100])
    (line,) = errors(sft={"model": "a.gguf"})
    assert line.endswith("; download it again")
    Path("a.gguf").write_bytes(by_hand())
    monkeypatch.setattr(gguf_files, "is_installed", lambda: False)
    (line,) = errors(sft={"model": "a.gguf"})
    assert line.endswith("sft.model: a.gguf: gguf is not installed: pip install -e '.[gguf]'")
    monkeypatch.setattr(gguf_files, "is_installed", lambda: True)
    assert not errors(sft={"model": "a.gguf"})
    Path("a.gguf").write_bytes(by_hand(architecture="eleven"))
    (line,) = errors(sft={"model": "a.gguf"})
    assert "does not read GGUF files of the architecture 'eleven'; name the folder" in line
    Path("a.gguf").write_bytes(by_hand(tensor="rope_freqs.weight"))
    (line,) = errors(sft={"model": "a.gguf"})
    assert "its rotary embeddings are scaled (rope_freqs.weight), which" in line


SPLITS = [
    ("gpt2", "smollm", True), ("gpt2", "gpt-2", True), ("gpt2", "llama-bpe", True),
    ("gpt2", "default", True), ("gpt2", "deepseek-llm", False), ("gpt2", "new-bpe", False),
    ("llama", "new-bpe", True),
]  # fmt: skip


@pytest.mark.parametrize(("model", "pre", "known"), SPLITS)
def test_a_tokenizer_that_would_split_text_otherwise_is_refused(
    model: str, pre: str, known: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(gguf_files, "is_installed", lambda: True)
    monkeypatch.setattr(gguf_files, "_block_sizes", lambda: {0: (1, 4)})
    Path("a.gguf").write_bytes(by_hand(model=model, pre=pre))
    lines = errors(sft={"model": "a.gguf"})
    assert [f"tokenizer.ggml.pre = '{pre}'" in line for line in lines] == [True] * (not known)


def test_the_ends_of_a_turn_and_of_a_message_are_ends_of_the_converted_policy():
    file = gguf_models.write_model(Path("a.gguf"), ends=(0, 2, 1))
    folder = gguf_conversion.converted(file, Path("runs"), lambda _: None)
    tokenizer = tokenization.load_tokenizer(folder)
    assert tokenizer.eos_token_id == 0
    assert tokenization.end_tokens(tokenizer) == {0, 1, 2}
    assert tokenization.conversations(tokenizer).end_of_turn().ended
    file = gguf_models.write_model(Path("b.gguf"), ends=(2, 2))
    assert gguf_files.read_header(file).ends == [2]


def test_layers_that_a_cpu_cannot_compute_in_4_bits_are_named_before_and_after_the_conversion(
    converted: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
):
    file, runs = converted
    monkeypatch.setattr(quantization_checks, "_has_accelerator", lambda: False)
    stages = {"sft": {"model": str(file), "quantization": "nf4", "lora": {"r": 2}}}
    Path("unfinished", gguf_files.converted_folder(file, runs).name).mkdir(parents=True)
    for folder in (Path("none"), Path("unfinished"), runs):
        collected = ErrorCollector(load_recipe({"stages": {"prepare": DATA, **stages}}))
        quantization_checks.check_quantization(collected, plan_stages(collected, folder))
        (line,) = collected.lines
        assert f"{file}: its layer " in line and "_proj has 32 inputs; on a CPU" in line


def test_a_language_model_is_no_reward_model():
    Path("a.gguf").write_bytes(by_hand())
    sft = {"model": {"vocab_size": 300}}
    with pytest.raises(UserError, match=r"a\.gguf: a GGUF file contains a language model; name a"):
        load_recipe(
            {
                "stages": {
                    "prepare": DATA,
                    "sft": sft,
                    "ppo": {"model": "sft", "rewards": ["a.gguf"]},
                }
            }
        )


def test_a_plan_depends_on_the_content_and_converts_nothing():
    def sft(name: str, content: bytes) -> Any:
        Path(name).write_bytes(content)
        return plan(
            load_recipe({"stages": {"prepare": DATA, "sft": {"model": name}}}), Path("runs")
        )

    prepare, first = sft("a.gguf", by_hand())
    assert sft("b.gguf", by_hand())[1].digest == first.digest
    assert sft("a.gguf", by_hand(values=6))[1].digest != first.digest
    assert str(first.inputs["model"]).startswith("runs/gguf-")
    Path("a.gguf").write_bytes(by_hand())
    estimate = estimates.estimate([prepare, first], world_size=1)["sft"]
    assert estimate.memory_bytes == 8 * 16  # float32 weights, gradients and Adam's two moments
    assert not Path("runs").exists()


def test_no_digest_depends_on_the_name_or_the_place_of_a_file():
    def stages(one: str, two: str, **evaluate: Any) -> dict[str, Any]:
        lora = {"lora": {"r": 2}}
        online = {"model": one, "rewards": ["reward"], "steps": 1, "batch_size": 8} | lora
        return {
            "prepare": DATA,
            "sft": {"model": one} | lora,
            "dpo": {"model": one} | lora,
            "kto": {"model": one} | lora,
            "reward": {"model": one} | lora,
            "ppo": online,
            "grpo": online,
            "sample": {"model": one},
            "label": {"judge": "reward"},
            "evaluate": {"policies": [one, two, "sft"], "baseline": one, "judge": ["gold"]}
            | evaluate,
        }

    def digests(*names: str, **evaluate: Any) -> dict[str, str]:
        recipe = load_recipe({"stages": stages(*names, **evaluate)})
        return {stage.name: stage.digest for stage in plan(recipe, Path("runs"))}

    Path("a.gguf").write_bytes(by_hand())
    Path("b.gguf").write_bytes(by_hand(values=6))
    first = digests("a.gguf", "b.gguf")
    Path("deep").mkdir()
    shutil.move("a.gguf", "deep/renamed.GGUF")
    shutil.move("b.gguf", "a.gguf")
    assert digests("deep/renamed.GGUF", "a.gguf") == first
    Path("copy.gguf").write_bytes(by_hand())
    apart = digests("copy.gguf", "a.gguf", baseline="deep/renamed.GGUF")  # one more comparison
    assert [name for name in first if apart[name] != first[name]] == ["evaluate"]
    Path("a.gguf").write_bytes(by_hand(values=8))
    other = digests("deep/renamed.GGUF", "a.gguf")
    assert [name for name in first if other[name] != first[name]] == ["evaluate"]
    swapped = digests("a.gguf", "deep/renamed.GGUF")
    assert [name for name in first if swapped[name] == first[name]] == ["prepare"]


def test_a_reused_evaluation_says_where_its_results_have_earlier_names(
    converted: tuple[Path, Path],
):
    record = artifacts.read_artifact(next(converted[1].iterdir()))
    assert record is not None
    for name in ("new.gguf", "same.gguf"):
        Path(name).write_bytes(by_hand())
    evaluate = {"policies": ["new.gguf", "same.gguf"], "baseline": "reference", "judge": "gold"}
    stages = {"prepare": DATA, "sample": {"model": "new.gguf"}, "evaluate": evaluate}
    _, sample, evaluation = plan(load_recipe({"stages": stages}), Path("runs"))
    before = evaluate | {"policies": ["deep/old.gguf", "same.gguf"], "model": "deep/old.gguf"}
    record = replace(record, recipe=before)
    line = "the results name new.gguf as it was called then, deep/old.gguf"
    assert list(runner.earlier_names(evaluation, record)) == [line]
    assert not list(runner.earlier_names(sample, record))  # its results have no names


def test_the_check_reads_the_template_and_the_tokens_of_a_file_that_is_not_converted(
    converted: tuple[Path, Path],
):
    shutil.copy(converted[0], "tiny.gguf")

    def check(runs: Path, **trainer: Any) -> tuple[list[str], list[str]]:
        sft = {"model": "tiny.gguf", "trainer": {"max_length": 60} | trainer}
        recipe = load_recipe({"stages": {"prepare": DATA, "sft": sft}})
        collected = ErrorCollector(recipe)
        lines = list(token_lengths.examine(collected, plan(recipe, runs)))
        return lines, collected.lines

    lines, errors = check(Path("runs"))
    assert lines[0].startswith("tiny.gguf: a run first converts it into runs/gguf-")
    assert not Path("runs").exists()
    (folder,) = converted[1].iterdir()
    after, errors_after = check(converted[1])  # the file was converted there
    assert [line.replace("tiny.gguf", str(folder)) for line in lines[1:]] == after
    assert [line for line in lines if line.startswith("sft: ") and "tokens per row" in line]
    assert [e.replace("tiny.gguf", str(folder)) for e in errors] == errors_after
    Path("strict.jinja").write_text("{{ raise_exception('only in Latin') }}")
    _, (error,) = check(Path("runs"), chat_template_path="strict.jinja")
    start = "recipe: sft.trainer.chat_template_path: strict.jinja: its chat template refuses"
    assert error.startswith(start), error
    assert "only in Latin" in error


def test_converted_weights_are_those_of_the_file(converted: tuple[Path, Path]):
    import gguf
    from transformers import AutoModelForCausalLM

    file, runs = converted
    (folder,) = runs.iterdir()
    model = AutoModelForCausalLM.from_pretrained(folder)
    state = model.state_dict()
    stored = {
        t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy())
        for t in gguf.GGUFReader(str(file)).tensors
    }
    torch.testing.assert_close(state["lm_head.weight"], stored["token_embd.weight"], rtol=0, atol=0)
    down = stored["blk.1.ffn_down.weight"]
    torch.testing.assert_close(state["model.layers.1.mlp.down_proj.weight"], down, rtol=0, atol=0)
    # llama.cpp stores the two halves of each head's rotated channels alternately.
    heads = stored["blk.0.attn_q.weight"].view(gguf_models.HEADS, -1, 2, gguf_models.WIDTH)
    halves = torch.cat([heads[:, :, 0], heads[:, :, 1]], dim=1).reshape(-1, gguf_models.WIDTH)
    query = state["model.layers.0.self_attn.q_proj.weight"]
    torch.testing.assert_close(query, halves, rtol=0, atol=0)
    assert not hasattr(model.config, "quantization_config")
    assert gguf_files.read_header(file).parameters == model.num_parameters()


def test_a_finished_conversion_is_reused_and_an_unfinished_one_replaced(
    converted: tuple[Path, Path],
):
    file, runs = converted
    lines: list[str] = []
    shutil.copy(file, "other.gguf")
    folder = gguf_conversion.converted(Path("other.gguf"), runs, lines.append)
    assert not lines
    assert folder.parent == runs
    unfinished = Path("runs") / folder.name
    (unfinished / ".converting").mkdir(parents=True)
    (unfinished / ".converting" / "model.safetensors").write_bytes(b"half")
    (unfinished / ".converting" / "left.json").write_bytes(b"half")
    (unfinished / "notes.txt").write_text("mine")
    assert gguf_conversion.converted(file, Path("runs"), lines.append) == unfinished
    converting, reading, writing = lines
    assert converting.endswith(f"converting into {unfinished}")
    assert "reading the weights" in reading and "parameters read; writing" in writing
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (unfinished / name).read_bytes() == (folder / name).read_bytes()
    assert (unfinished / "notes.txt").read_text() == "mine"
    names = {path.name for path in unfinished.iterdir()}
    assert names == {path.name for path in folder.iterdir()} | {"notes.txt"}
    (unfinished / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ArtifactError) as error:
        gguf_conversion.converted(file, Path("runs"), lines.append)
    (line,) = error.value.lines
    assert line.startswith(f"{unfinished / 'model.safetensors'}: 7 bytes, expected ")
    assert line.endswith(
        f"; delete {unfinished} or move it away, and its GGUF file is converted again"
    )
    (unfinished / artifacts.FILE).write_text("{")
    with pytest.raises(ArtifactError, match=f"delete {unfinished} or move it away, and its GGUF"):
        gguf_conversion.converted(file, Path("runs"), lines.append)


def test_no_file_of_a_user_is_lost_in_a_conversion(
    converted: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
):
    file, runs = converted
    (finished,) = runs.iterdir()
    folder = Path("runs") / finished.name
    folder.mkdir(parents=True)
    blocking = {
        "README.md": "mine",
        "chat_template.jinja": "{{ mine }}",
        "adapter_config.json": "{}",
    }
    for name, content in blocking.items():
        (folder / name).write_text(content)
    monkeypatch.setattr(gguf_conversion, "_write_model", lambda *_: pytest.fail("no time is lost"))
    with pytest.raises(ArtifactError) as error:
        gguf_conversion.converted(file, Path("runs"), lambda _: None)
    assert list(error.value.lines) == [
        f"{folder / name}: in the way of the conversion of {file}, which did not write it; move it "
        "away, or delete it"
        for name in sorted(blocking)
    ]
    for name, content in blocking.items():
        assert (folder / name).read_text() == content


def test_a_changed_copy_of_a_conversion_is_not_replaced(converted: tuple[Path, Path]):
    file, runs = converted
    (finished,) = runs.iterdir()
    folder = Path("runs") / finished.name
    shutil.copytree(finished, folder)
    (folder / artifacts.FILE).unlink()
    (folder / "chat_template.jinja").write_text("{{ mine }}")
    with pytest.raises(ArtifactError) as error:
        gguf_conversion.converted(file, Path("runs"), lambda _: None)
    assert list(error.value.lines) == [
        f"{folder / 'chat_template.jinja'}: in the way of the conversion of {file}, which did not "
        "write it; move it away, or delete it"
    ]
    assert (folder / "chat_template.jinja").read_text() == "{{ mine }}"
    (folder / "chat_template.jinja").unlink()
    assert gguf_conversion.converted(file, Path("runs"), lambda _: None) == folder
    artifacts.check_folder(folder)


@pytest.mark.parametrize("n_moved", [0, 2, 5])
def test_a_conversion_that_ended_while_its_files_were_moved_is_completed_without_reading_the_file(
    converted: tuple[Path, Path], n_moved: int, monkeypatch: pytest.MonkeyPatch
):
    file, runs = converted
    (finished,) = runs.iterdir()
    folder = Path("runs") / finished.name
    shutil.copytree(finished, folder / ".converting")
    for name in sorted(path.name for path in finished.iterdir() if path.suffix != ".json")[
        :n_moved
    ]:
        (folder / ".converting" / name).replace(folder / name)
    monkeypatch.setattr(gguf_conversion, "_write_model", lambda *_: pytest.fail("it was written"))
    (folder / "tokenizer.json").write_text("mine")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: in the way of the conversion of"):
        gguf_conversion.converted(file, Path("runs"), lambda _: None)
    assert (folder / "tokenizer.json").read_text() == "mine"
    (folder / "tokenizer.json").unlink()
    assert gguf_conversion.converted(file, Path("runs"), lambda _: None) == folder
    assert {path.name for path in folder.iterdir()} == {path.name for path in finished.iterdir()}
    artifacts.check_folder(folder)


def test_a_conversion_counts_as_later_than_the_stages_that_had_finished(
    converted: tuple[Path, Path],
):
    record = artifacts.read_artifact(next(converted[1].iterdir()))
    assert record is not None
    Path("runs/sft-0123456789ab").mkdir(parents=True)
    artifacts.write_artifact(Path("runs/sft-0123456789ab"), record)
    gguf_conversion.converted(converted[0], Path("runs"), lambda _: None)
    found = {path.name: artifacts.read_artifact(path) for path in Path("runs").iterdir()}
    assert {name: each and each.order for name, each in found.items()} == {
        "sft-0123456789ab": 1, gguf_files.converted_folder(converted[0], Path("runs")).name: 2,
    }  # fmt: skip


def test_nothing_is_left_of_a_conversion_that_fails(converted: tuple[Path, Path]):
    file = gguf_models.write_model(Path("a.gguf"), without=r".*ffn_up")
    with pytest.raises(UserError, match="2 weights are missing"):
        gguf_conversion.converted(file, Path("runs"), lambda _: None)
    assert not list(Path("runs").iterdir())


def test_the_converted_folder_has_a_card_and_one_without_is_reused(converted: tuple[Path, Path]):
    from huggingface_hub import ModelCard

    file, runs = converted
    (folder,) = runs.iterdir()
    card = (folder / "README.md").read_text()
    record = artifacts.read_artifact(folder)
    assert record is not None and "README.md" in record.files
    assert ModelCard(card).data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["align", "gguf"],
    }
    # 261 tokens: 3 special ones, 256 bytes, 2 merges. Of a layer, q and o have 32 * 32, k and v
    # 16 * 32, three matrices 64 * 32, two norms 32: 9,280. 261 * 32 + 2 * 9,280 + 32 = 26,944.
    for row in (
        f"| file | `tiny.gguf`, {file.stat().st_size:,} bytes |",
        f"| SHA-256 | `{checksums.digest_file(file)}` |",
        "| license | unknown: not in the file |",
        "| architecture | llama, read as `LlamaForCausalLM` |",
        "| parameters | 26,944 |",
        "| vocabulary | 261 tokens |",
        "| positions | 192 |",
        f"| digest of the conversion | `{gguf_files.digest(file)}` |",
    ):
        assert row in card.splitlines()
    earlier = Path("runs") / folder.name  # of a version that wrote no card
    shutil.copytree(folder, earlier)
    (earlier / "README.md").unlink()
    artifacts.write_artifact(earlier, record)
    lines: list[str] = []
    assert gguf_conversion.converted(file, Path("runs"), lines.append) == earlier
    assert not lines and not (earlier / "README.md").exists()


def test_the_card_of_a_converted_folder_has_the_license_and_its_code_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    file = gguf_models.write_model(Path("a|b.gguf"), general__license="apache-2.0")
    folder = gguf_conversion.converted(file, Path("runs"), lambda _: None)
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert "| license | apache-2.0 |" in card and "| file | `a\\|b.gguf`" in card
    monkeypatch.chdir(folder)
    code = card.partition("```python\n")[2].partition("```")[0]
    torch.manual_seed(0)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()
    artifacts.check_folder(Path())


def test_a_command_finds_the_converted_policy_which_no_data_of_ours_trained(
    converted: tuple[Path, Path],
):
    file, runs = converted
    folder = lookup.find_policy(str(file), runs)
    assert isinstance(folder, Path)
    assert held_out.training_tables(folder) == set()
    assert lookup.find_policy(str(folder), runs) == folder
    with pytest.raises(ArtifactError, match=r"b\.gguf: no such file"):
        lookup.find_policy("b.gguf", runs)


@pytest.mark.parametrize("stage", ["sft", "dpo", "kto"])
def test_the_end_is_trained_though_pad_is_eos_and_what_the_template_inserts_is_not(
    converted: tuple[Path, Path], stage: str
):
    from align.training.token_view import tokenized_rows

    (folder,) = converted[1].iterdir()
    for row in tokenized_rows(Prepare(**DATA), stage, str(folder), 2):
        rendered = "".join(row.tokens)
        assert rendered.startswith("<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\n")
        assert rendered.count("<|im_start|>system") == 1
        trained = [token for token, flag in zip(row.tokens, row.trained, strict=True) if flag]
        assert trained[-1] == "<|im_end|>"
        assert trained.count("<|im_end|>") == 1


def test_the_command_shows_the_tokens_of_a_file(
    converted: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
):
    from align.cli.data import data_show

    data_show("embedded", ["max_rows=60"], stage="sft", model=str(converted[0]), n=1)
    assert "<|im_start|>assistant⏎" in capsys.readouterr().out
    Path("calls.json").write_text(json.dumps([{
        "tools": '[{"type": "function", "function": {"name": "weather", "parameters": {}}}]',
        "messages": [{"role": "user", "content": "Rome?"}, {"role": "assistant", "content": "Hot."}],
    }]))  # fmt: skip
    with pytest.raises(UserError) as raised:  # the template has no tools
        data_show("calls.json", ["test_fraction=0"], stage="sft", model=str(converted[0]), n=1)
    place = (
        f"row 1 of the training demonstrations: {converted[0]}: its chat template does not write"
    )
    (line,) = raised.value.lines
    assert line.startswith(place)
    assert line.endswith(f"FILE.jinja {converted[0]} NEW.gguf`")


@pytest.mark.slow
def test_a_chain_starts_from_a_file_and_is_reused(converted: tuple[Path, Path], launch: Any):
    shutil.copy(converted[0], "tiny.gguf")
    lora = {"r": 2, "alpha": 4}
    stages = {
        "prepare": DATA,
        "sft": {"model": "tiny.gguf", "lora": lora, "trainer": STEPS},
        "dpo": {"model": "sft", "lora": lora, "trainer": STEPS},
        "evaluate": {"policies": ["dpo", "tiny.gguf"], "baseline": "sft", "judge": "gold",
                     "n_prompts": 3, "max_new_tokens": 4},
    }  # fmt: skip
    import yaml

    Path("recipe.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    first = launch("recipe.yaml")
    assert first.code == 0, first.err
    assert (first.out + first.err).count("converting into") == 1
    shutil.move("tiny.gguf", "renamed.gguf")
    again = launch("recipe.yaml", "sft.model=renamed.gguf", "evaluate.policies=[dpo, renamed.gguf]")
    assert again.code == 0, again.err
    assert "converting" not in again.out + again.err
    assert "4 reused" in again.out
    line = "evaluate: the results name renamed.gguf as it was called then, tiny.gguf"
    assert line in again.out + again.err
