"""Training methods with their sources, for model cards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_DPO = "direct preference optimization, DPO (Rafailov et al. 2023, arXiv:2305.18290)"
_KTO = "Kahneman-Tversky optimization, KTO (Ethayarajh et al. 2024, arXiv:2402.01306)"
_APO = "anchored preference optimization, {} (D'Oosterlinck et al. 2024, arXiv:2408.06266)"
_AOT = "alignment via optimal transport, {} (Melnyk et al. 2024, arXiv:2406.05882)"
_LOSSES = {
    "dpo": {
        "sigmoid": _DPO,
        "hinge": "the hinge loss of SLiC-HF (Zhao et al. 2023, arXiv:2305.10425)",
        "ipo": "identity preference optimization, IPO (Azar et al. 2023, arXiv:2310.12036)",
        "exo_pair": "exact optimization, EXO (Ji et al. 2024, arXiv:2402.00856)",
        "nca_pair": "noise contrastive alignment, NCA (Chen et al. 2024, arXiv:2402.05369)",
        "robust": "robust DPO (Ray Chowdhury et al. 2024, arXiv:2403.00409)",
        "bco_pair": "binary classifier optimization, BCO (Jung et al. 2024, arXiv:2404.04656)",
        "sppo_hard": "self-play preference optimization, SPPO (Wu et al. 2024, arXiv:2405.00675)",
        "aot": _AOT.format("AOT, on pairs"),
        "aot_unpaired": _AOT.format("AOT, unpaired"),
        "apo_zero": _APO.format("APO-zero"),
        "apo_down": _APO.format("APO-down"),
        "discopop": "DiscoPOP (Lu et al. 2024, arXiv:2406.08414)",
        "sft": "the likelihood of the chosen completions",
        "sigmoid_norm": "length-normalized DPO (Lambert et al. 2024, arXiv:2411.15124)",
    },
    "kto": {"kto": _KTO, "apo_zero_unpaired": _APO.format("APO-zero, unpaired")},
    "sft": {
        "nll": "supervised fine-tuning",
        "chunked_nll": "supervised fine-tuning",
        "dft": "dynamic fine-tuning, DFT (Wu et al. 2025, arXiv:2508.05629)",
    },
    "reward": {"": "a Bradley-Terry reward model (Ouyang et al. 2022, arXiv:2203.02155, eq. 1)"},
}
_ESTIMATORS = {
    "ppo": "proximal policy optimization, PPO (Schulman et al. 2017, arXiv:1707.06347)",
    "grpo": "group-relative policy optimization, GRPO (Shao et al. 2024, arXiv:2402.03300)",
    "rloo": "REINFORCE leave-one-out, RLOO (Ahmadian et al. 2024, arXiv:2402.14740)",
    "reinforce": "REINFORCE (Williams 1992)",
}
_VARIANTS = {
    ("scale_advantages", "none"): (
        "advantages that are not divided by a deviation, as in Dr. GRPO (Liu et al. 2025, "
        "arXiv:2503.20783)"
    ),
    ("ratio", "sequence"): "ratios of sequences, GSPO (Zheng et al. 2025, arXiv:2507.18071)",
    ("loss", "cispo"): "the loss of CISPO (MiniMax 2025, arXiv:2506.13585)",
    ("loss", "sapo"): "the loss of SAPO (Gao et al. 2025, arXiv:2511.20347)",
    ("loss", "vespo"): "the loss of VESPO (Shen et al. 2026, arXiv:2602.10693)",
    ("filter", "mixed_groups"): "dynamic sampling, DAPO (Yu et al. 2025, arXiv:2503.14476)",
}
"""Settings of online RL that have a name of their own in the literature."""
_LORA = "low-rank adapters, LoRA (Hu et al. 2021, arXiv:2106.09685)"
_NF4 = "a base in 4 bits, QLoRA (Dettmers et al. 2023, arXiv:2305.14314)"
_KL = "a KL penalty towards the reference (Ziegler et al. 2019, arXiv:1909.08593)"


def method(kind: str, settings: Mapping[str, Any]) -> list[str]:
    """The methods of a training stage of a kind, each with its source; empty if unknown.

    ``settings`` are those of the stage, as ``artifact.json`` stores them.
    """
    methods: list[str] = []
    if kind in _LOSSES:
        losses = _LOSSES[kind]
        chosen = settings.get("trainer", {}).get("loss_type", next(iter(losses)))
        names = chosen if isinstance(chosen, list) else [chosen]
        methods += [losses.get(name, f"the loss `{name}` of TRL") for name in names]
    elif kind in _ESTIMATORS:
        methods.append(_ESTIMATORS[kind])
        methods += [text for (key, value), text in _VARIANTS.items() if settings.get(key) == value]
        methods += [_KL] * bool(settings.get("kl_coef"))
    methods += [_LORA] * bool(settings.get("lora"))
    methods += [_NF4] * (settings.get("quantization") == "nf4")
    return methods
