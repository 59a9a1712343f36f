"""A policy's own completions, labelled, become pairs that DPO trains on; prompts stay in their splits."""

from __future__ import annotations

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

from align.config.data import Label, Sample
from align.config.evaluate import Evaluate
from align.config.training import DPO, KTO
from align.errors import UserError
from align.evaluation.held_out import training_tables
from align.judges import scores
from align.models import tokenization
from align.rewards import gold, reward_model
from align.runtime import artifacts
from align.stages import dpo, evaluate, kto, label, sample


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tiny_models.World:
    return tiny_models.world(tmp_path_factory.getbasetemp())


def sampled(world: tiny_models.World, folder: Path, **changes: Any) -> Path:
    given = {"n_completions": 3, "n_prompts": 10, "max_new_tokens": 24} | changes
    settings = Sample(model="sft", **given)
    tiny_models.stage(sample, settings, {"model": world.sft, "prompts": world.data}, folder)
    return folder


def finished(source: Path, folder: Path, *, but: int = 0) -> Path:
    """A copy in which all completions ended by themselves but the first few: the tiny model hardly ever does."""
    shutil.copytree(source, folder)
    for file in folder.glob("completions-*.parquet"):
        rows = pq.read_table(file).to_pylist()
        changed = [row | {"finished": k >= but} for k, row in enumerate(rows)]
        pq.write_table(pa.Table.from_pylist(changed), file)
    return folder


@pytest.fixture(scope="module")
def raw(world: tiny_models.World) -> Path:
    return sampled(world, world.folder / "sample")


@pytest.fixture(scope="module")
def completions(world: tiny_models.World, raw: Path) -> Path:
    return finished(raw, world.folder / "finished")


def labelled(completions: Path, folder: Path, **changes: Any) -> Path:
    given = {"judge": "gold", "pairing": "all", "label_noise": "bradley_terry"} | changes
    inputs = {"completions": completions}
    if given["judge"] != "gold":
        inputs["judge"] = Path(given["judge"])
    tiny_models.stage(label, Label(**given), inputs, folder)
    return folder


@pytest.fixture(scope="module")
def pairs(world: tiny_models.World, completions: Path) -> Path:
    return labelled(completions, world.folder / "label")


# Sample


def test_completions_keep_the_prompts_ids_and_their_split(world: tiny_models.World, raw: Path):
    completions = raw
    rows = tiny_models.rows(completions, "completions-train")
    prompts = tiny_models.rows(world.data, "prompts-train")[:10]
    assert [(row["prompt"], row["prompt_id"]) for row in rows[::3]] == [
        (row["prompt"], row["prompt_id"]) for row in prompts
    ]
    assert len(rows) == 30
    assert len({row["completion"][0]["content"] for row in rows}) > 20
    assert all(row["completion"][0]["role"] == "assistant" for row in rows)
    assert all(0 <= row["n_tokens"] <= 24 and row["finished"] in (True, False) for row in rows)
    made = artifacts.read_artifact(completions)
    assert made is not None
    assert made.metrics["completions"] == {"train": 30}
    assert made.metrics["prompts"] == {"train": 10}
    assert made.metrics["finished"] == sum(row["finished"] for row in rows) / 30


def test_the_seed_and_the_temperature_decide_what_is_sampled(
    world: tiny_models.World, tmp_path: Path
):
    def found(name: str, **changes: Any) -> list[Any]:
        return tiny_models.rows(sampled(world, tmp_path / name, **changes), "completions-train")

    first = found("a")
    assert found("b") == first
    assert found("c", seed=1) != first
    cold = found("d", temperature=0.0, n_completions=1)
    assert cold == found("e", temperature=0.0, n_completions=1, seed=5)


def test_a_split_that_was_not_held_out_is_a_users_mistake(world: tiny_models.World, tmp_path: Path):
    with pytest.raises(
        UserError, match=r"no prompts-validation.parquet; found .*; set `validation_fraction` of"
    ):
        sampled(world, tmp_path / "sample", split="validation")


# Label


def test_scores_are_the_gold_ones_and_pairs_are_as_prepared_ones(
    world: tiny_models.World, completions: Path, pairs: Path
):
    rows = tiny_models.rows(pairs, "scores-train")
    assert [{k: v for k, v in row.items() if k != "score"} for row in rows] == tiny_models.rows(
        completions, "completions-train"
    )
    for row in rows:
        text = row["completion"][0]["content"]
        assert row["score"] == gold.gold_score(row["prompt"][-1]["content"], text)
    ours, theirs = (
        pq.read_schema(folder / "pairs-train.parquet") for folder in (pairs, world.data)
    )
    assert set(ours.names) == {*theirs.names, "margin"}
    assert all(ours.field(name).type.equals(theirs.field(name).type) for name in theirs.names)
    score = {
        (row["prompt_id"], row["completion"][0]["content"]): row["score"]
        for row in tiny_models.rows(pairs, "scores-train")
    }
    for row in tiny_models.rows(pairs, "pairs-train"):
        sides = (score[row["prompt_id"], row[s][0]["content"]] for s in ("chosen", "rejected"))
        assert row["margin"] == next(sides) - next(sides)
    made = artifacts.read_artifact(pairs)
    assert made is not None
    assert made.metrics["pairs"] == {"train": len(tiny_models.rows(pairs, "pairs-train"))}
    assert made.metrics["words"].keys() == {"prompt_median", "chosen_median", "rejected_median"}


