"""The rows of ``python -m benchmarks.proofs``, their fingerprints, and the published page."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import random
import re
import statistics
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import torch

from align.config.online_rl_keys import GroupKeys, KLKeys, LossKeys, RewardKeys
from align.config.stages import ONLINE_RL, STAGES
from align.training import trl_field_table
from benchmarks.proofs import methods, optima, runs
from benchmarks.proofs import page as pages
from benchmarks.proofs.world import SPREADS, TEXTS, Example, random_rewards


@functools.cache
def trl_fields():
    """The fields of the configuration classes of the installed TRL."""
    return trl_field_table.table()


def losses_of_trl(kind: str) -> set[str]:
    """The losses that the configuration class of the installed TRL declares."""
    return set(trl_fields()[f"{kind.upper()}Config"]["loss_type"]["choices"])


def test_the_declared_losses_of_pairs_are_those_that_the_trainers_of_trl_compare_with():
    import trl

    for kind, trainer in (("dpo", trl.DPOTrainer), ("kto", trl.KTOTrainer)):
        compared = re.findall(r'if (?:self\.)?loss_type == "(\w+)"', inspect.getsource(trainer))
        assert set(compared) == losses_of_trl(kind)


def test_every_training_method_and_loss_of_trl_has_a_row_or_a_reason():
    trained = {kind for kind, stage in STAGES.items() if stage.trains_model}
    assert trained - {method.stage for method in methods.METHODS} == set()
    rows = {
        (method.stage, loss)
        for method in methods.METHODS
        if method.stage in ("sft", "dpo", "kto")
        for loss in losses_of_method(method)
    }
    losses = {(kind, loss) for kind in ("sft", "dpo", "kto") for loss in losses_of_trl(kind)}
    assert rows | methods.WITHOUT_POLICY.keys() == losses
    assert not rows & methods.WITHOUT_POLICY.keys()


def losses_of_method(method: methods.Method) -> list[str]:
    """The losses that a row of an offline stage trains with."""
    default = trl_fields()[f"{method.stage.upper()}Config"]["loss_type"]["default"]
    chosen = method.settings.get("trainer", {}).get("loss_type", default)
    return chosen if isinstance(chosen, list) else [chosen]


def test_every_choice_that_shapes_the_loss_of_online_rl_has_a_row():
    keys = {"scale_advantages", "normalize_scores"}
    keys |= {key for cls in (LossKeys, KLKeys, GroupKeys) for key in cls.model_fields}
    assert "normalize_scores" in RewardKeys.model_fields
    for key in keys:
        for stage in (STAGES[kind] for kind in ONLINE_RL if key in STAGES[kind].model_fields):
            field = stage.model_fields[key]
            hints = [field.annotation, *get_args(field.annotation)]
            choices = {c for h in hints if get_origin(h) is Literal for c in get_args(h)}
            rows = {
                method.settings.get(key, STAGES[method.stage].model_fields[key].default)
                for method in methods.METHODS
                if key in STAGES[method.stage].model_fields
            }
            assert choices <= rows, (key, choices - rows)


@functools.cache
def fingerprint(name: str) -> str:
    """The fingerprint of a method; some of them search for a minimum for seconds."""
    return next(method for method in methods.METHODS if method.name == name).fingerprint


def test_another_theory_or_training_has_another_fingerprint(monkeypatch):
    methods_by_name = {method.name: method for method in methods.METHODS}
    method = methods_by_name["GRPO"]
    prints = [fingerprint(each.name) for each in methods.METHODS]
    assert fingerprint("GRPO") == dataclasses.replace(method, formula="in other words").fingerprint
    for change in (
        {"beta": 1.0},
        {"named": methods.best},
        {"named": methods.fixed_point(beta=2.0, scale="none", per_sequence=True)},
        {"zeros": True},
        {"binary": True},
        {"settings": {**method.settings, "kl_coef": 1.0}},
    ):
        prints.append(dataclasses.replace(method, **change).fingerprint)
    zeros = methods_by_name["DPO stage, `apo_zero`"]
    prints.append(dataclasses.replace(zeros, matched_pairs=None).fingerprint)
    prints.append(dataclasses.replace(zeros, matched_pairs=500).fingerprint)
    assert len(set(prints)) == len(prints)
    exo = methods_by_name["DPO stage, `exo_pair`"]
    before = fingerprint(exo.name)
    monkeypatch.setattr(optima, "SMOOTHING", 0.2)
    assert exo.fingerprint != before
    assert method.fingerprint in prints


def test_runs_of_another_theory_are_not_read(tmp_path, monkeypatch):
    from benchmarks.proofs import __main__ as command

    method = next(method for method in methods.METHODS if method.name == "RLOO")
    monkeypatch.setattr(command, "METHODS", [method])
    run = runs.Run("RLOO", 0, 0.5, 0.01, 0.0, 0.01, 0.5, fingerprint=method.fingerprint)
    file = tmp_path / "proofs.jsonl"
    file.write_text(json.dumps(dataclasses.asdict(run)) + "\n")
    assert command.read(file) == [run]
    other = dataclasses.replace(method, named=optima.best_of_two)
    monkeypatch.setattr(command, "METHODS", [other])
    assert command.read(file) == []


def runs_of(rows):
    """Three runs of each method, in no order."""
    return [
        runs.Run(
            method.name, seed, 0.5, 0.015 * seed, 0.25, 0.125 + 0.125 * seed, 0.75,
            reference_point=0.5 if method.stage == "kto" else None,
            from_named=0.015 * seed if method.zeros else None,
            seconds=60.0,
            fingerprint=fingerprint(method.name),
        )
        for method in rows
        for seed in (2, 0, 1)
    ]  # fmt: skip


def test_a_method_without_a_run_keeps_its_rows_of_a_page_of_the_same_theory(monkeypatch):
    names = ("PPO", "KTO stage, `kto`", "GRPO, `scale_advantages: batch`")
    rows = [next(each for each in methods.METHODS if each.name == name) for name in names]
    monkeypatch.setattr(pages, "METHODS", rows)
    before = pages.page(runs_of(rows))
    note = pages.KEPT.format(3) + "\n"
    time = pages.time_of(runs_of(rows)) + "\n"
    assert pages.page([], before).replace(note, "") == before.replace(time, "")
    assert time in before
    assert len(pages.fingerprints(before)) == 3
    other = dataclasses.replace(rows[0], named=optima.best_of_two)
    monkeypatch.setattr(pages, "METHODS", [other, *rows[1:]])
    later = pages.page([], before)
    assert "## Not run so far\n\n- PPO\n" in later
    assert "| PPO |" not in later
    # A new run replaces the rows of the page.
    monkeypatch.setattr(pages, "METHODS", rows)
    run = dataclasses.replace(runs_of(rows[:1])[0], reached=0.001)
    assert "| 0.50 | 0.001 | 0.001 |\n" in pages.page([run], before)


def test_the_page_has_every_row_with_its_divergences_and_interval():
    text = pages.page(runs_of(methods.METHODS))
    # mean 0.015, standard deviation 0.015: 4.303 * 0.015 / sqrt(3) = 0.0373
    row = "| PPO | `ppo` | h = r/β | 0.50 | 0.000, 0.015, **0.030** | 0.015 ± 0.037 |\n"
    assert row in text
    assert text.count("0.015 ± 0.037 |") == len(methods.METHODS)
    # Differences -0.125, 0 and 0.125: mean 0, 4.303 * 0.125 / sqrt(3) = 0.3105
    seeds = "| 0.250, 0.250, 0.250 | 0.125, 0.250, 0.375 | 0.000 ± 0.311 |"
    biased = sum(map(pages.biased, methods.METHODS))
    assert 0 < biased < len(methods.METHODS)
    assert text.count(f"| 0.015 ± 0.037 {seeds}") == biased
    # 0.311 is more than half of 0.25.
    assert text.count(": 0.250, off by up to 0.311: no digit\n") == biased
    # One minute for each of the runs.
    n = len(methods.METHODS)
    assert f"\n{3 * n} training runs of {n} methods took {3 * n} minutes of processor time" in text


def test_losses_that_exclude_completions_have_the_finite_divergence_and_the_farthest_seed(
    monkeypatch,
):
    rows = [method for method in methods.METHODS if method.name == "DPO stage, `apo_zero`"]
    monkeypatch.setattr(pages, "METHODS", rows)
    text = pages.page(runs_of(rows))
    assert "| 0.000 ± 0.311 | 0.000, 0.015, **0.030** |\n" in text
    assert "\n- DPO stage, `apo_zero`: 0.125 measured against 0.250\n" in text
    without = [dataclasses.replace(run, from_named=None) for run in runs_of(rows)[:2]]
    text = pages.page([*without, runs_of(rows)[2]])
    assert "| 0.000 ± 0.311 | – |\n" in text
    text = pages.page(runs_of([method for method in methods.METHODS if method.name == "PPO"]))
    assert "measured against" not in text


def test_the_divergence_from_a_policy_that_excludes_completions_by_hand():
    world = Example(Path(), random_rewards(random.Random(0), SPREADS))
    rows = torch.zeros(2, len(TEXTS), dtype=torch.float64)
    named, trained, collapsed = rows.clone(), rows.clone(), rows.clone()
    named[:, :2] = 0.5
    trained[0, :3] = torch.tensor([0.6, 0.2, 0.2])
    trained[1, :2] = 0.5
    collapsed[:, :2] = torch.tensor([0.999, 0.001])
    method = dataclasses.replace(
        next(method for method in methods.METHODS if method.zeros), named=lambda _: named.log()
    )
    run = runs.compare(method, 0, world, trained.log())
    # Prompt 1: 0.5 log(0.5 / 0.6) + 0.5 log(0.5 / 0.2) = 0.367; prompt 2: 0.
    assert run.from_named == pytest.approx(0.36698 / 2, abs=1e-5)
    assert run.reached == pytest.approx(0.2 / 2)
    # 0.5 log(0.5 / 0.999) + 0.5 log(0.5 / 0.001): it excludes what it should, and is far away.
    run = runs.compare(method, 0, world, collapsed.log())
    assert (run.reached, run.from_named) == (0.0, pytest.approx(2.7612, abs=1e-4))
    unbiased = next(method for method in methods.METHODS if not method.zeros)
    assert runs.compare(unbiased, 0, world, world.reference).from_named is None


def test_digits_of_a_bias_by_hand():
    head = "| method |\n|---|\n"
    row = "| {} | `dpo` | h = r | 0.5 | 0.0 | 0.0 | 0.100, 0.300 | 0.104, 0.304 | {} |\n"
    # Mean 0.2 by the formula: 0.004 + 0.006 is 5 %, 0.004 + 0.096 is 50 %.
    rows = [("two", "0.004 ± 0.006"), ("one", "-0.004 ± 0.096"), ("none", "0.004 ± 0.097")]
    text = pages.digits(head + "".join(row.format(*each) for each in rows))
    assert text == pages.DIGITS + (
        "- one: 0.200, off by up to 0.100: one digit\n- none: 0.200, off by up to 0.101: no digit\n"
    )
    assert pages.digits(head + row.format(*rows[0])) == ""


def test_the_time_is_compared_with_the_aim_if_every_method_has_runs(monkeypatch):
    rows = [method for method in methods.METHODS if method.name in ("PPO", "GRPO")]
    monkeypatch.setattr(pages, "METHODS", rows)
    each = [dataclasses.replace(run, seconds=300.0) for run in runs_of(rows)]
    # 6 runs of 5 minutes, 15 minutes on each of two cores
    assert pages.time_of(each).endswith(
        "15.0 minutes on two cores, within the 15 minutes that are the aim."
    )
    longer = [*each[1:], dataclasses.replace(each[0], seconds=420.0)]
    assert pages.time_of(longer).endswith(
        "16.0 minutes on two cores, above the 15 minutes that are the aim."
    )
    assert pages.time_of(each[:3]).endswith("7.5 minutes on two cores.")


PAGE = Path(__file__).parents[2] / "docs" / "results" / "proofs.md"


def test_the_published_page_has_the_present_training_and_theory():
    """Rows of another theory are refused: train them, with ``python -m benchmarks.proofs``."""
    published = pages.fingerprints(PAGE.read_text(encoding="utf-8"))
    assert published.keys() == {method.name for method in methods.METHODS}
    for method in methods.METHODS:
        # The last digits of a minimum that is searched for depend on the processor.
        if method.formula != methods.TABLE and "discopop" not in method.name:
            assert published[method.name] == fingerprint(method.name), method.name


def cells() -> dict[str, list[str]]:
    """The cells of the rows of the published page, by method."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row for row in rows if len(row) > 5}


