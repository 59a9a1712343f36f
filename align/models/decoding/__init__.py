"""The loop over the tokens of completions: step by step, or with compiled steps."""
