"""Judges in recipes: what is accepted, what is refused with its place, and what a digest covers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from align.config import judges
from align.config.evaluate import Evaluate
from align.config.recipe import load_recipe
from align.errors import UserError

API = {"base_url": "http://localhost:8000/v1", "model": "a-judge"}


def write(judge: str, *, policies: str = "[sft]", baseline: str = "reference") -> str:
    Path("recipe.yaml").write_text(
        "stages:\n"
        "  prepare: {source: embedded}\n"
        "  sft: {model: {vocab_size: 512}}\n"
        "  reward: {model: sft}\n"
        f"  evaluate: {{policies: {policies}, baseline: {baseline},\n"
        f"    judge: {judge}}}\n",
        encoding="utf-8",
    )
    return "recipe.yaml"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("people.jsonl").write_text("{}\n", encoding="utf-8")
    Path("own.jsonl").write_text("{}\n", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("judge", "names", "inputs"),
    [
        ("gold", ["gold"], {}),
        ("reward", ["reward"], {"judge": "reward"}),
        ("[gold, reward]", ["gold", "reward"], {"judge.1": "reward"}),
        ("{function: math}", ["math"], {}),
        ("{function: 'rules:short'}", ["rules:short"], {}),
        ("{annotations: people.jsonl}", ["people.jsonl"], {}),
        ("{api: {base_url: 'http://localhost:1/v1', model: m}}", ["m"], {}),
    ],
)
def test_judges_have_names_and_inputs(judge: str, names: list[str], inputs: dict[str, str]):
    config: Any = load_recipe(write(judge)).stages["evaluate"]
    assert list(config.judges) == names
    others = {"policies.0": "sft", "prompts": "prepare"}
    assert config.input_names() == others | inputs


@pytest.mark.parametrize(
    ("judge", "line"),
    [
        ("3", "6: evaluate.judge: expected `gold`, a reward model, or a mapping with `function`"),
        ("{prompt: p.txt}", "6: evaluate.judge: expected `gold`, a reward model, or a mapping"),
        ("[]", "6: evaluate.judge: expected at least one judge, got an empty list"),
        ("[gold, gold]", "6: evaluate.judge: `gold` is listed more than once; list it once"),
        ("rewad", "6: evaluate.judge: no earlier stage `rewad`; did you mean `reward`?"),
        ("glod", "6: evaluate.judge: no earlier stage `glod`; did you mean `gold`?"),
        (
            "{function: math, annotations: a.jsonl}",
            "6: evaluate.judge.annotations: unknown key; it has no meaning beside the other keys",
        ),
        ("sft", "6: evaluate.judge: stage `sft` is of kind `sft`; expected reward"),
        ("{function: mat}", "6: evaluate.judge: `function` must be written module:function, or be"),
        ("{annotations: none.jsonl}", "6: evaluate.judge.annotations: no such file: none.jsonl"),
        ("{api: {model: m}}", "6: evaluate.judge.api.base_url: missing; it has no default"),
        (
            "[gold, {api: {base_url: 'http://a/v1', model: m, temprature: 1}}]",
            "6: evaluate.judge.1.api.temprature: unknown key; did you mean `temperature`?",
        ),
        (
            "{api: {base_url: 'http://a/v1', model: m}, rubric: r.yaml}",
            "6: evaluate.judge.rubric: no such file: r.yaml",
        ),
    ],
)
def test_a_wrong_judge_is_refused_with_its_place(judge: str, line: str):
    with pytest.raises(UserError) as error:
        load_recipe(write(judge))
    (found,) = error.value.lines
    assert found.startswith(f"recipe.yaml:{line}")


@pytest.mark.parametrize(
    ("policies", "baseline", "line"),
    [
        ("[none.jsonl]", "sft", "5: evaluate.policies.0: no such file: none.jsonl"),
        ("[sft]", "none.jsonl", "5: evaluate.baseline: no such file: none.jsonl"),
        ("[own.jsonl]", "own.jsonl", "5: evaluate.policies: nothing to compare"),
        ("[reference]", "sft", "5: evaluate.policies.0: no earlier stage `reference`"),
    ],
)
def test_wrong_completions_are_refused(policies: str, baseline: str, line: str):
    with pytest.raises(UserError) as error:
        load_recipe(write("gold", policies=policies, baseline=baseline))
    (found,) = error.value.lines
    assert found.startswith(f"recipe.yaml:{line}")


def test_implicit_rewards_need_models_on_both_sides():
    with pytest.raises(ValueError, match="`implicit_rewards` needs models on both sides"):
        Evaluate(policies=["sft"], baseline="reference", judge="gold", implicit_rewards=True)


def test_a_digest_covers_what_changes_a_verdict_and_nothing_else():
    def digest(**changes: Any) -> Any:
        judge = {"api": API | changes}
        config = Evaluate(policies=["sft"], baseline="reference", judge=judge)
        return config.digest_settings()

    base = digest()
    for key, value in {
        "base_url": "http://other:1/v1",
        "key_variable": "KEY",
        "concurrency": 2,
        "timeout_seconds": 1.0,
        "max_retries": 0,
    }.items():
        assert digest(**{key: value}) == base, key
    assert digest(input_price=1.0, output_price=2.0) == base
    for key, value in {"model": "b", "temperature": 1.0, "n_verdicts": 2, "max_tokens": 9}.items():
        assert digest(**{key: value}) != base, key


def test_the_files_of_judges_are_part_of_the_digest():
    config = Evaluate(
        policies=["own.jsonl"],
        baseline="reference",
        judge=[{"annotations": "people.jsonl"}, {"api": API, "rubric": "rubric.yaml"}],
    )
    assert config.named_paths() == {
        "policies.0": "own.jsonl",
        "judge.0.annotations": "people.jsonl",
        "judge.1.rubric": "rubric.yaml",
    }
    assert config.annotation_files == {"judge.0.annotations": "people.jsonl"}
    assert set(judges.by_key(config.judge)) == {"judge.0", "judge.1"}
