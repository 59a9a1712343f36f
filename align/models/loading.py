"""Causal language models: new ones with random weights, and trained ones from folders or the Hub.

Training an adapter further, and references, are in :mod:`align.models.adapters`.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import ArtifactError, UserError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def new_model(tokenizer: PreTrainedTokenizerBase, *, dtype: str, **shape: Any) -> PreTrainedModel:
    """Create a Llama-architecture model with random weights for a tokenizer.

    ``shape`` are fields of transformers' ``LlamaConfig``. The weights are drawn with torch's
    current random state.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        **{key: value for key, value in shape.items() if value is not None}
        | {
            "vocab_size": len(tokenizer),
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
    )
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))


def adapter_base(source: Path | str, *, revision: str | None = None) -> str | None:
    """The base model of an adapter; None if ``source`` has full weights.

    Raises:
        ArtifactError: The adapter does not name its base, or the folder of the base does not exist.
    """
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        config_file = find_adapter_config_file(str(source), revision=revision)
    except (OSError, ValueError):
        return None  # if the Hub cannot be reached, loading the model raises the error
    if config_file is None:
        return None
    config = json.loads(Path(config_file).read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    if not base:
        raise ArtifactError(
            f"{config_file}: no `base_model_name_or_path`, so the base model is unknown; add it"
        )
    if Path(base).is_absolute() and not Path(base).is_dir():
        sibling = Path(source).resolve().parent / Path(base).name
        if not sibling.is_dir():
            raise ArtifactError(
                f"{config_file}: the base model {base} does not exist; set "
                "`base_model_name_or_path` to its folder"
            )
        return str(sibling)  # the whole folder of runs was moved
    return str(base)


def load_merged(source: Path | str, *, dtype: str, revision: str | None = None) -> PreTrainedModel:
    """Load a causal language model with trainable weights; an adapter is merged into its base.

    Raises:
        UserError: Weights are missing, cannot be loaded, or do not fit the config.
    """
    if adapter_base(source, revision=revision) is not None:
        merged = load_adapter(source, dtype=dtype, revision=revision).merge_and_unload()
        return merged.requires_grad_(True)  # peft has frozen the base
    return load_base(source, dtype=dtype, revision=revision)


def load_for_inference(
    source: Path | str, *, dtype: str, revision: str | None = None
) -> PreTrainedModel:
    """Load a policy as it was trained, for sampling and scoring.

    An adapter is not merged: in bfloat16, the rounding of a merge would remove most of a small
    update.

    Raises:
        UserError: Weights are missing, cannot be loaded, or do not fit the config.
    """
    if adapter_base(source, revision=revision) is None:
        return load_base(source, dtype=dtype, revision=revision)
    return load_adapter(source, dtype=dtype, revision=revision).get_base_model()


def load_adapter(
    source: Path | str,
    *,
    dtype: str,
    revision: str | None = None,
    quantization: str | None = None,
) -> PeftModel:
    """Load a trainable adapter on its base.

    Raises:
        UserError: Weights of the adapter or of its base are missing or cannot be loaded.
    """
    from peft import PeftModel

    base = adapter_base(source, revision=revision)
    assert base is not None, f"{source} is not an adapter"
    model = load_base(base, dtype=dtype, revision=None, quantization=quantization)
    try:
        with warnings.catch_warnings():
            # peft leaves missing weights at their initial value, zero, and only warns.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(
                model, str(source), is_trainable=True, revision=revision
            )
    except (OSError, ValueError, KeyError, RuntimeError, UserWarning) as error:
        raise UserError(cannot_load(source, "adapter", error)) from None


def load_base(
    source: Path | str, *, dtype: str, revision: str | None, quantization: str | None = None
) -> PreTrainedModel:
    """Load full weights; ``nf4`` stores the linear layers in 4 bits (arXiv:2305.14314).

    Raises:
        UserError: Weights are missing, cannot be loaded, or do not fit the config.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {}
    if quantization == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
    if isinstance(source, Path):
        source = source.resolve()  # peft stores this path in an adapter
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            str(source),
            dtype=getattr(torch, dtype),
            revision=revision,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(cannot_load(source, "model", error)) from None
    missing = sorted(report["missing_keys"])
    if missing:
        # transformers initializes missing weights randomly and only logs it.
        raise UserError(
            f"{source}: {len(missing)} weights are missing, such as {missing[0]}; "
            "save the complete model again"
        )
    return model


def cannot_load(source: Path | str, what: str, error: Exception) -> str:
    """Error message for a model, adapter or tokenizer that a library failed to load."""
    text = " ".join(str(error).split())
    return f"{source}: its {what} cannot be loaded: {text[:300]}{'…' if len(text) > 300 else ''}"
