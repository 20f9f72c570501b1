"""Teacher: generate, score, adapters."""
