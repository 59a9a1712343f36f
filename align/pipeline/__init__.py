"""From a recipe to finished artifacts: plan, check before training, run or reuse each stage,
summarize."""
