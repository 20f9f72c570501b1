"""Rules between several fields of a run: contexts, losses, cross-tokenizer teachers."""
