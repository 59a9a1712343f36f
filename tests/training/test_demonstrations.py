"""Which turns of a demonstration SFT trains: all of the assistant's, each as a policy writes it."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from helpers import recipe_runs, tiny_models
from safetensors.torch import load_file
from torch.testing import assert_close
from trl import SFTConfig, SFTTrainer

from align.config.data import Prepare
from align.config.training import SFT
from align.models import tokenization
from align.models.tokenization import CHATML
from align.stages import prepare, sft
from align.training.demonstration_trainer import token_rows

# Only the last turn of the assistant keeps its reasoning, as in Qwen3's template.
DROPS_REASONING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TURNS = ["first", "<think>a</think>one", "second", "<think>b</think>two", "third", "three"]
Built = Callable[..., Any]


def conversation(texts: list[str]) -> dict[str, Any]:
    roles = itertools.cycle(("user", "assistant"))
    return {"messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tiny_models.World:
    return tiny_models.world(tmp_path_factory.getbasetemp())


@pytest.fixture
def built(world: tiny_models.World, tmp_path: Path) -> Built:
    """The trainer of conversations, with a template."""

    def build(texts: list[Any], template: str, *, train_on: Any = "all", **fields: Any) -> Any:
        read = [each if isinstance(each, dict) else conversation(each) for each in texts]
        rows = "".join(json.dumps(row) + "\n" for row in read)
        (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
        (tmp_path / "template.jinja").write_text(template, encoding="utf-8")
        settings = Prepare(source=str(tmp_path / "rows.jsonl"), test_fraction=0.0)
        tiny_models.stage(prepare, settings, {}, tmp_path / "data")
        fields = {"chat_template_path": str(tmp_path / "template.jinja")} | fields
        keys = {"prefix_sharing": fields.pop("prefix_sharing", True), "max_lost_rows": 1.0}
        trainer = tiny_models.TRAINER | fields
        stage = SFT(model="sft", train_on=train_on, trainer=trainer, **keys)
        inputs = {"model": world.sft, "demonstrations": tmp_path / "data"}
        return sft.build(stage, inputs, tmp_path / "sft")

    return build


def trained_texts(trainer: Any) -> list[list[list[str]]]:
    """The trained turns of each token row of each demonstration."""
    decode = trainer.processing_class.decode
    return [
        [
            [
                decode([token for token, _ in run])
                for trained, run in itertools.groupby(
                    zip(row["input_ids"], row["labels"], strict=True), lambda t: t[1] != -100
                )
                if trained
            ]
            for row in token_rows(example)
        ]
        for example in trainer.train_dataset
    ]


SPANS = [f"{text}<|im_end|>" for text in TURNS[1::2]]


@pytest.mark.parametrize(
    ("template", "train_on", "expected"),
    [
        pytest.param(CHATML, "all", [SPANS], id="one row with all turns"),
        pytest.param(CHATML, "last", [SPANS[-1:]], id="the last turn"),
        pytest.param(DROPS_REASONING, "all", [[each] for each in SPANS], id="a row for each turn"),
        pytest.param(DROPS_REASONING, "last", [SPANS[-1:]], id="the last turn, without reasoning"),
    ],
)
def test_which_turns_are_trained(
    template: str, train_on: str, expected: list[list[str]], built: Built
) -> None:
    assert trained_texts(built([TURNS], template, train_on=train_on)) == [expected]


def test_a_turn_that_the_source_excludes_is_context(built: Built) -> None:
    row = conversation(TURNS)
    row["messages"][3]["train"] = False
    trainer = built([row], CHATML)
    assert trained_texts(trainer) == [[[SPANS[0], SPANS[2]]]]
    assert (
        trainer.train_dataset[0]["input_ids"]
        == built([TURNS], CHATML).train_dataset[0]["input_ids"]
    )
    assert trained_texts(built([row], DROPS_REASONING)) == [[SPANS[:1], SPANS[2:]]]


def test_each_turn_follows_what_a_policy_reads_before_it(built: Built) -> None:
    trainer = built([TURNS], DROPS_REASONING)
    tokenizer = trainer.processing_class
    (example,) = trainer.train_dataset
    messages = conversation(TURNS)["messages"]
    for k, row in zip((1, 3, 5), token_rows(example), strict=True):
        start = next(i for i, label in enumerate(row["labels"]) if label != -100)
        sampled_after = tokenizer.apply_chat_template(
            messages[:k], add_generation_prompt=True, tokenize=False
        )
        assert tokenizer.decode(row["input_ids"][:start]) == sampled_after


def test_rows_that_the_next_turn_begins_with_are_joined_up_to_there(built: Built) -> None:
    texts = ["first", "one", "second", "<think>b</think>two", "third", "three"]
    rows = trained_texts(built([texts], DROPS_REASONING))
    # the first turn has no reasoning to drop; the second one's is missing before the third
    assert rows == [[["one<|im_end|>", "<think>b</think>two<|im_end|>"], ["three<|im_end|>"]]]


@pytest.mark.parametrize("template", [CHATML, DROPS_REASONING], ids=["one row", "three rows"])
@pytest.mark.parametrize("sharing", [True, False], ids=["sharing", "padded"])
def test_the_loss_is_the_mean_over_the_tokens_of_all_turns(
    template: str, sharing: bool, built: Built, world: tiny_models.World
) -> None:
    texts = [TURNS, ["other", "four"]]
    trainer = built(texts, template, prefix_sharing=sharing)
    batch = next(iter(trainer.get_train_dataloader()))
    n_trained = int((batch["labels"] != -100).sum())
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, batch)
    # independent: each turn alone behind its prompt, with one forward pass for each token
    tokenizer = tokenization.load_tokenizer(world.sft)
    tokenizer.chat_template = template
    total = count = 0
    for each in texts:
        messages = conversation(each)["messages"]
        for k in range(1, len(messages), 2):
            head = tokenizer.apply_chat_template(
                messages[:k], add_generation_prompt=True, tokenize=False
            )
            prompt, answer = (
                tokenizer.encode(text, add_special_tokens=False)
                for text in (head, f"{messages[k]['content']}<|im_end|>")
            )
            total += tiny_models.slow_logps(trainer.model, prompt + answer, len(prompt))
            count += len(answer)
    assert count == n_trained
    assert_close(loss, torch.tensor(-total / count))


def test_of_a_row_beyond_max_length_the_earlier_turns_are_trained(built: Built) -> None:
    long = ["again", "yes", "a " * 300, "no"]
    trainer = built([long, ["a " * 300, "lost", "x", "lost"]], CHATML, max_length=64)
    assert trained_texts(trainer) == [[["yes<|im_end|>"]]]
    trainer = built(
        [["again", "<think>c</think>yes", "a " * 300, "no"]], DROPS_REASONING, max_length=64
    )
    assert trained_texts(trainer) == [[["<think>c</think>yes<|im_end|>"]]]


def test_packed_rows_have_all_turns(built: Built) -> None:
    trainer = built([TURNS, TURNS[:2]], DROPS_REASONING, packing=True, max_length=192)
    trained = [example["labels"] for example in trainer.train_dataset]
    ids = [label for labels in trained for label in labels if label != -100]
    text = trainer.processing_class.decode(ids)
    assert sorted(text.split("<|im_end|>")) == sorted(["", *TURNS[1::2], TURNS[1]])


def test_all_tokens_are_trained_without_completion_only_loss(built: Built) -> None:
    (example,) = built([TURNS], DROPS_REASONING, completion_only_loss=False).train_dataset
    assert example["labels"] == example["input_ids"]
    stage = SFT(model="m", train_on="all", trainer={"completion_only_loss": False})
    (problem,) = stage.problems({})
    assert problem.keys == ("train_on",)


def test_a_demonstration_with_one_turn_is_tokenized_as_by_trl(
    built: Built, tmp_path: Path, world: tiny_models.World
) -> None:
    texts = [TURNS[:2], ["other", "four"], ["fifth", """ a "quoted" text """]]
    trainer = built(texts, CHATML)
    tokenizer = tokenization.load_tokenizer(world.sft)
    rows = [conversation(each)["messages"] for each in texts]
    dataset = Dataset.from_list([{"prompt": row[:1], "completion": row[1:]} for row in rows])
    with tokenization.rows_for_trl(tokenizer, end_repair=None):
        plain = SFTTrainer(
            model=copy.deepcopy(trainer.model),
            args=SFTConfig(str(tmp_path / "trl"), report_to="none", use_cpu=True, bf16=False),
            train_dataset=dataset,
            processing_class=tokenizer,
        )
    for one, other in zip(trainer.train_dataset, plain.train_dataset, strict=True):
        assert [one[k] for k in ("input_ids", "labels")] == [
            other[k] for k in ("input_ids", "labels")
        ]
    assert type(trainer.train_dataset) is type(plain.train_dataset)


@pytest.mark.slow
def test_rows_of_several_turns_train_the_same_on_two_processes_and_after_a_kill(
    world: tiny_models.World, tmp_path: Path
) -> None:
    def folder(name: str, batch_size: int) -> Path:
        runs = tmp_path / name / "runs"
        runs.mkdir(parents=True)
        # From one to four turns of the assistant, each a token row: ranks have unequal parts.
        texts = [
            text
            for i in range(16)
            for text in [conversation([f"{t} {i}" for t in TURNS + TURNS[:2]][: 2 + 2 * (i % 4)])]
        ]
        (runs.parent / "rows.jsonl").write_text("".join(json.dumps(t) + "\n" for t in texts))
        (runs.parent / "template.jinja").write_text(DROPS_REASONING)
        trainer = tiny_models.TRAINER | {
            "chat_template_path": "template.jinja", "max_steps": 8, "save_steps": 2,
            "save_strategy": "steps", "save_total_limit": 9, "learning_rate": 1e-2,
            "adam_epsilon": 1e-3, "per_device_train_batch_size": batch_size,
        }  # fmt: skip
        recipe = {"stages": {
            "prepare": {"source": "rows.jsonl", "test_fraction": 0},
            "sft": {"model": str(world.sft), "demonstrations": "prepare", "trainer": trainer},
        }}  # fmt: skip
        (runs.parent / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return runs

    def weights(runs: Path) -> dict[str, torch.Tensor]:
        (file,) = runs.glob("sft-*/model.safetensors")
        return load_file(file)

    one, two, killed = folder("one", 4), folder("two", 2), folder("killed", 4)
    assert recipe_runs.run(one) == 0, recipe_runs.log(one)
    assert recipe_runs.run_on_two_processes(two) == 0, recipe_runs.log(two)
    saved = recipe_runs.file_exists(killed, "sft-*/checkpoint-2/trainer_state.json")
    assert recipe_runs.stop(killed, when=saved) != 0
    assert not list(killed.glob("sft-*/artifact.json"))
    assert recipe_runs.run(killed) == 0, recipe_runs.log(killed)
    before, expected = load_file(world.sft / "model.safetensors"), weights(one)
    assert max((expected[name] - before[name]).abs().max() for name in before) > 1e-2
    for name, weight in weights(two).items():
        assert_close(weight, expected[name], rtol=1e-4, atol=1e-5)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(killed).items())
