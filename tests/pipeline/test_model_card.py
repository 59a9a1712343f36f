"""Model cards from records of stages, without any model; the folders are loaded in a slow test.

:mod:`end_to_end.test_model_folders` runs the code of the cards.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from align.config import trl_fields
from align.config.methods import method
from align.config.stages import STAGES
from align.pipeline.card_metrics import METRICS
from align.pipeline.model_card import model_card
from align.runtime import artifacts
from align.runtime.artifacts import Artifact

DIGESTS = {
    name: name.encode().hex().ljust(64, "0")
    for name in ("prepare", "sft", "dpo", "reward", "grpo", "rloo")
}
VERSIONS = {"python": "3.12.1", "align": "0.2.0"}


def record(folder: Path, kind: str, inputs: dict[str, tuple[str, str]], **fields: Any) -> Artifact:
    """Write the artifact of a stage; each input is a folder or Hub id, and its digest."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = STAGES[kind].model_validate(fields.pop("recipe")).model_dump(exclude={"stage"})
    artifact = Artifact(
        stage=kind,
        name=kind,
        digest=DIGESTS[kind],
        recipe=recipe,
        inputs={
            key: {"folder": target, "digest": digest} for key, (target, digest) in inputs.items()
        },
        **{"metrics": {}, "versions": VERSIONS, "commit": None, "seed": 0, "world_size": 1}
        | {"seconds": 1.0, "peak_memory_bytes": 1}
        | fields,
    )
    artifacts.write_artifact(folder, artifact)
    return artifact


def prepared(runs: Path, source: str = "hh-rlhf", files: dict[str, str] | None = None) -> str:
    """The folder of prepared data."""
    folder = runs / "prepare-1"
    record(folder, "prepare", {}, recipe={"source": source}, metrics={"files": files or {}})
    return str(folder)