@pytest.fixture
def given(world: tiny_models.World, tmp_path: Path) -> Path:
    """Completions of a known worth: the tiny policy's own all score nothing, those of the embedded pairs differ."""
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
    """Of each pair: how much higher the chosen completion scores."""
    found = {
        (row["prompt_id"], row["completion"][0]["content"]): row["score"]
        for row in tiny_models.rows(folder, "scores-train")
    }
    return [
        found[row["prompt_id"], row["chosen"][0]["content"]]
        - found[row["prompt_id"], row["rejected"][0]["content"]]
        for row in tiny_models.rows(folder, "pairs-train")
    ]


def test_exact_labels_choose_the_higher_score_and_margins_keep_clear_pairs(
    given: Path, tmp_path: Path
):
    all_of_them = gaps(labelled(given, tmp_path / "all", label_noise=None))
    clear = gaps(labelled(given, tmp_path / "clear", label_noise=None, margin=0.2))
    assert len(all_of_them) > 20
    assert min(all_of_them) > 0
    assert sorted(clear) == sorted(gap for gap in all_of_them if gap >= 0.2)
    assert len(clear) < len(all_of_them)


def test_the_slope_and_the_seed_decide_noisy_labels(given: Path, tmp_path: Path):
    sure = gaps(labelled(given, tmp_path / "sure", label_noise_slope=1.0e6))
    assert min(sure) >= 0, "so steep a slope is no noise"
    noisy = gaps(labelled(given, tmp_path / "noisy", label_noise_slope=1.0e-3))
    wrong = sum(gap < 0 for gap in noisy) / len(noisy)
    assert 0.2 < wrong < 0.8, "so flat a slope is a coin"
    assert gaps(labelled(given, tmp_path / "other", label_noise_slope=1.0e-3, seed=1)) != noisy
    usual = gaps(labelled(given, tmp_path / "usual"))
    assert usual == gaps(labelled(given, tmp_path / "same", label_noise_slope=gold.LABEL_SLOPE))
    assert 0 < sum(gap < 0 for gap in usual) / len(usual) < 0.35


def test_nothing_to_pair_is_a_users_mistake(world: tiny_models.World, tmp_path: Path):
    one = finished(sampled(world, tmp_path / "sample", n_completions=1), tmp_path / "finished")
    with pytest.raises(
        UserError, match="no pair is left of 10 completions: 10 × prompt with one completion"
    ):
        labelled(one, tmp_path / "label")


def test_a_folder_without_completions_is_a_users_mistake(world: tiny_models.World, tmp_path: Path):
    with pytest.raises(UserError, match="name a finished `sample` stage"):
        labelled(world.data, tmp_path / "label")


def test_completions_that_were_cut_off_are_counted_and_left_out(raw: Path, tmp_path: Path):
    some = finished(raw, tmp_path / "some", but=6)  # all three of two prompts
    folder = labelled(some, tmp_path / "label")
    left = {row["prompt_id"] for row in tiny_models.rows(some, "completions-train")[6:]}
    assert {row["prompt_id"] for row in tiny_models.rows(folder, "pairs-train")} <= left
    made = artifacts.read_artifact(folder)
    assert made is not None
    assert made.metrics["dropped"]["train: completion cut off"] == 6
    none = finished(raw, tmp_path / "none", but=30)
    with pytest.raises(UserError, match="none of 30 completions ends by itself"):
        labelled(none, tmp_path / "label_none")


# A reward model as the judge


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
    judge = scores.RewardModelJudge(rewards[kind], dtype="float32", batch_size=3)
    found = judge.score([row["prompt"] for row in rows], [row["completion"] for row in rows])
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
    assert found == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.1


def test_an_adapter_of_a_reward_model_counts(completions: Path, rewards: dict[str, Path]):
    rows = tiny_models.rows(completions, "completions-train")[:4]
    given = [row["prompt"] for row in rows], [row["completion"] for row in rows]
    one, other = (
        scores.RewardModelJudge(folder, dtype="float32", batch_size=4).score(*given)
        for folder in rewards.values()
    )
    assert max(abs(a - b) for a, b in zip(one, other, strict=True)) > 0.01


def test_a_policy_is_no_reward_model(world: tiny_models.World):
    with pytest.raises(
        UserError, match=r"weights are missing, such as score.weight; a reward model is"
    ):
        scores.RewardModelJudge(world.sft, dtype="float32", batch_size=2)


