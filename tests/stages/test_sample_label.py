"""The sample and label stages: completions of a policy become pairs for DPO and KTO."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import tiny_models
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from align.config.completions import Label, Sample
from align.config.evaluate import Evaluate
from align.config.recipe import read_recipe
from align.config.training import DPO, KTO
from align.errors import UserError
from align.evaluation.held_out import training_tables
from align.judges import scores
from align.models import tokenization
from align.pipeline import runner
from align.rewards import gold, reward_model
from align.runtime import artifacts
from align.stages import dpo, evaluate, kto, label, sample


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tiny_models.World:
    return tiny_models.world(tmp_path_factory.getbasetemp())


def sampled(world: tiny_models.World, folder: Path, **changes: Any) -> Path:
    """A `sample` stage of the SFT model."""
    keys = {"n_completions": 3, "n_prompts": 10, "max_new_tokens": 24} | changes
    config = Sample(model="sft", **keys)
    tiny_models.stage(sample, config, {"model": world.sft, "prompts": world.data}, folder)
    return folder


def finished(source: Path, folder: Path, *, except_first: int = 0) -> Path:
    """A copy in which all completions but the first are finished: the tiny model rarely stops."""
    shutil.copytree(source, folder)
    for file in folder.glob("completions-*.parquet"):
        rows = pq.read_table(file).to_pylist()
        changed = [row | {"finished": k >= except_first} for k, row in enumerate(rows)]
        pq.write_table(pa.Table.from_pylist(changed), file)
    return folder


@pytest.fixture(scope="module")
def raw(world: tiny_models.World) -> Path:
    return sampled(world, world.folder / "sample")


def test_an_interrupted_run_labels_the_completions_that_were_sampled(
    world: tiny_models.World, raw: Path, tmp_path: Path
) -> None:
    held_out = sampled(world, tmp_path / "held-out", split="test", n_prompts=2)
    for folder in (raw, held_out):
        recipe = {"stages": {"label": {"completions": folder, "judge": "gold"}}}
        (label_stage,) = runner.plan_checked(read_recipe(recipe), tmp_path / "runs")
        assert label_stage.status == "run"


@pytest.fixture(scope="module")
def completions(world: tiny_models.World, raw: Path) -> Path:
    return finished(raw, world.folder / "finished")


def labeled(completions: Path, folder: Path, **changes: Any) -> Path:
    """A `label` stage on completions."""
    keys = {"judge": "gold", "pairing": "all", "label_noise": "bradley_terry"} | changes
    inputs = {"completions": completions}
    if keys["judge"] != "gold":
        inputs["judge"] = Path(keys["judge"])
    tiny_models.stage(label, Label(**keys), inputs, folder)
    return folder


@pytest.fixture(scope="module")
def pairs(world: tiny_models.World, completions: Path) -> Path:
    return labeled(completions, world.folder / "label")


# Sample


def test_completions_keep_the_ids_and_the_split_of_their_prompts(
    world: tiny_models.World, raw: Path
):
    rows = tiny_models.rows(raw, "completions-train")
    prompts = tiny_models.rows(world.data, "prompts-train")[:10]
    assert [(row["prompt"], row["prompt_id"]) for row in rows[::3]] == [
        (row["prompt"], row["prompt_id"]) for row in prompts
    ]
    assert len(rows) == 30
    assert len({row["completion"][0]["content"] for row in rows}) > 20
    assert all(row["completion"][0]["role"] == "assistant" for row in rows)
    assert all(0 <= row["n_tokens"] <= 24 and row["finished"] in (True, False) for row in rows)
    artifact = artifacts.read_artifact(raw)
    assert artifact is not None
    assert artifact.metrics["completions"] == {"train": 30}
    assert artifact.metrics["prompts"] == {"train": 10}
    assert artifact.metrics["finished"] == sum(row["finished"] for row in rows) / 30


def test_completions_depend_on_seed_and_temperature(world: tiny_models.World, tmp_path: Path):
    def rows(name: str, **changes: Any) -> list[Any]:
        return tiny_models.rows(sampled(world, tmp_path / name, **changes), "completions-train")

    first = rows("a")
    assert rows("b") == first
    assert rows("c", seed=1) != first
    greedy = rows("d", temperature=0.0, n_completions=1)
    assert greedy == rows("e", temperature=0.0, n_completions=1, seed=5)


def test_a_split_that_does_not_exist_is_a_user_error(world: tiny_models.World, tmp_path: Path):
    with pytest.raises(
        UserError,
        match=r"no prompts-validation.parquet, which `split` requires; .*set `validation_fraction` of",
    ):
        sampled(world, tmp_path / "sample", split="validation")


# Label


def test_gold_scores_are_exact_and_pairs_have_the_columns_of_prepared_data(
    world: tiny_models.World, completions: Path, pairs: Path
):
    rows = tiny_models.rows(pairs, "scores-train")
    assert [{k: v for k, v in row.items() if k != "score"} for row in rows] == tiny_models.rows(
        completions, "completions-train"
    )
    for row in rows:
        text = row["completion"][0]["content"]
        assert row["score"] == gold.gold_score(row["prompt"][-1]["content"], text)
    schema, prepared = (
        pq.read_schema(folder / "pairs-train.parquet") for folder in (pairs, world.data)
    )
    assert set(schema.names) == {*prepared.names, "margin"}
    assert all(schema.field(name).type.equals(prepared.field(name).type) for name in prepared.names)
    score = {
        (row["prompt_id"], row["completion"][0]["content"]): row["score"]
        for row in tiny_models.rows(pairs, "scores-train")
    }
    for row in tiny_models.rows(pairs, "pairs-train"):
        sides = (score[row["prompt_id"], row[s][0]["content"]] for s in ("chosen", "rejected"))
        assert row["margin"] == next(sides) - next(sides)
    artifact = artifacts.read_artifact(pairs)
    assert artifact is not None
    assert artifact.metrics["pairs"] == {"train": len(tiny_models.rows(pairs, "pairs-train"))}
    assert artifact.metrics["words"].keys() == {"prompt_median", "chosen_median", "rejected_median"}


@pytest.fixture
def embedded(world: tiny_models.World, tmp_path: Path) -> Path:
    """Completions of the embedded pairs: their scores differ; those of the tiny policy are 0."""
    rows = [
        {"prompt": row["prompt"], "completion": row[side], "prompt_id": row["prompt_id"], "n_tokens": 9, "finished": True}
        for row in tiny_models.rows(world.data, "pairs-train")
        for side in ("chosen", "rejected")
    ]  # fmt: skip
    (tmp_path / "sample").mkdir()
    file = tmp_path / "sample" / "completions-train.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.parent


def gaps(folder: Path) -> list[float]:
    """Score of the chosen minus score of the rejected completion, for each pair."""
    score = {
        (row["prompt_id"], row["completion"][0]["content"]): row["score"]
        for row in tiny_models.rows(folder, "scores-train")
    }
    return [
        score[row["prompt_id"], row["chosen"][0]["content"]]
        - score[row["prompt_id"], row["rejected"][0]["content"]]
        for row in tiny_models.rows(folder, "pairs-train")
    ]


def test_exact_labels_choose_the_higher_score_and_margins_keep_clear_pairs(
    embedded: Path, tmp_path: Path
):
    all_gaps = gaps(labeled(embedded, tmp_path / "all", label_noise=None))
    clear = gaps(labeled(embedded, tmp_path / "clear", label_noise=None, margin=0.2))
    assert len(all_gaps) > 20
    assert min(all_gaps) > 0
    assert sorted(clear) == sorted(gap for gap in all_gaps if gap >= 0.2)
    assert len(clear) < len(all_gaps)


def test_noisy_labels_depend_on_slope_and_seed(embedded: Path, tmp_path: Path):
    sure = gaps(labeled(embedded, tmp_path / "sure", label_noise_slope=1.0e6))
    assert min(sure) >= 0, "with this slope there is no noise"
    noisy = gaps(labeled(embedded, tmp_path / "noisy", label_noise_slope=1.0e-3))
    wrong = sum(gap < 0 for gap in noisy) / len(noisy)
    assert 0.2 < wrong < 0.8, "with this slope labels are random"
    assert gaps(labeled(embedded, tmp_path / "other", label_noise_slope=1.0e-3, seed=1)) != noisy
    usual = gaps(labeled(embedded, tmp_path / "usual"))
    assert usual == gaps(labeled(embedded, tmp_path / "same", label_noise_slope=gold.LABEL_SLOPE))
    assert 0 < sum(gap < 0 for gap in usual) / len(usual) < 0.35


def test_one_completion_per_prompt_is_a_user_error(world: tiny_models.World, tmp_path: Path):
    one = finished(sampled(world, tmp_path / "sample", n_completions=1), tmp_path / "finished")
    with pytest.raises(
        UserError, match="10 completions give no pair: 10 × prompt with one completion"
    ):
        labeled(one, tmp_path / "label")


def test_a_folder_without_completions_is_a_user_error(world: tiny_models.World, tmp_path: Path):
    with pytest.raises(UserError, match="set `completions` to a `sample` stage"):
        labeled(world.data, tmp_path / "label")


def test_completions_that_were_cut_off_are_counted_and_left_out(raw: Path, tmp_path: Path):
    partly = finished(
        raw, tmp_path / "some", except_first=6
    )  # all three completions of two prompts
    folder = labeled(partly, tmp_path / "label")
    left = {row["prompt_id"] for row in tiny_models.rows(partly, "completions-train")[6:]}
    assert {row["prompt_id"] for row in tiny_models.rows(folder, "pairs-train")} <= left
    artifact = artifacts.read_artifact(folder)
    assert artifact is not None
    assert artifact.metrics["dropped"]["train: completion cut off"] == 6
    none = finished(raw, tmp_path / "none", except_first=30)
    with pytest.raises(UserError, match="none of 30 completions ends in a stop token"):
        labeled(none, tmp_path / "label_none")


# A reward model as judge


@pytest.fixture(scope="module")
def rewards(world: tiny_models.World) -> dict[str, Path]:
    """A classifier on the SFT model's layers, and an adapter on one."""
    torch.manual_seed(0)
    folders = {name: world.folder / name for name in ("reward", "reward_lora")}
    model = AutoModelForSequenceClassification.from_pretrained(str(world.sft), num_labels=1)
    torch.nn.init.normal_(model.score.weight, std=0.5)
    model.save_pretrained(folders["reward"])
    adapter = LoraConfig(r=2, task_type="SEQ_CLS", target_modules="all-linear", init_lora_weights=False)  # fmt: skip
    get_peft_model(model, adapter).save_pretrained(folders["reward_lora"])
    config = folders["reward_lora"] / "adapter_config.json"
    config.write_text(config.read_text().replace(str(world.sft), str(folders["reward"])))
    for folder in folders.values():
        tokenization.load_tokenizer(world.sft).save_pretrained(folder)
    return folders


