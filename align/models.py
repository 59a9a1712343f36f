"""Models and tokenizers: new ones from random weights, trained ones from folders or the Hub, and their adapters.

Adapters are trained on, not stacked. A policy that is an adapter goes on as that adapter; its reference is a frozen copy
of it. Trained in full, the adapter is first merged into its base, and the reference is the same merge. So a fresh policy
equals its reference exactly, whichever way each stage was trained.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import UserError

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SCORE = "score"  # the head of transformers' decoders with labels
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
    return load_base(source, dtype=dtype, revision=revision)


def load_to_infer(
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
        raise UserError(_cannot_load(source, "adapter", error)) from None


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
    if lora is None:
        return load_whole(source, dtype=dtype, revision=revision), None
    if adapter_base(source, revision=revision) is None:
        return load_whole(source, dtype=dtype, revision=revision), lora_config(lora)
    model = load_adapter(source, dtype=dtype, revision=revision)
    check_lora(source, model, lora)
    return model, None


def lora_config(lora: dict[str, Any], **own: Any) -> LoraConfig:
    """Peft's configuration of an adapter; of a policy, where ``own`` does not say otherwise."""
    from peft import LoraConfig

    return LoraConfig(
        r=lora["r"],
        lora_alpha=lora["alpha"],
        lora_dropout=lora["dropout"],
        target_modules=lora["target_modules"],
        **{"task_type": "CAUSAL_LM", **own},
    )


def check_lora(source: Path | str, model: PeftModel, lora: dict[str, Any]) -> None:
    """Make sure that an adapter which is trained on has the shape that is asked for.

    Raises:
        UserError: It has another.
    """
    own = model.peft_config["default"]
    found = f"r={own.r}, alpha={own.lora_alpha}, dropout={own.lora_dropout}"
    asked = f"r={lora['r']}, alpha={lora['alpha']}, dropout={lora['dropout']}"
    if found != asked:
        raise UserError(
            f"{source}: an adapter with {found}, and `lora` asks for {asked}; an adapter is trained on as it is: "
            "set these, or remove `lora` to merge it"
        )


def reference(
    source: Path | str, *, lora: dict[str, Any] | None, dtype: str, revision: str | None = None
) -> PreTrainedModel | None:
    """The reference that TRL is to be given beside :func:`to_train`'s policy, the same model to the last bit.

    A new adapter has the model below it as its reference, and an adapter that is trained on has a frozen copy of itself:
    TRL makes both, so None. A policy trained in full gets a second model, loaded the same way. TRL's own default loads
    ``config._name_or_path`` instead, which for a merged adapter is the base without it.
    """
    return load_whole(source, dtype=dtype, revision=revision) if lora is None else None


# Reward models -------------------------------------------------------------------------------------------------------


def new_scorer(
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
        before = to_train(source, lora=lora, dtype=dtype, revision=revision)[0]
        tuned = get_peft_model_state_dict(before)
        policy = before.unload()
    else:
        policy = load_whole(source, dtype=dtype, revision=revision)
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


def load_scorer(source: Path | str, *, dtype: str, revision: str | None = None) -> PreTrainedModel:
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
        raise UserError(_cannot_load(source, "reward model", error)) from None
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


def load_whole_scorer(source: Path | str, *, dtype: str) -> PreTrainedModel:
    """A reward model with all its weights; an adapter is merged into its base."""
    base = adapter_base(source)
    model = load_scorer(source, dtype=dtype)
    if base is None:
        return model.requires_grad_(True)
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    below = AutoModelForSequenceClassification.from_pretrained(
        base, dtype=model.dtype, num_labels=1
    )
    return PeftModel.from_pretrained(below, str(source)).merge_and_unload().requires_grad_(True)


def add_scorer(model: PeftModel, source: Path | str, *, name: str) -> Any:
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


def pad_for_scores(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer a pad token that is not eos.

    A classifier of transformers reads the last token that is not a pad: where pad is eos, that is the one before the end.

    Raises:
        UserError: There is no other special token to take.
    """
    special = [tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token]
    special += [str(token) for token in tokenizer.added_tokens_decoder.values()]
    special += ["\u0100", "<0x00>"]  # the null byte, as byte-level BPE and SentencePiece write it
    eos = tokenizer.eos_token
    known = tokenizer.get_vocab()
    found = next((token for token in special if token and token != eos and token in known), None)
    if found is None:
        raise UserError(
            f"{tokenizer.name_or_path}: its tokenizer has no token but eos to pad with, and a reward model reads the "
            "last token that is no pad; add a pad token to it and save it"
        )
    tokenizer.pad_token = found
