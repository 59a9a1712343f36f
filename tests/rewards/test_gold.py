"""The gold score of the embedded task: values by hand, and texts that must score 0."""

import math
import time

import pytest

from align.rewards import gold

ONE = "I need one calm sentence with a drum, all about the farm."
TWO = "Write two cheerful sentences about the sea and mention a lantern."
THREE = "Describe the castle in three gloomy sentences and mention a map."

# Strengths, 0.05 apart: joyful 1, merry .95, happy .9 … bright .75; dances 1, laughs .95 … beams
# .75
FIRST = "The joyful gull dances near the pier."
SECOND = "Today, the merry boat laughs beside the reef with a lantern."


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        # tone: (mean(1, 1) + mean(.95, .95)) / 2 = .975;  .3 + .3 * .975 + .2 * 1 + .2 * 1
        pytest.param(f"{FIRST} {SECOND}", 0.9925, id="all parts correct"),
        # no lantern: .9925 - .2
        pytest.param(
            f"{FIRST} Today, the merry boat laughs beside the reef.", 0.7925, id="mention forgotten"
        ),
        # a drum in place of the lantern: the same
        pytest.param(
            f"{FIRST} Today, the merry boat laughs beside the reef with a drum.",
            0.7925,
            id="another thing",
        ),
        # drum and lantern: mention 1/2, .9925 - .2 / 2
        pytest.param(
            f"The joyful gull dances near the pier with a drum. {SECOND}",
            0.8925,
            id="a stray thing",
        ),
        # the fox belongs to the forest: topic (1/2 + 1) / 2 = .75;  .3 * .75 + .3 * .975 + .2 + .2
        pytest.param(
            f"The joyful fox dances near the pier. {SECOND}", 0.9175, id="one noun off the topic"
        ),
        # weeps is gloomy: tone (mean(1, 0) + .95) / 2 = .725;  .3 + .3 * .725 + .2 + .2
        pytest.param(
            f"The joyful gull weeps near the pier. {SECOND}", 0.9175, id="one word in another tone"
        ),
        # happy .9, sings .9, then bright .75, beams .75: tone (.9 + .75) / 2 = .825;  .7 + .3 *
        # .825
        pytest.param(
            "The happy gull sings near the pier. The bright boat beams past the reef with a lantern.",
            0.9475,
            id="milder words",
        ),
        # topic 1/2, tone .95/2, count 1 - 1/2, mention 1;  .15 + .1425 + .1 + .2
        pytest.param(SECOND, 0.5925, id="a sentence missing"),
        # shared by 3: topic 2/3, tone 1.95/3, count 1/2, mention 1;  .2 + .195 + .1 + .2
        pytest.param(
            f"{FIRST} {SECOND} The happy sailor sings by the shore.", 0.695, id="a surplus sentence"
        ),
        # gull twice: 9 of 10 content words are new;  .9 * .9925
        pytest.param(
            f"{FIRST} Today, the merry gull laughs beside the reef with a lantern.",
            0.89325,
            id="a noun repeated",
        ),
        # twice the same: 6 of 12 words new; tone .95; mention 1/2;  .5 * (.3 + .285 + .2 + .1)
        pytest.param(f"{SECOND} {SECOND}", 0.4425, id="a sentence repeated"),
        # "gull dances" has no article: readable 1/2; topic 1/2, tone .95/2, count 1, mention 1
        # .5 * (.15 + .1425 + .2 + .2)
        pytest.param(
            f"Joyful gull dances near the pier. {SECOND}", 0.34625, id="an unreadable sentence"
        ),
        # unfinished: the same as unreadable
        pytest.param(f"{SECOND} The joyful gull dances near", 0.34625, id="cut short"),
    ],
)
def test_gold_by_hand(completion: str, expected: float) -> None:
    assert gold.gold_score(TWO, completion) == pytest.approx(expected)


def test_parts_by_hand() -> None:
    # In the second sentence, one of two nouns is off the topic, no word has the tone, and one of
    # two things is the requested one. The third is missing. The king occurs twice among 10 words.
    text = "The dismal king weeps by the gate with a map. The soft king rests near the pier with a drum."
    parts = gold.gold_parts(THREE, text)
    assert parts.readable == 1
    assert parts.variety == pytest.approx(9 / 10)
    assert parts.topic == pytest.approx((1 + 1 / 2) / 3)
    assert parts.tone == pytest.approx((1 + 0) / 3)
    assert parts.count == pytest.approx(1 - 1 / 3)
    assert parts.mention == pytest.approx(1 / 2)
    # .9 * (.3 * .5 + .3 / 3 + .2 * 2 / 3 + .2 / 2)
    assert parts.total == pytest.approx(0.9 * (0.15 + 0.1 + 0.4 / 3 + 0.1))


