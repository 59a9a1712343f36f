"""Models and tokenizers: new ones from random weights, trained ones from folders or the Hub, and their adapters.

Adapters are trained on, not stacked. A policy that is an adapter goes on as that adapter; its reference is a frozen copy
of it. Trained in full, the adapter is first merged into its base, and the reference is the same merge. So a fresh policy
equals its reference exactly, whichever way each stage was trained.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import UserError

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def new_tokenizer(
    texts: Iterable[str], *, vocab_size: int, max_length: int
) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer with a ChatML template; eos is ``<|im_end|>``, and pad is not eos."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = train_bpe(texts, vocab_size=vocab_size)
    result = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END_OF_TEXT,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    result.chat_template = CHATML
    return result


def train_bpe(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909, on bytes) with the special tokens of ChatML first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


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


def load_tokenizer(source: Path | str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub id, with a pad token.

    Raises:
        UserError: It cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source), revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(_cannot_load(source, "tokenizer", error)) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


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


def load_whole(source: Path | str, *, dtype: str, revision: str | None = None) -> PreTrainedModel:
    """A causal language model with all its weights; an adapter is merged into its base.

    Raises:
        UserError: The weights cannot be loaded, are not all there, or do not fit the configuration.
    """
    if adapter_base(source, revision=revision) is not None:
        merged = load_adapter(source, dtype=dtype, revision=revision).merge_and_unload()
        return merged.requires_grad_(True)  # peft had frozen the base
    return _load_base(source, dtype=dtype, revision=revision)


def load_to_infer(
    source: Path | str, *, dtype: str, revision: str | None = None
) -> PreTrainedModel:
    """A policy as it was trained, to sample from and to score with.

    An adapter stays beside its base: merged in bfloat16, most of a small update is rounded away.
    """
    if adapter_base(source, revision=revision) is None:
        return _load_base(source, dtype=dtype, revision=revision)
    return load_adapter(source, dtype=dtype, revision=revision).get_base_model()


def load_adapter(source: Path | str, *, dtype: str, revision: str | None = None) -> PeftModel:
    """An adapter on its base, to be trained on."""
    from peft import PeftModel

    base = adapter_base(source, revision=revision)
    assert base is not None, f"{source} is no adapter"
    model = _load_base(base, dtype=dtype, revision=None)
    try:
        with warnings.catch_warnings():
            # peft leaves what is missing at its first value, zero, and only warns.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(
                model, str(source), is_trainable=True, revision=revision
            )
    except (OSError, ValueError, KeyError, RuntimeError, UserWarning) as error:
        raise UserError(_cannot_load(source, "adapter", error)) from None


def _load_base(source: Path | str, *, dtype: str, revision: str | None) -> PreTrainedModel:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    if isinstance(source, Path):
        source = source.resolve()  # an adapter on top remembers this path
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            str(source), dtype=getattr(torch, dtype), revision=revision, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(_cannot_load(source, "model", error)) from None
    missing = sorted(report["missing_keys"])
    if missing:
        # transformers fills what is missing with random numbers and only logs it.
        raise UserError(
            f"{source}: {len(missing)} weights are missing, such as {missing[0]}; "
            "save the model again, whole"
        )
    return model


def _cannot_load(source: Path | str, what: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{source}: its {what} cannot be loaded: {text[:300]}{'…' if len(text) > 300 else ''}"


def to_train(
    source: Path | str,
    *,
    lora: dict[str, Any] | None,
    dtype: str,
    revision: str | None = None,
) -> tuple[PreTrainedModel | PeftModel, LoraConfig | None]:
    """A policy as a trainer of TRL wants it: the model, and the configuration of a new adapter where one is due.

    ``lora`` has ``r``, ``alpha``, ``dropout`` and ``target_modules``; None trains all weights. An adapter is trained on,
    and then its own shape must be ``lora``'s.
    """
    from peft import LoraConfig

    if lora is None:
        return load_whole(source, dtype=dtype, revision=revision), None
    if adapter_base(source, revision=revision) is None:
        config = LoraConfig(
            r=lora["r"],
            lora_alpha=lora["alpha"],
            lora_dropout=lora["dropout"],
            target_modules=lora["target_modules"],
            task_type="CAUSAL_LM",
        )
        return load_whole(source, dtype=dtype, revision=revision), config
    model = load_adapter(source, dtype=dtype, revision=revision)
    own = model.peft_config["default"]
    found = f"r={own.r}, alpha={own.lora_alpha}, dropout={own.lora_dropout}"
    asked = f"r={lora['r']}, alpha={lora['alpha']}, dropout={lora['dropout']}"
    if found != asked:
        raise UserError(
            f"{source}: an adapter with {found}, and `lora` asks for {asked}; an adapter is trained on as it is: "
            "set these, or remove `lora` to merge it"
        )
    return model, None


def reference(
    source: Path | str, *, lora: dict[str, Any] | None, dtype: str, revision: str | None = None
) -> PreTrainedModel | None:
    """The reference that TRL is to be given beside :func:`to_train`'s policy, the same model to the last bit.

    A new adapter has the model below it as its reference, and an adapter that is trained on has a frozen copy of itself:
    TRL makes both, so None. A policy trained in full gets a second model, loaded the same way. TRL's own default loads
    ``config._name_or_path`` instead, which for a merged adapter is the base without it.
    """
    return load_whole(source, dtype=dtype, revision=revision) if lora is None else None


def load_classifier(source: Path | str, *, dtype: str) -> PreTrainedModel:
    """A reward model: a sequence classifier with one output; an adapter is merged into its base.

    Raises:
        UserError: It cannot be loaded, or has no trained head, or several outputs.
    """
    import torch
    from peft import PeftModel
    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification

    base = adapter_base(source)
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            str(base or source),
            num_labels=1,
            dtype=getattr(torch, dtype),
            output_loading_info=True,
        )
        if base is not None:
            model = PeftModel.from_pretrained(model, str(source)).merge_and_unload()
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(_cannot_load(source, "reward model", error)) from None
    if base is None and report["missing_keys"]:
        raise UserError(
            f"{source}: no reward model: its {sorted(report['missing_keys'])[0]} is missing; name a `reward` stage, or a "
            "sequence classifier with one output"
        )
    return model
