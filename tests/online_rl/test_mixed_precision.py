"""Mixed precision in PPO: products in bfloat16, weights and results in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import ppo_fixtures
from helpers.ppo_fixtures import Folders, Recorder
from pydantic import ValidationError
from torch.testing import assert_close

from align.models import adapters
from align.online_rl.experience import compute_experience
from align.online_rl.models import OnlineRLModels

BOTH = pytest.mark.parametrize("lora", [False, True], ids=["separate models", "one backbone"])


def built(folders: Folders, lora: bool, precision: str | None) -> OnlineRLModels:
    """Models whose policy and critic differ from their initial state."""
    reward = folders.adapter if lora else folders.full
    torch.manual_seed(0)  # a new adapter begins with random factors
    models = ppo_fixtures.build_models(
        folders.world.sft, [reward], lora=lora, share=True, mixed_precision=precision
    )
    ppo_fixtures.perturb(models)
    assert models.critic is not None
    ppo_fixtures.perturb(models, models.critic)
    return models


@BOTH
def test_products_are_in_bfloat16_and_results_close_to_those_in_float32(
    folders: Folders, tmp_path: Path, lora: bool
):
    trainer = ppo_fixtures.build_trainer(folders, tmp_path, lora=lora)
    completions = ppo_fixtures.sample(trainer)
    results = []
    for precision in (None, "bfloat16"):
        models = built(folders, lora, precision)
        seen = set()
        layer = models.policy.model.base_model.layers[0].mlp.up_proj
        layer.register_forward_hook(lambda _, args, output, seen=seen: seen.add(output.dtype))
        experience = compute_experience(models, completions, batch_size=4)
        outputs = ppo_fixtures.evaluate(models, experience.inputs)
        loss = outputs.logps.sum() + outputs.values.sum()
        loss.backward()
        assert seen == {torch.bfloat16 if precision else torch.float32}
        weights = models.weights().values()
        gradient = torch.cat([p.grad.flatten() for p in weights])
        assert {p.dtype for p in weights} == {gradient.dtype} == {torch.float32}
        results.append((experience, outputs, gradient))
    (exact, _, exact_gradient), (mixed, outputs, gradient) = results
    # The ratio of the policy to itself is 1: the update computes what the experience has.
    assert_close(outputs.logps[mixed.mask], mixed.logps[mixed.mask], rtol=0, atol=0.05)
    for name in ("logps", "ref_logps", "entropy", "values"):
        values, expected = (getattr(e, name)[e.mask] for e in (mixed, exact))
        assert values.dtype == torch.float32
        assert not torch.equal(values, expected)
        # Hidden states have 8 bits; the head is in float32.
        assert (values - expected).abs().mean() < 1 / 64, name
    assert torch.cosine_similarity(gradient, exact_gradient, dim=0) > 0.98


@BOTH
def test_log_probabilities_come_from_a_head_in_float32(folders: Folders, lora: bool):
    models = built(folders, lora, "bfloat16")
    ids = torch.arange(5, 25)[None]
    mask = torch.ones_like(ids)
    for view in (models.policy, models.reference):
        head = view.model.get_output_embeddings()
        # Neighboring numbers of bfloat16 are 1/4 apart from 32 on.
        head.weight.data *= 40 / head.weight.abs().max()
        with torch.no_grad(), models.mixed_precision():
            states = view.hidden(ids, mask)[:, :-1].double()
            logps, entropy = view.logps(ids, mask, ids)
        logits = states @ head.weight.double().T
        assert logits.abs().max() > 32
        expected = logits.log_softmax(-1)
        assert logps.dtype == torch.float32
        chosen = expected.gather(-1, ids[:, 1:, None])[..., 0]
        assert_close(logps.double(), chosen, rtol=0, atol=1e-3)
        expected_entropy = -(expected.exp() * expected).sum(-1)
        assert_close(entropy.double(), expected_entropy, rtol=0, atol=1e-3)


@BOTH
def test_values_and_scores_come_from_heads_in_float32(folders: Folders, lora: bool):
    models = built(folders, lora, "bfloat16")
    ids = torch.arange(5, 25)[None]
    mask = torch.ones_like(ids)
    critic, reward = models.critic, models.rewards[0]
    with torch.no_grad(), models.mixed_precision():
        states = critic.hidden(ids, mask)[:, :-1].double()
        values = critic.values(ids, mask)
        (score,) = reward.score_tokens(ids.tolist(), batch_size=1)
    weight, bias = critic.head.weight.double(), critic.head.bias.double()
    assert_close(values.double(), (states @ weight.T + bias)[..., 0], rtol=1e-5, atol=1e-5)
    plain = reward.score_tokens(ids.tolist(), batch_size=1)[0]
    assert score != plain
    assert score == pytest.approx(float(plain), abs=0.05)


def test_adapters_compute_in_bfloat16_what_they_did_from_inputs_cast_to_float32(folders: Folders):
    models = built(folders, True, "bfloat16")
    ids = torch.arange(5, 25)[None]
    layers = adapters.adapter_layers(models.policy.model)
    results = []
    for cast in (False, True):
        for layer in layers:
            assert cast or not layer.cast_input_dtype_enabled
            layer.cast_input_dtype_enabled = cast
        with torch.no_grad(), models.mixed_precision():
            results.append(models.policy.logps(ids, torch.ones_like(ids), ids)[0])
    assert torch.equal(*results)


@BOTH
def test_a_step_in_mixed_precision_changes_weights_in_float32(
    folders: Folders, tmp_path: Path, recorder: Recorder, lora: bool
):
    trainer = ppo_fixtures.build_trainer(
        folders, tmp_path, lora=lora, mixed_precision="bfloat16", gradient_checkpointing=True
    )
    before = ppo_fixtures.flat_weights(trainer)
    trainer.step(0)
    change = ppo_fixtures.flat_weights(trainer) - before
    assert change.dtype == torch.float32
    # Adam's first step moves every weight by the learning rate, 1e-2.
    assert 0 < change.abs().max() < 0.1
    assert recorder.diagnostics[0].ratio_max > 1.0


def test_the_error_about_bfloat16_weights_names_the_key():
    with pytest.raises(ValidationError, match="mixed_precision: bfloat16"):
        ppo_fixtures.ppo_config(dtype="bfloat16")


def test_the_key_leaves_digests_of_recipes_without_it_as_they_were():
    assert "mixed_precision" not in ppo_fixtures.ppo_config().digest_settings()
    config = ppo_fixtures.ppo_config(mixed_precision="bfloat16")
    assert config.digest_settings()["mixed_precision"] == "bfloat16"
