"""Reward models: sequence classifiers with one label that score completions.

A reward model reads prompt and completion as :func:`align.models.tokenization.tokenize_for_reward`
writes them. Its score is the output of the head at the last token of the row, minus the offset: the
mean score of the demonstrations, which the ``reward`` stage stores in ``reward.json``. The last
token is determined from the length of the row, never by a search for pad tokens.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import ArtifactError, UserError
from align.models import tokenization
from align.models.adapters import (
    active_adapter,
    adapter_parameters,
    backbone,
    load_for_training,
    peft_errors_as_user_errors,
)
from align.models.files import AdapterBase
from align.models.loading import (
    adapter_base,
    attach_adapter,
    cannot_load,
    check_finite,
    check_vocabulary,
    from_pretrained,
)
from align.models.merging import merge_adapter
from align.models.prefix_sharing import wrapper

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from align.models.tokenization import Message

FILE, MEAN = "reward.json", "score_mean"
HEAD = "score"
"""Attribute of the head in the sequence classifiers of transformers."""
LABEL = "reward"
"""Name of the only label, as the pipelines of transformers print it."""


@dataclass(frozen=True, slots=True)
class RewardModel:
    """A decoder with a scalar head, which may be one of several adapters on shared layers."""

    model: Any
    """A transformers model whose ``base_model`` holds the decoder layers."""
    adapter: str | None
    """Name of the adapter that is active while scoring; None for a model without adapters."""
    head: Any
    """Linear layer from a hidden state to the score."""
    offset: float = 0.0
    """Subtracted from the output of the head."""
    tokenizer: PreTrainedTokenizerBase | None = None
    """Tokenizer of :meth:`score`; None for a reward model that scores given token ids only."""

    @classmethod
    def load(
        cls,
        source: Path | str,
        *,
        dtype: str,
        device: Any,
        quantization: str | None = None,
        prefix_sharing: bool = True,
    ) -> RewardModel:
        """Load a reward model from a folder or the Hub.

        Raises:
            UserError: The model cannot be loaded, has several labels, or its head was never
                trained.
        """
        model: Any = load_reward_model(source, dtype=dtype, quantization=quantization).to(device)
        tokenizer = tokenization.load_tokenizer(source)
        check_vocabulary(source, model, tokenizer)
        if prefix_sharing:
            wrapper.enable_prefix_sharing(model)
        return cls(
            model,
            adapter="default" if getattr(model, "peft_config", None) else None,
            head=score_head(model),
            offset=score_mean(source),
            tokenizer=tokenizer,
        )

    def score(
        self,
        prompts: Sequence[Sequence[Message]],
        completions: Sequence[Sequence[Message]],
        *,
        batch_size: int,
    ) -> Float[Tensor, " rows"]:
        """Scores of completions, each a finished turn of the assistant, in float32."""
        assert self.tokenizer is not None, "this reward model scores token ids only"
        rows = tokenization.tokenize_for_reward(self.tokenizer, prompts, completions)
        return self.score_tokens(rows, batch_size=batch_size)

    def score_tokens(
        self, rows: Sequence[Sequence[int]], *, batch_size: int
    ) -> Float[Tensor, " rows"]:
        """Scores of tokenized prompts with completions, in float32.

        Rows with a common prefix share a batch, so that prefix sharing computes the prefix once.

        Raises:
            UserError: A score is not finite.
        """
        import torch

        layers, device = backbone(self.model), self.model.base_model.device
        scores = torch.empty(len(rows), dtype=torch.float32)
        order = sorted(range(len(rows)), key=lambda i: tuple(rows[i]))
        with active_adapter(self.model, self.adapter), torch.inference_mode():
            for first in range(0, len(order), batch_size):
                batch = order[first : first + batch_size]
                ids, mask = tokenization.pad_rows(
                    [rows[i] for i in batch], pad=0, side="right", device=device
                )
                output = layers(input_ids=ids, attention_mask=mask, use_cache=False)
                last = mask.sum(1) - 1
                states = output.last_hidden_state[torch.arange(len(batch), device=ids.device), last]
                # float32 for any type of the layers: near 4, neighboring bfloat16 numbers are 1/64
                # apart.
                with torch.autocast(states.device.type, enabled=False):
                    raw = states.float() @ head_weight(self.head)[0].float()
                scores[torch.tensor(batch)] = raw.cpu()
        scores -= self.offset
        if n_invalid := int((~scores.isfinite()).sum()):
            raise UserError(
                f"{self.model.name_or_path}: this reward model gives {n_invalid} of {len(rows)} "
                f"completions a score that is not finite; check its weights and {FILE}, or train "
                "it again"
            )
        return scores


def score_mean(source: Path | str) -> float:
    """Stored mean score of the demonstrations, the offset of a reward model; 0 by default.

    Raises:
        ArtifactError: The file does not store a finite number.
    """
    file = Path(source) / FILE
    if not file.exists():
        return 0.0
    try:
        mean = json.loads(file.read_text(encoding="utf-8"))[MEAN]
    except (OSError, ValueError, KeyError, TypeError):
        mean = None
    if not isinstance(mean, int | float) or isinstance(mean, bool) or not math.isfinite(mean):
        raise ArtifactError(
            f"{file}: expected a JSON object whose `{MEAN}` is a number; run the `reward` stage "
            "again with --force"
        )
    return float(mean)


def new_reward_model(
    source: Path | str,
    *,
    lora: dict[str, Any] | None,
    dtype: str,
    revision: str | None = None,
    quantization: str | None = None,
) -> PreTrainedModel | PeftModel:
    """Build a reward model for training: a sequence classifier with one label on a policy's layers.

    With ``lora`` the layers are frozen below a new adapter. If the policy is an adapter itself, the
    new adapter starts as a copy of it on the same base. The head is drawn from N(0, 1/(d+1)), where
    d is the hidden size, with torch's current random state.

    Source of the head's initialization: Stiennon et al. 2020, arXiv:2009.01325, appendix B.1.
    """
    import torch
    from peft import get_peft_model
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

    adapter_weights: dict[str, Any] = {}
    base = adapter_base(source, revision=revision)
    options: dict[str, Any] = {"dtype": dtype, "revision": revision, "quantization": quantization}
    if lora is not None and base is not None:
        adapted: Any = load_for_training(source, lora=lora, **options)[0]
        # A copy of the adapter has its kind as well, such as DoRA or another scale of the rank.
        adapter = copy.deepcopy(adapted.peft_config["default"])
        adapter_weights = get_peft_model_state_dict(adapted)
        policy = adapted.unload()
    else:
        policy, adapter = load_for_training(source, lora=lora, **options)
    if quantization is None:
        classifier = _with_new_head(policy)
    else:
        options["revision"] = revision if base is None else base.hub_revision
        classifier = _load_below_new_head(policy.config._name_or_path, **options)
    set_label(classifier.config)
    head = score_head(classifier)
    torch.nn.init.normal_(head.weight, std=(head.in_features + 1) ** -0.5)
    if adapter is None:
        return classifier
    adapter.task_type = "SEQ_CLS"
    adapter.modules_to_save = [*(adapter.modules_to_save or ()), HEAD]
    with peft_errors_as_user_errors(source):
        wrapped = get_peft_model(classifier, adapter)
    if adapter_weights:
        adapter_weights |= {f"base_model.model.{HEAD}.weight": head.weight.detach()}
        set_peft_model_state_dict(wrapped, adapter_weights)
    return wrapped


def _with_new_head(policy: Any) -> Any:
    """Copy the layers of a loaded policy below a head with one label, whose weights are random."""
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    classifier = AutoModelForSequenceClassification.from_config(
        config, dtype=policy.dtype, trust_remote_code=False
    )
    classifier.base_model.load_state_dict(policy.base_model.state_dict())
    # peft stores this path as the base of the adapter.
    classifier.config._name_or_path = policy.config._name_or_path
    return classifier


def set_label(config: Any) -> None:
    """Name the only label of a classifier's config."""
    config.id2label, config.label2id = {0: LABEL}, {LABEL: 0}


