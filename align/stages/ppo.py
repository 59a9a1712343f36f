"""PPO: train a policy on rewards with the advantages of a critic."""

from align.online_rl.run import run as run
