"""Logits to top-k, tail mass and samples."""
