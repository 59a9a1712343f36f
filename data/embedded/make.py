"""Write the embedded data set: demonstrations of mixed quality, and pairs with noisy labels.

Every run writes the same bytes. It needs `align` to be installed::

    python data/embedded/make.py
"""

import gzip
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final

from align.rewards import gold

SEED: Final = 20260101
DEMONSTRATIONS_PER_PROMPT: Final = 3
PAIRS: Final = 4000


@dataclass(frozen=True, slots=True)
class Slips:
    """Probability of each slip on an average day of the simulated writer."""

    count: float = 0.4
    mention: float = 0.5
    other_thing: float = 0.03
    topic_sentence: float = 0.18
    topic_word: float = 0.08
    tone_sentence: float = 0.38
    repeat_word: float = 0.1
    repeat_sentence: float = 0.06
    drop_word: float = 0.03


SLIPS: Final = Slips()
# Factors of a careful, an average and a careless day: slips are correlated, as with people.
DAYS: Final = (0.4, 1.0, 1.6)


def all_prompts(rng: Random) -> dict[str, gold.Request]:
    """Every combination once, in one random phrasing: a held-out prompt is a new combination."""
    choices = itertools.product(gold.COUNTS.values(), gold.TONES, gold.TOPICS, gold.THINGS)
    requests = itertools.starmap(gold.Request, choices)
    return {
        gold.write_prompt(request, rng.randrange(len(gold.PHRASINGS))): request
        for request in requests
    }


def write_completion(rng: Random, request: gold.Request) -> str:
    """An answer to ``request`` by the simulated writer on a random day, with slips."""
    day = rng.choice(DAYS)

    def slips(chance: float) -> bool:
        return rng.random() < chance * day

    count = request.count
    if slips(SLIPS.count):
        count = rng.choice([number for number in gold.COUNTS.values() if number != request.count])
    thing = "" if slips(SLIPS.mention) else request.thing
    if slips(SLIPS.other_thing):
        thing = rng.choice(gold.THINGS)
    holder = rng.randrange(count)

    used: list[str] = []
    sentences: list[str] = []

    def pick(words: Sequence[str]) -> str:
        fresh = [word for word in words if word not in used] or list(words)
        again = [word for word in words if word in used]
        word = rng.choice(again if again and slips(SLIPS.repeat_word) else fresh)
        used.append(word)
        return word

    def stray(correct: str, names: Iterable[str], chance: float) -> str:
        others = [name for name in names if name != correct]
        return rng.choice(others) if slips(chance) else correct

    for number in range(count):
        if sentences and number != holder and slips(SLIPS.repeat_sentence):
            sentences.append(sentences[-1])
            continue
        tone = gold.TONES[stray(request.tone, gold.TONES, SLIPS.tone_sentence)]
        theme = stray(request.topic, gold.TOPICS, SLIPS.topic_sentence)
        actors = gold.TOPICS[stray(theme, gold.TOPICS, SLIPS.topic_word)].actors
        places = gold.TOPICS[stray(theme, gold.TOPICS, SLIPS.topic_word)].places
        actor = f"the {pick(tone.adjectives)} {pick(actors)}"
        verb = pick(tone.verbs)
        place = f"{rng.choice(gold.PREPOSITIONS[:-1])} the {pick(places)}"
        shape = rng.random()
        if shape < 0.6:
            text = f"{actor} {verb} {place}"
        elif shape < 0.8:
            text = f"{pick(gold.OPENINGS)}, {actor} {verb} {place}"
        else:
            text = f"{place}, {actor} {verb}"
        if thing and number == holder:
            text += f" with a {thing}"
        words = text.split(" ")
        if slips(SLIPS.drop_word):
            del words[rng.randrange(len(words))]
        text = " ".join(words)
        sentences.append(text[0].upper() + text[1:] + ".")
    return " ".join(sentences)


def make_demonstrations(rng: Random, prompts: dict[str, gold.Request]) -> list[dict[str, str]]:
    """Three answers to every prompt, in random order."""
    rows = [
        {"prompt": prompt, "completion": write_completion(rng, request)}
        for prompt, request in prompts.items()
        for _ in range(DEMONSTRATIONS_PER_PROMPT)
    ]
    rng.shuffle(rows)
    return rows


def make_pairs(rng: Random, prompts: dict[str, gold.Request]) -> list[dict[str, str]]:
    """Two different answers to a random prompt, labeled by the Bradley-Terry model of gold."""
    names = list(prompts)
    rows: list[dict[str, str]] = []
    while len(rows) < PAIRS:
        prompt = rng.choice(names)
        first, second = (write_completion(rng, prompts[prompt]) for _ in range(2))
        if first == second:
            continue
        if rng.random() >= gold.preference_probability(prompt, first, second):
            first, second = second, first
        rows.append({"prompt": prompt, "chosen": first, "rejected": second})
    return rows


def encode(rows: list[dict[str, str]]) -> bytes:
    """JSONL, compressed without file name and time, so that equal rows give equal bytes."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    return gzip.compress(text.encode(), compresslevel=9, mtime=0)


def make_files() -> dict[str, bytes]:
    """Content of each file, by its name."""
    prompts = all_prompts(Random(SEED))
    return {
        "demonstrations.jsonl.gz": encode(make_demonstrations(Random(SEED + 1), prompts)),
        "pairs.jsonl.gz": encode(make_pairs(Random(SEED + 2), prompts)),
    }


def main() -> None:
    """Write the files into the folder of this script."""
    for name, content in make_files().items():
        Path(__file__).with_name(name).write_bytes(content)


if __name__ == "__main__":
    main()