def load_reward_model(
    source: Path | str,
    *,
    dtype: str,
    revision: str | None = None,
    quantization: str | None = None,
) -> PreTrainedModel:
    """Load a sequence classifier with one label for scoring; an adapter is not merged.

    Raises:
        UserError: The model cannot be loaded, has several labels, or its head was never trained.
    """
    base = adapter_base(source, revision=revision)
    options: dict[str, Any] = {"dtype": dtype, "revision": revision, "quantization": quantization}
    if base is None:
        return _load_classifier(source, **options).eval()
    return _load_adapter(source, base, **options).get_base_model().eval()


def load_merged_reward_model(source: Path | str, *, dtype: str) -> PreTrainedModel:
    """Load a reward model with trainable weights; an adapter is merged into its base.

    Raises:
        UserError: The model cannot be loaded, has several labels, or its head was never trained.
    """
    base = adapter_base(source)
    if base is None:
        return _load_classifier(source, dtype=dtype, revision=None)
    return merge_adapter(_load_adapter(source, base, dtype=dtype, revision=None), source)


def _load_classifier(source: Path | str, **options: Any) -> PreTrainedModel:
    """Load a sequence classifier with full weights."""
    from transformers import AutoModelForSequenceClassification

    model, missing = from_pretrained(
        AutoModelForSequenceClassification, source, "reward model", **options
    )
    if missing:
        raise UserError(_no_head(source, missing))
    if model.config.num_labels != 1:
        raise UserError(
            f"{source}: a classifier with {model.config.num_labels} labels; a reward model must "
            "have 1"
        )
    return model


