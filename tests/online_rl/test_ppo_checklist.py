"""The checklist of PPO on language models, rows 1 to 12: what is sampled and scored, by whom. The rest: test_ppo_rows.py.

A role is compared with a plain model of transformers that reads one row alone, without padding.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ppo_fixtures, tiny_models
from helpers.ppo_fixtures import Cast, Watch
from torch.testing import assert_close

from align.config.training import SFT, Reward
from align.errors import UserError
from align.functional.policy_gradient import kl_k1
from align.models import generation, loading, tokenization
from align.online_rl import experience, models
from align.online_rl.trainer import PPOTrainer
from align.rewards import reward_model
from align.runtime.progress import Logger
from align.stages import reward, sft
from align.training import trl_trainer

WAYS = [
    pytest.param("sft", False, id="separate models"),
    pytest.param("sft", True, id="one backbone, fresh adapter"),
    pytest.param("lora", True, id="one backbone, the SFT adapter"),
    pytest.param("lora", False, id="separate models, the SFT adapter merged"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Cast:
    return ppo_fixtures.cast(tmp_path_factory.getbasetemp())


def asked_and_sampled(learner: PPOTrainer) -> list[tuple[dict[str, Any], Any]]:
    """Record what ``generate`` is asked and all that it knows of its choices."""
    model, found = learner.cast.policy.model, []
    generate = model.generate

    def spy(**kwargs: Any) -> torch.Tensor:
        output = generate(
            **kwargs, return_dict_in_generate=True, output_logits=True, output_scores=True
        )
        found.append((kwargs, output))
        return output.sequences

    model.generate = spy
    return found


# Row 1 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True], ids=["separate models", "one backbone"])
def test_row_01_dropout_is_off_in_all_roles_in_train_mode_too(
    made: Cast, tmp_path: Path, lora: bool
):
    source, scorer = tmp_path / "sft", tmp_path / "rm"
    shutil.copytree(made.world.sft, source)
    shutil.copytree(made.adapter if lora else made.full, scorer)
    ppo_fixtures.edit(source / "config.json", attention_dropout=0.5)
    if lora:
        fields = {"lora_dropout": 0.5, "base_model_name_or_path": str(source)}
        ppo_fixtures.edit(scorer / "adapter_config.json", **fields)
    else:
        ppo_fixtures.edit(scorer / "config.json", attention_dropout=0.5)
    ids = torch.arange(5, 25)[None]
    for folder, load in ((source, ppo_fixtures.plain), (scorer, ppo_fixtures.plain_scorer)):
        drops = load(folder).train()
        assert not torch.equal(drops(input_ids=ids).logits, drops(input_ids=ids).logits)

    cast = ppo_fixtures.build(source, [scorer], lora=lora, dropout=0.5)
    ppo_fixtures.move(cast)
    for model in cast.models():
        model.train()
    mask = torch.ones_like(ids)
    for role in (cast.policy, cast.reference, cast.critic):
        assert torch.equal(role.hidden(ids, mask), role.hidden(ids, mask))
    scores = [cast.rewards[0].score_tokens(ids.tolist(), batch_size=1) for _ in range(2)]
    assert torch.equal(*scores)


@pytest.mark.parametrize("name", ["GPT2", "OPT", "Bloom"])
def test_row_01_dropout_is_off_wherever_an_architecture_keeps_it(name: str):
    import transformers

    shape = {"vocab_size": 30, "hidden_size": 16, "num_attention_heads": 2}
    shape |= {"num_hidden_layers": 1, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    if name == "OPT":
        shape |= {"word_embed_proj_dim": 16, "ffn_dim": 16, "dropout": 0.5}
    if name == "Bloom":
        shape |= {"hidden_dropout": 0.5}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**shape)
    model = getattr(transformers, f"{name}ForCausalLM" if name != "GPT2" else "GPT2LMHeadModel")(
        config
    ).train()
    ids = torch.arange(2, 20)[None]
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    models.disable_dropout(model)
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


# Row 2 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "lora"), WAYS)
def test_row_02_ratio_is_one_before_the_first_step_and_with_learning_rate_0_in_all_epochs(
    made: Cast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, lora: bool
):
    watch = Watch(monkeypatch)
    learner = ppo_fixtures.learner(
        made,
        tmp_path,
        source=getattr(made.world, source),
        lora=lora,
        epochs=3,
        minibatches=2,
        micro_batch_size=2,
    )
    ppo_fixtures.frozen(learner)
    generated = asked_and_sampled(learner)
    learner.step(0)

    (asked, _), *_ = generated
    assert (asked["attention_mask"][:, 0] == 0).any(), "no prompt is padded on the left"
    (rollout,) = watch.rollouts
    old = {tuple(ids.tolist()): row for row, ids in enumerate(rollout.inputs["ids"])}
    assert len(watch.asked) == 3 * 2 * 2  # epochs, minibatches, pieces of two rows
    for inputs, logps in watch.asked:
        rows = torch.tensor([old[tuple(ids.tolist())] for ids in inputs["ids"]])
        valid = rollout.mask[rows]
        assert (logps - rollout.logps[rows])[valid].abs().max() < 1e-4
    (told,) = watch.diagnostics
    assert told.ratio_max == pytest.approx(1.0, abs=1e-4)
    assert (told.clip_fraction, told.steps) == (0, 6)


@pytest.mark.parametrize("lora", [False, True], ids=["separate models", "one backbone"])
def test_row_02_the_ratio_leaves_one_when_the_policy_learns(
    made: Cast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: bool
):
    watch = Watch(monkeypatch)
    ppo_fixtures.learner(made, tmp_path, lora=lora, epochs=2).step(0)
    assert watch.diagnostics[0].ratio_max > 1.01


# Row 3 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize(("source", "lora"), WAYS)
def test_row_03_the_temperature_divides_every_logit_in_sampling_reference_and_training(
    made: Cast, tmp_path: Path, source: str, lora: bool, temperature: float
):
    folder = getattr(made.world, source)
    learner = ppo_fixtures.learner(
        made, tmp_path, source=folder, lora=lora, temperature=temperature
    )
    generated = asked_and_sampled(learner)
    said = ppo_fixtures.said(learner)
    inputs = ppo_fixtures.inputs_of(learner, said)
    spoken = experience.compute_experience(learner.cast, inputs, batch_size=3)
    assert torch.equal(kl_k1(spoken.logps, spoken.ref_logps), torch.zeros_like(spoken.logps))

    # The sampler's own: each step's logits / T, and the scores that it drew from.
    (_, output), *rest = generated
    assert not rest
    order = sorted(range(8), key=lambda i: len(said.prompts[i]))
    trained = ppo_fixtures.evaluated(learner.cast, inputs).logps.detach()
    by_plain = ppo_fixtures.plain_logps(ppo_fixtures.plain(folder), said, temperature)
    for place, i in enumerate(order):
        tokens = torch.tensor(said.completions[i])[:, None]
        for raw in ([x / temperature for x in output.logits], output.scores):
            steps = torch.stack([x[place] for x in raw])[: len(tokens)]
            sampled = steps.log_softmax(-1).gather(1, tokens)[:, 0]
            for logps in (spoken.logps, spoken.ref_logps, trained):
                assert_close(ppo_fixtures.columns(logps, said)[i], sampled, rtol=0, atol=1e-4)
        assert_close(sampled.double(), by_plain[i], rtol=0, atol=1e-4)


# Row 4 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [False, True], ids=["padded", "prefixes shared"])
@pytest.mark.parametrize("positions", ["rotary", "absolute"])
def test_row_04_a_sample_alone_and_in_a_padded_batch_has_the_same_log_probabilities(
    made: Cast, positions: str, share: bool
):
    source = made.world.sft if positions == "rotary" else made.gpt2
    cast = ppo_fixtures.build(source, [], lora=False, share=share, temperature=0.7)
    tokenizer = cast.tokenizer
    prompts = tokenization.tokenize_prompts(
        tokenizer, [row["prompt"] for row in tiny_models.rows(made.world.data, "prompts-train")[:5]]
    )
    stops = generation.set_sampling(
        cast.policy.model, tokenizer, temperature=0.7, top_p=1.0, max_new_tokens=20
    )
    # The same prompt twice, and one much shorter: shared prefixes, and padding of 30 columns.
    prompts = [*prompts, prompts[0], prompts[1][-20:]]
    said = experience.sample_completions(cast.policy, prompts, stops, batch_size=16, seed=3)
    assert len({len(row) for row in said.rows}) > 3
    together = said.tensors(tokenizer.pad_token_id, "cpu")
    whole = ppo_fixtures.columns(cast.policy.logps(*together.values())[0], said)
    values = ppo_fixtures.columns(cast.critic.values(together["ids"], together["mask"]), said)
    apart = ppo_fixtures.plain_logps(ppo_fixtures.plain(source), said, 0.7)
    for i in range(len(prompts)):
        one = experience.Completions([said.prompts[i]], [said.completions[i]], [said.finished[i]])
        alone = one.tensors(tokenizer.pad_token_id, "cpu")
        assert alone["mask"].all()
        logps = ppo_fixtures.columns(cast.policy.logps(*alone.values())[0], one)[0]
        assert_close(whole[i], logps, rtol=0, atol=1e-5)
        assert_close(whole[i].double(), apart[i], rtol=0, atol=1e-5)
        value = ppo_fixtures.columns(cast.critic.values(alone["ids"], alone["mask"]), one)[0]
        assert_close(values[i], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("positions", ["rotary", "absolute"])
def test_row_04_a_prompt_padded_on_the_left_is_sampled_from_as_if_it_were_alone(
    made: Cast, positions: str
):
    source = made.world.sft if positions == "rotary" else made.gpt2
    cast = ppo_fixtures.build(source, [], lora=False, share=True)
    model, tokenizer = cast.policy.model, cast.tokenizer
    rows = tiny_models.rows(made.world.data, "prompts-train")[:4]
    prompts = tokenization.tokenize_prompts(tokenizer, [row["prompt"] for row in rows])
    prompts.append(prompts[0][-15:])
    # Temperature 0: what is likeliest depends on no random number.
    stops = generation.set_sampling(model, tokenizer, temperature=0, top_p=1, max_new_tokens=12)
    together = experience.sample_completions(cast.policy, prompts, stops, batch_size=8, seed=0)
    alone = experience.sample_completions(cast.policy, prompts, stops, batch_size=1, seed=0)
    assert together == alone
    assert len({tuple(c) for c in alone.completions}) > 1


# Row 5 ----------------------------------------------------------------------------------------------------------------


def test_row_05_where_pad_is_eos_lengths_decide_what_is_real(
    made: Cast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    watch = Watch(monkeypatch)
    settings = {"max_new_tokens": 48, "epochs": 1}
    learner = ppo_fixtures.learner(
        made, tmp_path / "eos", source=made.eos, scorer=made.eos_reward, **settings
    )
    assert learner.cast.tokenizer.pad_token_id == learner.cast.tokenizer.eos_token_id
    other = ppo_fixtures.learner(made, tmp_path / "sft", scorer=made.eos_reward, **settings)
    assert other.cast.tokenizer.pad_token_id != other.cast.tokenizer.eos_token_id
    for each in (learner, other):
        ppo_fixtures.move(each.cast)
        each.step(0)
    said, again = watch.said
    assert said == again  # the same weights, another pad
    assert 0 < sum(said.finished) < len(said.finished)
    one, two = watch.rollouts
    assert torch.equal(one.mask, two.mask)
    assert one.mask.sum(1).tolist() == [len(c) for c in said.completions]
    for name in ("logps", "advantages", "values", "returns"):
        ours, theirs = getattr(one, name), getattr(two, name)
        assert_close(ours[one.mask], theirs[one.mask])
    first, second = watch.diagnostics
    assert first.grad_norm == pytest.approx(second.grad_norm, rel=1e-4)
    assert first.policy_loss == pytest.approx(second.policy_loss, abs=1e-5)


def test_row_05_where_pad_is_eos_the_eos_label_stays_in_the_sft_loss(
    made: Cast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trainers = []
    monkeypatch.setattr(trl_trainer, "train", lambda trainer, *_: trainers.append(trainer) or {})
    inputs = {"model": made.eos, "demonstrations": made.world.data}
    sft.run(
        SFT(model="sft", trainer=ppo_fixtures.TRAINER),
        inputs,
        tmp_path,
        tiny_models.logger("sft", tmp_path),
    )
    (trainer,) = trainers
    batch = next(iter(trainer.get_train_dataloader()))
    eos = trainer.processing_class.eos_token_id
    labels, mask = batch["labels"], batch["attention_mask"].bool()
    assert not mask.all(), "nothing is padded"
    assert ((labels == eos).sum(1) == 1).all()  # the one that ends the completion
    assert (labels[~mask] == -100).all()


def test_row_05_a_reward_models_folder_has_a_pad_that_is_not_eos_and_reads_at_the_eos(made: Cast):
    tokenizer = tokenization.load_tokenizer(made.eos_reward)
    scorer = ppo_fixtures.plain_scorer(made.eos_reward)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert scorer.config.pad_token_id == tokenizer.pad_token_id
    rows = judged(made, tokenizer)[0]
    assert all(row[-1] == tokenizer.eos_token_id for row in rows)
    batch = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        padded = scorer(**batch).logits[:, 0]
        for row, score in zip(rows, padded, strict=True):
            hidden = scorer.base_model(input_ids=torch.tensor([row])).last_hidden_state[0]
            assert_close(score, scorer.score(hidden[-1])[0], rtol=1e-4, atol=1e-5)  # at the eos
            assert (score - scorer.score(hidden[-2])[0]).abs() > 1e-3  # and not before it


def test_row_05_a_tokenizer_with_no_token_but_eos_to_pad_with_is_refused():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"</s>": 0, "word": 1}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>")
    with pytest.raises(UserError, match="no special token except eos"):
        tokenization.set_pad_token_for_scores(tokenizer)


# Row 6 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True], ids=["separate models", "one backbone"])
def test_row_06_tokens_after_eos_change_no_score_no_advantage_and_no_loss(
    made: Cast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: bool
):
    watch, changed = Watch(monkeypatch), 0
    for name in ("as it is", "with junk"):
        learner = ppo_fixtures.learner(made, tmp_path / name, lora=lora, max_new_tokens=40)
        ppo_fixtures.move(learner.cast)
        if name == "with junk":
            generate, eos = learner.cast.policy.model.generate, learner.cast.tokenizer.eos_token_id

            def junk(generate: Any = generate, eos: int = eos, **kwargs: Any) -> torch.Tensor:
                nonlocal changed
                output, width = generate(**kwargs), kwargs["input_ids"].shape[1]
                for row in output[:, width:]:
                    ends = (row == eos).nonzero()[:1, 0].tolist()
                    for end in ends:
                        changed += len(row) - end - 1
                        row[end + 1 :] = torch.arange(10, 10 + len(row) - end - 1)
                        row[end + 2 : end + 3] = eos  # a second end as well
                return output

            learner.cast.policy.model.generate = junk
        learner.step(0)
    assert changed > 20
    assert watch.said[0] == watch.said[1]
    assert watch.told[0]["texts"] == watch.told[1]["texts"]
    assert torch.equal(watch.told[0]["score"], watch.told[1]["score"])
    for name in ("logps", "advantages", "returns"):
        assert torch.equal(getattr(watch.rollouts[0], name), getattr(watch.rollouts[1], name))
    assert watch.diagnostics[0] == watch.diagnostics[1]


def test_row_06_a_completion_ends_with_its_first_eos_and_has_no_other(made: Cast, tmp_path: Path):
    learner = ppo_fixtures.learner(made, tmp_path, max_new_tokens=40)
    eos = learner.cast.tokenizer.eos_token_id
    said = ppo_fixtures.said(learner, 16)
    assert any(said.finished)
    for completion, finished in zip(said.completions, said.finished, strict=True):
        assert completion.count(eos) == int(finished)
        assert (completion[-1] == eos) == finished


# Row 7 ----------------------------------------------------------------------------------------------------------------


def test_row_07_without_eos_a_completion_is_penalised_though_its_prompt_contains_one(
    made: Cast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    learner = ppo_fixtures.learner(
        made,
        tmp_path,
        rewards=[ppo_fixtures.FIVE],
        advantages="rloo",
        n_completions=2,
        missing_eos_penalty=1.5,
    )
    eos, pad = learner.cast.tokenizer.eos_token_id, learner.cast.tokenizer.pad_token_id
    prompts = learner.prompts[:4]
    assert all(eos in prompt for prompt in prompts)  # ChatML ends the user's turn with it
    # Ended; cut off; ended with the very first token; ended with the very last.
    answers = [[9, 8, eos, pad], [9, 8, 7, 6], [eos, pad, pad, pad], [9, 8, 7, eos]]
    order = sorted(range(4), key=lambda i: len(prompts[i]))

    def generate(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.cat([input_ids, torch.tensor([answers[i] for i in order])], dim=1)

    learner.cast.policy.model.generate = generate
    said = learner.sample(prompts, "test", 0)
    told = learner.judge(said, learner.rows[:4])
    assert said.finished == [True, False, True, True]
    assert told["reward"].tolist() == [5, 5, 5, 5]
    assert told["score"].tolist() == [5, 3.5, 5, 5]  # 5 - 1.5
    spoken = experience.compute_experience(
        learner.cast, ppo_fixtures.inputs_of(learner, said), batch_size=4
    )
    assert learner.figures(said, spoken, told, None)["missing_eos"] == 0.25


# Row 8 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_row_08_the_score_lands_on_the_last_real_token_and_rewards_sum_to_score_less_kl(
    made: Cast, tmp_path: Path, estimator: str
):
    learner = ppo_fixtures.learner(made, tmp_path, lora=True, max_new_tokens=48)
    ppo_fixtures.move(learner.cast)
    said = ppo_fixtures.said(learner)
    assert 0 < sum(said.finished) < len(said.finished)
    spoken = experience.compute_experience(
        learner.cast, ppo_fixtures.inputs_of(learner, said), batch_size=4
    )
    scores = torch.arange(10.0, 18.0)
    how = {"n_completions": 1, "kl_coef": 0.5, "kl_estimator": estimator, "lam": 0.95}
    how |= {"whiten_rewards": False, "sampler_logps": None, "importance_cap": 2.0}
    # A return that discounts by 0 is the token's own reward; by 1, the sum of those that follow.
    own, sums = (
        experience.make_rollout(
            spoken, scores, advantages="reinforce", gamma=gamma, **how
        ).advantages
        for gamma in (0.0, 1.0)
    )
    learner.cast.saved.save_pretrained(str(tmp_path / "moved"), selected_adapters=["default"])
    policy, reference = ppo_fixtures.plain(tmp_path / "moved"), ppo_fixtures.plain(made.world.sft)
    pairs = zip(*(ppo_fixtures.plain_logps(m, said, 0.7) for m in (policy, reference)), strict=True)
    eos, distance = learner.cast.tokenizer.eos_token_id, 0.0
    for i, (ours, theirs) in enumerate(pairs):
        apart = ours - theirs
        kl = apart if estimator == "k1" else (-apart).exp() - 1 + apart
        distance += apart.abs().sum().item()
        expected = -0.5 * kl
        expected[-1] += scores[i]
        tokens = said.completions[i]
        found = ppo_fixtures.columns(own, said)[i]
        assert_close(found.double(), expected, rtol=0, atol=1e-3)
        assert found.argmax() == len(tokens) - 1 and (tokens[-1] == eos) == said.finished[i]
        start = len(said.prompts[i]) - 1
        assert own[i].count_nonzero() <= len(tokens)  # nothing on a prompt or a pad
        assert sums[i, start].item() == pytest.approx((scores[i] - 0.5 * kl.sum()).item(), abs=2e-3)
    assert distance > 1


# Row 9 ----------------------------------------------------------------------------------------------------------------


def judged(made: Cast, tokenizer: Any, n: int = 6) -> tuple[list[list[int]], list[Any]]:
    """Prompts and chosen completions, tokenised by hand: the prompt up to the assistant's turn, the answer, eos."""
    rows = tiny_models.rows(made.world.data, "pairs-train")[:n]
    found = []
    for row in rows:
        head = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, tokenize=False
        )
        text = head + row["chosen"][-1]["content"] + tokenizer.eos_token
        found.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    return found, rows


