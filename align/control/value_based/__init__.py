"""Algorithms that learn or compute values of actions, and act greedily by them."""
