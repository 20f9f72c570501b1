"""Bytes, loss and speed of distributions on the wire."""
