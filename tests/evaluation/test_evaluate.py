"""Evaluation: metrics recomputed from their raw data, refused prompts, tables."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers import tiny_models
from helpers.damage import DAMAGES
from rich.console import Console
from sklearn.linear_model import LogisticRegression

from align.config.data import Prepare
from align.config.evaluate import Evaluate
from align.config.training import DPO
from align.errors import UserError, printable
from align.evaluation import completions, tables
from align.evaluation.completions import Samples
from align.evaluation.held_out import training_tables
from align.evaluation.judging import Outcomes
from align.functional.intervals import proportion_interval
from align.models import generation, loading, tokenization
from align.models.generation import Completion
from align.models.prefix_sharing import wrapper
from align.pipeline.summary import render_table
from align.rewards import gold
from align.runtime import artifacts
from align.stages import dpo, evaluate, prepare

SETTINGS = {"baseline": "sft", "max_new_tokens": 16, "batch_size": 32, "temperature": 1.0}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tiny_models.World:
    return tiny_models.world(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def policy(world: tiny_models.World) -> Path:
    """A DPO stage on the SFT model."""
    folder = world.folder / "policy"
    settings = DPO(model="sft", trainer=tiny_models.TRAINER | {"max_steps": 4})
    tiny_models.stage(dpo, settings, {"model": world.sft, "pairs": world.data}, folder)
    return folder


def run(folder: Path, prompts: Path, models: dict[str, Path], **more: Any) -> dict[str, Any]:
    """Evaluate ``models`` by name; ``sft`` is the baseline."""
    names = [name for name in models if name != "sft"]
    settings = Evaluate(policies=names or ["sft"], **SETTINGS | more)
    inputs = {"baseline": models["sft"], "prompts": prompts}
    inputs |= {f"policies.{i}": models[name] for i, name in enumerate(settings.policies)}
    return tiny_models.stage(evaluate, settings, inputs, folder)


def checksum(prompt: str, completion: str) -> float:
    """Replaces the gold score, which is 0 for every text of a tiny model: 0.0, 0.1, … 1.0."""
    gold.parse_prompt(prompt)
    return round(zlib.crc32(completion.encode()) / 2**32, 1)


@pytest.fixture(scope="module")
def measured(world: tiny_models.World, policy: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A finished evaluation: its folder and its metrics."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gold, "gold_score", checksum)
        folder = world.folder / "evaluate"
        models = {"sft": world.sft, "dpo": policy}
        metrics = run(
            folder,
            world.data,
            models,
            judge="gold",
            n_completions=3,
            resamples=20_000,
            implicit_rewards=True,
            confidence=0.9,
        )
        yield folder, metrics


def table(folder: Path, policy: str) -> dict[str, np.ndarray]:
    """The comparisons of one policy, with one row per prompt and one column per completion."""
    rows = [
        r
        for r in pq.read_table(folder / "comparisons.parquet").to_pylist()
        if r["policy"] == policy
    ]
    n = len({row["prompt"] for row in rows})
    assert [row["prompt"] for row in rows[:: len(rows) // n]] == list(
        dict.fromkeys(r["prompt"] for r in rows)
    )
    return {key: np.array([row[key] for row in rows]).reshape(n, -1) for key in rows[0]}


def won(rows: dict[str, np.ndarray]) -> np.ndarray:
    return (np.sign(rows["policy_score"] - rows["baseline_score"]) + 1) / 2


# Win rates ----------------------------------------------------------------------------------------


def test_metrics_have_the_documented_keys_and_are_json(measured: Any):
    _, metrics = measured
    documented = {
        "policy",
        "baseline",
        "judge",
        "win_rate",
        "ci",
        "ties",
        "n_prompts",
        "n_completions",
        "length_controlled_win_rate",
        "mean_tokens",
        "mean_score",
        "consistency",
        "invalid",
    }
    assert [row["policy"] for row in metrics["comparisons"]] == ["dpo", "sft again"]
    for row in metrics["comparisons"]:
        assert documented <= row.keys()
        assert (row["baseline"], row["judge"], row["invalid"]) == ("sft", "gold", 0)
        assert row["mean_tokens"].keys() == row["mean_score"].keys() == {"policy", "baseline"}
        assert row["ci"][0] <= row["win_rate"] <= row["ci"][1]
    assert json.loads(json.dumps(metrics)) == metrics


@pytest.mark.parametrize("place", [0, 1], ids=["policy", "control"])
def test_metrics_are_recomputed_from_the_comparisons(
    measured: Any, world: tiny_models.World, place: int
):
    folder, metrics = measured
    row = metrics["comparisons"][place]
    rows = table(folder, row["policy"])
    prompts = tiny_models.rows(world.data, "prompts-test")
    assert rows["prompt"].shape == (len(prompts), 3) == (row["n_prompts"], row["n_completions"])
    assert rows["prompt"][:, 0].tolist() == [p["prompt"][0]["content"] for p in prompts]

    outcomes = won(rows)
    assert len(np.unique(outcomes)) == 3, "wins, ties and losses"
    assert row["win_rate"] == pytest.approx(outcomes.mean(), abs=1e-12)
    assert row["ties"] == pytest.approx((outcomes == 0.5).mean(), abs=1e-12)
    for side in ("policy", "baseline"):
        assert row["mean_score"][side] == pytest.approx(rows[f"{side}_score"].mean(), abs=1e-12)
        assert row["mean_tokens"][side] == pytest.approx(rows[f"{side}_tokens"].mean(), abs=1e-12)
    gain = (rows["policy_score"] - rows["baseline_score"]).mean(axis=1)
    assert row["score_difference"] == pytest.approx(gain.mean(), abs=1e-12)

    # 90 % intervals by bootstrap over prompts, with random numbers of numpy
    random = np.random.default_rng(0)
    drawn = random.integers(len(prompts), size=(20_000, len(prompts)))
    for key, by_prompt in (("ci", outcomes.mean(axis=1)), ("score_difference_ci", gain)):
        ends = np.quantile(by_prompt[drawn].mean(axis=1), [0.05, 0.95])
        assert row[key] == pytest.approx(ends, abs=0.01), key
        assert ends[1] - ends[0] > 0.03, "narrower, it could agree by chance"

    by_prompt = outcomes.mean(axis=1)
    resampled = (by_prompt - by_prompt.mean())[drawn]
    statistics = resampled.mean(axis=1) / resampled.std(axis=1)
    observed = (by_prompt.mean() - 0.5) / by_prompt.std()
    p_value = 2 * min((statistics >= observed).mean(), (statistics <= observed).mean())
    assert row["p_value"] == pytest.approx(p_value, abs=0.03)

    # each comparison as a win and a loss, weighted by its outcome; 1 and tanh(difference / std)
    characters = [np.vectorize(len)(rows[f"{side}_completion"]) for side in ("policy", "baseline")]
    lengths = (characters[0] - characters[1]).flatten()
    design = np.stack([np.ones(len(lengths)), np.tanh(lengths / lengths.std(ddof=1))], axis=1)
    fit = LogisticRegression(C=100.0, fit_intercept=False, tol=1e-10)
    labels = np.repeat([1, 0], len(lengths))
    weights = np.concatenate([outcomes.flatten(), 1 - outcomes.flatten()])
    fit.fit(np.concatenate([design, design]), labels, sample_weight=weights)
    controlled = 1 / (1 + np.exp(-fit.coef_[0, 0]))
    assert row["length_controlled_win_rate"] == pytest.approx(controlled, abs=1e-4)
    assert abs(controlled - row["win_rate"]) > 1e-4


def test_comparisons_hold_the_completions_of_each_model_from_its_own_stream(
    measured: Any, world: tiny_models.World, policy: Path
):
    folder, metrics = measured
    prompts = [row["prompt"] for row in tiny_models.rows(world.data, "prompts-test")]
    own, control = table(folder, "dpo"), table(folder, "sft again")
    config = Evaluate(policies=["dpo"], **SETTINGS, judge="gold")
    for model, name, texts in (
        (world.sft, "sft", own["baseline_completion"]),
        (policy, "dpo", own["policy_completion"]),
        (world.sft, "sft", control["baseline_completion"]),
        (world.sft, "sft again", control["policy_completion"]),
    ):
        sampled = generation.sample(
            loading.load_merged(model, dtype="float32"),
            tokenization.load_tokenizer(model),
            prompts,
            n_completions=3,
            temperature=1.0,
            top_p=1.0,
            max_new_tokens=16,
            batch_size=32,
            seed=completions.stream_seed(config, name),
        )
        assert [[c.text for c in row] for row in sampled] == texts.tolist()
    finished = [c.finished for row in sampled for c in row]
    assert metrics["comparisons"][1]["finished"]["policy"] == sum(finished) / len(finished)


def test_the_control_is_the_baseline_in_another_stream_and_its_interval_contains_one_half(
    measured: Any,
):
    folder, metrics = measured
    control = table(folder, "sft again")
    same = control["policy_completion"] == control["baseline_completion"]
    assert same.mean() < 0.2
    low, high = metrics["comparisons"][1]["ci"]
    assert low < 0.5 < high


def test_copies_of_the_baseline_are_independent_samples_of_it(
    world: tiny_models.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(gold, "gold_score", checksum)
    models = {"sft": world.sft, "twin": world.sft, "other twin": world.sft}
    metrics = run(tmp_path, world.data, models, judge="gold", n_completions=2, confidence=0.99)
    sides = [table(tmp_path, name) for name in ("twin", "other twin", "sft again")]
    samples = [sides[0]["baseline_completion"], *(side["policy_completion"] for side in sides)]
    for first, second in itertools.combinations(samples, 2):
        assert (first == second).mean() < 0.2
    for row in metrics["comparisons"]:
        assert row["n_prompts"] == len(sides[0]["prompt"])
        assert row["ci"][0] < 0.5 < row["ci"][1], row["policy"]


def test_each_seed_and_place_has_its_own_stream():
    policies = ["a", "b", "sft"]
    seeds = [
        completions.stream_seed(
            Evaluate(policies=policies, baseline="sft", judge="gold", seed=seed), name
        )
        for seed in (0, 1)
        for name in ("a", "b", "sft", "sft again")
    ]
    assert len(set(seeds)) == 8
    assert max(seeds) < 2**32


def test_the_judge_is_the_embedded_tasks_gold_score(
    world: tiny_models.World, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pairs = {row["prompt"][0]["content"]: row for row in tiny_models.rows(world.data, "pairs-test")}
    prompts = [row["prompt"][0]["content"] for row in tiny_models.rows(world.data, "prompts-test")]
    sides = ("chosen", "rejected", "rejected")  # the policy, the baseline, the control
    texts = [
        [pairs[text][side][0]["content"] if text in pairs else "" for text in prompts]
        for side in sides
    ]
    calls = iter(texts)

    def sample(model: Any, tokenizer: Any, prompts: Any, **_: Any) -> list[list[Completion]]:
        return [[Completion(text, 1, True)] for text in next(calls)]

    monkeypatch.setattr(generation, "sample", sample)
    metrics = run(tmp_path, world.data, {"sft": world.sft, "dpo": policy}, judge="gold")
    policy_scores, baseline, _ = (
        [gold.gold_score(*row) for row in zip(prompts, completions, strict=True)]
        for completions in texts
    )
    row = metrics["comparisons"][0]
    assert row["mean_score"]["policy"] == pytest.approx(np.mean(policy_scores))
    assert row["mean_score"]["baseline"] == pytest.approx(np.mean(baseline))
    wins = np.mean([(a > b) + 0.5 * (a == b) for a, b in zip(policy_scores, baseline, strict=True)])
    assert row["win_rate"] == pytest.approx(wins)
    assert abs(wins - 0.5) > 0.01, "at one half a swap would not show"


# Refused prompts ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_split(world: tiny_models.World) -> Path:
    """The same rows in another split: prompts held out here were trained on there."""
    folder = world.folder / "other"
    settings = Prepare(source="embedded", max_rows=60, test_fraction=0.25, split_seed=1)
    tiny_models.stage(prepare, settings, {}, folder)
    return folder


@pytest.mark.parametrize("what", [{"judge": "gold"}, {"implicit_rewards": True}])
def test_prompts_in_the_training_data_of_a_policy_are_refused(
    world: tiny_models.World, policy: Path, other_split: Path, tmp_path: Path, what: dict[str, Any]
):
    with pytest.raises(UserError, match=r"held-out prompts of .* training data of `dpo`") as error:
        run(tmp_path, other_split, {"sft": world.sft, "dpo": policy}, **what)
    assert "demonstrations-train.parquet" in str(error.value)
    kind = "prompts" if "judge" in what else "pairs"
    held_out = {row["prompt_id"] for row in tiny_models.rows(other_split, f"{kind}-test")}
    trained = {row["prompt_id"] for row in tiny_models.rows(world.data, "demonstrations-train")}
    assert f"{len(held_out & trained)} of {len(held_out)} held-out" in str(error.value)


def copy_of(
    source: Path, folder: Path, inputs: dict[str, Path] | None = None, **changed: Any
) -> Path:
    """A copy of a stage without its artifact, or with ``inputs`` and ``changed`` in it."""
    artifact = artifacts.read_artifact(source)
    assert artifact is not None
    shutil.copytree(source, folder)
    (folder / artifacts.FILE).unlink()
    if inputs is not None:
        folders = {name: {"folder": str(path), "digest": ""} for name, path in inputs.items()}
        artifacts.write_artifact(
            folder,
            dataclasses.replace(artifact, inputs=folders, **changed),
        )
    return folder


@pytest.mark.parametrize(
    "lineage",
    [
        pytest.param(("sft",), id="through its initial model"),
        pytest.param(("lora", "sft"), id="through two models"),
    ],
)
def test_prompts_in_the_training_data_of_an_ancestor_are_refused(
    world: tiny_models.World, other_split: Path, tmp_path: Path, lineage: tuple[str, ...]
):
    baseline = copy_of(world.sft, tmp_path / "elsewhere")
    inputs = {"pairs": other_split, "model": getattr(world, lineage[0])}
    model = copy_of(world.sft, tmp_path / "dpo", inputs, stage="dpo")
    assert {folder for folder, _ in training_tables(model)} == {other_split, world.data}
    with pytest.raises(UserError, match="in the training data of `dpo`"):
        run(tmp_path / "out", other_split, {"sft": baseline, "dpo": model}, judge="gold")


def test_the_training_tables_of_ppo_are_its_prompts_and_those_of_its_reward_models(
    world: tiny_models.World, other_split: Path, tmp_path: Path
):
    reward = copy_of(world.sft, tmp_path / "reward", {"pairs": other_split}, stage="reward")
    model = copy_of(
        world.sft, tmp_path / "ppo", {"prompts": world.data, "rewards.0": reward}, stage="ppo"
    )
    assert training_tables(model) == {(world.data, "prompts"), (other_split, "pairs")}


def test_prompts_are_refused_after_the_runs_folder_was_moved(
    world: tiny_models.World, other_split: Path, tmp_path: Path
):
    runs = tmp_path / "runs"
    shutil.copytree(world.data, runs / "data")
    missing = tmp_path / "missing"
    baseline = copy_of(world.sft, runs / "sft", {"demonstrations": missing / "data"})
    model = copy_of(world.sft, runs / "dpo", {"model": missing / "sft"})
    assert training_tables(model) == {(runs / "data", "demonstrations")}
    with pytest.raises(UserError, match="in the training data of"):
        run(tmp_path / "out", other_split, {"sft": baseline, "dpo": model}, judge="gold")


def test_damaged_training_data_of_a_model_are_named(
    world: tiny_models.World, other_split: Path, tmp_path: Path
):
    # A changed prompt_id would not be recognized as held out.
    shutil.copytree(other_split, tmp_path / "data")
    model = copy_of(world.sft, tmp_path / "sft", {"demonstrations": tmp_path / "data"})
    DAMAGES["a flipped bit"](tmp_path / "data" / "demonstrations-train.parquet")
    with pytest.raises(UserError, match=r"demonstrations-train.parquet: its content differs"):
        training_tables(model)


def test_a_model_without_an_artifact_is_evaluated(
    world: tiny_models.World, other_split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    baseline = copy_of(world.sft, tmp_path / "elsewhere")
    metrics = run(tmp_path / "out", other_split, {"sft": baseline}, judge="gold", n_prompts=2)
    assert [row["policy"] for row in metrics["comparisons"]] == ["sft again"]


@pytest.mark.parametrize(
    ("what", "file"),
    [({"judge": "gold"}, "prompts-test"), ({"implicit_rewards": True}, "pairs-test")],
)
def test_data_without_held_out_rows_is_refused(
    world: tiny_models.World, tmp_path: Path, what: dict[str, Any], file: str
):
    tiny_models.stage(
        prepare, Prepare(source="embedded", max_rows=20, test_fraction=0.0), {}, tmp_path / "data"
    )
    with pytest.raises(
        UserError, match=rf"no {file}.parquet.*set `test_fraction` of its `prepare` stage above 0"
    ):
        run(tmp_path / "out", tmp_path / "data", {"sft": world.sft}, **what)


# Implicit rewards ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def foreign(world: tiny_models.World) -> Path:
    """Prompts of another task with two pairs each, some longer than the model's positions."""
    file = world.folder / "foreign.jsonl"
    rows = [
        {
            "prompt": f"Say {n}." if n % 4 else f"Say {n}. " + "and the sea " * 60,
            "chosen": sides[(n + k) % 3 == 0],
            "rejected": sides[(n + k) % 3 != 0],
        }
        for n in range(24)
        for k, word in enumerate(("calm", "merry"))
        for sides in [(f"The {word} {n} sings.", f"The {n} gull {word}!")]
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    folder = world.folder / "foreign"
    tiny_models.stage(prepare, Prepare(source=str(file), test_fraction=0.5), {}, folder)
    return folder


def test_gold_refuses_prompts_of_other_tasks(
    world: tiny_models.World, foreign: Path, tmp_path: Path
):
    with pytest.raises(UserError, match="`gold` scores only prompts of the embedded task"):
        run(tmp_path, foreign, {"sft": world.sft}, judge="gold")


def plain_logp(model: Any, tokenizer: Any, prompt: Any, completion: Any) -> float:
    """Of one row without padding, from all logits; NaN where the prompt fills all positions."""
    start = len(
        tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    )
    ids = tokenizer.apply_chat_template(prompt + completion, return_dict=False)
    ids = ids[:-1][: tiny_models.POSITIONS]  # without ChatML's line feed behind eos
    with torch.no_grad():
        logps = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(dim=-1)
    if start >= len(ids):
        return float("nan")
    return sum(logps[i - 1, ids[i]].item() for i in range(start, len(ids)))


def test_implicit_rewards_by_hand(
    world: tiny_models.World, policy: Path, foreign: Path, tmp_path: Path
):
    models = {"sft": world.sft, "dpo": policy, "lora": world.lora}
    metrics = run(tmp_path, foreign, models, implicit_rewards=True)
    assert "comparisons" not in metrics
    assert not (tmp_path / "comparisons.parquet").exists()
    tokenizer = tokenization.load_tokenizer(world.sft)
    rows = tiny_models.rows(foreign, "pairs-test")
    loaded = {
        name: loading.load_merged(path, dtype="float32").eval() for name, path in models.items()
    }
    logps = {
        name: np.array(
            [
                [
                    plain_logp(model, tokenizer, r["prompt"], r[side])
                    for side in ("chosen", "rejected")
                ]
                for r in rows
            ]
        )
        for name, model in loaded.items()
    }
    for entry, name in zip(metrics["implicit_rewards"], ("dpo", "lora"), strict=True):
        ratios = logps[name] - logps["sft"]
        margins = ratios[:, 0] - ratios[:, 1]
        by_prompt: dict[str, list[bool]] = {}
        for row, margin in zip(rows, margins, strict=True):
            if not np.isnan(margin):
                by_prompt.setdefault(row["prompt_id"], []).append(margin > 0)
        means = np.array([np.mean(correct) for correct in by_prompt.values()])
        assert (entry["policy"], entry["reference"]) == (name, "sft")
        assert entry["accuracy"] == pytest.approx(means.mean())
        assert 0 < means.mean() < 1
        assert entry["mean_margin"] == pytest.approx(np.nanmean(margins), rel=1e-3)
        assert entry["n_pairs"] == np.isfinite(margins).sum() == 2 * len(means)
        assert entry["n_prompts"] == len(means)
        assert entry["invalid"] == np.isnan(margins).sum() > 0
        interval = proportion_interval(torch.tensor(means))  # one observation per prompt
        assert entry["ci"] == pytest.approx(list(interval))


@pytest.mark.parametrize("settings", [{}, {"prefix_sharing": False}], ids=["default", "off"])
def test_scoring_shares_prefixes_by_default(
    world: tiny_models.World, foreign: Path, tmp_path: Path, settings: dict[str, bool], monkeypatch
):
    shared = []
    share = wrapper.enable_prefix_sharing
    monkeypatch.setattr(
        wrapper,
        "enable_prefix_sharing",
        lambda model: shared.append(model) or share(model),
    )
    run(
        tmp_path, foreign, {"sft": world.sft, "lora": world.lora}, implicit_rewards=True, **settings
    )
    assert len(shared) == (0 if settings else 2)


def test_prompts_that_all_fill_the_models_positions_are_refused(
    world: tiny_models.World, policy: Path, tmp_path: Path
):
    file = tmp_path / "long.jsonl"
    rows = [{"prompt": f"{n} " * 200, "chosen": "Yes.", "rejected": "No."} for n in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tiny_models.stage(prepare, Prepare(source=str(file), test_fraction=0.5), {}, tmp_path / "data")
    models = {"sft": world.sft, "dpo": policy}
    with pytest.raises(UserError, match="prompt that fills the positions"):
        run(tmp_path / "out", tmp_path / "data", models, implicit_rewards=True)


# Tables -------------------------------------------------------------------------------------------


def cells(folder: Path) -> list[list[list[str]]]:
    """The rows of each table of a finished stage, headers first."""
    artifact = artifacts.read_artifact(folder)
    assert artifact is not None
    return [[table["columns"], *table["rows"]] for table in artifact.tables]


def test_the_tables_contain_win_rates_intervals_and_implicit_rewards(measured: Any):
    folder, metrics = measured
    artifact = artifacts.read_artifact(folder)
    assert artifact is not None
    *_, win_rates, drift, rewards, _ = cells(folder)  # the judge card is last
    assert "against sft by gold" in artifact.tables[-4]["title"]
    first, baseline = metrics["drift"]
    assert drift[1][:2] == ["dpo", f"{first['kl']:.2f}"]
    assert first["kl_ci"][0] < first["kl"] < first["kl_ci"][1]
    assert (baseline["policy"], baseline["kl"]) == ("sft", None)
    assert baseline["entropy"] > 0
    for comparison, (name, *row) in zip(metrics["comparisons"], win_rates[1:], strict=True):
        assert name == comparison["policy"]
        shares = (
            comparison["win_rate"],
            *comparison["ci"],
            comparison["ties"],
            comparison["length_controlled_win_rate"],
        )
        texts = " ".join(row[:4]).replace("%", " ").replace("–", " ").split()
        assert texts == [f"{100 * share:.1f}" for share in shares]
        scores, tokens = comparison["mean_score"], comparison["mean_tokens"]
        assert row[4:] == [
            f"{scores['policy']:.3f}/{scores['baseline']:.3f}",
            f"{tokens['policy']:.1f}/{tokens['baseline']:.1f}",
        ]
    (entry,) = metrics["implicit_rewards"]
    assert rewards[1][:2] == ["dpo", f"{100 * entry['accuracy']:.1f} %"]
    assert artifact.headline == {"win_rate": metrics["comparisons"][0]["win_rate"]}


def test_the_tables_contain_the_first_completions_of_three_prompts(measured: Any):
    folder, _ = measured
    artifact = artifacts.read_artifact(folder)
    assert artifact is not None
    rows = pq.read_table(folder / "comparisons.parquet").to_pylist()[:9:3]  # 3 completions each
    for row, shown in zip(rows, artifact.tables, strict=False):
        assert row["prompt"].startswith(shown["title"])
        for k, side in enumerate(("policy", "baseline")):
            text = " ".join(" ".join(line[k] for line in shown["rows"]).split())
            completion = printable(row[f"{side}_completion"]) or "(empty)"
            assert text == " ".join(completion.split())
            assert shown["columns"][k] == f"{row[side]} ({row[f'{side}_score']:.2f})<"


def test_every_table_fits_into_80_columns(measured: Any):
    folder, _ = measured
    for rows in cells(folder):
        widths = [
            max(len(line) for cell in column for line in cell.split("\n"))
            for column in zip(*rows, strict=True)
        ]
        assert sum(widths) + len(widths) <= 80, rows[0]
    artifact = artifacts.read_artifact(folder)
    assert artifact is not None
    assert all(len(line) <= 80 for t in artifact.tables for line in (t["title"], t["note"]))


def test_completions_are_wrapped_by_their_width_in_the_terminal():
    assert tables.wrapped("one two three", 8) == ["one two", "three"]
    assert tables.wrapped("海" * 10, 8) == ["海" * 4, "海" * 4, "海" * 2]  # two cells each
    assert tables.wrapped("[bold]a[/bold]", 40) == ["[bold]a[/bold]"]
    assert tables.wrapped("") == ["(empty)"]


def test_completions_are_printed_without_interpreting_markup():
    prompts = [{"prompt": [{"role": "user", "content": "[red]Write[/red] a line."}]}]
    text = "[bold]b[/bold] [/] :smile:"
    samples = {name: Samples([[Completion(text, 3, True)]]) for name in ("a", "b")}
    score = torch.tensor([[0.5]])
    outcomes = Outcomes("gold", "a", "b", score, score > 1, score < 1, score > 1, score, score)
    (table,) = tables.sample_tables(prompts, outcomes, samples)
    out = io.StringIO()
    Console(file=out, width=80).print(render_table(table, "evaluate"))
    assert out.getvalue().count(text) == 2
    assert "evaluate: [red]Write[/red] a line." in out.getvalue()
    assert "a (0.50)" in out.getvalue()
