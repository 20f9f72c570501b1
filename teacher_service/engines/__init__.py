"""Implementations of the Engine protocol."""