@pytest.mark.parametrize("kind", ["reward", "reward_lora"])
def test_a_reward_is_the_logit_at_eos_one_row_at_a_time(
    completions: Path, rewards: dict[str, Path], kind: str
):
    rows = tiny_models.rows(completions, "completions-train")[:7]
    judge = scores.RewardModelJudge("reward", rewards[kind], dtype="float32", batch_size=3)
    values = judge.score([row["prompt"] for row in rows], [row["completion"] for row in rows], {})
    tokenizer = tokenization.load_tokenizer(rewards["reward"])
    model = reward_model.load_merged_reward_model(rewards[kind], dtype="float32").eval()
    expected = []
    for row in rows:
        text = "".join(
            f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n"
            for m in row["prompt"] + row["completion"]
        )
        ids = tokenizer(text.removesuffix("\n"), return_tensors="pt")["input_ids"]
        assert ids[0, -1] == tokenizer.eos_token_id
        with torch.no_grad():
            expected.append(model(input_ids=ids).logits[0, 0].item())
    assert values == pytest.approx(expected, abs=1e-5, rel=1e-4)
    assert max(expected) - min(expected) > 0.1


def test_the_adapter_of_a_reward_model_changes_its_scores(
    completions: Path, rewards: dict[str, Path]
):
    rows = tiny_models.rows(completions, "completions-train")[:4]
    arguments = [row["prompt"] for row in rows], [row["completion"] for row in rows]
    one, other = (
        scores.RewardModelJudge("reward", folder, dtype="float32", batch_size=4).score(
            *arguments, {}
        )
        for folder in rewards.values()
    )
    assert max(abs(a - b) for a, b in zip(one, other, strict=True)) > 0.01


