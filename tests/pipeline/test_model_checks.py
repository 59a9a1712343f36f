"""Models that a recipe starts from: checked before anything runs, and without loading one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from align.config.recipe import ErrorCollector, load_recipe
from align.pipeline import model_checks
from align.pipeline.plan import plan_stages

COMMIT = "1" * 40
LAYERS = ("self_attn.q_proj", "mlp.up_proj")
SFT: dict[str, Any] = {"model": {"vocab_size": 300}}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def model(folder: Path, **fields: Any) -> Path:
    """A folder with a config, the names of weights, and a file for a tokenizer."""
    folder.mkdir(parents=True)
    content = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]} | fields
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "tokenizer.model").touch()
    weights = {f"model.layers.0.{name}.weight": np.zeros(1, np.float32) for name in LAYERS}
    save_file(weights, folder / "model.safetensors")
    return folder


def cached(name: str, revision: str, **fields: Any) -> None:
    """The model `acme/<name>` in the cache of the Hub."""
    repository = Path("hub") / f"models--acme--{name}"
    model(repository / "snapshots" / COMMIT, **fields)
    (repository / "refs").mkdir()
    (repository / "refs" / revision).write_text(COMMIT)


def lines(**stages: Any) -> list[str]:
    """The errors of a recipe with these stages behind `prepare`."""
    recipe = load_recipe({"stages": {"prepare": {"source": "embedded"}, **stages}})
    errors = ErrorCollector(recipe)
    planned = plan_stages(errors, Path("runs"))
    model_checks.check_hub_models(errors, planned)
    model_checks.check_revisions(errors, planned)
    model_checks.check_target_modules(errors, planned)
    return errors.lines


def test_target_modules_are_compared_with_the_model_that_the_chain_starts_from(tmp_path: Path):
    lora = {"r": 4, "alpha": 8, "target_modules": ["query_key_value"]}
    reward = {"model": "sft", "lora": lora}
    (line,) = lines(sft=SFT, reward=reward)
    assert "reward.lora.target_modules: the model has no query_key_value; its parts are " in line
    assert line.endswith("down_proj, embed_tokens, gate_proj, k_proj, lm_head, o_proj, q_proj, "
                         "up_proj, v_proj")  # fmt: skip
    (line,) = lines(sft={"model": str(model(tmp_path / "base"))}, reward=reward)
    assert line.endswith("its parts are q_proj, up_proj")
    assert not lines(sft=SFT, reward=reward | {"lora": lora | {"target_modules": ["q_proj"]}})
    (line,) = lines(sft=SFT, reward=reward | {"lora": lora | {"target_modules": ["q_proj", "W"]}})
    assert "the model has no W; its parts" in line
    (line,) = lines(sft=SFT, reward=reward | {"lora": lora | {"target_modules": "q_proj"}})
    assert line.endswith("write a list: [q_proj]")
    (line,) = lines(sft=SFT, reward=reward | {"lora": lora | {"target_modules": []}})
    assert "an empty list" in line
    assert not lines(sft=SFT, reward=reward | {"lora": lora | {"target_modules": "all-linear"}})
    (line,) = lines(sft=SFT, reward=reward | {"lora": lora | {"target_modules": ".*query.*"}})
    assert "target_modules: .*query.* matches the whole name of no module, such as model." in line
    assert not lines(
        sft=SFT, reward=reward | {"lora": lora | {"target_modules": r".*\.0\..*q_proj"}}
    )
    (line,) = lines(sft=SFT, reward=reward | {"lora": lora | {"target_modules": "*"}})
    assert "no regular expression: *" in line


def test_a_model_on_the_hub_is_looked_up_at_its_revision():
    cached("tiny", "v2")
    assert not lines(sft={"model": "acme/tiny", "revision": "v2"})
    (line,) = lines(sft={"model": "acme/tiny", "revision": "v3"})
    assert "sft.model: acme/tiny: no such folder, not in the cache" in line


@pytest.mark.parametrize("model", ["sft", {"vocab_size": 300}])
def test_a_revision_without_a_model_on_the_hub_is_an_error(model: Any):
    stage = {"stage": "dpo" if model == "sft" else "sft", "model": model, "revision": "v2"}
    (line,) = lines(sft=SFT, other=stage)
    assert "other.revision: `model` is not on the Hub, so it has no revision" in line


def test_the_config_of_a_cached_model_is_checked_for_its_role():
    cached("scorer", "main", architectures=["LlamaForSequenceClassification"], num_labels=1)
    cached("broken", "main", num_attention_heads=0)
    (line,) = lines(sft={"model": "acme/scorer"})
    assert "a LlamaForSequenceClassification, which predicts no next token" in line
    (line,) = lines(sft={"model": "acme/broken"})
    assert "`num_attention_heads` must be a whole number of at least 1, got 0" in line
    assert not lines(
        sft=SFT,
        sample={"model": "sft"},
        label={"judge": "acme/scorer", "completions": "sample"},
    )


def test_the_base_of_a_given_adapter_must_be_reachable(tmp_path: Path):
    adapter = model(tmp_path / "adapter")
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    config = {"base_model_name_or_path": "acme/tiny", "task_type": "CAUSAL_LM", "revision": COMMIT}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (line,) = lines(dpo={"model": str(adapter)})
    assert "dpo.model: acme/tiny: no such folder, not in the cache" in line
    cached("tiny", "main")
    assert not lines(dpo={"model": str(adapter)})
