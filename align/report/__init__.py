"""Pictures and pages that show the results of a run."""
