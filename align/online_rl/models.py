"""PPO's four roles - policy, reference, reward models, critic - on one frozen backbone, or each on its own.

With LoRA all of them are adapters and heads on one base: the policy is an adapter, the reference is that adapter switched
off (or a frozen copy, where the policy started as one), reward models trained as adapters on the same base are adapters
again, and the critic is a copy of the first of them with a head of its own. What does not stand on that base (a reward
model trained in full, one of another family) is loaded beside it. Without LoRA each role has its own weights.

The critic begins as the reward model: its layers, and its head with the score's mean as the bias. Without a reward model
it begins as the policy's layers with a head from N(0, 1/(d+1)).

Dropout is off everywhere: the ratio of a policy to itself is 1. Left out: DeepSpeed, FSDP, models over several devices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.utils import add_fused_lm_head

from align.errors import UserError
from align.models import adapters, loading, tokenization
from align.models.adapters import active_adapter
from align.models.prefix_sharing import wrapper
from align.rewards import reward_model
from align.rewards.reward_model import RewardModel

NF4_BLOCK = 64
POLICY, REFERENCE, VALUE = (
    "default",
    "reference",
    "value",
)  # adapters; peft saves `default` at the top of a folder


@dataclass(frozen=True, slots=True)
class ModelView:
    """A way to call a model: which of its adapters speaks (None: none does), and the head above its layers."""

    model: Any
    adapter: str | None = None
    head: nn.Module | None = None

    def hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        """States of the last layer, ``[batch, time, hidden]``."""
        with active_adapter(self.model, self.adapter):
            backbone = self.model.base_model
            return backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state

    def logps(self, ids: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of each label given what is before it, and the entropy there; ``[batch, time - 1]``.

        In float32, by TRL's fused head: a tile of logits at a time, and 0 where there is no label.
        """
        with active_adapter(self.model, self.adapter):
            found = self.model(
                input_ids=ids,
                attention_mask=mask,
                labels=labels,
                use_cache=False,
                fused_lm_head=True,
            )
        return found.log_probs, found.entropy

    def values(self, ids: Tensor, mask: Tensor) -> Tensor:
        """What the head says at each token but the last: the value of the state before the next; ``[batch, time - 1]``."""
        assert self.head is not None
        return self.head(self.hidden(ids, mask)[:, :-1].float())[..., 0]


@dataclass(frozen=True, slots=True)
class PPOModels:
    """All roles. ``saved`` is what writes the policy: peft's wrapper, or the model itself."""

    policy: ModelView
    reference: ModelView
    rewards: list[RewardModel]
    critic: ModelView | None
    saved: Any
    tokenizer: Any

    def parameters(self, role: ModelView) -> list[nn.Parameter]:
        """What a role learns: its adapter, or all its weights, and a critic's head in the place of the model's own."""
        layers = role.model if role.head is None else role.model.base_model
        found = [
            p
            for name, p in layers.named_parameters()
            if role.adapter is None or f".{role.adapter}." in name
        ]
        return found + (list(role.head.parameters()) if role.head is not None else [])

    def models(self) -> list[Any]:
        """Each model once."""
        roles: list[ModelView | RewardModel] = [self.policy, self.reference, *self.rewards]
        roles += [self.critic] if self.critic is not None else []
        return list({id(role.model): role.model for role in roles}.values())

    def weights(self) -> dict[str, Tensor]:
        """Everything that learns, by a name: what a checkpoint keeps."""
        found: dict[str, Tensor] = {
            f"policy.{i}": p for i, p in enumerate(self.parameters(self.policy))
        }
        if self.critic is not None:
            found |= {f"critic.{i}": p for i, p in enumerate(self.parameters(self.critic))}
        return found


# Building ------------------------------------------------------------------------------------------------------------


