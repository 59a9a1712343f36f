"""The gold score of the embedded task: the exact quality of a completion.

A prompt requests a number of sentences in a tone, about a topic, with a thing mentioned::

    Write two cheerful sentences about the sea and mention a lantern.

A good answer is "The joyful gull dances near the pier. Today, the merry boat laughs with a
lantern." Every sentence is parsed by a small grammar, so text that only looks right (a list of
keywords, an unfinished sentence, a word that does not exist) scores 0. Imports the standard library
only.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from align.errors import DataError


@dataclass(frozen=True, slots=True)
class Topic:
    """The nouns of one topic: actors, and places of the action."""

    actors: tuple[str, ...]
    places: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Tone:
    """The words of one tone, each list from the strongest word to the mildest."""

    adjectives: tuple[str, ...]
    verbs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """The parts of a prompt's request."""

    count: int
    tone: str
    topic: str
    thing: str


def _topic(actors: str, places: str) -> Topic:
    return Topic(tuple(actors.split()), tuple(places.split()))


TOPICS: Final[Mapping[str, Topic]] = MappingProxyType(
    {
        "sea": _topic("gull sailor boat wave dolphin", "shore harbour reef pier"),
        "garden": _topic("rose bee gardener tulip snail", "hedge pond lawn fence"),
        "forest": _topic("fox deer owl oak ranger", "glade stream path thicket"),
        "kitchen": _topic("chef teapot loaf pie cook", "stove oven table pantry"),
        "market": _topic("trader baker buyer cart melon", "stall square counter tent"),
        "school": _topic("teacher pupil choir pencil class", "desk hallway gym playground"),
        "station": _topic("porter train driver traveller engine", "platform track tunnel bridge"),
        "farm": _topic("horse cow goat farmer hen", "barn field stable mill"),
        "mountain": _topic("climber eagle shepherd bear guide", "summit cave cliff valley"),
        "library": _topic("reader writer scholar book poem", "shelf archive corridor staircase"),
        "city": _topic("mayor taxi tram dancer pigeon", "street tower park fountain"),
        "castle": _topic("king queen knight prince jester", "gate moat throne courtyard"),
    }
)
TONES: Final[Mapping[str, Tone]] = MappingProxyType(
    {
        "cheerful": Tone(
            adjectives=("joyful", "merry", "happy", "playful", "sunny", "bright"),
            verbs=("dances", "laughs", "sings", "smiles", "skips", "beams"),
        ),
        "gloomy": Tone(
            adjectives=("dismal", "bleak", "sad", "lonely", "weary", "grey"),
            verbs=("weeps", "mourns", "sighs", "trembles", "shivers", "limps"),
        ),
        "calm": Tone(
            adjectives=("peaceful", "serene", "quiet", "gentle", "mellow", "soft"),
            verbs=("dreams", "rests", "sleeps", "drifts", "waits", "lingers"),
        ),
    }
)
# fmt: off
THINGS: Final = (
    "lantern", "kettle", "violin", "ribbon", "bicycle", "mirror", "candle",
    "basket", "clock", "letter", "feather", "drum", "map", "blanket",
)
# fmt: on
OPENINGS: Final = ("today", "tonight", "later", "sometimes", "again", "outside")
PREPOSITIONS: Final = ("near", "by", "beside", "behind", "past", "with")
COUNTS: Final[Mapping[str, int]] = MappingProxyType({"one": 1, "two": 2, "three": 3})
PHRASINGS: Final = (
    "Write {count} {tone} {sentences} about the {topic} and mention a {thing}.",
    "Describe the {topic} in {count} {tone} {sentences} and mention a {thing}.",
    "I need {count} {tone} {sentences} with a {thing}, all about the {topic}.",
)

WEIGHTS: Final = MappingProxyType({"topic": 0.3, "tone": 0.3, "count": 0.2, "mention": 0.2})
LABEL_SLOPE: Final = 7.5
"""Slope of the Bradley-Terry labels: a gold gap of 0.1 is preferred with sigmoid(0.75) = 0.68."""


def write_prompt(request: Request, phrasing: int) -> str:
    """Return the prompt for ``request``, worded as ``PHRASINGS[phrasing]``."""
    word = next(word for word, number in COUNTS.items() if number == request.count)
    sentences = "sentence" if request.count == 1 else "sentences"
    return PHRASINGS[phrasing].format(
        count=word, tone=request.tone, sentences=sentences, topic=request.topic, thing=request.thing
    )


def _all_prompts() -> dict[str, Request]:
    parts = itertools.product(COUNTS.values(), TONES, TOPICS, THINGS)
    requests, numbers = itertools.starmap(Request, parts), range(len(PHRASINGS))
    return {write_prompt(request, number): request for request in requests for number in numbers}


def _all_tags() -> dict[str, str]:
    """The part of speech of each word, as one letter."""
    classes = {"h": THINGS, "t": OPENINGS, "p": PREPOSITIONS, "d": ("the",), "a": ("a",)}
    classes["n"] = tuple(_TOPIC_OF)
    classes["j"] = tuple(word for tone in TONES.values() for word in tone.adjectives)
    classes["v"] = tuple(word for tone in TONES.values() for word in tone.verbs)
    return {word: letter for letter, words in classes.items() for word in words}


