"""Policy-gradient updates, shared by classic control and language models."""
