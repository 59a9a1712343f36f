"""Pure functions over tensors: losses, returns, advantages, statistics.

No configuration, no model, no device, no global random state.
"""
