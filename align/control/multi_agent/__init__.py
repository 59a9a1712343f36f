"""Several agents: MADDPG, and one policy on both sides of a game."""
