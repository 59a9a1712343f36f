"""Pairs from scored completions: best against worst, best against a random other, or all pairs.

:func:`pairs_from_scores` pairs the sampled completions that a judge scored;
:func:`pair_completions` pairs the scored completions in one row of a public data set. Both select
candidates with :func:`candidate_pairs`. They differ in ties: sampled completions with equal scores
are counted as ties, those of a public data set are never candidates.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal, NamedTuple

from align.data.rows import DroppedError, Raw, Row
from align.errors import DataError

LARGEST_SCORE = 1e30
"""Largest absolute value of a score; differences of larger ones overflow in single precision."""
Pairing = Literal["best_worst", "best_random", "all"]
PairsOrDrops = Iterator[Raw | DroppedError]


class Scored(NamedTuple):
    """A completion, in the form that its source has, with its score."""

    score: float
    completion: Any


def candidate_pairs(
    scored: Sequence[Scored], pairing: Pairing, random: Random
) -> Iterator[tuple[Scored, Scored]]:
    """Completions to compare.

    For ``all``, pairs are in the order of ``scored``; otherwise the best comes first. Completions
    with equal scores keep their order. ``best_random`` takes one draw from ``random``.
    """
    if pairing == "all":
        yield from itertools.combinations(scored, 2)
        return
    best, *others = sorted(scored, key=lambda item: item.score, reverse=True)
    yield best, others[-1] if pairing == "best_worst" else random.choice(others)


# Completions of a stage `sample`, scored by a judge


@dataclass(frozen=True, slots=True)
class PairingResult:
    """Pairs, and the number of candidates dropped by reason.

    ``agreement`` is the share of pairs whose chosen completion has the higher score; a tie counts
    half.
    """

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
    """Pair the completions of each prompt; ``max_pairs`` limits the result to a random subset.

    Completions with the same text count once, and pairs whose scores differ by less than ``margin``
    are dropped. Without ``slope`` the completion with the higher score is chosen, and ties are
    dropped. With ``slope`` the label is drawn from the Bradley-Terry model of the scores,
    ``sigmoid(slope * difference)``, which models the noise of human labels.

    Raises:
        DataError: A score is not finite or very large, so that it orders no pair.
    """
    for row, score in zip(rows, scores, strict=True):
        if not is_usable(score):
            raise DataError(
                f"the score of {row['completion'][-1]['content']!r:.80} is {score}; scores must be "
                f"finite, at most {LARGEST_SCORE:g}: check the weights of the judge"
            )
    random = Random(seed)
    dropped: Counter[str] = Counter()
    pairs: list[Row] = []
    for completions in _distinct_completions(rows, scores, dropped):
        if len(completions) < 2:
            dropped["prompt with one completion"] += 1
            continue
        for first, second in candidate_pairs(completions, pairing, random):
            gap = first.score - second.score
            if abs(gap) < margin:
                dropped["gap below the margin"] += 1
            elif gap == 0 and slope is None:
                dropped["tie"] += 1
            else:
                probability = float(gap > 0) if slope is None else _sigmoid(slope * gap)
                first_wins = random.random() < probability
                pairs.append(_pair(*((first, second) if first_wins else (second, first))))
    pairs = _subsample(pairs, max_pairs, random, dropped)
    gaps = [row["chosen_score"] - row["rejected_score"] for row in pairs]
    agreement = sum(1.0 if gap > 0 else 0.5 if gap == 0 else 0.0 for gap in gaps)
    return PairingResult(pairs, dict(dropped), agreement / max(len(pairs), 1))


@dataclass(frozen=True, slots=True)
class Candidate:
    """Two completions of a prompt that a judge compares: the rows of both."""

    first: Row
    second: Row


def candidates(rows: Sequence[Row], dropped: Counter[str]) -> list[Candidate]:
    """All pairs of distinct completions of each prompt, in the order of the rows."""
    pairs = []
    for completions in _distinct_completions(rows, [0.0] * len(rows), dropped):
        if len(completions) < 2:
            dropped["prompt with one completion"] += 1
        combinations = itertools.combinations(completions, 2)
        pairs += [Candidate(one.completion, other.completion) for one, other in combinations]
    return pairs


def pairs_from_preferences(
    compared: Sequence[Candidate],
    preferences: Sequence[float],
    dropped: Counter[str],
    *,
    pairing: Pairing,
    max_pairs: int | None = None,
    seed: int = 0,
) -> PairingResult:
    """Pair completions by the decisions of a judge about all pairs of :func:`candidates`.

    A preference is that for the first completion: above one half it is chosen, at one half the pair
    is dropped as a tie, and NaN is a missing verdict. ``best_worst`` and ``best_random`` order the
    completions of a prompt by their mean preference over the others.
    """
    random = Random(seed)
    by_prompt: dict[str, dict[tuple[str, str], tuple[Candidate, float]]] = {}
    for pair, preference in zip(compared, preferences, strict=True):
        key = _text(pair.first), _text(pair.second)
        by_prompt.setdefault(pair.first["prompt_id"], {})[key] = pair, preference
    pairs: list[Row] = []
    for decided in by_prompt.values():
        scored = _mean_preferences(list(decided.values()))
        if len(scored) < 2:
            dropped["no usable verdict"] += 1
            continue
        for one, other in candidate_pairs(scored, pairing, random):
            key = _text(one.completion), _text(other.completion)
            preference = decided[key][1] if key in decided else 1 - decided[key[::-1]][1]
            if math.isnan(preference):
                dropped["no usable verdict"] += 1
            elif preference == 0.5:
                dropped["tie"] += 1
            else:
                sides = (one, other) if preference > 0.5 else (other, one)
                certainty = max(preference, 1 - preference)
                scores = {"chosen_score": certainty, "rejected_score": 1 - certainty}
                pairs.append(_pair(*sides) | scores)
    pairs = _subsample(pairs, max_pairs, random, dropped)
    return PairingResult(pairs, dict(dropped), 1.0 if pairs else 0.0)


def _mean_preferences(decided: Sequence[tuple[Candidate, float]]) -> list[Scored]:
    """The completions of a prompt with their mean preferences; those without verdict left out."""
    rows: dict[str, Row] = {}
    wins: dict[str, list[float]] = {}
    for pair, preference in decided:
        for row, won in ((pair.first, preference), (pair.second, 1 - preference)):
            rows.setdefault(_text(row), row)
            wins.setdefault(_text(row), []).extend([] if math.isnan(won) else [won])
    return [Scored(sum(each) / len(each), rows[text]) for text, each in wins.items() if each]


def _text(row: Row) -> str:
    text: str = row["completion"][-1]["content"]
    return text


def _subsample(
    pairs: list[Row], max_pairs: int | None, random: Random, dropped: Counter[str]
) -> list[Row]:
    if max_pairs is None or len(pairs) <= max_pairs:
        return pairs
    dropped["above `max_pairs`"] = len(pairs) - max_pairs
    return [pairs[i] for i in sorted(random.sample(range(len(pairs)), max_pairs))]


def is_usable(score: float) -> bool:
    """Whether a score is a number with which pairs can be ordered; False for NaN."""
    return abs(score) <= LARGEST_SCORE


def _distinct_completions(
    rows: Sequence[Row], scores: Sequence[float], dropped: Counter[str]
) -> Iterator[list[Scored]]:
    """The distinct completions of each prompt; ``completion`` is the whole row."""
    prompts: dict[str, dict[str, Scored]] = {}
    for row, score in zip(rows, scores, strict=True):
        completions = prompts.setdefault(row["prompt_id"], {})
        text = _text(row)
        if text in completions:
            dropped["same completion again"] += 1
        else:
            completions[text] = Scored(score, row)
    for completions in prompts.values():
        yield list(completions.values())


def _pair(chosen: Scored, rejected: Scored) -> Row:
    return {
        "prompt": chosen.completion["prompt"],
        "chosen": chosen.completion["completion"],
        "rejected": rejected.completion["completion"],
        "prompt_id": chosen.completion["prompt_id"],
        "chosen_score": chosen.score,
        "rejected_score": rejected.score,
    }


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else 1 - 1 / (1 + math.exp(x))


# Completions in one row of a public data set


@dataclass(frozen=True, slots=True)
class PairingOptions:
    """How the readers of public data sets make pairs."""

    pairing: Pairing = "best_worst"
    margin: float = 0.0
    """Smallest difference of scores."""
    ratio: float = 1.0
    """Smallest ratio of votes."""
    languages: tuple[str, ...] = ()
    """Languages that are kept; empty keeps all."""
    seed: int = 0
    """Seed of ``best_random``."""


def pair_completions(
    prompt: object, scored: Sequence[Scored], options: PairingOptions
) -> PairsOrDrops:
    """Pair the scored completions of one prompt, the higher score chosen."""
    usable = [item for item in scored if is_usable(item.score)]
    if len(usable) < len(scored):
        yield DroppedError("a score is not a finite number")
        return
    if len(scored) < 2:
        yield DroppedError("fewer than two scored completions")
        return
    ordered = sorted(scored, key=lambda item: -item.score)  # stable: ties keep the source's order
    best, lower = ordered[0], [item for item in ordered if item.score < ordered[0].score]
    if not lower:
        yield DroppedError("all scores are equal")
        return
    candidates = ordered if options.pairing == "all" else [best, *lower]
    random = Random(f"{options.seed}:{prompt}")  # by prompt: adding rows changes no other pair
    for high, low in candidate_pairs(candidates, options.pairing, random):
        if high.score == low.score:
            continue
        if high.score - low.score < options.margin:
            yield DroppedError("margin below the threshold")
        else:
            yield raw_pair(prompt, high.completion, low.completion, high.score - low.score)


def raw_pair(prompt: object, chosen: object, rejected: object, margin: float | None) -> Raw:
    """A raw row with a pair and the difference of its scores."""
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "margin": margin}
