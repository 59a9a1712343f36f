"""Vector environments: all in one tensor, or one process each."""
