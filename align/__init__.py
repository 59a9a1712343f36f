"""Align: supervised fine-tuning, preference optimization and held-out win rates, chained by recipe files."""

__version__ = "0.2.0"