def adapter(folder: Path, base: str) -> Path:
    """A folder with the config of an adapter."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": base, "peft_type": "LORA"})
    )
    return folder


def dpo(runs: Path, base: str, base_digest: str, **fields: Any) -> tuple[Path, Artifact]:
    """A DPO adapter on an SFT adapter on ``base``."""
    data = prepared(runs)
    sft = adapter(runs / "sft-1", base)
    recipe = {"model": "m", "lora": {"r": 8}}
    record(sft, "sft", {"model": (base, base_digest), "demonstrations": (data, DIGESTS["prepare"])},
           recipe=recipe)  # fmt: skip
    folder = adapter(runs / "dpo-1", base)
    inputs = {"model": (str(sft), DIGESTS["sft"]), "pairs": (data, DIGESTS["prepare"])}
    recipe |= {"beta": 0.2, "trainer": {"loss_type": ["ipo", "sft"]}}
    return folder, record(folder, "dpo", inputs, recipe=recipe, **fields)


def header(card: str) -> dict[str, Any]:
    """The metadata as the library of the Hub reads them."""
    return ModelCard(card).data.to_dict()


def test_the_card_of_an_adapter_on_a_model_of_the_hub(tmp_path):
    folder, artifact = dpo(tmp_path, "some/base", "hub:some/base@abc", metrics={"loss": 0.25})
    card = model_card(folder, artifact)
    assert header(card) == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "base_model": "some/base",
        "base_model_relation": "adapter",
        "datasets": ["Anthropic/hh-rlhf"],
        "tags": ["align", "dpo", "lora"],
    }
    assert "arXiv:2310.12036" in card and "arXiv:2106.09685" in card  # IPO and LoRA
    assert "| training loss | 0.25 |" in card
    assert "| base | model | `some/base@abc` |" not in card
    rows = [line for line in card.splitlines() if line.startswith("|")]
    lineage = [row for row in rows if "`" in row and "made from" not in row]
    assert "| some/base | model | `some/base@abc` |  |" in lineage
    order = [row.split(" | ")[0] for row in lineage if row.count("|") == 5]
    assert order == ["| some/base", "| prepare", "| sft", "| dpo"]
    assert f"| dpo | dpo | `{DIGESTS['dpo'][:16]}` | model: sft, pairs: prepare |" in lineage
    assert "| beta | `0.2` |" in rows and '| trainer.loss_type | `["ipo", "sft"]` |' in rows
    assert "MIT, Anthropic's HH-RLHF" in card
    assert str(tmp_path) not in card and "machine of the training" not in card


def test_a_local_base_is_no_base_model_of_the_hub_and_gives_its_license(tmp_path):
    base = tmp_path / "models" / "tiny"
    base.mkdir(parents=True)
    (base / "README.md").write_text("---\nlicense: mit\n---\n# tiny\n")
    folder, artifact = dpo(tmp_path / "runs", str(base), "5" * 64)
    card = model_card(folder, artifact)
    assert header(card)["license"] == "mit" and "base_model" not in header(card)
    assert "base_model_relation" not in header(card)
    assert "`tiny`, a local folder" in card and "| license of the base model | mit |" in card
    assert "by its path on the machine of the training, the folder\n`tiny`" in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize(
    "text", ["", "---\nlicense: [\n---\n", "---\n- 1\n---\n", "---\nlicense: 3\n---\n"]
)
def test_a_base_whose_card_states_no_license_has_an_unknown_one(tmp_path, text):
    base = tmp_path / "tiny"
    base.mkdir()
    (base / "README.md").write_text(text)
    card = model_card(*dpo(tmp_path / "runs", str(base), "5" * 64))
    assert "license" not in header(card) and "| license of the base model | unknown |" in card


def test_the_card_of_a_new_reward_model(tmp_path):
    file = tmp_path / "my" / "pairs.jsonl"
    file.parent.mkdir()
    file.write_text("")
    data = prepared(tmp_path, str(file), {file.as_posix(): "c" * 64})
    sft = tmp_path / "sft-1"
    record(sft, "sft", {"demonstrations": (data, DIGESTS["prepare"])}, recipe={"model": {}})
    metrics = {
        "loss": 0.5,
        "center": {"score_mean": 1.25},
        "held_out": {"accuracy": 0.75, "ci": [0.625, 0.875], "pairs": 8},
    }
    folder = tmp_path / "reward-1"
    inputs = {"model": (str(sft), DIGESTS["sft"]), "pairs": (data, DIGESTS["prepare"])}
    recipe = {"model": "sft", "margin_coef": 1.0}
    artifact = record(folder, "reward", inputs, recipe=recipe, metrics=metrics)
    card = model_card(folder, artifact)
    assert header(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["align", "reward"],
    }
    assert f"| {METRICS['held_out.accuracy']} | 0.75 | 0.625 to 0.875 |" in card
    assert "initialized at random" in card and "license of the base model" not in card
    assert f"| pairs.jsonl | unknown; see the source | pairs.jsonl `{'c' * 16}` |" in card
    assert "AutoModelForSequenceClassification" in card and "align export" not in card
    assert str(tmp_path) not in card


def test_a_card_has_no_dates_durations_or_places(tmp_path):
    cards = set()
    for seconds, runs in ((1.0, "a"), (2.0, "b")):
        metrics = {"loss": 0.25, "reference": {"seconds": seconds}}
        folder, artifact = dpo(tmp_path / runs, "some/base", "hub:some/base@abc", metrics=metrics,
                               seconds=seconds, peak_memory_bytes=int(seconds))  # fmt: skip
        cards.add(model_card(folder, artifact))
    assert len(cards) == 1


def test_a_moved_folder_of_runs_keeps_its_lineage_and_a_removed_one_its_names(tmp_path):
    folder, artifact = dpo(tmp_path / "runs", "some/base", "hub:some/base@abc")
    card = model_card(folder, artifact)
    moved = (tmp_path / "runs").rename(tmp_path / "moved")
    assert model_card(moved / folder.name, artifact) == card
    (moved / "sft-1").rename(tmp_path / "elsewhere")
    card = model_card(moved / folder.name, artifact)
    assert f"| sft-1 | removed | `{DIGESTS['sft'][:16]}` |  |" in card
    assert header(card)["tags"] == ["align", "dpo", "lora"]


def test_data_is_listed_once_though_stages_store_digests_with_and_without_its_prompts(tmp_path):
    folder, artifact = dpo(tmp_path, "some/base", "hub:some/base@abc")
    inputs = artifact.inputs | {"pairs": artifact.inputs["pairs"] | {"digest": "9" * 64}}
    assert model_card(folder, dataclasses.replace(artifact, inputs=inputs)) == model_card(
        folder, artifact
    )


def test_the_record_of_an_earlier_version_has_a_card(tmp_path):
    folder, artifact = dpo(tmp_path, "some/base", "hub:some/base@abc")
    recipe = {key: value for key, value in artifact.recipe.items() if key != "quantization"}
    assert model_card(folder, dataclasses.replace(artifact, recipe=recipe)) == model_card(
        folder, artifact
    )


def test_texts_with_the_marks_of_tables_and_yaml_stay_in_their_place(tmp_path):
    folder, artifact = dpo(tmp_path, "some/base", "hub:some/base@abc")
    odd = dataclasses.replace(artifact, recipe=artifact.recipe | {"trainer": {"run_name": "a|b"}})
    assert '| trainer.run_name | `"a\\|b"` |' in model_card(folder, odd)


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_an_adapter_is_loaded_on_a_base_of_the_type_that_it_was_trained_on(tmp_path, quantization):
    folder, artifact = dpo(tmp_path, "some/base", "hub:some/base@abc")
    recipe = artifact.recipe | {"quantization": quantization}
    card = model_card(folder, dataclasses.replace(artifact, recipe=recipe))
    code = card.partition("```python\n")[2].partition("```")[0]
    compile(code, "README.md", "exec")
    marks = ("BitsAndBytesConfig(", "quantization_config=quantization", "--quantization nf4")
    marks += ("pip install bitsandbytes", "| the adapter, trained on a base in 4 bits (nf4) |")
    assert [mark in card for mark in marks] == [quantization is not None] * 5
    (folder / "adapter_config.json").rename(tmp_path / "elsewhere")  # full weights
    exported = model_card(folder, dataclasses.replace(artifact, recipe=recipe))
    assert not any(mark in exported for mark in marks)


def test_every_loss_of_trl_has_a_method_and_every_trained_model_too():
    classes = {"sft": "SFTConfig", "dpo": "DPOConfig", "kto": "KTOConfig"}
    for kind, name in classes.items():
        for loss in trl_fields.trl_fields(name)["loss_type"].choices or ():
            (text,) = method(kind, {"trainer": {"loss_type": loss}})
            assert "of TRL" not in text, (kind, loss)
    trained = {kind for kind, stage in STAGES.items() if stage.trains_model}
    settings = {"kl_coef": 0.1, "trainer": {}}
    assert all(method(kind, settings) for kind in trained)
    assert len(method("rloo", {"kl_coef": 0, "lora": {"r": 4}})) == 2
    assert method("rloo", {"lora": {}, "quantization": "nf4"})[1:] == [
        "a base in 4 bits, QLoRA (Dettmers et al. 2023, arXiv:2305.14314)"
    ]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "GRPO"),
        ({"scale_advantages": "none"}, "Dr. GRPO"),
        ({"ratio": "sequence"}, "GSPO"),
        ({"loss": "cispo"}, "CISPO"),
        ({"loss": "sapo"}, "SAPO"),
        ({"loss": "vespo"}, "VESPO"),
        ({"filter": "mixed_groups"}, "DAPO"),
    ],
)
def test_settings_of_online_rl_that_have_a_name_are_on_the_card(settings, name):
    keys = {"model": "sft", "rewards": ["reward"], "steps": 1, "batch_size": 8, "kl_coef": 0}
    methods = method("grpo", STAGES["grpo"].model_validate(keys | settings).model_dump())
    assert name in methods[-1]
    assert len(methods) == 1 + len(settings)


def test_the_card_of_an_online_rl_stage_has_its_metrics_and_its_environment(tmp_path):
    recipe = {"model": "m", "steps": 1, "batch_size": 8, "environment": "arithmetic"}
    metrics = {"grpo": {"score": 0.25, "kl": 1.5}}
    folder = tmp_path / "grpo-1"
    artifact = record(folder, "grpo", {}, recipe=recipe | {"max_turns": 3}, metrics=metrics)
    card = model_card(folder, artifact)
    assert (
        "| environment | `align.rewards.arithmetic:Arithmetic`, `arithmetic`; episodes of at most "
        "3 turns |\n| base model |" in card
    )
    assert "| training: mean score | 0.25 |" in card
    artifact = record(folder, "grpo", {}, recipe=recipe | {"environment": "m:World"})
    assert "| environment | `m:World`; episodes of at most 8 turns |" in model_card(
        folder, artifact
    )
    assert "| environment |" not in model_card(
        folder, record(folder, "rloo", {}, recipe={**recipe, "environment": None, "rewards": ["r"]})
    )


def grpo_card(folder: Path, held_out: list[dict[str, float]], **metrics: Any) -> list[str]:
    """The lines of the card of a GRPO stage with these measurements of held-out prompts."""
    recipe = {"model": "m", "rewards": ["r"], "steps": 4, "batch_size": 8}
    folder.mkdir()
    lines = "".join(f"{json.dumps(line)}\n" for line in held_out)
    (folder / "held_out.jsonl").write_text(lines)
    values = {"grpo": {"score": 0.5, "eval_score": 0.125, "eval_kl": 2.75, "eval_missing_eos": 0.1}}
    artifact = record(folder, "grpo", {}, recipe=recipe, metrics=values | metrics)
    return model_card(folder, artifact).splitlines()


def measured(step: int, scores: list[float], kls: list[float]) -> list[dict[str, float]]:
    pairs = enumerate(zip(scores, kls, strict=True))
    return [{"step": step, "prompt": i, "kl": kl, "score": score} for i, (score, kl) in pairs]


LAST = measured(4, [1, *[0] * 7], [1, *[3] * 7])
"""Eight prompts, for which the bootstrap can be computed by hand.

