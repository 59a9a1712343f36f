"""A reward model as a judge: a sequence classifier with one output, or an adapter on one, from a folder or the Hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from align import generation, models

Messages = Sequence[Mapping[str, str]]


def load(
    source: Path | str, *, dtype: str, batch_size: int
) -> Callable[[Sequence[Messages], Sequence[Messages]], list[float]]:
    """The function that scores completions of prompts: the logit at the last token of each, which is eos."""
    import torch
    from accelerate import PartialState

    tokenizer = models.load_tokenizer(source)
    model = models.load_classifier(source, dtype=dtype).to(PartialState().device).eval()
    model.config.pad_token_id = tokenizer.pad_token_id

    def scores(prompts: Sequence[Messages], completions: Sequence[Messages]) -> list[float]:
        rows = [
            _ended(
                tokenizer.apply_chat_template([*prompt, *completion], return_dict=False),
                tokenizer.eos_token_id,
            )
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        found = [0.0] * len(rows)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            ids, mask = generation.padded(
                [rows[i] for i in batch],
                pad=tokenizer.pad_token_id,
                side="right",
                device=model.device,
            )
            with torch.inference_mode():
                # The head scores every place; which one counts is said by the mask, for a pad may equal eos.
                hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
                logits = model.score(hidden)[..., 0].float()
            last = mask.sum(dim=1) - 1
            for row, value in zip(
                batch, logits.gather(1, last[:, None])[:, 0].tolist(), strict=True
            ):
                found[row] = value
        return found

    return scores


def _ended(ids: list[int], eos: Any) -> list[int]:
    """Tokens up to the last eos: some templates write a line break behind it, others no eos at all."""
    last = max((place for place, token in enumerate(ids) if token == eos), default=None)
    return [*ids, eos] if last is None else ids[: last + 1]
