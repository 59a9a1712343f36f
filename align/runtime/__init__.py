"""Services for running stages: artifacts, checkpoints, locks, ranks, signals, progress."""
