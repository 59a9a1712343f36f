"""Tests of the curves of a training."""

from __future__ import annotations

import json

from align.report.curves import panels, read_curves


def test_metrics_that_are_no_curves_and_lines_that_were_cut_off_are_left_out(tmp_path):
    file = tmp_path / "metrics.jsonl"
    rows = [
        {"step": 1, "loss": 2.0, "epoch": 0.1, "done": True, "name": "x", "train_runtime": 3.0},
        {"step": 2, "loss": float("nan"), "num_tokens": 5},
        {"step": 3, "loss": 1},
        {"loss": 7.0},
    ]
    file.write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 4, "lo')
    assert read_curves(file) == {"loss": {"": [(1.0, 2.0), (3.0, 1.0)]}}
    assert read_curves(tmp_path / "none") == {}


def test_panels_join_what_is_read_together():
    one = {"": [(1.0, 0.5)]}
    names = ["grad_norm", "rewards/chosen", "rewards/rejected", "kl", "eval_kl", "min_reward",
             "mean_reward", "max_reward", "mean_token_accuracy", "learning_rate"]  # fmt: skip
    joined = {panel.title: list(panel.lines) for panel in panels(dict.fromkeys(names, one))}
    assert joined == {
        "reward": ["min", "mean", "max"],
        "kl": ["training", "held out"],
        "grad_norm": [""],
        "rewards": ["chosen", "rejected"],
        "mean_token_accuracy": [""],
        "learning_rate": [""],
    }
    assert list(joined)[:2] == ["reward", "kl"]
    assert list(joined)[-1] == "learning_rate"


def test_seeds_are_lines_of_one_panel(tmp_path):
    file = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "seed": seed, "return": seed} for seed in (0, 1) for step in (1, 2)]
    file.write_text("\n".join(map(json.dumps, rows)))
    (panel,) = panels(read_curves(file))
    assert panel.title == "return"
    assert panel.lines == {
        "seed 0": [(1.0, 0.0), (2.0, 0.0)],
        "seed 1": [(1.0, 1.0), (2.0, 1.0)],
    }
