"""Soaks of a shared teacher and of the run service."""
