"""RLOO: train a policy on rewards that are compared with the others of the same prompt."""

from align.online_rl.run import run as run
