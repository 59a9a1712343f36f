"""Alignment of language models: SFT, preference optimization, PPO and win rates, by recipe."""

__version__ = "0.2.0"
