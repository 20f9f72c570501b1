"""Generates docs/reference and the JSON Schema of run files from the code."""
