"""Every kind of model folder, loaded by plain libraries and by the code of its model card.

The base is a tiny model with the traps of a real one: pad is eos, and the template writes text
after the end of a turn, where a classifier would read the score.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import gguf_models, tiny_models
from huggingface_hub import ModelCard
from torch.testing import assert_close
from typer.testing import CliRunner

import align
from align.cli.main import app

pytestmark = pytest.mark.slow
LORA = {"r": 4, "alpha": 8}
TRAINER = tiny_models.TRAINER | {"max_steps": 2, "per_device_train_batch_size": 4}
ROLLOUTS = {"steps": 1, "batch_size": 4, "epochs": 1, "max_new_tokens": 4}
RECIPE = {
    "prepare": {"source": "pairs.jsonl", "test_fraction": 0.25},
    "sft": {"model": "base.gguf", "trainer": TRAINER},
    "adapter": {"stage": "sft", "model": "base.gguf", "lora": LORA, "trainer": TRAINER},
    "quantized": {"stage": "sft", "model": "base.gguf", "lora": LORA, "quantization": "nf4",
                  "trainer": TRAINER},
    "dpo": {"model": "adapter", "lora": LORA, "trainer": TRAINER},
    "kto": {"model": "adapter", "trainer": TRAINER},
    "reward": {"model": "sft", "trainer": TRAINER},
    "scorer": {"stage": "reward", "model": "adapter", "lora": LORA, "trainer": TRAINER},
    "ppo": {"model": "sft", "rewards": ["reward"], **ROLLOUTS},
    "rloo": {"model": "adapter", "rewards": ["scorer"], "lora": LORA,
             "n_completions": 2, **ROLLOUTS},
}  # fmt: skip
POLICIES = ("sft", "adapter", "dpo", "kto", "ppo", "rloo")
REWARD_MODELS = ("reward", "scorer")
MESSAGES = [{"role": "user", "content": "Name a color."}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of each stage."""
    home = tmp_path_factory.mktemp("models")
    rows = (
        {"prompt": f"Name color {i}.", "chosen": f"It is {i}.", "rejected": "No."}
        for i in range(24)
    )
    (home / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_models, "WIDTH", 64)  # 4 bits on a CPU
        gguf_models.write_model(home / "base.gguf", general__license="apache-2.0")
    with contextlib.chdir(home):
        (home / "recipe.yaml").write_text(yaml.safe_dump({"stages": RECIPE}, sort_keys=False))
        run = align.run("recipe.yaml")
    return {name: (home / stage.folder).resolve() for name, stage in run.items()}


@pytest.fixture(autouse=True)
def plain_libraries() -> Iterator[None]:
    """Plain libraries warn on tied weights and on a new head below an adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        yield


def blocks(folder: Path, language: str) -> list[str]:
    """The code blocks of a card."""
    card = (folder / "README.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", card, flags=re.DOTALL)


def printed(code: str) -> str:
    """What a block of Python prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(code, "README.md", "exec"), {})
    return out.getvalue()


def command(line: str) -> Any:
    """Run a command of a card."""
    program, *arguments = shlex.split(line)
    assert program == "align"
    return CliRunner().invoke(app, arguments, input="Name a color.\n", catch_exceptions=False)


