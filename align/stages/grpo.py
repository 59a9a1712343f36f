"""GRPO: train a policy on rewards that are compared with those of the same prompt."""

from align.online_rl.run import run as run
