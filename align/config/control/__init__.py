"""Configuration of ``control``: keys of all algorithms, and those of each family."""
