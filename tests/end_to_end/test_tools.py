"""A recipe of all stages on conversations with tools, in ShareGPT's layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from helpers.preference_data import write_jsonl
from helpers.recipe_runs import run
from models.test_turn_fields import QWEN3, tokenizer_of
from transformers import LlamaConfig, LlamaForCausalLM

from align.data import tables

pytestmark = pytest.mark.slow

TRAINER = {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "bf16": False,
           "gradient_checkpointing": False, "save_strategy": "no"}  # fmt: skip
RECIPE = {"stages": {
    "prepare": {"source": "a.jsonl", "test_fraction": 0.3},
    "sft": {"model": "model", "trainer": TRAINER},
    "dpo": {"model": "sft", "trainer": TRAINER},
    "kto": {"model": "sft", "trainer": TRAINER},
    "reward": {"model": "sft", "trainer": TRAINER},
    "ppo": {"model": "sft", "rewards": ["reward"], "steps": 1, "batch_size": 4, "epochs": 1,
            "max_new_tokens": 4, "micro_batch_size": 4},
    "sample": {"model": "dpo", "n_completions": 6, "max_new_tokens": 300, "n_prompts": 2},
    "label": {"completions": "sample", "judge": "reward"},
    "evaluate": {"policies": ["dpo", "ppo"], "baseline": "sft", "judge": "reward",
                 "max_new_tokens": 4},
}}  # fmt: skip
TOOLS = json.dumps([{"name": "rain", "description": "Is it raining?"}])


def turns(city: str) -> list[dict[str, str]]:
    call = json.dumps({"name": "rain", "arguments": {"city": city}})
    return [
        {"from": "human", "value": f"Rain in {city}?"},
        {"from": "function_call", "value": call},
        {"from": "observation", "value": '{"rain": true}'},
    ]


def test_every_stage_reads_conversations_with_tools(tmp_path: Path):
    tokenizer = tokenizer_of(QWEN3)
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_attention_heads=2, max_position_embeddings=1024, **shape
    )
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [
        {
            "conversations": turns(f"City {k}"),
            "chosen": {"from": "gpt", "value": f"It rains in City {k}."},
            "rejected": turns(f"City {k + 1}")[1],
            "tools": TOOLS,
        }
        for k in range(24)
    ]
    write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    assert run(tmp_path / "runs") == 0, (tmp_path / "log").read_text()[-3000:]
    log = (tmp_path / "log").read_text()
    assert "prepare: recognized: a.jsonl as ShareGPT, columns {prompt: conversations}" in log
    assert "prepare: rows with more than text: `tool_calls` in 24, `tools` in 24" in log
    for stage, kind in (("prepare", "pairs"), ("sample", "completions"), ("label", "pairs")):
        (folder,) = (tmp_path / "runs").glob(f"{stage}-*")
        for row in tables.read(folder, kind, "train"):
            asked, called, result = row["prompt"]
            assert json.loads(asked["tools"])[0]["function"]["name"] == "rain"
            assert called["tool_calls"][0]["function"]["name"] == "rain"
            assert result == {"role": "tool", "content": '{"rain": true}'}
    (evaluation,) = (tmp_path / "runs").glob("evaluate-*/comparisons.parquet")
    assert "tools" in pq.read_table(evaluation)["messages"][0].as_py()[0]
