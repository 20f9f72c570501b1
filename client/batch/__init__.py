"""Batch inference: a file of rows through teachers."""
