"""Held-out win rates and implicit rewards, computed again from what is left; and refusals."""

from __future__ import annotations

import io
import json
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import tiny_models
from rich.console import Console
from sklearn.linear_model import LogisticRegression

from align.config.data import Prepare
from align.config.evaluate import Evaluate
from align.config.training import DPO
from align.errors import UserError
from align.evaluation.held_out import trained_on
from align.models import generation, loading, tokenization
from align.models.generation import Completion
from align.models.prefix_sharing import wrapper
from align.pipeline.summary import _show_samples, show_summary
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


def run(folder: Path, prompts: Path, targets: dict[str, Path], **more: Any) -> dict[str, Any]:
    """Evaluate ``targets`` by name; ``sft`` among them is the baseline."""
    names = [name for name in targets if name != "sft"]
    settings = Evaluate(policies=names or ["sft"], **SETTINGS | more)
    inputs = {"baseline": targets["sft"], "prompts": prompts}
    inputs |= {f"policies.{i}": targets[name] for i, name in enumerate(settings.policies)}
    return tiny_models.stage(evaluate, settings, inputs, folder)


def checksum(prompt: str, completion: str) -> float:
    """In place of the gold score, which is 0 for all that a tiny model says: 0.0, 0.1, … 1.0."""
    gold.parse_prompt(prompt)
    return round(zlib.crc32(completion.encode()) / 2**32, 1)


@pytest.fixture(scope="module")
def measured(world: tiny_models.World, policy: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A whole evaluation, and the folder that it left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gold, "gold_score", checksum)
        folder = world.folder / "evaluate"
        targets = {"sft": world.sft, "dpo": policy}
        metrics = run(
            folder,
            world.data,
            targets,
            judge="gold",
            n_completions=3,
            resamples=20_000,
            implicit_rewards=True,
            confidence=0.9,
        )
        yield folder, metrics


def table(folder: Path, policy: str) -> dict[str, np.ndarray]:
    """The comparisons of one policy, one row a prompt and one column a completion."""
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


def won(found: dict[str, np.ndarray]) -> np.ndarray:
    return (np.sign(found["policy_score"] - found["baseline_score"]) + 1) / 2


# Win rates ----------------------------------------------------------------------------------------


