"""Prompts that are tried on a teacher over HTTP."""
