"""Token counts, lost rows and end tokens in check and plan, before anything runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from align.config.recipe import ErrorCollector, load_recipe
from align.data import tables
from align.pipeline import estimates, token_lengths
from align.pipeline.plan import PlannedStage, plan

RECIPE = """\
stages:
  prepare: {source: rows.jsonl, test_fraction: 0.0}
  sft:
    model: {vocab_size: 300, max_position_embeddings: 64}
    trainer: {num_train_epochs: 1, per_device_train_batch_size: 1}
  reward: {model: sft, trainer: {max_length: 200}}
  dpo: {model: sft, trainer: {max_length: 48}}
"""


@pytest.fixture
def stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[ErrorCollector, list[PlannedStage]]:
    """10 short pairs, and one with a prompt of more than 64 tokens."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": f"{n} {'a ' * (80 if n == 10 else 2)}", "chosen": "yes", "rejected": "no"}
        for n in range(11)
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    Path("recipe.yaml").write_text(RECIPE, encoding="utf-8")
    recipe = load_recipe("recipe.yaml")
    return ErrorCollector(recipe), plan(recipe, Path("runs"))


def test_check_counts_lost_rows_and_refuses_a_limit_beyond_the_positions(
    stages: tuple[ErrorCollector, list[PlannedStage]],
) -> None:
    errors, planned = stages
    lines = list(token_lengths.examine(errors, planned))
    line, trained = [line for line in lines if line.startswith("sft: ")]
    assert "positions 64: 1 of 11 are longer (warning: 1 of 11 rows are lost" in line
    # "yes" is one token of the new tokenizer, and its end another; the lost row trains none
    assert trained == (
        "sft: trained tokens per row: mean 1.8, median 2, by the template of a new model"
    )
    line, trained = [line for line in lines if line.startswith("dpo: ")]
    assert "`max_length` 48: 1 of 11 are longer (warning: 1 of 11 rows are lost" in line
    assert "trained tokens per pair: mean 4.5, median 5" in trained  # "no" is two tokens
    assert errors.lines == [
        "recipe.yaml:6: reward.trainer.max_length: 200 is more than the 64 positions of the model; "
        "set it to 64 or less"
    ]


def test_more_lost_rows_than_accepted_are_an_error_of_check(
    stages: tuple[ErrorCollector, list[PlannedStage]],
) -> None:
    Path("recipe.yaml").write_text(RECIPE.replace("200}", "48}, max_lost_rows: 0.05"))
    recipe = load_recipe("recipe.yaml")
    errors = ErrorCollector(recipe)
    list(token_lengths.examine(errors, plan(recipe, Path("runs"))))
    assert errors.lines == [
        "recipe.yaml:6: reward.trainer.max_length: 1 of 11 rows are longer than `max_length` (48 "
        "tokens); drop long rows in `prepare`, or raise `max_length`; to accept it, set "
        "`max_lost_rows: 0.1`"
    ]


def test_plan_counts_the_steps_of_the_rows_that_are_left(
    stages: tuple[ErrorCollector, list[PlannedStage]],
) -> None:
    _, planned = stages
    prepared = estimates.prepare_small(planned)
    lost = token_lengths.lost_rows(planned, prepared)
    counts = {name: rows.count for name, rows in lost.items()}
    assert counts == {"sft": 1, "dpo": 1}  # `reward` has an error, which `check` reports
    work = estimates.estimate(planned, world_size=1, prepared=prepared, lost=counts)["sft"].work
    assert (work.rows, work.steps) == (10, 10)

    (data,) = prepared  # of a finished preparation, the rows are in its files
    data.mkdir(parents=True)
    for kind, splits in prepared[data].tables().items():
        tables.write(splits["train"], tables.table_file(data, kind, "train"))
    assert token_lengths.lost_rows(planned, {}) == lost


