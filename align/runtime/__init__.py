"""What a running stage needs: artifacts, checkpoints, locks, ranks, signals, progress, exit codes."""
