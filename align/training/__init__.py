"""Shared by the stages that train with TRL: trainer, batches, reference log-probabilities, tokens."""
