"""Preference data: read sources, check and deduplicate rows, split by prompt, write tables."""