@pytest.mark.parametrize("offset", [float("nan"), 1e308, -float("inf")])
def test_scores_that_are_not_finite_are_an_error_with_the_folder(
    completions: Path, rewards: dict[str, Path], offset: float
):
    rows = tiny_models.rows(completions, "completions-train")[:3]
    model = reward_model.RewardModel.load(rewards["reward"], dtype="float32", device="cpu")
    broken = dataclasses.replace(model, offset=offset)
    arguments = [row["prompt"] for row in rows], [row["completion"] for row in rows]
    with pytest.raises(UserError, match="3 of 3 completions a score that is not finite") as error:
        broken.score(*arguments, batch_size=2)
    assert str(rewards["reward"]) in str(error.value)


def test_a_policy_is_not_a_reward_model(world: tiny_models.World):
    with pytest.raises(
        UserError, match=r"weights are missing, such as score.weight; a reward model is"
    ):
        scores.RewardModelJudge("sft", world.sft, dtype="float32", batch_size=2)


def test_pairs_of_a_reward_model_follow_its_scores(
    completions: Path, rewards: dict[str, Path], tmp_path: Path
):
    folder = labeled(completions, tmp_path / "label", judge=str(rewards["reward"]), label_noise=None, pairing="best_worst")  # fmt: skip
    by_prompt: dict[str, list[float]] = {}
    for row in tiny_models.rows(folder, "scores-train"):
        by_prompt.setdefault(row["prompt_id"], []).append(row["score"])
    score = {
        (row["prompt_id"], row["completion"][0]["content"]): row["score"]
        for row in tiny_models.rows(folder, "scores-train")
    }
    pairs = tiny_models.rows(folder, "pairs-train")
    assert len(pairs) == 10
    for row in pairs:
        values = by_prompt[row["prompt_id"]]
        assert score[row["prompt_id"], row["chosen"][0]["content"]] == max(values)
        assert score[row["prompt_id"], row["rejected"][0]["content"]] == min(values)


