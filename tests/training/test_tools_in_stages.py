"""Every stage trains on the tools, tool calls and reasoning of its rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_models
from helpers.preference_data import assistant, run_prepare, user, write_jsonl
from models.test_turn_fields import QWEN3

from align.config.data import Prepare
from align.config.training import Reward
from align.data import tables
from align.models import tokenization
from align.training import token_view
from align.training.reward_rows import tokenize_pairs

TOOLS = [{"name": "weather", "description": "Looks out."}]
CALL = {**assistant(""), "tool_calls": [{"name": "weather", "arguments": {"city": "Rom"}}]}
PROMPT = [user("Rain?"), CALL, {"role": "tool", "content": "It rains."}]
REASONED = {**assistant("Yes."), "reasoning_content": "It rains, so yes."}
WRITTEN = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rom"}}\n</tool_call>'
PAIRS = [
    {"prompt": PROMPT, "chosen": [REASONED], "rejected": [CALL], "tools": TOOLS},
    {"prompt": "Sun?", "chosen": "Yes.", "rejected": "No."},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose template writes tools, calls and reasoning."""
    world = tiny_models.world(tmp_path_factory.getbasetemp())
    folder = tmp_path_factory.mktemp("tools") / "model"
    shutil.copytree(world.sft, folder)
    (folder / "chat_template.jinja").write_text(QWEN3)
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stage", ["sft", "dpo", "kto", "reward", "ppo"])
def test_the_rows_of_a_stage_contain_all_of_a_conversation(stage: str, model: Path, tmp_path: Path):
    source = write_jsonl(tmp_path / "a.jsonl", PAIRS[:1])
    config = Prepare(source=source, test_fraction=0.0)
    rows = token_view.tokenized_rows(config, stage, str(model), 2)
    assert len(rows) == (1 if stage == "ppo" else 2)  # sft: this template rewrites earlier turns
    texts = ["".join(row.tokens) for row in rows]
    for text in texts:
        assert text.startswith('<|im_start|>system\n{"type": "function", "function": {"name": "wea')
    for text in texts[stage == "sft" :]:
        assert f"{WRITTEN}<|im_end|>\n<|im_start|>user\n<tool_response>\nIt rains." in text
    if stage in ("sft", "dpo", "kto"):
        trained = [
            "".join(t for t, flag in zip(row.tokens, row.trained, strict=True) if flag)
            for row in rows
        ]
        written = [
            "<think>\nIt rains, so yes.\n</think>\n\nYes.<|im_end|>",
            f"<think>\n\n</think>\n\n{WRITTEN}<|im_end|>",
        ]
        assert trained == (written[::-1] if stage == "sft" else written)


def test_stages_read_the_tools_of_prepared_tables(model: Path, tmp_path: Path):
    from align.stages.kto import labeled_rows

    source = write_jsonl(tmp_path / "a.jsonl", PAIRS)
    run_prepare(Prepare(source=source, test_fraction=0.0), tmp_path / "data")
    rows: Any = labeled_rows(tmp_path / "data", "train", tmp_path)
    with_tools = [
        json.loads(row["prompt"][0]["tools"]) for row in rows if row["prompt"][0]["tools"]
    ]
    assert with_tools == [[{"type": "function", "function": TOOLS[0]}]] * 2
    tokenizer = tokenization.load_tokenizer(model)
    pairs = tables.load_dataset(tmp_path / "data", "pairs", "train", tmp_path)
    tokenized: Any = tokenize_pairs(pairs, tokenizer, Reward(model="sft"))
    read = tables.read(tmp_path / "data", "pairs", "train")
    prompts = [row["prompt"] for row in read]
    chosen = [row["chosen"] for row in read]
    assert tokenized["chosen_ids"] == tokenization.tokenize_for_reward(tokenizer, prompts, chosen)
    assert "Looks out." in tokenizer.decode(tokenized["chosen_ids"][0])
