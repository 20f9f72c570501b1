"""Logs, metrics and traces, and one record for each call."""
