"""The times of `align plan --probe`: formulas by hand with a clock of the test, and its table."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from align.cli.plan_times import duration_range, times_table
from align.config.completions import Label, Sample
from align.config.data import Prepare
from align.config.online_rl_stages import GRPO
from align.data import tables
from align.data.rows import Row
from align.pipeline.plan import PlannedStage
from align.pipeline.probe import data, online_rl
from align.pipeline.probe.sampling import SHORT, Lengths, measure_sampling
from align.pipeline.probe.timing import Seconds, StageTime, Stopwatch, computed_tokens
from align.runtime.terminal import SafeConsole

ROOT = Path(__file__).parents[2]


class Clock:
    """A clock that only the measured calls advance."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[Any] = []

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float, name: Any = None) -> None:
        self.now += seconds
        self.calls.append(name)


@pytest.mark.parametrize(
    ("per_row", "size"),
    [
        pytest.param(0.001, 16, id="short: the whole batch"),
        # 0.7, 1.4 and 2.8 seconds; twice 2.8 would exceed 4 seconds
        pytest.param(0.7, 4, id="long: doubled until the next one would take too long"),
        pytest.param(9.0, 2, id="very long: two rows"),
    ],
)
def test_the_measured_size(per_row: float, size: int):
    clock = Clock()
    watch = Stopwatch(clock)
    measured = watch.largest(lambda n: watch.once(lambda: clock.work(n * per_row)), 16)
    assert measured == (size, pytest.approx(size * per_row))


def test_the_first_measurement_does_not_count():
    seconds = iter([5.0, 3.0])  # the first one includes start-up
    assert Stopwatch(Clock()).largest(lambda n: next(seconds), 16) == (2, 3.0)
    seconds = iter([5.0, 3.0])
    assert Stopwatch(Clock()).largest(lambda n: next(seconds), 1) == (1, 3.0)


def test_start_up_counts_only_in_long_calls():
    clock = Clock()
    watch = Stopwatch(clock)
    seconds = iter([0.4, 0.1, 0.2])  # the first call includes the start-up
    assert watch.settled(lambda: clock.work(next(seconds))) == pytest.approx(0.1)
    seconds = iter([0.6])  # too long to be repeated
    assert watch.settled(lambda: clock.work(next(seconds))) == pytest.approx(0.6)


def test_computed_tokens_are_the_distinct_prefixes():
    draw = random.Random(0)
    rows = [[draw.randrange(2) for _ in range(draw.randrange(1, 6))] for _ in range(30)]
    prefixes = {tuple(row[:n]) for row in rows for n in range(1, len(row) + 1)}
    assert computed_tokens(rows, shared=True) == len(prefixes)
    assert computed_tokens(rows, shared=False) == 30 * 5


