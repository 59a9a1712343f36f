"""Values of ``config.json`` that no model can have, and heads that a stage cannot use.

Loads neither torch nor transformers, so that ``align plan`` answers in a second.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from align.errors import shown

Role = Literal["policy", "reward model"]
"""What a stage uses a model as."""
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "n_embd",
    "n_layer",
    "n_head",
    "n_positions",
)
_OTHER_HEAD = re.compile(r"For(?!CausalLM|ConditionalGeneration|ImageTextToText)[A-Z]")
"""A class of transformers whose head predicts no next token."""


def config_problems(file: Path, config: dict[str, Any], role: Role) -> list[str]:
    """Problems of the content of a ``config.json``: one line for each."""
    problems = [f"{file}: {problem}" for problem in _value_problems(config)]
    if problems:
        return problems
    head = other_head(config.get("architectures"), role)
    if head is None and role == "reward model" and _count_labels(config) != 1:
        head = f"a classifier with {_count_labels(config)} labels; a reward model must have 1"
    return [f"{file.parent}: {head}"] if head else []


def other_head(architectures: Any, role: Role) -> str | None:
    """The error if models of these classes have another head than their role requires.

    >>> other_head(["LlamaForSequenceClassification"], "policy")[:31]
    'a LlamaForSequenceClassificatio'
    >>> other_head(["LlamaForCausalLM"], "policy")
    """
    names = [str(name) for name in architectures] if isinstance(architectures, list) else []
    if role == "policy" and names and all(_OTHER_HEAD.search(name) for name in names):
        return (
            f"a {names[0]}, which predicts no next token and is not a policy; name a model with a "
            "language modeling head, such as the output of an `sft` stage"
        )
    if role == "reward model" and not any("ForSequenceClassification" in name for name in names):
        return (
            f"a {names[0] if names else 'model without `architectures`'}, which has no trained "
            "score head; a reward model is a sequence classifier: name a `reward` stage or its "
            "folder"
        )
    return None


def _count_labels(config: dict[str, Any]) -> int:
    """Number of labels of a classifier, which is 2 in transformers if it is not stated."""
    labels = config.get("num_labels", config.get("id2label", {"0": "", "1": ""}))
    return len(labels) if isinstance(labels, dict) else int(labels)


def adapter_problem(config: dict[str, Any], role: Role) -> str | None:
    """The error if an adapter with this ``adapter_config.json`` cannot have its role."""
    is_scorer = config.get("task_type") == "SEQ_CLS"
    if is_scorer and role == "policy":
        return "an adapter of a classifier or reward model, which is not a policy"
    if not is_scorer and role == "reward model":
        return "an adapter of a policy, which has no score head; name a `reward` stage"
    return None


def vocabulary_size(config: dict[str, Any]) -> int | None:
    """Number of embeddings according to a ``config.json``; None if it is not stated."""
    nested = config.get("text_config")
    size = config.get("vocab_size", nested.get("vocab_size") if isinstance(nested, dict) else None)
    return size if isinstance(size, int) else None


def largest_token_id(tokenizer: Path) -> int | None:
    """The largest id in a ``tokenizer.json``; None if the file is missing or of another shape."""
    try:
        content = json.loads(tokenizer.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        added = [token["id"] for token in content.get("added_tokens", [])]
        return max([*ids, *added], default=None)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # loading the tokenizer raises the error


def too_large(source: Path | str, largest: int, embeddings: int) -> str:
    """The error for a tokenizer with ids for which the model has no embedding."""
    return (
        f"{source}: its tokenizer has ids up to {largest}, but the model has {embeddings} "
        f"embeddings, for ids up to {embeddings - 1}; use the tokenizer of the model, or resize "
        "its embeddings with `resize_token_embeddings`"
    )


def _value_problems(config: dict[str, Any]) -> Iterator[str]:
    """Problems of the values, and of those of the language model in a larger model."""
    if "model_type" in config and not isinstance(config["model_type"], str):
        yield f"`model_type` must be text, got {shown(config['model_type'])}"
    names = config.get("architectures")
    if names is not None and not (
        isinstance(names, list) and all(isinstance(n, str) for n in names)
    ):
        yield f"`architectures` must be a list of names, got {shown(names)}"
    for key in _SIZES:
        value = config.get(key)
        if value is None or isinstance(value, list):  # a list has one size for each layer
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            yield f"`{key}` must be a whole number of at least 1, got {shown(value)}"
    nested = config.get("text_config")
    if isinstance(nested, dict):
        for problem in _value_problems(nested):
            yield f"`text_config`: {problem}"
