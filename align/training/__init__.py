"""Shared by the stages that train with TRL: trainer, batches, cached references, token view."""
