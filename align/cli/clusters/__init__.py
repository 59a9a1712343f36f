"""Configurations of verl and OpenRLHF for a stage of online RL: `align export --for`."""
