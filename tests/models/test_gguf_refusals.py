"""GGUF files that cannot be a model: one line each, with what was found and a repair that works."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import gguf_models
from helpers.gguf_models import by_hand

from align.config.recipe import ErrorCollector, load_recipe
from align.errors import ArtifactError, UserError
from align.models import gguf_checks, gguf_conversion, gguf_files
from align.pipeline import model_checks
from align.pipeline.plan import plan_stages

LAYOUT = "name the folder of the model in Hugging Face layout"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def errors(model: str) -> list[str]:
    """The errors of a recipe with a model, when it is planned and its models are checked."""
    stages = {"prepare": {"source": "embedded", "max_rows": 60}, "sft": {"model": model}}
    collected = ErrorCollector(load_recipe({"stages": stages}))
    model_checks.check_gguf_files(collected, plan_stages(collected, Path("runs")))
    return collected.lines


def header(*, version: int = 3, order: str = "<", n_values: int = 0) -> bytes:
    return b"GGUF" + struct.pack(f"{order}IQQ", version, 1, n_values)


SPLIT = {"split.count": 3, "split.no": 1}
NO_MODELS = [
    pytest.param("m-00002-of-00003.gguf", by_hand(metadata=SPLIT),
        "part 2 of 3 of a model; merge them with llama.cpp's `llama-gguf-split --merge "
        f"m-00001-of-00003.gguf MERGED.gguf` and name that file, or {LAYOUT}", id="a part"),
    pytest.param("part.gguf", by_hand(metadata=SPLIT, architecture="", tensor=""),
        "part 2 of 3 of a model; merge them with llama.cpp's `llama-gguf-split --merge "
        f"FIRST_PART MERGED.gguf` and name that file, or {LAYOUT}", id="a renamed part"),
    pytest.param("a.gguf", by_hand(metadata={"general.type": "adapter"}),
        "an adapter without its base; merge the two into one file with llama.cpp's "
        "`llama-export-lora`, or name the folder of the adapter in PEFT's layout", id="adapter"),
    pytest.param("a.gguf", by_hand(metadata={"general.type": "mmproj"}, architecture="clip"),
        "a projector of images or sound, without the language model; name the GGUF file of the "
        "language model", id="projector"),
    pytest.param("a.gguf", by_hand(metadata={"general.type": "imatrix"}, architecture=""),
        "an importance matrix for quantization, without a model; name the GGUF file of the model",
        id="importance matrix"),
    pytest.param("a.gguf", by_hand(metadata={"general.type": "steering"}),
        "its general.type is 'steering', expected 'model'; name the GGUF file of a model",
        id="another type"),
    pytest.param("a.gguf", by_hand(tensor=""),
        "no weights, only metadata; name the GGUF file of the whole model", id="a vocabulary"),
    pytest.param("a.gguf", by_hand(architecture=""),
        f"no general.architecture, so its model is unknown; {LAYOUT}", id="no architecture"),
    pytest.param("a.gguf", b"", "an empty file; download it again", id="empty"),
    pytest.param("a.gguf", b"<html>", "not a GGUF file; name a GGUF file, or a model folder",
        id="no GGUF file"),
    pytest.param("a.gguf", header(n_values=1), "damaged or truncated (it ends within its header); "
        "download it again", id="truncated header"),
    pytest.param("a b.gguf", header(order=">"), "its numbers are big-endian; convert it with "
        "`gguf-convert-endian 'a b.gguf' little`", id="big-endian"),
    pytest.param("a.gguf", header(version=1),
        "of version 1 of the format, which is not read; download a newer file", id="version 1"),
    pytest.param("a.gguf", by_hand(metadata={"general.alignment": 0}), "damaged or truncated "
        "(its general.alignment is 0); download it again", id="alignment"),
    pytest.param("a.gguf", by_hand().replace(b"context_length", b"context_\xff\xff\xff\xff\xff\xff"),
        "damaged (a text in its header is not UTF-8); download it again", id="no text"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "line"), NO_MODELS)
def test_what_is_no_whole_model_is_refused_when_the_recipe_is_planned(
    name: str, content: bytes, line: str
):
    Path(name).write_bytes(content)
    assert errors(name) == [f"recipe: sft.model: {name}: {line}"]


INCOMPLETE = [
    ("tokenizer.ggml.tokens", {}, "no tokenizer (tokenizer.ggml.tokens); convert the model again "
     f"with its tokenizer, or {LAYOUT}"),
    *((rf"tokenizer\.ggml\.{key}$", {}, f"its tokenizer is incomplete: without tokenizer.ggml.{key}; "
       f"convert the model again with its tokenizer, or {LAYOUT}")
      for key in ("model", "merges", "token_type")),
    *((rf"llama\.{key}$", {}, f"incomplete: without llama.{key}, which its architecture 'llama' has; "
       f"get a complete file, or {LAYOUT}")
      for key in ("context_length", "embedding_length", "block_count", "attention.head_count",
                  "attention.layer_norm_rms_epsilon")),
    ("token_embd", {}, "incomplete: without token_embd.weight, which its architecture 'llama' has; "
     f"get a complete file, or {LAYOUT}"),
    (r"blk\.1\.ffn_up", {}, "incomplete: without blk.1.ffn_up.weight, which its architecture "
     f"'llama' has; get a complete file, or {LAYOUT}"),
    (r"blk\.1\.", {}, "incomplete: without all tensors of the block blk.1, which its architecture "
     f"'llama' has; get a complete file, or {LAYOUT}"),
    ("token_embd|blk\\.0", {}, "incomplete: without token_embd.weight and 1 more, which its "
     f"architecture 'llama' has; get a complete file, or {LAYOUT}"),
]  # fmt: skip


@pytest.mark.parametrize(("without", "metadata", "line"), INCOMPLETE)
def test_what_a_file_lacks_is_found_before_it_is_converted(
    without: str, metadata: dict[str, Any], line: str
):
    gguf_models.write_model(Path("a.gguf"), without=without, **metadata)
    assert errors("a.gguf") == [f"recipe: sft.model: a.gguf: {line}"]


def test_blocks_of_other_architectures_may_differ():
    """Those of LFM2 are attention or convolution, and a mixture may begin with dense blocks."""
    file = gguf_models.write_model(
        Path("a.gguf"), architecture="lfm2", without=r"blk\.1\.(ffn_up|attn_[qk])"
    )
    gguf_checks.check_convertible(file)
    gguf_models.write_model(file, architecture="lfm2", without="token_embd")
    with pytest.raises(ArtifactError, match=r"without token_embd\.weight, which"):
        gguf_checks.check_convertible(file)


def test_a_tensor_that_most_blocks_lack_is_none_that_the_others_need():
    file = gguf_models.write_model(Path("a.gguf"))
    found = gguf_files.read_header(file)
    blocks = {name: shape for name, shape in found.tensors.items() if name.startswith("blk.1.")}
    named = {
        name.replace("blk.1.", f"blk.{i}."): s for name, s in blocks.items() for i in range(2, 5)
    }
    metadata = {**found.metadata, "llama.block_count": 5}
    tensors = {**found.tensors, **named, "blk.3.scale": (1,)}
    assert not gguf_checks.missing_tensors(gguf_files.GgufHeader(metadata, tensors))
    del tensors["blk.4.ffn_up.weight"]
    missing = gguf_checks.missing_tensors(gguf_files.GgufHeader(metadata, tensors))
    assert missing == ["blk.4.ffn_up.weight"]


def test_a_tensor_that_all_blocks_lack_is_found_when_the_weights_are_read():
    file = gguf_models.write_model(Path("a.gguf"), without=r".*ffn_up")
    gguf_checks.check_convertible(file)
    with pytest.raises(UserError) as error:
        gguf_conversion.converted(file, Path("runs"), lambda _: None)
    (line,) = error.value.lines
    assert line.startswith("a.gguf: 2 weights are missing, such as model.layers.0.mlp.up_proj")
    assert line.endswith(f"; get a complete file, or {LAYOUT}")


@pytest.mark.parametrize(("model", "without", "key"), [
    ("llama", "merges", "scores"), ("llama", "none", None), ("t5", "none", "scores"),
    ("gpt2", "merges", "merges"), ("gpt2", "none", None),
])  # fmt: skip
def test_a_tokenizer_needs_merges_or_scores(model: str, without: str, key: str | None):
    metadata = {"tokenizer__ggml__model": model}
    gguf_models.write_model(Path("a.gguf"), without=rf"tokenizer\.ggml\.{without}", **metadata)
    lines = errors("a.gguf")
    assert [f"incomplete: without tokenizer.ggml.{key};" in line for line in lines] == [
        True
    ] * bool(key)


def test_types_of_tokens_are_needed_for_a_template_only():
    file = gguf_models.write_model(Path("a.gguf"), without=r"tokenizer\.ggml\.token_type")
    assert "incomplete: without tokenizer.ggml.token_type;" in errors("a.gguf")[0]
    gguf_models.write_model(file, without=r"tokenizer\.(ggml\.token_type|chat_template)")
    assert not errors("a.gguf")


def test_tensors_of_other_shapes_than_the_metadata_are_named_when_they_are_read():
    file = gguf_models.write_model(Path("a.gguf"), without=r"llama\.feed_forward_length")
    with pytest.raises(ArtifactError) as error:
        gguf_conversion.converted(file, Path("runs"), lambda _: None)
    assert error.value.lines == (
        f"a.gguf: its tensors have other shapes than its metadata; get a complete file, or {LAYOUT}",
    )


def test_a_token_without_an_embedding_is_found_with_the_tokens():
    import dataclasses

    file = gguf_models.write_model(Path("a.gguf"))
    with gguf_conversion.tokenizer_folder(file):
        pass
    header = gguf_files.read_header(file)
    fewer = dataclasses.replace(header, tensors={**header.tensors, "token_embd.weight": (32, 260)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_files, "read_header", lambda _: fewer)
        with pytest.raises(UserError) as error, gguf_conversion.tokenizer_folder(file):
            pass
    assert error.value.lines[0].startswith(
        "a.gguf: its tokenizer has ids up to 260, but the model has 260 embeddings, for ids up to 259"
    )


@pytest.mark.parametrize("key", ["bos", "eos", "unknown", "padding"])
def test_a_special_token_beyond_the_vocabulary_is_refused_with_a_repair_that_works(key: str):
    file = Path("a b.gguf")
    name = f"tokenizer.ggml.{key}_token_id"
    gguf_models.write_model(file, **{name.replace(".", "__"): 261})
    (line,) = errors(str(file))
    repair = f"gguf-set-metadata 'a b.gguf' {name} ID"
    assert line == (
        f"recipe: sft.model: a b.gguf: its {name} is 261, but its vocabulary has the ids 0 to 260; "
        f"set the right one with `{repair}`"
    )
    command = repair.replace("ID", "2") + " --force"
    program = "from gguf.scripts.gguf_set_metadata import main; main()"
    arguments = [sys.executable, "-c", program, str(file), *command.split("' ")[1].split()]
    subprocess.run(arguments, check=True, capture_output=True)
    assert not errors(str(file))
    assert gguf_files.read_header(file).metadata[name] == 2


def test_the_end_of_a_turn_counts_without_an_end_of_texts_and_only_in_the_vocabulary():
    file = gguf_models.write_model(Path("a.gguf"), ends=(0, 2, 999))
    assert gguf_files.read_header(file).ends == [0, 2]
    gguf_models.write_model(file, ends=(0, 2), without=".*eos_token_id")
    folder = gguf_conversion.converted(file, Path("runs"), lambda _: None)
    from align.models import tokenizer_files

    assert tokenizer_files.read_end_tokens(folder) == {2}
