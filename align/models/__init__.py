"""Language models without training: loading, adapters, tokens, sampling and log-probabilities."""
