"""Online reinforcement learning of language models: PPO, RLOO and REINFORCE."""