def build_models(
    source: Path | str,
    *,
    scorers: Sequence[Path | str],
    lora: dict[str, Any] | None,
    dtype: str,
    quantization: str | None,
    revision: str | None,
    critic: bool,
    temperature: float,
    share: bool,
    checkpointing: bool,
    device: Any,
    say: Callable[[str], None],
) -> PPOModels:
    """All roles, on their device, ready to speak. ``scorers`` are folders of reward models; ``critic``: there is one.

    Raises:
        UserError: Something cannot be loaded, or does not fit.
    """
    tokenizer = tokenization.load_tokenizer(source, revision=revision)
    if lora is None:
        made = _separate(source, scorers, tokenizer, critic=critic, dtype=dtype, revision=revision)
    else:
        made = _on_one_backbone(
            source,
            scorers,
            tokenizer,
            lora,
            critic=critic,
            quantization=quantization,
            dtype=dtype,
            revision=revision,
        )
    learners = {id(p) for role in (made.policy, made.critic) if role for p in made.parameters(role)}
    for model in made.models():
        if not hasattr(model, "quantization_method") and not getattr(model, "is_quantized", False):
            model.to(device)
        disable_dropout(model)
        for p in model.parameters():
            p.requires_grad_(id(p) in learners)
        if checkpointing:
            _checkpointed(model)
        if share:
            wrapper.enable_prefix_sharing(
                model, say=lambda why: None if "cache" in why else say(why)
            )
    for role in (made.critic, *made.rewards):
        if role is not None and role.head is not None:
            role.head.to(device)
    for role in (made.policy, made.reference):
        if not hasattr(role.model, "scores_in_tiles"):
            role.model.scores_in_tiles = True
            add_fused_lm_head(role.model, temperature, outputs=("log_probs", "entropy"))
    return made


def _separate(
    source: Path | str,
    scorers: Sequence[Path | str],
    tokenizer: Any,
    *,
    critic: bool,
    dtype: str,
    revision: str | None,
) -> PPOModels:
    policy = loading.load_merged(source, dtype=dtype, revision=revision)
    reference = loading.load_merged(source, dtype=dtype, revision=revision)
    judges = [_scorer(each, tokenizer, dtype=dtype) for each in scorers]
    value = None
    if critic and judges:
        model = reward_model.load_merged_reward_model(scorers[0], dtype=dtype)
        if judges[0].tokenizer is not None:
            raise UserError(
                f"{scorers[0]}: its tokens are not the policy's, so no critic can begin as this reward model; use "
                "`advantages: rloo`, or a reward model on the policy's family"
            )
        value = ModelView(model, head=_value_head(model.score, judges[0].offset))
    elif critic:
        model = loading.load_merged(source, dtype=dtype, revision=revision)
        value = ModelView(model, head=_value_head(model.config.hidden_size))
    return PPOModels(ModelView(policy), ModelView(reference), judges, value, policy, tokenizer)


def _on_one_backbone(
    source: Path | str,
    scorers: Sequence[Path | str],
    tokenizer: Any,
    lora: dict[str, Any],
    *,
    critic: bool,
    quantization: str | None,
    dtype: str,
    revision: str | None,
) -> PPOModels:
    from peft import get_peft_model

    base = loading.adapter_base(source, revision=revision)
    if base is None:
        model = loading.load_base(source, dtype=dtype, revision=revision, quantization=quantization)
        _check_quantized(source, model)
        wrapped = get_peft_model(model, adapters.lora_config(lora))
        reference = None
    else:
        wrapped = loading.load_adapter(
            source, dtype=dtype, revision=revision, quantization=quantization
        )
        adapters.check_lora(source, wrapped, lora)
        wrapped.load_adapter(str(source), REFERENCE)
        reference = REFERENCE
    inner = wrapped.get_base_model()
    judges = []
    for k, each in enumerate(scorers):
        if _same_folder(loading.adapter_base(each), base or source):
            head = reward_model.attach_reward_model(wrapped, each, name=f"reward{k}")
            own = tokenization.load_tokenizer(each)
            same = _same_tokens(own, tokenizer)
            mean = reward_model.score_mean(each)
            judges.append(RewardModel(inner, f"reward{k}", head, mean, None if same else own))
        else:
            judges.append(_scorer(each, tokenizer, dtype=dtype))
    value = _adapter_critic(wrapped, judges, scorers, lora, reference) if critic else None
    return PPOModels(
        ModelView(inner, POLICY), ModelView(inner, reference), judges, value, wrapped, tokenizer
    )


def _check_quantized(source: Path | str, model: Any) -> None:
    """Refuse what bitsandbytes cannot compute on a CPU, before it fails in the first forward pass."""
    widths = {m.in_features for m in model.modules() if type(m).__name__ == "Linear4bit"}
    odd = sorted(width for width in widths if width % NF4_BLOCK)
    if odd and next(model.parameters()).device.type == "cpu":
        raise UserError(
            f"{source}: a layer of width {odd[0]}: on a CPU 4 bits need multiples of {NF4_BLOCK}; remove `quantization`"
        )


