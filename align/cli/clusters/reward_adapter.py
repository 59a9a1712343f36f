"""Reward functions of an Align recipe for verl (`compute_score`) and OpenRLHF (`reward_func`).

`align export --for` copies this file as `align_reward.py` beside `align_reward.json`, which has the
functions, their weights and the end tokens. It needs the standard library, the functions, and torch
for OpenRLHF. A function is called with one completion at a time.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
SETTINGS = FOLDER / "align_reward.json"


@functools.cache
def settings() -> dict[str, Any]:
    """The settings beside this file."""
    loaded: dict[str, Any] = json.loads(SETTINGS.read_text(encoding="utf-8"))
    return loaded


@functools.cache
def load(address: str) -> Callable[..., Any]:
    """The function ``module:function``; modules beside this file come first."""
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    module, _, name = address.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def score(row: Mapping[str, Any], completion: str) -> dict[str, float]:
    """The score of each function, and the weighted sum as ``score``.

    ``row`` has the messages of the prompt, and the columns of its row.

    Raises:
        ValueError: A function returns anything but a finite number.
    """
    scores: dict[str, float] = {}
    total = 0.0
    for reward in settings()["rewards"]:
        columns = dict(row["columns"])
        if reward["answer"] is not None:
            columns["answer"] = reward["answer"]
        elif reward["answer_column"] is not None:
            columns["answer"] = columns[reward["answer_column"]]
        value = _call(load(reward["address"]), row["prompt"], completion, columns, reward["name"])
        scores[reward["name"]] = value
        total += reward["weight"] * value
    return {**scores, "score": total}


def _call(
    function: Callable[..., Any],
    prompt: Sequence[Mapping[str, Any]],
    completion: str,
    columns: Mapping[str, Any],
    name: str,
) -> float:
    parameters = inspect.signature(function).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    options = {k: [v] for k, v in columns.items() if takes_all or k in parameters}
    messages = [{**message} for message in prompt]
    result = list(function(prompts=[messages], completions=[completion], **options))
    if len(result) != 1 or result[0] is None or not math.isfinite(float(result[0])):
        raise ValueError(f"{name}: expected one finite number, got {result!r:.80}")
    return float(result[0])


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: Mapping[str, Any] | None = None,
    **other: Any,
) -> dict[str, float]:
    """The reward function of verl; ``ground_truth`` is the row as JSON."""
    return score(json.loads(ground_truth), solution_str)


def reward_func(
    queries: Sequence[str], prompts: Sequence[str], labels: Sequence[str]
) -> dict[str, Any]:
    """The reward function of OpenRLHF; a label is the row as JSON, a query has its completion.

    Raises:
        ValueError: A query does not begin with the prompt of its row.
    """
    import torch

    rewards, parts = [], []
    for query, label in zip(queries, labels, strict=True):
        row = json.loads(label)
        if not query.startswith(row["head"]):
            raise ValueError(f"the query {query!r:.80} does not begin with its prompt")
        text = query[len(row["head"]) :]
        finished = text.endswith(tuple(settings()["ends"]))
        for token in settings()["special_tokens"]:  # longest first
            text = text.replace(token, "")
        scores = score(row, text)
        penalty = 0.0 if finished else settings()["missing_eos_penalty"]
        rewards.append(scores.pop("score") - penalty)
        parts.append(scores)
    tensor = torch.tensor(rewards)
    logs = {name: torch.tensor([each[name] for each in parts]) for name in parts[0]}
    return {"rewards": tensor, "scores": tensor, "extra_logs": logs}
