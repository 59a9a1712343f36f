"""Tests of sharing rows over ranks. The environment names the rank; gathering is replaced."""

from __future__ import annotations

import accelerate.utils
import pytest

from align.errors import UserError
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


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        # what `accelerate launch --num_processes 2` sets for the one process that it starts
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"}, "but started one"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun started 2 processes"),
        ({"PMI_SIZE": "4"}, "mpirun started 4 processes"),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, None),
        ({"MASTER_PORT": "29500"}, None),  # set by a cluster, without a launcher
        (
            {
                "MASTER_PORT": "29500",
                "MASTER_ADDR": "localhost",
                "RANK": "0",
                "ACCELERATE_MIXED_PRECISION": "no",
                "WORLD_SIZE": "2",
            },
            None,
        ),
    ],
)
def test_fewer_processes_than_the_launcher_was_configured_for_are_an_error(
    monkeypatch, environment, message
):
    for variable in ("WORLD_SIZE", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    if message is None:
        distributed.check_launch()
    else:
        with pytest.raises(UserError, match=message):
            distributed.check_launch()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE is no whole number: 'abc'"),
        ({"WORLD_SIZE": "1", "RANK": "-1"}, "RANK is no whole number"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_PORT is not set"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "srun started 4 processes"),
    ],
)
def test_wrong_variables_of_a_launcher_are_named(monkeypatch, variables, message):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        distributed.check_launch()
