"""Models and tokenizers: new ones from random weights, trained ones from folders or the Hub, and their adapters.

Adapters are trained on, not stacked. A policy that is an adapter goes on as that adapter; its reference is a frozen copy
of it. Trained in full, the adapter is first merged into its base, and the reference is the same merge. So a fresh policy
equals its reference exactly, whichever way each stage was trained.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def new_model(tokenizer: PreTrainedTokenizerBase, *, dtype: str, **shape: Any) -> PreTrainedModel:
    """A Llama-architecture model with random weights (from torch's current random state), fit to a tokenizer.

    ``shape`` holds fields of transformers' ``LlamaConfig``.
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
    """The base model that an adapter belongs to; None where ``source`` holds whole weights."""
    import json

    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        found = find_adapter_config_file(str(source), revision=revision)
    except (OSError, ValueError):
        return None  # an unreachable Hub: the loading that follows says so
    if found is None:
        return None
    base = json.loads(Path(found).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise UserError(f"{found}: no `base_model_name_or_path`, so its base model is not known")
    if Path(base).is_absolute() and not Path(base).is_dir():
        sibling = Path(source).resolve().parent / Path(base).name
        if not sibling.is_dir():
            raise UserError(
                f"{found}: its base model {base} is gone; set `base_model_name_or_path` to where it is now"
            )
        return str(sibling)  # the runs were moved together
    return str(base)


def load_merged(source: Path | str, *, dtype: str, revision: str | None = None) -> PreTrainedModel:
    """A causal language model with all its weights; an adapter is merged into its base.

    Raises:
        UserError: The weights cannot be loaded, are not all there, or do not fit the configuration.
    """
    if adapter_base(source, revision=revision) is not None:
        merged = load_adapter(source, dtype=dtype, revision=revision).merge_and_unload()
        return merged.requires_grad_(True)  # peft had frozen the base
    return load_base(source, dtype=dtype, revision=revision)


def load_for_inference(
    source: Path | str, *, dtype: str, revision: str | None = None
) -> PreTrainedModel:
    """A policy as it was trained, to sample from and to score with.

    An adapter stays beside its base: merged in bfloat16, most of a small update is rounded away.
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
    """An adapter on its base, to be trained on."""
    from peft import PeftModel

    base = adapter_base(source, revision=revision)
    assert base is not None, f"{source} is no adapter"
    model = load_base(base, dtype=dtype, revision=None, quantization=quantization)
    try:
        with warnings.catch_warnings():
            # peft leaves what is missing at its first value, zero, and only warns.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(
                model, str(source), is_trainable=True, revision=revision
            )
    except (OSError, ValueError, KeyError, RuntimeError, UserWarning) as error:
        raise UserError(cannot_load(source, "adapter", error)) from None


def load_base(
    source: Path | str, *, dtype: str, revision: str | None, quantization: str | None = None
) -> PreTrainedModel:
    """Whole weights as they lie in a folder; ``nf4`` holds the linear layers in 4 bits (arXiv:2305.14314)."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    bits = None
    if quantization == "nf4":
        bits = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )

    if isinstance(source, Path):
        source = source.resolve()  # an adapter on top remembers this path
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            str(source),
            dtype=getattr(torch, dtype),
            revision=revision,
            output_loading_info=True,
            **({} if bits is None else {"quantization_config": bits}),
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(cannot_load(source, "model", error)) from None
    missing = sorted(report["missing_keys"])
    if missing:
        # transformers fills what is missing with random numbers and only logs it.
        raise UserError(
            f"{source}: {len(missing)} weights are missing, such as {missing[0]}; "
            "save the model again, whole"
        )
    return model


def cannot_load(source: Path | str, what: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{source}: its {what} cannot be loaded: {text[:300]}{'…' if len(text) > 300 else ''}"