The tails of an interval of 95 % over 8 prompts are Phi(-sqrt(8 / 7) * t), with the quantile
t = 2.3646 of Student's distribution with 7 degrees of freedom: 0.0057 at each end. The number of
draws of the first prompt is Binomial(8, 1 / 8): none with 0.344, at most 3 with 0.9887, at most 4
with 0.9988. So the 0.0057 quantile is 0 draws and the 0.9943 quantile is 4 of 8. Scores are
the share of these draws, 0 to 0.5; KL is 3 minus twice the share, 2 to 3.
"""


def test_the_held_out_score_and_kl_of_online_rl_have_intervals_over_prompts(tmp_path):
    lines = grpo_card(tmp_path / "grpo-1", measured(0, [7, 8, 9, 9, 9], [0, 0, 0, 0, 1]) + LAST)
    assert "| held out: mean score | 0.125 | 0 to 0.5 |" in lines
    assert f"| {METRICS['online_rl.eval_kl']} | 2.75 | 2 to 3 |" in lines
    # Only the mean of these is stored.
    assert "| training: mean score | 0.5 |  |" in lines
    assert f"| {METRICS['online_rl.eval_missing_eos']} | 0.1 |  |" in lines


def test_the_interval_belongs_to_the_policy_that_a_stop_rule_chose(tmp_path):
    later = measured(6, [7, 8, 9, 9, 9], [5, 6, 7, 8, 9])
    lines = grpo_card(tmp_path / "grpo-1", LAST + later, stop={"best_step": 4})
    assert "| held out: mean score | 0.125 | 0 to 0.5 |" in lines


def test_prompts_that_agree_and_stages_without_their_values_have_no_interval(tmp_path):
    alike = measured(4, [0.125] * 8, [1, *[3] * 7])
    lines = grpo_card(tmp_path / "grpo-1", alike)
    assert "| held out: mean score | 0.125 |  |" in lines
    assert f"| {METRICS['online_rl.eval_kl']} | 2.75 | 2 to 3 |" in lines
    (tmp_path / "grpo-1" / "held_out.jsonl").unlink()
    artifact = artifacts.read_artifact(tmp_path / "grpo-1")
    assert "| held out: mean score | 0.125 |  |" in model_card(tmp_path / "grpo-1", artifact)


def test_the_copy_of_a_stage_has_the_intervals_of_the_stage(tmp_path):
    grpo_card(tmp_path / "grpo-1", LAST)
    artifact = artifacts.read_artifact(tmp_path / "grpo-1")
    (tmp_path / "copy").mkdir()
    card = model_card(tmp_path / "copy", artifact, stage=tmp_path / "grpo-1")
    assert "| held out: mean score | 0.125 | 0 to 0.5 |" in card


def test_the_accuracy_on_validation_pairs_has_an_interval_over_their_prompts(tmp_path):
    metrics = {"eval_loss": 0.5, "eval_rewards/accuracies": 0.75}
    counts = {"eval_rows": 80, "eval_prompts": 40}
    folder, artifact = dpo(tmp_path, "some/base", "hub:some/base@abc", metrics=metrics | counts)
    lines = model_card(folder, artifact).splitlines()
    assert "| held out: loss, 80 rows | 0.5 |  |" in lines
    start = "| held out: share of pairs ordered correctly, 80 rows | 0.75 | "
    (line,) = [line for line in lines if line.startswith(start)]
    low, high = map(float, line.removeprefix(start).removesuffix(" |").split(" to "))
    # Wilson's interval of 30 of 40, with t = 2.0227 of 39 degrees of freedom in place of z, is
    # (p + t^2 / 2n +- t sqrt(p (1 - p) / n + t^2 / 4n^2)) / (1 + t^2 / n). The variance of a sample
    # of 40 counts as that of n = 39.
    t, n = 2.0227, 39
    center, scale = 0.75 + t**2 / (2 * n), 1 + t**2 / n
    margin = t * math.sqrt(0.75 * 0.25 / n + t**2 / (4 * n**2))
    assert low == pytest.approx((center - margin) / scale, abs=2e-3)
    assert high == pytest.approx((center + margin) / scale, abs=2e-3)
    plain = dataclasses.replace(artifact, metrics=metrics)  # of an earlier version
    assert "| held out: loss | 0.5 |  |" in model_card(folder, plain).splitlines()
    assert "| held out: share of pairs ordered correctly | 0.75 |  |" in model_card(folder, plain)