def test_gold_on_other_prompts_is_an_error_before_anything_trains(tmp_path: Path, launch: Any):
    rows = "".join(
        f'{{"prompt": "Question {k}?", "chosen": "Yes, {k}.", "rejected": "No."}}\n'
        for k in range(40)
    )
    (tmp_path / "pairs.jsonl").write_text(rows)
    (tmp_path / "recipe.yaml").write_text(
        """\
stages:
  prepare: {source: pairs.jsonl, test_fraction: 0.2}
  sft: {model: {vocab_size: 300, hidden_size: 32}}
  sample: {model: sft}
  label: {judge: gold}
"""
    )
    done = launch("recipe.yaml")
    assert done.code == 2
    assert "label.judge: `gold` scores only prompts of the embedded task" in done.err
    assert "sft: running" not in done.out


# Lineage


@pytest.mark.parametrize("module", [dpo, kto])
def test_evaluate_traces_labels_to_their_training_data(
    world: tiny_models.World, pairs: Path, tmp_path: Path, module: Any
):
    role = "pairs" if module is dpo else "preferences"
    cls = DPO if module is dpo else KTO
    config = cls(model="sft", **{role: "label"}, trainer=tiny_models.TRAINER | {"max_steps": 1})
    tiny_models.stage(module, config, {"model": world.sft, role: pairs}, tmp_path / "policy")
    # the SFT model is both the initial and the sampled policy
    expected = {(pairs, "pairs"), (world.data, "demonstrations")}
    assert training_tables(tmp_path / "policy") == expected


