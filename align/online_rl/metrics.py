"""online_rl.metrics"""

from __future__ import annotations

from align.online_rl import experience


def lengths_in_sampling_order(said: experience.Completions) -> list[int]:
    """Lengths of completions in the order in which they were sampled."""
    order = sorted(range(len(said.prompts)), key=lambda i: len(said.prompts[i]))
    return [len(said.completions[i]) for i in order]


def chunks(values: list[int], size: int) -> list[list[int]]:
    return [values[i : i + size] for i in range(0, len(values), size)]
