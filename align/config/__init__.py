"""Recipe files and the configuration of each stage. It imports pydantic and PyYAML only."""
