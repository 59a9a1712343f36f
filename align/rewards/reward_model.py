"""Reward models: how they are read.

A reward model reads prompt and completion as :func:`align.models.tokenization.tokenize_for_reward` writes them, at the last real token, and
its score is what the head says there less ``score_mean``, the mean over SFT completions that its stage stored in
``reward.json``. Lengths decide which token is the last; a pad token is never looked for.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import UserError
from align.models import tokenization
from align.models.adapters import load_for_training, lora_config
from align.models.loading import adapter_base, cannot_load, load_merged
from align.models.prefix_sharing import wrapper

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel


Message = dict[str, str]
FILE, MEAN = "reward.json", "score_mean"


class RewardModel:
    """A sequence classifier that scores texts, or tokens where its tokenizer is the policy's own."""

    def __init__(self, source: Path | str, *, dtype: str, device: Any, share: bool) -> None:
        self.tokenizer = tokenization.load_tokenizer(source)
        self.model: Any = load_reward_model(source, dtype=dtype).to(device)
        self.mean = score_mean(source)
        if share:
            wrapper.enable_prefix_sharing(self.model)

    def score_ids(
        self, rows: Sequence[Sequence[int]], *, batch_size: int
    ) -> Float[Tensor, " rows"]:
        """Scores of rows of tokens, each read at its last one."""
        return (
            score_ids(
                self.model.base_model,
                score_head(self.model),
                rows,
                batch_size=batch_size,
            )
            - self.mean
        )

    def score(
        self,
        prompts: Sequence[Sequence[Message]],
        completions: Sequence[Sequence[Message]],
        *,
        batch_size: int,
    ) -> Float[Tensor, " rows"]:
        """Scores of completions, as finished turns of the assistant."""
        rows = tokenization.tokenize_for_reward(self.tokenizer, prompts, completions)
        return self.score_ids(rows, batch_size=batch_size)


def score_mean(source: Path | str) -> float:
    """What is taken off a reward model's scores; 0 for one that is not of our making."""
    file = Path(source) / FILE
    return float(json.loads(file.read_text())[MEAN]) if file.is_file() else 0.0


def score_ids(
    backbone: Any, head: Any, rows: Sequence[Sequence[int]], *, batch_size: int
) -> Float[Tensor, " rows"]:
    """What a head says at the last token of each row, in float32. Rows that begin alike go together."""
    import torch

    result = torch.empty(len(rows), dtype=torch.float32)
    order = sorted(range(len(rows)), key=lambda i: tuple(rows[i]))
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        ids, mask = tokenization.pad_rows(
            [rows[i] for i in batch], pad=0, side="right", device=backbone.device
        )
        with torch.inference_mode():
            hidden = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            last = mask.sum(1) - 1
            states = hidden[torch.arange(len(batch), device=ids.device), last]
            # In float32 whatever the layers are in: near 4 neighbouring bfloat16 numbers are 1/64 apart.
            scores = states.float() @ head_weight(head)[0].float()
        result[torch.tensor(batch)] = scores.cpu()
    return result


SCORE = "score"  # the head of transformers' decoders with labels


# Reward models -------------------------------------------------------------------------------------------------------


def new_reward_model(
    source: Path | str, *, lora: dict[str, Any] | None, dtype: str, revision: str | None = None
) -> PreTrainedModel | PeftModel:
    """A sequence classifier with one label on the layers of a policy, to be trained as a reward model.

    Its head is drawn from N(0, 1/(d+1)) by torch's current random state (Stiennon et al. 2020, arXiv:2009.01325, appendix
    B.1). With ``lora`` the layers stay frozen below an adapter; where the policy is an adapter itself, the reward's begins
    as a copy of it, on the same base.
    """
    import torch
    from peft import get_peft_model
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
    from transformers import AutoModelForSequenceClassification

    before = None
    if lora is not None and adapter_base(source, revision=revision) is not None:
        before = load_for_training(source, lora=lora, dtype=dtype, revision=revision)[0]
        tuned = get_peft_model_state_dict(before)
        policy = before.unload()
    else:
        policy = load_merged(source, dtype=dtype, revision=revision)
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    scorer = AutoModelForSequenceClassification.from_config(config, dtype=policy.dtype)
    scorer.base_model.load_state_dict(policy.base_model.state_dict())
    scorer.config._name_or_path = policy.config._name_or_path  # what an adapter says it stands on
    head = score_head(scorer)
    torch.nn.init.normal_(head.weight, std=(head.in_features + 1) ** -0.5)
    if lora is None:
        return scorer
    wrapped = get_peft_model(
        scorer, lora_config(lora, task_type="SEQ_CLS", modules_to_save=[SCORE])
    )
    if before is not None:
        set_peft_model_state_dict(wrapped, tuned)
    return wrapped


