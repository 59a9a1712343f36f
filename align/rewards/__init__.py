"""Everything that gives a completion a score: reward models, functions, and the gold score."""