@pytest.mark.parametrize("name", ["sft", "eos"], ids=["pad is not eos", "pad is eos"])
def test_row_09_training_evaluation_and_ppo_read_the_same_tail(
    made: Cast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    source = made.eos if name == "eos" else made.world.sft
    scorer = made.eos_reward if name == "eos" else made.full
    tokenizer = tokenization.load_tokenizer(source)
    expected, rows = judged(made, tokenizer)
    read = []
    score_tokens = reward_model.RewardModel.score_tokens

    def spy(model: Any, ids: Any, **kwargs: Any) -> torch.Tensor:
        read.append([list(row) for row in ids])
        return score_tokens(model, ids, **kwargs)

    monkeypatch.setattr(reward_model.RewardModel, "score_tokens", spy)

    # PPO: what a policy would sample had it said the chosen completion.
    learner = ppo_fixtures.learner(made, tmp_path / "ppo", source=source, scorer=scorer)
    prompts = tokenization.tokenize_prompts(tokenizer, [row["prompt"] for row in rows])
    completions = [row[len(p) :] for row, p in zip(expected, prompts, strict=True)]
    said = experience.Completions(prompts, completions, [True] * len(rows))
    in_ppo = learner.judge(said, [{"prompt": row["prompt"]} for row in rows])["reward"]

    # Evaluation: of texts.
    model = reward_model.RewardModel.load(scorer, dtype="float32", device="cpu")
    chosen = [row["chosen"] for row in rows]
    evaluated = model.score([row["prompt"] for row in rows], chosen, batch_size=4)
    assert read == [expected, expected]

    # Training: rows of the batches that TRL collates.
    settings = Reward(model="sft", trainer=ppo_fixtures.TRAINER)
    inputs = {"model": source, "pairs": made.world.data}
    trainer = reward.build(settings, inputs, tmp_path / "rm", logger=silent(tmp_path))
    collated, unpadded = [], []
    for batch in trainer.get_train_dataloader():
        lengths = batch["attention_mask"].sum(1).tolist()
        for ids, length in zip(batch["input_ids"].tolist(), lengths, strict=True):
            collated.append(ids[:length])
            unpadded.append(ids[length:])
    assert all(row in collated for row in expected)
    assert any(unpadded)
    assert all(token != tokenizer.eos_token_id for rest in unpadded for token in rest)

    # A plain classifier on the same ids says the score and the mean that is taken off it.
    plain = ppo_fixtures.plain_scorer(scorer)
    mean = reward_model.score_mean(scorer)
    alone = torch.tensor([ppo_fixtures.plain_score(plain, row) for row in expected])
    assert abs(mean) > 0.05
    assert_close(in_ppo + mean, alone, rtol=1e-4, atol=1e-5)
    assert_close(evaluated + mean, alone, rtol=1e-4, atol=1e-5)


def silent(folder: Path) -> Logger:
    return tiny_models.logger("reward", folder)


# Row 10 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["full", "adapter"])
def test_row_10_a_reward_model_has_mean_0_on_sft_completions_and_keeps_it_when_saved_and_copied(
    made: Cast, tmp_path: Path, name: str
):
    folder = getattr(made, name)
    rows = tiny_models.rows(made.world.data, "demonstrations-train")
    tokenizer = tokenization.load_tokenizer(folder)
    copied = tmp_path / "copy"
    shutil.copytree(folder, copied)
    plain = ppo_fixtures.plain_scorer(copied)
    ids = tokenization.tokenize_for_reward(
        tokenizer, [row["prompt"] for row in rows], [row["completion"] for row in rows]
    )
    raw = torch.tensor([ppo_fixtures.plain_score(plain, row) for row in ids])
    assert raw.mean().abs() > 0.1, "it would have mean 0 without being centred"
    assert (raw - reward_model.score_mean(copied)).mean().abs() < 1e-4

    cast = ppo_fixtures.build(made.world.sft, [copied], lora=name == "adapter")
    scores = cast.rewards[0].score_tokens(ids, batch_size=16)
    assert scores.mean().abs() < 0.05
    assert scores.std() > 0.05
    assert_close(scores, raw - raw.mean(), rtol=1e-4, atol=1e-4)


# Row 11 ---------------------------------------------------------------------------------------------------------------

WIDTH = 4096  # the standard error of a deviation of so many is 1 / sqrt(2 * 4,096) = 1.1 %


@pytest.fixture(scope="module")
def wide(made: Cast) -> Path:
    """A policy with 4,096 hidden units, narrow everywhere else."""
    tokenizer = tokenization.load_tokenizer(made.world.sft)
    folder = made.world.folder / "wide"
    shape = {"hidden_size": WIDTH, "num_attention_heads": 1, "head_dim": 8}
    shape |= {"intermediate_size": 8, "num_hidden_layers": 1, "tie_word_embeddings": True}
    loading.new_model(tokenizer, dtype="float32", **shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("lora", [False, True], ids=["full", "adapter"])
def test_row_11_the_score_head_begins_with_deviation_1_over_sqrt_d_plus_1(wide: Path, lora: bool):
    torch.manual_seed(0)
    asked = tiny_models.LORA.model_dump() if lora else None
    scorer = reward_model.new_reward_model(wide, lora=asked, dtype="float32")
    weight = reward_model.head_weight(reward_model.score_head(scorer))
    assert weight.shape == (1, WIDTH)
    assert weight.std().item() == pytest.approx((WIDTH + 1) ** -0.5, rel=0.05)
    assert abs(weight.mean().item()) < 4 * (WIDTH + 1) ** -0.5 / math.sqrt(WIDTH)


@pytest.mark.parametrize("lora", [False, True], ids=["separate models", "one backbone"])
def test_row_11_without_a_reward_model_the_value_head_begins_so_too(wide: Path, lora: bool):
    torch.manual_seed(0)
    head = ppo_fixtures.build(wide, [], lora=lora).critic.head
    assert head.weight.std().item() == pytest.approx((WIDTH + 1) ** -0.5, rel=0.05)
    assert head.bias.item() == 0


@pytest.mark.parametrize("lora", [False, True], ids=["separate models", "one backbone"])
def test_row_11_the_value_head_is_the_reward_models_with_its_mean_as_bias(made: Cast, lora: bool):
    scorer = made.adapter if lora else made.full
    head = ppo_fixtures.build(made.world.sft, [scorer], lora=lora).critic.head
    plain = ppo_fixtures.plain_scorer(scorer)
    plain = plain.get_base_model() if lora else plain
    trained = reward_model.head_weight(reward_model.score_head(plain))
    assert torch.equal(head.weight, trained)
    assert head.bias.item() == pytest.approx(-reward_model.score_mean(scorer))


# Row 12 ---------------------------------------------------------------------------------------------------------------

CRITICS = [
    pytest.param(False, "full", id="separate models"),
    pytest.param(True, "adapter", id="one backbone"),
    pytest.param(True, "full", id="an adapter on a reward model trained in full"),
    pytest.param(False, "adapter", id="a reward adapter, merged"),
]


@pytest.mark.parametrize(("lora", "scorer"), CRITICS)
def test_row_12_the_critic_begins_as_the_reward_model(made: Cast, lora: bool, scorer: str):
    folder = getattr(made, scorer)
    cast = ppo_fixtures.build(made.world.sft, [folder], lora=lora)
    rows = judged(made, cast.tokenizer)[0]
    ids, mask = tokenization.pad_rows(rows, pad=0, side="right", device="cpu")
    plain = ppo_fixtures.plain_scorer(folder)
    backbone = (
        plain.get_base_model().base_model if hasattr(plain, "get_base_model") else plain.model
    )
    with torch.no_grad():
        hidden = cast.critic.hidden(ids, mask)
        assert_close(
            hidden[mask.bool()],
            backbone(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()],
            rtol=1e-4,
            atol=1e-4,
        )
        # One token more: the value of the state behind the last token is the score itself.
        longer, more = tokenization.pad_rows(
            [[*row, 5] for row in rows], pad=0, side="right", device="cpu"
        )
        values = cast.critic.values(longer, more)
        last = values[torch.arange(len(rows)), mask.sum(1) - 1]
    scores = torch.tensor([ppo_fixtures.plain_score(plain, row) for row in rows])
    assert_close(last, scores - reward_model.score_mean(folder), rtol=1e-4, atol=1e-4)
    assert last.std() > 0.01


@pytest.mark.parametrize(("lora", "scorer"), CRITICS)
def test_row_12_in_its_warm_up_the_critic_learns_and_the_policy_does_not(
    made: Cast, tmp_path: Path, lora: bool, scorer: str
):
    folder = getattr(made, scorer)
    learner = ppo_fixtures.learner(made, tmp_path, lora=lora, scorer=folder, critic_warmup_steps=2)
    cast = learner.cast
    spoken = [(cast.policy, ppo_fixtures.weights(cast.policy, cast))]
    rows = judged(made, cast.tokenizer)[0]
    judging = cast.rewards[0].score_tokens(rows, batch_size=8)
    for step in range(3):
        critic = ppo_fixtures.weights(cast.critic, cast)
        learner.step(step)
        now = ppo_fixtures.weights(cast.policy, cast)
        still = all(torch.equal(a, b) for a, b in zip(now, spoken[0][1], strict=True))
        assert still == (step < 2)
        moved = ppo_fixtures.weights(cast.critic, cast)
        assert not any(torch.equal(a, b) for a, b in zip(critic, moved, strict=True))
    # The critic began as a copy: the reward model itself does not move with it.
    assert torch.equal(cast.rewards[0].score_tokens(rows, batch_size=8), judging)


# One backbone ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [False, True], ids=["padded", "prefixes shared"])
@pytest.mark.parametrize("source", ["sft", "lora"])
def test_each_role_on_the_one_backbone_is_a_model_loaded_by_itself(
    made: Cast, tmp_path: Path, source: str, share: bool
):
    folder = getattr(made.world, source)
    learner = ppo_fixtures.learner(
        made, tmp_path / "run", source=folder, lora=True, prefix_sharing=share
    )
    cast = learner.cast
    assert len(cast.models()) == 1
    learner.step(0)  # policy and critic go their own ways
    cast.saved.save_pretrained(str(tmp_path / "policy"), selected_adapters=[models.POLICY])
    said = ppo_fixtures.said(learner)
    inputs = ppo_fixtures.inputs_of(learner, said)
    spoken = experience.compute_experience(cast, inputs, batch_size=4)
    for found, model in ((spoken.logps, tmp_path / "policy"), (spoken.ref_logps, folder)):
        expected = ppo_fixtures.plain_logps(ppo_fixtures.plain(model), said, 0.7)
        for one, other in zip(ppo_fixtures.columns(found, said), expected, strict=True):
            assert_close(one.double(), other, rtol=0, atol=1e-4)
    assert (spoken.logps - spoken.ref_logps).abs().max() > 0.01

    plain = ppo_fixtures.plain_scorer(made.adapter)
    expected = torch.tensor([ppo_fixtures.plain_score(plain, row) for row in said.rows])
    scores = cast.rewards[0].score_tokens(said.rows, batch_size=4)
    assert_close(scores, expected - reward_model.score_mean(made.adapter), rtol=1e-4, atol=1e-4)

    # The critic that has learnt, as weights of a classifier of its own.
    inner = plain.get_base_model()
    named, here = dict(inner.named_parameters()), dict(cast.policy.model.named_parameters())
    with torch.no_grad():
        for name, p in named.items():
            if ".default." in name and "score" not in name:
                p.copy_(here[name.replace(".default.", f".{models.VALUE}.")])
        for row, prompt, values in zip(
            said.rows, said.prompts, ppo_fixtures.columns(spoken.values, said), strict=True
        ):
            hidden = inner.base_model(input_ids=torch.tensor([row])).last_hidden_state[0]
            expected = cast.critic.head(hidden)[len(prompt) - 1 : -1, 0]
            assert_close(values, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("lora", "scorer"), CRITICS[:3], ids=["separate", "one backbone", "two backbones"]
)
def test_gradient_checkpointing_changes_no_gradient_though_adapters_switch(
    made: Cast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: bool, scorer: str
):
    gradients = []
    for name, checkpointing in (("with", True), ("without", False)):
        learner = ppo_fixtures.learner(
            made,
            tmp_path / name,
            lora=lora,
            scorer=getattr(made, scorer),
            gradient_checkpointing=checkpointing,
            epochs=1,
            micro_batch_size=4,
        )
        ppo_fixtures.move(learner.cast)
        ppo_fixtures.move(learner.cast, learner.cast.critic)
        again = {"n": 0}
        for model in learner.cast.models():
            for layer in model.modules():
                if type(layer).__name__ == "LlamaMLP":
                    layer.register_forward_pre_hook(
                        lambda *_, again=again: again.update(n=again["n"] + 1)
                    )
        found: list[torch.Tensor] = []
        monkeypatch.setattr(
            PPOTrainer,
            "clip",
            lambda _, parameters, __, found=found: (
                found.extend(p.grad.clone() for p in parameters) or torch.zeros(())
            ),
        )
        learner.step(0)
        gradients.append((found, again["n"]))
    (ours, more), (theirs, fewer) = gradients
    assert more > fewer, "nothing was computed again"
    assert len(ours) == len(theirs) > 4
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert all(g.abs().max() > 0 for g in theirs)
