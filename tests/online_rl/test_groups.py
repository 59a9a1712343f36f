"""Groups with equal scores are replaced by further draws, whose number is bounded."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.ppo_fixtures import build_trainer, flat_weights, ppo_config

from align.online_rl import groups
from align.online_rl.completions import Completions
from align.online_rl.groups import Batch, draw_batch, fill_with_mixed_groups, mixed
from align.online_rl.scoring import Scores

CPU = torch.device("cpu")


def batch(scores: Sequence[Sequence[float]], *, first: int = 0) -> Batch:
    """A batch of groups with these scores; the completions are numbered from ``first``."""
    flat = torch.tensor([score for group in scores for score in group])
    numbers = range(first, first + len(flat))
    return Batch(
        [{"number": i} for i in numbers],
        Completions(
            [[0]] * len(flat),
            [[i] for i in numbers],
            [i % 2 == 0 for i in numbers],
            [[-float(i)] for i in numbers],
        ),
        Scores([str(i) for i in numbers], {"r": flat * 2}, flat * 2, flat, None),
        sampling_seconds=1.0,
    )


def numbers(made: Batch) -> list[int]:
    """The numbers of the completions, which must be the same in every column."""
    columns = [
        [row["number"] for row in made.rows],
        [tokens[0] for tokens in made.completions.completions],
        [-int(logps[0]) for logps in made.completions.sampler_logps or ()],
        [int(text) for text in made.scores.texts],
    ]
    assert all(column == columns[0] for column in columns)
    assert made.completions.finished == [i % 2 == 0 for i in columns[0]]
    assert torch.equal(made.scores.rewards["r"], 2 * made.scores.score)
    return columns[0]


class Draws:
    """Further draws with given scores; records what was asked for."""

    def __init__(self, *scores: Sequence[Sequence[float]]) -> None:
        self.scores = [(), *scores]
        self.asked: list[tuple[int, int | None]] = []

    def __call__(self, number: int, wanted: int | None) -> Batch:
        self.asked.append((number, wanted))
        return batch(self.scores[number][:wanted], first=100 * number)


def test_groups_with_equal_scores_are_replaced_by_those_of_further_draws():
    first = batch([(1, 0), (1, 1), (0, 0), (0, 1)])
    draw = Draws([(0, 0), (1, 0)], [(0, 1)])
    made, draws = fill_with_mixed_groups(first, draw, n=2, max_draws=9, device=CPU)
    assert draw.asked == [(1, 2), (2, 1)]  # two groups lack, then one
    assert numbers(made) == [0, 1, 6, 7, 102, 103, 200, 201]
    assert draws == 3
    assert made.sampling_seconds == 3.0
    assert all(mixed(made.scores.score, 2))


def test_after_the_last_draw_groups_with_equal_scores_fill_the_batch():
    first = batch([(1, 1), (0, 0), (0, 1)])
    draw = Draws([(0, 0), (2, 1)])
    made, draws = fill_with_mixed_groups(first, draw, n=2, max_draws=2, device=CPU)
    assert draws == 2
    assert numbers(made) == [4, 5, 102, 103, 0, 1]  # those drawn first


def test_a_batch_of_mixed_groups_is_kept_as_it_is():
    first = batch([(1, 0), (0, 1)])
    made, draws = fill_with_mixed_groups(first, Draws(), n=2, max_draws=4, device=CPU)
    assert numbers(made) == [0, 1, 2, 3]
    assert draws == 1


def test_a_rank_draws_until_no_rank_lacks_a_group(monkeypatch: pytest.MonkeyPatch):
    """Another rank lacks two groups, then one, then none."""
    others = iter([2, 1, 0])
    monkeypatch.setattr(
        groups, "max_over_ranks", lambda own: torch.maximum(own, torch.tensor(next(others)))
    )
    draw = Draws([(1, 0), (0, 0)], [(1, 0)])
    made, draws = fill_with_mixed_groups(
        batch([(1, 0), (0, 1)]), draw, n=2, max_draws=9, device=CPU
    )
    assert draw.asked == [(1, 2), (2, 1)]
    assert draws == 3
    assert numbers(made) == [0, 1, 2, 3]


def test_metrics_count_equal_groups_before_others_are_drawn():
    scores = [(1, 0), (1, 1), (0, 0), (0, 1)]
    for kind, settings, expected in (
        ("ppo", {"n_completions": 2}, {}),
        ("grpo", {"n_completions": 2}, {"equal_groups": 0.5}),
        (
            "rloo",
            {"n_completions": 2, "filter": "mixed_groups"},
            {"equal_groups": 0.5, "draws": 2.0},
        ),
    ):
        calls = itertools.count()

        def draw(number: int, wanted: int | None, calls: Any = calls) -> Batch:
            assert number == next(calls)
            return batch(scores if wanted is None else [(1, 0)] * wanted)

        made, metrics = draw_batch(draw, ppo_config(kind, **settings), CPU)
        assert metrics == expected
        assert len(made) == 8


def ties(prompts: Any, completions: Sequence[str]) -> list[float]:
    """A reward function with few values, so that many groups have equal scores."""
    return [float(len(completion) % 2) for completion in completions]


@pytest.mark.slow
def test_a_resumed_run_with_a_filter_equals_an_uninterrupted_one(folders: Any, tmp_path: Any):
    settings: dict[str, Any] = {
        "kind": "grpo",
        "rewards": [f"{__name__}:ties"],
        "n_completions": 2,
        "filter": "mixed_groups",
        "missing_eos_penalty": None,
        "max_new_tokens": 6,
        "epochs": 1,
        "save_steps": 2,
    }
    whole = build_trainer(folders, tmp_path / "whole", **settings)
    whole.train()
    draws = [line["draws"] for line in metrics(tmp_path / "whole")]
    assert max(draws[2:]) > 1  # after the checkpoint from which the other run resumes
    again = tmp_path / "again" / "whole"  # a checkpoint counts in a folder of its stage's name only
    again.mkdir(parents=True)
    for name in ("checkpoint-2", "metrics.jsonl", "samples.jsonl"):
        source = tmp_path / "whole" / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, again / name)
    resumed = build_trainer(folders, again, **settings)
    assert resumed.resume() == 2
    resumed.train()
    assert torch.equal(flat_weights(resumed), flat_weights(whole))
    assert metrics(again) == metrics(tmp_path / "whole")
    samples = [(folder / "samples.jsonl").read_text() for folder in (again, tmp_path / "whole")]
    assert samples[0] == samples[1]


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The logged metrics without times."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if "seconds" not in k} for x in lines]


def test_draws_of_a_step_have_other_prompts_and_seeds(folders: Any, tmp_path: Any):
    """A step's further draws are those of no other step, and depend on nothing but numbers."""
    trainer = build_trainer(folders, tmp_path, kind="grpo", n_completions=2)
    seen: list[tuple[list[list[int]], list[int]]] = []

    def generate(prompts: list[list[int]], *, seeds: list[int]) -> Completions:
        seen.append((prompts, seeds))
        return Completions([*prompts], [[5]] * len(prompts), [False] * len(prompts))

    trainer.sampler = SimpleNamespace(generate=generate)  # type: ignore[assignment]
    trainer.scorer = SimpleNamespace(score=lambda *_: batch([]).scores)  # type: ignore[assignment]
    for number, wanted in ((0, None), (1, 2), (1, 2), (2, 1)):
        trainer.draw(1, number, wanted)
    assert [len(prompts) for prompts, _ in seen] == [8, 4, 4, 2]
    assert seen[1] == seen[2]
    assert [len(set(seeds)) for _, seeds in seen] == [8, 4, 4, 2]
    assert len({seed for _, seeds in seen for seed in seeds}) == 8 + 4 + 2
    assert seen[0][0][:4] != seen[1][0]
