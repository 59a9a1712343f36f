"""Values of ``config.json`` that no model can have, and heads that a stage cannot use.

Loads neither torch nor transformers, so that ``align plan`` answers in a second.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
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
WRITTEN_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
"""Special tokens that are in rows although no template writes them."""
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
    labels = config.get("num_labels") or config.get("id2label") or 2
    return len(labels) if isinstance(labels, dict | list | str) else int(labels)


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


def vocabulary_problem(
    source: Path | str,
    vocabulary: Mapping[str, int],
    *,
    special: Collection[str],
    written: Iterable[str | None],
    embeddings: int,
) -> str | None:
    """The error for a tokenizer with ids for which the model has no embedding.

    A ``special`` token that is in none of the texts ``written`` (the chat template, and the tokens
    of :data:`WRITTEN_TOKENS`) is in no row and does not count. Gemma 3's models for text have such
    a placeholder of an image.
    """
    texts = [text for text in written if text]
    unused = {token for token in special if not any(token in text for text in texts)}
    largest = max((i for token, i in vocabulary.items() if token not in unused), default=-1)
    if largest < embeddings:
        return None
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
