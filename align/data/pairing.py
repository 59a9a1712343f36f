"""Pairs of preferences from scored completions: best against worst, best against any other, or all against all."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from random import Random
from typing import Any, Literal

from align.data.rows import DroppedError, Raw

Row = dict[str, Any]
Pairing = Literal["best_worst", "best_random", "all"]


@dataclass(frozen=True, slots=True)
class PairingResult:
    """Pairs, what was left out by reason, and the share of pairs whose label agrees with the scores (a tie counts half)."""

    rows: list[Row]
    dropped: dict[str, int]
    agreement: float


def pairs_from_scores(
    rows: Sequence[Row],
    scores: Sequence[float],
    *,
    pairing: Pairing,
    margin: float = 0.0,
    slope: float | None = None,
    max_pairs: int | None = None,
    seed: int = 0,
) -> PairingResult:
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
    return PairingResult(found, dict(dropped), agreeing / max(len(found), 1))


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


@dataclass(frozen=True, slots=True)
class PairingOptions:
    """How pairs are made. ``margin`` is the least difference of scores, ``ratio`` the least ratio of votes."""

    pairing: str = "best_worst"
    margin: float = 0.0
    ratio: float = 1.0
    languages: tuple[str, ...] = ()
    seed: int = 0


PairsOrDrops = Iterator[Raw | DroppedError]


def scored_pairs(
    prompt: object, scored: Sequence[tuple[float, Any]], options: PairingOptions
) -> PairsOrDrops:
    """Pair scored completions: best against worst, best against a random other, or all against all."""
    if len(scored) < 2:
        yield DroppedError("fewer than two scored completions")
        return
    ordered = sorted(scored, key=lambda item: -item[0])  # stable: ties stay as the source has them
    best, others = ordered[0], [item for item in ordered if item[0] < ordered[0][0]]
    if not others:
        yield DroppedError("all scores are equal")
        return
    wanted: list[tuple[tuple[float, Any], tuple[float, Any]]]
    if options.pairing == "all":
        wanted = [(a, b) for a, b in combinations(ordered, 2) if a[0] > b[0]]
    elif options.pairing == "best_random":
        # by the prompt, not by the place: adding rows changes nobody's pair
        wanted = [(best, random.Random(f"{options.seed}:{prompt}").choice(others))]
    else:
        wanted = [(best, others[-1])]
    for high, low in wanted:
        if high[0] - low[0] < options.margin:
            yield DroppedError("margin below the threshold")
        else:
            yield raw_pair(prompt, high[1], low[1], high[0] - low[0])


def raw_pair(prompt: object, chosen: object, rejected: object, margin: float | None) -> Raw:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "margin": margin}


def as_number(value: object) -> float | None:
    try:
        number = float(value)  # type: ignore[arg-type]  # also "7.5", as UltraFeedback has it
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) < float("inf") else None
