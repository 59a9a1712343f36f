"""models.adapters"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import UserError
from align.models.loading import adapter_base, load_adapter, load_merged

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel


def load_for_training(
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
        return load_merged(source, dtype=dtype, revision=revision), None
    if adapter_base(source, revision=revision) is None:
        return load_merged(source, dtype=dtype, revision=revision), lora_config(lora)
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


def load_reference(
    source: Path | str, *, lora: dict[str, Any] | None, dtype: str, revision: str | None = None
) -> PreTrainedModel | None:
    """The reference that TRL is to be given beside :func:`to_train`'s policy, the same model to the last bit.

    A new adapter has the model below it as its reference, and an adapter that is trained on has a frozen copy of itself:
    TRL makes both, so None. A policy trained in full gets a second model, loaded the same way. TRL's own default loads
    ``config._name_or_path`` instead, which for a merged adapter is the base without it.
    """
    return load_merged(source, dtype=dtype, revision=revision) if lora is None else None
