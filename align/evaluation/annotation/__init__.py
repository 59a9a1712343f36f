"""The page on which people compare completions: ``align annotate``."""
