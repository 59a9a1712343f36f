"""Models of PPO: dropout, one backbone, the critic, the reference, gradient checkpointing.

Rows are those of the checklist in the design notes on PPO. A model is compared with a plain one of
transformers that reads one row alone, without padding.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from helpers import ppo_fixtures, tiny_models
from helpers.ppo_fixtures import Folders, Recorder
from torch.testing import assert_close

from align.models import loading, tokenization
from align.online_rl import models
from align.online_rl.experience import compute_experience
from align.rewards import reward_model

CRITICS = [
    pytest.param(False, "full", id="separate models"),
    pytest.param(True, "adapter", id="one backbone"),
    pytest.param(True, "full", id="an adapter on a reward model with full fine-tuning"),
    pytest.param(False, "adapter", id="a merged reward adapter"),
]


# Dropout


@pytest.mark.parametrize("lora", [False, True], ids=["separate models", "one backbone"])
def test_row_01_dropout_is_off_in_all_models_in_train_mode_too(
    folders: Folders, tmp_path: Path, lora: bool
):
    source, reward = tmp_path / "sft", tmp_path / "rm"
    shutil.copytree(folders.world.sft, source)
    shutil.copytree(folders.adapter if lora else folders.full, reward)
    ppo_fixtures.edit_json(source / "config.json", attention_dropout=0.5)
    if lora:
        fields = {"lora_dropout": 0.5, "base_model_name_or_path": str(source), "revision": None}
        ppo_fixtures.edit_json(reward / "adapter_config.json", **fields)
    else:
        ppo_fixtures.edit_json(reward / "config.json", attention_dropout=0.5)
    ids = torch.arange(5, 25)[None]
    for folder, load in (
        (source, ppo_fixtures.load_plain_policy),
        (reward, ppo_fixtures.load_plain_reward_model),
    ):
        plain = load(folder).train()
        assert not torch.equal(plain(input_ids=ids).logits, plain(input_ids=ids).logits)

    ppo_models = ppo_fixtures.build_models(source, [reward], lora=lora, dropout=0.5)
    ppo_fixtures.perturb(ppo_models)
    for model in ppo_models.models():
        model.train()
    mask = torch.ones_like(ids)
    for view in (ppo_models.policy, ppo_models.reference, ppo_models.critic):
        assert torch.equal(view.hidden(ids, mask), view.hidden(ids, mask))
    scores = [ppo_models.rewards[0].score_tokens(ids.tolist(), batch_size=1) for _ in range(2)]
    assert torch.equal(*scores)


@pytest.mark.parametrize("name", ["GPT2", "OPT", "Bloom"])
def test_row_01_dropout_is_off_wherever_an_architecture_stores_it(name: str):
    import transformers

    shape = {"vocab_size": 30, "hidden_size": 16, "num_attention_heads": 2}
    shape |= {"num_hidden_layers": 1, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    if name == "OPT":
        shape |= {"word_embed_proj_dim": 16, "ffn_dim": 16, "dropout": 0.5}
    if name == "Bloom":
        shape |= {"hidden_dropout": 0.5}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**shape)
    kind = f"{name}ForCausalLM" if name != "GPT2" else "GPT2LMHeadModel"
    model = getattr(transformers, kind)(config).train()
    ids = torch.arange(2, 20)[None]
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    models.disable_dropout(model)
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


# Heads

WIDTH = 4096  # the standard error of the deviation of 4,096 numbers is 1 / sqrt(2 * 4,096) = 1.1 %


@pytest.fixture(scope="module")
def wide(folders: Folders) -> Path:
    """A policy with 4,096 hidden units, narrow everywhere else."""
    tokenizer = tokenization.load_tokenizer(folders.world.sft)
    folder = folders.world.folder / "wide"
    shape = {"hidden_size": WIDTH, "num_attention_heads": 1, "head_dim": 8}
    shape |= {"intermediate_size": 8, "num_hidden_layers": 1, "tie_word_embeddings": True}
    loading.new_model(tokenizer, dtype="float32", **shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("lora", [False, True], ids=["full", "adapter"])
def test_row_11_the_score_head_starts_with_deviation_1_over_sqrt_d_plus_1(wide: Path, lora: bool):
    torch.manual_seed(0)
    adapter = tiny_models.LORA.model_dump() if lora else None
    model = reward_model.new_reward_model(wide, lora=adapter, dtype="float32")
    weight = reward_model.head_weight(reward_model.score_head(model))
    assert weight.shape == (1, WIDTH)
    assert weight.std().item() == pytest.approx((WIDTH + 1) ** -0.5, rel=0.05)
    assert abs(weight.mean().item()) < 4 * (WIDTH + 1) ** -0.5 / math.sqrt(WIDTH)


@pytest.mark.parametrize("lora", [False, True], ids=["separate models", "one backbone"])
def test_row_11_without_a_reward_model_the_value_head_starts_like_a_score_head(
    wide: Path, lora: bool
):
    torch.manual_seed(0)
    head = ppo_fixtures.build_models(wide, [], lora=lora).critic.head
    assert head.weight.std().item() == pytest.approx((WIDTH + 1) ** -0.5, rel=0.05)
    assert head.bias.item() == 0


@pytest.mark.parametrize("lora", [False, True], ids=["separate models", "one backbone"])
def test_row_11_the_value_head_is_the_reward_models_with_its_mean_as_bias(
    folders: Folders, lora: bool
):
    reward = folders.adapter if lora else folders.full
    head = ppo_fixtures.build_models(folders.world.sft, [reward], lora=lora).critic.head
    plain = ppo_fixtures.load_plain_reward_model(reward)
    plain = plain.get_base_model() if lora else plain
    trained = reward_model.head_weight(reward_model.score_head(plain))
    assert torch.equal(head.weight, trained)
    assert head.bias.item() == pytest.approx(-reward_model.score_mean(reward))


# Critic


@pytest.mark.parametrize(("lora", "reward"), CRITICS)
def test_row_12_the_critic_starts_as_the_reward_model(folders: Folders, lora: bool, reward: str):
    folder = getattr(folders, reward)
    ppo_models = ppo_fixtures.build_models(folders.world.sft, [folder], lora=lora)
    rows = ppo_fixtures.tokenized_pairs(folders, ppo_models.tokenizer)[0]
    ids, mask = tokenization.pad_rows(rows, pad=0, side="right", device="cpu")
    plain = ppo_fixtures.load_plain_reward_model(folder)
    backbone = (
        plain.get_base_model().base_model if hasattr(plain, "get_base_model") else plain.model
    )
    with torch.no_grad():
        hidden = ppo_models.critic.hidden(ids, mask)
        assert_close(
            hidden[mask.bool()],
            backbone(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()],
            rtol=1e-4,
            atol=1e-4,
        )
        # With one more token, the value of the state after the last token is the score itself.
        longer, longer_mask = tokenization.pad_rows(
            [[*row, 5] for row in rows], pad=0, side="right", device="cpu"
        )
        values = ppo_models.critic.values(longer, longer_mask)
        last = values[torch.arange(len(rows)), mask.sum(1) - 1]
    scores = torch.tensor([ppo_fixtures.plain_score(plain, row) for row in rows])
    assert_close(last, scores - reward_model.score_mean(folder), rtol=1e-4, atol=1e-4)
    assert last.std() > 0.01


@pytest.mark.parametrize(("lora", "reward"), CRITICS)
def test_row_12_during_its_warm_up_the_critic_learns_and_the_policy_does_not(
    folders: Folders, tmp_path: Path, lora: bool, reward: str
):
    folder = getattr(folders, reward)
    trainer = ppo_fixtures.build_trainer(
        folders, tmp_path, lora=lora, reward_model=folder, critic_warmup_steps=2
    )
    ppo_models = trainer.models
    policy = ppo_fixtures.parameter_copies(ppo_models.policy, ppo_models)
    rows = ppo_fixtures.tokenized_pairs(folders, ppo_models.tokenizer)[0]
    scores = ppo_models.rewards[0].score_tokens(rows, batch_size=8)
    for step in range(3):
        critic = ppo_fixtures.parameter_copies(ppo_models.critic, ppo_models)
        trainer.step(step)
        now = ppo_fixtures.parameter_copies(ppo_models.policy, ppo_models)
        unchanged = all(torch.equal(a, b) for a, b in zip(now, policy, strict=True))
        assert unchanged == (step < 2)
        moved = ppo_fixtures.parameter_copies(ppo_models.critic, ppo_models)
        assert not any(torch.equal(a, b) for a, b in zip(critic, moved, strict=True))
    # The critic started as a copy: the reward model itself does not move with it.
    assert torch.equal(ppo_models.rewards[0].score_tokens(rows, batch_size=8), scores)


def test_trainable_adapters_are_in_float32_on_any_backbone_of_the_critic(folders: Folders):
    ppo_models = ppo_fixtures.build_models(
        folders.world.sft, [folders.full], lora=True, dtype="bfloat16"
    )
    assert ppo_models.critic is not None
    assert ppo_models.critic.model is not ppo_models.policy.model
    for view in (ppo_models.policy, ppo_models.critic):
        assert {p.dtype for p in ppo_models.parameters(view)} == {torch.float32}


# Reference


@pytest.mark.parametrize(
    ("source", "lora", "adapter"),
    [
        pytest.param("sft", False, None, id="separate models"),
        pytest.param("sft", True, None, id="a fresh adapter: the reference is without it"),
        pytest.param("lora", True, models.REFERENCE, id="the SFT adapter: a frozen copy of it"),
        pytest.param("lora", False, None, id="the SFT adapter, merged"),
    ],
)
def test_row_26_the_reference_is_frozen_and_equals_the_policy_at_first(
    folders: Folders,
    tmp_path: Path,
    recorder: Recorder,
    source: str,
    lora: bool,
    adapter: str | None,
):
    trainer = ppo_fixtures.build_trainer(
        folders, tmp_path, source=getattr(folders.world, source), lora=lora, max_new_tokens=12
    )
    ppo_models = trainer.models
    assert ppo_models.reference.adapter == adapter
    trainable = {p.data_ptr() for p in ppo_models.weights().values()}
    frozen = {
        (place, name): p.detach().clone()
        for place, model in enumerate(ppo_models.models())
        for name, p in model.named_parameters()
        if p.data_ptr() not in trainable
    }
    assert frozen
    for step in range(2):
        trainer.step(step)
    before, after = recorder.experiences
    assert torch.equal(before.logps, before.ref_logps)
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["kl"] == 0
    assert (after.logps - after.ref_logps).abs().max() > 1e-3
    for place, model in enumerate(ppo_models.models()):
        for name, p in model.named_parameters():
            if (place, name) in frozen:
                assert torch.equal(p, frozen[place, name]), name
                assert not p.requires_grad and p.grad is None
    again = compute_experience(ppo_models, recorder.completions[0], batch_size=16)
    assert torch.equal(again.ref_logps, before.ref_logps)
    assert not torch.equal(again.logps, before.logps)


# One backbone


@pytest.mark.parametrize("share", [False, True], ids=["padded", "prefixes shared"])
@pytest.mark.parametrize("source", ["sft", "lora"])
def test_each_model_on_one_backbone_equals_a_model_loaded_separately(
    folders: Folders, tmp_path: Path, source: str, share: bool
):
    folder = getattr(folders.world, source)
    trainer = ppo_fixtures.build_trainer(
        folders, tmp_path / "run", source=folder, lora=True, prefix_sharing=share
    )
    ppo_models = trainer.models
    assert len(ppo_models.models()) == 1
    trainer.step(0)  # policy and critic diverge
    ppo_models.savable.save_pretrained(str(tmp_path / "policy"), selected_adapters=[models.POLICY])
    completions = ppo_fixtures.sample(trainer)
    experience = compute_experience(ppo_models, completions, batch_size=4)
    for logps, saved in (
        (experience.logps, tmp_path / "policy"),
        (experience.ref_logps, folder),
    ):
        plain = ppo_fixtures.load_plain_policy(saved)
        expected = ppo_fixtures.plain_logps(plain, completions, 0.7)
        columns = ppo_fixtures.columns(logps, completions)
        for ours, theirs in zip(columns, expected, strict=True):
            assert_close(ours.double(), theirs, rtol=0, atol=1e-4)
    assert (experience.logps - experience.ref_logps).abs().max() > 0.01

    plain = ppo_fixtures.load_plain_reward_model(folders.adapter)
    expected = torch.tensor([ppo_fixtures.plain_score(plain, row) for row in completions.rows])
    scores = ppo_models.rewards[0].score_tokens(completions.rows, batch_size=4)
    assert_close(scores, expected - reward_model.score_mean(folders.adapter), rtol=1e-4, atol=1e-4)

    # The trained critic, with its weights copied into a plain classifier.
    inner = plain.get_base_model()
    trained = dict(ppo_models.policy.model.named_parameters())
    with torch.no_grad():
        for name, p in inner.named_parameters():
            if ".default." in name and "score" not in name:
                p.copy_(trained[name.replace(".default.", f".{models.VALUE}.")])
        values = ppo_fixtures.columns(experience.values, completions)
        for row, prompt, value in zip(completions.rows, completions.prompts, values, strict=True):
            hidden = inner.base_model(input_ids=torch.tensor([row])).last_hidden_state[0]
            expected = ppo_models.critic.head(hidden)[len(prompt) - 1 : -1, 0]
            assert_close(value, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("lora", "reward"), CRITICS[:3], ids=["separate", "one backbone", "two backbones"]
)
def test_gradient_checkpointing_changes_no_gradient_when_adapters_switch(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: bool, reward: str
):
    results = []
    for name, checkpointing in (("with", True), ("without", False)):
        trainer = ppo_fixtures.build_trainer(
            folders,
            tmp_path / name,
            lora=lora,
            reward_model=getattr(folders, reward),
            gradient_checkpointing=checkpointing,
            epochs=1,
            micro_batch_size=4,
        )
        ppo_fixtures.perturb(trainer.models)
        ppo_fixtures.perturb(trainer.models, trainer.models.critic)
        calls = {"n": 0}
        for model in trainer.models.models():
            for layer in model.modules():
                if type(layer).__name__ == "LlamaMLP":
                    layer.register_forward_pre_hook(
                        lambda *_, calls=calls: calls.update(n=calls["n"] + 1)
                    )
        with ppo_fixtures.recorded_gradients(monkeypatch) as gradients:
            trainer.step(0)
        (only,) = gradients
        results.append((only, calls["n"]))
    (ours, more), (theirs, fewer) = results
    assert more > fewer, "no activation was computed again"
    assert len(ours) == len(theirs) > 4
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert all(g.abs().max() > 0 for g in theirs)
