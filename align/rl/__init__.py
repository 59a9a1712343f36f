"""What control and language share: a rollout, and the update that learns from it."""
