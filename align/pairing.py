"""Pairs of preferences from scored completions: best against worst, best against any other, or all against all."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

Row = dict[str, Any]
Pairing = Literal["best_worst", "best_random", "all"]


@dataclass(frozen=True, slots=True)
class Paired:
    """Pairs, what was left out by reason, and the share of pairs whose label agrees with the scores (a tie counts half)."""

    rows: list[Row]
    dropped: dict[str, int]
    agreement: float


def pairs(
    rows: Sequence[Row],
    scores: Sequence[float],
    *,
    pairing: Pairing,
    margin: float = 0.0,
    slope: float | None = None,
    max_pairs: int | None = None,
    seed: int = 0,
) -> Paired:
    """Pairs of the completions of each prompt, with their scores; ``max_pairs`` keeps so many of them, drawn at random.

    Completions with the same text count once. Without ``slope`` the higher score is chosen, and what ties is left out: nothing
    says which is better. With it labels are drawn from the Bradley-Terry model of the scores, ``sigmoid(slope * gap)``, noisy
    like people's. A gap below ``margin`` is left out either way.
    """
    random = Random(seed)
    dropped: Counter[str] = Counter()
    found: list[Row] = []
    for some in _by_prompt(rows, scores, dropped):
        if len(some) < 2:
            dropped["prompt with one completion"] += 1
        for first, second in _matches(some, pairing, random) if len(some) > 1 else ():
            gap = first["score"] - second["score"]
            if abs(gap) < margin:
                dropped["gap below the margin"] += 1
            elif gap == 0 and slope is None:
                dropped["tie"] += 1
            else:
                chance = float(gap > 0) if slope is None else _sigmoid(slope * gap)
                won = random.random() < chance
                found.append(_pair(*((first, second) if won else (second, first))))
    if max_pairs is not None and len(found) > max_pairs:
        dropped["above `max_pairs`"] = len(found) - max_pairs
        found = [found[i] for i in sorted(random.sample(range(len(found)), max_pairs))]
    gaps = [row["chosen_score"] - row["rejected_score"] for row in found]
    agreeing = sum(1.0 if gap > 0 else 0.5 if gap == 0 else 0.0 for gap in gaps)
    return Paired(found, dict(dropped), agreeing / max(len(found), 1))


def _by_prompt(
    rows: Sequence[Row], scores: Sequence[float], dropped: Counter[str]
) -> Iterator[list[Row]]:
    """The distinct completions of each prompt, with their scores."""
    prompts: dict[str, dict[str, Row]] = {}
    for row, score in zip(rows, scores, strict=True):
        some = prompts.setdefault(row["prompt_id"], {})
        text = row["completion"][-1]["content"]
        dropped["same completion again"] += text in some
        some.setdefault(text, row | {"score": score})
    for reason in [reason for reason, number in dropped.items() if not number]:
        del dropped[reason]
    for some in prompts.values():
        yield list(some.values())


def _matches(some: Sequence[Row], pairing: Pairing, random: Random) -> Iterator[tuple[Row, Row]]:
    if pairing == "all":
        yield from itertools.combinations(some, 2)
        return
    ordered = sorted(some, key=lambda row: row["score"], reverse=True)
    best, others = ordered[0], ordered[1:]
    yield best, others[-1] if pairing == "best_worst" else random.choice(others)


def _pair(chosen: Row, rejected: Row) -> Row:
    return {
        "prompt": chosen["prompt"],
        "chosen": chosen["completion"],
        "rejected": rejected["completion"],
        "prompt_id": chosen["prompt_id"],
        "chosen_score": chosen["score"],
        "rejected_score": rejected["score"],
    }


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else 1 - 1 / (1 + math.exp(x))
