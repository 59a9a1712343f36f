"""Causal language models: new ones with random weights, and trained ones from folders or the Hub.

Training an adapter further, and references, are in :mod:`align.models.adapters`.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import UserError
from align.models.files import AdapterBase, fingerprint, read_adapter_base
from align.models.merging import merge_adapter
from align.models.model_config import WRITTEN_TOKENS, other_head, vocabulary_problem
from align.models.quantization import loading_options, prepare_layers
from align.runtime.out_of_memory import shortage

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


def adapter_base(source: Path | str, *, revision: str | None = None) -> AdapterBase | None:
    """The base model of an adapter; None if ``source`` has full weights.

    Raises:
        ArtifactError: The config of the adapter is malformed, or its base does not exist.
    """
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        config_file = find_adapter_config_file(str(source), revision=revision)
    except (OSError, ValueError):
        return None  # if the Hub cannot be reached, loading the model raises the error
    return None if config_file is None else read_adapter_base(Path(config_file), source)


def pinned_revision(source: Path | str, *, revision: str | None) -> str | None:
    """The commit of a base model on the Hub, or the fingerprint of its folder.

    peft stores it as the ``revision`` of an adapter, and the base is loaded at it again.
    """
    from huggingface_hub import try_to_load_from_cache

    if Path(source).is_dir():
        return fingerprint(Path(source))
    file = try_to_load_from_cache(str(source), "config.json", revision=revision)
    return Path(file).parent.name if isinstance(file, str) else revision


def is_same_base(one: AdapterBase, other: AdapterBase) -> bool:
    """Whether two bases are the same model: one folder, or one commit of a model on the Hub."""
    if Path(one.source).is_dir() or Path(other.source).is_dir():
        return Path(one.source).resolve() == Path(other.source).resolve()
    revisions = {pinned_revision(b.source, revision=b.hub_revision) for b in (one, other)}
    return one.source == other.source and len(revisions) == 1


def load_merged(source: Path | str, *, dtype: str, revision: str | None = None) -> PreTrainedModel:
    """Load a causal language model with trainable weights; an adapter is merged into its base.

    The base is loaded in ``dtype`` even if the adapter was trained on it in 4 bits: merged weights
    are trained further, which quantized ones cannot be.

    Raises:
        UserError: Weights are missing, cannot be loaded, or do not fit the config.
    """
    if adapter_base(source, revision=revision) is not None:
        return merge_adapter(load_adapter(source, dtype=dtype, revision=revision), source)
    return load_base(source, dtype=dtype, revision=revision)


def load_for_inference(
    source: Path | str,
    *,
    dtype: str,
    revision: str | None = None,
    quantization: str | None = None,
) -> PreTrainedModel:
    """Load a policy as it was trained, for sampling and scoring.

    An adapter is not merged: in bfloat16, the rounding of a merge would remove most of a small
    update, and in 4 bits all of it. ``quantization`` is that of the base.

    Raises:
        UserError: Weights are missing, cannot be loaded, or do not fit the config.
    """
    options: dict[str, Any] = {"dtype": dtype, "revision": revision, "quantization": quantization}
    if adapter_base(source, revision=revision) is None:
        return load_base(source, **options)
    return load_adapter(source, **options).get_base_model()


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
    base = adapter_base(source, revision=revision)
    assert base is not None, f"{source} is not an adapter"
    base.check_unchanged(source)
    model = load_base(
        base.source, dtype=dtype, revision=base.hub_revision, quantization=quantization
    )
    return attach_adapter(model, source, base, revision=revision)


def attach_adapter(
    model: PreTrainedModel, source: Path | str, base: AdapterBase, *, revision: str | None
) -> PeftModel:
    """Load the adapter ``source`` onto its loaded ``base``, trainable.

    Raises:
        UserError: Weights of the adapter are missing, cannot be loaded or are not finite.
    """
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            # peft leaves missing weights at their initial value, zero, and only warns.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            wrapped = PeftModel.from_pretrained(
                model, str(source), is_trainable=True, revision=revision
            )
    except Exception as error:
        raise UserError(cannot_load(source, "adapter", error)) from None
    check_finite(source, wrapped)
    config = wrapped.peft_config["default"]
    config.revision = pinned_revision(base.source, revision=base.hub_revision)
    return wrapped


def load_base(
    source: Path | str, *, dtype: str, revision: str | None, quantization: str | None = None
) -> PreTrainedModel:
    """Load full weights; ``nf4`` stores the linear layers in 4 bits.

    Raises:
        UserError: Weights are missing, cannot be loaded, or do not fit the config.
    """
    from transformers import AutoModelForCausalLM

    model, missing = from_pretrained(
        AutoModelForCausalLM,
        source,
        "model",
        dtype=dtype,
        revision=revision,
        quantization=quantization,
    )
    if missing:
        # transformers initializes missing weights randomly and only logs it.
        raise UserError(
            f"{source}: {len(missing)} weights are missing, such as {missing[0]}; "
            "save the complete model again"
        )
    head = other_head(model.config.architectures, "policy")
    if head is not None:
        raise UserError(f"{source}: {head}")
    return model


def from_pretrained(
    auto_class: Any,
    source: Path | str,
    what: str,
    *,
    dtype: str,
    revision: str | None,
    quantization: str | None = None,
    **options: Any,
) -> tuple[PreTrainedModel, list[str]]:
    """Load full weights with a class of transformers; return the model and its missing weights.

    No code of a repository is run, and no pickle is read. ``what`` names the model in messages.

    Raises:
        UserError: The model cannot be loaded, or a weight is not finite.
    """
    import torch

    if isinstance(source, Path):
        source = source.resolve()  # peft stores this path in an adapter
    try:
        model, report = auto_class.from_pretrained(
            str(source),
            dtype=getattr(torch, dtype),
            revision=revision,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **loading_options(quantization, dtype=dtype),
            **options,
        )
    except Exception as error:
        # The files of a model may break transformers at any place, with any exception.
        raise UserError(cannot_load(source, what, error)) from None
    prepare_layers(source, model)
    check_finite(source, model)
    surplus = _weights_of_missing_layers(model, report["unexpected_keys"])
    if surplus:
        # transformers leaves them out and only logs it.
        raise UserError(
            f"{source}: its config describes fewer layers than its weights have, such as "
            f"{min(surplus)}; restore its config.json"
        )
    return model, sorted(report["missing_keys"])


def _weights_of_missing_layers(model: Any, names: Iterable[str]) -> list[str]:
    """Those of the stored weights that belong to a layer behind the last layer of the model."""
    from torch.nn import ModuleList

    lengths = {name: len(m) for name, m in model.named_modules() if isinstance(m, ModuleList)}
    places = [(name, re.match(r"(.+?)\.(\d+)\.", name)) for name in names]
    return [name for name, m in places if m and int(m[2]) >= lengths.get(m[1], sys.maxsize)]


def check_finite(source: Path | str, model: Any) -> None:
    """Check that no weight of a loaded model is NaN or infinite.

    Raises:
        UserError: A weight is; the message names it.
    """
    from align.models.finite_weights import first_not_finite

    name = first_not_finite(model)
    if name is not None:
        raise UserError(
            f"{source}: the weight {name} is not finite; save or download the model again"
        )


def check_vocabulary(source: Path | str, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a model has an embedding for every token that a row can have.

    Raises:
        UserError: It has fewer.
    """
    problem = vocabulary_problem(
        source,
        tokenizer.get_vocab(),
        special={t.content for t in tokenizer.added_tokens_decoder.values() if t.special},
        written=[
            str(tokenizer.chat_template),
            *(getattr(tokenizer, name) for name in WRITTEN_TOKENS),
        ],
        embeddings=model.get_input_embeddings().weight.shape[0],
    )
    if problem is not None:
        raise UserError(problem)


def cannot_load(source: Path | str, what: str, error: Exception) -> str:
    """Error message for a model, adapter or tokenizer that a library failed to load.

    Raises:
        Exception: The error itself, if it is a lack of memory.
    """
    if shortage(error) is not None:
        raise error
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return (
            f"{source}: its {what} needs Python code from its repository, which Align never runs; "
            "choose a model that transformers supports by itself"
        )
    if re.search(r"no file named .*safetensors|does not appear to have a file .*safetensors", text):
        return (
            f"{source}: its {what} has no weights in the safetensors format; a pickle may contain "
            "code and is not read: load it where you trust it, and save it with `save_pretrained`"
        )
    kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
    text = f"{kind}{text}"
    return f"{source}: its {what} cannot be loaded: {text[:300]}{'…' if len(text) > 300 else ''}"
