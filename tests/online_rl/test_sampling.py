"""Sampling of completions: temperature, padding, eos, seeds and the choice of prompts.

Rows are those of the checklist in the design notes on PPO.
"""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ppo_fixtures, tiny_models
from helpers.ppo_fixtures import Folders, Recorder
from torch.testing import assert_close

from align.config.training import SFT
from align.errors import UserError
from align.functional.policy_gradient import kl_k1
from align.models import generation, tokenization
from align.models.decoding import eager
from align.models.decoding.choice import Choice
from align.models.decoding.prompts import MIN_ROWS
from align.online_rl.draws import training_draw
from align.online_rl.experience import compute_experience
from align.online_rl.prompts import prompt_indices
from align.online_rl.sampling import LocalSampler
from align.runtime import distributed
from align.stages import sft
from align.training import trl_trainer

LOADED = [
    pytest.param("sft", False, id="separate models"),
    pytest.param("sft", True, id="one backbone, fresh adapter"),
    pytest.param("lora", True, id="one backbone, the SFT adapter"),
    pytest.param("lora", False, id="separate models, the SFT adapter merged"),
]


def record_logits(monkeypatch: pytest.MonkeyPatch) -> list[dict[int, list[Any]]]:
    """Record the logits and the scores from which each token of each row is sampled."""
    records: list[dict[int, list[Any]]] = [defaultdict(list), defaultdict(list)]
    choose = Choice.__call__

    def recording(choice: Choice, logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
        for record, values in zip(records, (logits, choice.scores(logits)), strict=True):
            for row, value in zip(rows, values.clone(), strict=True):
                record[row].append(value)
        return choose(choice, logits, rows)

    monkeypatch.setattr(Choice, "__call__", recording)
    return records


# Temperature


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize(("source", "lora"), LOADED)
def test_row_03_the_temperature_divides_every_logit_in_sampling_reference_and_training(
    folders: Folders, tmp_path: Path, source: str, lora: bool, temperature: float,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    folder = getattr(folders.world, source)
    trainer = ppo_fixtures.build_trainer(
        folders, tmp_path, source=folder, lora=lora, temperature=temperature
    )
    raw_logits, sampled_scores = record_logits(monkeypatch)
    completions = ppo_fixtures.sample(trainer)
    experience = compute_experience(trainer.models, completions, batch_size=3)
    kl = kl_k1(experience.logps, experience.ref_logps)
    assert torch.equal(kl, torch.zeros_like(kl))

    # The sampler's: logits / T of each token, and the scores from which it was drawn.
    order = sorted(range(8), key=lambda i: len(completions.prompts[i]))
    inputs = ppo_fixtures.inputs_of(trainer.models, completions)
    trained = ppo_fixtures.evaluate(trainer.models, inputs).logps.detach()
    plain = ppo_fixtures.load_plain_policy(folder)
    expected = ppo_fixtures.plain_logps(plain, completions, temperature)
    for place, i in enumerate(order):
        tokens = torch.tensor(completions.completions[i])[:, None]
        for raw in ([x / temperature for x in raw_logits[place]], sampled_scores[place]):
            steps = torch.stack(raw)[: len(tokens)]
            sampled = steps.log_softmax(-1).gather(1, tokens)[:, 0]
            for logps in (experience.logps, experience.ref_logps, trained):
                ours = ppo_fixtures.columns(logps, completions)[i]
                assert_close(ours, sampled, rtol=0, atol=1e-4)
        assert_close(sampled.double(), expected[i], rtol=0, atol=1e-4)


# Padding


@pytest.mark.parametrize("positions", ["rotary", "absolute"])
def test_row_04_sampling_from_a_prompt_does_not_depend_on_its_padding(
    folders: Folders, positions: str
):
    source = folders.world.sft if positions == "rotary" else folders.gpt2
    models = ppo_fixtures.build_models(source, [], lora=False, share=True)
    ppo_fixtures.perturb(models, scale=0.1)  # as it is, it completes every prompt with "the the"
    model, tokenizer = models.policy.model, models.tokenizer
    rows = tiny_models.rows(folders.world.data, "prompts-train")[:4]
    prompts = tokenization.tokenize_prompts(tokenizer, [row["prompt"] for row in rows])
    prompts.append(prompts[0][-15:])
    # At temperature 0 the likeliest token depends on no random number.
    stops = generation.set_sampling(model, tokenizer, temperature=0, top_p=1, max_new_tokens=12)
    together = LocalSampler(models.policy, stops, batch_size=8).generate(prompts, seeds=range(5))
    alone = LocalSampler(models.policy, stops, batch_size=1).generate(prompts, seeds=range(5))
    assert together == alone
    assert len({tuple(c) for c in alone.completions}) > 1


def test_row_05_lengths_decide_which_tokens_are_real_if_pad_equals_eos(
    folders: Folders, tmp_path: Path, recorder: Recorder
):
    settings = {"max_new_tokens": 48, "epochs": 1}
    with_eos = ppo_fixtures.build_trainer(
        folders, tmp_path / "eos", source=folders.eos, reward_model=folders.eos_reward, **settings
    )
    tokenizer = with_eos.models.tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    other = ppo_fixtures.build_trainer(
        folders, tmp_path / "sft", reward_model=folders.eos_reward, **settings
    )
    tokenizer = other.models.tokenizer
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    for trainer in (with_eos, other):
        ppo_fixtures.perturb(trainer.models)
        ppo_fixtures.make_ends_likely(trainer.models)
        trainer.step(0)
    completions, again = recorder.completions
    assert completions == again  # the same weights, another pad
    assert 0 < sum(completions.finished) < len(completions.finished)
    one, two = recorder.rollouts
    assert torch.equal(one.mask, two.mask)
    assert one.mask.sum(1).tolist() == [len(c) for c in completions.completions]
    for name in ("logps", "advantages", "values", "returns"):
        ours, theirs = getattr(one, name), getattr(two, name)
        assert_close(ours[one.mask], theirs[one.mask])
    first, second = recorder.diagnostics
    # The embedding of an input token that equals pad gets no gradient (`padding_idx` of torch);
    # all other gradients are equal.
    assert first.grad_norm == pytest.approx(second.grad_norm, rel=1e-3)
    assert first.policy_loss == pytest.approx(second.policy_loss, abs=1e-5)


def test_row_05_the_eos_label_stays_in_the_sft_loss_if_pad_equals_eos(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trainers = []
    monkeypatch.setattr(trl_trainer, "train", lambda trainer, *_: trainers.append(trainer) or {})
    inputs = {"model": folders.eos, "demonstrations": folders.world.data}
    config = SFT(model="sft", trainer=ppo_fixtures.TRAINER)
    sft.run(config, inputs, tmp_path, tiny_models.logger("sft", tmp_path))
    (trainer,) = trainers
    batch = next(iter(trainer.get_train_dataloader()))
    eos = trainer.processing_class.eos_token_id
    labels, mask = batch["labels"], batch["attention_mask"].bool()
    assert not mask.all(), "nothing is padded"
    assert ((labels == eos).sum(1) == 1).all()  # the one that ends the completion
    assert (labels[~mask] == -100).all()


def test_row_05_a_reward_models_pad_is_not_eos_and_its_score_is_read_at_the_eos(folders: Folders):
    tokenizer = tokenization.load_tokenizer(folders.eos_reward)
    model = ppo_fixtures.load_plain_reward_model(folders.eos_reward)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id
    rows = ppo_fixtures.tokenized_pairs(folders, tokenizer)[0]
    assert all(row[-1] == tokenizer.eos_token_id for row in rows)
    batch = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        padded = model(**batch).logits[:, 0]
        for row, score in zip(rows, padded, strict=True):
            hidden = model.base_model(input_ids=torch.tensor([row])).last_hidden_state[0]
            assert_close(score, model.score(hidden[-1])[0], rtol=1e-4, atol=1e-5)  # at the eos
            assert (score - model.score(hidden[-2])[0]).abs() > 1e-3  # not before it


def test_row_05_a_tokenizer_whose_only_special_token_is_eos_is_rejected():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"</s>": 0, "word": 1}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>")
    with pytest.raises(UserError, match="no special token except eos"):
        tokenization.set_pad_token_for_scores(tokenizer)


# Eos


@pytest.mark.parametrize("lora", [False, True], ids=["separate models", "one backbone"])
def test_row_06_tokens_after_eos_change_no_score_no_advantage_and_no_loss(
    folders: Folders, tmp_path: Path, recorder: Recorder, lora: bool,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setattr(eager, "obstacle", lambda model: "rows end together")
    n_changed = 0
    for name in ("unchanged", "with junk"):
        trainer = ppo_fixtures.build_trainer(folders, tmp_path / name, lora=lora, max_new_tokens=40)
        ppo_fixtures.perturb(trainer.models)
        ppo_fixtures.make_ends_likely(trainer.models)
        if name == "with junk":
            model, eos = trainer.models.policy.model, trainer.models.tokenizer.eos_token_id
            generate = model.generate

            def generate_junk(
                generate: Any = generate, eos: int = eos, **kwargs: Any
            ) -> torch.Tensor:
                nonlocal n_changed
                output, width = generate(**kwargs), kwargs["input_ids"].shape[1]
                for row in output[:, width:]:
                    for end in (row == eos).nonzero()[:1, 0].tolist():
                        n_changed += len(row) - end - 1
                        row[end + 1 :] = torch.arange(10, 10 + len(row) - end - 1)
                        row[end + 2 : end + 3] = eos  # a second eos as well
                return output

            model.generate = generate_junk
        trainer.step(0)
    assert n_changed > 20
    assert recorder.completions[0] == recorder.completions[1]
    assert recorder.scores[0].texts == recorder.scores[1].texts
    assert torch.equal(recorder.scores[0].score, recorder.scores[1].score)
    first, second = recorder.rollouts
    for name in ("logps", "advantages", "returns"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert recorder.diagnostics[0] == recorder.diagnostics[1]


def test_row_06_a_completion_ends_with_its_first_eos(folders: Folders, tmp_path: Path):
    trainer = ppo_fixtures.build_trainer(folders, tmp_path, max_new_tokens=40)
    eos = trainer.models.tokenizer.eos_token_id
    completions = ppo_fixtures.sample(trainer, 16)
    assert any(completions.finished)
    for row, finished in zip(completions.completions, completions.finished, strict=True):
        assert row.count(eos) == int(finished)
        assert (row[-1] == eos) == finished


def test_row_29_sampling_stops_at_eos(folders: Folders, tmp_path: Path):
    settings = {"max_new_tokens": 100, "sample_batch_size": 8}
    trainer = ppo_fixtures.build_trainer(folders, tmp_path, **settings)
    model, sizes = trainer.models.policy.model, []
    eos = trainer.models.tokenizer.eos_token_id
    likelier = torch.zeros(model.config.vocab_size)
    likelier[eos] = 4.0  # e^4 = 55 times as likely at every token; otherwise few completions end
    model.lm_head.register_forward_hook(lambda _, __, logits: logits + likelier)
    model.lm_head.register_forward_hook(lambda _, __, logits: sizes.append(len(logits)))
    lengths = [len(c) for c in ppo_fixtures.sample(trainer).completions]
    assert len(sizes) == max(lengths) < 100, "sampling continues after the eos"
    continuing = [sum(length > step for length in lengths) for step in range(1, max(lengths))]
    assert sizes[1:] == [max(n, MIN_ROWS) for n in continuing]


# Seeds and prompts


def test_row_25_ranks_use_different_prompts_and_seeds_and_a_run_repeats_itself(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trainer = ppo_fixtures.build_trainer(folders, tmp_path / "a", n_completions=2, batch_size=8)
    config, n = trainer.config, len(trainer.prompts)
    alone = [prompt_indices(step, n, config) for step in range(3)]
    per_rank, completions = [], []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: 2)
        per_rank.append([prompt_indices(step, n, config) for step in range(3)])
        prompts, draw = [trainer.prompts.tokens[0]] * 4, training_draw(config, 0)
        completions += trainer.sampler.generate(prompts, seeds=draw.seeds).completions
    for step in range(3):
        ours, theirs = (indices[step] for indices in per_rank)
        assert len(ours) == len(theirs) == 4
        assert not set(ours) & set(theirs)
        assert sorted(ours + theirs) == sorted(alone[step])
    assert len({tuple(c) for c in completions}) == 8
    monkeypatch.undo()

    runs = []
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        trainer = ppo_fixtures.build_trainer(folders, tmp_path / name, lora=True, seed=seed)
        trainer.step(0)
        trainer.step(1)
        runs.append(ppo_fixtures.flat_weights(trainer))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_row_25_every_epoch_uses_each_prompt_once_in_a_fresh_order():
    n, config = 45, ppo_fixtures.ppo_config()
    stream = [i for step in range(math.ceil(2 * n / 8)) for i in prompt_indices(step, n, config)]
    first, second = stream[:n], stream[n : 2 * n]
    assert sorted(first) == sorted(second) == list(range(n))
    assert first != second != sorted(second)
