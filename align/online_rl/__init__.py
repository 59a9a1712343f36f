"""online_rl."""
