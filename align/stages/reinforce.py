"""REINFORCE: train a policy on rewards that are normalized over the batch."""

from align.online_rl.run import run as run
