"""models/prefix_sharing."""
