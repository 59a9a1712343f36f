"""TRL trainers whose weights, gradients or optimizer state are divided among processes.

Every process reads its models as a whole, because they are checked, merged and given new heads
before a trainer exists; DeepSpeed and FSDP2 divide them when training begins. Finished folders have
whole weights again.
"""

from __future__ import annotations

import sys
from typing import Any


def load_whole_models() -> None:
    """Make transformers load whole weights until a trainer is built, under ZeRO-3 as well.

    The arguments of a trainer, and the trainer, make ``from_pretrained`` divide the weights.
    """
    if "deepspeed" in sys.modules:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


def store_tied_weights_once(trainer: Any) -> None:
    """Leave the second name of a tied weight out of saved models, as transformers does unsharded.

    Gathered weights no longer share memory, from which transformers recognizes them.
    """
    if not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
        return
    gather = trainer.accelerator.get_state_dict
    tied = getattr(trainer.model, "all_tied_weights_keys", {})

    def gather_once(*args: Any, **kwargs: Any) -> dict[str, Any]:
        weights = gather(*args, **kwargs) or {}  # ZeRO-3 returns None on other ranks
        return {name: weight for name, weight in weights.items() if name not in tied}

    trainer.accelerator.get_state_dict = gather_once
