"""The memory of stages without gradients, by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from align.config.base import NewModel
from align.config.completions import Label, Sample
from align.config.evaluate import Evaluate
from align.config.inference_bill import (
    MIN_ROWS,
    MOST_LOGITS,
    ROWS,
    InferenceWork,
    Rows,
    StoredModel,
    inference_bill,
    inference_reductions,
)
from align.config.memory import new_model_size
from align.config.recipe import read_recipe
from align.pipeline import estimates
from align.pipeline.plan import plan

SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 1,
    "max_position_embeddings": 64,
}
MODEL = StoredModel(new_model_size(NewModel(**SHAPE)))
# A layer: 4 * 8 * 8 + 3 * 8 * 16 + 2 * 8 = 656; three of them, 512 * 8 embeddings, a norm of 8.
WEIGHTS = 4 * (3 * 656 + 512 * 8 + 8)
FULL: dict[str, Any] = {"dtype": "float32", "quantization": None}


def test_a_policy_that_samples_by_hand():
    work = InferenceWork(Rows(4, 10, 20), prompts=2)
    own = inference_bill([MODEL], [], work, **FULL)
    # 4 rows of 30 tokens have 3 * 2 * 8 keys and values each; 4 tensors of 4 * 512 logits.
    assert own.parts()["sampling"] == 4 * 30 * 48 * 4 + 4 * 4 * 512 * 4
    assert own.peak == WEIGHTS + own.sampling
    # Reading of at least four prompts, which is longer here: beside the cache of 48 numbers a
    # token has the larger of 6 * 8 + 2 * 8 in the attention and 2 * 8 + 3 * 16 behind it.
    long = inference_bill([MODEL], [], InferenceWork(Rows(4, 60, 1), 2, copies=0), **FULL)
    assert long.sampling == 4 * 60 * (48 + 64) * 4
    # An adapter has 4 bytes per parameter, and a sum of 16 numbers in the feed-forward layer.
    adapted = inference_bill([StoredModel(MODEL.size, 100)], [], long_prompts(), **FULL)
    assert adapted.weights == WEIGHTS + 400
    assert adapted.sampling == 4 * 60 * (48 + 16 + 4 * 16) * 4
    half = inference_bill([MODEL], [], long_prompts(), dtype="bfloat16", quantization=None)
    assert (half.weights, half.sampling) == (WEIGHTS // 2, long.sampling // 2)
    # No row is longer than the 64 positions: 4 prompts of 44 tokens before 20 new ones.
    capped = inference_bill([MODEL], [], InferenceWork(Rows(4, 90, 20), 2), **FULL)
    assert capped.sampling == 4 * 64 * 48 * 4 + 4 * 4 * 512 * 4


def long_prompts() -> InferenceWork:
    return InferenceWork(Rows(4, 60, 1), 2, copies=0)


def test_heads_that_share_keys_repeat_those_of_a_layer():
    shape = SHAPE | {"num_attention_heads": 4, "num_key_value_heads": 2}
    grouped = StoredModel(new_model_size(NewModel(**shape)))
    own = inference_bill([grouped], [], InferenceWork(Rows(4, 10, 20), 2), **FULL)
    assert own.sampling == 4 * 30 * (3 * 2 * 4 + 2 * 8) * 4 + 4 * 4 * 512 * 4


def test_an_evaluation_by_hand():
    rows = Rows(4, 10, 20)
    drift = inference_bill([MODEL], [MODEL], InferenceWork(drift=rows, judged=rows), **FULL)
    # 4 * 20 logits of 512, and three more for up to 512 of them; one layer of 4 * 30 tokens.
    logits = 80 * 512 * 4
    assert drift.parts() == {
        "weights": WEIGHTS,
        "frozen": WEIGHTS,
        "layer": 120 * 64 * 4,
        "logits": 4 * logits,
        "sampling": 0,
    }
    assert drift.earlier == logits  # of the batch before
    assert drift.peak == 2 * WEIGHTS + 4 * logits
    # Of pairs, which are one batch: the logits twice. Of several batches: also their hidden states.
    pairs = inference_bill([MODEL], [], InferenceWork(pairs=Rows(4, 0, 30, is_all=True)), **FULL)
    assert pairs.peak == WEIGHTS + 2 * 120 * 512 * 4
    assert pairs.earlier == 0
    several = inference_bill([MODEL], [], InferenceWork(pairs=Rows(4, 0, 30)), **FULL)
    assert several.peak == WEIGHTS + 2 * 120 * 512 * 4 + 2 * 120 * 8 * 4
    # Without a policy: a label stage, and the larger of two judges that are both in memory.
    label = inference_bill([], [MODEL, MODEL], InferenceWork(judged=rows), **FULL)
    assert label.peak == 2 * WEIGHTS + 120 * 64 * 4
    # Of two policies the larger one counts.
    wide = StoredModel(new_model_size(NewModel(**SHAPE | {"intermediate_size": 32})))
    two = inference_bill([MODEL, wide, MODEL], [], InferenceWork(drift=rows), **FULL)
    assert two.weights == WEIGHTS + 4 * 3 * 3 * 8 * 16


def test_logits_are_bounded_unless_a_single_completion_has_more():
    large = replace(MODEL, size=replace(MODEL.size, vocabulary=2**24, positions=None))
    for completion, scored in ((4, 16), (16, 16), (100, 100)):
        rows = Rows(8, 0, completion)
        own = inference_bill([large], [], InferenceWork(pairs=rows), **FULL)
        assert own.earlier == scored * 2**24 * 4
        assert own.layer == scored * 64 * 4


def test_the_bounds_are_those_of_the_code_that_runs():
    from align.models import logps
    from align.models.decoding import prompts

    assert (MOST_LOGITS, ROWS, MIN_ROWS) == (logps.LOGITS, logps.ROWS, prompts.MIN_ROWS)


def test_the_batches_of_each_stage_by_hand():
    data = {
        "prompts": {"train": 100, "test": 30},
        "longest_prompts": {"train": 20, "test": 40},
        "pairs": {"train": 100, "test": 31},
        "longest_rows": {"pairs": {"words": 100}},
    }
    sample = Sample(model="m", n_completions=6, batch_size=64, max_new_tokens=9)
    work = sample.inference_work(data, 1)
    assert work == InferenceWork(Rows(60, 27, 9), 10)  # 20 * 1.35 = 27 tokens
    few = sample.model_copy(update={"n_prompts": 2, "temperature": 0.0})
    assert few.inference_work(data, 1) == InferenceWork(Rows(12, 27, 9), 2, copies=2)
    assert sample.inference_work({"prompts": {"train": 9}}, 1) is None
    label = Label(judge="reward", batch_size=32)
    written = sample.written(600, data)
    assert label.inference_work(written, 1) == InferenceWork(judged=Rows(32, 27, 9))
    assert label.inference_work({"prompts": {"train": 9}, "completions": {"train": 9}}, 1) is None
    keys: dict[str, Any] = {"policies": ["a"], "baseline": "b", "max_new_tokens": 9}
    both = Evaluate(**keys, judge="reward", implicit_rewards=True, batch_size=32)
    work = both.inference_work(data, 1)
    rows = Rows(30, 54, 9, is_all=True)
    # 31 pairs have 62 sides, in two batches, each of up to 100 * 1.35 tokens.
    assert work == InferenceWork(
        Rows(30, 54, 9), 30, drift=rows, pairs=Rows(32, 0, 135), judged=rows
    )
    two = both.model_copy(update={"top_p": 0.9, "n_completions": 2}).inference_work(data, 2)
    assert two is not None
    assert (two.sampled, two.prompts, two.copies) == (Rows(32, 54, 9), 16, 7)
    assert (two.drift, two.judged) == (None, rows)  # 60 completions, 30 on each process
    assert two.pairs == Rows(31, 0, 135, is_all=True)
    only = Evaluate(**keys, implicit_rewards=True).inference_work(data, 1)
    assert only == InferenceWork(pairs=Rows(62, 0, 135, is_all=True))
    assert both.inference_work({k: v for k, v in data.items() if k != "longest_rows"}, 1) is None
    changes = list(inference_reductions(both, work))
    assert [name for name, *_ in changes] == [
        "batch_size: 16", "dtype: bfloat16", "quantization: nf4",
    ]  # fmt: skip
    assert changes[0][1].pairs == Rows(16, 0, 135)
    assert changes[0][1].prompts == 15


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    source = tmp_path / "pairs.jsonl"
    row = '{{"prompt": "one two {0}", "chosen": "yes {0}", "rejected": "no {0}"}}\n'
    source.write_text("".join(row.format(i) for i in range(40)))
    untied = SHAPE | {"tie_word_embeddings": False}
    return {
        "stages": {
            "prepare": {"source": str(source), "test_fraction": 0.3},
            "sft": {"model": untied, "trainer": {"max_length": 64}},
            "dpo": {"model": "sft", "lora": {"r": 2}, "trainer": {"max_length": 64}},
            "reward": {"model": "sft", "trainer": {"max_length": 64}},
            "sample": {"model": "dpo", "max_new_tokens": 9},
            "label": {"judge": "reward"},
            "gold": {"stage": "label", "judge": {"function": "a:b"}},
            "evaluate": {"policies": ["dpo", "org/model"], "baseline": "sft", "judge": "reward"},
        }
    }


def test_the_models_that_stages_load_are_those_that_earlier_ones_write(
    recipe: dict[str, Any], tmp_path: Path
):
    table = estimates.estimate(plan(read_recipe(recipe), tmp_path / "runs"), world_size=1)
    embeddings = 512 * 8
    size = new_model_size(NewModel(**SHAPE | {"tie_word_embeddings": False}))
    assert size.parameters == WEIGHTS // 4 + embeddings
    # Rank 2 in each layer: four of 8 to 8, two of 8 to 16, one of 16 to 8.
    adapter = 3 * 2 * (4 * 16 + 3 * 24)
    dpo = StoredModel(size, adapter)
    sample, label, evaluate = (table[name].inference for name in ("sample", "label", "evaluate"))
    assert sample is not None and label is not None and evaluate is not None
    assert (sample.policies, sample.judges) == ([dpo], [])
    # The score head of 8 weights replaces the output layer.
    (reward,) = label.judges
    assert reward is not None
    assert reward.size.parameters == size.parameters - embeddings + 8
    assert label.policies == []
    assert label.work is not None and label.work.judged is not None
    assert label.work.judged.completion == 9
    assert (evaluate.policies, evaluate.judges) == ([dpo, None, StoredModel(size)], [reward])
    assert table["gold"].inference is None


def test_a_plan_bills_stages_without_gradients(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import yaml
    from typer.testing import CliRunner

    from align.cli.main import app

    monkeypatch.chdir(tmp_path)
    del recipe["stages"]["gold"]
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    done = CliRunner().invoke(app, ["plan", "recipe.yaml", "--gpu-memory", "60KB"])
    assert done.exit_code == 0, done.output
    assert "sample: does not fit" in done.output
    assert "  batch_size: 32: " in done.output
    assert "  quantization: nf4: " in done.output
    assert "label: does not fit" in done.output
    assert "evaluate: memory unknown before the model that it reads" in done.output
    table = done.output[done.output.index("acts.") :]
    assert max(map(len, table.splitlines())) <= 80
    override = ["evaluate.policies=[dpo]", "--gpu-memory", "9GB"]
    done = CliRunner().invoke(app, ["plan", "recipe.yaml", *override])
    for name in ("sample", "label", "evaluate"):
        assert f"{name}: fits: " in done.output