def _adapter_critic(
    wrapped: Any,
    judges: Sequence[RewardModel],
    scorers: Sequence[Path | str],
    lora: dict[str, Any],
    reference: str | None,
) -> ModelView:
    """An adapter that begins as the first reward model, wherever that stands."""
    if judges and judges[0].tokenizer is not None:
        raise UserError(
            f"{scorers[0]}: its tokens are not the policy's, so no critic can begin as this reward model; use "
            "`advantages: rloo`, or a reward model on the policy's family"
        )
    if judges and judges[0].model is not wrapped.get_base_model():
        model = judges[0].model
        before = judges[0].adapter
        model.add_adapter(
            model.peft_config[before] if before else adapters.lora_config(lora), VALUE
        )
        _copy_adapter(model, before, VALUE)
        for name, p in model.named_parameters():
            if f".{VALUE}." in name:
                p.data = p.data.float()  # peft keeps adapters so that learn; transformers does not
        return ModelView(
            model, VALUE, _value_head(reward_model.score_head(model), judges[0].offset)
        )
    before = judges[0].adapter if judges else reference
    wrapped.add_adapter(
        VALUE, wrapped.peft_config[before] if before else adapters.lora_config(lora)
    )
    model = wrapped.get_base_model()
    _copy_adapter(model, before, VALUE)
    head = (
        _value_head(judges[0].head, judges[0].offset)
        if judges
        else _value_head(model.config.hidden_size)
    )
    return ModelView(model, VALUE, head)


def _scorer(source: Path | str, tokenizer: Any, *, dtype: str) -> RewardModel:
    """Load a reward model that shares no layers with the policy."""
    loaded = RewardModel.load(source, dtype=dtype, device="cpu", prefix_sharing=False)
    same = _same_tokens(loaded.tokenizer, tokenizer)
    return replace(loaded, tokenizer=None) if same else loaded


def _value_head(like: Any, mean: float = 0.0) -> nn.Linear:
    """A linear layer to one number in float32; ``like`` is the score's, or a width."""
    if isinstance(like, int):
        head = nn.Linear(like, 1)
        nn.init.normal_(head.weight, std=(like + 1) ** -0.5)
    else:
        weight = reward_model.head_weight(like)
        head = nn.Linear(weight.shape[1], 1)
        head.weight.data.copy_(weight)
    nn.init.constant_(head.bias, -mean)
    return head


def _copy_adapter(model: Any, source: str | None, target: str) -> None:
    if source is None:
        return  # a fresh adapter adds nothing: it is the layers below
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in named.items():
            if f".{target}." in name:
                p.copy_(named[name.replace(f".{target}.", f".{source}.")])


def _same_folder(one: str | None, other: Path | str) -> bool:
    if one is None:
        return False
    paths = Path(one), Path(other)
    return paths[0].resolve() == paths[1].resolve() if paths[0].exists() else str(one) == str(other)


def _same_tokens(one: Any, other: Any) -> bool:
    """Whether two tokenizers write a conversation in the same ids."""
    alike = [(t.get_vocab(), t.chat_template, t.eos_token_id) for t in (one, other)]
    return alike[0] == alike[1]


# What a model is made to do ------------------------------------------------------------------------------------------


def disable_dropout(model: nn.Module) -> None:
    """Turn dropout off for good, in training as well: layers, attention, and adapters."""
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
        for name, value in list(vars(layer).items()):
            if "drop" in name and isinstance(value, float):  # OPT and BLOOM keep a number
                setattr(layer, name, 0.0)


def _checkpointed(model: Any) -> None:
    """Compute activations again in the backward pass, with the adapter that spoke in the forward pass."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in model.modules():
        if hasattr(layer, "_gradient_checkpointing_func"):
            layer._gradient_checkpointing_func = functools.partial(_checkpoint, model)


def _checkpoint(model: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    layers = adapters.adapter_layers(model)
    active = layers[0]._active_adapter[0] if layers and not layers[0]._disable_adapters else None

    def again(*args: Any, **kwargs: Any) -> Any:
        with active_adapter(model, active):
            return function(*args, **kwargs)

    return torch.utils.checkpoint.checkpoint(again, *args, use_reentrant=False, **kwargs)
