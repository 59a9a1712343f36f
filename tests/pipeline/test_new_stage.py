"""A new kind of stage needs a configuration class and a module: no other code names it."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from rich.console import Console

from align.config.base import GymEnvironment, HeldOut, Input, Problem, Stage, Table, Workload
from align.config.functions import ScoreFunction
from align.config.recipe import ErrorCollector, load_recipe
from align.config.stages import STAGES
from align.errors import UserError
from align.pipeline import estimates, preflight, runner
from align.pipeline.plan import plan
from align.pipeline.summary import show_summary
from align.runtime import distributed
from align.runtime.progress import Display
from align.runtime.results import ResultTable, StageResult

ROWS = "".join(
    json.dumps({"prompt": f"Say {i}.", "chosen": f"{i}!", "rejected": "No."}) + "\n"
    for i in range(40)
)


class Count(Stage):
    """Count the pairs of a split."""

    inputs: ClassVar = {"pairs": Input(("prepare",))}
    reads: ClassVar = (Table("pairs", "pairs"),)

    pairs: str = "prepare"
    """The pairs to count."""
    split: str = "train"
    """The split to count."""
    limit: int = 0
    """An upper bound that the stage must not reach."""

    def required_tables(self) -> tuple[Table, ...]:
        return (Table("pairs", "pairs", self.split, requested_by="split"),)

    def held_out(self) -> Iterator[HeldOut]:
        if self.split != "train":
            yield HeldOut(("split",), "pairs", self.split)

    def problems(self, stages: Mapping[str, Stage]) -> Iterator[Problem]:
        if self.limit < 0:
            yield Problem(("limit",), "must not be negative")

    @property
    def reward_functions(self) -> dict[Any, ScoreFunction]:
        function = ScoreFunction(function="no_such_module:score")
        return {("limit",): function} if self.limit == 7 else {}

    @property
    def servers(self) -> dict[str, str]:
        return {"limit": "http://127.0.0.1:9"} if self.limit == 8 else {}

    @property
    def gym_environments(self) -> tuple[GymEnvironment, ...]:
        return (GymEnvironment("CartPol-v1", {}, None),) if self.limit == 9 else ()

    def batch_size_problems(self, world_size: int) -> Iterator[Problem]:
        if self.limit == 10:
            yield Problem(("limit",), f"does not divide over {world_size} processes")

    def workload(self, statistics: Mapping[str, Any], world_size: int) -> Workload:
        return Workload(rows=statistics["pairs"][self.split])


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``recipe(KEYS)`` writes a recipe with a ``count`` stage, of which ``KEYS`` are settings."""

    def run(config: Count, inputs: Any, output_dir: Path, logger: Any) -> StageResult:
        import pyarrow.parquet as pq

        n = pq.read_metadata(Path(inputs["pairs"]) / f"pairs-{config.split}.parquet").num_rows
        table = ResultTable("pairs", ("split", "pairs"), [(config.split, str(n))], note="counted")
        return StageResult({"n": n}, {"n": n}, ("counted them",), (table,))

    monkeypatch.setitem(STAGES, "count", Count)
    module = types.ModuleType("align.stages.count")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "align.stages.count", module)
    monkeypatch.setattr(distributed, "init_process_group", lambda: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(ROWS)

    def write(keys: str = "") -> str:
        (tmp_path / "recipe.yaml").write_text(
            f"stages:\n  prepare: {{source: rows.jsonl, test_fraction: 0.2}}\n  count: {{{keys}}}\n"
        )
        return "recipe.yaml"

    return write


def test_it_is_run_reused_and_summarized(recipe: Any, tmp_path: Path):
    loaded = load_recipe(recipe())
    for status in ("ran", "reused"):
        with (tmp_path / "out").open("w") as file:
            display = Display(Console(file=file, width=100))
            summary = runner.run_recipe(loaded, Path("runs"), display)
            show_summary(summary, display.console, Path("runs/recipe/summary.json"))
        prepare, count = summary.stages
        n = prepare.metrics["pairs"]["train"]
        assert (count.stage, count.status) == ("count", status)
        lines = (tmp_path / "out").read_text().splitlines()
        assert any(line.startswith(f"count: {status}") and f"n {n}" in line for line in lines)
        assert "count: counted them" in lines
        assert ["train", str(n)] in [line.split() for line in lines]
        assert lines[-2].strip() == "counted"


def test_its_work_is_estimated_from_the_data_that_it_reads(recipe: Any):
    loaded = load_recipe(recipe())
    estimate = estimates.estimate(plan(loaded, Path("runs")), world_size=1)["count"]
    run = runner.run_recipe(loaded, Path("runs"), Display(Console(quiet=True)))
    assert estimate.work.rows == run.stages[-1].metrics["n"] > 20


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("limit: -1", "recipe.yaml:3: count.limit: must not be negative"),
        ("split: validation", "recipe.yaml:3: count.split: `prepare` has no validation split"),
        ("pairs: count", "recipe.yaml:3: count.pairs: stage `count` does not precede `count`"),
        ("limit: 7", "recipe.yaml:3: count.limit: no_such_module:score"),
        ("limit: 8", "recipe.yaml:3: count.limit: http://127.0.0.1:9: no server answers"),
        ("limit: 9", "recipe.yaml:3: count.environment: unknown environment CartPol-v1"),
        ("limit: 10", "recipe.yaml:3: count.limit: does not divide over 1 processes"),
    ],
)
def test_what_it_declares_is_checked_before_anything_runs(recipe: Any, keys: str, message: str):
    with pytest.raises(UserError) as error:
        runner.run_recipe(load_recipe(recipe(keys)), Path("runs"), Display(Console(quiet=True)))
    assert len(error.value.lines) == 1
    assert error.value.lines[0].startswith(message)
    assert not list(Path("runs").glob("prepare-*"))


def test_a_missing_table_is_reported_once_the_data_are_prepared(recipe: Any):
    Path("rows.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{i}", "completion": f"{i}!"}) + "\n" for i in range(40))
    )
    with pytest.raises(UserError, match=r"count.split: the prepared data have no table pairs-tr"):
        runner.run_recipe(load_recipe(recipe()), Path("runs"), Display(Console(quiet=True)))
    assert not list(Path("runs").glob("count-*"))


def test_all_errors_before_the_start_are_raised_as_one(recipe: Any):
    Path("recipe.yaml").write_text(
        "stages:\n  prepare: {source: rows.jsonl}\n  count: {limit: 7}\n"
        "  second: {stage: count, limit: 10}\n"
    )
    loaded = load_recipe("recipe.yaml")
    planned = plan(loaded, Path("runs"))
    errors = ErrorCollector(loaded)
    with pytest.raises(UserError) as error:
        list(preflight.examine(errors, planned, Path("runs"), world_size=2))
        errors.raise_any()
    assert [line.split(": ")[1] for line in error.value.lines] == ["count.limit", "second.limit"]
