"""Prefix sharing: a forward pass without padding that computes every shared prefix once."""