def test_the_published_page_has_every_method_within_the_bound():
    published = cells()
    assert {method.name for method in methods.METHODS} == published.keys() - {"method", "---"}
    for method in methods.METHODS:
        reached = [float(value.strip("*")) for value in published[method.name][4].split(",")]
        assert len(reached) == 3, method.name
        assert max(reached) <= methods.BOUND, method.name
        mean, _ = published[method.name][5].split(" ± ")
        assert float(mean) == pytest.approx(sum(reached) / 3, abs=1e-3)
        if pages.biased(method):
            cells_of_bias = published[method.name][6:]
            named, measured = (list(map(float, cell.split(","))) for cell in cells_of_bias[:2])
            assert len(named) == len(measured) == 3
            mean, half = map(float, cells_of_bias[2].split(" ± "))
            expected = statistics.mean(measured) - statistics.mean(named)
            assert mean == pytest.approx(expected, abs=2e-3)
            assert half > 0
            if method.zeros:
                divergences = [float(each.strip("*")) for each in cells_of_bias[3].split(", ")]
                assert len(divergences) == 3
                assert max(divergences) <= methods.BOUND, method.name
    text = PAGE.read_text(encoding="utf-8")
    for (stage, loss), reason in methods.WITHOUT_POLICY.items():
        assert f"| `{stage}` | `{loss}` | {reason} |" in text