def greedy(model: Any, tokenizer: Any) -> str:
    """The greedy completion of a model that plain libraries have loaded."""
    inputs = tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    text: str = tokenizer.decode(
        output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return text


@pytest.mark.parametrize("name", [*POLICIES, "quantized", *REWARD_MODELS])
def test_the_code_of_a_card_runs_in_its_folder(folders, name, monkeypatch):
    folder = folders[name]
    monkeypatch.chdir(folder)
    card = (folder / "README.md").read_text()
    assert ModelCard(card).data.to_dict()["license"] == "apache-2.0"
    assert str(folder.parent) not in card and str(Path.home()) not in card
    outputs = [printed(code) for code in blocks(folder, "python")]
    assert len(outputs) == (2 if name in REWARD_MODELS else 1)
    if name in REWARD_MODELS:  # of Align and of transformers
        with_align, with_transformers = (float(re.sub(r"[^-.\d]", "", text)) for text in outputs)
        assert_close(with_align, with_transformers, atol=2e-4, rtol=0)
    for block in blocks(folder, "bash"):
        if ".gguf" in block:  # writes the base, which is there
            *_, file, target = shlex.split(block)
            assert (folder.parent.parent / file).is_file() and (folder / target).is_dir()
        else:
            assert command(block.strip()).exit_code == 0
    merged = folder.parent / f"{name}-merged"
    assert merged.is_dir() == (folder / "adapter_config.json").is_file()
    if merged.is_dir():
        monkeypatch.chdir(merged)
        assert "align export" not in (merged / "README.md").read_text()
        again = [printed(code) for code in blocks(merged, "python")]
        assert len(again) == len(outputs)
        if name in REWARD_MODELS:
            value = float(again[1])
            assert_close(value, with_transformers, atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", POLICIES)
def test_plain_libraries_load_every_policy_as_align_does(folders, name):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    folder = folders[name]
    expected = align.load_policy(folder).generate(
        ["Name a color."], temperature=0.0, max_new_tokens=12
    )[0][0]
    assert expected
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert greedy(AutoModelForCausalLM.from_pretrained(folder), tokenizer) == expected
    generate = pipeline("text-generation", model=str(folder))
    answer = generate(MESSAGES, max_new_tokens=12, do_sample=False)
    assert answer[0]["generated_text"][-1]["content"] == expected
    if (folder / "adapter_config.json").is_file():
        adapted = AutoPeftModelForCausalLM.from_pretrained(folder)
        assert greedy(adapted, tokenizer) == expected
        assert greedy(adapted.merge_and_unload(), tokenizer) == expected
        export = folder.parent / f"{name}-exported"
        assert command(f"align export {folder} {export}").exit_code == 0
        folder = export
        assert greedy(AutoModelForCausalLM.from_pretrained(export), tokenizer) == expected
    config = json.loads((folder / "generation_config.json").read_text())
    ends = config["eos_token_id"]
    assert tokenizer.eos_token_id in (ends if isinstance(ends, list) else [ends])
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32


@pytest.mark.parametrize("name", REWARD_MODELS)
def test_a_pipeline_classifies_with_a_reward_model(folders, name):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    folder = folders[name]
    scores = align.load_reward_model(folder).score(["Name a color."], [["Blue."]])
    if name == "scorer":
        export = folder.parent / "scorer-exported"
        assert command(f"align export {folder} {export}").exit_code == 0
        folder = export
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.id2label == {0: "reward"} and model.config.label2id == {"reward": 0}
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    turns = [*MESSAGES, {"role": "assistant", "content": "Blue."}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text.endswith("<|im_end|>\n")  # the score is read before the line break
    classify = pipeline("text-classification", model=str(folder), function_to_apply="none")
    (row,) = classify(text.removesuffix("\n"))
    offset = json.loads((folder / "reward.json").read_text())["score_mean"]
    assert row["label"] == "reward"
    assert_close(row["score"] - offset, scores.item(), atol=1e-4, rtol=0)
    short, long = classify([text.removesuffix("\n"), text * 3], batch_size=2)  # padded
    assert_close(short["score"], row["score"], atol=1e-4, rtol=0)
    assert long["score"] != short["score"]


def test_no_folder_has_a_pickle_or_an_empty_card(folders):
    for name in (*POLICIES, *REWARD_MODELS):
        files = {file.name for file in folders[name].iterdir()}
        assert files.isdisjoint({"training_args.bin", "adapter_model.bin"}), name
        assert "More Information Needed" not in (folders[name] / "README.md").read_text()


def test_export_refuses_places_that_are_taken(folders, tmp_path):
    from align.errors import UserError

    for place, message in ((folders["dpo"], "exists already"), (folders["dpo"] / "x", "outside")):
        with pytest.raises(UserError, match=message):
            command(f"align export {folders['adapter']} {place}")
    assert (
        command(f"align export {folders['dpo']} {tmp_path / 'b'} --dtype bfloat16").exit_code == 0
    )
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "b").dtype == torch.bfloat16
