"""Trainer: runs, artifacts, datasets."""
