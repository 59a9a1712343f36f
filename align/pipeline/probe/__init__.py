"""The probe of a plan: the time of each stage, measured with a small part of its work."""
