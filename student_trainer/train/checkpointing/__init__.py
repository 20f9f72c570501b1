"""Checkpoints: when they are due, saving and restoring."""