def test_metrics_have_what_the_interface_promises_and_are_json(measured: Any):
    _, metrics = measured
    promised = {
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
        assert promised <= row.keys()
        assert (row["baseline"], row["judge"], row["invalid"]) == ("sft", "gold", 0)
        assert row["mean_tokens"].keys() == row["mean_score"].keys() == {"policy", "baseline"}
        assert row["ci"][0] <= row["win_rate"] <= row["ci"][1]
    assert json.loads(json.dumps(metrics)) == metrics


@pytest.mark.parametrize("place", [0, 1], ids=["policy", "control"])
def test_figures_come_out_again_from_the_comparisons(
    measured: Any, world: tiny_models.World, place: int
):
    folder, metrics = measured
    row = metrics["comparisons"][place]
    found = table(folder, row["policy"])
    prompts = tiny_models.rows(world.data, "prompts-test")
    assert found["prompt"].shape == (len(prompts), 3) == (row["n_prompts"], row["n_completions"])
    assert found["prompt"][:, 0].tolist() == [p["prompt"][0]["content"] for p in prompts]

    outcomes = won(found)
    assert len(np.unique(outcomes)) == 3, "wins, ties and losses"
    assert row["win_rate"] == pytest.approx(outcomes.mean(), abs=1e-12)
    assert row["ties"] == pytest.approx((outcomes == 0.5).mean(), abs=1e-12)
    for side in ("policy", "baseline"):
        assert row["mean_score"][side] == pytest.approx(found[f"{side}_score"].mean(), abs=1e-12)
        assert row["mean_tokens"][side] == pytest.approx(found[f"{side}_tokens"].mean(), abs=1e-12)
    gain = (found["policy_score"] - found["baseline_score"]).mean(axis=1)
    assert row["score_difference"] == pytest.approx(gain.mean(), abs=1e-12)

    # 90 % by bootstrap over prompts, with random numbers of numpy's
    random = np.random.default_rng(0)
    drawn = random.integers(len(prompts), size=(20_000, len(prompts)))
    for key, by_prompt in (("ci", outcomes.mean(axis=1)), ("score_difference_ci", gain)):
        ends = np.quantile(by_prompt[drawn].mean(axis=1), [0.05, 0.95])
        assert row[key] == pytest.approx(ends, abs=0.01), key
        assert ends[1] - ends[0] > 0.03, "narrow enough to be right by chance"

    flips = random.choice([-1, 1], size=(20_000, len(prompts)))
    centred = outcomes.mean(axis=1) - 0.5
    p_value = (np.abs((flips * centred).sum(axis=1)) >= abs(centred.sum()) - 1e-9).mean()
    assert row["p_value"] == pytest.approx(p_value, abs=0.02)

    # each comparison as a win and a loss, weighed by its outcome; 1 and tanh(difference / std)
    lengths = (found["policy_tokens"] - found["baseline_tokens"]).flatten()
    design = np.stack([np.ones(len(lengths)), np.tanh(lengths / lengths.std(ddof=1))], axis=1)
    fit = LogisticRegression(C=100.0, fit_intercept=False, tol=1e-10)
    labels = np.repeat([1, 0], len(lengths))
    weights = np.concatenate([outcomes.flatten(), 1 - outcomes.flatten()])
    fit.fit(np.concatenate([design, design]), labels, sample_weight=weights)
    controlled = 1 / (1 + np.exp(-fit.coef_[0, 0]))
    assert row["length_controlled_win_rate"] == pytest.approx(controlled, abs=1e-4)
    assert abs(controlled - row["win_rate"]) > 1e-4


def test_comparisons_hold_what_each_model_says_with_its_seed(
    measured: Any, world: tiny_models.World, policy: Path
):
    folder, metrics = measured
    prompts = [row["prompt"] for row in tiny_models.rows(world.data, "prompts-test")]
    ours, control = table(folder, "dpo"), table(folder, "sft again")
    for model, seed, texts in (
        (world.sft, 0, ours["baseline_completion"]),
        (policy, 0, ours["policy_completion"]),
        (world.sft, 0, control["baseline_completion"]),
        (world.sft, 1, control["policy_completion"]),
    ):
        found = generation.sample(
            loading.load_merged(model, dtype="float32"),
            tokenization.load_tokenizer(model),
            prompts,
            n_completions=3,
            temperature=1.0,
            top_p=1.0,
            max_new_tokens=16,
            batch_size=32,
            seed=seed,
        )
        assert [[c.text for c in found[i]] for i in range(len(prompts))] == texts.tolist()
    finished = [c.finished for some in found.values() for c in some]
    assert metrics["comparisons"][1]["finished"]["policy"] == sum(finished) / len(finished)


def test_the_control_is_the_baseline_with_other_seeds_and_comes_out_at_a_half(measured: Any):
    folder, metrics = measured
    control = table(folder, "sft again")
    same = control["policy_completion"] == control["baseline_completion"]
    assert same.mean() < 0.2
    low, high = metrics["comparisons"][1]["ci"]
    assert low < 0.5 < high


def test_a_copy_of_the_baseline_draws_with_it_on_every_prompt(
    world: tiny_models.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(gold, "gold_score", checksum)
    targets = {"sft": world.sft, "twin": world.sft}
    metrics = run(tmp_path, world.data, targets, judge="gold", n_prompts=4)
    twin, control = metrics["comparisons"]
    assert (twin["win_rate"], twin["ties"], twin["ci"], twin["p_value"]) == (
        0.5,
        1.0,
        [0.5, 0.5],
        1.0,
    )
    assert twin["n_prompts"] == 4
    assert control["ties"] < 1.0


def test_the_judge_is_the_embedded_tasks_gold_score(
    world: tiny_models.World, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pairs = {row["prompt"][0]["content"]: row for row in tiny_models.rows(world.data, "pairs-test")}
    asked = [row["prompt"][0]["content"] for row in tiny_models.rows(world.data, "prompts-test")]
    sides = ("rejected", "chosen", "rejected")  # the baseline, the policy, the control
    said = [
        [pairs[text][side][0]["content"] if text in pairs else "" for text in asked]
        for side in sides
    ]
    calls = iter(said)

    def sample(model: Any, tokenizer: Any, prompts: Any, **_: Any) -> list[list[Completion]]:
        return [[Completion(text, 1, True)] for text in next(calls)]

    monkeypatch.setattr(generation, "sample", sample)
    metrics = run(tmp_path, world.data, {"sft": world.sft, "dpo": policy}, judge="gold")
    scores = [
        [gold.gold_score(*given) for given in zip(asked, texts, strict=True)] for texts in said
    ]
    row = metrics["comparisons"][0]
    assert row["mean_score"]["policy"] == pytest.approx(np.mean(scores[1]))
    assert row["mean_score"]["baseline"] == pytest.approx(np.mean(scores[0]))
    wins = np.mean([(a > b) + 0.5 * (a == b) for b, a in zip(*scores[:2], strict=True)])
    assert row["win_rate"] == pytest.approx(wins)
    assert abs(wins - 0.5) > 0.01, "at a half a swap would not show"
    assert row["length_controlled_win_rate"] == pytest.approx(wins), "all lengths are alike"


# Refusals -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_split(world: tiny_models.World) -> Path:
    """The same rows in another split: what is held out here was trained on there."""
    folder = world.folder / "other"
    settings = Prepare(source="embedded", max_rows=60, test_fraction=0.25, split_seed=1)
    tiny_models.stage(prepare, settings, {}, folder)
    return folder


@pytest.mark.parametrize("what", [{"judge": "gold"}, {"implicit_rewards": True}])
def test_prompts_that_were_trained_on_are_refused(
    world: tiny_models.World, policy: Path, other_split: Path, tmp_path: Path, what: dict[str, Any]
):
    with pytest.raises(UserError, match=r"held-out prompts of .* were trained on by `sft`") as told:
        run(tmp_path, other_split, {"sft": world.sft, "dpo": policy}, **what)
    assert "demonstrations-train.parquet" in str(told.value)
    kind = "prompts" if "judge" in what else "pairs"
    held_out = {row["prompt_id"] for row in tiny_models.rows(other_split, f"{kind}-test")}
    trained = {row["prompt_id"] for row in tiny_models.rows(world.data, "demonstrations-train")}
    assert f"{len(held_out & trained)} of {len(held_out)} held-out" in str(told.value)


def stranger(
    source: Path, folder: Path, inputs: dict[str, Path] | None = None, **changed: Any
) -> Path:
    """A copy of a model that comes from elsewhere, or from the stages ``inputs``."""
    made = artifacts.read_artifact(source)
    assert made is not None
    shutil.copytree(source, folder)
    (folder / artifacts.FILE).unlink()
    if inputs is not None:
        given = {role: {"folder": str(path), "digest": ""} for role, path in inputs.items()}
        artifacts.write_artifact(
            folder,
            type(made)(
                **{f: getattr(made, f) for f in made.__dataclass_fields__}
                | {"inputs": given}
                | changed
            ),
        )
    return folder


@pytest.mark.parametrize(
    "lineage",
    [
        pytest.param(("sft",), id="through the model it was trained from"),
        pytest.param(("lora", "sft"), id="through two models"),
    ],
)
def test_prompts_that_a_models_ancestors_were_trained_on_are_refused(
    world: tiny_models.World, other_split: Path, tmp_path: Path, lineage: tuple[str, ...]
):
    baseline = stranger(world.sft, tmp_path / "elsewhere")
    model = stranger(
        world.sft, tmp_path / "dpo", {"pairs": other_split, "model": getattr(world, lineage[0])}
    )
    assert {file.parent for file in trained_on(model)} == {other_split, world.data}
    with pytest.raises(UserError, match="were trained on by `dpo`"):
        run(tmp_path / "out", other_split, {"sft": baseline, "dpo": model}, judge="gold")


def test_a_ppo_policy_was_trained_on_its_prompts_and_on_what_its_reward_models_were(
    world: tiny_models.World, other_split: Path, tmp_path: Path
):
    reward = stranger(world.sft, tmp_path / "reward", {"pairs": other_split})
    model = stranger(
        world.sft, tmp_path / "ppo", {"prompts": world.data, "rewards.0": reward}, stage="ppo"
    )
    files = {world.data / "prompts-train.parquet", other_split / "pairs-train.parquet"}
    assert trained_on(model) == files


def test_prompts_that_were_trained_on_are_refused_where_all_runs_were_moved(
    world: tiny_models.World, other_split: Path, tmp_path: Path
):
    runs = tmp_path / "runs"
    shutil.copytree(world.data, runs / "data")
    gone = tmp_path / "gone"
    baseline = stranger(world.sft, runs / "sft", {"demonstrations": gone / "data"})
    model = stranger(world.sft, runs / "dpo", {"model": gone / "sft"})
    assert trained_on(model) == {runs / "data" / "demonstrations-train.parquet"}
    with pytest.raises(UserError, match="were trained on by"):
        run(tmp_path / "out", other_split, {"sft": baseline, "dpo": model}, judge="gold")


def test_a_model_from_elsewhere_is_measured(
    world: tiny_models.World, other_split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    baseline = stranger(world.sft, tmp_path / "elsewhere")
    metrics = run(tmp_path / "out", other_split, {"sft": baseline}, judge="gold", n_prompts=2)
    assert [row["policy"] for row in metrics["comparisons"]] == ["sft again"]


@pytest.mark.parametrize(
    ("what", "file"),
    [({"judge": "gold"}, "prompts-test"), ({"implicit_rewards": True}, "pairs-test")],
)
def test_a_prepare_stage_that_held_nothing_out_is_a_users_mistake(
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
    """Prompts of another task, two pairs each, some longer than the model's positions."""
    file = world.folder / "foreign.jsonl"
    rows = [
        {
            "prompt": f"Say {n}." if n % 4 else f"Say {n}. " + "and the sea " * 60,
            "chosen": sides[(n + place) % 3 == 0],
            "rejected": sides[(n + place) % 3 != 0],
        }
        for n in range(24)
        for place, word in enumerate(("calm", "merry"))
        for sides in [(f"The {word} {n} sings.", f"The {n} gull {word}!")]
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    folder = world.folder / "foreign"
    tiny_models.stage(prepare, Prepare(source=str(file), test_fraction=0.5), {}, folder)
    return folder


def test_gold_scores_the_embedded_tasks_prompts_only(
    world: tiny_models.World, foreign: Path, tmp_path: Path
):
    with pytest.raises(UserError, match="`gold` scores only prompts of the embedded task"):
        run(tmp_path, foreign, {"sft": world.sft}, judge="gold")


def plain_logp(model: Any, tokenizer: Any, prompt: Any, completion: Any) -> float:
    """One row, no padding, all logits; not a number where the prompt fills all positions."""
    start = len(
        tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    )
    ids = tokenizer.apply_chat_template(prompt + completion, return_dict=False)[
        : tiny_models.POSITIONS
    ]
    with torch.no_grad():
        logps = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(dim=-1)
    if start >= len(ids):
        return float("nan")
    return sum(logps[place - 1, ids[place]].item() for place in range(start, len(ids)))


def test_implicit_rewards_by_hand(
    world: tiny_models.World, policy: Path, foreign: Path, tmp_path: Path
):
    targets = {"sft": world.sft, "dpo": policy, "lora": world.lora}
    metrics = run(tmp_path, foreign, targets, implicit_rewards=True, resamples=20_000)
    assert "comparisons" not in metrics
    assert not (tmp_path / "comparisons.parquet").exists()
    tokenizer = tokenization.load_tokenizer(world.sft)
    rows = tiny_models.rows(foreign, "pairs-test")
    loaded = {
        name: loading.load_merged(path, dtype="float32").eval() for name, path in targets.items()
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
        means = np.array([np.mean(right) for right in by_prompt.values()])
        assert (entry["policy"], entry["reference"]) == (name, "sft")
        assert entry["accuracy"] == pytest.approx(means.mean())
        assert 0 < means.mean() < 1
        assert entry["mean_margin"] == pytest.approx(np.nanmean(margins), rel=1e-3)
        assert entry["n_pairs"] == np.isfinite(margins).sum() == 2 * len(means)
        assert entry["n_prompts"] == len(means)
        assert entry["invalid"] == np.isnan(margins).sum() > 0
        drawn = np.random.default_rng(0).integers(len(means), size=(20_000, len(means)))
        ends = np.quantile(means[drawn].mean(axis=1), [0.025, 0.975])
        assert entry["ci"] == pytest.approx(ends, abs=0.03)


@pytest.mark.parametrize("told", [{}, {"prefix_sharing": False}], ids=["by default", "not"])
def test_scoring_shares_prefixes_unless_told_not_to(
    world: tiny_models.World, foreign: Path, tmp_path: Path, told: dict[str, bool], monkeypatch
):
    shared = []
    share = wrapper.enable_prefix_sharing
    monkeypatch.setattr(
        wrapper,
        "enable_prefix_sharing",
        lambda model, say: shared.append(model) or share(model, say=say),
    )
    run(tmp_path, foreign, {"sft": world.sft, "lora": world.lora}, implicit_rewards=True, **told)
    assert len(shared) == (0 if told else 2)


def test_prompts_that_all_fill_the_models_positions_are_a_users_mistake(
    world: tiny_models.World, policy: Path, tmp_path: Path
):
    file = tmp_path / "long.jsonl"
    rows = [{"prompt": f"{n} " * 200, "chosen": "Yes.", "rejected": "No."} for n in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tiny_models.stage(prepare, Prepare(source=str(file), test_fraction=0.5), {}, tmp_path / "data")
    targets = {"sft": world.sft, "dpo": policy}
    with pytest.raises(UserError, match="longer than the model's length"):
        run(tmp_path / "out", tmp_path / "data", targets, implicit_rewards=True)


# What a person sees -------------------------------------------------------------------------------


def test_the_tables_show_win_rates_intervals_and_both_completions(measured: Any):
    folder, metrics = measured
    stage = {"name": "evaluate", "folder": str(folder), "status": "ran", "metrics": metrics}
    reused = {"name": "sft", "folder": "", "status": "reused", "metrics": {"loss": 1.0}}
    out = io.StringIO()
    summary = {"stages": [reused, stage], "seconds": 12.34}
    show_summary(summary, Console(file=out, width=40), Path("runs/dpo/summary.json"))
    shown = out.getvalue()
    lines = [line.strip() for line in shown.splitlines()]
    assert "against sft" in shown
    for row in metrics["comparisons"]:
        line = next(line for line in lines if line.startswith(row["policy"]) and "%" in line)
        cells = line.removeprefix(row["policy"]).replace("%", " ").replace("–", " ").split()
        figures = (row["win_rate"], *row["ci"], row["ties"], row["length_controlled_win_rate"])
        assert cells[:5] == [f"{100 * figure:.1f}" for figure in figures]
    accuracy = metrics["implicit_rewards"][0]
    assert f"{100 * accuracy['accuracy']:.1f} %" in shown
    first = pq.read_table(folder / "comparisons.parquet").to_pylist()[0]
    assert first["prompt"] in shown
    words = " ".join(shown.replace("│", " ").split())
    for side in ("policy", "baseline"):
        assert f"{first[side]} ({first[f'{side}_score']:.2f})" in words
        assert first[f"{side}_completion"].split()[0] in words
    assert "2 stages, 1 reused, 12.3 s → runs/dpo/summary.json" in shown


def test_text_of_a_model_is_shown_as_it_is(tmp_path: Path):
    said = "[bold]no markup[/bold] [/] :smile:"
    row = {"policy": "dpo", "baseline": "sft", "prompt": "[red]ask[/red]"}
    for side, text in (("policy", said), ("baseline", "")):
        row |= {f"{side}_completion": text, f"{side}_score": 0.5, f"{side}_tokens": 3}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "comparisons.parquet")
    out = io.StringIO()
    _show_samples(tmp_path / "comparisons.parquet", Console(file=out, width=110))
    assert said in out.getvalue()
    assert "[red]ask[/red]" in out.getvalue()
    assert "(empty)" in out.getvalue()
