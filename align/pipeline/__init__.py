"""From a recipe to finished artifacts: plan, check, run or reuse stages, summarize."""
