"""The picture of a run, its samples, and the table of results."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
from helpers import ppo_fixtures
from helpers.ppo_fixtures import Folders

from align.online_rl import plots, run, samples
from align.online_rl.results import OnlineRLMetrics
from align.rewards import gold


def test_row_30_reward_hacking_is_visible_in_metrics_and_in_one_picture(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig

    def recording(self: Any, *args: Any, **kwargs: Any) -> None:
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", recording)
    trainer = ppo_fixtures.build_trainer(
        folders, tmp_path, judge="gold", eval_steps=1, eval_split="test", n_eval_prompts=4
    )
    scored = []
    monkeypatch.setattr(
        gold,
        "gold_score",
        lambda prompt, text: scored.append((prompt, text)) or float(len(scored) % 3),
    )
    for step in range(3):
        trainer.step(step)
        trainer.evaluate(step + 1)
    trainer.save_policy()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "score" in line]
    held_out = [line for line in lines if "eval_score" in line]
    keys = {"reward", "gold", "kl", "tokens", "missing_eos"}
    assert len(steps) == len(held_out) == 3
    for line in steps:
        assert keys | {"score", "entropy", "clip_fraction", "grad_norm"} <= line.keys()
    for line in held_out:
        assert {f"eval_{key}" for key in keys} <= line.keys()
    assert keys <= trainer.metrics.keys()

    rows = [*trainer.prompts.rows, *trainer.held_out.rows]
    assert {prompt for prompt, _ in scored} <= {row["prompt"][-1]["content"] for row in rows}
    # 8 completions per step and 4 held out: the mean gold score of each, in the order of the calls
    first = [float((k + 1) % 3) for k in range(8)]
    assert steps[0]["gold"] == pytest.approx(sum(first) / 8)

    assert (tmp_path / plots.PICTURE).stat().st_size > 10_000
    (picture,) = figures
    titles = [axes.get_title(loc="left") for axes in picture.axes]
    for key in ("gold", "kl", "tokens", "missing_eos", "score"):
        assert dict(plots.PANELS)[key] in titles
    both = [axes for axes in picture.axes if axes.get_ylabel() in ("reward", "gold score")]
    assert [axes.get_ylabel() for axes in both] == ["reward", "gold score"]
    assert both[0].get_position().bounds == both[1].get_position().bounds  # one plot, two scales
    for axes, key in zip(both, ("reward", "gold"), strict=True):
        (points,) = axes.lines
        assert points.get_ydata().tolist() == [line[key] for line in steps]
        distance = [math.sqrt(max(0.0, line["kl"])) for line in steps]
        assert points.get_xdata().tolist() == pytest.approx(distance)


def test_each_of_several_rewards_is_on_the_progress_line_in_the_table_the_picture_and_trackers(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("matplotlib")
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "draw_panels", lambda panels, *_, **__: drawn.extend(panels))
    trainer = ppo_fixtures.build_trainer(
        folders, tmp_path, rewards=[ppo_fixtures.FIVE, "align.rewards.gold:rewards"],
        steps=2, eval_steps=2, eval_split="test", n_eval_prompts=4, report_to=["wandb"],
    )  # fmt: skip
    sent: list[tuple[int, dict[str, float]]] = []
    tracker = SimpleNamespace(log=lambda v, step: sent.append((step, v)), finish=lambda: None)
    accelerator = SimpleNamespace(trackers=[tracker], init_trackers=lambda *_, **__: None)
    monkeypatch.setattr(accelerate, "Accelerator", lambda **_: accelerator)
    shown: list[dict[str, float]] = []
    monkeypatch.setattr(trainer.logger, "step", lambda done, total, values: shown.append(values))
    trainer.train()
    plots.draw(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "score" in line]
    assert [{"step": step, **values} for step, values in sent] == [
        {k if k == "step" else f"ppo/{k}": v for k, v in line.items()} for line in lines
    ]
    gold = [line["rewards/align.rewards.gold:rewards"] for line in steps]
    assert [values["five"] for values in shown] == [5.0, 5.0]
    assert [values["rewards"] for values in shown] == gold
    metrics = OnlineRLMetrics.from_metrics(
        {"ppo": trainer.metrics | trainer.held_out_metrics, "steps": 2, "trained_parameters": 1}
    )
    table = run.result_table(metrics, tmp_path)
    assert table.columns[-2:] == ("five", "rewards")
    held_out = lines[-1]["eval_rewards/align.rewards.gold:rewards"]
    assert [row[-2:] for row in table.rows] == [
        ("5.000", f"{gold[-1]:.3f}"),
        ("5.000", f"{held_out:.3f}"),
    ]
    (panel,) = [panel for panel in drawn if panel.title == plots.REWARDS]
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    panel.draw(axes)
    curves = {line.get_label(): line.get_ydata().tolist() for line in axes.lines}
    assert curves == {"five": [5.0, 5.0], "rewards": gold}


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        pytest.param(4, [1, 2, 3, 4], id="a short run: all steps"),
        pytest.param(45, [1, *range(2, 45, 2), 45], id="about 20 steps, the first and the last"),
    ],
)
def test_samples_are_written_for_about_20_steps(steps: int, expected: list[int]):
    assert [s for s in range(1, steps + 1) if samples.is_sampled(s, steps)] == expected


def test_the_result_table_has_a_row_for_training_and_one_for_held_out_prompts(tmp_path: Path):
    last = {"score": 1.5, "reward": 1.75, "kl": 2.0, "entropy": 0.25, "tokens": 30.0}
    last |= {"missing_eos": 0.125, "kl_coef": 0.05}
    last |= {"eval_score": 1.25, "eval_reward": 1.3, "eval_kl": 2.5, "eval_gold": 0.5}
    last |= {"eval_tokens": 29.0, "eval_missing_eos": 0.0}
    stored = {"grpo": last, "steps": 40, "trained_parameters": 1000, "score": 1.5, "kl": 2.0}
    metrics = OnlineRLMetrics.from_metrics(stored)
    assert metrics.trained_parameters == 1000
    table = run.result_table(metrics, tmp_path)
    assert table.columns == ("prompts<", "score", "gold", "KL", "entropy", "tokens", "no eos")
    assert list(table.rows) == [
        ("training", "1.500", "–", "2.00", "0.250", "30.0", "0.125"),
        ("held out", "1.250", "0.500", "2.50", "–", "29.0", "0.000"),
    ]
    assert "40" in table.title
