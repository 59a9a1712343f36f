"""Judges that score one completion at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_models

from align.errors import DataError
from align.judges import scores
from align.models.tokenization import assistant_turn
from align.rewards import gold

PROMPT = "Write two cheerful sentences about the sea and mention a lantern."
TEXTS = [
    "The joyful gull dances near the pier. Today, the merry boat laughs with a lantern.",
    "The merry boat laughs beside the reef with a lantern.",
    "",
]


def messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_gold_scores_the_last_message_of_each_completion():
    judge = scores.GoldJudge()
    prompts = [messages(PROMPT)] * len(TEXTS)
    judge.check_prompts(prompts, repair="")
    values = judge.score(prompts, [assistant_turn(text) for text in TEXTS], {})
    assert values == [gold.gold_score(PROMPT, text) for text in TEXTS]
    assert values[0] > values[1] > values[2] == 0


def test_gold_rejects_other_prompts_with_the_repair_of_the_caller():
    judge = scores.GoldJudge()
    with pytest.raises(DataError) as raised:
        judge.check_prompts([messages(PROMPT), messages("How are you?")], repair="set `judge`")
    (line,) = raised.value.lines
    assert line.startswith("`gold` scores only prompts of the embedded task; ")
    assert "'How are you?'" in line
    assert line.endswith("; set `judge`")


@pytest.mark.parametrize("n_rows", [1, 15, 16, 40])
def test_rows_keep_their_order_and_are_scored_in_chunks(n_rows: int, tmp_path: Path):
    calls: list[int] = []

    class Lengths:
        name = "lengths"

        def check_prompts(self, prompts: Any, *, repair: str) -> None: ...

        def score(self, prompts: Any, completions: Any, columns: Any) -> list[float]:
            calls.append(len(prompts))
            return [float(len(completion[0]["content"])) for completion in completions]

    rows = [{"prompt": messages("?"), "completion": assistant_turn("x" * k)} for k in range(n_rows)]
    logger = tiny_models.logger("label", tmp_path)
    values = scores.score_rows(Lengths(), rows, batch_size=1, logger=logger)
    assert values == [float(k) for k in range(n_rows)]
    assert max(calls) <= scores.BATCHES_PER_CHUNK
    assert len(calls) == -(-n_rows // scores.BATCHES_PER_CHUNK)