def _load_adapter(
    source: Path | str, base: AdapterBase, *, revision: str | None, **options: Any
) -> PeftModel:
    """Load an adapter with a trained head on the layers of its base."""
    base.check_unchanged(source)
    model = _load_below_new_head(base.source, revision=base.hub_revision, **options)
    wrapped = attach_adapter(model, source, base, revision=revision)
    if not hasattr(getattr(model, HEAD, None), "modules_to_save"):
        raise UserError(_no_head(source, [f"{HEAD}.weight"]))
    return wrapped


def _load_below_new_head(source: Path | str, **options: Any) -> PreTrainedModel:
    """Load the layers of a policy below a head with one label, whose weights are random."""
    from transformers import AutoModelForSequenceClassification

    model, missing = from_pretrained(
        AutoModelForSequenceClassification, source, "reward model", num_labels=1, **options
    )
    missing = [name for name in missing if not name.startswith(f"{HEAD}.")]
    if missing:
        raise UserError(_no_head(source, missing))
    return model


def _no_head(source: Path | str, missing: Sequence[str]) -> str:
    return (
        f"{source}: {len(missing)} weights are missing, such as {missing[0]}; a reward model is a "
        "sequence classifier with a trained head: set a `reward` stage or its folder"
    )


def attach_reward_model(model: PeftModel, source: Path | str, *, name: str) -> Any:
    """Add a reward model's adapter to a policy with the same base, and return its frozen head.

    Raises:
        UserError: The adapter has no head, or does not fit the base.
    """
    import torch
    from peft import PeftConfig
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    base = adapter_base(source)
    assert base is not None, f"{source} is not an adapter"
    base.check_unchanged(source)
    try:
        weights = load_peft_weights(str(source), device="cpu")
        config = PeftConfig.from_pretrained(str(source))
    except Exception as error:  # its files may break peft at any place
        raise UserError(cannot_load(source, "adapter", error)) from None
    head = next((key for key in weights if key.endswith(f"{HEAD}.weight")), None)
    if head is None:
        raise UserError(
            f"{source}: the adapter has no `{HEAD}` head, so it is not a reward model; set a "
            "`reward` stage or its folder"
        )
    weight = weights.pop(head)
    config.task_type, config.modules_to_save, config.inference_mode = "CAUSAL_LM", None, False
    try:
        model.add_adapter(name, config)
        loaded = set_peft_model_state_dict(model, weights, adapter_name=name)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(cannot_load(source, "adapter", error)) from None
    if loaded.unexpected_keys:
        raise UserError(
            f"{source}: the adapter does not fit the base of the policy, which has no "
            f"{loaded.unexpected_keys[0]}; train the reward model on the same base"
        )
    missing = adapter_parameters(model, name).keys() & set(loaded.missing_keys)
    if missing:
        raise UserError(
            f"{source}: {len(missing)} weights of the adapter are missing, such as {min(missing)}; "
            "save the complete adapter again"
        )
    layer = torch.nn.Linear(weight.shape[1], 1, bias=False)
    layer.weight.data.copy_(weight)
    for part in (model, layer):
        check_finite(source, part)
    return layer.requires_grad_(False)


def head_weight(head: Any) -> torch.Tensor:
    """Weight of a score head, ``[1, hidden]``, whether or not peft has wrapped the head."""
    copies = getattr(head, "modules_to_save", None)
    return (copies["default"] if copies is not None else head).weight


def score_head(model: Any) -> Any:
    """Return the linear layer from a hidden state to the score.

    Raises:
        UserError: The model has no such layer.
    """
    head = getattr(model, HEAD, None)
    if head is None:
        raise UserError(
            f"{type(model).__name__}: the model has no `{HEAD}` layer; a reward model must be a "
            "decoder with a scalar head"
        )
    return head
