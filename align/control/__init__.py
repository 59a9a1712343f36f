"""Classic control: Gymnasium environments trained with the policy-gradient update of PPO."""
