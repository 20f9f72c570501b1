"""Callers, sessions, origins, rates and headers."""
