"""The ranks of one attempt."""
