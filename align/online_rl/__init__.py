"""Online reinforcement learning of language models: PPO, GRPO, RLOO, REINFORCE."""
