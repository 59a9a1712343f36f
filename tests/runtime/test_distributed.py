"""Tests of sharing rows over ranks. The environment names the rank; gathering is replaced."""

from __future__ import annotations

import accelerate.utils
import pytest

from align.runtime import distributed


@pytest.mark.parametrize("size", [1, 2, 3, 100, None])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_row_is_computed_by_one_rank_and_returned_by_all(monkeypatch, world_size, size):
    rows, computed = list(range(11)), []
    gathered = [(row, row * row) for row in reversed(rows)]
    monkeypatch.setattr(accelerate.utils, "gather_object", lambda own: gathered)
    monkeypatch.setenv("WORLD_SIZE", str(world_size))

    def square(part):
        computed.extend(part)
        return [row * row for row in part]

    for rank in range(world_size):
        monkeypatch.setenv("RANK", str(rank))
        assert distributed.map_rows(rows, square, size=size) == [row * row for row in rows]
    assert sorted(computed) == rows


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        pytest.param(1, [[[0], [2], [4]], [[1], [3]]], id="row by row, round-robin"),
        pytest.param(2, [[[0, 1], [4]], [[2, 3]]], id="chunks of two rows, round-robin"),
        pytest.param(None, [[[0, 2, 4]], [[1, 3]]], id="one call per rank"),
    ],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_chunks_of_each_rank(monkeypatch, rank, size, expected):
    calls, progress = [], []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(accelerate.utils, "gather_object", lambda own: [(i, i) for i in range(5)])
    distributed.map_rows(
        range(5),
        lambda part: calls.append(part) or part,
        size=size,
        progress=lambda done, total: progress.append((done, total)),
    )
    assert calls == expected[rank]
    assert progress == [(k + 1, len(calls)) for k in range(len(calls))]


def test_no_rows_call_nothing():
    assert distributed.map_rows([], pytest.fail) == []
    assert distributed.map_rows([], pytest.fail, size=None) == []


def test_a_function_that_returns_too_few_results_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        distributed.map_rows([1, 2], lambda part: [], size=2)
