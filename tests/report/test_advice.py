"""Every warning appears for a training that shows its fault, and not for a healthy one."""

from __future__ import annotations

import json

import pytest

from align.report import advice
from align.runtime.progress import Display, Logger
from align.runtime.terminal import SafeConsole


def curve(*values):
    return {"": [(10.0 * (k + 1), value) for k, value in enumerate(values)]}


@pytest.mark.parametrize(
    ("kind", "metric", "faulty", "healthy", "finding"),
    [
        ("dpo", "logps/chosen", [-50, -60, -90], [-50, -51, -52], "fell from -50.0 to -90.0 nats"),
        ("grpo", "kl", [1, 5, 30], [20, 21, 22], "rose from 5.0 to 30.0 nats"),
        ("ppo", "tokens", [30, 40, 60], [30, 33, 36], "grew from 30 to 60 tokens"),
        ("rloo", "missing_eos", [0, 0.1, 0.5], [0.9, 0.2, 0.1], "50% of the completions"),
        ("ppo", "entropy", [2.0, 1.0, 0.1], [2.0, 1.5, 1.0], "entropy of the policy fell from 2"),
        ("ppo", "explained_variance", [0.5, 0, -0.4], [-0.9, 0.1, 0.5], "the critic is -0.40"),
    ],
)
def test_a_rule_tells_faulty_from_healthy_curves(kind, metric, faulty, healthy, finding):
    (warning,) = advice.about_training("s", kind, {metric: curve(*faulty)})
    assert finding in warning.finding
    assert str(warning).startswith("s: ")
    assert not list(advice.about_training("s", kind, {metric: curve(*healthy)}))
    assert not list(advice.about_training("s", "sft", {metric: curve(*faulty)}))
    assert not list(advice.about_training("s", kind, {metric: curve(*faulty[-2:])}))


@pytest.mark.parametrize(("low", "count"), [(0.84, 1), (0.83, 0)])
def test_a_reward_model_above_the_bound_of_its_labels(low, count):
    held_out = {"accuracy": 0.9, "ci": [low, 0.95], "accuracy_upper_bound": 0.835}
    found = list(advice.about_reward_model("reward", {"held_out": held_out}))
    assert len(found) == count
    assert not list(advice.about_reward_model("reward", {"held_out": {**held_out,
                                                    "accuracy_upper_bound": None}}))  # fmt: skip
    assert not list(advice.about_reward_model("reward", {"held_out": None}))


@pytest.mark.parametrize(
    ("margins", "low", "count"),
    [([0.1, 0.3, 0.9], 0.45, 1), ([0.1, 0.3, 0.9], 0.55, 0), ([0.5, 0.5, 0.6], 0.45, 0)],
)
def test_margins_that_grow_while_the_win_rate_does_not(margins, low, count):
    comparison = {"policy": "dpo", "win_rate": 0.5, "ci": [low, 0.6]}
    curves = {"rewards/margins": curve(*margins)}
    assert len(list(advice.about_margins("dpo", curves, [comparison]))) == count
    assert not list(advice.about_margins("dpo", curves, [{**comparison, "policy": "kto"}]))


def test_a_warning_is_given_once_while_a_stage_trains(tmp_path):
    lengths = [10.0] * 6 + [20.0] * 6
    watch = advice.LiveAdvice("ppo", tmp_path / "metrics.jsonl")
    given = [list(watch(step, {"tokens": length})) for step, length in enumerate(lengths, 1)]
    warned = [step for step, lines in enumerate(given, 1) if lines]
    assert warned == [9]
    assert "completions grew from 10 to 20 tokens" in given[8][0]
    healthy = advice.LiveAdvice("sft", tmp_path / "metrics.jsonl")
    assert not any(list(healthy(step, {"tokens": n})) for step, n in enumerate(lengths, 1))


def test_a_resumed_stage_knows_its_earlier_curves(tmp_path):
    file = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "tokens": 10.0} for step in range(1, 7)]
    file.write_text("\n".join(map(json.dumps, rows)))
    watch = advice.LiveAdvice("ppo", file)
    given = [list(watch(step, {"tokens": 20.0})) for step in range(7, 10)]
    assert [bool(lines) for lines in given] == [False, False, True]


def test_the_logger_prints_what_its_watch_finds(tmp_path, capsys):
    display = Display(SafeConsole(width=200))
    logger = Logger("ppo", tmp_path, display, main=True, watch=lambda step, metrics: ["look"])
    logger.log(1, {"tokens": 3})
    assert "ppo: warning: look" in capsys.readouterr().out
