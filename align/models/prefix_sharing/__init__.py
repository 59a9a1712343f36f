"""Prefix sharing: one forward pass without padding, in which every shared prefix is computed once."""