def load_reward_model(
    source: Path | str, *, dtype: str, revision: str | None = None
) -> PreTrainedModel:
    """A reward model to score with: any sequence classifier with one label; an adapter stays beside its base.

    Raises:
        UserError: It cannot be loaded, has several labels, or a head that nobody trained.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification

    base = adapter_base(source, revision=revision)
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            str(source),
            dtype=getattr(torch, dtype),
            revision=revision,
            output_loading_info=True,
            **({} if base is None else {"num_labels": 1}),
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(cannot_load(source, "reward model", error)) from None
    missing = set(report["missing_keys"])
    if base is not None and not hasattr(getattr(model, SCORE, None), "modules_to_save"):
        missing.add(f"{SCORE}.weight")
    if missing:
        raise UserError(
            f"{source}: {len(missing)} weights are missing, such as {sorted(missing)[0]}; a reward model is a sequence "
            "classifier with a trained head: name a `reward` stage, or its folder"
        )
    if model.config.num_labels != 1:
        raise UserError(
            f"{source}: a classifier with {model.config.num_labels} labels; a reward model has 1"
        )
    return model.eval()


def load_merged_reward_model(source: Path | str, *, dtype: str) -> PreTrainedModel:
    """A reward model with all its weights; an adapter is merged into its base."""
    base = adapter_base(source)
    model = load_reward_model(source, dtype=dtype)
    if base is None:
        return model.requires_grad_(True)
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    below = AutoModelForSequenceClassification.from_pretrained(
        base, dtype=model.dtype, num_labels=1
    )
    return PeftModel.from_pretrained(below, str(source)).merge_and_unload().requires_grad_(True)


def attach_reward_model(model: PeftModel, source: Path | str, *, name: str) -> Any:
    """Put a reward model's adapter beside a policy's, on the base that both stand on. Returns its head.

    Raises:
        UserError: It is no adapter of a reward model.
    """
    import torch
    from peft import PeftConfig
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    weights = load_peft_weights(str(source), device="cpu")
    head = next((key for key in weights if key.endswith(f"{SCORE}.weight")), None)
    if head is None:
        raise UserError(
            f"{source}: no head in its adapter; a reward model comes from a `reward` stage"
        )
    weight = weights.pop(head)
    config = PeftConfig.from_pretrained(str(source))
    config.task_type, config.modules_to_save, config.inference_mode = "CAUSAL_LM", None, False
    model.add_adapter(name, config)
    unknown = set_peft_model_state_dict(model, weights, adapter_name=name).unexpected_keys
    if unknown:
        raise UserError(f"{source}: its adapter does not fit this base: {unknown[0]}")
    layer = torch.nn.Linear(weight.shape[1], 1, bias=False)
    layer.weight.data.copy_(weight)
    return layer.requires_grad_(False)


def head_weight(head: Any) -> torch.Tensor:
    """The weight of a score's head, ``[1, hidden]``, also where peft has wrapped it."""
    inner = getattr(head, "modules_to_save", None)
    return (inner["default"] if inner is not None else head).weight


def score_head(model: Any) -> Any:
    """The linear layer that turns a hidden state into a score."""
    head = getattr(model, SCORE, None)
    if head is None:
        raise UserError(
            f"{type(model).__name__}: no `{SCORE}` layer; a reward model is a decoder with a scalar head"
        )
    return head
