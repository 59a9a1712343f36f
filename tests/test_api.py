"""The public Python API: names, recipes from mappings, typed results, loaded models, win rates."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny_models
from helpers.damage import DAMAGES
from torch.testing import assert_close

import align

ROOT = Path(__file__).parents[1]
SFT = {
    "model": {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 192,
    },
    "trainer": tiny_models.TRAINER | {"max_steps": 2},
}
PREPARE = {"source": "embedded", "max_rows": 60, "test_fraction": 0.25}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tiny_models.World:
    return tiny_models.world(tmp_path_factory.getbasetemp())


def brevity(prompts, completions):
    return [-len(text) / 100 for text in completions]


def exclamations(prompts, completions):
    return [float(text.count("!")) for text in completions]


# Names


def test_import_loads_no_library_and_every_public_name_resolves():
    code = (
        "import sys, align\n"
        "print([name for name in ('torch', 'pydantic', 'yaml', 'transformers') if name in sys.modules])\n"
        "print([name for name in align.__all__ if getattr(align, name) is None])\n"
        "print(set(align.__all__) <= set(dir(align)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.split("\n")[:3] == ["[]", "[]", "True"]


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        align.trian  # noqa: B018


def test_subpackages_of_the_api_are_attributes():
    assert align.functional.dpo_loss is not None
    assert align.rl.__name__ == "align.rl"


# Recipes


def test_a_mapping_is_read_like_a_recipe_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(json.dumps({"stages": {"prepare": PREPARE, "sft": SFT}}))
    from_mapping = align.load_recipe({"stages": {"prepare": PREPARE, "sft": SFT}})
    from_file = align.load_recipe("recipe.yaml")
    assert dict(from_mapping.stages) == dict(from_file.stages)
    assert [stage.digest for stage in align.plan(from_mapping)] == [
        stage.digest for stage in align.plan("recipe.yaml")
    ]


def test_errors_in_a_mapping_name_the_key_and_come_all_at_once():
    with pytest.raises(align.RecipeError) as error:
        align.load_recipe({"stages": {"prepare": {"sauce": "embedded"}, "sft": SFT | {"seed": -1}}})
    assert any(line.startswith("recipe: prepare.sauce: unknown key") for line in error.value.lines)
    assert any(line.startswith("recipe: sft.seed: ") for line in error.value.lines)


def test_overrides_and_shipped_recipes_apply_to_a_mapping():
    recipe = align.load_recipe(
        {"needs": "sft", "stages": {"dpo": {"model": "sft"}}}, overrides=["dpo.beta=0.3"]
    )
    assert list(recipe.stages) == ["prepare", "sft", "dpo"]
    assert recipe.stages["dpo"].beta == 0.3


def ppo(*rewards, **keys):
    stage = {"model": "sft", "rewards": list(rewards), "steps": 1, "batch_size": 4}
    stage |= {"stage": "reinforce", "max_new_tokens": 4, "learning_rate": 1e-4} | keys
    return {"stages": {"prepare": PREPARE, "sft": SFT, "ppo": stage}}


def test_a_function_is_a_reward_by_its_name():
    recipe = align.load_recipe(ppo(brevity))
    assert recipe.stages["ppo"].rewards == [f"{__name__}:brevity"]


def test_a_function_without_a_name_at_the_top_level_is_refused():
    with pytest.raises(align.RecipeError, match="at the top level of a module"):
        align.load_recipe(ppo(lambda prompts, completions: [0.0] * len(completions)))


def test_the_source_of_a_reward_function_is_part_of_the_digest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    digests = []
    for constant in ("0.0", "1.0"):
        # A script's functions live in `__main__`, which has no import spec.
        Path("script.py").write_text(
            "import align\n"
            f"def score(prompts, completions): return [{constant}] * len(completions)\n"
            f"recipe = {ppo()!r}\n"
            "recipe['stages']['ppo']['rewards'] = [score]\n"
            "print(align.plan(recipe)[-1].digest)\n"
        )
        done = subprocess.run(
            [sys.executable, "script.py"],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        digests.append(done.stdout.split()[-1])
    assert len(digests[0]) == 64
    assert digests[0] != digests[1]


# Runs


def test_a_run_returns_typed_results_and_a_second_one_reuses_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evaluate = {"policies": ["sft_2"], "baseline": "sft", "judge": "gold", "n_prompts": 4}
    stages = {"prepare": PREPARE, "sft": SFT}
    stages |= {"sft_2": SFT | {"stage": "sft", "seed": 1}}
    stages |= {"evaluate": evaluate | {"max_new_tokens": 8}}
    run = align.run({"stages": stages}, "runs")
    assert list(run) == ["prepare", "sft", "sft_2", "evaluate"]
    assert {stage.status for stage in run.values()} == {"ran"}
    comparison = run["evaluate"].metrics.comparisons[0]
    stored = json.loads((run["evaluate"].folder / "artifact.json").read_text())["metrics"]
    assert (comparison.policy, comparison.baseline) == ("sft_2", "sft")
    assert comparison.win_rate == stored["comparisons"][0]["win_rate"]
    assert list(comparison.ci) == stored["comparisons"][0]["ci"]
    assert run["sft"].metrics["loss"] > 0
    assert any("win rates against sft by gold" in table.title for table in run["evaluate"].tables)
    again = align.run({"stages": stages}, "runs", until="sft")
    assert [(stage.name, stage.status) for stage in again.values()] == [
        ("prepare", "reused"),
        ("sft", "reused"),
    ]


def test_ppo_trains_on_a_function_that_was_passed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = align.run(ppo(exclamations, brevity), "runs")
    batch = run["ppo"].metrics.training
    assert batch.rewards.keys() == {f"{__name__}:brevity", f"{__name__}:exclamations"}
    assert batch.rewards[f"{__name__}:brevity"] <= 0
    assert batch.score == pytest.approx(sum(batch.rewards.values()))


def test_errors_of_a_run_are_user_errors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(align.UserError, match="no such stage"):
        align.run({"stages": {"prepare": PREPARE}}, "runs", until="sft")
    assert not (tmp_path / "runs").exists()


# Data and models


def test_prepared_data_is_a_dataset_split_by_prompt(world):
    pairs = align.prepare("embedded", max_rows=60, test_fraction=0.25)
    assert set(pairs) == {"train", "test"}
    assert {"prompt", "chosen", "rejected", "prompt_id"} <= set(pairs["test"].column_names)
    assert not set(pairs["train"]["prompt_id"]) & set(pairs["test"]["prompt_id"])
    prompts = align.prepare("embedded", "prompts", max_rows=60, test_fraction=0.25)
    assert len(set(prompts["test"]["prompt_id"])) == len(prompts["test"])
    with pytest.raises(align.DataError, match="no unpaired; found demonstrations, pairs, prompts"):
        align.prepare("embedded", "unpaired", max_rows=60)
    with pytest.raises(align.RecipeError, match=r"prepare\.sauce: unknown key"):
        align.prepare("embedded", sauce=1)


def test_a_policy_generates_the_same_texts_for_the_same_seed(world):
    policy = align.load_policy(world.sft)
    state = torch.random.get_rng_state()
    prompts = ["Write one merry sentence.", [{"role": "user", "content": "Write."}]]
    first = policy.generate(prompts, n=3, temperature=1.0, max_new_tokens=8, seed=0)
    assert [len(row) for row in first] == [3, 3]
    assert policy.generate(prompts, n=3, temperature=1.0, max_new_tokens=8, seed=0) == first
    assert policy.generate(prompts, n=3, temperature=1.0, max_new_tokens=8, seed=1) != first
    unseeded = [policy.generate(prompts, n=3, temperature=1.0, max_new_tokens=8) for _ in range(2)]
    assert unseeded[0] != unseeded[1], "calls without a seed are independent"
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_text_prompt_is_a_user_turn(world):
    policy = align.load_policy(str(world.lora))
    text, messages = policy.generate(
        ["Hello.", [{"role": "user", "content": "Hello."}]], temperature=0, max_new_tokens=8
    )
    assert text == messages


def test_a_reward_model_scores_nested_completions(world, tmp_path):
    from align.config.training import Reward
    from align.models.tokenization import assistant_turn
    from align.rewards.reward_model import RewardModel
    from align.stages import reward

    config = Reward(model="sft", trainer=tiny_models.TRAINER | {"max_steps": 2})
    tiny_models.stage(reward, config, {"model": world.sft, "pairs": world.data}, tmp_path / "rm")
    scorer = align.load_reward_model(tmp_path / "rm")
    scores = scorer.score(["Hello.", "Bye."], [["a", "bb"], ["ccc", "d"]])
    assert scores.shape == (2, 2)
    direct = RewardModel.load(tmp_path / "rm", dtype="float32", device="cpu")
    expected = direct.score(
        [[{"role": "user", "content": "Bye."}]], [assistant_turn("ccc")], batch_size=1
    )
    assert_close(scores[1, :1], expected)
    with pytest.raises(align.DataError, match="expected one list for each prompt"):
        scorer.score(["Hello.", "Bye."], [["a"], ["b", "c"]])
    DAMAGES["a flipped bit"](tmp_path / "rm" / "tokenizer.json")
    with pytest.raises(align.ArtifactError, match=r"tokenizer.json: its content differs"):
        align.load_reward_model(tmp_path / "rm")


def test_a_damaged_policy_is_not_loaded(world, tmp_path):
    shutil.copytree(world.sft, tmp_path / "sft")
    DAMAGES["a flipped bit"](tmp_path / "sft" / "model.safetensors")
    with pytest.raises(align.ArtifactError, match=r"model.safetensors: its content differs"):
        align.load_policy(tmp_path / "sft")


def test_prefix_sharing_is_enabled_inside_the_block_only(world):
    model = align.load_policy(world.sft).model
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 10]])
    mask = torch.ones_like(ids)
    plain = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    forward = model.base_model.forward
    with align.prefix_sharing(model):
        assert model.base_model.forward != forward
        shared = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert model.base_model.forward == forward
    assert_close(shared, plain, atol=1e-4, rtol=1e-4)


# Win rates


def test_win_rate_by_hand():
    # wins: 1 and 3 of 4, one tie at 2 -> (1 + 1 + 0.5 + 0) / 4
    result = align.win_rate([1.0, 0.5, 0.9, 0.1], [0.0, 0.5, 0.3, 0.2])
    assert result.rate == 2.5 / 4
    assert result.n_prompts == 4
    low, high = result.interval
    assert 0 <= low < result.rate < high <= 1
    assert result.length_controlled is None


def test_win_rate_agrees_with_the_functions_of_the_evaluate_stage():
    generator = torch.Generator().manual_seed(0)
    scores, baseline = torch.rand(2, 50, 3, generator=generator, dtype=torch.float64)
    lengths, others = torch.randint(5, 40, (2, 50, 3), generator=generator)
    result = align.win_rate(scores, baseline, lengths=lengths, baseline_lengths=others)
    outcomes = align.functional.outcomes(scores, baseline)
    controlled = align.functional.length_controlled_win_rate(
        outcomes, lengths.double() - others.double()
    )
    assert result.length_controlled == controlled.item()
    assert result.rate == (scores > baseline).double().mean().item()


def test_missing_scores_are_left_out_of_a_win_rate_and_give_bounds():
    # two wins and a loss; without its score, the fourth could be won or lost
    nan = float("nan")
    lengths = {"lengths": [1, 5, 2, 9], "baseline_lengths": [3, 1, 2, 2]}
    result = align.win_rate([1.0, 1.0, 0.0, nan], [0.0, 0.5, 1.0, 1.0], **lengths)
    assert (result.rate, result.n_prompts, result.invalid) == (pytest.approx(2 / 3), 3, 1)
    assert result.bounds == (0.5, 0.75)
    assert result.length_controlled is not None
    complete = align.win_rate([1.0], [0.0])
    assert (complete.invalid, complete.bounds) == (0, None)


@pytest.mark.parametrize(
    ("scores", "baseline", "keys", "message"),
    [
        ([1.0], [1.0, 2.0], {}, "must be equal"),
        ([], [], {}, "expected the shape"),
        ([float("inf")], [1.0], {}, "finite"),
        ([float("nan")], [1.0], {}, "no comparison has two scores"),
        ([1.0], [0.0], {"lengths": [float("nan")], "baseline_lengths": [1]}, "lengths: .*finite"),
        (["a"], [1.0], {}, "expected numbers"),
        ([1.0], [0.0], {"lengths": [3]}, "given together"),
    ],
)
def test_invalid_scores_are_refused(scores, baseline, keys, message):
    with pytest.raises(align.DataError, match=message):
        align.win_rate(scores, baseline, **keys)