_REQUESTS = _all_prompts()
_TOPIC_OF = {w: name for name, topic in TOPICS.items() for w in (*topic.actors, *topic.places)}
_TAGS = _all_tags()
# The strongest word has 1.0, each following word 0.05 less, so that correct answers differ as well.
_STRENGTH = {
    word: (name, 1.0 - 0.05 * rank)
    for name, tone in TONES.items()
    for words in (tone.adjectives, tone.verbs)
    for rank, word in enumerate(words)
}
# "the (merry) gull", "a (merry) lantern", "a merry gull"; never "a owl".
_NOUN_PHRASE = "(?:dj?[nh]|aj?h|ajn)"
# "[Today,] the gull dances near the pier [with a lantern]" or "Near the pier, the gull dances …"
_SENTENCE = re.compile(
    f"(?:t,)?{_NOUN_PHRASE}v(?:p{_NOUN_PHRASE}){{1,2}}"
    f"|p{_NOUN_PHRASE},{_NOUN_PHRASE}v(?:p{_NOUN_PHRASE})?"
)


@dataclass(frozen=True, slots=True)
class GoldParts:
    """The parts of a completion's score, each in [0, 1].

    ``topic`` and ``tone`` are summed over the requested number of sentences and divided by the
    number of requested or written sentences, whichever is larger: missing and surplus sentences
    both cost.

    Attributes:
        readable: Share of the sentences that the grammar accepts; scales the total.
        variety: Share of the content words that are not repetitions; scales the total.
        topic: Share of the nouns that belong to the requested topic.
        tone: Strength of the words in the requested tone; a word of another tone counts zero.
        count: One minus the relative error of the number of sentences.
        mention: One over the number of things mentioned if the requested one is among them, else
        zero.
    """

    readable: float
    variety: float
    topic: float
    tone: float
    count: float
    mention: float

    @property
    def total(self) -> float:
        """The gold score, in [0, 1]."""
        weighted = sum(weight * float(getattr(self, part)) for part, weight in WEIGHTS.items())
        return self.readable * self.variety * weighted


def parse_prompt(prompt: str) -> Request:
    """Return the request of ``prompt``.

    Raises:
        ValueError: The prompt is not one of the embedded task's.
    """
    request = _REQUESTS.get(prompt.strip())
    if request is None:
        example = next(iter(_REQUESTS))
        raise ValueError(
            f"not a prompt of the embedded task: {prompt!r}; an example is {example!r}"
        )
    return request


def check_prompts(prompts: Iterable[str], *, repair: str) -> None:
    """Check that every prompt is one of the embedded task's.

    ``repair`` ends the error message: what to set where ``gold`` cannot score the prompts.

    Raises:
        DataError: A prompt is not one of the embedded task's.
    """
    for prompt in prompts:
        try:
            parse_prompt(prompt)
        except ValueError as error:
            message = f"`gold` scores only prompts of the embedded task; {error}; {repair}"
            raise DataError(message) from None


def _parse_sentence(sentence: str) -> list[str]:
    """Return the words of a sentence (" The gull …", no full stop), or none if not readable."""
    if not sentence[1:2].isupper() or sentence[0] != " ":
        return []
    marked = (sentence[1].lower() + sentence[2:]).split(" ")
    words = [word.removesuffix(",") for word in marked]
    tags = [_TAGS.get(word.removesuffix(","), "?") + "," * word.endswith(",") for word in marked]
    return words if _SENTENCE.fullmatch("".join(tags)) else []


def gold_parts(prompt: str, completion: str) -> GoldParts:
    """Score ``completion`` against the request of ``prompt``, part by part.

    Raises:
        ValueError: The prompt is not one of the embedded task's.
    """
    request = parse_prompt(prompt)
    # Sentences are one space apart; text after the last full stop is an unfinished sentence.
    *sentences, unfinished = (" " + completion.strip()).split(".")
    parsed = [_parse_sentence(text) for text in sentences] + ([[]] if unfinished.strip() else [])
    content = [word for words in parsed for word in words if _TAGS[word] in "njvht"]
    if not content:
        return GoldParts(readable=0, variety=0, topic=0, tone=0, count=0, mention=0)

    def on_topic(words: list[str]) -> float:
        topics = [_TOPIC_OF[word] for word in words if word in _TOPIC_OF]
        return topics.count(request.topic) / len(topics) if topics else 0.0

    def in_tone(words: list[str]) -> float:
        toned = [_STRENGTH[word] for word in words if word in _STRENGTH]
        strengths = [strength for tone, strength in toned if tone == request.tone]
        return sum(strengths) / len(toned) if toned else 0.0

    requested = parsed[: request.count]
    shared_by = max(request.count, len(parsed))
    things = [word for word in content if word in THINGS]
    return GoldParts(
        readable=sum(map(bool, parsed)) / len(parsed),
        variety=len(set(content)) / len(content),
        topic=sum(map(on_topic, requested)) / shared_by,
        tone=sum(map(in_tone, requested)) / shared_by,
        count=max(0.0, 1 - abs(len(parsed) - request.count) / request.count),
        mention=1 / len(things) if request.thing in things else 0.0,
    )


def gold_score(prompt: str, completion: str) -> float:
    """Return the score of ``completion`` as an answer to ``prompt``, in [0, 1].

    Raises:
        ValueError: The prompt is not one of the embedded task's.
    """
    return gold_parts(prompt, completion).total


def preference_probability(prompt: str, first: str, second: str) -> float:
    """Return the Bradley-Terry probability that ``first`` has the higher gold score.

    The labels of the embedded task are drawn with this probability.

    Raises:
        ValueError: The prompt is not one of the embedded task's.
    """
    gap = gold_score(prompt, first) - gold_score(prompt, second)
    return 1 / (1 + math.exp(-LABEL_SLOPE * gap))


def rewards(
    prompts: Sequence[Sequence[Mapping[str, str]]], completions: Sequence[str]
) -> list[float]:
    """Return gold scores, as a reward function for ``rewards: ["align.rewards.gold:rewards"]``.

    Raises:
        ValueError: A prompt is not one of the embedded task's.
    """
    return [
        gold_score(prompt[-1]["content"], completion)
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
