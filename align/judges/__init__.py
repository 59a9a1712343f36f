"""Judges of completions: they score single completions or, later, compare two."""