@pytest.mark.parametrize(
    ("per_token", "batch"),
    [
        pytest.param(1e-5, 8, id="the full batch is measured"),
        pytest.param(5e-3, 64, id="a part of the batch, and all of it with short prompts"),
    ],
)
def test_the_time_of_sampling_is_that_of_its_two_phases(per_token: float, batch: int):
    """Reading costs a time per token; a new token costs one per row and per token before it.

    Each prompt has two completions and is read once.
    """
    prompts = [[k // 2] * 108 for k in range(64)]
    per_row, per_context, most = 1e-3, 2e-6, 40
    clock = Clock()

    def seconds(rows: int, distinct: int, length: int, n_tokens: int) -> float:
        reading = per_token * distinct * length
        return reading + sum(
            rows * (per_row + per_context * (length + k - SHORT)) for k in range(n_tokens)
        )

    def generate(rows: Any, n_tokens: int) -> None:
        distinct = len({tuple(row) for row in rows})
        clock.work(seconds(len(rows), distinct, len(rows[0]), n_tokens), (len(rows), n_tokens))

    speed = measure_sampling(Stopwatch(clock), generate, prompts, batch=batch, most=most)
    assert max(n for _, n in clock.calls) <= 17  # few tokens are sampled
    assert speed.batch_seconds(most) == pytest.approx(
        seconds(batch, batch // 2, 108, most), rel=0.03
    )
    # 96 rows of 10 to 40 tokens
    times = speed.seconds(96, Lengths(10.0, most))
    assert times.least == pytest.approx(96 / batch * seconds(batch, batch // 2, 108, 10), rel=0.03)
    assert times.most == pytest.approx(96 / batch * seconds(batch, batch // 2, 108, 40), rel=0.03)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (Seconds.exactly(3.14), "3.1 s"),
        (Seconds(90.0, 95.0), "92 s"),
        (Seconds(300.0, 600.0), "5 to 10 min"),
        (Seconds(90.0, 600.0), "90 s to 10 min"),
        (Seconds(3600.0, 9000.0), "60 min to 2.5 h"),
    ],
)
def test_a_range_is_printed_only_where_it_is_one(seconds: Seconds, text: str):
    assert duration_range(seconds) == text


def test_the_table_fits_80_columns_and_names_what_is_not_known(
    capsys: pytest.CaptureFixture[str],
):
    parts = {"sample": Seconds(100.0, 200.0), "update": Seconds.exactly(50.0)}
    times = {
        "a_stage_with_a_long_name": StageTime(parts, "61 to 256 tokens per completion"),
        "dpo": StageTime(known=False, remark="no data"),
    }
    SafeConsole(width=80).print(times_table(times, start_up=8.0))
    printed = capsys.readouterr().out
    assert all(len(line) <= 80 for line in printed.splitlines())
    words = re.sub(r"\s+", " ", printed)
    assert "2 to 4 min" in words and "sample 80 %" in words  # 200 of 250 seconds
    assert "dpo not known" in words
    assert "all ≥ 3 to 4 min" in words  # 158 to 258 seconds


def planned(name: str, config: Any, runs: Path, inputs: dict[str, Path]) -> PlannedStage:
    return PlannedStage(name, config, name, runs / name, dict(inputs), {}, "run")


def test_data_that_do_not_exist_yet_are_replaced_by_rows_of_the_prepared_data(tmp_path: Path):
    def turn(role: str, content: str) -> list[dict[str, str]]:
        return [{"role": role, "content": content}]

    prepared = tmp_path / "prepared"
    prepared.mkdir()
    for kind, columns in (("demonstrations", ("completion",)), ("prompts", ())):
        writer = tables.TableWriter(tables.table_file(prepared, kind, "train"))
        for k in range(300):
            row = {"prompt": turn("user", f"question {k}"), "prompt_id": str(k)}
            writer.add(row | {c: turn("assistant", f"answer {k}") for c in columns})
        writer.close()
    runs = tmp_path / "runs"
    sample = Sample(model="m", prompts=str(prepared), n_prompts=200, n_completions=4)
    label = Label(completions="sample", judge="gold", pairing="all")
    stages = [
        planned("sample", sample, runs, {"prompts": prepared}),
        planned("label", label, runs, {"completions": runs / "sample"}),
    ]
    sampled = data.sample(stages, {}, tmp_path / "probe")
    assert sampled[prepared].count("demonstrations") == 300
    assert len(sampled[prepared].sampled("prompts")) == data.SAMPLE
    # 200 prompts with 4 completions: 4 * 3 / 2 = 6 pairs each
    assert sampled[runs / "sample"].count("completions") == 800
    assert sampled[runs / "label"].count("pairs") == 1_200
    pair = sampled[runs / "label"].sampled("pairs")[0]
    assert pair["chosen"] != pair["rejected"] and pair["prompt"] == turn("user", "question 0")
    assert not runs.exists()


TOOL_TURNS: list[Row] = [
    {"role": "user", "content": "Weather?", "tools": '[{"name": "weather"}]'},
    {"role": "assistant", "content": "Wait.", "reasoning_content": "why", "untrained": True},
    {"role": "user", "content": "I wait."},
]
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}


@pytest.mark.parametrize("written", [True, False], ids=["written", "in memory"])
def test_sampled_rows_have_every_field_of_their_turns(tmp_path: Path, written: bool):
    plain = {"prompt": [{"role": "user", "content": "Hi"}], "prompt_id": "2"}
    rows: list[Row] = [
        {
            "prompt": TOOL_TURNS,
            "completion": [{"role": "assistant", "content": "", "tool_calls": [CALL]}],
            "prompt_id": "1",
        },
        plain | {"completion": [{"role": "assistant", "content": "Ho"}]},
    ]
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    in_memory = {} if written else {prepared: InMemory(rows)}
    if written:
        tables.write(rows, tables.table_file(prepared, "demonstrations", "train"))
    sample = Sample(model="m", prompts=str(prepared), n_completions=1)
    stages = [planned("sample", sample, tmp_path / "runs", {"prompts": prepared})]
    if not written:
        prepare = planned("prepare", Prepare(source="embedded"), tmp_path, {})
        stages = [replace(prepare, folder=prepared), *stages]
        prepared.rmdir()
    sampled = data.sample(stages, cast("Any", in_memory), tmp_path / "probe")
    assert sampled[prepared].sampled("demonstrations") == rows
    assert sampled[tmp_path / "runs" / "sample"].sampled("completions") == rows


class InMemory:
    """Prepared data with one table."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def tables(self) -> dict[str, dict[str, list[Row]]]:
        return {"demonstrations": {"train": self.rows}}


def test_the_time_of_episodes_is_not_known(tmp_path: Path):
    config = GRPO(model="sft", environment="arithmetic", steps=1, batch_size=2, n_completions=2)
    time = online_rl.measure(config, {}, cast(Any, None), tmp_path, Stopwatch())
    assert not time.known
    assert "turns" in time.remark


@pytest.mark.slow
def test_every_kind_of_stage_is_measured_and_nothing_is_written(tmp_path: Path):
    model = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    trainer = {"per_device_train_batch_size": 8, "bf16": False, "eval_strategy": "no"}
    lora = {"r": 2, "alpha": 4}
    by_tokens = {"bf16": False, "eval_strategy": "no"}
    recipe = {"stages": {
        "prepare": {"source": "embedded", "max_rows": 200},
        "sft": {"model": model, "trainer": trainer},
        "kto": {"model": "sft", "trainer": by_tokens, "lora": lora, "tokens_per_batch": 400},
        "reward": {"model": "sft", "trainer": by_tokens, "tokens_per_batch": 10_000},
        "ppo": {"model": "sft", "rewards": ["reward"], "steps": 3, "batch_size": 8,
                "max_new_tokens": 8, "tokens_per_batch": 200},
        "sample": {"model": "sft", "max_new_tokens": 8, "n_prompts": 10},
        "label": {"judge": "reward"},
        "dpo": {"model": "sft", "pairs": "label", "trainer": trainer},
        "evaluate": {"policies": ["dpo", "kto"], "baseline": "sft", "judge": ["gold", "reward"],
                     "max_new_tokens": 8},
    }}  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    done = subprocess.run(
        [sys.executable, "-m", "align.cli.main", "plan", "recipe.yaml", "--probe"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "not known" not in done.stdout
    table = done.stdout[done.stdout.index("of which") :]
    for name in recipe["stages"]:
        assert re.search(rf"^ *{name} +[\d.]+ .*?(s|min)\b", table, re.MULTILINE), name
    assert re.search(r"^ *all +\d", table, re.MULTILINE)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