def test_held_out_prompts_that_were_sampled_and_trained_on_are_refused(
    world: tiny_models.World, tmp_path: Path
):
    # completions of the test split, renamed to training pairs
    held_out = finished(sampled(world, tmp_path / "sample", split="test"), tmp_path / "finished")
    folder = labeled(held_out, tmp_path / "label")
    (folder / "pairs-test.parquet").rename(folder / "pairs-train.parquet")
    artifact = artifacts.read_artifact(folder)
    assert artifact is not None
    artifacts.write_artifact(folder, artifact)  # with the checksums of the renamed tables
    config = DPO(model="sft", pairs="label", trainer=tiny_models.TRAINER | {"max_steps": 1})
    tiny_models.stage(dpo, config, {"model": world.sft, "pairs": folder}, tmp_path / "dpo")
    evaluation = Evaluate(policies=["dpo"], baseline="sft", judge="gold")
    inputs = {"policies.0": tmp_path / "dpo", "baseline": world.sft, "prompts": world.data}
    with pytest.raises(
        UserError, match=r"held-out prompts of .* are in the training data of `dpo`"
    ):
        tiny_models.stage(evaluate, evaluation, inputs, tmp_path / "evaluate")


def test_the_training_data_of_the_judge_count_as_trained_on(
    world: tiny_models.World, completions: Path, rewards: dict[str, Path], tmp_path: Path
):
    folder = labeled(completions, tmp_path / "label", judge=str(rewards["reward"]))
    artifacts.write_artifact(rewards["reward"], artifact_on_pairs(world))
    try:
        config = DPO(model="sft", pairs="label", trainer=tiny_models.TRAINER | {"max_steps": 1})
        tiny_models.stage(dpo, config, {"model": world.sft, "pairs": folder}, tmp_path / "dpo")
        assert (world.data, "pairs") in training_tables(tmp_path / "dpo")
    finally:
        (rewards["reward"] / artifacts.FILE).unlink()


def artifact_on_pairs(world: tiny_models.World) -> artifacts.Artifact:
    """Artifact of a `reward` stage that was trained on the prepared pairs."""
    sft = artifacts.read_artifact(world.sft)
    assert sft is not None
    fields = {name: getattr(sft, name) for name in sft.__slots__}
    pairs = {"folder": str(world.data), "digest": ""}
    return artifacts.Artifact(**fields | {"stage": "reward", "inputs": {"pairs": pairs}})


def test_the_judge_of_a_recipe_is_gold_or_the_folder_of_a_reward_model(
    world: tiny_models.World, rewards: dict[str, Path], tmp_path: Path, launch: Any
):
    (tmp_path / "recipe.yaml").write_text(
        f"""\
stages:
  sample: {{model: {world.sft}, prompts: {world.data}, n_prompts: 8, n_completions: 4, max_new_tokens: 24}}
  gold: {{stage: label, judge: gold, pairing: all, label_noise: bradley_terry}}
  rlaif: {{stage: label, judge: {rewards["reward"]}}}
"""
    )
    done = launch("recipe.yaml")
    assert done.code == 0, done.err
    by_name = {}
    for folder in (tmp_path / "runs").glob("*-????????????"):
        artifact = artifacts.read_artifact(folder)
        assert artifact is not None
        by_name[artifact.name] = artifact
    assert set(by_name["gold"].inputs) == {"completions"}
    assert set(by_name["rlaif"].inputs) == {"completions", "judge"}
    assert by_name["rlaif"].inputs["judge"]["folder"] == str(rewards["reward"])
    (sample_folder,) = (tmp_path / "runs").glob("sample-*")
    ended: dict[str, set[str]] = {}
    for row in tiny_models.rows(sample_folder, "completions-train"):
        if row["finished"]:
            ended.setdefault(row["prompt_id"], set()).add(row["completion"][0]["content"])
    assert by_name["rlaif"].metrics["pairs"]["train"] == sum(
        len(texts) > 1 for texts in ended.values()
    )
    again = launch("recipe.yaml")
    assert (again.code, again.out.count(": reused")) == (0, 3)