def test_a_template_without_an_end_token_is_an_error_of_check(
    stages: tuple[ErrorCollector, list[PlannedStage]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from align.models import tokenization

    errors, planned = stages
    template = tokenization.CHATML.replace("<|im_end|>", "###")
    monkeypatch.setattr(tokenization, "CHATML", template)
    list(token_lengths.examine(errors, planned))
    assert (
        "sft.model: a new model: its chat template ends a completion with '###" in errors.lines[0]
    )
    assert "allow_missing_end_token: true" in errors.lines[0]


def test_prompts_that_leave_no_positions_for_a_completion_are_an_error_of_check(
    stages: tuple[ErrorCollector, list[PlannedStage]],
) -> None:
    Path("recipe.yaml").write_text(
        RECIPE.replace("test_fraction: 0.0", "test_fraction: 0.5").replace(
            "{max_length: 200}", "{}"
        )
        + """\
  sample: {model: sft, max_new_tokens: 16, n_prompts: 5}
  ppo: {model: sft, rewards: [reward], steps: 2, max_new_tokens: 50, batch_size: 4}
  evaluate: {policies: [dpo], baseline: sft, judge: gold, max_new_tokens: 48}
  evaluate_2: {stage: evaluate, policies: [dpo], baseline: sft, implicit_rewards: true, max_new_tokens: 48}
""",
        encoding="utf-8",
    )
    recipe = load_recipe("recipe.yaml")
    errors = ErrorCollector(recipe)
    list(token_lengths.examine(errors, plan(recipe, Path("runs"))))
    places = [line.partition(": ")[2].partition(": ")[0] for line in dict.fromkeys(errors.lines)]
    places.remove("evaluate.judge")  # the prompts are no task of the gold score
    assert places == ["ppo.max_new_tokens", "evaluate.max_new_tokens"]
    assert any("prompts plus 50 new tokens exceed the 64 positions" in e for e in errors.lines)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("kto: {model: sft}", "kto.preferences: 1 undesirable of 9 completions are not enough for"),
        (
            "reward: {model: sft, pairs: pairs, margin_coef: 1.0}",
            "reward.margin_coef: pairs-train has no column `margin`; remove this key",
        ),
        (
            "ppo: {model: sft, rewards: [mine:f], steps: 1, batch_size: 2}",
            "ppo.rewards.0: mine:f requires the column `answer`, and the prompts have prompt, ",
        ),
    ],
)
def test_columns_and_labels_that_data_lack_are_errors_before_they_are_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("def f(prompts, completions, answer): return [0.0]")
    rows = [{"prompt": f"{n}", "completion": f"is {n}", "label": n > 0} for n in range(9)]
    pairs = [{"prompt": f"{n}", "chosen": "yes", "rejected": "no"} for n in range(9)]
    for name, content in (("rows", rows), ("pairs", pairs)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    recipe = load_recipe(
        {
            "stages": {
                "prepare": {"source": "rows.jsonl", "test_fraction": 0.0},
                "pairs": {"stage": "prepare", "source": "pairs.jsonl", "test_fraction": 0.0},
                "sft": {"model": {"vocab_size": 300}},
                **yaml.safe_load(stage),
            }
        }
    )
    errors = ErrorCollector(recipe)
    list(token_lengths.examine(errors, plan(recipe, Path("runs"))))
    assert len(errors.lines) == 1
    assert message in errors.lines[0]


@pytest.mark.parametrize(
    ("key", "mean", "words"),
    [
        ("", 3.0, "; 5 of 10 rows have several turns: all are trained"),
        ("train_on: last", 2.0, "; 5 of 10 rows have several turns: the last is trained"),
        ("trainer: {completion_only_loss: false}", None, ""),
    ],
)
def test_check_counts_the_tokens_of_all_turns(
    key: str, mean: float | None, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    rows = [
        {"messages": [{**user, "content": f"{n}"}, answer, *([user, answer] * (n % 2))]}
        for n in range(10)
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    Path("recipe.yaml").write_text(
        "stages:\n  prepare: {source: rows.jsonl, test_fraction: 0.0}\n"
        f"  sft: {{model: {{vocab_size: 300}}, {key}}}\n",
        encoding="utf-8",
    )
    recipe = load_recipe("recipe.yaml")
    lines = list(token_lengths.examine(ErrorCollector(recipe), plan(recipe, Path("runs"))))
    (line,) = [line for line in lines if line.startswith("sft: trained tokens")]
    # "b" and its end: 2 tokens in five rows, 4 in the others
    assert mean is None or f"mean {mean}, " in line
    assert line.endswith(f"by the template of a new model{words}")
