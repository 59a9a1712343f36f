"""Preference data: read sources, check and deduplicate rows, split by prompt, and write Parquet tables."""
