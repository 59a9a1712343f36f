"""Every example runs, as a script."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import tiny_models

ROOT = Path(__file__).parents[1]
SMALL = [
    "prepare.max_rows=60",
    "prepare.test_fraction=0.25",
    "sft.model.hidden_size=32",
    "sft.model.intermediate_size=64",
    "sft.trainer.max_steps=2",
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tiny_models.World:
    return tiny_models.world(tmp_path_factory.getbasetemp())


@pytest.fixture
def example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """``example("quickstart.py", …)`` runs a script as ``__main__`` in ``tmp_path``; its output."""

    def run(name: str, *arguments: object) -> str:
        script = str(ROOT / "examples" / name)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        capsys.readouterr()
        runpy.run_path(script, run_name="__main__")
        return capsys.readouterr().out

    return run


def test_there_are_four_examples():
    assert {file.name for file in (ROOT / "examples").glob("*.py")} == {
        "quickstart.py",
        "custom_reward.py",
        "win_rate_of_two_files.py",
        "evaluate_hub_model.py",
    }


def test_quickstart(example):
    small = [*SMALL, "dpo.trainer.max_steps=2", "evaluate.n_prompts=4", "evaluate.max_new_tokens=8"]
    out = example("quickstart.py", *small)
    assert "dpo against sft on 4 held-out prompts: win rate" in out


def test_custom_reward(example):
    small = [*SMALL, "rloo.steps=1", "rloo.batch_size=8", "rloo.max_new_tokens=4"]
    assert "score -0." in example("custom_reward.py", *small)


def test_win_rate_of_two_files(example, tmp_path):
    for name, scores in (("a", [1.0, 2.0, 3.0, 0.0]), ("b", [0.0, 3.0, 1.0, 0.0])):
        rows = [
            {"prompt": f"p{k}", "completion": "x" * (k + len(name)), "score": score}
            for k, score in enumerate(scores)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = example("win_rate_of_two_files.py", "a.jsonl", "b.jsonl")
    assert out.startswith("win rate 62.5%")  # two wins, one loss, one tie


def test_evaluate_hub_model(example, world, tmp_path):
    from align.config.training import Reward
    from align.stages import reward

    config = Reward(model="sft", trainer=tiny_models.TRAINER | {"max_steps": 2})
    tiny_models.stage(reward, config, {"model": world.sft, "pairs": world.data}, tmp_path / "rm")
    out = example("evaluate_hub_model.py", world.lora, world.sft, tmp_path / "rm", "embedded", 3)
    assert "win rate" in out and "on 3 prompts" in out


@pytest.mark.parametrize(
    ("name", "arguments", "line"),
    [
        ("evaluate_hub_model.py", [], "usage: python examples/evaluate_hub_model.py POLICY BASE"),
        ("evaluate_hub_model.py", ["none", "none", "none"], "Anthropic/hh-rlhf: no such file"),
        ("win_rate_of_two_files.py", ["a.jsonl"], "usage: python examples/win_rate_of_two_files"),
        ("win_rate_of_two_files.py", ["none", "none"], "none: cannot be read as lines with prompt"),
        ("quickstart.py", ["dpo.bta=1"], "command line: dpo.bta: unknown key; did you mean `beta`"),
        ("custom_reward.py", ["rloo.step=1"], "command line: rloo.step: unknown key; did you mean"),
    ],
)
def test_wrong_arguments_end_an_example_with_one_line(example, name, arguments, line):
    with pytest.raises(SystemExit) as error:
        example(name, *arguments)
    assert str(error.value.code).startswith(line)
    assert "\n" not in str(error.value.code)