def test_pairs_of_a_reward_model_follow_its_scores(
    completions: Path, rewards: dict[str, Path], tmp_path: Path
):
    folder = labelled(completions, tmp_path / "label", judge=str(rewards["reward"]), label_noise=None, pairing="best_worst")  # fmt: skip
    some: dict[str, list[float]] = {}
    for row in tiny_models.rows(folder, "scores-train"):
        some.setdefault(row["prompt_id"], []).append(row["score"])
    found = {
        (row["prompt_id"], row["completion"][0]["content"]): row["score"]
        for row in tiny_models.rows(folder, "scores-train")
    }
    pairs = tiny_models.rows(folder, "pairs-train")
    assert len(pairs) == 10
    for row in pairs:
        scores = some[row["prompt_id"]]
        assert found[row["prompt_id"], row["chosen"][0]["content"]] == max(scores)
        assert found[row["prompt_id"], row["rejected"][0]["content"]] == min(scores)


def test_gold_on_other_prompts_is_told_before_anything_trains(tmp_path: Path, launch: Any):
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


# Onwards


@pytest.mark.parametrize("module", [dpo, kto])
def test_what_was_trained_on_labels_is_known_to_evaluate(
    world: tiny_models.World, pairs: Path, tmp_path: Path, module: Any
):
    role = "pairs" if module is dpo else "preferences"
    cls = DPO if module is dpo else KTO
    settings = cls(model="sft", **{role: "label"}, trainer=tiny_models.TRAINER | {"max_steps": 1})
    tiny_models.stage(module, settings, {"model": world.sft, role: pairs}, tmp_path / "policy")
    # the demonstrations of the initial model, which is also the sampled policy
    expected = {(pairs, "pairs"), (world.data, "demonstrations")}
    assert training_tables(tmp_path / "policy") == expected


def test_held_out_prompts_that_were_sampled_and_trained_on_are_refused(
    world: tiny_models.World, tmp_path: Path
):
    # Somebody samples the test split and calls its pairs those to train on.
    held_out = finished(sampled(world, tmp_path / "sample", split="test"), tmp_path / "finished")
    folder = labelled(held_out, tmp_path / "label")
    (folder / "pairs-test.parquet").rename(folder / "pairs-train.parquet")
    settings = DPO(model="sft", pairs="label", trainer=tiny_models.TRAINER | {"max_steps": 1})
    tiny_models.stage(dpo, settings, {"model": world.sft, "pairs": folder}, tmp_path / "dpo")
    asked = Evaluate(policies=["dpo"], baseline="sft", judge="gold")
    inputs = {"policies.0": tmp_path / "dpo", "baseline": world.sft, "prompts": world.data}
    with pytest.raises(UserError, match=r"held-out prompts of .* training data of `dpo`"):
        tiny_models.stage(evaluate, asked, inputs, tmp_path / "evaluate")


def test_what_the_judge_was_trained_on_counts_too(
    world: tiny_models.World, completions: Path, rewards: dict[str, Path], tmp_path: Path
):
    folder = labelled(completions, tmp_path / "label", judge=str(rewards["reward"]))
    artifacts.write_artifact(rewards["reward"], made_from(world))
    try:
        settings = DPO(model="sft", pairs="label", trainer=tiny_models.TRAINER | {"max_steps": 1})
        tiny_models.stage(dpo, settings, {"model": world.sft, "pairs": folder}, tmp_path / "dpo")
        assert (world.data, "pairs") in training_tables(tmp_path / "dpo")
    finally:
        (rewards["reward"] / artifacts.FILE).unlink()


def made_from(world: tiny_models.World) -> artifacts.Artifact:
    """The artifact of a stage that read the world's pairs."""
    donor = artifacts.read_artifact(world.sft)
    assert donor is not None
    given = {name: getattr(donor, name) for name in donor.__slots__}
    pairs = {"folder": str(world.data), "digest": ""}
    return artifacts.Artifact(**given | {"stage": "reward", "inputs": {"pairs": pairs}})


def test_a_recipe_names_a_judge_by_word_or_by_folder(
    world: tiny_models.World, rewards: dict[str, Path], tmp_path: Path, launch: Any
):
    (tmp_path / "recipe.yaml").write_text(
        f"""\
stages:
  sample: {{model: {world.sft}, prompts: {world.data}, n_prompts: 8, n_completions: 3, max_new_tokens: 12}}
  gold: {{stage: label, judge: gold, pairing: all, label_noise: bradley_terry}}
  rlaif: {{stage: label, judge: {rewards["reward"]}}}
"""
    )
    done = launch("recipe.yaml")
    assert done.code == 0, done.err
    made = {}
    for folder in (tmp_path / "runs").glob("*-????????????"):
        found = artifacts.read_artifact(folder)
        assert found is not None
        made[found.name] = found
    assert set(made["gold"].inputs) == {"completions"}
    assert set(made["rlaif"].inputs) == {"completions", "judge"}
    assert made["rlaif"].inputs["judge"]["folder"] == str(rewards["reward"])
    (sample_folder,) = (tmp_path / "runs").glob("sample-*")
    ended: dict[str, set[str]] = {}
    for row in tiny_models.rows(sample_folder, "completions-train"):
        if row["finished"]:
            ended.setdefault(row["prompt_id"], set()).add(row["completion"][0]["content"])
    assert made["rlaif"].metrics["pairs"]["train"] == sum(
        len(texts) > 1 for texts in ended.values()
    )
    again = launch("recipe.yaml")
    assert (again.code, again.out.count(": reused")) == (0, 3)
