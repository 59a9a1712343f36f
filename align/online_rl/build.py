"""Loading of the models of an online-RL stage: on one frozen backbone, or separately.

With LoRA, all models are adapters and heads on one base model. The policy is an adapter. The
reference is the base with adapters switched off, or a frozen copy of the policy's adapter if the
policy started as one. Reward models trained as adapters on the same base are attached to it, and
the critic is a copy of the first of them with its own head. A reward model that does not share the
base (full fine-tuning, another family) is loaded beside it. Without LoRA every model has its own
weights.

The critic starts as the first reward model: its layers, and its head with the score's mean as the
bias. Without a reward model it starts as the policy's layers with a head from N(0, 1/(d+1)).

Left out: models over several devices of one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from trl.trainer.utils import add_fused_lm_head

from align.config.online_rl import OnlineRL
from align.errors import UserError
from align.models import adapters, loading, tokenization
from align.models.files import AdapterBase
from align.models.prefix_sharing import wrapper
from align.online_rl.models import (
    POLICY,
    REFERENCE,
    VALUE,
    ModelView,
    OnlineRLModels,
    disable_dropout,
    enable_gradient_checkpointing,
)
from align.rewards import reward_model
from align.rewards.reward_model import RewardModel


def build_models(
    config: OnlineRL,
    source: Path | str,
    reward_sources: Sequence[Path | str],
    *,
    device: Any,
) -> OnlineRLModels:
    """Load all models onto ``device``, without dropout, with gradients for policy and critic only.

    ``source`` is the policy at the start; ``reward_sources`` are its reward models, in the
    recipe's order.

    Raises:
        UserError: A model cannot be loaded, or models do not fit together.
    """
    loader = _Loader(
        config,
        source,
        reward_sources,
        tokenization.load_tokenizer(source, revision=config.revision),
    )
    models = loader.separate_models() if config.lora is None else loader.shared_backbone()
    if config.mixed_precision is not None:
        models = replace(models, compute_dtype=getattr(torch, config.mixed_precision))
    loading.check_vocabulary(source, models.policy.model, models.tokenizer)
    trainable = {
        id(p) for view in (models.policy, models.critic) if view for p in models.parameters(view)
    }
    for model in models.models():
        if not hasattr(model, "quantization_method") and not getattr(model, "is_quantized", False):
            model.to(device)
        disable_dropout(model)
        for p in model.parameters():
            p.requires_grad_(id(p) in trainable)
        if config.gradient_checkpointing:
            enable_gradient_checkpointing(model)
        if config.prefix_sharing:
            wrapper.enable_prefix_sharing(model)
        if config.mixed_precision is not None:
            adapters.leave_casts_to_autocast(model)
    for view in (models.critic, *models.rewards):
        if view is not None and view.head is not None:
            view.head.to(device)
    for view in (models.policy, models.reference):
        if not hasattr(view.model, "has_fused_head"):
            view.model.has_fused_head = True
            add_fused_lm_head(
                view.model,
                config.temperature,
                cast_lm_head_to_fp32=config.mixed_precision is not None,
                outputs=("log_probs", "entropy"),
            )
    return models


@dataclass(frozen=True, slots=True)
class _Loader:
    """Loads the models of a recipe."""

    config: OnlineRL
    source: Path | str
    reward_sources: Sequence[Path | str]
    tokenizer: Any

    @property
    def has_critic(self) -> bool:
        return self.config.has_critic

    def separate_models(self) -> OnlineRLModels:
        """Every model with its own weights."""
        policy, reference = self._merged_policy(), self._merged_policy()
        rewards = [self._reward_model(source) for source in self.reward_sources]
        critic = None
        if self.has_critic and rewards:
            model = reward_model.load_merged_reward_model(
                self.reward_sources[0], dtype=self.config.dtype
            )
            self._check_critic_tokens(rewards[0])
            critic = ModelView(model, head=_value_head(model.score, rewards[0].offset))
        elif self.has_critic:
            model = self._merged_policy()
            critic = ModelView(model, head=_value_head(model.config.hidden_size))
        return OnlineRLModels(
            ModelView(policy), ModelView(reference), rewards, critic, policy, self.tokenizer
        )

    def shared_backbone(self) -> OnlineRLModels:
        """Policy, reference, critic and suitable reward models on one frozen base model."""
        base = loading.adapter_base(self.source, revision=self.config.revision)
        wrapped, reference = self._wrapped_policy(base)
        model = wrapped.get_base_model()
        rewards = [
            self._attached_reward_model(wrapped, k, source)
            if self._has_same_base(source, base)
            else self._reward_model(source)
            for k, source in enumerate(self.reward_sources)
        ]
        critic = self._adapter_critic(wrapped, rewards, reference) if self.has_critic else None
        return OnlineRLModels(
            ModelView(model, POLICY),
            ModelView(model, reference),
            rewards,
            critic,
            wrapped,
            self.tokenizer,
        )

    def _has_same_base(self, source: Path | str, base: AdapterBase | None) -> bool:
        """Whether a reward model is an adapter on the base of the policy, at the same revision."""
        other = loading.adapter_base(source)
        policy_base = base or AdapterBase(str(self.source), self.config.revision)
        return other is not None and loading.is_same_base(other, policy_base)

    def _merged_policy(self) -> Any:
        return loading.load_merged(
            self.source, dtype=self.config.dtype, revision=self.config.revision
        )

    def _wrapped_policy(self, base: AdapterBase | None) -> tuple[Any, str | None]:
        """Peft's wrapper of the policy, and the reference's adapter (None: no adapter)."""
        config = self.config
        if base is None:
            from peft import get_peft_model

            model = loading.load_base(
                self.source,
                dtype=config.dtype,
                revision=config.revision,
                quantization=config.quantization,
            )
            adapters.check_target_modules(self.source, model, self._lora())
            with adapters.peft_errors_as_user_errors(self.source):
                return get_peft_model(model, self._lora_config()), None
        wrapped = loading.load_adapter(
            self.source,
            dtype=config.dtype,
            revision=config.revision,
            quantization=config.quantization,
        )
        adapters.check_lora(self.source, wrapped, self._lora())
        wrapped.load_adapter(str(self.source), REFERENCE, revision=config.revision)
        return wrapped, REFERENCE

    def _attached_reward_model(self, wrapped: Any, k: int, source: Path | str) -> RewardModel:
        """A reward model whose adapter is loaded onto the policy's base."""
        name = f"reward{k}"
        head = reward_model.attach_reward_model(wrapped, source, name=name)
        return RewardModel(
            wrapped.get_base_model(),
            name,
            head,
            reward_model.score_mean(source),
            self._own_tokenizer(tokenization.load_tokenizer(source)),
        )

    def _reward_model(self, source: Path | str) -> RewardModel:
        """A reward model that shares no layers with the policy."""
        model = RewardModel.load(
            source, dtype=self.config.dtype, device="cpu", prefix_sharing=False
        )
        return replace(model, tokenizer=self._own_tokenizer(model.tokenizer))

    def _own_tokenizer(self, tokenizer: Any) -> Any:
        """The tokenizer of a reward model, or None if it gives the same ids as the policy's."""
        return None if _same_tokens(tokenizer, self.tokenizer) else tokenizer

    def _check_critic_tokens(self, first: RewardModel) -> None:
        if first.tokenizer is not None:
            raise UserError(
                f"{self.reward_sources[0]}: its tokenizer differs from the policy's, so the critic "
                "cannot start as this reward model; use the stage `rloo`, which has no critic, or a "
                "reward model with the policy's tokenizer"
            )

    def _adapter_critic(
        self, wrapped: Any, rewards: Sequence[RewardModel], reference: str | None
    ) -> ModelView:
        """An adapter that starts as the first reward model, on that model's layers."""
        if not rewards:
            model = wrapped.get_base_model()
            wrapped.add_adapter(VALUE, self._adapter_config(wrapped, reference))
            if reference is not None:
                adapters.copy_adapter(model, reference, VALUE)
            return ModelView(model, VALUE, _value_head(model.config.hidden_size))
        first = rewards[0]
        self._check_critic_tokens(first)
        if first.model is wrapped.get_base_model():
            wrapped.add_adapter(VALUE, self._adapter_config(wrapped, first.adapter))
            assert first.adapter is not None
            adapters.copy_adapter(first.model, first.adapter, VALUE)
            return ModelView(first.model, VALUE, _value_head(first.head, first.offset))
        model = first.model
        model.add_adapter(self._adapter_config(model, first.adapter), VALUE)
        if first.adapter is not None:
            adapters.copy_adapter(model, first.adapter, VALUE)
        for p in adapters.adapter_parameters(model, VALUE).values():
            p.data = p.data.float()  # peft does this itself, transformers' add_adapter not
        head = _value_head(reward_model.score_head(model), first.offset)
        return ModelView(model, VALUE, head)

    def _lora(self) -> dict[str, Any]:
        assert self.config.lora_dict is not None
        return self.config.lora_dict

    def _lora_config(self) -> Any:
        pinned = loading.pinned_revision(self.source, revision=self.config.revision)
        return adapters.lora_config(self._lora(), revision=pinned)

    def _adapter_config(self, model: Any, adapter: str | None) -> Any:
        """Configuration of the critic's adapter: that of ``adapter``, or the recipe's."""
        return model.peft_config[adapter] if adapter else self._lora_config()


def _value_head(like: Any, mean: float = 0.0) -> nn.Linear:
    """A scalar head in float32: a copy of a score head, or a random one for a hidden size."""
    if isinstance(like, int):
        head = nn.Linear(like, 1)
        nn.init.normal_(head.weight, std=(like + 1) ** -0.5)
    else:
        weight = reward_model.head_weight(like)
        head = nn.Linear(weight.shape[1], 1)
        head.weight.data.copy_(weight)
    nn.init.constant_(head.bias, -mean)
    return head


def _same_tokens(one: Any, other: Any) -> bool:
    """Whether two tokenizers turn a conversation into the same ids, up to the same end."""
    if (one.get_vocab(), one.chat_template) != (other.get_vocab(), other.chat_template):
        return False
    return tokenization.end_of_turn(one) == tokenization.end_of_turn(other)