@pytest.mark.parametrize(
    "sentence",
    [
        "The gull dances near the pier.",
        "The gull dances near the pier with a lantern.",
        "Outside, the merry gull dances with a happy lantern.",
        "Near the pier, a merry gull dances.",
        "Near the pier, the merry gull dances with the lantern.",
        "A lantern dances beside the gull.",
    ],
)
def test_the_grammar_reads(sentence: str) -> None:
    assert gold.gold_parts(TWO, sentence).readable == 1


@pytest.mark.parametrize(
    "sentence",
    [
        "the gull dances near the pier.",
        "The gull dances.",
        "The gull dances near pier.",
        "The gull gull dances near the pier.",
        "The gull dances near the piers.",
        "The gull near the pier.",
        "A gull dances near the pier.",
        "Today the gull dances near the pier.",
        "The gull, dances near the pier.",
        "The gull  dances near the pier.",
        "The gull dances near the pier",
        "The gull dances near the pier!",
        "The Gull dances near the pier.",
        "The gull dances near the pier by the reef past the shore.",
        "sea cheerful lantern gull boat joyful merry",
        "Lantern lantern lantern.",
        "...",
        "",
        "\n",
        TWO,
    ],
)
def test_unreadable_text_scores_0(sentence: str) -> None:
    assert gold.gold_score(TWO, sentence) == 0


def test_degenerate_answers_score_low() -> None:
    best = f"{FIRST} {SECOND}"
    assert gold.gold_score(TWO, " ".join([SECOND] * 10)) < 0.1
    assert gold.gold_score(TWO, " ".join([FIRST] * 2)) < 0.45
    assert gold.gold_score(TWO, " ".join([best] * 3)) < 0.25
    assert gold.gold_score(TWO, best.replace(". ", ".")) < 0.4
    assert gold.gold_score(TWO, best + " Lantern lantern lantern.") < 0.5


def test_sentences_are_separated_by_one_space() -> None:
    assert gold.gold_parts(TWO, f"{FIRST} {SECOND}").readable == 1
    assert gold.gold_parts(TWO, f"{FIRST}x{SECOND}").readable == 1 / 2
    assert gold.gold_parts(TWO, f"{FIRST}  {SECOND}").readable == 1 / 2


def test_no_part_is_negative() -> None:
    # 1 - |3 - 1| / 1 = -1, and no part is below 0
    assert gold.gold_parts(ONE, f"{FIRST} {SECOND} {FIRST}").count == 0


def test_a_perfect_sentence_scores_1() -> None:
    text = "The peaceful hen dreams near the barn with a drum."
    assert gold.gold_score(ONE, text) == pytest.approx(1)
    assert gold.gold_score(ONE, f"\n{text} ") == pytest.approx(1)


@pytest.mark.parametrize("prompt", ["", "Hello.", TWO.replace("two", "four"), TWO + " Now."])
def test_another_prompt_is_an_error_of_one_line(prompt: str) -> None:
    with pytest.raises(ValueError, match="not a prompt of the embedded task") as error:
        gold.gold_score(prompt, FIRST)
    assert "\n" not in str(error.value)


def test_every_phrasing_has_the_same_request() -> None:
    request = gold.Request(count=1, tone="calm", topic="farm", thing="drum")
    prompts = [gold.write_prompt(request, number) for number in range(len(gold.PHRASINGS))]
    assert ONE in prompts
    assert len(set(prompts)) == 3
    assert {gold.parse_prompt(prompt) for prompt in prompts} == {request}


def test_each_word_has_one_part_of_speech_and_one_topic() -> None:
    nouns = [word for topic in gold.TOPICS.values() for word in (*topic.actors, *topic.places)]
    toned = [word for tone in gold.TONES.values() for word in (*tone.adjectives, *tone.verbs)]
    words = [*nouns, *toned, *gold.THINGS, *gold.OPENINGS, *gold.PREPOSITIONS, "a", "the"]
    assert len(words) == len(set(words))
    # "a" precedes an adjective or a thing: none may begin with a vowel.
    assert not [word for word in (*gold.THINGS, *toned) if word[0] in "aeiou"]


def test_preference_probability_by_hand() -> None:
    # Gold .9925 and .7925: sigmoid(7.5 * .2) = 1 / (1 + e^-1.5)
    better, worse = f"{FIRST} {SECOND}", f"{FIRST} Today, the merry boat laughs beside the reef."
    expected = 1 / (1 + math.exp(-1.5))
    assert gold.preference_probability(TWO, better, worse) == pytest.approx(expected)
    assert gold.preference_probability(TWO, worse, better) == pytest.approx(1 - expected)
    assert gold.preference_probability(TWO, better, better) == 0.5


def test_two_thousand_scores_take_less_than_a_second() -> None:
    start = time.process_time()
    for _ in range(2000):
        gold.gold_score(TWO, f"{FIRST} {SECOND}")
    assert time.process_time() - start < 1
